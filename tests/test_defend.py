"""One's own pictures: any size and mode, good files and bad ones."""

import json
import subprocess
import sys

import pytest
from PIL import Image, ImageChops

from diffender.data import sample_items
from diffender.defend import Defender, find_pictures, working_size
from diffender.diffusion import PRESETS
from diffender.errors import InputError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(sample_items()[0].path).convert("RGB")


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
    found = working_size(size, PRESETS[name])
    assert found == expected
    assert all(side % PRESETS[name].multiple == 0 for side in found)


@pytest.mark.parametrize(
    ("size", "mode"), [((301, 177), "RGB"), ((90, 200), "L"), ((64, 64), "RGBA"), ((1, 1), "CMYK")]
)
def test_pictures_of_any_size_and_mode(photo, size, mode):
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


def test_names_of_pictures(tmp_path):
    for file in ("a.png", "a.jpg", "sub/a.png", "notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert [name for name, _ in find_pictures((str(tmp_path),))] == ["a", "a_", "sub__a"]
    with pytest.raises(InputError, match="no pictures given"):
        find_pictures(())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        find_pictures((str(tmp_path / "empty"),))


def test_the_command(tmp_path, photo):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in/photo.jpg")
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    command = [
        sys.executable,
        "-m",
        "diffender.defend",
        tmp_path / "in",
        tmp_path / "gone.jpg",
        "--out",
        tmp_path / "out",
    ]
    run = subprocess.run([*command, "--classifier", "efficientnet_lite0"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "1 of 3 pictures defended" in run.stdout
    assert "broken.png: it does not decode" in run.stderr
    assert "gone.jpg: no such file" in run.stderr
    (line,) = (tmp_path / "out/defended.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert {"file", "name", "size", "masked", "largest_z_score", "before", "after", "seconds"} == set(record)
    assert record["before"]["label"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "defended.jsonl", "photo_heatmap.png", "photo_mask.png", "photo_restored.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "out/photo_mask.png").size == photo.size
