"""Localisation, restoration and the whole defence: values, gradients, randomness."""

import ast
import copy
import re
from dataclasses import replace

import pytest
import torch

from diffender.attacks.expectation import Task, samples
from diffender.config import FULL, Backward, DIFFenderConfig
from diffender.defenses.purifier import Purifier
from diffender.localize import difference_map, grown, predict_pair, refine_mask, standardize, standardize_robustly
from diffender.noise import Noise, generator, sample_noise
from diffender.ops import binarize, dilate, gaussian_blur, resize
from diffender.pipeline import Defended, DIFFender
from diffender.prompts import Contexts, PromptPair, empty_contexts, learned_context, manual_contexts
from diffender.restore import composite
from diffender.stable_diffusion.schedule import noise_timestep, predict_x0, q_sample
from diffender.utils.errors import InputError, named_images
from diffender.weights.prompts import contexts_for, save_prompts
from tests.conftest import ROOT

FAST = DIFFenderConfig(noise_ratio=0.2, draws=2, steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def contexts(model) -> Contexts:
    return Contexts(*(c.detach() for c in manual_contexts(model)))


@pytest.fixture(scope="module")
def defense(model, contexts) -> DIFFender:
    return DIFFender(model, contexts, FAST)


def noise_for(defense: DIFFender, n: int, purpose: str = "test") -> Noise:
    return defense.sample_noise([f"image {i}" for i in range(n)], 0, purpose)


def test_two_evaluations_a_draw_equal_the_four_of_eq_2(model, contexts, photos):
    """|x0(prompt, guided) - x0(empty)| written out with both one-step predictions, draw by draw."""
    guidance, t, m = 7.5, 481, 2
    z0 = model.vae.encode(photos[:1])
    draws = torch.randn(1, m, *z0.shape[1:], generator=torch.Generator().manual_seed(0))
    blank = model.blank_conditioning((224, 224))
    a_t = model.alphas_cumprod[t].item()
    total = 0
    for i in range(m):
        z_t = q_sample(z0, draws[:, i], a_t)
        eps_empty = model.eps(z_t, t, contexts.empty, blank)
        eps = eps_empty + guidance * (model.eps(z_t, t, contexts.locate, blank) - eps_empty)
        total = total + (predict_x0(z_t, eps, a_t) - predict_x0(z_t, eps_empty, a_t)).abs().mean(dim=1, keepdim=True)
    noise = Noise(z0, draws, draws, z0, z0, draws)
    cfg = DIFFenderConfig(noise_ratio=0.5, guidance=guidance)
    assert noise_timestep(cfg.noise_ratio) == t
    ours = difference_map(*predict_pair(model, z0, contexts, noise, cfg, blank))
    assert torch.allclose(ours, total / m, rtol=1e-3, atol=1e-4 * ours.max().item())


def test_the_defence_runs_in_double_precision(defense, photos):
    """As checks of gradients need it: images are of the dtype of the model."""
    double, x = copy.deepcopy(defense).double(), photos[:1]
    noise = noise_for(defense, 1)
    found = double(x.double(), Noise(*(n.double() for n in noise)))
    assert found.image.dtype == torch.float64
    assert torch.allclose(found.heatmap.float(), defense(x, noise).heatmap, atol=1e-4)
    with pytest.raises(InputError, match=r"images of dtype torch.float32; they are torch.float64: convert them by"):
        double(x, noise)


def test_a_size_may_be_a_list(model, contexts, photos):
    soft = Backward("full", ste="soft")
    one, other = (DIFFender(model, contexts, FAST, size) for size in ((64, 64), [64, 64]))
    noise = noise_for(one, 1)
    assert torch.equal(*(defense(photos[:1], noise, soft).image for defense in (one, other)))


def test_another_backward_pass_keeps_what_a_subclass_changed(target):
    class Mirrored(Defended):
        def forward(self, x, noise):
            return super().forward(x.flip(3), noise)

    mirrored = Mirrored(target.defense, target.classifier)
    assert type(mirrored.under(Backward("bpda"))) is Mirrored
    assert mirrored.under(Backward("bpda")).backward.mode == "bpda"
    assert mirrored.backward.mode == "full", "and leaves it as it was"


def test_gradients_of_diffender_are_not_for_other_defences(target):
    plain = Defended(Purifier(torch.nn.Identity()), target.classifier)
    for mode in ("bpda-mask", "surrogate", "full+loc", "evade"):
        with pytest.raises(InputError, match=re.escape(f"mode {mode} is of DIFFender, and the defence is a Purifier")):
            plain.under(Backward(mode))
    with pytest.raises(InputError, match="so its noise is an argument; leave out random=True"):
        Purifier(target.defense, random=True)


def test_several_contexts_are_answered_as_each_alone(model, contexts, monkeypatch):
    """In passes of as many rows as a micro-batch allows, of each text one; those of a latent are never apart."""
    g = torch.Generator().manual_seed(0)
    z, cond = (torch.randn(3, 4, 28, 28, generator=g), torch.randn(3, 5, 28, 28, generator=g))
    pair = torch.stack([contexts.locate, contexts.empty])
    alone = torch.stack([model.eps(z, 481, context, cond) for context in pair])
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda _m, args: rows.append(len(args[2])))
    try:
        for limit in (None, 4, 1):
            monkeypatch.setattr(model, "micro_batch", limit)
            assert torch.allclose(model.eps(z, 481, pair, cond), alone, atol=1e-4)
    finally:
        hook.remove()
    assert rows == [6, 4, 2, 2, 2, 2]


def test_passes_are_what_each_noise_gives_alone(defense, photos):
    noises = [noise_for(defense, 2, f"pass {i}") for i in range(2)]
    target = Defended(defense, torch.nn.Flatten())
    for (out, logits), noise in zip(target.looks(photos[:2], noises), noises, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(out, defense(photos[:2], noise), strict=True))
        assert torch.equal(logits, out.image.flatten(1))
    for (out, _), noise in zip(target.looks(photos[:2], noises, 2), noises, strict=True):
        assert torch.allclose(out.heatmap, defense(photos[:2], noise).heatmap, rtol=1e-3, atol=1e-5), "side by side"
    seen: list[int] = []
    hook = defense.model.vae.encoder.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    try:
        list(target.looks(photos[:2], noises))
    finally:
        hook.remove()
    assert len(seen) == 3, "the images once, the masked images with every noise"


def test_empty_prompt_needs_independent_noise(model, contexts, photos):
    z0 = model.vae.encode(photos[:1])
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 2, *z0.shape[1:], generator=g)
    blank, empty = model.blank_conditioning((224, 224)), contexts._replace(locate=None)
    same, other = (
        difference_map(*predict_pair(model, z0, empty, Noise(z0, a, second, z0, z0, a), DIFFenderConfig(), blank))
        for second in (a, b)
    )
    assert same.max() < 1e-3
    assert other.min() > 1e-3
    a_t = model.alphas_cumprod[481].item()
    noised = [q_sample(z0, draws[:, 0], a_t) for draws in (a, b)]
    first, second = (predict_x0(z, model.eps(z, 481, contexts.empty, blank), a_t) for z in noised)
    noise = Noise(z0, a[:, :1], b[:, :1], z0, z0, a)
    found = difference_map(*predict_pair(model, z0, empty, noise, DIFFenderConfig(), blank))
    assert torch.allclose(found, (first - second).abs().mean(dim=1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_standardize_uses_the_unbiased_deviation():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2)
    assert torch.allclose(standardize(x).flatten(), (x.flatten() - 3) / torch.tensor(14 / 3).sqrt())
    assert standardize(torch.ones(1, 1, 4, 4)).abs().max() == 0


def as_map(*rows: str) -> torch.Tensor:
    """A map (1, 1, h, w) from digits; a dot is 0."""
    return torch.tensor([[float(c.replace(".", "0")) for c in row] for row in rows])[None, None]


GROWN = {  # z-scores with theta 2.5 and grow 1: what is masked
    "a seed in its region, and a region without": (("32..", "....", ".222"), ("11..", "....", "....")),
    "a bridge": (("222.22", "232.22", "...2.."), ("111.11", "111.11", "...1..")),
    "a gap": (("23.2", "22.2"), ("11..", "11..")),
    "a ring": (("2222", "2..3", "2222"), ("1111", "1..1", "1111")),
    "corners touch": (("3..", ".2.", "..2"), ("1..", ".1.", "..1")),
    "along the border": (("2....2", "2....2", "223..2"), ("1.....", "1.....", "111...")),
    "ties are not above": (("311", "..2"), ("1..", "...")),
    "no seed": (("222", "222"), ("...", "...")),
    "everything": (("33", "33"), ("11", "11")),
}


def flood(z: torch.Tensor, theta: float, grow: float) -> torch.Tensor:
    """The same by walking from each seed, pixel by pixel."""
    h, w = z.shape
    todo = [tuple(p) for p in ((z > theta) & (z > grow)).nonzero().tolist()]
    found = torch.zeros_like(z)
    while todo:
        r, c = todo.pop()
        if 0 <= r < h and 0 <= c < w and z[r, c] > grow and not found[r, c]:
            found[r, c] = 1
            todo += [(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return found


GROW = DIFFenderConfig(theta=2.5, grow=1.0, sigma=0.0, dilation=1)


@pytest.mark.parametrize("case", GROWN)
def test_growth_on_hand_made_maps(case):
    z, expected = (as_map(*rows) for rows in GROWN[case])
    assert torch.equal(grown(z, GROW), expected)
    assert torch.equal(flood(z[0, 0], 2.5, 1.0), expected[0, 0])


def test_growth_of_a_batch_is_that_of_each_image():
    z = 1.5 * torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together = grown(z, GROW)
    for i, one in enumerate(z):
        assert torch.equal(together[i], grown(one[None], GROW)[0])
        assert torch.equal(together[i, 0], flood(one[0], 2.5, 1.0))
    assert 0 < together.mean() < 1


def test_growth_goes_straight_through_and_agrees_with_finite_differences_when_soft():
    z = (1.5 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))).double().requires_grad_()
    (gradient,) = torch.autograd.grad(grown(z, GROW).sum(), z)
    assert torch.equal(gradient, torch.ones_like(z)), "the identity, inside and outside"
    soft = Backward(ste="soft", ste_k=3.0)
    weights = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    assert torch.autograd.gradcheck(lambda z: (grown(z, GROW, soft) * weights).sum(), z, eps=1e-6)


def test_without_growth_masks_are_the_old_ones():
    z = 1.5 * torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    cfg, size = DIFFenderConfig(theta=2.5), (224, 224)
    old = binarize(resize(dilate(gaussian_blur(binarize(z, 2.5), sigma=1.0)), size), 0.5)
    assert torch.equal(refine_mask(z, size, cfg), old)
    assert torch.equal(refine_mask(z, size, replace(cfg, grow=3.0)), old), "a lower threshold that is not lower"
    more = refine_mask(z, size, replace(cfg, grow=1.0))
    assert (more >= old).all()
    assert more.sum() > 1.5 * old.sum()


def test_sigma_is_that_of_the_blur():
    z, cfg, size = 1.5 * torch.randn(1, 1, 28, 28), DIFFenderConfig(theta=2.0), (224, 224)
    masks = [refine_mask(z, size, replace(cfg, sigma=sigma)) for sigma in (0.4, 2.0)]
    for mask, sigma in zip(masks, (0.4, 2.0), strict=True):
        blurred = gaussian_blur(binarize(z, 2.0), sigma=sigma)
        assert torch.equal(mask, binarize(resize(dilate(blurred), size), 0.5))
    assert not torch.equal(*masks)


@pytest.mark.parametrize(("grow", "lowest"), [(0.0, 2.5), (1.0, 1.0)])
def test_the_estimator_that_is_asked_for_is_used(grow, lowest):
    """With the slope of its sigmoid at the threshold that decides where the mask ends."""
    z = (1.5 * torch.randn(1, 1, 8, 8)).requires_grad_()
    cfg = DIFFenderConfig(theta=2.5, grow=grow, sigma=0.0, dilation=1)
    (slope,) = torch.autograd.grad(refine_mask(z, (8, 8), cfg, Backward(ste="sigmoid", ste_k=3.0)).sum(), z)
    s = torch.sigmoid(3 * (z - lowest))
    assert torch.allclose(slope, 3 * s * (1 - s))


def test_refine_mask_drops_lone_pixels_and_grows_blocks():
    z = torch.zeros(1, 1, 28, 28)
    z[..., 3, 3] = 9  # a lone latent vanishes
    z[..., 10:16, 10:16] = 9  # a block grows by about one latent on each side
    mask = refine_mask(z, (224, 224), DIFFenderConfig())
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask[..., :64, :64].sum() == 0
    assert mask[..., 80:128, 80:128].min() == 1
    rows = mask[0, 0].any(dim=1).nonzero()
    assert 80 - 8 <= rows.min() < 80
    assert 128 <= rows.max() + 1 <= 128 + 8


def test_blur_keeps_constants_and_dilation_spreads_by_one():
    assert torch.allclose(gaussian_blur(torch.full((1, 1, 5, 5), 0.3)), torch.full((1, 1, 5, 5), 0.3))
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1
    assert dilate(x).sum() == 9
    assert gaussian_blur(x)[0, 0, 2, 2].item() == pytest.approx((1 / (1 + 2 * 2.718281828**-0.5)) ** 2, rel=1e-5)


def test_blur_reflects_at_the_border_and_resizing_averages_what_it_leaves_out():
    x, beside = torch.tensor([1.0, 2.0, 4.0]).expand(1, 1, 3, 3), 2.718281828**-0.5
    assert gaussian_blur(x)[0, 0, 1, 0].item() == pytest.approx((1 + 4 * beside) / (1 + 2 * beside))
    stripes = torch.tensor([1.0, 0, 0, 0]).repeat(8).expand(1, 1, 32, 32)
    assert torch.allclose(resize(stripes, (8, 8))[..., 1:-1], torch.tensor(0.25))


@pytest.mark.parametrize("ste", ["identity", "sigmoid", "none"])
def test_what_equals_a_threshold_does_not_exceed_it(ste):
    assert binarize(torch.tensor([2.5]), 2.5, ste).item() == 0


def test_composite_keeps_the_outside_to_the_bit(defense, photos):
    out = defense(photos[:2], noise_for(defense, 2))
    outside = out.mask.expand_as(photos[:2]) == 0
    assert torch.equal(out.image[outside], photos[:2][outside])
    raw = DIFFender(defense.model, defense.contexts, replace(FAST, composite=False))
    whole = raw(photos[:2], noise_for(defense, 2)).image
    assert not torch.equal(whole[outside], photos[:2][outside])
    assert whole.min() >= 0 and whole.max() <= 1
    assert composite(torch.rand(1, 3, 2, 2), torch.full((1, 3, 2, 2), 9.0), torch.ones(1, 1, 2, 2)).max() == 1


def test_only_images_with_a_mask_are_restored(model, contexts, photos, pasted):
    """The image is the same to the bit; what nothing is masked of costs its localisation alone."""
    own = copy.deepcopy(model)
    defense = DIFFender(own, contexts, replace(FAST, theta=3.5))
    x, noise = torch.cat([photos[1:2], pasted]), noise_for(defense, 2)
    rows: list[int] = []
    own.vae.decoder.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    out = defense(x, noise)
    assert [mask.any().item() for mask in out.mask] == [False, True]
    assert rows == [1]
    whole = composite(x, defense.restore(x, out.mask, noise), out.mask)
    assert torch.equal(out.image[0], x[0])
    assert torch.allclose(out.image, whole, atol=1e-5)
    rows.clear()
    assert torch.equal(defense(x[:1], noise_for(defense, 1)).image, x[:1])
    assert rows == []
    defense(x[:1].clone().requires_grad_(), noise_for(defense, 1))
    assert rows == [1], "the gradient of an empty mask needs what would be restored"


def test_restoration_has_a_prompt_and_noise_of_its_own(model, contexts):
    cfg, size = replace(FAST, guidance=1.0, eta=1.0), (64, 64)
    defense, x, mask = DIFFender(model, contexts, cfg, size), torch.rand(1, 3, *size), torch.zeros(1, 1, *size)
    mask[..., 16:48, 16:48] = 1
    noise = noise_for(defense, 1)
    usual = defense.restore(x, mask, noise)
    for name, value in noise._asdict().items():
        other = defense.restore(x, mask, noise._replace(**{name: -value}))
        assert torch.equal(other, usual) == (name not in ("masked", "start", "steps")), name
    for name in Contexts._fields:
        changed = contexts._replace(**{name: contexts.locate if name == "restore" else contexts.restore})
        other = DIFFender(model, changed, cfg, size).restore(x, mask, noise)
        assert torch.equal(other, usual) == (name != "restore"), name


def test_localisation_has_noise_of_its_own(model, contexts):
    defense, x = DIFFender(model, contexts, FAST, (64, 64)), torch.rand(1, 3, 64, 64)
    noise = noise_for(defense, 1)
    usual = defense.localize(x, noise).heatmap
    for name, value in noise._asdict().items():
        other = defense.localize(x, noise._replace(**{name: -value})).heatmap
        assert torch.equal(other, usual) == (name not in ("image", "draws")), name


def test_restoration_does_not_see_what_the_mask_covers(defense, photos):
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 64:128, 64:128] = 1
    noise = noise_for(defense, 1)
    other = photos[:1] * (1 - mask) + mask * torch.rand(1, 3, 224, 224)
    assert torch.equal(defense.restore(photos[:1], mask, noise), defense.restore(other, mask, noise))


def test_what_is_restored_knows_no_pixel_of_the_patch(defense, photos):
    """Also where the model works at another size than the image's: its mask has every pixel that the patch reaches."""
    other = defense.at((320, 320))
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 61:118, 93:150] = 1
    noise = other.sample_noise(["a"], 0, "a")
    whole = [other.restore(x, mask, noise, steps=1) for x in (photos[:1], photos[:1] * (1 - mask) + 9 * mask)]
    assert torch.equal(*whole)


def test_a_surrogate_takes_no_more_steps_than_the_defence(defense, photos):
    one = DIFFender(defense.model, defense.contexts, replace(FAST, sampler="ddim", steps=1, eta=1.0))
    noise = one.sample_noise(["a"], 0, "a")
    x = photos[:1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(one(x, noise, Backward("surrogate")).image.sum(), x)
    assert slope.isfinite().all()


def test_a_surrogate_restores_once_where_nothing_is_differentiated(defense, photos, monkeypatch):
    asked, restore = [], defense.restore
    monkeypatch.setattr(defense, "restore", lambda *args: asked.append(len(args)) or restore(*args))
    with torch.no_grad():
        surrogate, full = (defense(photos[:1], noise_for(defense, 1), Backward(mode)) for mode in ("surrogate", "full"))
    assert torch.equal(surrogate.image, full.image) and 4 not in asked, "with steps of its own"


def test_named_outputs_of_any_size(defense):
    x = torch.rand(1, 3, 150, 260)
    out = defense(x, noise_for(defense, 1))
    assert out.image.shape == x.shape
    assert out.mask.shape == (1, 1, 150, 260)
    assert out.heatmap.shape == out.z_score.shape == (1, 1, 28, 28)
    assert set(out.mask.unique().tolist()) <= {0.0, 1.0}


def test_no_restoration_fills_with_grey(defense, pasted):
    nr = DIFFender(defense.model, defense.contexts, replace(FAST, restore=False))
    out = nr(pasted, noise_for(defense, 1))
    assert out.mask.sum() > 0
    assert (out.image[out.mask.expand_as(out.image) == 1] == 0.5).all()


def test_deterministic_given_noise_and_independent_of_the_batch(defense, photos):
    ids = [f"image {i}" for i in range(3)]
    together = defense(photos[:3], defense.sample_noise(ids, 0, "test"))
    again = defense(photos[:3], defense.sample_noise(ids, 0, "test"))
    assert torch.equal(together.image, again.image)
    order = [2, 0, 1]
    for i in order:
        alone = defense(photos[i : i + 1], defense.sample_noise([ids[i]], 0, "test"))
        assert torch.allclose(alone.heatmap[0], together.heatmap[i], rtol=1e-3, atol=1e-5)
        assert torch.equal(alone.mask[0], together.mask[i])
        assert torch.allclose(alone.image[0], together.image[i], atol=1e-3)


def test_noise_depends_on_seed_image_purpose_and_k_alone():
    def draw(seed=0, image_id="a", purpose="p", k=0):
        return sample_noise((4, 3, 3), (2, 1), seed, [image_id], purpose, k)

    for a, b in zip(draw(), draw(), strict=True):
        assert torch.equal(a, b)
    for other in (draw(seed=1), draw(image_id="b"), draw(purpose="q"), draw(k=1)):
        for a, b in zip(draw(), other, strict=True):
            assert not torch.equal(a, b)
    tensors = [t.flatten()[:36] for t in draw()]
    assert all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


def test_golden_noise():
    """Published results stand and fall with this derivation: it must not change by accident."""
    numbers = torch.randn(3, generator=generator(0, "a", "p", 0)).tolist()
    assert numbers == pytest.approx([0.2746, 1.4893, 1.1501], abs=1e-4)


def test_the_noise_of_a_pass_comes_from_one_stream_in_its_order():
    g, noise = generator(0, "a", "p", 1), sample_noise((4, 3, 3), (2, 1), 0, ["a"], "p", 1)
    for drawn, count in zip(noise, ((), (2,), (2,), (), (), (1,)), strict=True):
        assert torch.equal(drawn[0], torch.randn(*count, 4, 3, 3, generator=g))


def test_global_random_state_is_untouched(defense, photos):
    before = torch.get_rng_state()
    defense(photos[:1], noise_for(defense, 1))
    assert torch.equal(before, torch.get_rng_state())


def test_bpda_is_the_identity(defense, photos):
    x = photos[:1].clone().requires_grad_()
    (g,) = torch.autograd.grad(defense(x, noise_for(defense, 1), Backward("bpda")).image.sum(), x)
    assert torch.equal(g, torch.ones_like(x))


def test_gradient_through_a_covering_mask_comes_from_the_straight_through_estimator(defense, photos):
    """A covered patch can act through the mask only: with a constant mask its gradient is exactly zero."""
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 64:128, 64:128] = 1
    noise = noise_for(defense, 1)
    x = photos[:1].clone().requires_grad_()
    weights = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    image = defense.repaint(x, mask, noise)
    assert torch.equal(image[mask.expand_as(x) == 0], x[mask.expand_as(x) == 0])
    (g,) = torch.autograd.grad((image * weights).sum(), x)
    assert g[..., 72:120, 72:120].abs().max() == 0
    (g,) = torch.autograd.grad((defense(x, noise).image * weights).sum(), x)
    assert g[..., 72:120, 72:120].abs().max() > 0


def test_recomputation_changes_no_gradient(defense, photos, monkeypatch):
    x = photos[:1].clone().requires_grad_()
    noise = noise_for(defense, 1)
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 64:128, 64:128] = 1

    def gradient():
        out = defense.localize(x, noise).heatmap.sum() + defense.restore(x, mask, noise).square().mean()
        return torch.autograd.grad(out, x)[0]

    with_recomputation = gradient()
    monkeypatch.setattr(defense.model, "keep", True)
    assert torch.equal(gradient(), with_recomputation)


def test_nothing_is_binary_when_soft(defense, monkeypatch):
    """At the model's size, and where the mask is made smaller for it."""
    seen = []
    monkeypatch.setattr(defense, "restore", lambda x, mask, noise: seen.append(mask) or x)
    for size in (224, 240):
        x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        defense(x, noise_for(defense, 1), Backward(ste="soft"))
    assert [mask.shape[-1] for mask in seen] == [224, 224]
    assert all(len(mask.unique()) > 100 for mask in seen)


def test_gradients_agree_with_finite_differences(model, contexts, photos):
    """Directional derivatives of the difference map and of restoration, in float64 (thresholds left out)."""
    double = copy.deepcopy(model).double()
    defense = DIFFender(double, Contexts(*(c.double() for c in contexts)), FAST, (64, 64))
    x = resize(photos[:1], (64, 64)).double()
    noise = Noise(*(n.double() for n in noise_for(defense, 1)))
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    mask[..., 16:48, 16:48] = 1
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(x):
        # The mean of the squares of z-scores is constant, that of the cubes is not.
        return defense.localize(x, noise).z_score.pow(3).mean() + defense.restore(x, mask, noise).square().mean()

    x.requires_grad_()
    slope = (torch.autograd.grad(f(x), x)[0] * direction).sum().item()
    h = 1e-5
    with torch.no_grad():
        difference = (f(x + h * direction) - f(x - h * direction)).item() / (2 * h)
    assert slope == pytest.approx(difference, rel=1e-4)


def test_both_prompts_get_gradients_and_words_initialise_them(model, photos):
    prompts = PromptPair(16, 64, generator(0, "ctx"))
    assert [ctx.std().item() for ctx in prompts.parameters()] == pytest.approx([0.02] * 2, rel=0.1)
    defense = DIFFender(model, prompts(model), FAST)
    noise = noise_for(defense, 1)
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 64:128, 64:128] = 1
    (
        defense.localize(photos[:1], noise).z_score.pow(3).sum() + defense.restore(photos[:1], mask, noise).sum()
    ).backward()
    assert prompts.ctx_locate.grad.norm() > 1
    assert prompts.ctx_restore.grad.norm() > 1
    prompts.initialize_from(model.text, ("adversarial", "clean"))
    tokens = model.text.tokenize(["adversarial"])[0]
    word = model.text.embed(tokens[1 : int((tokens == 49407).nonzero()[0])])
    assert torch.equal(prompts.ctx_locate[: 2 * len(word)], torch.cat([word, word]))  # repeated to fill 16
    assert not torch.equal(prompts.ctx_locate, prompts.ctx_restore)


def test_a_learned_prompt_of_word_embeddings_equals_the_words(model):
    """Context vectors set to a word's embedding give the context of that word: same frame, same padding."""
    words = "adversarial noise patch"
    tokens = model.text.tokenize([words])[0]
    n = int((tokens == 49407).nonzero()[0]) - 1
    ctx = model.text.embed(tokens[1 : 1 + n])
    assert torch.allclose(learned_context(model.text, ctx), model.encode_text([words]), atol=1e-6)


def test_each_part_is_told_its_own_prompt(model):
    words = ("adversarial", "clean", "")
    for context, word in zip(manual_contexts(model), words, strict=True):
        assert torch.allclose(context, model.encode_text([word]), atol=1e-5)
    prompts = PromptPair(4, 64, generator(0, "ctx"))
    found = prompts(model)
    for context, ctx in zip(found, (prompts.ctx_locate, prompts.ctx_restore), strict=False):
        assert torch.equal(context, learned_context(model.text, ctx))


def test_prompt_kinds(model, tmp_path):
    assert empty_contexts(model).locate is None and contexts_for("empty", model).locate is None
    save_prompts(PromptPair(4, 64), tmp_path / "p.safetensors", {})
    own = contexts_for("tuned", model, tmp_path / "p.safetensors")
    assert not torch.equal(own.restore, contexts_for("tuned", model).restore), "prompts of one's own"
    with pytest.raises(InputError, match="unknown prompt 'none'"):
        contexts_for("none", model)


@pytest.mark.parametrize(
    ("x", "says"), [(torch.rand(1, 3, 8, 8) * 255, "divide by 255"), (torch.rand(3, 8, 8), r"\(B, 3, H, W\)")]
)
def test_images_out_of_range_are_refused(defense, x, says):
    with pytest.raises(InputError, match=says):
        defense(x, noise_for(defense, 1))


@pytest.mark.parametrize("size", [(40, 40), (224, 232), (0, 32)])  # the VAE takes the first two
def test_sizes_that_the_unet_cannot_halve_are_refused(model, contexts, size):
    with pytest.raises(InputError, match=re.escape(f"size is {size}; both sides are multiples of 32")):
        DIFFender(model, contexts, FAST, size)


def test_the_package_leaves_gradients_and_seeds_to_the_caller():
    """No no_grad, inference_mode or global seeding in the package, no diffusers and no transformers."""
    for path in (ROOT / "diffender").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        names |= {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
        own = {"enable_grad"} if path.name != "dw.py" else set()  # DW is made of a gradient
        assert not names & {"no_grad", "inference_mode", "set_grad_enabled", *own}, path
        if path.name != "noise.py":  # which seeds for other people's modules, and puts the generator back
            assert not re.search(r"(torch|cuda)\.manual_seed|random\.seed", path.read_text()), path
        assert not re.search(r"^\s*(import|from) (diffusers|transformers)", path.read_text(), re.MULTILINE), path


def test_choices_of_localisation(defense, pasted):
    """Each gives another map or mask of the right shape, with gradient; those that z-scores cancel give the same."""
    x, noise = pasted.clone().requires_grad_(), noise_for(defense, 1)
    base = defense.localize(x, noise)

    def other(**changes):
        found = DIFFender(defense.model, defense.contexts, replace(defense.cfg, **changes)).localize(x, noise)
        assert [t.shape for t in found] == [t.shape for t in base]
        (g,) = torch.autograd.grad(found.z_score.pow(3).mean(), x, retain_graph=True)
        assert g.abs().max() > 0.01
        return found

    assert torch.allclose(other(guidance=7.5).z_score, base.z_score, atol=1e-3)  # a factor of the map: cancelled
    robust = other(score="mad")
    assert torch.equal(robust.heatmap, base.heatmap)
    assert robust.z_score.median().abs() < 1e-5
    assert other(dilation=5).mask.sum() > base.mask.sum() > other(dilation=1).mask.sum()
    assert not torch.equal(other(sigma=0.0).mask, base.mask)
    for bad, says in (({"score": "rank"}, "unknown score 'rank'"), ({"dilation": 2}, "dilation is 2; it is an odd")):
        with pytest.raises(InputError, match=says):
            replace(defense.cfg, **bad)


def test_robust_scores_do_not_shrink_with_the_patch():
    """Half of a map 10 higher than the rest: its z-score falls to 1, its robust score does not."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 28, 28, generator=g)
    x[..., :12, :] += 10
    assert standardize(x)[..., :12, :].mean() < 1.3
    assert standardize_robustly(x)[..., :12, :].mean() > 2.0


def test_robust_scores_count_in_deviations_of_a_normal_distribution():
    x = 5 + 3 * torch.randn(1, 1, 64, 64)
    assert torch.allclose(standardize_robustly(x), standardize(x), atol=0.25)


def test_nan_stops_with_the_name_of_the_image(defense, photos, pasted):
    """Wherever it arises: in the difference map, in the restored image, in the gradient of an attack."""
    noise = noise_for(defense, 2)
    rarely = DIFFender(defense.model, defense.contexts, replace(FAST, theta=3.5))  # masks the second image alone

    def spoil(_module, _args, out):
        return torch.cat([out[:-1], torch.full_like(out[-1:], torch.nan)])

    with pytest.raises(InputError, match="in the difference map of dog.jpg; --dtype float32 may help"):
        hook = defense.model.unet.register_forward_hook(spoil)
        try:
            with named_images(["cat.jpg", "dog.jpg"]):
                defense(photos[:2], noise)
        finally:
            hook.remove()
    with pytest.raises(InputError, match="in the restored image of dog.jpg"):
        hook = defense.model.vae.decoder.register_forward_hook(spoil)
        try:
            with named_images(["cat.jpg", "dog.jpg"]):
                rarely(torch.cat([photos[1:2], pasted]), noise)
        finally:
            hook.remove()
    x = torch.tensor([[1.0], [0.0]])
    with pytest.raises(InputError, match="in the attack's gradient of dog.jpg"), named_images(["cat.jpg", "dog.jpg"]):
        task = Task(lambda x, noise: x.sqrt(), x, torch.zeros(2).long(), ["cat", "dog"], 0, lambda z: z.sum(dim=1))
        list(samples(task, lambda k: (x, x, None), eot=2, batch=2))


def test_a_subclass_stays_one_at_every_size(model, photos):
    """What it changes counts for images that are not square, too, and the first keeps its size."""

    class Everywhere(DIFFender):
        def localize(self, x, noise, backward=FULL, posterior=None):
            return super().localize(x, noise, backward, posterior)._replace(mask=torch.ones_like(x[:, :1]))

    square = Everywhere(model, contexts_for("manual", model))
    wide = square.at((64, 96))
    assert isinstance(wide, Everywhere)
    assert (square.blank.shape[-2:], wide.blank.shape[-2:]) == ((28, 28), (8, 12))
    assert wide(photos[:1], wide.sample_noise(["a"], 0, "test")).mask.mean() == 1
    with pytest.raises(InputError, match="both sides are multiples"):
        square.at((63, 96))


def test_noise_of_another_size_or_kind_is_named(defense, photos):
    other = defense.at((64, 64)).sample_noise(["a"], 0, "test")
    for noise, says in ((other, r"noise for latents \(4, 8, 8\); here they are \(4, 28, 28\)"), (photos, "a Tensor")):
        with pytest.raises(InputError, match=says):
            defense(photos[:1], noise)


def test_localisation_alone_checks_its_noise(defense, photos):
    with pytest.raises(InputError, match="noise for 2 images with 1 images"):
        defense.localize(photos[:1], defense.sample_noise(["a", "b"], 0, "test"))
