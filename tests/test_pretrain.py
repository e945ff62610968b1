"""Training of the embedded model: what it is trained on, and both stages run to their end on real photographs."""

import csv
import json
import math
import shutil
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffender.classifiers.dataset import sample_items
from diffender.config import EMBEDDED
from diffender.losses import evasion
from diffender.noise import generator
from diffender.pretrain import __main__ as pretrain
from diffender.pretrain import corpus, latents, locating, stages, trainer, whole
from diffender.pretrain.corpus import (
    STATES,
    Crops,
    PackedTokens,
    Photos,
    Samples,
    load_photos,
    pack,
    random_region,
    training_sample,
)
from diffender.pretrain.locating import Asked, hide, location_loss, score
from diffender.pretrain.options import Recipe
from diffender.pretrain.stages import early, early_layers
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.schedule import noise_timestep
from diffender.stable_diffusion.text import TextTransformer, tokenizer
from diffender.stable_diffusion.vae import AutoencoderKL, Posterior, VAEConfig
from diffender.utils.errors import InputError
from diffender.utils.files import read_header, save_atomic, save_checked, save_state
from diffender.weights.loading import WEIGHTS, load_model
from tests.cases import small_model_file


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
        writer.writerows([item.path.name, f"class {item.label}"] for item in items[1:])
        writer.writerow([items[0].path.name, "class 7."])
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


def test_pastes_are_seen_and_named_and_masks_do_not_follow_them(photos, monkeypatch):
    monkeypatch.setattr(corpus, "random_content", lambda photos, size, g: (torch.full((3, size, size), 2.0), "text"))
    samples = [training_sample(photos, i % 20, 64, torch.Generator().manual_seed(i)) for i in range(40)]
    pasted = [s for s in samples if s.region.any()]
    assert 10 < len(pasted) < 30
    for s in pasted:
        assert s.caption.endswith(("adversarial", "text patch"))
        assert (s.image * s.region).max() > 1.4, "content of brightness 2, three quarters opaque at least"
        assert not torch.equal(s.mask, s.region)


def test_photographs_are_flipped_sideways_alone():
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).kron(torch.ones(32, 32, dtype=torch.uint8))
    crops = [corpus.random_crop(image.expand(3, -1, -1), 64, (1, 1), generator(i)) for i in range(9)]
    corners = {tuple((255 * crop[0, ::63, ::63]).flatten().round().tolist()) for crop in crops}
    assert corners == {(1, 2, 3, 4), (2, 1, 4, 3)}


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


def test_eq_4_in_pretraining_by_hand(monkeypatch):
    """Scores of 0 lie 2.5 under the threshold, at levels that localisation looks from; what is empty does not hide."""
    levels, asked = [], Asked(torch.zeros(2, 1, 1), None)
    monkeypatch.setattr(locating, "score", lambda model, z, noise, t, asked: levels.append(t) or 0 * z[:, :1])
    z_0, region, g = torch.zeros(64, 4, 4, 4), torch.zeros(64, 1, 4, 4), torch.Generator().manual_seed(0)
    region[:32, :, :2, :2] = 1  # an eighth of all
    wanted = math.log(1 + math.exp(-2.5)) + 2.5 / 8
    assert location_loss(None, z_0, region, asked, 0, g).item() == pytest.approx(wanted)
    assert 100 <= levels[0].min() < noise_timestep(EMBEDDED.noise_ratio) < levels[0].max() < 400
    monkeypatch.setattr(locating, "hide", lambda *given: pytest.fail("asked to hide"))
    for covered in (0, 0.4):  # of no latent more than half
        location_loss(None, z_0, covered * region, asked, 3, g)


def test_samples_are_encoded_as_they_are_asked_for():
    """Grey under the mask; the mask by its nearest pixel, the region by its share of a latent; latents as scaled."""
    seen = []

    def posterior(x):
        seen.append(x.float())
        return torch.zeros(2, 1, 4, 8, 8).unbind()

    model = SimpleNamespace(vae=SimpleNamespace(posterior=posterior))
    x, mask, region = torch.full((1, 3, 64, 64), 0.9), torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., :32, :32], region[..., :4] = 1, 1
    found = latents.encode(model, x, mask, torch.zeros(1, 77), region)
    assert torch.allclose(seen[1], x * (1 - mask) + 0.5 * mask)
    assert (found["mask"].sum(), found["mask"][0, 0, 0, 0].item()) == (16, True)
    assert found["region"][0, 0, 0].tolist() == [0.5] + [0] * 7
    moments = torch.cat([torch.ones(1, 4, 64, 64), torch.zeros(1, 4, 64, 64)], dim=1)
    drawn = latents.sample_latents(moments, 0.2, torch.Generator().manual_seed(0))
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((0.2, 0.2), rel=0.05)


def test_a_growing_store_gives_the_new_samples_and_some_that_it_has(monkeypatch):
    monkeypatch.setattr(latents, "fresh_batches", lambda *_: ({"n": torch.arange(2) + 2 * n} for n in range(9)))
    recipe = Recipe(stage="unet", device=torch.device("cpu"), batch=6, reuse=3)
    told = [batch["n"].tolist() for batch in latents.reused_batches(recipe, None, range(54))]
    for n, batch in enumerate(told):
        assert batch[:2] == [2 * n, 2 * n + 1]
        assert all(0 <= i < 2 * n + 2 for i in batch)
    assert len({i for batch in told for i in batch[2:]}) > 9


def test_memory_is_pinned_for_a_training_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in (("cpu", False), ("cuda:1", True)):
        recipe = Recipe(stage="vae", device=torch.device(device))
        assert corpus.batches([0, 1], range(2), 1, recipe).pin_memory == pinned


def test_a_vae_with_other_latents_is_refused(tmp_path, model):
    """The decoder may have been trained on; the encoder makes the latents that the UNet knows."""
    state, shipped = model.vae.state_dict(), WEIGHTS / "tiny.safetensors"
    numbers = {"stage": "unet", "device": "cpu", "out": tmp_path, "init": shipped}
    for name, refused in (("decoder.conv_out.bias", False), ("encoder.conv_in.bias", True)):
        save_atomic(state | {name: state[name] + 1}, tmp_path / "vae.safetensors", {"steps": 7})
        if refused:
            with pytest.raises(InputError, match="vae.safetensors has other latents than .*tiny.safetensors"):
                stages.first_stage(Recipe(**numbers))
        else:
            assert stages.first_stage(Recipe(**numbers))[1]["steps"] == 7


@pytest.fixture
def one_weight(tmp_path):
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    numbers = {"batch": 1, "steps": 10**9, "lr": 0.1, "ema": 0.999}
    return net, trainer.Trainer(net, Recipe(stage="one", device="cpu", out=tmp_path, **numbers))


def test_averaged_weights_forget_where_training_began(one_weight):
    """A decay of 0.999 alone would keep 94 % of the first weights after 60 steps."""
    net, one = one_weight
    for _ in zip(one.steps(), range(60)):  # noqa: B905
        one.update((net.weight - 1).square().sum())
    assert net.weight.item() == pytest.approx(1, abs=0.2)
    assert one.ema.module.weight.item() > 0.8


def test_rates_averages_and_gradients_of_a_training(one_weight):
    """Warm-up over 100 steps, a cosine down to 2 %, gradients of norm 1, an average that --ema bounds."""
    net, one = one_weight
    for step, steps, share in ((0, 10**9, 0.01), (99, 10**9, 1), (1000, 2000, 0.51), (2000, 2000, 0.02)):
        one.step, one.recipe = step, replace(one.recipe, steps=steps)
        one.update(1e3 * net.weight.sum())
        assert one.optimizer.param_groups[0]["lr"] == pytest.approx(one.recipe.lr * share)
        assert net.weight.grad.abs().item() == pytest.approx(1, rel=1e-4)
    for step, decay in ((0, 0.1), (10**6, 0.999)):
        one.step, averaged = step, torch.ones(1)
        one.average([averaged], [torch.zeros(1)], None)
        assert averaged.item() == pytest.approx(decay)


def test_a_training_goes_on_with_its_averages_and_its_optimizer(one_weight):
    net, one = one_weight
    for _ in zip(one.steps(), range(3)):  # noqa: B905
        one.update((net.weight - 1).square().sum())
    one.save()
    again = trainer.Trainer(torch.nn.Linear(1, 1, bias=False), one.recipe)
    assert again.ema.module.weight.item() == one.ema.module.weight.item() != net.weight.item()
    assert again.model.weight.item() == net.weight.item()
    assert again.optimizer.state_dict()["state"][0]["step"] == 3
    assert again.left() == range(one.step, 10**9)


def test_a_damaged_checkpoint_is_one_clear_line(one_weight):
    _, one = one_weight
    told = {"settings": trainer.shared(one.recipe)}
    for content in (
        {},
        told | {"ema": {}},
        [1],
        told | {"ema": one.ema.state_dict(), "model": {"other": torch.ones(1)}},
    ):
        save_state(content, one.path)
        with pytest.raises(InputError, match=r"one.ckpt is damaged .*; delete it to begin anew, or choose"):
            trainer.Trainer(torch.nn.Linear(1, 1, bias=False), one.recipe)


def test_a_training_goes_on_with_its_own_settings_alone(one_weight):
    """How long it runs, how fast it learns and where may change."""
    net, one = one_weight
    one.save()
    trainer.Trainer(net, replace(one.recipe, steps=9, minutes=2.0, workers=3, save_minutes=0, parts=1, lr=0.2, ema=0.9))
    others = {"data": Path("x"), "seed": 5, "init": Path("y"), "batch": 3, "crop": 32, "samples": 9, "reuse": 1}
    for name, value in (others | {"locate": 1.0, "hiding": 2}).items():
        with pytest.raises(InputError, match=rf"other settings \({name}\); delete it to begin anew, or choose another"):
            trainer.Trainer(net, replace(one.recipe, **{name: value}))
    one.path.rename(one.path.with_name("two.ckpt"))
    with pytest.raises(InputError, match=r"two.ckpt holds a training with other settings \(stage, seed, batch\)"):
        trainer.Trainer(net, replace(one.recipe, stage="two", batch=3, seed=5))


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


def test_a_step_of_the_unet_by_hand(model, monkeypatch, tmp_path):
    """Predictions of 0, so the error is that of the noise, 1, and of v it is 1 / a_t; averaged weights are kept."""
    asked, words, made = [], [], []

    def predict_noise(self, unet, z_t, t, contexts, conditioning):
        asked.append((t, conditioning))
        return 0 * z_t[:, None]

    def embed(self, tokens):
        words.append(tokens)
        return self.embeddings.token_embedding(tokens)

    n, captions = 64, model.text.tokenize(["clean", "adversarial"])
    moments, nothing = torch.zeros(n, 8, 28, 28), torch.zeros(n, 1, 28, 28)
    batch = {"image": moments, "masked": moments, "mask": nothing, "region": nothing, "tokens": captions.repeat(32, 1)}
    monkeypatch.setattr(LatentDiffusion, "predict_noise", predict_noise)
    monkeypatch.setattr(TextTransformer, "embed", embed)
    monkeypatch.setattr(stages, "Trainer", lambda *given: made.append(trainer.Trainer(*given)) or made[0])
    monkeypatch.setattr(stages, "reused_batches", lambda *_: [batch] * 2)
    monkeypatch.setattr(stages, "location_loss", lambda model, z, region, asked, *_: 5 + asked.contexts.float().mean())
    for name in ("plot_losses", "show_inpainting"):
        monkeypatch.setattr(stages, name, lambda *_: None)
    init = small_model_file(tmp_path, {"training": {"vae": {"scale_factor": 1.0}}})
    given = {"data": tmp_path, "out": tmp_path, "init": init, "batch": n, "locate": 2.0}
    stages.train_unet(Recipe(stage="unet", device=torch.device("cpu"), steps=2, lr=100.0, **given))
    (t, conditioning), told = asked[0], json.loads((tmp_path / "unet.jsonl").read_text())
    ours, saved = made[0].ema.module, load_model("auto", tmp_path / "tiny.safetensors")
    assert torch.equal(conditioning[:22], ours.blank_conditioning((224, 224)).expand(22, -1, -1, -1))
    assert conditioning[22:, 0].sum() == 0
    assert 100 <= t[:22].min() < t[:22].max() < 500 < 800 < t[22:].max()
    assert told["mse"] == pytest.approx(1, rel=0.01)
    assert told["loss"] - 2 * told["mask"] == pytest.approx((1 / ours.alphas_cumprod[t]).mean().item(), rel=0.03)
    dropped = (words[0] == model.text.tokenize([""])).all(dim=1)
    assert 3 < dropped[::2].sum() < 17, "of clean images about 30 %"
    assert not dropped[1::2].any(), "no caption of a paste"
    norms = [m.text.final_layer_norm.weight for m in (saved, ours, made[0].model)]
    assert torch.allclose(norms[0], norms[1], atol=1e-3)
    assert not torch.allclose(norms[1], norms[2], atol=0.05)


def test_a_step_of_the_vae_by_hand(folder, photos, monkeypatch, tmp_path):
    """Its KL term is that of Gaussians of variance 2; latents are scaled to a deviation of 1."""

    def posterior(self, x):
        mean = F.avg_pool2d(x[:, :1], 8).repeat(1, 4, 1, 1)
        return Posterior(mean, torch.full_like(mean, 2.0).log())

    x = torch.rand(4, 3, 32, 32)
    monkeypatch.setattr(AutoencoderKL, "posterior", posterior)
    monkeypatch.setattr(stages, "batches", lambda *_: [x])
    for name in ("plot_losses", "save_png"):
        monkeypatch.setattr(stages, name, lambda *_: None)
    given = {"data": folder, "out": tmp_path, "init": small_model_file(tmp_path), "steps": 1, "crop": 32}
    stages.train_vae(Recipe(stage="vae", device=torch.device("cpu"), **given))
    told, of_one = json.loads((tmp_path / "vae.jsonl").read_text()), stages.center_crops(photos, range(1))
    kl = (posterior(None, x).mean.square().mean().item() + 1 - math.log(2)) / 2
    assert told["kl"] == pytest.approx(kl, rel=1e-4)
    scale_factor = read_header(tmp_path / "vae.safetensors")["scale_factor"]
    assert (scale_factor * posterior(None, of_one).mean).std().item() == pytest.approx(1)


def test_stages_share_the_minutes_that_are_left(monkeypatch, tmp_path):
    """A stage that takes its time leaves the others theirs."""
    clock, asked = [0.0], []

    def took(recipe, on_save=None):
        asked.append(recipe.minutes)
        clock[0] += 60 * recipe.minutes

    monkeypatch.setattr(whole, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for name in ("train_vae", "train_unet"):
        monkeypatch.setattr(whole, name, took)
    (tmp_path / "out").mkdir()
    whole.train_all(Recipe(stage="all", device=torch.device("cpu"), out=tmp_path / "out", minutes=100.5))
    assert asked == pytest.approx([30, 20, 50])


def test_stages_that_are_done_were_of_the_same_settings(monkeypatch, tmp_path):
    for name in ("train_vae", "train_unet"):
        monkeypatch.setattr(whole, name, lambda recipe, on_save=None: None)
    (tmp_path / "out").mkdir()
    recipe = Recipe(stage="all", device=torch.device("cpu"), out=tmp_path / "out", minutes=1, data=Path("x"))
    whole.train_all(recipe)
    whole.train_all(replace(recipe, minutes=2, workers=1))
    other = replace(recipe, seed=1, sizes={"batch": 3})
    with pytest.raises(InputError, match=r"out-work holds a training with other settings \(seed, batch\); delete it"):
        whole.train_all(other)
    (tmp_path / "out-work/vae.done").write_text("")
    with pytest.raises(InputError, match=r"vae.done is damaged .*; delete it to begin anew"):
        whole.train_all(recipe)


def test_parts_are_those_of_the_last_model(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(), out.mkdir()
    (out / "tiny.safetensors.0.4242.partial").write_bytes(b"half")
    for size in (25, 12):
        save_checked({"x": torch.rand(size)}, work / "tiny.safetensors", {})
        whole.carry(work, out, 1e-5)
        whole.join(out, tmp_path / f"joined {size}")
        assert (tmp_path / f"joined {size}").read_bytes() == (work / "tiny.safetensors").read_bytes()
    assert {p.name for p in work.iterdir()} == {"tiny.safetensors"}


def test_parts_of_half_a_model_are_not_joined(tmp_path):
    """A missing part is named; a joined file is checked before it has its name, and replaces none."""
    model, out = tmp_path / "model", tmp_path / "joined"
    save_checked({"x": torch.rand(9)}, model, {})
    content = model.read_bytes()
    parts = [content[:70], content[70:140], content[140:]]
    another = parts[2][:-1] + bytes([parts[2][-1] ^ 1])
    for folder, given, says in (
        ("hole", {0: parts[0], 2: parts[2]}, "tiny.safetensors.2 but no tiny.safetensors.1; copy all parts"),
        ("first", {1: parts[1]}, "tiny.safetensors.1 but no tiny.safetensors.0"),
        ("last", {0: parts[0], 1: parts[1]}, "the 2 parts in .* make no whole model: .*; copy all of them"),
        ("mixed", {0: parts[0], 1: parts[1], 2: another}, "the 3 parts in .* make no whole model"),
    ):
        (tmp_path / folder).mkdir()
        for i, part in given.items():
            (tmp_path / folder / f"tiny.safetensors.{i}").write_bytes(part)
        with pytest.raises(InputError, match=says):
            whole.join(tmp_path / folder, out)
        assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"model"}
    (tmp_path / "mixed/tiny.safetensors.2").write_bytes(parts[2])
    whole.join(tmp_path / "mixed", out)
    with pytest.raises(InputError, match="joined is there already; delete it, or choose another with --out"):
        whole.join(tmp_path / "mixed", out)
    assert out.read_bytes() == content


def test_a_photograph_that_does_not_decode_is_named(tmp_path):
    (tmp_path / "captions.csv").write_text("file,caption\ncaptions.csv,a cat\n")
    with pytest.raises(InputError, match="cannot read image .*captions.csv: it does not decode"):
        pack(tmp_path, tmp_path / "packed", {}, lambda text: [1])


def test_the_folder_beside_the_place_that_is_here(monkeypatch, tmp_path):
    for name in ("train_vae", "train_unet"):
        monkeypatch.setattr(whole, name, lambda recipe, on_save=None: None)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    whole.train_all(Recipe(stage="all", device=torch.device("cpu"), out=Path(), minutes=1))
    assert sorted(p.name for p in (tmp_path / "out-work").iterdir()) == ["decoder.done", "unet.done", "vae.done"]


def test_samples_of_another_encoder_are_refused(monkeypatch, tmp_path):
    """Another decoder changes no sample."""
    vae = AutoencoderKL(VAEConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=4))
    recipe = Recipe(stage="unet", device=torch.device("cpu"), out=tmp_path, samples=4)
    monkeypatch.setattr(latents, "fresh_batches", lambda *_: [{"mask": torch.zeros(4, 1)}])

    def batches():
        return list(latents.stored_batches(recipe, SimpleNamespace(vae=vae), range(2)))

    batches()
    vae.decoder.conv_out.weight.data += 1
    batches()
    vae.quant_conv.weight.data += 1
    with pytest.raises(InputError, match=r"samples of another kind \(encoder\); delete it"):
        batches()


def stage(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *args])
    pretrain.main()


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "photos.safetensors"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage(monkeypatch, "pack", "--data", str(folder), "--out", str(path))
    return path


def test_both_stages_from_a_packed_file(packed, photos, monkeypatch, tmp_path, capsys):
    """vae, unet with new and with stored samples; a second call goes on where the first ended."""
    out = tmp_path / "out"
    again = load_photos(packed, 256)
    assert again.captions == photos.captions
    assert [i.shape for i in again.images] == [i.shape for i in photos.images]
    assert (again.images[0].float() - photos.images[0].float()).abs().mean() < 6  # of 255: WebP

    common = ["--data", str(packed), "--out", str(out), "--batch"]
    stage(monkeypatch, "vae", *common, "2", "--steps", "2", "--crop", "32")
    stored = tmp_path / "stored"
    shutil.copytree(out, stored)
    seen = []

    def watched(model, z_0, region, asked, *_args):
        seen.append(asked.blank.clone())
        assert len(z_0) == len(region) == 1, "half of a batch, and one of a batch of one"
        return z_0.new_zeros(())

    monkeypatch.setattr(stages, "location_loss", watched)
    unet = ["unet", *common, "1", "--locate", "1"]
    stage(monkeypatch, *unet, "--steps", "1", "--workers", "2")
    first = load_model("auto", out / "tiny.safetensors")
    assert torch.allclose(seen[0], first.blank_conditioning((224, 224)), atol=0.02), "its own VAE, as float16"
    assert first.unet.cfg.prediction == "v"
    assert read_header(out / "tiny.safetensors")["training"]["steps"] == 1
    capsys.readouterr()
    lines = [json.dumps({"step": step, "loss": 1.0, "mse": 1.0}) + "\n" for step in (0, 1)]
    (out / "unet.jsonl").write_text(lines[0] + lines[1] + '{"step": 10')  # a kill between two checkpoints
    stage(monkeypatch, *unet, "--steps", "3")
    assert (out / "unet.jsonl").read_text() == lines[0], "steps after the checkpoint are done again"
    assert "resuming" in capsys.readouterr().out
    second = load_model("auto", out / "tiny.safetensors")
    assert not torch.equal(first.unet.out[2].weight, second.unet.out[2].weight)
    assert torch.equal(first.vae.decoder.conv_out.weight, second.vae.decoder.conv_out.weight)
    monkeypatch.setattr(stages, "show_inpainting", lambda *_: None)
    stage(monkeypatch, "unet", *common, "2", "--out", str(stored), "--steps", "2", "--samples", "6")
    assert read_header(stored / "tiny.safetensors")["training"]["samples"] == 6
    for name in ("vae.png", "unet.png", "vae-loss.png", "unet-loss.png"):
        assert (out / name).stat().st_size > 1000


def test_a_packed_file_needs_no_tokenizer_and_no_classifier(folder, packed):
    tokens = PackedTokens(read_header(packed)["tokens"])
    captions = sorted({c for c in read_header(packed)["captions"] if c})
    for text in [*STATES, *captions, *(f"{c}, {s}" for c in captions for s in STATES), ""]:
        assert tokens(text) == tokenizer().encode(text), text
    assert "class 7." in captions, "whose comma is no token of its own"
    ours, whole = early_layers(packed), early_layers(folder)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for a, b in zip(early(ours, x), early(whole, x), strict=True):
        assert torch.allclose(a, b, rtol=0.02, atol=0.02 * float(b.abs().max())), "float16"


@pytest.mark.slow
def test_the_whole_model_in_one_go(packed, monkeypatch, tmp_path):
    """Within its time; started again, nothing is done twice; the parts make one file, which loads and runs."""
    seconds = count()  # a clock that goes on when it is looked at
    for module in (trainer, whole):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    out = tmp_path / "out"
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
