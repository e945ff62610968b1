"""Attacks: geometry, what they may change, and that they hurt."""

from dataclasses import replace

import pytest
import torch

from diffender.attacks import ATTACKS
from diffender.attacks.patch import apply_patch, margin, masks_for, patch_side, random_mask, to_8bit
from diffender.noise import generator
from diffender.pipeline import Undefended

SIZE = 24
IDS = [f"picture {i}" for i in range(8)]


class Linear(torch.nn.Module):
    """Logits are fixed linear functions of the pixels: attacks on it are checked against the optimum in closed form."""

    def __init__(self, classes: int = 5, sigma: float = 0.0):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w = torch.randn(classes, 3 * SIZE**2, generator=g) / SIZE
        self.sigma = sigma

    def sample_noise(self, image_ids, seed, purpose, k=0):
        if not self.sigma:
            return None
        return torch.stack([torch.randn(5, generator=generator(seed, i, purpose, k)) for i in image_ids])

    def forward(self, x, noise=None):
        logits = x.flatten(1) @ self.w.mT
        return logits if noise is None else logits + self.sigma * noise


@pytest.fixture
def batch():
    x = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return to_8bit(x), Linear()(x).argmax(dim=1)


def test_patch_geometry():
    assert [patch_side(224, a) for a in (0.02, 0.05, 0.10)] == [32, 50, 71]
    assert patch_side(299, 0.05) == 67
    g = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(400):
        mask = random_mask(12, 0.25, "square", g)
        assert mask.sum() == 36
        rows = mask[0].any(dim=1).nonzero().flatten()
        places.add(int(rows[0]))
        assert rows[-1] - rows[0] == 5
    assert places == set(range(7))  # the last place included
    disc = random_mask(224, 0.05, "circle", g)
    assert disc.mean().item() == pytest.approx(0.05, rel=0.02)


def test_apply_patch_is_exact():
    x, patch = torch.rand(2, 1, 3, SIZE, SIZE).unbind()
    mask = masks_for(["a"], 0, "patch", SIZE, 0.1, "square")
    out = apply_patch(x, patch, mask)
    inside = mask.expand_as(x) == 1
    assert torch.equal(out[inside], patch[inside])
    assert torch.equal(out[~inside], x[~inside])


def test_margin_is_negative_exactly_where_fooled():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_changes_only_the_patch_and_hurts(name, batch):
    x, y = batch
    victim = Linear()
    out = ATTACKS[name](area=0.2, iters=30, eot=1)(victim, x, y, IDS, seed=0)
    assert torch.equal(out.image * (1 - out.mask), x * (1 - out.mask))
    assert 0 <= out.image.min() <= out.image.max() <= 1
    assert torch.equal(to_8bit(out.image), out.image)
    assert (margin(victim(out.image), y) < margin(victim(x), y)).all()
    assert (victim(out.image).argmax(dim=1) != y).float().mean() >= 0.9


def test_advp_reaches_the_optimum_of_a_linear_victim(batch):
    """Two classes: the margin is linear in the pixels, so each must end at 0 or 1 by the sign of its weight."""
    x, _ = batch
    victim = Linear(classes=2)
    y = victim(x).argmax(dim=1)
    out = ATTACKS["advp"](area=0.2, iters=60, eot=1)(victim, x, y, IDS, seed=0)
    for b in range(len(x)):
        slope = (victim.w[y[b]] - victim.w[1 - y[b]]).view(3, SIZE, SIZE)
        best = apply_patch(x[b], (slope < 0).float(), out.mask[b])
        assert margin(victim(out.image[b : b + 1]), y[b : b + 1]).item() == pytest.approx(
            margin(victim(best[None]), y[b : b + 1]).item(), abs=1e-4
        )


def test_eot_on_a_deterministic_victim_changes_nothing(batch):
    x, y = batch
    attack = ATTACKS["advp"](area=0.1, iters=5, eot=1)
    one, four = (a(Linear(), x, y, IDS, seed=0).image for a in (attack, replace(attack, eot=4)))
    assert (one - four).abs().mean() < 1e-4  # up to rounding, which a sign step can turn


def test_results_do_not_depend_on_batch_or_order_and_leave_global_randomness_alone(batch):
    x, y = batch
    attack = ATTACKS["advp"](area=0.1, iters=4, eot=3)
    victim = Linear(sigma=0.5)
    before = torch.get_rng_state()
    together = attack(victim, x, y, IDS, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    for i in (5, 2):
        alone = attack(victim, x[i : i + 1], y[i : i + 1], IDS[i : i + 1], seed=0)
        assert torch.equal(alone.mask[0], together.mask[i])
        assert (alone.image[0] - together.image[i]).abs().mean() < 1e-4
    assert not torch.equal(attack(victim, x, y, IDS, seed=1).image, together.image)


def test_targeted_aims_at_one_class_and_eot_moves_the_patch(batch):
    x, y = batch
    victim = Linear()
    targeted = ATTACKS["advp"](area=0.5, iters=60, eot=1, targeted=True)
    got = victim(targeted(victim, x, y, IDS, seed=0).image).argmax(dim=1)
    shift = [int(torch.randint(1, 5, (), generator=generator(0, i, "target"))) for i in IDS]
    assert (got == (y + torch.tensor(shift)) % 5).float().mean() >= 0.7
    moving = ATTACKS["advp"](area=0.1, iters=3, eot=2, location="eot")
    fixed = ATTACKS["advp"](area=0.1, iters=3, eot=2)
    assert not torch.equal(moving(victim, x, y, IDS, seed=0).mask, fixed(victim, x, y, IDS, seed=0).mask)


def test_lavan_lowers_the_true_logit_against_the_target(batch):
    """Linear victim: z_y - z_t is linear in the pixels, so each ends at 0 or 1 by the sign of its weight."""
    x, y = batch
    victim = Linear()
    out = ATTACKS["lavan"](area=0.2, iters=60, eot=1)(victim, x, y, IDS, seed=0)
    shift = torch.tensor([int(torch.randint(1, 5, (), generator=generator(0, i, "target"))) for i in IDS])
    target = (y + shift) % 5
    slope = (victim.w[y] - victim.w[target]).view(len(x), 3, SIZE, SIZE)
    best = victim(apply_patch(x, (slope < 0).float(), out.mask))
    rows = torch.arange(len(x))
    for got, want in zip(victim(out.image), best, strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    assert (best[rows, y] < best[rows, target]).float().mean() > 0.7
    runner_up = ATTACKS["lavan"](area=0.2, iters=9, eot=1, targeted=False)(victim, x, y, IDS, seed=0)
    margins = ATTACKS["advp"](area=0.2, iters=9, eot=1)(victim, x, y, IDS, seed=0)
    assert torch.equal(runner_up.image, margins.image)
    assert (ATTACKS["lavan"]().area, ATTACKS["advp"]().area) == (0.02, 0.05)


def test_advp_breaks_the_real_classifier(classifier, photos):
    """A 5 % patch of 40 steps takes a real ImageNet network down."""
    y = classifier(photos).argmax(dim=1)
    attack = ATTACKS["advp"](iters=40, eot=1)
    out = attack(Undefended(classifier), photos, y, [f"p{i}" for i in range(4)], seed=0)
    assert (classifier(out.image).argmax(dim=1) != y).sum() >= 3
    assert out.mask.mean().item() == pytest.approx(0.05, rel=0.01)
