"""Training of the embedded model: what it is trained on, and both stages run to their end on real photographs."""

import csv
import json
import shutil
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from diffender.classifiers.dataset import sample_items
from diffender.config import EMBEDDED
from diffender.losses import evasion
from diffender.pretrain import __main__ as pretrain
from diffender.pretrain import corpus, stages, trainer, whole
from diffender.pretrain.corpus import (
    STATES,
    Crops,
    PackedTokens,
    Photos,
    Samples,
    load_photos,
    random_region,
    training_sample,
)
from diffender.pretrain.locating import Asked, hide, location_loss, score
from diffender.pretrain.options import Recipe
from diffender.pretrain.stages import early, early_layers
from diffender.stable_diffusion.text import tokenizer
from diffender.utils.errors import InputError
from diffender.utils.files import read_header
from diffender.weights.loading import WEIGHTS, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sample photographs with captions, as a folder to train on."""
    root = tmp_path_factory.mktemp("photos")
    items = sample_items()
    for item in items:
        shutil.copy(item.path, root)
    with (root / "captions.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["file", "caption"])
        writer.writerows([item.path.name, f"class {item.label}"] for item in items)
    return root


@pytest.fixture(scope="module")
def photos(folder) -> Photos:
    return load_photos(folder, 256)


def test_regions_cover_about_what_they_should():
    shares = []
    for i in range(200):
        mask = random_region(64, 0.05, 0.25, torch.Generator().manual_seed(i))
        assert mask.shape == (1, 64, 64)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        shares.append(mask.mean().item())
    assert 0.08 < sum(shares) / 200 < 0.18
    assert max(shares) < 0.3


def test_samples_say_what_was_pasted(photos):
    """Half of the captions name a paste, the rest say clean; masks know nothing of it; a quarter cover everything."""
    samples = [training_sample(photos, i % 20, 64, torch.Generator().manual_seed(i)) for i in range(200)]
    clean = [s for s in samples if "clean" in s.caption]
    assert 70 < len(clean) < 130
    assert all("patch" in s.caption or "adversarial" in s.caption for s in samples if "clean" not in s.caption)
    assert 25 < sum(bool(s.mask.all()) for s in samples) < 80
    assert all(s.image.min() >= 0 and s.image.max() <= 1 for s in samples)
    assert all(s.region.any() == ("clean" not in s.caption) for s in samples)


def test_the_nth_sample_is_always_the_same(photos, model):
    samples = Samples(photos, 64, model.text.tokenize, seed=0)
    for a, b in zip(samples[7], samples[7], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(samples[7][0], samples[27][0])
    crops = Crops(photos, 32, (0.2, 0.5), seed=0)
    assert crops[3].shape == (3, 32, 32)
    assert torch.equal(crops[3], crops[3])


def test_eq_4_in_pretraining_knows_the_region_and_regions_hide_from_it(model, photos):
    """On a noisy square: the true region costs less than another, hiding lowers what sticks out of it, and no more."""
    g = torch.Generator().manual_seed(0)
    x = torch.stack([photos.images[i][:, :224, :224].float() / 255 for i in range(2)])
    x[..., 64:128, 64:128] = torch.rand(2, 3, 64, 64, generator=g)
    region = torch.zeros(2, 1, 28, 28)
    region[..., 8:16, 8:16] = 1
    z_0 = model.encode(x, torch.zeros(2, 4, 28, 28))
    words = model.text.tokenize(["adversarial", ""])
    asked = Asked(model.text(model.text.embed(words)), model.blank_conditioning((224, 224)))

    def loss(region, steps=0):
        return location_loss(model, z_0, region, asked, steps, torch.Generator().manual_seed(1))

    assert loss(region) < loss(region.roll((12, 12), dims=(2, 3)))
    at = torch.randn(z_0.shape, generator=g), torch.tensor([200, 300]), asked
    hidden = hide(model, z_0, region, at, 8, g)
    seen, before = score(model, hidden, *at), score(model, z_0, *at)
    assert (evasion(seen, region, 1.0) < evasion(before, region, 1.0)).all()
    assert torch.equal(hidden * (1 - region), z_0 * (1 - region))
    assert loss(region, steps=3) > loss(region), "a region that hides is harder to find"


def test_memory_is_pinned_for_a_training_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in (("cpu", False), ("cuda:1", True)):
        recipe = Recipe(stage="vae", device=torch.device(device))
        assert corpus.batches([0, 1], range(2), 1, recipe).pin_memory == pinned


@pytest.fixture
def one_weight(tmp_path):
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    numbers = {"batch": 1, "steps": 60, "lr": 0.1, "ema": 0.999, "decay": False}
    return net, trainer.Trainer(net, Recipe(stage="one", device="cpu", out=tmp_path, **numbers))


def test_averaged_weights_forget_where_training_began(one_weight):
    """A decay of 0.999 alone would keep 94 % of the first weights after 60 steps."""
    net, one = one_weight
    for _ in one.steps():
        one.update((net.weight - 1).square().sum())
    assert net.weight.item() == pytest.approx(1, abs=0.2)
    assert one.ema.module.weight.item() > 0.8


def test_a_gradient_that_is_not_finite_changes_nothing(one_weight):
    net, one = one_weight
    for _ in zip(one.steps(), range(3)):  # noqa: B905
        one.update((net.weight - 1).square().sum())
    before = [net.weight.item(), one.ema.module.weight.item()]
    one.update((net.weight * torch.inf).sum())
    assert [net.weight.item(), one.ema.module.weight.item()] == before
    with pytest.raises(InputError, match="gradients were not finite, .*lower --lr"):
        for _ in range(trainer.SKIPPED):
            one.update((net.weight * torch.nan).sum())


def test_parts_are_those_of_the_last_model(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    (out / "tiny.safetensors.0.4242.partial").write_bytes(b"half")
    for content in (bytes(25), bytes(range(12))):
        (work / "tiny.safetensors").write_bytes(content)
        whole.carry(work, out, 1e-5)
        whole.join(out, tmp_path / "joined")
        assert (tmp_path / "joined").read_bytes() == content
    assert {p.name for p in work.iterdir()} == {"tiny.safetensors"}


def test_samples_of_another_encoder_are_refused(folder, monkeypatch, tmp_path):
    common = ["--data", str(folder), "--out", str(tmp_path), "--batch", "2"]
    stage(monkeypatch, "vae", *common, "--steps", "1", "--crop", "32")
    stage(monkeypatch, "unet", *common, "--steps", "1", "--samples", "4")
    stage(monkeypatch, "vae", *common, "--steps", "2", "--crop", "32")
    with pytest.raises(InputError, match=r"samples of another kind \(encoder\); delete it"):
        stage(monkeypatch, "unet", *common, "--steps", "2", "--samples", "4")


def stage(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *args])
    pretrain.main()


def test_both_stages_from_a_packed_file(folder, photos, monkeypatch, tmp_path, capsys):
    """pack, vae, unet with new and with stored samples; a second call goes on where the first ended."""
    packed, out = tmp_path / "photos.safetensors", tmp_path / "out"
    stage(monkeypatch, "pack", "--data", str(folder), "--out", str(packed))
    again = load_photos(packed, 256)
    assert again.captions == photos.captions
    assert [i.shape for i in again.images] == [i.shape for i in photos.images]
    assert (again.images[0].float() - photos.images[0].float()).abs().mean() < 6  # of 255: WebP

    common = ["--data", str(packed), "--out", str(out), "--batch", "2"]
    stage(monkeypatch, "vae", *common, "--steps", "2", "--crop", "32")
    seen = []

    def watched(model, z_0, region, asked, *_args):
        seen.append(asked.blank.clone())
        return z_0.new_zeros(())

    with monkeypatch.context() as patch:
        patch.setattr(stages, "location_loss", watched)
        stage(monkeypatch, "unet", *common, "--steps", "1", "--workers", "2", "--locate", "1")
    first = load_model("auto", out / "tiny.safetensors")
    assert torch.allclose(seen[0], first.blank_conditioning((224, 224)), atol=0.02), "its own VAE, as float16"
    assert first.unet.cfg.prediction == "v"
    assert read_header(out / "tiny.safetensors")["training"]["steps"] == 1
    capsys.readouterr()
    lines = [json.dumps({"step": step, "loss": 1.0, "mse": 1.0}) + "\n" for step in (0, 1)]
    (out / "unet.jsonl").write_text(lines[0] + lines[1] + '{"step": 10')  # a kill between two checkpoints
    stage(monkeypatch, "unet", *common, "--steps", "3", "--samples", "6")
    assert (out / "unet.jsonl").read_text() == lines[0], "steps after the checkpoint are done again"
    assert "resuming" in capsys.readouterr().out
    second = load_model("auto", out / "tiny.safetensors")
    assert not torch.equal(first.unet.out[2].weight, second.unet.out[2].weight)
    assert torch.equal(first.vae.decoder.conv_out.weight, second.vae.decoder.conv_out.weight)
    for name in ("vae.png", "unet.png", "vae-loss.png", "unet-loss.png"):
        assert (out / name).stat().st_size > 1000


def test_a_packed_file_needs_no_tokenizer_and_no_classifier(folder, model, tmp_path, monkeypatch):
    packed = tmp_path / "photos.safetensors"
    stage(monkeypatch, "pack", "--data", str(folder), "--out", str(packed))
    tokens = PackedTokens(read_header(packed)["tokens"])
    captions = sorted({c for c in read_header(packed)["captions"] if c})
    for text in [*STATES, *captions, *(f"{c}, {s}" for c in captions for s in STATES), ""]:
        assert tokens(text) == tokenizer().encode(text), text
    ours, whole = early_layers(packed), early_layers(folder)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for a, b in zip(early(ours.net, ours, x), early(whole.net, whole, x), strict=True):
        assert torch.allclose(a, b, rtol=0.02, atol=0.02 * float(b.abs().max())), "float16"


@pytest.mark.slow
def test_the_whole_model_in_one_go(folder, monkeypatch, tmp_path):
    """Within its time; started again, nothing is done twice; the parts make one file, which loads and runs."""
    seconds = count()  # a clock that goes on when it is looked at
    for module in (trainer, whole):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    packed, out = tmp_path / "photos.safetensors", tmp_path / "out"
    stage(monkeypatch, "pack", "--data", str(folder), "--out", str(packed))
    run = ["all", "--data", str(packed), "--out", str(out), "--minutes", "0.8", "--parts", "10"]
    stage(monkeypatch, *run)
    assert next(seconds) <= 0.8 * 60
    files = {f.name: f.stat().st_size for f in out.iterdir()}
    assert {"tiny.safetensors.0", "tiny.safetensors.1", "vae.png", "unet.png", "unet.jsonl"} <= set(files)
    assert len(files) <= 8
    assert max(files.values()) <= 10e6
    stage(monkeypatch, "join", "--data", str(out), "--out", str(tmp_path / "tiny.safetensors"))
    model = load_model("auto", tmp_path / "tiny.safetensors")
    assert model.cfg.vae.patch == 2
    assert model.settings == EMBEDDED
    before = (out / "unet.jsonl").read_text()
    stage(monkeypatch, *run)
    assert (out / "unet.jsonl").read_text() == before


@pytest.mark.slow
def test_training_goes_on_from_a_whole_model(folder, monkeypatch, tmp_path):
    """decoder and unet from the embedded weights: the decoder alone changes, then the UNet; the card keeps the past."""
    common = ["--data", str(folder), "--out", str(tmp_path), "--batch", "1", "--steps", "1"]
    stage(monkeypatch, "decoder", *common, "--crop", "32", "--init", str(WEIGHTS / "tiny.safetensors"))
    heavier = ["--batch", "2", "--locate", "1", "--hiding", "2"]
    stage(monkeypatch, "unet", *common, *heavier, "--init", str(WEIGHTS / "tiny.safetensors"))
    ours, shipped = (load_model("auto", tmp_path / "tiny.safetensors"), load_model("tiny"))
    assert torch.equal(ours.vae.encoder.conv_in.weight, shipped.vae.encoder.conv_in.weight)
    change = (ours.vae.decoder.conv_in.weight - shipped.vae.decoder.conv_in.weight).abs().max()
    assert 0 < change < 1e-3  # one step
    assert (ours.unet.out[2].weight - shipped.unet.out[2].weight).abs().max() < 1e-3
    assert ours.cfg == shipped.cfg
    card = read_header(tmp_path / "tiny.safetensors")["training"]
    assert card["steps"] == card["vae"]["decoder"]["steps"] == 1
    assert card["from"]["steps"] == read_header(WEIGHTS / "tiny.safetensors")["training"]["steps"] > 1000
