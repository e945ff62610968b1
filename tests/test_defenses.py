"""Baseline defences: against Pillow and scipy, worked examples, and what each must and must not do."""

import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from diffender.classifiers.dataset import sample_items
from diffender.classifiers.imagenet import CLASSIFIERS, Classifier
from diffender.config import Backward
from diffender.defenses import DEFENSES, build, jedi, parse_defense
from diffender.defenses.diffpure import DiffPure
from diffender.defenses.dw import DW, guided
from diffender.defenses.fill import FILLS, harmonic
from diffender.defenses.fnc import clip_norm, clip_tokens, fnc, reestimate_statistics
from diffender.defenses.hardened import Hardened
from diffender.defenses.jedi import (
    OFFICIAL,
    Jedi,
    clean_entropy,
    complete,
    entropy_windows,
    load_autoencoder,
    suspicious,
    thresholds,
    without_small,
)
from diffender.defenses.jpeg import JPEG
from diffender.defenses.lgs import LGS, gradient_magnitude
from diffender.defenses.patchcleanser import PatchCleanser
from diffender.defenses.smoothing import Smoothing
from diffender.noise import generator
from diffender.ops import resize
from diffender.pipeline import Defended, DIFFender
from diffender.pretrain import jedi as pretrained
from diffender.pretrain.jedi import draw_mask
from diffender.pretrain.options import Jedi as Training
from diffender.stable_diffusion.samplers import Step, ddim_step
from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, q_sample
from diffender.utils.errors import InputError
from diffender.utils.files import read_header
from diffender.weights.prompts import contexts_for

FASTER = {"diffpure": "diffpure:steps=2", "hardened": "hardened:masks=2"}
BASELINES = [FASTER.get(name, name) for name in DEFENSES if name != "diffender"]


def through_pillow(x, quality):
    buffer = io.BytesIO()
    to_pil_image(x[0]).save(buffer, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(buffer))[None] / 255


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_pillows(photos, quality):
    """Above 40 dB, at an odd size, and each image of a batch by itself."""
    x = (255 * F.interpolate(photos[:2], (299, 299), mode="bilinear").clamp(0, 1)).round() / 255
    both = JPEG(quality)(x)
    for i in range(2):
        error = (both[i : i + 1] - through_pillow(x[i : i + 1], quality)).square().mean()
        assert -10 * error.log10() > 40
    assert torch.equal(both[1:], JPEG(quality)(x[1:]))


def test_jpeg_of_full_quality_and_its_gradient(photos):
    x = photos[:1].clone().requires_grad_()
    y = JPEG(100)(x)
    assert (y - x).abs().mean() < 0.01
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().mean() > 0.1


@pytest.mark.parametrize(("window", "size"), [(2, (60, 51)), (3, (60, 51)), (5, (60, 51)), (40, (16, 7))])
def test_smoothing_is_scipys(photos, window, size):
    """Also where the window is wider than the image."""
    ndimage = pytest.importorskip("scipy.ndimage")
    x = photos[:2, :, : size[0], : size[1]]
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, window, window), mode="reflect")
    assert torch.equal(Smoothing(window)(x), torch.from_numpy(expected))


def test_smoothing_by_hand():
    x = torch.tensor([[1.0, 5.0, 2.0], [9.0, 3.0, 8.0], [4.0, 7.0, 6.0]])[None, None].requires_grad_()
    y = Smoothing(3)(x)
    assert y[0, 0, 1, 1] == 5
    assert y[0, 0, 0, 0] == 3  # 1 1 5, 1 1 5, 9 9 3
    (gradient,) = torch.autograd.grad(y[0, 0, 1, 1], x)
    assert gradient.nonzero().tolist() == [[0, 0, 0, 1]]


def test_lgs_sees_noise_everywhere():
    """Also in the corners, which the published block grid misses."""
    for top in (0, 174):
        for left in (0, 174):
            x = torch.full((1, 3, 224, 224), 0.5)
            x[..., top : top + 50, left : left + 50] = torch.rand(1, 3, 50, 50, generator=generator("lgs"))
            kept = LGS().dense(gradient_magnitude(x))
            assert kept[..., top : top + 49, left : left + 49].all()


def test_lgs_by_hand():
    """Stripes 0.2 apart darken by 2.3 times that, their last one by 2.3 times 0.4; a lone edge of 1 stays."""
    line = torch.zeros(45)
    line[:25] = torch.tensor([0.4, 0.6] * 13)[:25]
    line[40:] = 1
    darkened = line.clone()
    darkened[:24] *= 1 - 2.3 * 0.2
    darkened[24] *= 1 - 2.3 * 0.4
    assert torch.allclose(LGS()(line.expand(1, 3, 45, 45)), darkened.expand(1, 3, 45, 45), atol=1e-4)


def test_lgs_sees_steps_of_luma_sideways_and_down():
    """Of red, green and blue, scaled by the largest."""
    x = torch.zeros(1, 3, 9, 9)
    for channel, rows in enumerate((slice(0, 2), slice(3, 5), slice(6, 8))):
        x[0, channel, rows, 4:] = 1
    g, wanted = gradient_magnitude(x)[0, 0], pytest.approx([0.299 / 0.587, 1, 0.114 / 0.587], rel=1e-4)
    assert g[[0, 3, 6], 3].tolist() == wanted
    assert g[[1, 4, 7], 6].tolist() == wanted


def test_lgs_takes_blocks_up_to_the_size_of_the_image(photos):
    x = photos[:1, :, :30, :20]
    assert LGS(block=20, overlap=0)(x).shape == x.shape
    with pytest.raises(InputError, match="block is 50; in images of 30 x 20 pixels it is at most 20"):
        LGS(block=50)(x)


def test_lgs_of_a_flat_picture_and_of_a_batch(photos):
    flat = torch.full((1, 3, 224, 224), 0.3, requires_grad=True)
    y = LGS()(flat)
    assert torch.equal(y, flat)
    assert torch.autograd.grad(y.sum(), flat)[0].isfinite().all()
    assert torch.equal(LGS()(photos)[1:2], LGS()(photos[1:2]))


def test_lgs_scales_the_gradients_of_each_image(photos):
    x = torch.cat([photos[:1], 0.2 * photos[1:2]])
    assert torch.equal(LGS()(x)[1:], LGS()(x[1:]))


def test_fills_take_nothing_from_under_the_mask():
    x, mask = torch.full((1, 3, 16, 16), 0.2), torch.zeros(1, 1, 16, 16)
    mask[..., 4:8, 4:8] = 1
    hidden = x * (1 - mask) + 0.9 * mask
    for name, colour in (("grey", 0.5), ("mean", 0.2), ("harmonic", 0.2)):
        assert torch.allclose(FILLS[name](hidden, mask), x * (1 - mask) + colour * mask), name


def test_harmonic_fill():
    """A ramp is harmonic: a hole in it comes back; so do constants; nothing masked, nothing changed."""
    ramp = torch.linspace(0, 1, 224).expand(1, 3, 224, 224)
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 80:130, 60:110] = 1
    assert (harmonic(ramp, mask) - ramp).abs().max() < 0.005
    hidden = ramp * (1 - mask) + 7 * mask
    assert torch.equal(harmonic(hidden, mask), harmonic(ramp, mask))
    assert (harmonic(torch.full_like(ramp, 0.3), mask) - 0.3).abs().max() < 1e-5
    for fill in FILLS.values():
        assert torch.equal(fill(ramp, torch.zeros_like(mask)), ramp)
        assert fill(ramp, torch.ones_like(mask)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "count"),
    [("inception_v3", 15), ("resnet50", 16), ("efficientnet_lite0", 17), ("swin_s", 24), ("vit_b_16", 12)],
)
def test_fnc_clips_where_it_should(name, count):
    timm = pytest.importorskip("timm")
    cfg = CLASSIFIERS[name]
    with torch.device("meta"):
        classifier = Classifier(timm.create_model(cfg.tag), cfg)
    twin = fnc(classifier)
    assert sum(bool(m._forward_hooks) for m in twin.net.modules()) == count
    assert not any(m._forward_hooks for m in classifier.net.modules())


def test_fnc_that_would_clip_nothing_is_refused(classifier):
    own = Classifier(classifier.net, replace(classifier.cfg, clips="block"))
    with pytest.raises(InputError, match="no module of tf_efficientnet_lite0 is named 'block'"):
        fnc(own)


def test_fnc_caps_norms_and_keeps_directions():
    f = torch.randn(2, 8, 5, 5, generator=generator("fnc")).double()
    f[0, :, 2, 2] *= 50
    clipped = clip_norm(f, 1.1)
    cap = 1.1 * f.norm(dim=1).mean(dim=(1, 2))
    assert (clipped.norm(dim=1) <= cap[:, None, None] + 1e-9).all()
    assert torch.allclose(F.cosine_similarity(f, clipped), torch.ones(2, 5, 5).double())
    assert torch.equal(clip_norm(f, 1e3), f)
    dead = torch.zeros(1, 4, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.grad(clip_norm(dead, 1.0).sum(), dead)[0].isfinite().all()
    assert torch.autograd.gradcheck(lambda f: clip_norm(f, 1.1), f[:, :, :2, :2].clone().requires_grad_())
    tokens = f.flatten(2).mT
    assert torch.equal(clip_tokens(tokens, 0.5)[:, 0], tokens[:, 0])


def test_fnc_finds_the_channels_of_every_layout():
    """Maps (B, C, h, w), Swin's (B, h, w, C) and ViT's tokens (B, 1 + N, C)."""
    f, classifier = torch.randn(2, 8, 5, 5), torch.nn.Module()
    classifier.cfg, classifier.net = SimpleNamespace(clips="0"), torch.nn.Sequential(torch.nn.Identity())
    clipped = fnc(classifier, alpha=0.5).net
    assert torch.equal(clipped(f), clip_norm(f, 0.5))
    assert torch.allclose(clipped(f.permute(0, 2, 3, 1)), clip_norm(f, 0.5).permute(0, 2, 3, 1))
    assert torch.allclose(clipped(f.flatten(2).mT)[:, 1:], clip_norm(f.flatten(2)[..., 1:], 0.5).mT)


def test_fnc_caps_every_feature_map_that_it_clips(classifier, photos):
    twin, clipped, bounds = fnc(classifier, alpha=1.1), [], []
    for module in [m for m in twin.net.modules() if m._forward_hooks]:
        module.register_forward_hook(lambda _m, _a, f: bounds.append(1.1 * f.norm(dim=1).mean()), prepend=True)
        module.register_forward_hook(lambda _m, _a, f: clipped.append(f.norm(dim=1).max()))
    logits = twin(photos[:1])
    assert len(clipped) == 17
    assert torch.stack(clipped).tolist() == pytest.approx(torch.stack(bounds).tolist(), rel=1e-4)
    assert not torch.allclose(logits, classifier(photos[:1]), atol=0.1)


def test_fnc_is_attacked_from_the_classifier_without_it(model, classifier):
    """The images, the first patches and the undefended column belong to the classifier, not to its clipped twin."""
    ours = Defended(DIFFender(model, contexts_for("manual", model)), classifier)
    clipped = build("fnc", ours)
    assert clipped.classifier is not classifier
    assert clipped.bare is classifier
    assert clipped.under(Backward("bpda")).bare is classifier
    assert ours.bare is classifier


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smoothing:window=0", "window is 0; allowed is from 1 to 99"),
        ("lgs:block=5,overlap=5", "overlap is 5; it is smaller than the block, 5"),
        ("diffpure:steps=0", "steps is 0; with t_star 0.15 it is at least 1"),
        ("diffpure:steps=200", "steps is 200; from t_star 0.15 there are 150 timesteps to take"),
        ("dw:quantile=2", "quantile is 2.0; allowed is from 0 to 1"),
        ("fnc:alpha=0", "alpha is 0.0; allowed is at least 0.01"),
        ("jpeg:quality=0", "quality is 0; allowed is from 1 to 100"),
    ],
)
def test_settings_out_of_range_are_one_clear_line(model, classifier, text, message):
    ours = Defended(DIFFender(model, contexts_for("manual", model)), classifier)
    with pytest.raises(InputError, match=re.escape(message)):
        build(text, ours)


def test_fnc_statistics_are_those_of_the_images(classifier, photos):
    """And those of the classifier itself stay."""
    twin = fnc(classifier, alpha=1e3)
    first = twin.net.bn1
    before = classifier.net.bn1.running_mean.clone()
    reestimate_statistics(twin, photos.split(2))
    stem = twin.net.conv_stem((photos - classifier.mean) / classifier.std)
    assert torch.allclose(first.running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-5)
    assert not first.training
    assert torch.equal(classifier.net.bn1.running_mean, before)


def test_few_photographs_are_one_batch_of_statistics(target, photos, tmp_path):
    rows = [f"{item.path},{item.label}\n" for item in sample_items()[:2]]
    (tmp_path / "two.csv").write_text("file,label\n" + "".join(rows))
    twin, plain = build(f"fnc:statistics={tmp_path / 'two.csv'}", target).classifier, target.classifier
    stem = plain.net.conv_stem((photos[:2] - plain.mean) / plain.std)
    assert torch.allclose(twin.net.bn1.running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-5)


def test_guided_gradients_are_positive_ones(classifier, photos):
    twin = guided(classifier)
    assert torch.equal(twin(photos[:1]), classifier(photos[:1]))
    assert twin.net.conv_stem.weight is classifier.net.conv_stem.weight
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
    net[0].weight.data, net[2].weight.data = torch.eye(2), torch.tensor([[1.0, -1.0]])
    x = torch.ones(1, 2, requires_grad=True)
    assert torch.autograd.grad(net(x).sum(), x)[0].tolist() == [[1, -1]]
    assert torch.autograd.grad(guided(net)(x).sum(), x)[0].tolist() == [[1, 0]]


class Spot(torch.nn.Module):
    """One logit, which depends on a square of the image alone."""

    def __init__(self, square):
        super().__init__()
        self.square = square

    def forward(self, x):
        return x[(..., *self.square)].sum(dim=(1, 2, 3))[:, None]


def test_dw_masks_the_one_place_that_the_network_looks_at(photos):
    x, square = photos[:1, :, :112, :112], (slice(40, 60), slice(30, 50))
    out, mask = DW(Spot(square))(x)
    assert mask[(..., *square)].all()
    assert 400 < mask.sum() < 900
    assert torch.equal(out, harmonic(x, mask))
    assert not torch.equal(out, x)


class Coloured(torch.nn.Module):
    """Two classes; the second, which leads, looks at colours differently."""

    def forward(self, x):
        weights = torch.tensor([[9.0, 9, 9], [1, -4, 2]])
        return torch.einsum("bchw,kc->bk", x, weights) + torch.tensor([0.0, 1e6])


def test_dw_follows_the_class_that_leads_in_its_strongest_colour():
    assert torch.equal(DW(Coloured()).salience(torch.rand(2, 3, 8, 8)), torch.full((2, 1, 8, 8), 4.0))


class Spots(torch.nn.Module):
    """A square, and a pixel far from it."""

    def forward(self, x):
        return x[..., 100:140, 60:100].sum(dim=(1, 2, 3))[:, None] + x[..., 200, 200].sum(dim=1, keepdim=True)


def test_dw_erodes_lone_pixels_before_it_dilates(photos):
    mask = DW(Spots(), sigma=0.1, quantile=0.9)(photos[:1])[1]
    assert mask[..., 190:210, 190:210].sum() == 0
    assert mask[..., 100:140, 60:100].all()


class Minus(Spot):
    def forward(self, x):
        return -super().forward(x)


def test_dw_keeps_its_proportions_and_sees_what_speaks_against_a_class(photos, monkeypatch):
    square, asked = (slice(40, 60), slice(30, 50)), []
    monkeypatch.setattr("diffender.defenses.dw.gaussian_blur", lambda x, *given: asked.append(given) or x)
    masks = [DW(net(square))(photos[:1, :, :s, :s])[1] for s in (224, 112) for net in (Spot, Minus)]
    assert asked == [(25, 4.0)] * 2 + [(13, 2.0)] * 2
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])


def test_jedi_constants_and_entropy():
    """The thresholds' constant parts, and windows whose entropy is known."""
    for i, constant in enumerate((5.491, 6.248, 6.670)):
        mean, std = (s[i] for s in OFFICIAL)
        assert thresholds(torch.tensor(mean), i, *OFFICIAL).item() == pytest.approx(constant, abs=6e-4)
    levels = torch.arange(81.0).view(1, 1, 9, 9).expand(1, 3, 9, 9) / 255
    assert entropy_windows(levels, 9, 4)[0, 1, 1].item() == pytest.approx(math.log2(81))
    assert entropy_windows(torch.full((1, 3, 32, 32), 0.2), 9, 4).abs().max() == 0


@pytest.fixture
def noisy(photos):
    """A smooth image with a square of noise, (1, 3, 224, 224)."""
    x = F.avg_pool2d(photos[:1], 31, 1, 15, count_include_pad=False)
    x[..., 100:160, 40:100] = torch.rand(1, 3, 60, 60, generator=generator("jedi test"))
    return x


def test_jedi_fills_noise_and_leaves_the_rest(noisy):
    out, mask = Jedi()(noisy)
    change = (out - noisy).abs().amax(dim=1)
    assert (change[:, 100:160, 40:100] > 0.05).float().mean() > 0.8
    assert mask.sum() < 1.5 * 60**2
    assert torch.equal(out * (1 - mask), noisy * (1 - mask))
    smooth = F.avg_pool2d(noisy, 31, 1, 15, count_include_pad=False)
    assert torch.equal(Jedi()(smooth)[0], smooth)


def test_jedi_finds_noise(noisy):
    """On a smooth image, and nothing on a flat one."""
    x = noisy
    found = without_small(suspicious(x, *OFFICIAL), 0.005)
    assert found[..., 108:152, 48:92].mean() > 0.9  # where windows lie inside
    assert suspicious(torch.full((1, 3, 224, 224), 0.5), *OFFICIAL).sum() == 0


def test_jedis_threshold_rises_with_the_entropy_of_the_image():
    for i, rise in enumerate((0.32, 0.34, 0.35)):
        mean, std = (s[i] for s in OFFICIAL)
        low, high = (thresholds(torch.tensor(mean + k * std), i, *OFFICIAL).item() for k in (0, 1))
        assert high - low == pytest.approx(rise, abs=1e-5)


def test_jedi_looks_in_every_scale(noisy, monkeypatch):
    every, usual, alone = suspicious(noisy, *OFFICIAL), thresholds, []
    for k in range(3):
        monkeypatch.setattr(jedi, "thresholds", lambda mean, i, *s, k=k: usual(mean, i, *s) + (0 if i == k else 99))
        alone.append(suspicious(noisy, *OFFICIAL))
    assert torch.equal(every, torch.stack(alone).amax(dim=0))
    assert not any(torch.equal(every, found) for found in alone)


@pytest.mark.parametrize(("scale", "stride"), [(0, 4), (1, 6), (2, 8)])
def test_jedi_masks_what_is_nearest_to_a_dense_window(monkeypatch, scale, stride):
    def windows(x, window, _):
        entropy = torch.zeros(1, 6, 6)
        entropy[0, 2, 3] = window == jedi.WINDOWS[scale]
        return entropy

    monkeypatch.setattr(jedi, "entropy_windows", windows)
    monkeypatch.setattr(jedi, "thresholds", lambda *_: torch.tensor([0.5]))
    found = suspicious(torch.zeros(1, 3, 48, 48), *OFFICIAL)[0, 0]
    for axis, centre in ((1, 2 * stride), (0, 3 * stride)):
        line = found.any(dim=axis).nonzero().flatten()
        assert len(line) >= stride - 1
        assert (line - centre).abs().max() <= stride / 2


def test_jedi_sees_red_better_than_blue():
    """In the weights of luma: 2 of 255 round to 1 in red, and to 0 in blue."""
    x = torch.zeros(2, 3, 16, 16)
    x[0, 0, :, 8:] = x[1, 2, :, 8:] = 2 / 255
    found = entropy_windows(x, 9, 4).flatten(1).amax(dim=1)
    assert found[0] > 0.9
    assert found[1] == 0


@pytest.mark.parametrize("given", [{"min_area": 0.5}, {"threshold": 1.0}])
def test_jedi_takes_no_region_too_small_and_nothing_that_its_autoencoder_is_unsure_of(noisy, given):
    assert Jedi(**given)(noisy)[1].sum() == 0


def test_jedi_has_both_statistics(noisy):
    """Resized photographs are denser than the original's: its own raise the mean entropy, so more is flagged."""
    own, official = clean_entropy("own"), clean_entropy("official")
    assert all(a > b for a, b in zip(own[0], official[0], strict=True))
    with pytest.raises(InputError, match="choose one of official, own"):
        Jedi(stats="mine")
    masks = [Jedi(**given)(noisy)[1] for given in ({}, {"stats": "own"}, {"completion": "none"})]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_small_regions_go():
    mask = torch.zeros(2, 1, 40, 40)
    mask[0, 0, 1:3, 1:3] = 1  # 4 pixels of 1600
    mask[0, 0, 10:14, 10:14], mask[0, 0, 14:18, 14:18] = (1, 1)  # touch at a corner: one region of 32
    left = without_small(mask, 0.01)
    assert left[0].sum() == 32
    assert left[0, 0, 1, 1] == 0
    assert left[1].sum() == 0


def test_drawn_masks_cover_one_to_ten_per_cent():
    """Ellipses as well."""
    g = generator("areas")
    areas = [draw_mask(g).mean().item() for _ in range(600)]
    assert sum(areas) / 600 == pytest.approx(0.055, rel=0.03)
    assert 0.008 < min(areas) < max(areas) < 0.11


def test_clean_statistics_are_over_images(monkeypatch):
    """Of their mean entropies, in each scale."""
    monkeypatch.setattr(pretrained, "list_items", lambda data: [SimpleNamespace(path=i) for i in (1.0, 2.0, 3.0)])
    monkeypatch.setattr(pretrained, "load_image", lambda value, cfg: torch.tensor(value))
    monkeypatch.setattr(pretrained, "entropy_windows", lambda x, window, stride: window * x)
    found = pretrained.clean_statistics(SimpleNamespace(data="", seed=0, images=100, size=224))
    assert found == {"images": 3, "clean_mean": [18, 26, 34], "clean_std": [9, 13, 17]}


def test_jedi_looks_at_its_photographs_before_it_trains(monkeypatch, tmp_path):
    """The header tells how many there were."""
    out = tmp_path / "jedi.safetensors"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no data at 'nowhere'"):
        patch.setattr(pretrained, "draw_mask", lambda g: pytest.fail("trained first"))
        pretrained.train_jedi(Training(data="nowhere", out=str(out)))
    monkeypatch.setattr(pretrained, "list_items", lambda data: sample_items()[:2])
    pretrained.train_jedi(Training(masks=1, epochs=1, size=64, out=str(out)))
    header = read_header(out)
    assert (header["images"], header["masks"], len(header["clean_std"])) == (2, 1, 3)


def test_autoencoder_completes_masks():
    """Masks it has never seen, with holes and false alarms: nearer to the truth than before."""
    g = generator("jedi", "unseen")
    truth = torch.stack([draw_mask(g) for _ in range(64)])[:, None]
    flip = torch.rand(truth.shape, generator=g)
    damaged = torch.where(truth == 1, (flip > 0.4).float(), (flip > 0.98).float())
    found = complete(load_autoencoder(), damaged, 0.33)

    def iou(mask):
        return ((mask * truth).sum(dim=(1, 2, 3)) / (mask + truth).clamp_max(1).sum(dim=(1, 2, 3))).mean()

    assert iou(found) > iou(damaged) + 0.05
    assert complete(load_autoencoder(), torch.zeros(1, 1, 224, 224), 0.33).sum() == 0


@pytest.mark.parametrize(("size", "patch"), [(224, 50), (64, 20), (30, 7)])
def test_patchcleanser_covers_every_place(classifier, size, patch):
    windows = PatchCleanser(classifier, (patch / size) ** 2).windows(size)
    for wrong in ((50, 6), (0, 6), (0.05, 0)):
        with pytest.raises(InputError, match=r"; area lies in 0.0005 to 0.5, masks is at least 1"):
            PatchCleanser(classifier, *wrong)
    assert len(windows) <= 36
    side = windows[0][2]
    for axis in (0, 1):
        starts = {w[axis] for w in windows}
        assert all(any(s <= at and at + patch <= s + side for s in starts) for at in range(size - patch + 1))
    if size == 224:
        assert (len(windows), side, windows[1][1]) == (36, 79, 30)


class Bright(torch.nn.Module):
    """A toy that counts bright pixels, up to two."""

    mean = torch.zeros(3, 1, 1)

    def forward(self, x):
        return F.one_hot((x.amax(dim=1) > 0.9).sum(dim=(1, 2)).clamp_max(2), 3).float()


def spot(top, left):
    """A mask (1, 30, 30) of one pixel."""
    return F.pad(torch.ones(1, 1, 1), (left, 29 - left, top, 29 - top))


def test_patchcleanser_decides_and_certifies():
    """One bright spot is masked away by the second round."""
    x = torch.full((3, 30, 30), 0.5)
    cleanser = PatchCleanser(Bright(), area=0.028, masks=3)  # 5 of 30 pixels
    assert cleanser(x) == 0
    assert cleanser.agreed(x) == (0, 0)
    assert cleanser.certified_places(x, 0) == 1
    assert cleanser.certified(x, 0, spot(4, 4))
    x[:, 4, 4] = 1
    assert cleanser(x) == 0  # a dissenter that every second mask confirms
    assert cleanser.agreed(x) == (0, 0)
    assert cleanser.certified_places(x, 1) < 1
    assert cleanser.certified(x, 0, spot(4, 4))  # the mask that hides this place hides the spot
    assert not cleanser.certified(x, 0, spot(28, 28))
    assert 0.1 < cleanser.certified_places(x, 0) < 0.3  # of those windows that hide the spot
    x[:, 28, 28] = 1
    assert cleanser.agreed(x) is None  # two spots, and each mask that hides one is told of the other
    assert cleanser(x) == 2


def test_a_share_of_the_image_is_one_at_every_size(classifier):
    """A patch of 5 % and of its least size, a pixel."""
    cleanser = PatchCleanser(classifier, 0.05, 4)
    assert [cleanser.largest(size) for size in (224, 448, 4, 1)] == [50, 100, 1, 1]
    assert cleanser.windows(448)[0][2] == 187  # 100 pixels, and a stride of 88 less one
    assert cleanser.windows(1) == [(0, 0, 1)]
    assert PatchCleanser(classifier, 0.02).largest(224) == 32  # 31.7, rounded


def test_what_is_certified_holds(classifier, photos):
    """Whatever the pixels of a patch at a place with a certificate, and of a wild one, the answer is the label."""
    cleanser = PatchCleanser(classifier, 0.05, masks=3)
    g = generator("certified")
    proven = 0
    for x in photos:
        label = int(classifier(x[None]).argmax())
        patch = torch.zeros(1, 224, 224)
        patch[:, 5:55, 5:55] = 1
        if cleanser.certified(x, label, patch):
            proven += 1
            for pixels in (torch.rand(3, 224, 224, generator=g), torch.zeros(3, 224, 224), photos[0].flip(1)):
                found = cleanser.agreed(x * (1 - patch) + pixels * patch)
                assert found is not None
                assert found[0] == label
    assert proven > 0


class Narrow(torch.nn.Module):
    """Class 0 is ahead by a little, whatever the image."""

    mean = torch.zeros(3, 1, 1)

    def __init__(self, lead):
        super().__init__()
        self.lead = lead

    def forward(self, x):
        return torch.tensor([[self.lead, 0.0, -1.0]]).repeat(len(x), 1)


class Told(PatchCleanser):
    """Answers from a table of pairs, and counts how many it was asked for."""

    def logits(self, x, pairs):
        self.asked.extend(pairs)
        return F.one_hot(torch.tensor([self.answers[i, j] for i, j in pairs]), 3).float()


def test_rows_agree_as_defined():
    """Row by row of random tables, with as few questions as need be."""
    g = generator("rows")
    x, seen, fewer = torch.zeros(3, 30, 30), set(), 0
    for _ in range(300):
        cleanser = Told(Bright(), 0.028, masks=3)
        n = len(cleanser.windows(30))
        table = (torch.rand(n, n, generator=g) > torch.rand(1, generator=g) ** 3).long()
        table[0] = torch.randint(2, (1,), generator=g)
        table = table[torch.randperm(n, generator=g)]
        answers = {(i, j): int(table[min(i, j), max(i, j)]) for i in range(n) for j in range(n)}
        object.__setattr__(cleanser, "answers", answers)
        object.__setattr__(cleanser, "asked", [])
        agreeing = {answers[i, i] for i in range(n) if len({answers[i, j] for j in range(n)}) == 1}
        if len({answers[i, i] for i in range(n)}) == 1:  # the first round is enough
            agreeing = {answers[0, 0]}
        found = cleanser.agreed(x)
        assert {found[0]} == agreeing if found else not agreeing
        assert len(set(cleanser.asked)) == len(cleanser.asked)  # no pair twice
        seen.add(found and found[0])
        fewer += len(cleanser.asked) < n * (n + 1) / 2
    assert seen == {None, 0, 1}
    assert fewer > 200


def test_certificates_are_of_rows_that_agree_and_windows_that_hide_all():
    g, x, held = generator("certificates"), torch.zeros(3, 30, 30), []
    for _ in range(40):
        cleanser = Told(Bright(), 0.028, masks=3)
        windows = cleanser.windows(30)
        n = len(windows)
        table = (torch.rand(n, n, generator=g) > 0.9).long()
        answers = {(i, j): int(table[min(i, j), max(i, j)]) for i in range(n) for j in range(n)}
        object.__setattr__(cleanser, "answers", answers)
        object.__setattr__(cleanser, "asked", [])
        right = [all(answers[i, j] == 0 for j in range(n)) for i in range(n)]
        assert cleanser.right_rows(x, 0) == right
        side, sure = cleanser.largest(30), [w for w, agrees in zip(windows, right, strict=True) if agrees]
        starts = [(t, u) for t in range(31 - side) for u in range(31 - side)]
        places = [any(a <= t <= a + s - side and b <= u <= b + s - side for a, b, s in sure) for t, u in starts]
        assert cleanser.certified_places(x, 0) == pytest.approx(sum(places) / len(places))
        top, left = torch.randint(0, 29, (2,), generator=g).tolist()
        patch = F.pad(torch.ones(1, 2, 2), (left, 28 - left, top, 28 - top))  # where windows overlap, in several
        hiding = [a <= top <= a + side - 2 and b <= left <= b + side - 2 for a, b, side in windows]
        held.append(any(r for r, h in zip(right, hiding, strict=True) if h))
        assert cleanser.certified(x, 0, patch) == held[-1]
    assert 5 < sum(held) < 35


def test_a_lead_that_rounding_may_change_certifies_nothing():
    x, patch = torch.zeros(3, 30, 30), spot(4, 4)
    for lead, certified in ((2e-3, True), (5e-4, False)):
        cleanser = PatchCleanser(Narrow(lead), 0.028, masks=3)
        assert cleanser(x) == 0
        assert cleanser.certified(x, 0, patch) == certified
        assert cleanser.certified_places(x, 0) == certified


class Undecided(PatchCleanser):
    def agreed(self, x):
        return None


def test_hardened_believes_windows_first(target, photos):
    """What the windows agree on is what the classifier reads; where they do not, the answer is DIFFender's."""
    defended = build("hardened:masks=2", target)
    noise = defended.sample_noise(["a", "b"], 0, "test")
    plain = target.defense(photos[:2], noise)
    bright = Bright()
    toy = Defended(Hardened(target.defense, PatchCleanser(bright, 0.05, masks=2)), bright)
    x = 0.5 * photos[:2]
    assert torch.equal(toy.defense(x, noise).image, x)
    assert toy.defense(x, noise).mask.sum() == 0
    x[0, :, 10, 10] = 1
    out = toy.defense(x, noise)
    assert Bright()(out.image).argmax(dim=1).tolist() == [0, 0]
    assert out.image[0, :, :60, :60].abs().max() == 0  # the toy's mean colour
    assert torch.equal(out.image[1], x[1])
    x[0, :, 220, 220] = 1
    assert torch.equal(toy.defense(x, noise).image[:1], target.defense(x, noise).image[:1])
    alone = Hardened(target.defense, PatchCleanser(Bright(), 0.05, masks=2), "majority")
    assert Bright()(alone(x, noise).image).argmax(dim=1).tolist() == [alone.cleanser(row) for row in x] == [1, 0]
    undecided = Hardened(target.defense, Undecided(target.classifier, 0.05))
    assert all(torch.equal(a, b) for a, b in zip(undecided(photos[:2], noise), plain, strict=True))


class NearTie(Bright):
    """Class 0 always; hardly, while the pixel at the lower right is bright."""

    def forward(self, x):
        lead = torch.where(x[:, 0, 215, 215] > 0.9, 5e-4, 1.0)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


def test_the_answer_is_given_by_an_image_that_is_no_near_tie(target):
    """All windows agree, but only the last covers the pixel that brings the other class close."""
    toy = Hardened(target.defense, PatchCleanser(NearTie(), 0.05, masks=2))
    x = torch.full((2, 3, 224, 224), 0.5)
    x[1, :, 215, 215] = 1
    noise = toy.sample_noise(["a", "b"], 0, "test")
    assert torch.equal(toy(x, noise).mask, toy.cleanser.hidden(x[0], [(), (3, 3)]))


def test_windows_before_a_changed_map_are_refused(target):
    class Mine(DIFFender):
        pass

    mine = Mine(target.defense.model, target.defense.contexts)
    with pytest.raises(InputError, match="plain is a Mine, whose own methods would be lost; subclass Hardened"):
        Hardened(mine, PatchCleanser(target.classifier, 0.05))


def test_hardened_covers_and_certifies_the_place_of_the_patch(target):
    """The window that hides the patch is the mask; certificates are each image's own."""
    toy = Hardened(target.defense, PatchCleanser(Bright(), 0.05, masks=2))
    x = torch.full((1, 3, 224, 224), 0.5)
    x[..., 215, 215] = 1
    window = toy.cleanser.hidden(x[0], [(3, 3)])
    assert torch.equal(toy(x, toy.sample_noise(["a"], 0, "test")).mask, window)
    x = torch.full((2, 3, 30, 30), 0.5)
    x[:, :, 4, 4] = 1
    assert toy.certified(x, [0, 0], torch.stack([spot(4, 4), spot(28, 28)])) == [True, False]


def test_evade_sees_hardened_through_a_window(target, photos):
    """The window follows from the noise alone, and no gradient comes from under it."""
    hardened = build("hardened:masks=3", target).defense
    x = photos[:2].clone().requires_grad_()
    noise = hardened.sample_noise(["a", "b"], 0, "attack")
    seen = hardened.unnoticed(x, noise)
    assert torch.equal(seen, hardened.unnoticed(x, noise))
    (gradient,) = torch.autograd.grad(seen.sum(), x)
    side = hardened.cleanser.windows(224)[0][2]
    assert gradient.eq(0).flatten(1).sum(dim=1).tolist() == [3 * side**2] * 2
    many = hardened.sample_noise([str(i) for i in range(40)], 0, "attack")
    shown = hardened.unnoticed(torch.ones(40, 3, 224, 224), many)
    assert len({tuple((row[0] < 1).nonzero()[0].tolist()) for row in shown}) == 9


@pytest.mark.parametrize("name", BASELINES)
def test_every_defence(target, classifier, photos, name):
    """Shapes, range, finite gradients; bpda is the identity backwards; batches do not mix."""
    y = photos[:2]
    defended = build(name, target)
    noise = defended.sample_noise(["a", "b"], 0, "test")
    out = defended.defense(y, noise)
    assert out.image.shape == y.shape
    assert out.image.min() >= 0
    assert out.image.max() <= 1
    x = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(defended.defense(x, noise, Backward("bpda")).image.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(defended(x, noise).amax(dim=1).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    alone = defended.sample_noise(["b"], 0, "test")
    assert torch.allclose(defended(y[1:], alone), defended(y, noise)[1:], atol=2e-3)
    assert classifier(y[:1]).shape == defended(y[:1], defended.sample_noise(["a"], 0, "test")).shape


@pytest.mark.parametrize("name", ["smoothing", "lgs", "jpeg"])
def test_auto_goes_through_the_defence_and_bpda_around_it(target, photos, name):
    defense, x = build(name, target).defense, photos[:1].clone().requires_grad_()
    outs = (defense(x, None, Backward("auto")).image, defense(x, None, Backward("bpda")).image, defense.purify(x))
    auto, bpda, bare = (torch.autograd.grad(out.square().sum(), x)[0] for out in outs)
    assert torch.equal(auto, bare)
    assert torch.equal(bpda, 2 * defense.purify(photos[:1]))
    assert (auto - bpda).norm() > 0.05 * bpda.norm()


USUAL = {  # settings where none are given
    "diffender": {},
    "hardened": {"area": 0.05, "masks": 4, "otherwise": "diffender"},
    "none": {},
    "resize": {},
    "vae": {},
    "jpeg": {"quality": 75},  # Dziugaite et al. 2016
    "smoothing": {"window": 3},  # Xu et al. 2018
    "dw": {"sigma": 4, "erosion": 7, "dilation": 13, "quantile": 0.95},  # ours
    "lgs": {"block": 15, "overlap": 5, "threshold": 0.1, "smoothing": 2.3},  # Naseer et al. 2019
    "fnc": {"alpha": 1.1, "statistics": ""},  # Yu et al. 2021
    "diffpure": {"t_star": 0.15, "steps": 15, "eta": 1},  # Nie et al. 2022, with fewer steps
    "jedi": {"stats": "official", "completion": "autoencoder", "min_area": 0.005, "threshold": 0.33},  # Tarchoun 2023
}


def test_settings_are_those_of_the_literature():
    assert {name: entry.settings for name, entry in DEFENSES.items()} == USUAL


def test_diffpure_without_noise_is_the_round_trip(target, photos):
    vae, pure = build("vae", target), build("diffpure:t_star=0", target)
    noise = pure.sample_noise(["a"], 0, "test")
    assert torch.equal(pure.defense(photos[:1], noise).image, vae.defense(photos[:1], noise[:, :2]).image)
    strong = build("diffpure:t_star=0.5,steps=3", target)
    noise = strong.sample_noise(["a"], 0, "test")
    once, twice = (strong.defense(photos[:1], noise).image for _ in range(2))
    assert torch.equal(once, twice)
    assert (once - pure.defense(photos[:1], noise).image).abs().mean() > 0.01


def test_two_steps_of_diffpure_by_hand(model):
    """From 300 over 150 to 0, each noise in its place."""
    context, x = model.encode_text([""]), torch.rand(1, 3, 32, 32)
    pure = DiffPure(model, context, model.blank_conditioning((32, 32)), t_star=0.3, steps=2)
    noise, a = pure.sample_noise(["a"], 0, "test"), ALPHAS_CUMPROD
    z = q_sample(model.encode(x, noise[:, 0]), noise[:, 1], a[300])
    for t, end, k in ((300, 150, 2), (150, 0, 3)):
        eps = model.eps(z, t, context, pure.blank)
        z = ddim_step(z, eps, Step(t, a[t], a[end]), 1.0, noise[:, k])
    assert torch.allclose(pure(x, noise), model.decode(z).clamp(0, 1), atol=1e-5)


def test_borrowed_models_work_at_the_size_of_diffender(model, classifier, photos):
    size, x = (64, 96), photos[:1]
    ours = Defended(DIFFender(model, contexts_for("manual", model), size=size), classifier)
    small, back = resize(x, size), lambda y: resize(y, x.shape[-2:])
    assert torch.equal(build("resize", ours).defense(x).image, back(small))
    vae, pure = build("vae", ours).defense, build("diffpure:steps=1", ours).defense
    noise = pure.sample_noise(["a"], 0, "test")
    assert noise.shape == (1, 3, 4, 8, 12)
    assert torch.equal(vae(x, noise).image, back(model.decode(model.encode(small, noise[:, 0])).clamp(0, 1)))
    assert pure(x, noise).image.shape == x.shape


def test_settings_in_the_name():
    assert parse_defense("jpeg:quality=50") == ("jpeg", {"quality": 50})
    assert parse_defense("jedi:completion=none,min_area=0.01") == ("jedi", {"completion": "none", "min_area": 0.01})
    for text, said in (
        ("blur", "unknown defence 'blur'"),
        ("jpeg:q=5", "defaults: quality=75"),
        ("jpeg:quality=high", "quality=high"),
        ("none:x=1", "defaults: none"),
    ):
        with pytest.raises(InputError, match=said):
            parse_defense(text)
