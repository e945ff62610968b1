"""One's own images: any size and mode, good files and bad ones."""

import base64
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps

import diffender
from diffender.classifiers.dataset import as_rgb, fit_image, open_image, sample_items
from diffender.config import RunOptions
from diffender.evaluation.records import append_records
from diffender.photographs import Defender, Options, find_images, main, refuse_to_replace, resolved, working_size
from diffender.pipeline import DIFFender
from diffender.report.page import inline, photographs_page
from diffender.stable_diffusion.model import MODELS
from diffender.utils.errors import InputError
from diffender.utils.files import sha256
from diffender.utils.images import to_image
from diffender.utils.options import change

FAST = ("--draws", "1", "--steps", "1", "--quiet")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(sample_items()[0].path).convert("RGB")


def test_the_page_shows_what_was_defended(tmp_path):
    """What is transparent is white, and 16 bits become 8."""
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 127 << 8, np.uint16)).save(tmp_path / "deep.png")
    for name, value in (("clear", 255), ("deep", 127)):
        kind, _, content = inline(tmp_path / f"{name}.png").partition(",")
        assert kind == "data:image/jpeg;base64"
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        assert abs(seen.mean() - value) < 1, name


def test_the_page_says_what_stays(tmp_path):
    for composite, says in ((True, "Outside of the mask, photographs stay"), (False, "All pixels were painted anew.")):
        assert says in photographs_page([], tmp_path, {"composite": composite}, "defend")


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("tiny", (500, 500), (224, 224)),
        ("tiny", (640, 480), (192, 256)),
        ("tiny", (300, 900), (384, 128)),
        ("tiny", (10, 5000), (448, 128)),
        ("sd15-inpainting", (1920, 1080), (384, 704)),
        ("sd15-inpainting", (1, 1), (512, 512)),
    ],
)
def test_proportions_are_kept(name, size, expected):
    found = working_size(size, MODELS[name])
    assert found == expected
    assert all(side % MODELS[name].multiple == 0 for side in found)


@pytest.mark.parametrize(
    ("size", "mode"), [((301, 177), "RGB"), ((90, 200), "L"), ((64, 64), "RGBA"), ((1, 1), "CMYK")]
)
def test_images_of_any_size_and_mode(photo, size, mode):
    image = photo.resize(size).convert(mode)
    found = Defender()(image)
    assert found.restored.size == found.mask.size == found.heatmap.size == size
    assert found.record["size"] == list(size)
    outside = found.mask.point(lambda v: 255 - v)
    change = ImageChops.difference(found.restored, image.convert("RGB")).convert("L")
    assert ImageChops.multiply(change, outside).getextrema() == (0, 0), "pixels outside the mask stay"


def test_the_same_name_gives_the_same_picture(photo):
    defend = Defender()
    a, b, c = (defend(photo, name) for name in ("a", "a", "b"))
    assert a.restored.tobytes() == b.restored.tobytes()
    assert a.heatmap.tobytes() != c.heatmap.tobytes()


def test_a_classifier_looks_at_the_image_and_then_at_what_is_left_of_it(target, photo, monkeypatch):
    """Under the noise of --seed."""
    asked, draw = [], DIFFender.sample_noise
    monkeypatch.setattr(DIFFender, "sample_noise", lambda self, *given: asked.append(given) or draw(self, *given))
    defender = Defender(Options(run=RunOptions(seed=7)), target.defense)
    monkeypatch.setattr(defender, "look", lambda image: image)
    found = defender(photo, "a")
    assert found.restored != photo
    assert (found.record["before"], found.record["after"]) == (photo, found.restored)
    assert found.record["largest_z_score"] > target.defense.cfg.theta, "something is masked"
    assert asked == [(["a"], 7, "defend")]


def test_a_classifier_tells_its_first_class_and_how_sure_it_is(target, photo):
    defender = Defender(Options(classifier="efficientnet_lite0"), target.defense)
    p = target.classifier(fit_image(photo, target.classifier.cfg)[None]).softmax(dim=1)[0]
    seen = defender.look(photo)
    assert (seen["class"], seen["confidence"]) == (p.argmax().item(), pytest.approx(p.max().item(), abs=1e-3))


def test_pictures_are_rounded_to_the_nearest_of_256_levels():
    levels = torch.arange(256) / 255
    for shift in (0, 0.4 / 255, -0.4 / 255):
        assert np.asarray(to_image((levels + shift)[None, None])).ravel().tolist() == [*range(256)]


def test_files_of_prompts_and_of_the_classifier_are_known_by_their_content(tmp_path):
    for name in ("prompts", "net"):
        (tmp_path / name).write_text(name)
    opts = change(Options(), prompts=str(tmp_path / "prompts"), classifier_weights=str(tmp_path / "net"))
    told = resolved(opts)["sha256"]
    assert (told["prompts"], told["classifier"]) == tuple(sha256(tmp_path / name) for name in ("prompts", "net"))


def test_names_of_images(tmp_path):
    for file in ("a.png", "a.jpg", "sub/a.png", "notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert [name for name, _ in find_images((str(tmp_path),), tmp_path / "out")] == ["a", "a_", "sub__a"]
    assert len(find_images((str(tmp_path),), tmp_path / "sub")) == 2, "what an earlier run made is no input"
    (tmp_path / "sub" / "a_mask.png").touch()
    assert len(find_images((str(tmp_path / "sub"),), tmp_path)) == 2, "all of them lie below --out"
    assert len(find_images((str(tmp_path / "sub"),), tmp_path / "sub")) == 2, "as long as no run is there"
    with pytest.raises(InputError, match="a_mask.png is there already and would be written over"):
        refuse_to_replace(["a"], tmp_path / "sub")
    (tmp_path / "sub" / "config.json").touch()
    refuse_to_replace(["a"], tmp_path / "sub")
    files = (str(tmp_path / "sub" / "a.png"), str(tmp_path / "sub" / "a_mask.png"))
    for given in (files, files[:1], (str(tmp_path / "sub"),)):
        assert [name for name, _ in find_images(given, tmp_path / "sub")] == ["a"]
    for made in ("a.jpg", "a__restored.png", "b_restored.png"):
        (tmp_path / "sub" / made).touch()
    append_records(tmp_path / "sub" / "per_image.jsonl", [{"id": "b"}])
    again = find_images((str(tmp_path / "sub"),), tmp_path / "sub")
    assert [name for name, _ in again] == ["a", "a_"], "also of names made unique, and of images that are gone"
    (tmp_path / "sub" / "a.jpg").unlink()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "loop" in [name for name, _ in find_images((str(tmp_path),), tmp_path / "out")], "told of when it is read"
    with pytest.raises(InputError, match="no images given"):
        find_images((), tmp_path / "out")
    with pytest.raises(InputError, match="notes.txt is no image"):
        find_images((str(tmp_path / "notes.txt"),), tmp_path / "out")
    with pytest.raises(InputError, match="an empty name"):
        find_images(("",), tmp_path / "out")
    with pytest.raises(InputError, match="is a web address"):
        find_images(("https://example.org/a.png",), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in"):
        find_images((str(tmp_path / "empty"),), tmp_path / "out")


def test_the_command(tmp_path, photo, call):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in/photo.jpg")
    (tmp_path / "in/broken.png").write_bytes(b"no image")

    def run(*paths, classifier="efficientnet_lite0"):
        return call(main, "defend", *paths, "--out", "out", "--classifier", classifier)

    code, out, error = run(tmp_path / "in", tmp_path / "gone.jpg")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "no file or folder" in error and not (tmp_path / "out").exists()
    code, out, error = run(tmp_path / "in")
    assert code == 1
    assert "1 of 2 images defended" in out
    assert "broken.png: it does not decode" in error
    (line,) = (tmp_path / "out/per_image.jsonl").read_text().splitlines()
    record = json.loads(line)
    expected = {"id", "file", "sha256", "size", "masked", "largest_z_score", "before", "after", "seconds"}
    assert set(record) == expected
    assert record["before"]["label"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "per_image.jsonl",
        "photo_heatmap.png",
        "photo_mask.png",
        "photo_restored.png",
        "report.html",
    ]
    assert Image.open(tmp_path / "out/photo_mask.png").size == photo.size
    # More images join; those that are done stay; another image of that name, and other settings, are refused.
    photo.resize((50, 70)).save(tmp_path / "more.png")
    assert run(tmp_path / "in/photo.jpg", tmp_path / "more.png")[0] == 0
    lines = (tmp_path / "out/per_image.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["photo", "more"]
    assert lines[0] == line
    (tmp_path / "out/photo_mask.png").unlink()  # what is gone is made again, and told of once
    assert run(tmp_path / "in/photo.jpg")[0] == 0
    assert (tmp_path / "out/photo_mask.png").is_file()
    assert (tmp_path / "out/per_image.jsonl").read_text().splitlines() == lines
    photo.rotate(90).save(tmp_path / "in/photo.jpg")
    code, _, error = run(tmp_path / "in/photo.jpg")
    assert code == 1
    assert "choose another --out" in error
    code, _, error = run(tmp_path / "more.png", classifier="none")
    assert code == 2
    assert "other settings (classifier: efficientnet_lite0, now none)" in error


def test_a_name_that_is_no_utf_8_is_shown_and_linked(tmp_path, photo, call):
    (tmp_path / "in").mkdir()
    file, out = (os.fsdecode(os.fsencode(tmp_path) + end) for end in (b"/in/\xff.jpg", b"/out\xff"))
    try:
        photo.resize((30, 20)).save(file)
    except OSError:
        pytest.skip("this file system takes no such names")
    code, told, error = call(main, "defend", file, *FAST, "--out", out)
    assert code == 0, error
    assert f"results in {tmp_path}/out\\xff" in told
    (record,) = map(json.loads, Path(out, "per_image.jsonl").read_text().splitlines())
    assert (record["id"], record["file"]) == ("\\xff", file)
    assert Path(out, "\\xff_restored.png").is_file()
    page = Path(out, "report.html").read_text("utf-8")
    assert 'href="../in/%FF.jpg"' in page and 'href="%5Cxff_restored.png"' in page
    assert "in/\\xff.jpg" in page, "the command"


def test_long_names_are_shortened_and_stay_apart(tmp_path, photo, call):
    (tmp_path / "in").mkdir()
    names = ["a" * 250, "a" * 249 + "b", "é" * 120 + "a", "short"]
    for name in names:
        photo.resize((30, 20)).save(tmp_path / f"in/{name}.jpg")
    code, told, error = call(main, "defend", "in", *FAST, "--out", "out")
    assert code == 0, error
    records = map(json.loads, (tmp_path / "out/per_image.jsonl").read_text().splitlines())
    ids = {Path(record["file"]).stem: record["id"] for record in records}
    assert ids["short"] == "short" and len(set(ids.values())) == len(names)
    for name, shown in ids.items():
        assert len(shown.encode()) <= 200 and shown[:80] == name[:80]
        assert (tmp_path / f"out/{shown}_restored.png").is_file()


def test_settings_are_those_in_effect_whether_given_or_not(tmp_path, photo, call):
    photo.resize((30, 20)).save(tmp_path / "a.png")

    def run(*flags):
        code, _, error = call(main, "defend", "a.png", *FAST, "--out", "out", *flags)
        return code, error

    assert run() == (0, "")
    config = json.loads((tmp_path / "out/config.json").read_text())
    effective = diffender.load(draws=1, steps=1).cfg
    told = config["model"], config["prompt"], config.get("theta"), config.get("noise_ratio")
    assert told == ("tiny", "tuned", effective.theta, effective.noise_ratio)
    assert "noise_ratio" in (tmp_path / "out/report.html").read_text("utf-8")
    same = ("--theta", str(effective.theta), "--prompt", "tuned", "--model", "tiny")
    assert run(*same) == (0, "")
    for flags in (("--theta", "2.5"), ("--prompt", "manual")):
        code, error = run(*flags)
        assert code == 2 and f"other settings ({flags[0][2:]}" in error


def test_an_empty_out_is_refused(tmp_path, photo, call):
    photo.resize((30, 20)).save(tmp_path / "a.png")
    assert call(main, "defend", "a.png", "--out", "") == (
        2,
        "",
        "defend: --out is empty; name a folder for the results, . for this one\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_image_too_long_for_the_classifier_is_defended_without_it(tmp_path, photo, call):
    photo.resize((3, 500)).save(tmp_path / "long.png")
    flags = (*FAST, "--out", "out", "--classifier", "efficientnet_lite0")
    code, _, error = call(main, "defend", "long.png", *flags)
    assert code == 0, error
    record = json.loads((tmp_path / "out/per_image.jsonl").read_text())
    assert record["size"] == [3, 500] and "before" not in record and "after" not in record
    assert Image.open(tmp_path / "out/long_restored.png").size == (3, 500)


def test_images_without_pixels_and_of_32_bits_are_refused(tmp_path):
    dark, deep = np.full((4, 4), 200, np.int32), np.full((4, 4), 70_000, np.int32)
    for i, (image, says) in enumerate((
        (Image.fromarray(deep), r"an image of 32 bits \(mode I\); allowed are 8 and 16 bits"),
        (Image.fromarray(-deep), "32 bits"),
        (Image.fromarray(dark), "32 bits"),
        (Image.fromarray(dark.astype(np.float32)), r"32 bits \(mode F\)"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=says):
            diffender.defend(image)
        image.save(tmp_path / f"{i}.tif")
        with pytest.raises(InputError, match=rf"{i}\.tif is an image of 32 bits"):
            open_image(tmp_path / f"{i}.tif")
    assert as_rgb(Image.fromarray(dark << 8)).getpixel((0, 0)) == (200, 200, 200), "a file of 16 bits, to some Pillow"
    for size in ((5, 0), (0, 5)):
        with pytest.raises(InputError, match=f"an image of {size[0]} x {size[1]} pixels; give one that has some"):
            diffender.defend(Image.new("RGB", size))


def test_the_page_shows_no_other_file_in_place_of_a_photograph(tmp_path, photo, call):
    photo.resize((30, 20)).save(tmp_path / "a.png")
    photo.resize((20, 20)).save(tmp_path / "b.png")
    assert call(main, "defend", "a.png", *FAST, "--out", "out")[0] == 0
    assert 'href="../a.png"' in (tmp_path / "out/report.html").read_text("utf-8")
    (tmp_path / "a.png").write_text("no image any more")
    code, told, _ = call(main, "defend", "a.png", *FAST, "--out", "out", "b.png")  # in whatever order
    assert code == 1 and "1 of 2 images defended" in told
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert 'href="../a.png"' not in page and 'href="a_restored.png"' in page and 'href="../b.png"' in page


def test_in_one_line_from_python(photo, pasted):
    defense = diffender.load(draws=1, steps=1)
    assert (defense.cfg.draws, defense.cfg.steps, defense.cfg.theta) == (1, 1, diffender.EMBEDDED.theta)
    manual = diffender.load(prompt="manual")
    assert torch.equal(manual.contexts.restore, diffender.contexts_for("manual", manual.model).restore)
    restored = diffender.defend(pasted, defense)
    assert restored.shape == pasted.shape and not torch.equal(restored, pasted)
    assert not torch.equal(diffender.defend(pasted, defense, seed=1), restored)
    picture = to_image(pasted[0])
    first, second = diffender.defend([picture, picture], defense)
    assert first != second and first != diffender.defend(picture, defense, seed=1), "noise of each place and seed"
    one, two = photo, photo.resize((90, 60)).convert("L")
    both = diffender.defend([one, two], defense)
    assert [image.size for image in both] == [one.size, two.size]
    assert diffender.defend(one, defense).tobytes() == both[0].tobytes()
    with pytest.raises(InputError, match="no file"):
        diffender.load("nothing.safetensors")
    with pytest.raises(InputError, match="no file or folder nothing.safetensors"):
        diffender.load(Path("nothing.safetensors"))
    with pytest.raises(InputError, match=r"no file or folder tinny; .* the name of a model: tiny, .*nearest: tiny"):
        diffender.load("tinny")


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser(tmp_path, photo, browser, width):
    """Photographs of any shape, a hostile name; what is masked comes first."""
    names = ("calm", "<b>")
    for name, size in zip(names, ((600, 900), (120, 240)), strict=True):
        for stage in ("photo", "heatmap", "mask", "restored"):
            photo.resize(size).save(tmp_path / f"{name}_{stage}.png")
    seen = {
        "before": {"class": 1, "label": "cat<img src=y onerror=alert(1)>, x", "confidence": 0.5},
        "after": {"class": 2, "label": "dog", "confidence": 1},
    }
    shared = {"largest_z_score": 3.1}
    records = [
        {"id": n, "file": str(file), "sha256": sha256(file), "masked": m} | shared | more
        for n, m, more in zip(names, (0.0, 0.25), ({}, seen), strict=True)
        if (file := tmp_path / f"{n}_photo.png")
    ]
    html = photographs_page(records, tmp_path, {"seed": 0}, "python -m diffender defend")
    assert "In 1 of 2 photographs something was masked, 25.0 % of their pixels on average." in html
    (tmp_path / "report.html").write_text(html)
    tab, mistakes = browser.new_page(viewport={"width": width, "height": 900}), []
    tab.on("pageerror", lambda e: mistakes.append(str(e)))
    tab.on("dialog", lambda d: (mistakes.append(d.message), d.dismiss()))  # the hostile label was run
    tab.goto((tmp_path / "report.html").as_uri())
    cards = tab.locator(".card").filter(visible=True)
    assert cards.first.locator("h3").inner_text().startswith("<b> 25.0 % masked")
    assert "cat<img src=y onerror=alert(1)> 50\N{NO-BREAK SPACE}%" in cards.first.inner_text()
    boxes = [figure.bounding_box() for figure in cards.first.locator("figure").all()]
    assert len(boxes) == 5
    if width == 1300:
        assert len({box["y"] for box in boxes}) == 1, "in one row"
        assert boxes[-1]["x"] + boxes[-1]["width"] > 0.9 * width, "which fills the screen"
    for name, count in {"masked": 1, "untouched": 1, "changed": 1, "every": 2}.items():
        tab.locator(f"#{name}").check()
        assert cards.count() == count, name
    cards.first.locator("input[type=range]").fill("20")
    assert cards.first.locator(".pair").evaluate("e => e.style.getPropertyValue('--cut')") == "20%"
    drawn = "() => [...document.images].filter(i => i.src && i.complete && !i.naturalWidth).length"
    assert tab.evaluate(drawn) == 0
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    assert cards.first.locator("a").first.get_attribute("href") == "%3Cb%3E_photo.png"

    def enlarged(card, source, size):
        """Whether the picture comes from there, in this size, and fits."""
        card.locator(".enlarge").first.click()
        picture = "document.querySelector('#large img')"
        found = "([s, w, h]) => {0}.src.startsWith(s) && {0}.naturalWidth == w && {0}.naturalHeight == h"
        tab.wait_for_function(found.format(picture), arg=[source, *size])
        box = tab.locator("#large img").bounding_box()
        tab.keyboard.press("Escape")
        return box["y"] >= 0 and box["y"] + box["height"] <= 900 and box["x"] + box["width"] <= width

    assert enlarged(cards.first, "file:", (120, 240))
    assert enlarged(cards.last, "file:", (600, 900))
    (tmp_path / "calm_photo.png").unlink()  # as where the page was sent alone
    tab.reload()
    assert enlarged(cards.last, "data:", (299, 448))
    assert mistakes == []
    tab.close()


def test_images_are_taken_as_they_are_seen(tmp_path):
    """16 bits, transparency, a turned camera, an animation."""
    deep = Image.fromarray((torch.arange(256).repeat(8, 1) * 257).numpy().astype("uint16"))
    deep.save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((200, 3)) == (200, 200, 200)
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", upright=True).size == (20, 30)
    assert open_image(tmp_path / "turned.jpg").size == (30, 20)
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHIHH", 0x0100, 2, 1, 1, 0)
    damaged = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)  # a width that is text
    Image.new("RGB", (30, 20)).save(tmp_path / "damaged.jpg", exif=damaged)
    assert open_image(tmp_path / "damaged.jpg", upright=True).size == (20, 30)
    for orientation in range(1, 9):  # as Pillow turns them
        exif[0x0112] = orientation
        Image.radial_gradient("L").crop((0, 0, 30, 20)).save(tmp_path / "any.png", exif=exif)
        pillows = ImageOps.exif_transpose(Image.open(tmp_path / "any.png")).convert("RGB")
        assert open_image(tmp_path / "any.png", upright=True).tobytes() == pillows.tobytes()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(tmp_path / "moving.webp").getpixel((0, 0)) == (255, 0, 0)


def test_a_turned_photograph_is_defended_upright_from_python_as_by_the_command(tmp_path, photo):
    defense, exif = diffender.load(draws=1, steps=1), Image.Exif()
    exif[0x0112] = 6
    photo.resize((90, 60)).save(tmp_path / "turned.jpg", exif=exif)
    restored = diffender.defend(Image.open(tmp_path / "turned.jpg"), defense)
    assert restored.size == (60, 90)
    upright = open_image(tmp_path / "turned.jpg", upright=True)
    assert restored.tobytes() == diffender.defend(upright, defense).tobytes()


def test_tensors_are_defended_as_pictures_are(photo):
    """Whatever their proportions; and a defence that cannot work at these says so, as do things that are no images."""
    from torchvision.transforms.functional import pil_to_tensor

    wide = photo.resize((300, 150))
    x = pil_to_tensor(wide)[None].float() / 255
    found = diffender.defend(x)[0]
    assert (found - pil_to_tensor(diffender.defend(wide)).float() / 255).abs().max() < 0.6 / 255
    model = diffender.load()
    classifier = diffender.load_classifier("efficientnet_lite0")
    hardened = diffender.Hardened(model, diffender.PatchCleanser(classifier, area=0.05, masks=2))
    with pytest.raises(InputError, match="this one is none; crop it"):
        diffender.defend(wide, hardened)
    for images, says in (
        (x.numpy(), "an image is a ndarray"),
        ([x], "an image is a Tensor"),
        (x[:0], "there are none"),
    ):
        with pytest.raises(InputError, match=says):
            diffender.defend(images)
    with pytest.raises(InputError, match="the defence is a str"):
        diffender.defend(wide, "tiny")
    for given, says in (
        ({"thetta": 2.0}, "nearest: theta"), ({"theta": "2"}, "it must be of type float"), ({"draws": 0}, "at least 1"),
        ({"prompt": "best"}, "choose one of tuned"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            diffender.load(**given)
