"""Attacks: geometry, what they may change, and that they hurt."""

import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from diffender.attacks import ATTACKS, advp, gdpa, rhde, stickers
from diffender.attacks.attack import steps_averaged_by
from diffender.attacks.expectation import Course, Expectation, Task, judge, judgements, kept_back, rank
from diffender.attacks.patch import apply_patch, margin, masks_for, patch_side, random_mask, relocated, to_8bit
from diffender.classifiers.dataset import Batch
from diffender.noise import generator
from diffender.pipeline import Undefended
from diffender.pretrain import beforehand
from diffender.pretrain.options import Beforehand
from diffender.utils.errors import InputError
from diffender.utils.files import save_atomic
from tests.conftest import SHARED

SIZE = 24
IDS = [f"image {i}" for i in range(8)]


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
        logits = x.flatten(1) @ self.w.to(x).mT
        return logits if noise is None else logits + self.sigma * noise


class Counting(Linear):
    """Counts the images it is shown."""

    def __init__(self, sigma: float):
        super().__init__(sigma=sigma)
        self.images = 0

    def forward(self, x, noise=None):
        self.images += len(x)
        return super().forward(x, noise)


@pytest.fixture
def batch():
    x = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return to_8bit(x), Linear()(x).argmax(dim=1)


def test_patch_geometry():
    assert [patch_side(224, a) for a in (0.02, 0.05, 0.10)] == [32, 50, 71]
    assert patch_side(299, 0.05) == 67
    assert patch_side(16, 0.0005) == 1
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
    widest = random_mask(224, 0.7853, "circle", g)  # its diameter, rounded twice, is 225
    assert widest.mean().item() == pytest.approx(0.7853, rel=0.02)


def test_apply_patch_is_exact():
    x, patch = torch.rand(2, 1, 3, SIZE, SIZE).unbind()
    mask = masks_for(Task(None, torch.zeros(1, 3, SIZE, SIZE), None, ["a"], 0), "patch", 0.1, "square")
    out = apply_patch(x, patch, mask)
    inside = mask.expand_as(x) == 1
    assert torch.equal(out[inside], patch[inside])
    assert torch.equal(out[~inside], x[~inside])


def test_margin_is_negative_exactly_where_fooled():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [-2.0, 4.0]


SMALL = {  # budgets that suffice on a linear victim of 24 pixels
    "advp": {"area": 0.2, "iters": 30, "eot": 1},
    "lavan": {"area": 0.2, "iters": 30, "eot": 1},
    "gdpa": {"area": 0.2, "iters": 30, "eot": 1, "lr": 0.3},
    "rhde": {"area": 0.3, "iters": 3, "queries": 150},
    "sparse-rs": {"area": 0.2, "queries": 400},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_attack_changes_only_the_patch_and_hurts(name, batch):
    x, y = batch
    victim = Linear()
    out = ATTACKS[name](**SMALL[name])(Task(victim, x, y, IDS, 0))
    assert torch.equal(out.image * (1 - out.mask), x * (1 - out.mask))
    assert 0 <= out.image.min() <= out.image.max() <= 1
    assert torch.equal(to_8bit(out.image), out.image)
    assert (margin(victim(out.image), y) < margin(victim(x), y)).all()
    assert (victim(out.image).argmax(dim=1) != y).float().mean() >= (0.5 if name == "rhde" else 0.9)
    again = ATTACKS[name](**SMALL[name])(Task(victim, out.image, y, IDS, 0), init=out.state)  # goes on from there
    assert margin(victim(again.image), y).mean() <= margin(victim(out.image), y).mean() + 0.05


@pytest.mark.parametrize("name", SMALL)
def test_a_start_that_does_not_fit_is_refused(name, batch):
    x, y = (t[:2] for t in batch)
    task = Task(Linear(), x, y, IDS[:2], 0)
    given = SMALL[name] | ({"location": "eot"} if name in ("advp", "lavan") else {})
    small = ATTACKS[name](**given | {"area": 0.1})
    start = small(task).state
    small(task, init=start)
    wrong = ATTACKS[name](**given)  # of a larger area; the state of RHDE does not depend on it
    with pytest.raises(InputError, match="init (is of shape|has a patch of another size)"):
        wrong(task, init=start[..., :4] if name == "rhde" else start)


@pytest.mark.parametrize("name", SMALL)
def test_queries_are_counted_to_the_last_one(name, batch):
    x, y = (t[:2] for t in batch)
    for sigma in (0.0, 0.3):
        victim = Counting(sigma)
        out = ATTACKS[name](**SMALL[name])(Task(victim, x, y, IDS[:2], 0))
        assert victim.images == out.queries.sum()
        if "queries" in SMALL[name]:
            assert (out.queries <= SMALL[name]["queries"]).all()


@pytest.mark.parametrize(("name", "given"), [("advp", {}), ("advp", {"location": "eot"}), ("gdpa", {})])
def test_queries_of_every_restart_are_counted(name, given, batch):
    attack = ATTACKS[name](area=0.2, iters=2, eot=2, restarts=3, **given)
    for sigma in (0.0, 0.3):
        victim = Counting(sigma)
        assert attack(Task(victim, batch[0][:2], batch[1][:2], IDS[:2], 0)).queries.sum() == victim.images


@pytest.mark.parametrize("name", [*SMALL, "noise", "grey", "crop"])
def test_results_depend_neither_on_batch_nor_order_and_leave_global_randomness_alone(name, batch):
    x, y = (t[:3] for t in batch)
    x = x.double()  # in which no sign step turns on the last bit
    attack = ATTACKS[name](**SMALL.get(name, {}))
    victim = Linear(sigma=0.3)
    before = torch.get_rng_state()
    together = attack(Task(victim, x, y, IDS[:3], 0))
    assert torch.equal(before, torch.get_rng_state())
    for i in (2, 0):
        alone = attack(Task(victim, x[i : i + 1], y[i : i + 1], IDS[i : i + 1], 0))
        assert torch.equal(alone.image[0], together.image[i])
    assert name == "grey" or not torch.equal(attack(Task(victim, x, y, IDS[:3], 1)).image, together.image)


def test_advp_reaches_the_optimum_of_a_linear_victim(batch):
    """Two classes: the margin is linear in the pixels, so each must end at 0 or 1 by the sign of its weight."""
    x, _ = batch
    victim = Linear(classes=2)
    y = victim(x).argmax(dim=1)
    out = ATTACKS["advp"](area=0.2, iters=60, eot=1)(Task(victim, x, y, IDS, 0))
    for b in range(len(x)):
        slope = (victim.w[y[b]] - victim.w[1 - y[b]]).view(3, SIZE, SIZE)
        best = apply_patch(x[b], (slope < 0).float(), out.mask[b])
        assert margin(victim(out.image[b : b + 1]), y[b : b + 1]).item() == pytest.approx(
            margin(victim(best[None]), y[b : b + 1]).item(), abs=1e-4
        )


class Scripted(torch.nn.Module):
    """In each step another slope for the upper and the lower half of an image of 2 x 2 pixels, all else constant;
    the patch that is judged last is the best."""

    def __init__(self, *slopes: tuple[float, float]):
        super().__init__()
        self.slopes, self.calls = iter(slopes), 0

    def sample_noise(self, image_ids, seed, purpose, k=0):
        return None

    def forward(self, x, noise):
        upper, lower = next(self.slopes, (0.0, 0.0))
        slope = upper * x[:, :, 0].sum(dim=(1, 2)) + lower * x[:, :, 1].sum(dim=(1, 2))
        self.calls += 1
        logit = slope - slope.detach() - self.calls
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)


@pytest.mark.parametrize("scale", [1, 10])
def test_four_steps_of_advp_by_hand(scale):
    """Gradients brought to norm 1; velocity 0.9 of the one before; steps of 0.05, 0.05, 0.025 and 0.0125 by its sign.

    upper   0.75   0.75 0.9 - 0.25 = 0.425   0.425 0.9 - 0.35 = 0.0325   0.03 - 0.5 < 0
    lower   0.25   0.25 0.9 - 0.75 < 0       < 0                         < 0
    """
    victim = Scripted((0.75 * scale, 0.25 * scale), (-0.25, -0.75), (-0.35, -0.65), (-5.0, -5.0))
    start = torch.full((1, 3, 2, 2), 0.5)
    task, init = Task(victim, start, torch.tensor([0]), ["a"], 0), torch.cat([start, torch.ones(1, 1, 2, 2)], dim=1)
    attack = ATTACKS["advp"](area=1.0, iters=4, eot=1)
    out = attack(task, init=init)
    upper, lower = 0.5 - 0.05 - 0.05 - 0.025 + 0.0125, 0.5 - 0.05 + 0.05 + 0.025 + 0.0125
    expected = to_8bit(torch.tensor([[upper] * 2, [lower] * 2]))
    assert torch.equal(out.image[0], expected.expand(3, 2, 2))
    assert victim.calls == 4 + 3, "and one judgement of the start, of the best on the way, of the end"
    with pytest.raises(InputError, match=r"init is of shape \(1, 3, 2, 2\); .* patch pixels, and the mask of"):
        attack(task, init=start)


class Steps(Linear):
    """Notes the noise under which its gradient is asked for."""

    def __init__(self):
        super().__init__(sigma=0.3)
        self.noises = []

    def forward(self, x, noise=None):
        if x.requires_grad:
            self.noises.append(noise)
        return super().forward(x, noise)


@pytest.mark.parametrize(
    ("name", "given", "draws"), [("advp", {}, 3 * 2), ("gdpa", {}, 3 * 2), ("advp", {"fixed_noise": True}, 2)]
)
def test_every_step_has_noise_of_its_own_unless_it_is_fixed(name, given, draws, batch):
    x, y = (t[:1] for t in batch)
    victim = Steps()
    ATTACKS[name](area=0.2, iters=3, eot=2, **given)(Task(victim, x, y, IDS[:1], 0))
    assert len(victim.noises) == 3 * 2
    assert len(torch.cat(victim.noises).unique(dim=0)) == draws


def test_with_fixed_noise_patches_are_chosen_on_it_too(batch):
    noises = []

    class Watched(Linear):
        def forward(self, x, noise=None):
            noises.append(noise)
            return super().forward(x, noise)

    attack = ATTACKS["advp"](area=0.2, iters=3, eot=2, fixed_noise=True)
    attack(Task(Watched(sigma=0.3), *(t[:1] for t in batch), IDS[:1], 0))
    assert len(torch.cat(noises).unique(dim=0)) == 2


def test_eot_on_a_deterministic_victim_changes_nothing(batch):
    x, y = batch
    attack = ATTACKS["advp"](area=0.1, iters=5, eot=1)
    one, four = (a(Task(Linear(), x.double(), y, IDS, 0)).image for a in (attack, replace(attack, eot=4)))
    assert torch.equal(one, four)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("advp", {"area": 3.0}, "area is 3.0; allowed is from 0.0005 to 1"),
        ("advp", {"iters": 0}, "iters is 0; allowed is at least 1"),
        ("advp", {"location": "center"}, "unknown location 'center'; choose one of fixed, corner, eot"),
        ("lavan", {"eot": 0}, "eot is 0"),
        ("rhde", {"opacity": (0.8, 3.0)}, "opacity is (0.8, 3.0); it is a range within 0 to 1"),
        ("gdpa", {"mode": "fast"}, "unknown mode 'fast'; choose one of direct, generator, amortised"),
        ("rhde", {"queries": 2.5}, "queries is 2.5; it must be of type int"),
        ("grey", {"area": "big"}, "area is 'big'; it must be of type float"),
    ],
)
def test_settings_out_of_range_are_refused(name, given, says):
    with pytest.raises(InputError, match=re.escape(says)):
        ATTACKS[name](**given)


def test_tasks_that_do_not_fit_are_refused(batch):
    x, y = batch
    attack = ATTACKS["advp"](iters=1, eot=1)
    for task, says in (
        (Task(Linear(), x, y[:1], IDS, 0), f"{len(x)} images, 1 labels and {len(IDS)} ids; each image has"),
        (Task(Linear(), x, y, ["a"], 0), f"{len(x)} images, {len(y)} labels and 1 ids"),
        (Task(Linear(), (255 * x).byte(), y, IDS, 0), "images of dtype torch.uint8; they are floating point: convert"),
        (Task(Linear(), x, y.tolist(), IDS, 0), "labels are a list; they are a tensor (B,) of whole numbers, int64"),
        (Task(Linear(), x, y.float(), IDS, 0), "labels are of torch.float32, (8,); they are a tensor (B,)"),
        (Task(Linear(), x, y[:, None], IDS, 0), "labels are of torch.int64, (8, 1); they are a tensor (B,)"),
        (Task(Linear(), x[:0], y[:0], [], 0), "images of shape (0, 3, 24, 24): there are none; give at least one"),
        (
            Task(Linear(), 255 * x, y, IDS, 0),
            "they lie in [0, 1]: divide by 255, leave normalisation to the classifier",
        ),
        (Task(Linear(), x[:, :1], y, IDS, 0), "images of shape (8, 1, 24, 24); they are (B, 3, H, W)"),
        (Task(Linear(), x[0], y[:3], IDS[:3], 0), "images of shape (3, 24, 24); they are (B, 3, H, W)"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            attack(task)


def test_targeted_aims_at_one_class_and_eot_moves_the_patch(batch):
    x, y = batch
    victim = Linear()
    targeted = ATTACKS["advp"](area=0.5, iters=60, eot=1, targeted=True)
    got = victim(targeted(Task(victim, x, y, IDS, 0)).image).argmax(dim=1)
    shift = [int(torch.randint(1, 5, (), generator=generator(0, i, "target"))) for i in IDS]
    assert (got == (y + torch.tensor(shift)) % 5).float().mean() >= 0.7
    moving = ATTACKS["advp"](area=0.1, iters=3, eot=2, location="eot")
    fixed = ATTACKS["advp"](area=0.1, iters=3, eot=2)
    assert not torch.equal(moving(Task(victim, x, y, IDS, 0)).mask, fixed(Task(victim, x, y, IDS, 0)).mask)


def test_a_patch_that_moves_is_one_patch(batch):
    """Every sample of a step shows the same pixels, elsewhere, and its gradient returns to these pixels."""
    x, y = (t[:2] for t in batch)
    victim, seen = Linear(), []

    def watched(images, noise=None):
        seen.append(images.detach())
        return victim(images)

    class Watched(Linear):
        forward = staticmethod(watched)

    attack = ATTACKS["advp"](area=0.2, iters=1, eot=3, location="eot")
    task = Task(Watched(), x, y, IDS[:2], 0, lambda z: margin(z, y))
    start, home = attack.first_pixels(task, SIZE, ""), attack.home(task, "")
    out = attack(task, init=torch.cat([start, home], dim=1))
    pixels = out.state[:, :3]
    masks = [attack.place(task, "attack 0", k, home) for k in range(3)]
    assert len({m.nonzero().sum().item() for m in masks}) > 1
    at_home = start[home.expand_as(start) == 1]
    for image, mask in zip(seen[:3], masks, strict=True):
        assert torch.equal(image[mask.expand_as(x) == 1], at_home)
    canvas = start.clone().requires_grad_()
    total = sum(margin(victim(apply_patch(x, relocated(canvas, home, m), m)), y).sum() for m in masks)
    slope = torch.autograd.grad(total, canvas)[0]
    stepped = to_8bit((start - attack.lr * slope.sign()).clamp(0, 1))
    place = attack.place(task, "choice", 2, home)  # of the step's end, which is judged last
    assert torch.equal(seen[-1][place.expand_as(x) == 1], stepped[home.expand_as(x) == 1])
    assert torch.equal(out.image[out.mask.expand_as(x) == 1], pixels[home.expand_as(x) == 1])


@pytest.mark.parametrize("name", ["advp", "lavan", "gdpa"])
def test_an_attack_goes_on_from_its_best_restart(name, batch):
    """A step of size 0 changes nothing: neither the pixels nor the place, which is another one in each restart."""
    x, y = batch
    lrs = {"lr": 0.0} | ({"lr_place": 0.0} if name == "gdpa" else {})
    attack = ATTACKS[name](area=0.1, iters=2, eot=1, restarts=3)
    out = attack(Task(Linear(), x, y, IDS, 0))
    first = ATTACKS[name](area=0.1, iters=2, eot=1)(Task(Linear(), x, y, IDS, 0))
    assert not torch.equal(out.mask, first.mask), "another restart is the best of some image"
    again = ATTACKS[name](area=0.1, iters=1, eot=1, **lrs)(Task(Linear(), x, y, IDS, 0), init=out.state)
    if name == "gdpa":  # the first step may move the patch to a better place
        assert (margin(Linear()(again.image), y) <= margin(Linear()(out.image), y) + 1e-5).all()
    else:
        assert torch.equal(again.image, out.image)
        assert torch.equal(again.mask, out.mask)


def test_restarts_begin_with_other_pixels(batch):
    x, y = batch
    task = Task(Linear(), x, y, IDS, 0, partial(margin, y=y))
    patterns, places = zip(*ATTACKS["gdpa"](area=0.1, restarts=3).starts(task, None), strict=True)
    assert len({pattern.sum().item() for pattern in patterns}) == 3
    assert not torch.equal(places[0], places[1])
    one, three = (
        ATTACKS["gdpa"](mode="generator", area=0.2, iters=1, eot=1, width=4, restarts=r)(task) for r in (1, 3)
    )
    assert (margin(Linear()(three.image), y) <= margin(Linear()(one.image), y) + 1e-6).all()
    assert not torch.equal(three.image, one.image)


def test_a_patch_that_may_lie_anywhere_is_judged_at_several_places(batch):
    """Also by a victim without noise: a lucky place must not choose it."""
    x, y = (t[:2] for t in batch)
    attack = ATTACKS["advp"](area=0.1, iters=1, eot=4, location="eot")
    victim = Counting(0.0)
    out = attack(Task(victim, x, y, IDS[:2], 0))
    assert out.queries.tolist() == [4 + 2 * 4] * 2, "a step, and both of its states"
    assert victim.images == out.queries.sum()
    task = Task(Linear(), x, y, IDS[:2], 0, partial(margin, y=y))
    shown = attack.shown(x, task, *out.state.split((3, 1), dim=1), "choice")
    values = torch.stack([margin(Linear()(shown(k)), y) for k in range(4)])
    assert len(values[:, 0].unique()) == 4
    assert torch.allclose(judge(task, shown, "choice", 4), rank(values, (values < 0).float()))


def test_whether_a_victim_is_random_is_asked_of_one_image(batch):
    asked = []
    for noise, passes, finals in ((None, 1, 0), (torch.zeros(1), 5, 6)):
        victim = SimpleNamespace(sample_noise=lambda ids, *_, noise=noise: asked.append(len(ids)) or noise)
        task = Task(victim, *batch, IDS, 0)
        assert (judgements(task, 5), kept_back(task, 2, 100)) == (passes, finals)
        assert kept_back(task, 2, 11) == 0, "more than half of the queries"
    assert set(asked) == {1}


def test_a_patch_that_moves_is_judged_where_no_restart_was_tried(batch):
    x, y = (t[:2] for t in batch)
    seen = []

    class Watched(Linear):
        def forward(self, images, noise=None):
            seen.extend((images.detach() != x).any(dim=1, keepdim=True).float().split(2))
            return super().forward(images, noise)

    attack = ATTACKS["advp"](area=0.2, iters=2, eot=2, restarts=3, location="eot")
    task = Task(Watched(), x, y, IDS[:2], 0)
    out = attack(task)
    assert torch.equal(out.mask, attack.place(task, "verdict", 0, attack.home(task, "")))
    assert len(seen) > 3 * 2 * 2
    assert not any(torch.equal(was[i], out.mask[i]) for was in seen for i in range(2))


def test_a_patch_that_moves_is_chosen_and_restarted_at_places_of_their_own(batch, monkeypatch):
    asked, masks = set(), advp.masks_for
    monkeypatch.setattr(advp, "masks_for", lambda task, key, *given: asked.add(key) or masks(task, key, *given))
    ATTACKS["advp"](area=0.2, iters=1, eot=1, restarts=2, location="eot")(Task(Linear(), *batch, IDS, 0))
    assert asked >= {"attack 0/0", "attack 0 1/0", "choice/0", "restarts/0", "verdict/0"}


def test_lavan_lowers_the_true_logit_against_the_target(batch):
    """Linear victim: z_y - z_t is linear in the pixels, so each ends at 0 or 1 by the sign of its weight."""
    x, y = batch
    victim = Linear()
    out = ATTACKS["lavan"](area=0.2, iters=60, eot=1)(Task(victim, x, y, IDS, 0))
    shift = torch.tensor([int(torch.randint(1, 5, (), generator=generator(0, i, "target"))) for i in IDS])
    target = (y + shift) % 5
    slope = (victim.w[y] - victim.w[target]).view(len(x), 3, SIZE, SIZE)
    best = victim(apply_patch(x, (slope < 0).float(), out.mask))
    rows = torch.arange(len(x))
    for got, want in zip(victim(out.image), best, strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    assert (best[rows, y] < best[rows, target]).float().mean() > 0.7
    runner_up = ATTACKS["lavan"](area=0.2, iters=9, eot=1, targeted=False)(Task(victim, x, y, IDS, 0))
    margins = ATTACKS["advp"](area=0.2, iters=9, eot=1)(Task(victim, x, y, IDS, 0))
    assert torch.equal(runner_up.image, margins.image)
    assert (ATTACKS["lavan"]().area, ATTACKS["advp"]().area) == (0.02, 0.05)


def test_shapes_corners_and_restarts_are_those_asked_for(batch):
    task, plain = Task(Linear(), *batch, IDS, 0), ATTACKS["advp"](area=0.2)
    for given, mask in (({"shape": "circle"}, {"shape": "circle"}), ({"location": "corner"}, {"corner": True})):
        assert torch.equal(replace(plain, **given).home(task, ""), masks_for(task, "patch", 0.2, **mask))
    assert not torch.equal(plain.home(task, ""), plain.home(task, " 1"))
    assert not torch.equal(plain.first_pixels(task, SIZE, ""), plain.first_pixels(task, SIZE, " 1"))


def test_a_patch_of_few_values_has_no_others_and_hurts(batch):
    """And its steps are not lost in the rounding: going on from its state, it is the same attack."""
    task = Task(Linear(), *batch, IDS, 0)
    few, free = (ATTACKS["advp"](area=0.2, iters=20, eot=1, levels=n) for n in (2, 256))
    out = few(task)
    inside = out.mask.expand_as(out.image) == 1
    assert set(out.image[inside].tolist()) == {0.0, 1.0}
    assert torch.equal(out.image[~inside], to_8bit(task.x)[~inside])
    start = few.first_pixels(task, SIZE, "")
    begun = apply_patch(task.x, few.rounded(start) * out.mask, out.mask)
    assert (margin(task.victim(out.image), task.y) < margin(task.victim(begun), task.y)).all()
    again = few(task, init=out.state)
    assert (margin(task.victim(again.image), task.y) <= margin(task.victim(out.image), task.y)).all()
    assert torch.equal(free.rounded(start), to_8bit(start))
    three = replace(few, levels=3).rounded(start)
    assert len(three.unique()) == 3 and torch.equal(three, to_8bit(three)), "a file holds them as they were judged"


def test_every_step_shows_the_few_values(batch):
    shown = []

    class Watched(Linear):
        def forward(self, x, noise=None):
            shown.append(x.detach())
            return super().forward(x)

    out = ATTACKS["advp"](area=0.2, iters=3, eot=1, levels=2)(Task(Watched(), *batch, IDS, 0))
    inside = out.mask.expand_as(out.image) == 1
    assert all(set(x[inside].tolist()) == {0.0, 1.0} for x in shown)


def test_what_is_saved_was_judged(batch, monkeypatch):
    """With 64 values, rounding to 8 bits first would often end at another value than rounding once."""
    shown = []
    monkeypatch.setattr(advp, "judge", lambda task, image, *_: shown.append(image) or torch.arange(2.0))
    task = Task(Linear(), batch[0][:2], batch[1][:2], IDS[:2], 0)
    out = ATTACKS["advp"](area=0.2, iters=3, eot=1, levels=64)(task)
    inside = out.mask.expand_as(out.image) == 1
    assert any(torch.equal(out.image[inside], image[inside]) for image in shown)


def test_a_course_remembers_the_best_state_of_each_image():
    course, none = Course(), torch.zeros(2)
    for state, score in ((1.0, [1.0, 5.0]), (2.0, [3.0, 2.0]), (3.0, [2.0, 4.0])):
        course.record(torch.full((2, 1), state), Expectation(none, none, none, torch.tensor(score)))
    assert course.best[0].flatten().tolist() == [2.0, 1.0]


def test_patches_are_judged_as_files_hold_them(batch):
    judged = []

    class Watched(Linear):
        def forward(self, x, noise=None):
            if not x.requires_grad:
                judged.append(x)
            return super().forward(x)

    ATTACKS["advp"](area=0.2, iters=2, eot=1)(Task(Watched(), *batch, IDS, 0))
    assert judged
    assert all(torch.equal(x, to_8bit(x)) for x in judged)


def test_the_step_size_falls():
    advp = ATTACKS["advp"]
    halved, linear = (advp(iters=5, lr=1.0, decay=decay) for decay in ("halved", "linear"))
    assert [halved.step_size(k) for k in range(5)] == [1, 1, 1, 0.5, 0.25]
    assert [linear.step_size(k) for k in range(5)] == pytest.approx([1, 0.775, 0.55, 0.325, 0.1])
    assert advp(iters=1, decay="linear").step_size(0) == advp().lr


def test_advp_breaks_the_real_classifier(classifier, photos):
    """A 5 % patch of 20 steps takes a real ImageNet network down."""
    x = photos[:1]
    y = classifier(x).argmax(dim=1)
    attack = ATTACKS["advp"](iters=20, eot=1)
    out = attack(Task(Undefended(classifier), x, y, ["p0"], 0))
    assert (classifier(out.image).argmax(dim=1) != y).all()
    assert out.mask.mean().item() == pytest.approx(0.05, rel=0.01)


def test_corners_keep_clear_of_the_object():
    g = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        mask = random_mask(64, 0.05, "square", g, corner=True)[0]
        rows, columns = (mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten())
        edges = [min(int(line[0]), 63 - int(line[-1])) for line in (rows, columns)]
        assert max(edges) <= 8
        seen.add((int(rows[0]) < 32, int(columns[0]) < 32))
    assert len(seen) == 4


def test_restarts_keep_the_best_attempt(batch):
    x, y = batch
    victim = Linear(sigma=0.2)
    one = ATTACKS["advp"](area=0.05, iters=8, eot=2)
    single, three = (a(Task(victim, x, y, IDS, 0)) for a in (one, replace(one, restarts=3)))
    assert margin(victim(three.image), y).mean() < margin(victim(single.image), y).mean()
    assert not torch.equal(three.mask, single.mask)  # other places
    assert (three.queries > 3 * 16).all()


# GDPA


@pytest.mark.parametrize(("size", "side"), [(24, 7), (24, 8), (224, 50)])
def test_gdpa_places_the_patch(size, side):
    pattern = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    limit = gdpa.bound(size, side)

    def at(x, y):
        theta = torch.tensor([[x, y]]).float()
        canvas, covered = gdpa.place(pattern, theta, size)
        return canvas, covered, gdpa.to_corner(theta, size, side), theta

    centre = (size - side) / 2
    canvas, covered, corner, _ = at(0, 0)
    weights = covered[0, 0].sum(dim=1)
    assert ((weights * torch.arange(size)).sum() / weights.sum()).item() == pytest.approx(
        centre + (side - 1) / 2, abs=1e-3
    )
    assert covered.sum().item() == pytest.approx(side**2, rel=1e-4)
    for x, y, expected in (
        (limit, limit, (0, 0)),
        (-limit, -limit, (size - side,) * 2),
        (limit, -limit, (size - side, 0)),
    ):
        canvas, covered, corner, _ = at(x, y)  # positive leads left and up
        assert corner.tolist() == [list(expected)]
        assert covered.sum().item() == pytest.approx(side**2, rel=1e-4)  # flush with the border, nothing lost
        pasted, mask = gdpa.paste(torch.zeros(1, 3, size, size), pattern, corner)
        assert torch.allclose(canvas, pasted, atol=1e-3)  # whole pixels: the pattern itself
        assert torch.allclose(covered, mask, atol=1e-3)
    corner = torch.tensor([[3, 5]])
    assert gdpa.to_corner(gdpa.to_theta(corner, size, side), size, side).tolist() == corner.tolist()


def test_gdpa_has_gradient_to_place_and_pattern():
    """In between whole pixels the place acts through interpolation: checked by finite differences."""
    g = torch.Generator().manual_seed(0)
    pattern, theta = (torch.rand(1, 3, 5, 5, generator=g).double(), torch.tensor([[0.11, -0.23]]).double())
    weights = torch.rand(1, 3, 12, 12, generator=g).double()
    inputs = (pattern.requires_grad_(), theta.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: (gdpa.place(p, t, 12)[0] * weights).sum(), inputs)


class Right(torch.nn.Module):
    """Its only logit counts brightness, by how far to the right it is."""

    def sample_noise(self, image_ids, seed, purpose, k=0):
        return None

    def forward(self, x, noise=None):
        return (x * torch.arange(x.shape[-1]) / x.shape[-1]).sum(dim=(1, 2, 3))[:, None]


def task_of(x, victim):
    """The first logit is the loss."""
    return Task(victim, x, torch.zeros(len(x)).long(), IDS[: len(x)], 0, lambda z: z[:, 0])


def test_gdpa_moves_a_patch_to_where_the_loss_is_lower():
    """By 8 pixels in the first third of the steps, then by 4, then by 2."""
    task, white = task_of(torch.zeros(1, 3, 64, 64), Right()), torch.ones(1, 3, 9, 9)
    theta = gdpa.to_theta(torch.tensor([[30, 30]]), 64, 9)
    moved = [ATTACKS["gdpa"](iters=30).moved(task, white, theta, step, "") for step in (0, 10, 20)]
    assert gdpa.to_corner(torch.cat(moved), 64, 9).tolist() == [[30, 30 - by] for by in (8, 4, 2)]


def test_gdpa_stays_between_pixels_where_no_move_is_better_and_starts_where_pixels_can_move():
    """The loss is the same everywhere of a patch that is black as its image."""
    task, theta = task_of(torch.zeros(1, 3, 64, 64), Right()), torch.tensor([[0.123, -0.234]])
    assert torch.equal(ATTACKS["gdpa"](iters=30).moved(task, torch.zeros(1, 3, 9, 9), theta, 0, ""), theta)
    pattern, there = gdpa.Free(torch.tensor([0.0, 0.4, 1.0]), theta, gdpa.bound(64, 9))()
    assert pattern.tolist() == pytest.approx([0.05, 0.4, 0.95])
    assert torch.allclose(there, theta)


def test_gdpa_starts_at_the_places_where_the_better_of_two_patches_does_best():
    """In a dark image black takes away the more the farther right it is, and grey adds."""
    attack, task = ATTACKS["gdpa"](area=0.02, restarts=3), task_of(torch.full((1, 3, 64, 64), 0.25), Right())
    corners = attack.search(task, torch.zeros(1, 3, 9, 9))
    assert (len(corners), corners[0][0, 1], corners[-1][0, 1]) == (49, 64 - 9, 0)
    assert len({tuple(theta[0].tolist()) for _, theta in attack.starts(task, None)}) == 3
    many = replace(attack, restarts=50).starts(task, None)
    assert torch.equal(many[49][1], many[0][1]), "after all places come the best again"
    assert not torch.equal(many[49][0], many[0][0]), "with other pixels"


def test_gdpa_has_a_rate_for_the_pattern_and_one_for_the_place_and_the_memory_that_it_tells(batch, monkeypatch):
    made, adam, one = [], torch.optim.Adam, [t[:1] for t in batch]
    monkeypatch.setattr(torch.optim, "Adam", lambda *given, **named: made.append(adam(*given, **named)) or made[-1])
    for mode, rates in (("direct", [0.3, 0.01]), ("generator", [0.002])):
        attack = ATTACKS["gdpa"](mode=mode, area=0.1, iters=1, eot=1, lr=0.3, lr_place=0.01, lr_net=0.002, width=2)
        attack(Task(Linear(), *one, IDS[:1], 0))
        groups = made[-1].param_groups
        assert [group["lr"] for group in groups] == rates
        averaged = replace(attack, iters=9).averaged_steps
        assert {steps_averaged_by(group["betas"][0], 9) for group in groups} == {averaged}
    assert [group["params"][0].ndim for group in made[0].param_groups] == [4, 2], "the pattern, then the place"


def test_a_patch_of_gdpa_is_pasted_without_a_seam(monkeypatch):
    """Of the colour of its image, between pixels: nothing is seen of it."""
    monkeypatch.setattr(gdpa.GDPA, "moved", lambda self, task, pattern, theta, *_: theta)
    shown, plain = [], torch.full((1, 3, SIZE, SIZE), 0.8)

    class Watched(Linear):
        def forward(self, x, noise=None):
            if x.requires_grad:
                shown.append(x.detach())
            return super().forward(x)

    side = patch_side(SIZE, 0.1)
    start = gdpa.join(torch.full((1, 3, side, side), 0.8), torch.tensor([[0.13, -0.21]]))
    ATTACKS["gdpa"](area=0.1, iters=1, eot=1)(Task(Watched(), plain, torch.tensor([0]), ["a"], 0), init=start)
    assert torch.allclose(shown[0], plain, atol=1e-4)


@pytest.mark.parametrize(("size", "width", "lr"), [(24, 2, 5e-4), (24, 4, 2e-3), (16, 2, 5e-4)])
def test_a_step_of_the_generator_moves_the_patch_as_far_as_the_authors_does(size, width, lr):
    """Theirs, of Adam: 5e-4 for each of 802,816 features, which are about 2, over beta 3000."""
    x, g = torch.rand(1, 3, size, size), torch.Generator().manual_seed(0)
    net = gdpa.PatchGenerator(size, 5, g, width, blocks=1, lr=lr)
    net.calibrate(x)
    optimizer = torch.optim.Adam([net.to_location.weight], lr)
    raw = lambda: (net(x)[1] / gdpa.bound(size, 5)).atanh()  # noqa: E731
    before = raw()
    before.sum().backward()
    optimizer.step()
    assert (before - raw()).tolist()[0] == pytest.approx([5e-4 * 802816 * 2 / 3000] * 2, rel=0.01)


@pytest.mark.parametrize("mode", ["generator", "amortised"])
def test_gdpa_by_network(mode, batch, tmp_path):
    """The generator of each image hurts it; one trained beforehand hurts images it was not trained on."""
    x, y = batch
    victim = Linear()
    weights = None
    if mode == "amortised":
        data = Batch(IDS[:6], x[:6], y[:6], [""] * 6)
        opts = Beforehand(area=0.2, updates=30, batch_size=3, width=4)
        net = beforehand.train_generator(victim, data, opts)
        weights = str(tmp_path / "generator.safetensors")
        header = {"kind": "gdpa", "size": SIZE, "side": patch_side(SIZE, 0.2), "width": 4}
        save_atomic(net.state_dict(), tmp_path / "generator.safetensors", header)
    attack = ATTACKS["gdpa"](mode=mode, area=0.2, iters=25, eot=1, width=4, weights=weights)
    out = attack(Task(victim, x, y, IDS, 0))
    assert margin(victim(out.image), y).mean() < margin(victim(x), y).mean() - 0.3
    alone = attack(Task(victim, x[3:4], y[3:4], IDS[3:4], 0))  # a batch shares no weights
    assert (alone.image[0] - out.image[3]).abs().mean() < 2e-3
    if mode == "amortised":
        with pytest.raises(InputError, match="makes patches of side 11 for images of side 24"):
            ATTACKS["gdpa"](mode=mode, area=0.1, weights=weights)(Task(victim, x, y, IDS, 0))


def test_a_universal_patch_leads_to_its_target(batch):
    x, y = batch
    victim = Linear()
    target = int(victim(x).mean(dim=0).argmin())
    data = Batch(IDS, x, y, [""] * 8)
    patch = beforehand.universal_patch(victim, data, Beforehand(area=0.4, updates=60, batch_size=4, target=target))
    assert 0 <= patch.min() <= patch.max() <= 1
    before = victim(x).softmax(dim=1)[:, target]
    pasted = gdpa.paste(x, patch.expand(8, -1, -1, -1), torch.full((8, 2), 4))[0]
    assert victim(pasted).softmax(dim=1)[:, target].mean() > 1.5 * before.mean()


def test_every_epoch_has_an_order_of_its_own(batch):
    rows = list(beforehand.batches(Batch(IDS, *batch, []), 8, 0, 3))
    assert all(sorted(order) == list(range(8)) for order in rows)
    assert rows[0] != rows[1] != rows[2]


class Scaled(torch.nn.Module):
    """Its only logit is the sum of the pixels times its noise: the gradient is that noise."""

    def sample_noise(self, image_ids, seed, purpose, k=0):
        return torch.stack([torch.randn(1, generator=generator(seed, i, purpose, k)) for i in image_ids])

    def forward(self, x, noise):
        return noise * x.sum(dim=(1, 2, 3))[:, None]


def test_a_step_beforehand_follows_the_mean_over_fresh_noise():
    w = torch.zeros(1, 3, 2, 2, requires_grad=True)
    task = task_of(w.detach(), Scaled())
    loss = beforehand.descend(task, w + 1, torch.ones(1, 1, 2, 2), 5, torch.optim.SGD([w], 1.0), 4)
    mean = torch.cat([task.noise("attack 5", k) for k in range(4)]).mean().item()
    assert torch.allclose(w, torch.tensor(-mean))
    assert loss == pytest.approx(12 * mean)


# RHDE and its stickers


def test_stickers_stay_in_their_disc_at_any_angle():
    for name in stickers.NAMES:
        decal = stickers.draw(name)
        assert decal.shape == (4, 256, 256)
        assert (decal[:3] <= decal[3:] + 1e-6).all()  # premultiplied
        r = (decal[3].nonzero().float() - 127.5).norm(dim=1).max()
        assert r < 127.5, name
        area = decal[3].mean()
        turned = stickers.render(name, torch.tensor([0.0, 37.0, 180.0]), 64)
        assert torch.allclose(turned[:, 3].mean(dim=(1, 2)), area, atol=5e-3)  # nothing is cut off
        side = stickers.side_for(name, 224, 0.1)
        assert stickers.render(name, torch.zeros(1), side)[0, 3].sum().item() / 224**2 == pytest.approx(0.1, rel=0.03)


def test_no_window_for_a_square_of_their_area_hides_a_sticker():
    """Their longer sides, where a tenth or more is opaque, as docs/hardened.md has them."""
    sides = []
    for name in stickers.NAMES:
        visible = stickers.render(name, torch.arange(0, 360, 15.0), stickers.side_for(name, 224, 0.05))[:, 3] > 0.1
        rows, columns = (visible.any(dim=d).float() for d in (2, 1))
        spans = [(v * torch.arange(1, v.shape[1] + 1)).amax(1) - v.argmax(1) for v in (rows, columns)]
        sides += torch.maximum(*spans).tolist()
    assert (min(sides), max(sides)) == (56, 75)
    assert min(sides) > math.isqrt(round(0.05 * 224**2))


def test_stickers_turn_counter_clockwise():
    still, turned = stickers.render("cat", torch.tensor([0.0, 90.0]), 64)
    assert torch.allclose(turned, still.rot90(1, dims=(1, 2)), atol=0.02)


def search_on(x, y, sigma=0.0, **given):
    one = Task(Linear(sigma=sigma), x[:1], y[:1], IDS[:1], 0, lambda z: margin(z, y[:1]))
    return rhde.Search(ATTACKS["rhde"](area=0.2, **given), one)


def test_a_sticker_is_laid_over_the_image_as_its_genes_say(batch):
    """At the lower left, turned by a quarter, of the middle opacity."""
    search = search_on(*batch, opacity=(0.5, 1.0))
    image, mask = search.paste(torch.tensor([[1.0, 0.0, 0.25, 0.5]]), torch.tensor([1]))
    side = stickers.side_for(stickers.NAMES[1], SIZE, 0.2)
    decal = 0.75 * stickers.render(stickers.NAMES[1], torch.tensor([90.0]), side)[0]
    wanted = batch[0][:1].clone()
    corner = wanted[0, :, SIZE - side :, :side]
    corner.copy_(corner * (1 - decal[3]) + decal[:3])
    assert torch.allclose(image, to_8bit(wanted), atol=1e-6)
    assert torch.equal(mask[0, 0, SIZE - side :, :side], (decal[3] > 0).float())


def seen_as(p, y):
    """Probabilities (N, 5) of which p (N,) is that of class y, and the rest another's."""
    return p[:, None] * torch.eye(5)[y] + (1 - p)[:, None] * torch.eye(5)[(y + 1) % 5]


def crowd(genes, sticker, p, y):
    """Candidates (N, ...) of which p (N,) is the probability of class y, without a penalty."""
    return rhde.Crowd(genes, sticker, seen_as(p, y), torch.zeros(len(genes)))


def test_rhde_stops_when_every_fresh_draw_is_fooled_and_not_before(batch):
    """By the victim's own answer, whatever the search was told besides."""
    search = search_on(*batch, sigma=0.3)
    fooled = crowd(torch.rand(1, 4), torch.zeros(1).long(), torch.tensor([0.1]), search.y)

    class Told:
        right = ()

        def sample_noise(self, image_ids, seed, purpose, k=0):
            return purpose

        def __call__(self, x, noise):
            return seen_as(torch.tensor([0.9 if noise in self.right else 0.1]), search.y)

    search.task = search.task._replace(victim=Told())
    assert search.certain(fooled, 3) and search.seen == 10
    Told.right = ("certain 3 7",)
    assert not search.certain(fooled, 3) and search.seen == 18


class Shy(Linear):
    """Told where its sticker is, it asks for one at the top."""

    def with_penalty(self, x, noise, patch):
        rows = torch.linspace(0, 1, patch.shape[-1])[:, None]
        return self(x, noise), 10 * (patch * rows).sum(dim=(1, 2, 3)) / patch.sum(dim=(1, 2, 3))


@pytest.mark.parametrize("name", ["rhde", "sparse-rs"])
def test_searches_lower_the_victims_penalty_too(batch, name):
    x, y = (t[:2] for t in batch)
    heights = []
    for victim in (Linear(), Shy()):
        mask = ATTACKS[name](area=0.1, queries=300)(Task(victim, x, y, IDS[:2], 0)).mask
        heights.append([one[0].any(dim=1).nonzero()[0].item() for one in mask])
    assert max(heights[1]) <= 2 < max(heights[0])


def test_rhde_does_not_lock_where_it_hides(batch):
    """The locked gap is not bounded, and would outweigh whatever shows."""
    x, y = (t[:1] for t in batch)
    search = rhde.Search(ATTACKS["rhde"](area=0.2, queries=200), Task(Shy(), x, y, IDS[:1], 0))
    search.run(None, lambda done: None)
    assert search.locked is None


def test_rhde_searches_with_the_three_stickers_that_hurt_most_at_first(batch):
    search = search_on(*batch)
    search.ask = lambda genes, sticker, purpose: crowd(genes, sticker, (9 - sticker) / 10, search.y)
    assert set(search.first(None).sticker.tolist()) == {5, 6, 7}


def test_rhde_steps_to_the_best_neighbour_and_breeds_around_the_best(batch):
    """Here the true class is the surer the farther right the sticker is."""
    search, asked = search_on(*batch, population=4, elite=0.25), []

    def ask(genes, sticker, purpose):
        asked.append(genes)
        return crowd(genes, sticker, genes[:, 1], search.y)

    search.ask = ask
    genes = torch.tensor([[0.5, 0.5, 0.5, 0.5], *[[0.2, 0.9, 0.2, 0.2]] * 3])
    after = search.generation(ask(genes, torch.zeros(4).long(), ""), "attack 1")
    assert after.genes[0, 1] < 0.5
    children = asked[-1]
    assert (children == genes[0]).all(dim=1).any(), "of two parents alike"


def test_half_of_rhdes_children_take_the_sticker_of_the_best(batch):
    search, asked = search_on(*batch, population=40, elite=0.05), []
    search.ask = lambda genes, sticker, purpose: asked.append(sticker) or crowd(genes, sticker, genes[:, 1], search.y)
    search.generation(search.ask(torch.rand(40, 4), torch.tensor([7, 7] + [1] * 38), ""), "attack 1")
    assert 9 < (asked[-1] == 7).sum() < 29


def test_rhde_begins_with_a_latin_hypercube(batch):
    cells = (10 * search_on(*batch, sticker="cat", population=10).first(None).genes).long()
    assert torch.equal(cells.sort(dim=0).values, torch.arange(10)[:, None].expand(10, 4))


def test_where_rhde_has_been_it_goes_farther_out_or_changes_the_opacity(batch):
    search, gene = search_on(*batch), torch.tensor([0.5, 0.5, 0.3, 0.6])
    free = SIZE - stickers.side_for(stickers.NAMES[0], SIZE, 0.2)
    first, again = (search.neighbours(gene, 0) for _ in range(2))
    away = [((found[:, :2] * free).round() - round(0.5 * free)).abs().amax(dim=1).tolist() for found in (first, again)]
    assert away[0] == [1] * 8 and len(first[:, :2].unique(dim=0)) == 8
    assert (first[:, 2:] == gene[2:]).all()
    assert set(away[1]) == {1, 2}
    assert [opacity == gene[3] for opacity in again[:, 3]] == [distance == 2 for distance in away[1]]


def test_rhde_energy_locks_on_the_runner_up_once(batch):
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]])
    assert torch.allclose(rhde.energy(probs, 0, None), torch.tensor([0.2, -0.5]))
    assert torch.allclose(rhde.energy(probs, 0, 2), torch.tensor([20 * 0.3 / 0.5 + 0.3, 20 * 0.1 / 0.2 + 0.1 - 100]))
    near, misread = torch.tensor([[0.4, 0.38, 0.02, 0.2], [0.3, 0.05, 0.5, 0.15]])
    for locked in (None, 1, 2, 3):  # as whatever class
        told = rhde.energy(torch.stack([near, misread]), 0, locked)
        assert told[1] < 0 < told[0]
    x, y = batch
    victim = Linear(sigma=1.0)  # whose runner-up changes with the noise
    victim.w *= 2
    task = Task(victim, x[6:7], y[6:7], IDS[6:7], 0, lambda z: margin(z, y[6:7]))
    search = rhde.Search(ATTACKS["rhde"](area=0.15, iters=8, queries=400, population=10), task)
    locks = []
    search.certain = lambda crowd, step: locks.append(search.locked) or False
    energies = search.run(None, lambda i: None).trace[0].tolist()
    first = next(i for i, lock in enumerate(locks) if lock is not None)
    assert first > 0 and min(energies[:first]) > 0.15 >= energies[first]
    assert len(set(locks[first:])) == 1 and locks[first] != y[6]


class Chance(Linear):
    """Sees nothing but its noise."""

    def forward(self, x, noise=None):
        return noise


def test_rhde_judges_its_elite_again_in_every_generation(batch):
    """No candidate is better than another, so all stay, with the new noise's probabilities: no lucky draw lasts."""
    x, y = batch
    task = Task(Chance(sigma=1.0), x[:1], y[:1], IDS[:1], 0, lambda z: margin(z, y[:1]))
    search = rhde.Search(ATTACKS["rhde"](area=0.3, population=10, queries=1000), task)
    crowd = search.first(None)
    after = search.generation(crowd, "attack 1")
    assert torch.equal(after.genes[:2], crowd.genes[:2])
    assert torch.equal(after.probs[:2], task.noise("attack 1").softmax(dim=1).expand(2, -1))
    images, masks = search.paste(crowd.genes, crowd.sticker)
    assert torch.equal(images * (1 - masks), (x[:1] * (1 - masks)))
    assert (masks.sum(dim=(1, 2, 3)) > 0.2 * SIZE**2).all()


class Lucky(Linear):
    """Answers by chance, but always wrong to one image: an attack that starts from it should end there."""

    def __init__(self, image: torch.Tensor, y: int):
        super().__init__(sigma=1.0)
        self.image, self.y = image, y

    def forward(self, x, noise=None):
        asked = x.flatten(1).double().sum(dim=1)
        chance = torch.frac(1e4 * (asked + noise[:, 0].double()).sin()).abs()  # another number for each image and noise
        start = (x - self.image).abs().amax(dim=(1, 2, 3)) == 0
        gap = torch.where(start, -0.5, 10 * chance.detach().float() - 2.5)  # true class before the next
        slope = super().forward(x)[:, 0]  # of gradients, which lead nowhere
        gap = gap + slope - slope.detach()
        return gap[:, None] * torch.eye(5)[self.y]


@pytest.mark.parametrize("name", ["rhde", "sparse-rs", "advp", "gdpa"])
def test_no_lucky_draw_wins(name, batch):
    x, y = batch
    few = {"queries": 60} if ATTACKS[name].access == "queries" else {"iters": 12, "eot": 1}
    attack = ATTACKS[name](area=0.3, **few)
    kept = []
    for b in range(8):
        start = attack(Task(Linear(), x[b : b + 1], y[b : b + 1], IDS[b : b + 1], 0))
        task = Task(Lucky(start.image, int(y[b])), x[b : b + 1], y[b : b + 1], IDS[b : b + 1], 0)
        made = attack(task, init=start.state)
        assert made.queries <= few.get("queries", made.queries)
        kept.append(torch.equal(made.image, start.image))
    assert sum(kept) >= 7


def test_of_patches_that_fool_alike_the_one_of_lower_loss_is_better():
    fooled = torch.ones(3, 4)
    values = torch.tensor([-16.8, -16.9, -21.4, -40.0]).expand(3, 4)
    assert rank(values, fooled).argsort().tolist() == [0, 1, 2, 3]
    assert rank(torch.full((1, 2), -1e6), torch.tensor([[0.0, 1.0]])).argmax() == 1, "successes come first"
    one_of_ten = torch.eye(10)[:, :2].flip(1) * torch.tensor([0.0, 1.0])
    assert rank(torch.tensor([-9.0, 9.0]).expand(10, 2), one_of_ten).argmax() == 1, "one of ten, too"


def test_proposals_of_sparse_rs_repaint_less_and_less_then_flip_a_channel_of_a_pixel():
    attack, g = ATTACKS["sparse-rs"](), torch.Generator().manual_seed(0)
    pattern, corner = torch.rand(3, 16, 16, generator=g).round(), torch.tensor([40, 40])
    early, stayed = attack.propose(pattern, corner, 96, 0.0, 0, g)
    rows, columns = (found.unique() for found in (early != pattern).any(dim=0).nonzero().T)
    box = early[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.shape[1:] == (10, 10), "0.4 of the patch"
    assert (box == box[:, :1, :1]).all(), "one colour"
    assert torch.equal(stayed, corner)
    late, _ = attack.propose(pattern, corner, 96, 0.9, 0, g)
    assert (late != pattern).sum() == 1
    for progress, reach in ((0.0, 72), (0.99, 1)):
        moved = [attack.propose(pattern, corner, 96, progress, 3, g)[1] - corner for _ in range(60)]
        assert reach // 3 < torch.stack(moved).abs().max() <= reach


def test_sparse_rs_repaints_half_as_much_after_each_of_its_halvings():
    attack, grey, corner = ATTACKS["sparse-rs"](), torch.full((3, 100, 100), 0.5), torch.tensor([40, 40])
    for k, at in enumerate((10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)):
        for query, halvings in ((at - 1, k), (at + 1, k + 1)):
            found, _ = attack.propose(grey, corner, 200, query / 10_000, 0, torch.Generator())
            side = max(1, round((0.4 / 2**halvings) ** 0.5 * 100))
            assert (found != grey).any(dim=0).sum() == side**2, query


@pytest.mark.parametrize("name", ["sparse-rs", "rhde"])
def test_curves_of_a_search_never_rise_and_tell_where_it_is_misread(name, batch):
    out = ATTACKS[name](area=0.3, queries=80)(Task(Linear(), *batch, IDS, 0))
    assert torch.equal(out.fooled, (out.trace < 0).float())
    assert 0 < out.fooled.mean() < 1
    if name == "sparse-rs":  # whose loss is the margin throughout
        assert (out.trace.diff(dim=1) <= 0).all()
        assert torch.allclose(out.trace[:, -1], margin(Linear()(out.image), batch[1]), atol=1e-5)


def test_sparse_rs_compares_on_fresh_noise_that_both_share(batch):
    noises = []

    class Watched(Linear):
        def forward(self, x, noise=None):
            noises.append(noise)
            return super().forward(x, noise)

    ATTACKS["sparse-rs"](area=0.2, queries=12)(Task(Watched(sigma=0.3), *(t[:1] for t in batch), IDS[:1], 0))
    assert len(noises) == 12
    assert all(torch.equal(*pair) for pair in zip(noises[::2], noises[1::2], strict=True))
    assert len(torch.cat(noises).unique(dim=0)) == 6


# Ready-made patches and controls


def test_ready_patches_come_from_a_file_and_avoid_the_true_class(batch, tmp_path):
    x, y = batch
    path = tmp_path / "patches.safetensors"
    patches = torch.stack([torch.full((3, 5, 5), v) for v in (0.2, 0.8)])
    save_atomic({"patches": patches, "targets": torch.tensor([int(y[0]), 77])}, path, {})
    out = ATTACKS["ready"](area=(5 / SIZE) ** 2, file=str(path))(Task(Linear(), x[:1], y[:1], IDS[:1], 0))
    assert torch.allclose(out.image[out.mask.expand_as(x[:1]) == 1], torch.tensor(0.8))
    with pytest.raises(InputError, match="give --patch-file"):
        ATTACKS["ready"]()


def test_ready_patches_are_drawn_at_random(tmp_path):
    patches = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 4, 4).contiguous()
    save_atomic({"patches": patches, "targets": torch.arange(5)}, tmp_path / "p.safetensors", {})
    attack = ATTACKS["ready"](file=str(tmp_path / "p.safetensors"))
    drawn = [attack.content(None, 9, 4, torch.Generator().manual_seed(i))[0, 0, 0].item() for i in range(20)]
    assert len(set(drawn)) > 2


def test_a_crop_is_another_piece_of_the_image_upside_down():
    x = torch.rand(3, 8, 8)
    pieces = x.unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 3, 3).flip(2)
    found = set()
    for seed in range(9):
        crop = ATTACKS["crop"]().content(x, 0, 3, torch.Generator().manual_seed(seed))
        found.add(int((pieces == crop).flatten(1).all(dim=1).nonzero()))
    assert len(found) > 3


def test_imagenet_patch_transfers_to_the_real_classifier(classifier, photos):
    path = SHARED / "data" / "patches" / "imagenet_patch.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} here: ImageNet-Patch is not part of the repository")
    y = classifier(photos).argmax(dim=1)
    out = ATTACKS["ready"](file=str(path))(Task(None, photos, y, [f"p{i}" for i in range(4)], 0))
    before, after = (margin(classifier(x), y).mean() for x in (photos, out.image))
    assert out.mask.mean().item() == pytest.approx(0.05, rel=0.01)
    assert after < before


def test_victims_that_are_none_are_named(batch):
    x, y = batch
    with pytest.raises(InputError, match="the victim is a Identity; give Defended"):
        ATTACKS["advp"](iters=1)(Task(torch.nn.Identity(), x, y, IDS, 0))
    with torch.no_grad(), pytest.raises(InputError, match="the victim's logits have no gradient"):
        ATTACKS["advp"](iters=1)(Task(Linear(), x, y, IDS, 0))
    cut = Linear()
    cut.forward = lambda x, noise: Linear.forward(cut, x.detach(), noise) + torch.zeros(1, requires_grad=True)
    with pytest.raises(InputError, match="the victim's logits have no gradient"):  # weights have one, images do not
        ATTACKS["advp"](iters=1)(Task(cut, x, y, IDS, 0))
