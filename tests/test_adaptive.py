"""Adaptive attacks: gradient modes, expectation over noise, verdicts, the trust report, other people's attacks."""

import json
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffender.attacks import ATTACKS, AdvP
from diffender.attacks.expectation import Attacked, Task, samples
from diffender.attacks.patch import apply_patch, margin, masks_for, to_8bit
from diffender.classifiers.dataset import Batch
from diffender.config import PAPER, Backward, DIFFenderConfig
from diffender.defenses import Purifier, build
from diffender.evaluation import forecast as forecasts
from diffender.evaluation import memory, run, trust
from diffender.evaluation import plan as plans
from diffender.evaluation.forecast import COST, costs, duration
from diffender.evaluation.memory import WORKING, Footprint, fit_micro_batch, footprint, kept_bytes, peak_bytes
from diffender.evaluation.metrics import mcnemar
from diffender.evaluation.options import Options, adaptive_kinds, attacks, kinds, with_preset
from diffender.evaluation.plan import describe
from diffender.evaluation.run import work
from diffender.evaluation.verdicts import (
    Judge,
    Plan,
    craft,
    evaluate_batch,
    load_attacked,
    purifications,
    summarize,
    thin,
    through_files,
    verdict,
)
from diffender.losses import EVASIONS, decoy, evasion, evasion_max
from diffender.noise import generator
from diffender.ops import binarize, gaussian_blur, straight_through
from diffender.pipeline import Defended, DIFFender, Localized, Undefended, WithFreshNoise
from diffender.report.page import headline
from diffender.report.tables import accuracies, markdown, trust_table
from diffender.stable_diffusion.vae import Posterior
from diffender.tuning import Shots, mixed
from diffender.utils.errors import InputError
from diffender.utils.images import load_png
from diffender.utils.options import change
from diffender.utils.provenance import CHANGED
from diffender.weights.prompts import contexts_for


@pytest.fixture(scope="module")
def attacked(classifier, photos, pasted):
    """The label of a photograph, and the photograph with a square that the localiser finds, as an attack gives it."""
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 60:116, 100:156] = 1
    nothing = torch.zeros(1)
    return classifier(photos[:1]).argmax(dim=1), Attacked(
        pasted, mask, torch.cat([pasted, mask], dim=1), nothing, nothing, nothing
    )


# A detector of bright pixels before a linear classifier: what each gradient mode can see, in closed form.


class Toy(torch.nn.Module):
    """Score by blurred brightness, z-threshold, fill with grey; noise moves the scores a little."""

    def __init__(self, mode, sigma=0.01):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.register_buffer("w", torch.randn(4, 3 * 32 * 32, generator=g) / 32)
        self.mode, self.sigma = mode, sigma

    def sample_noise(self, image_ids, seed, purpose, k=0):
        return torch.stack([torch.randn(1, 32, 32, generator=generator(seed, i, purpose, k)) for i in image_ids])

    def z_score(self, x, noise):
        score = gaussian_blur((x - 0.5).square().mean(dim=1, keepdim=True), 5, 1.5) + self.sigma * noise
        std, mean = torch.std_mean(score, dim=(2, 3), keepdim=True)
        return (score - mean) / std

    def purify(self, x, noise):
        mask = F.max_pool2d(binarize(self.z_score(x, noise), 2.0), 3, 1, 1)
        return x * (1 - mask) + 0.5 * mask

    def forward(self, x, noise):
        if self.mode == "bpda":
            return straight_through(self.purify(x.detach(), noise), x).flatten(1) @ self.w.mT
        return self.purify(x, noise).flatten(1) @ self.w.mT


def test_gradient_through_the_mask_beats_bpda_which_is_no_better_than_transfer():
    """Where the mask covers the patch, only its own gradient tells how to get out of it."""
    ids = [f"p{i}" for i in range(24)]
    smooth = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = to_8bit(F.interpolate(smooth, 32, mode="bilinear"))

    class Bare(Toy):
        def forward(self, x, noise):
            return x.flatten(1) @ self.w.mT

    bare = Bare("none")
    y = bare(x, None).argmax(dim=1)
    attack = ATTACKS["advp"](area=0.05, iters=60, eot=2)
    base = attack(Task(bare, x, y, ids, 0))
    assert (bare(base.image, None).argmax(dim=1) != y).float().mean() >= 0.9

    def accuracy(image):
        toy = Toy("ste")
        right = [toy(image, toy.sample_noise(ids, 0, "judge", k)).argmax(dim=1).eq(y).float().mean() for k in range(5)]
        return torch.stack(right).mean().item()

    transfer = accuracy(base.image)
    bpda, ste = (accuracy(attack(Task(Toy(mode), x, y, ids, 0), init=base.state).image) for mode in ("bpda", "ste"))
    assert min(bpda, transfer) > 0.8
    assert ste < 0.4
    assert abs(bpda - transfer) < 0.1


# Expectation over noise


def test_eot_is_the_mean_of_its_samples_side_by_side_or_not():
    """In float64, where rounding does not hide a mistake."""
    toy, ids = Toy("ste").double(), ["a", "b"]
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor([0, 3])
    task = Task(toy, x, y, ids, 0, lambda z: margin(z, y))
    mask = torch.ones(2, 1, 32, 32).double()
    one = [next(samples(task, lambda _, k=k: (x, mask, task.noise("eot", k)), 1)) for k in range(5)]
    for batch in (1, 2, 5, 9):
        found = list(samples(task, lambda k: (x, mask, task.noise("eot", k)), 5, batch))
        assert len(found) == 5
        for a, b in zip(found, one, strict=True):
            assert all(torch.allclose(s, t, atol=1e-12) for s, t in zip(a, b, strict=True))
    leaf = x.clone().requires_grad_()
    total = sum(margin(toy(leaf, task.noise("eot", k)), y).sum() for k in range(5)) / 5
    mean = sum(s.gradient for s in one) / 5
    assert torch.allclose(torch.autograd.grad(total, leaf)[0], mean, atol=1e-6)
    assert not torch.allclose(one[0].gradient, one[1].gradient)  # the noise is used


def test_eot_batch_and_batch_size_change_no_attack():
    ids = ["a", "b", "c"]
    x = to_8bit(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))).double()
    toy, y = Toy("ste").double(), torch.tensor([0, 3, 1])
    for name in ("advp", "gdpa"):
        plain, batched = (ATTACKS[name](iters=6, eot=4, eot_batch=n)(Task(toy, x, y, ids, 0)) for n in (1, 3))
        alone = ATTACKS[name](iters=6, eot=4)(Task(toy, x[1:2], y[1:2], ids[1:2], 0))
        assert torch.equal(plain.image, batched.image)
        assert torch.equal(plain.image[1:2], alone.image)


# Gradient modes of the real defence


def test_modes_differ_in_gradient_alone(target, attacked):
    image, mask, *_ = attacked[1]
    noise = target.sample_noise(["a"], 0, "modes")
    inside = mask.expand_as(image) == 1
    values, gradients = {}, {}
    for mode in ("bpda", "bpda-mask", "surrogate", "full", "full+loc", "evade"):
        x = image.clone().requires_grad_()
        victim = Defended(target.defense, target.classifier, Backward(mode, surrogate_steps=1))
        logits, penalty = victim.with_penalty(x, noise, mask)
        values[mode] = logits.detach()
        weights = torch.linspace(-1, 1, logits.shape[1])
        (gradients[mode],) = torch.autograd.grad((logits * weights).sum() + penalty.sum(), x)
        assert gradients[mode].isfinite().all()
        assert (gradients[mode][inside] != 0).float().mean() > 0.99
        assert (penalty > 0).all() == (mode in ("full+loc", "evade"))
    assert torch.equal(values.pop("evade"), target.classifier(image)), "nothing is masked, it hopes"
    for mode, logits in values.items():
        assert torch.allclose(logits, values["full"], atol=1e-3), mode
    names = list(gradients)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.allclose(gradients[a], gradients[b], rtol=1e-3), (a, b)


class Sketch(DIFFender):
    """Masks what is bright; what it paints depends on the image, on the mask and on the number of steps."""

    def localize(self, x, noise, backward=None, posterior=None):
        bright = x.mean(dim=1, keepdim=True)
        return Localized(*[straight_through((bright > 0.5).float(), bright)] * 3)

    def restore(self, x, mask, noise, steps=None):
        return x.square() * (1 + mask) / (steps or 4)


def test_a_mode_without_pixels_to_pass_through_is_refused(target):
    raw = DIFFender(target.defense.model, target.defense.contexts, replace(target.defense.cfg, composite=False))
    for mode in ("bpda-mask", "evade"):
        with pytest.raises(InputError, match=f"{mode} needs pixels that composite=False repaints; choose bpda"):
            Defended(raw, target.classifier, Backward(mode))


def test_the_surrogate_paints_where_the_mask_has_no_gradient(target, attacked):
    """With all steps it is the full gradient, whatever passes the threshold."""
    image, *_ = attacked[1]
    noise, found = target.sample_noise(["a"], 0, "modes"), []
    for mode in ("surrogate", "full"):
        x = image.clone().requires_grad_()
        out = target.defense(x, noise, Backward(mode, ste="none", surrogate_steps=99))
        found.append(torch.autograd.grad(out.image.square().sum(), x)[0])
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


def test_a_mode_holds_constant_what_it_says(target):
    """Restoration in bpda-mask, all but its surrogate's steps in surrogate, nothing in full."""
    plain, x = target.defense, torch.rand(1, 3, 64, 64).requires_grad_()
    defense = Sketch(plain.model, plain.contexts, plain.cfg, (64, 64))
    mask, weights = defense.localize(x, None).mask, torch.randn(x.shape)
    whole, short = (defense.restore(x, mask, None, steps) for steps in (None, 1))
    painted = {"bpda-mask": whole.detach(), "surrogate": straight_through(whole, short), "full": whole}
    for mode, x_hat in painted.items():
        images = (defense(x, None, Backward(mode, surrogate_steps=1)).image, x * (1 - mask) + x_hat * mask)
        got, wanted = (torch.autograd.grad((i * weights).sum(), x, retain_graph=True)[0] for i in images)
        assert torch.allclose(got, wanted, atol=1e-5), mode


@pytest.mark.parametrize(("hide", "hidden"), [("mean", evasion), ("max", evasion_max)])
def test_the_penalty_is_hiding_and_decoy_by_their_weights(target, photos, hide, hidden):
    victim = Defended(
        target.defense.at((64, 64)), target.classifier, Backward("evade", "identity", 5.0, 2, 2.0, hide, 0.5)
    )
    x, patch = F.interpolate(photos[:1], (64, 64)), torch.zeros(1, 1, 64, 64)
    patch[..., :16, :16] = 1
    noise = victim.sample_noise(["a"], 0, "penalty")
    found = victim.defense.localize(x, noise)
    wanted = 2.0 * hidden(found.z_score, patch, target.defense.cfg.theta) + 0.5 * decoy(found.heatmap)
    assert torch.allclose(victim.with_penalty(x, noise, patch)[1], wanted)


def test_the_highest_latent_of_a_patch():
    """One conspicuous latent among a hundred: the soft maximum pushes it down alone, the mean hardly at all."""
    z = torch.zeros(2, 1, 28, 28)
    z[:, :, 5, 5], z[1, :, 20, 20] = 6.0, 9.0  # the second outside of the patch
    z.requires_grad_()
    patch = torch.zeros(2, 1, 224, 224)
    patch[..., :80, :80] = 1
    value = evasion_max(z, patch, 2.5)
    assert value.tolist() == pytest.approx([F.softplus(torch.tensor(3.5)).item()] * 2, abs=0.01)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert (gradient >= 0).all(), "lowering it lowers z"
    assert gradient[:, 0, 5, 5].tolist() == pytest.approx([0.97] * 2, abs=0.02)
    assert gradient[1, 0, 20, 20] == 0
    (mean,) = torch.autograd.grad(evasion(z, patch, 2.5).sum(), z)
    assert mean[0, 0, 5, 5] < 0.02
    assert (evasion_max(z - 1, patch, 2.5) < value).all()
    assert torch.autograd.gradcheck(lambda z: evasion_max(z, patch.double(), 2.5), z.detach().double().requires_grad_())


def test_a_latent_counts_by_how_much_of_it_the_patch_covers():
    z, patch = torch.full((1, 1, 4, 4), 3.0), torch.zeros(1, 1, 32, 32)
    patch[..., :4, :4] = 1
    quarter = torch.tensor(3.0 - 0.25 * torch.tensor(4.0).log().item() - 2.0)
    assert evasion_max(z, patch, 2.0).item() == pytest.approx(F.softplus(quarter).item())


def test_the_mean_counts_latents_alike_each_image_by_itself():
    """All of a latent and a quarter of the next; half of one."""
    z, patch = torch.tensor([3.0, 0.0]).expand(2, 1, 1, 2), torch.zeros(2, 1, 8, 16)
    patch[0, ..., :10], patch[1, ..., 12:] = (1, 1)
    high, low = (F.softplus(torch.tensor(excess)).item() for excess in (1.0, -2.0))
    assert evasion(z, patch, 2.0).tolist() == pytest.approx([(high + 0.25 * low) / 1.25, low])


def test_straight_through_estimators(target, attacked):
    """Forward strictly binary; backward identity, sigmoid, or nothing, which cuts the covered patch off."""
    z = torch.tensor([-1.0, 2.4, 2.6, 7.0], requires_grad=True)
    for ste, slope in (("identity", [1, 1, 1, 1]), ("sigmoid", None)):
        mask = binarize(z, 2.5, ste, 2.0)
        assert mask.tolist() == [0, 0, 1, 1]
        (g,) = torch.autograd.grad(mask.sum(), z)
        s = torch.sigmoid(2.0 * (z - 2.5))
        assert torch.allclose(g, torch.tensor(slope).float() if slope else 2.0 * s * (1 - s))
    assert not binarize(z, 2.5, "none").requires_grad
    assert torch.equal(binarize(z, 2.5, "soft", 2.0), torch.sigmoid(2.0 * (z - 2.5)))

    image, mask, *_ = attacked[1]
    noise = target.sample_noise(["a"], 0, "ste")
    norms = {}
    for ste in ("identity", "sigmoid", "none"):
        x = image.clone().requires_grad_()
        found = target.defense(x, noise, Backward(ste=ste, ste_k=1.0))
        assert set(found.mask.unique().tolist()) <= {0.0, 1.0}
        (g,) = torch.autograd.grad(found.image.square().sum(), x)
        covered = (found.mask * mask).expand_as(g) == 1
        assert covered.float().mean() > 0.01
        norms[ste] = g[covered].norm()
    assert norms["identity"] > 0
    assert norms["sigmoid"] > 0
    assert norms["none"] < 1e-3 * norms["identity"]
    with pytest.raises(InputError, match="unknown ste 'tanh'; choose one of identity"):
        Backward(ste="tanh")
    with pytest.raises(InputError, match="unknown mode 'exact'; choose one of bpda"):
        Backward("exact")


def test_localisation_losses_by_hand():
    z = torch.zeros(1, 1, 4, 4)
    z[..., :2, :2] = 3.0
    patch = torch.zeros(1, 1, 8, 8)
    patch[..., :4, :4] = 1
    assert evasion(z, patch, 2.0).item() == pytest.approx(F.softplus(torch.tensor(1.0)).item())
    assert evasion(z, 1 - patch, 2.0).item() == pytest.approx(F.softplus(torch.tensor(-2.0)).item())
    flat, peaked = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    peaked[..., 0, 0] = 20
    assert decoy(peaked) < decoy(flat) == 0
    assert torch.allclose(decoy(peaked), decoy(3 * peaked))  # no reward for scale
    assert torch.equal(decoy(torch.cat([flat, peaked])), torch.cat([decoy(flat), decoy(peaked)]))


def test_hiding_loss_hides(target, attacked):
    """With most of the weight on hiding, a few steps lower it."""
    y, out = attacked
    victim = Defended(target.defense, target.classifier, Backward("evade", evasion=100.0, hide="mean"))
    made = ATTACKS["advp"](iters=3, eot=1)(Task(victim, out.image, y, ["a"], 0), init=out.state)
    assert made.trace[0, -1] < made.trace[0, 0]


# Verdicts


def test_verdicts_by_hand():
    assert verdict([1, 1, 0, 1, 1, 0, 0, 0, 0, 1], 1) == (1.0, 0.5, 0.0, 0.0)  # of the first nine, four are right
    assert verdict([1] * 10, 1) == (1.0, 1.0, 1.0, 1.0)
    assert verdict([2, 1, 1], 1) == (0.0, pytest.approx(2 / 3), 0.0, 1.0)
    assert verdict([1, 2], 1) == (1.0, 0.5, 0.0, 1.0)  # one vote: an even number has no majority
    assert verdict([1, 2, 2, 1], 1).majority == 0  # three votes
    assert thin(list(range(100)))[:1] + thin(list(range(100)))[-1:] == [0, 99]


def test_mcnemar_known_values():
    assert mcnemar([(1, 0)] * 5 + [(1, 1)] * 20) == pytest.approx(2 / 32)
    assert mcnemar([(1, 0)] * 3 + [(0, 1)] * 3) == 1
    assert mcnemar([(1, 0)] * 10 + [(0, 1)] * 1) == pytest.approx(2 * 12 / 2**11)
    assert mcnemar([]) == 1


def fake_record(name, label, clean, **attacks):
    found = {
        variant.replace("__", "/").replace("_", "-"): {
            "undefended": 0,
            "defended": seen,
            "area": 0.05,
            "queries": 3,
            "loss": [],
            "seconds": 1.0,
            "masks": {"recall": 1.0, "precision": 1.0, "iou": 1.0, "auc": 1.0},
        }
        for variant, seen in attacks.items()
    }
    return {
        "id": name,
        "file": name,
        "label": label,
        "undefended": label,
        "defended": clean,
        "masked": 0.0,
        "attacks": found,
    }


def test_the_headline_takes_the_strongest_patch_picture_by_picture():
    records = [
        fake_record("a", 1, [1, 1, 1], advp__transfer=[1, 1, 1], advp__full=[0, 0, 1]),
        fake_record("b", 1, [1, 1, 0], advp__transfer=[0, 1, 0], advp__full=[1, 1, 1]),
        fake_record("c", 1, [1, 1, 1], advp__transfer=[1, 1, 1], advp__full=[1, 1, 0]),
    ]
    rows = {(r["attack"], r["gradient"]): r for r in summarize(records)["rows"]}
    assert rows["advp", "full"]["mcnemar"] == 1
    clean, strongest = rows["none", ""], rows["strongest on each image", ""]
    assert strongest["single"]["right"] == 1
    assert strongest["average"]["accuracy"] == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)
    for row in rows.values():
        assert row["worst"]["accuracy"] <= row["average"]["accuracy"]
        assert row["worst"]["accuracy"] <= row["single"]["accuracy"]
    assert clean["worst"]["right"] == 2  # clean images are submitted again, too
    assert clean["majority"]["right"] == 3


def test_undefended_are_right_under_every_patch_and_pairs_are_first_purifications():
    records = [fake_record(str(i), 1, [1, 1], advp__transfer=[1, 0], advp__full=[0, 1]) for i in range(6)]
    for i, record in enumerate(records):
        record["attacks"]["advp/transfer"]["undefended"], record["masked"] = 1, 0.1 * i
        record["attacks"]["advp/full"]["undefended"] = record["attacks"]["advp/full"]["masks"]["recall"] = i % 2
    results = summarize(records)
    rows = {r["gradient"] or r["attack"]: r for r in results["rows"]}
    told = [rows[name]["undefended"]["right"] for name in ("transfer", "full", "strongest on each image")]
    assert told == [6, 3, 3]
    assert rows["full"]["mcnemar"] == pytest.approx(2 / 64), "six of six get worse"
    assert results["masked_clean"] == pytest.approx(0.25)
    assert results["masks"]["advp/full"]["recall"] == 0.5


def test_what_is_certified_is_counted():
    """Of the strongest: where it holds for the places of all patches that were made."""
    proven = {"a": (True, True), "b": (True, False), "c": (False, False)}
    records = [fake_record(name, 1, [1], advp__transfer=[1], lavan__transfer=[1]) for name in proven]
    assert not any("certified" in row for row in summarize(records)["rows"])
    for record in records:
        for attack, holds in zip(record["attacks"].values(), proven[record["id"]], strict=True):
            attack["certified"] = holds
    results = summarize(records)
    rows = {r["attack"]: r["certified"]["right"] for r in results["rows"] if r["attack"] != "none"}
    assert rows == {
        "advp": 2,
        "lavan": 1,
        "strongest advp on each image": 2,
        "strongest lavan on each image": 1,
        "strongest on each image": 1,
    }
    named = results | {"defense": "d", "verdicts": 1, "votes": 1}
    head, cells = accuracies(named)
    assert head[-1] == "certified"
    assert [row[-1][:4] for row in cells] == ["", "66.7", "33.3", "66.7", "33.3", "33.3"]
    assert "Certified are 33.3 % (1/3; 6-79): no pixels" in headline(named)


class Noted(Purifier):
    """A noisy defence that notes which noise it is asked for."""

    def __init__(self):
        super().__init__(lambda x: (x + 0.1 * torch.randn(x.shape)).clamp(0, 1), random=True)
        self.purposes = set()

    def sample_noise(self, image_ids, seed, purpose, k=0):
        self.purposes.add(purpose)
        return super().sample_noise(image_ids, seed, purpose, k)


class Plain(torch.nn.Module):
    """A linear classifier of small images."""

    def __init__(self):
        super().__init__()
        self.w = torch.randn(4, 3 * 16 * 16, generator=torch.Generator().manual_seed(1))

    def forward(self, x, noise=None):
        return x.flatten(1) @ self.w.mT


@pytest.fixture
def small():
    """A task of two small images, whose victim is undefended."""
    x = to_8bit(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return Task(Undefended(Plain()), x, Plain()(x).argmax(dim=1), ["a", "b"], 0)


FEW = {"gradient": {"iters": 2, "eot": 2, "restarts": 2}, "queries": {"queries": 60}}  # budgets


def test_verdicts_fall_on_noise_that_no_attack_has_seen(small, tmp_path):
    attacks = [ATTACKS[name](area=0.3, **FEW[ATTACKS[name].access]) for name in ("advp", "gdpa", "rhde", "sparse-rs")]
    judging, attacked = Noted(), Noted()
    plans = [Plan(str(i), attack, {"k": (attack, Defended(attacked, Plain()))}) for i, attack in enumerate(attacks)]
    evaluate_batch(small, Judge(Defended(judging, Plain()), 2), plans, tmp_path)
    assert attacked.purposes > {"attack 0", "attack 1", "choice"}
    assert judging.purposes and not judging.purposes & attacked.purposes


def test_adaptive_attacks_start_from_the_transferred_patch(small):
    attack, starts = ATTACKS["advp"](area=0.3, iters=2, eot=1), []

    def adaptive(task, init, callback):
        starts.append(init)
        return attack(task)

    kinds = {"bpda": (adaptive, small.victim), "full": (adaptive, small.victim)}
    (_, base, _), *_ = craft(Plan("advp", attack, kinds), small, lambda *work: None, {})
    assert [torch.equal(init, base.state) for init in starts] == [True, True]


def test_a_record_is_what_its_files_give_under_the_noise_of_each_verdict(small, tmp_path):
    """Of a random defence that covers what is grey, and then all."""

    def purify(x):
        grey = ((x - 128 / 255).abs().amax(dim=1, keepdim=True) < 1e-3).float()
        return (x + torch.randn(x.shape)).clamp(0, 1), grey.amax(dim=(2, 3), keepdim=True).expand_as(grey)

    plain, plan = Plain(), Plan("grey", ATTACKS["grey"](area=0.25), {})
    plain.w /= 40  # unsure
    target = Defended(Purifier(purify, random=True), plain)
    unrounded = small._replace(x=small.x + 0.0019, victim=Undefended(plain))
    records = evaluate_batch(unrounded, Judge(target, 4), [plan], tmp_path)
    found = [record["attacks"]["grey/transfer"] for record in records]
    saved = torch.stack([load_png(tmp_path / "adv" / "grey" / "transfer" / f"{r['file']}.png") for r in records])
    for x, told in ((small.x, records), (saved, found)):
        noises = [target.sample_noise(["a", "b"], 0, "verdict", k) for k in range(4)]
        alone, *logits = (plain(x), *(target(x, noise) for noise in noises))
        assert [t["defended"] for t in told] == torch.stack(logits).argmax(dim=2).T.tolist()
        sure = torch.stack([alone, logits[0]]).softmax(dim=2).amax(dim=2).T
        assert torch.allclose(torch.tensor([t["confidence"] for t in told]), sure, atol=6e-5)
    assert len({str(t["defended"]) for t in [*records, *found]}) > 1, "not all alike"
    assert [(t["masks"]["recall"], t["masks"]["precision"]) for t in found] == [(1, 0.25)] * 2


def test_columns_of_a_record_hold_what_they_are_called(small, tmp_path, monkeypatch):
    """Shares of the image, curves, and seconds an image."""
    lines = torch.arange(16)[:, None].expand(2, 1, 16, 16)
    target = Defended(Purifier(lambda x: (x, (lines < 4).float())), Plain())
    given = (small.x, torch.tensor([3, 5]), torch.tensor([[2.0, 1]] * 2), torch.tensor([[0.0, 1]] * 2))
    made, clock = Attacked(small.x, (lines < 2).float(), *given), iter((10.0, 14.0))
    monkeypatch.setattr("diffender.evaluation.verdicts.time", SimpleNamespace(monotonic=lambda: next(clock)))
    records = evaluate_batch(small, Judge(target, 1), [Plan("p", lambda task, callback: made, {})], tmp_path)
    for record, queries in zip(records, (3, 5), strict=True):
        told = record["attacks"]["p/transfer"]
        assert (record["masked"], told["area"], told["queries"], told["seconds"]) == (0.25, 0.125, queries, 2)
        assert (told["loss"], told["fooled"]) == ([2, 1], [0, 1])


def test_patches_are_shared_by_attacks_of_the_same_settings_alone(small):
    bases, areas = {}, []
    for area in (0.1, 0.3, 0.1):
        ((_, made, _),) = craft(Plan("grey", ATTACKS["grey"](area=area), {}), small, lambda *work: None, bases)
        areas.append(made.mask.mean().item())
    assert areas[0] == areas[2] < areas[1]
    assert len(bases) == 2


def test_certificates_of_hardened_go_into_the_records(target, photos, tmp_path):
    x = photos[:1]
    y = target.classifier(x).argmax(dim=1)
    hardened = build("hardened:masks=2", target)
    plan = Plan("grey", ATTACKS["grey"](), {})
    (record,) = evaluate_batch(
        Task(Undefended(target.classifier), x, y, ["a"], 0), Judge(hardened, 1), [plan], tmp_path
    )
    found = record["attacks"]["grey/transfer"]
    mask = load_png(tmp_path / "adv" / "grey" / "transfer" / "a_mask.png")[:1]
    assert found["certified"] == hardened.defense.cleanser.certified(to_8bit(x)[0], int(y), mask)


def test_a_batch_judged_from_its_files(target, photos, tmp_path):
    """Records, files and verdicts belong together: the saved image under the recorded noise gives the record."""
    ids = ["n01/a"]
    x, classifier = photos[:1], target.classifier
    y = classifier(x).argmax(dim=1)
    plan = Plan("advp", ATTACKS["advp"](iters=5, eot=1), {"full": (ATTACKS["advp"](iters=1, eot=1), target)})
    heard = []
    records = evaluate_batch(
        Task(Undefended(classifier), x, y, ids, 0), Judge(target, 2), [plan], tmp_path, lambda *work: heard.append(work)
    )
    steps = [("advp/transfer", done) for done in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert heard == [("clean", 1), *steps, ("advp/transfer", 1), ("advp/full", 1.0), ("advp/full", 1)]
    for kind in ("transfer", "full"):
        files = [tmp_path / "adv" / "advp" / kind / f"{r['file']}.png" for r in records]
        image = torch.stack([load_png(f) for f in files])
        mask = torch.stack([load_png(f.with_name(f"{f.stem}_mask.png"))[:1] for f in files])
        assert torch.equal((image * (1 - mask)), to_8bit(x) * (1 - mask))  # outside the patch: the clean image, exactly
        _, seen, _ = purifications(Judge(target, 2), image, ids, 0)
        assert seen == [r["attacks"][f"advp/{kind}"]["defended"] for r in records]
    assert json.loads(json.dumps(records)) == records
    results = summarize(records) | {
        "verdicts": 2,
        "votes": 1,
        "command": "c",
        "setting": "s",
        "seed": 0,
        "seconds": 1.0,
        "unet_evaluations": 1,
        "machine": "m",
        "date": "d",
        "commits": ["0123456789abcdef", "fedcba9876543210"],
        "defense": "DIFFender",
    }
    assert "| advp | full |" in markdown(results) and markdown(results).endswith(" m, d, commit 0123456 and fedcba9.\n")


def test_names_that_would_share_files_are_refused(small):
    for ids in (["a/b", "a__b"], ["a", "a_mask"]):
        empty = SimpleNamespace(opts=Options())
        with pytest.raises(InputError, match="differ in / and __ alone, or in _mask, so they would share files"):
            work([empty], Batch(ids, small.x, small.y, []))


def bench_of(target, x, y, **changed):
    """Two images as they are, for the checks of the trust report, without a run."""
    plan = Plan("advp", ATTACKS["grey"](), {"full": (ATTACKS["advp"](iters=10, eot=1), target)})
    usual = {"records": [], "results": {}, "image": x, "mask": x[:, :1].round(), "state": None, "kind": "full"}
    return trust.Bench(**{"task": Task(target, x, y, ["a", "b"], 0), "plan": plan} | usual | changed)


@pytest.fixture
def bench(target, photos):
    return bench_of(target, photos[:2], target.classifier(photos[:2]).argmax(dim=1))


def test_the_real_defence_is_random_under_a_patch(target, attacked):
    y, out = attacked
    (check,) = trust.noise_is_used(bench_of(target, out.image, y, task=Task(target, out.image, y, ["a"], 0)))
    assert check.passed


def test_a_check_can_fail(target, photos, bench):
    """A deterministic defence, an attack that does nothing, a row that gets weaker: each is red."""
    frozen = Defended(target.defense, target.classifier)
    frozen.sample_noise = lambda ids, seed, purpose, k=0: target.sample_noise(ids, 0, "always", 0)
    record = {"accuracy": 1.0, "low": 0.5, "high": 1.0, "n": 2, "right": 2}
    base = {"attack": "advp", "gradient": "transfer", "undefended": record, "average": record | {"accuracy": 0.5}}
    survive = [fake_record(str(i), 1, [1], advp__transfer=[0], advp__bpda=[0], advp__full=[1]) for i in range(6)]
    red = bench._replace(task=bench.task._replace(victim=frozen), results={"rows": [base]}, records=survive)
    (check,) = trust.noise_is_used(red)
    assert check.passed is False
    assert [c.passed for c in trust.undefended_accuracy(red, [Plan("advp", AdvP(), {})])] == [False]
    assert [c.passed for c in trust.undefended_accuracy(red, [Plan("advp", AdvP(area=0.01), {})])] == [None]
    assert [(c.name, c.passed) for c in trust.ladder(red)] == [
        ("advp, bpda against transfer", True), ("advp, full against bpda", False)
    ]  # fmt: skip
    assert [c.passed for c in trust.ladder(red._replace(records=survive[:5]))] == [None, None], "5 of 5 may be chance"
    assert "🔴" in trust_table([check._asdict()])


def controls(bench):
    survive = [fake_record(i, 1, [1], advp__transfer=[1, 0]) for i in ("a", "b")]
    return trust.controls(bench._replace(records=survive))


def masks(bench):
    """Without a mask half of the images are right."""
    y = bench.task.y.clone()
    y[0] += 1
    return trust.masks(bench._replace(task=bench.task._replace(y=y)))


def black_box(bench):
    return trust.black_box(bench, queries=2)


ACCURACIES = [  # in the order in which a check asks for them: red, green
    (controls, [0.6, 0.3, 0.6], [0.6, 0.4, 0.6]),
    (masks, [0.5, 0.9], [0.6, 0.1]),
    (partial(trust.sweep, "eot"), [0.3, 0.2, 0.5], [0.3, 0.9, 0.3]),
    (partial(trust.sweep, "iters"), [0.9, 0.5, 0.3], [0.9, 0.3, 0.25]),
    (trust.size_sweep, [0.9] * 6 + [0.2], [0.9] * 6 + [0.1]),
    (trust.size_sweep, [0.0] * 6 + [0.1], [0.1] * 7),
    (partial(trust.sweep, "restarts"), [0.2, 0.4], [0.2, 0.25]),
    (trust.ste_sweep, [0.3, 0.9, 0.9, 0.4], [0.4, 0.9, 0.9, 0.4]),
    (trust.transfer_matrix, [0.5, 0.9, 0.3], [0.5, 0.9, 0.45]),
    (black_box, [0.3, 0.4], [0.4, 0.4]),
]


@pytest.mark.parametrize(("check", "red", "green"), ACCURACIES)
def test_checks_of_accuracies_can_fail(bench, monkeypatch, check, red, green):
    monkeypatch.setattr(trust.Bench, "attack", lambda self, victim=None, init=None, **changed: bench)
    for shares, passed in ((red, False), (green, True)):
        asked = iter(shares)
        monkeypatch.setattr(trust.Bench, "accuracy", lambda self, x, mask=None, asked=asked: next(asked))
        assert next(iter(check(bench))).passed is passed
        assert not list(asked), "every one is asked for"


def test_each_check_changes_what_it_is_about(bench, monkeypatch):
    """Settings, estimators, prompts, starts: each patch is made with these, and what is judged is what is told."""
    asked, judged = [], []

    def attack(self, victim=None, init=None, **changed):
        asked.append((victim, init, changed))
        return bench

    monkeypatch.setattr(trust.Bench, "attack", attack)
    monkeypatch.setattr(trust.Bench, "attack_alone", lambda self, area: SimpleNamespace(state=area))
    monkeypatch.setattr(trust.Bench, "accuracy", lambda self, x, mask=None: judged.append((x, mask)) or 0.5)
    list(trust.sweep("iters", bench))
    list(trust.size_sweep(bench))
    list(trust.ste_sweep(bench))
    list(trust.transfer_matrix(bench))
    list(trust.masks(bench := bench._replace(image=bench.image.flip(3))))
    assert [changed for *_, changed in asked[:3]] == [{"iters": n} for n in (5, 10, 20)]
    assert all(init == changed["area"] for _, init, changed in asked[3:10])
    ways = [(victim.backward.ste, victim.backward.ste_k) for victim, *_ in asked[10:14]]
    assert ways == [("none", 1), ("identity", 1), ("sigmoid", 1), ("sigmoid", 5)]
    own, empty, manual = (victim for victim, *_ in asked[14:])
    assert own is None and empty.defense.contexts.locate is None
    assert torch.equal(manual.defense.contexts.locate, contexts_for("manual", manual.defense.model).locate)
    assert judged[-2][0] is bench.image and judged[-2][1] is bench.mask and judged[-1][0] is bench.task.x


def test_a_fixed_noise_is_that_of_the_attack(small, monkeypatch):
    seen = []

    class Told(Plain):
        defense = None

        def sample_noise(self, ids, seed, purpose, k=0):
            return purpose

        def forward(self, x, noise):
            seen.append(noise)
            return super().forward(x)

    made = bench_of(Told(), small.x, small.y)
    monkeypatch.setattr(trust.Bench, "attack", lambda self, **changed: made)
    list(trust.fixed_noise(made))
    assert set(seen) == {"attack 0"}


def test_the_black_box_starts_on_the_undefended_classifier(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(trust, "attack_all", lambda attack, task, *given: asked.append((attack, task, given)) or made)
    monkeypatch.setattr(trust.Bench, "attack", lambda self: bench)
    monkeypatch.setattr(trust.Bench, "accuracy", lambda self, x: 0.5)
    made = SimpleNamespace(state="state", image=None)
    list(trust.black_box(bench, queries=7))
    assert [(attack.queries, type(task.victim)) for attack, task, _ in asked] == [(35, Undefended), (7, Defended)]
    assert asked[1][2] == (1, "state")


def test_the_true_mask_cannot_help_where_no_patch_fools_the_classifier(bench, monkeypatch):
    monkeypatch.setattr(trust.Bench, "accuracy", lambda self, x, mask=None: 1.0)
    assert next(trust.masks(bench)).passed is None


def test_accuracies_of_the_trust_report_are_means_over_draws_of_their_own(small):
    """Of each image, one at a time; the first draw of five is read right."""
    drawn, labels = [], small.y.tolist()

    def looks(x, noises):
        y = labels.pop(0)
        assert len(x) == 1
        return [(None, F.one_hot(torch.tensor([y + (k > 0)]) % 4, 4)) for k in noises]

    victim = SimpleNamespace(sample_noise=lambda ids, seed, purpose, k: drawn.append(k) or k, looks=looks)
    assert bench_of(victim, small.x, small.y).accuracy(small.x) == 1 / trust.DRAWS
    assert drawn == list(range(trust.DRAWS)) * len(small.y)


@dataclass(frozen=True)
class Repeated:
    """Tells what it is called with."""

    eot: int = 1

    def __call__(self, task, init):
        assert len(task.x) == 1
        return Attacked(*[torch.tensor([self.eot + task.victim + init.item()])] * 6)


def test_the_attack_is_made_again_with_what_is_changed_alone(small):
    plan = Plan("advp", None, {"bpda": (None, 10), "full": (Repeated(), 20)})
    bench = bench_of(None, small.x, small.y, plan=plan, state=torch.tensor([100, 200]))
    assert bench.attack().image.tolist() == [121, 221]
    assert bench.attack(30, torch.tensor([300, 400]), eot=5).image.tolist() == [335, 435]


def test_at_random_as_much_is_painted_as_the_patch_covers(small, monkeypatch):
    painted = []
    monkeypatch.setattr(trust.Bench, "accuracy", lambda self, x, mask: painted.append(mask.mean()) or 1.0)
    mask = ATTACKS["grey"](area=0.15)(small).mask
    list(trust.masks(bench_of(SimpleNamespace(classifier=Plain()), small.x, small.y, mask=mask)))
    assert painted == [mask.mean()] * 2


def test_convergence_is_of_the_last_variant_that_has_gradients(small, tmp_path):
    attacks = {"bpda": ATTACKS["advp"](iters=1), "auto": ATTACKS["advp"](iters=7), "queries": ATTACKS["sparse-rs"]()}
    target = Defended(Noted(), Plain())
    plan = Plan("advp", ATTACKS["grey"](), {kind: (attack, target) for kind, attack in attacks.items()})
    through_files(tmp_path / "adv/advp/transfer", ["a", "b"], plan.base(small))
    records = [fake_record(name, 1, [1], advp__transfer=[1], advp__bpda=[1], advp__auto=[1]) for name in ("a", "b")]
    for record in records:
        record["attacks"]["advp/bpda"]["loss"], record["attacks"]["advp/auto"]["loss"] = [1.0, 0.9], [1.0, 0.5]
    task = small._replace(victim=target)
    checks = trust.trust_report(Options(), task, [plan], records, {"rows": []}, tmp_path)
    told = {check["name"]: check["figure"] for check in checks}
    assert told["the loss over 7 steps, images left right: 2"].startswith("falls by 0.5")


@pytest.mark.parametrize("order", [("grey", "advp"), ("advp", "grey")])
def test_gradients_are_checked_wherever_their_attack_stands(small, tmp_path, order):
    target = Defended(Noted(), Plain())
    plans = {
        "grey": Plan("grey", ATTACKS["grey"](), {}),
        "advp": Plan("advp", ATTACKS["advp"](iters=1), {"auto": (ATTACKS["advp"](iters=7), target)}),
    }
    for name in order:
        through_files(tmp_path / "adv" / name / "transfer", ["a", "b"], ATTACKS["grey"]()(small))
    records = [fake_record(name, 1, [1], advp__transfer=[1], advp__auto=[1]) for name in ("a", "b")]
    for record in records:
        record["attacks"]["advp/auto"]["loss"] = [1.0, 0.5]
    task, few = small._replace(victim=target), [plans[name] for name in order]
    checks = trust.trust_report(Options(), task, few, records, {"rows": []}, tmp_path)
    assert "patch gradient exactly zero" in {check["name"] for check in checks}


def test_what_was_saved_and_is_gone_is_told(small, tmp_path):
    through_files(tmp_path, ["a", "b"], ATTACKS["grey"]()(small))
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match=r"b.png is gone, and checks, curves and controls need it; run anew"):
        load_attacked(tmp_path, ["a", "b"])


def test_other_code_is_told_where_a_run_goes_on(monkeypatch, capsys):
    made = [{"commit": "1" * 40}, {"commit": "1" * 40}, {}]
    for now, told in (
        ("1" * 40, ""),
        ("2" * 40, "made at commit 1111111; the code is now at commit 2222222."),
        ("1" * 40 + CHANGED, "the code is now at commit 1111111 with changes."),
        (None, ""),
    ):
        monkeypatch.setattr(run, "commit", lambda now=now: now)
        run.tell_of_other_code(made)
        out = capsys.readouterr().out
        assert told in out and bool(told) == bool(out)
    run.tell_of_other_code([])
    assert not capsys.readouterr().out


def test_a_budget_that_is_not_spent_is_not_told():
    opts = with_preset(change(Options(), grad="transfer"))
    assert describe(opts) == "100 steps on the classifier alone"
    assert describe(with_preset(Options())) == "40 steps, EOT 2, 1 restart (classifier alone: 100 steps)"


def test_checks_of_the_estimator_are_of_gradients_that_pass_it(bench):
    attack, target = bench.adaptive
    hiding = bench._replace(plan=bench.plan._replace(adaptive={"full": (attack, target.under(Backward("evade")))}))
    assert not list(trust.ste_sweep(hiding))


def test_a_fixed_noise_that_withstands_is_red(bench, monkeypatch):
    for y, passed in ((bench.task.y, False), (bench.task.y + 1, True)):
        wrong = bench._replace(task=bench.task._replace(y=y))
        monkeypatch.setattr(trust.Bench, "attack", lambda self, victim=None, init=None, **changed: bench)
        assert [c.passed for c in trust.fixed_noise(wrong)] == [passed]


@pytest.mark.parametrize(
    ("curve", "passed"), [([1, 0.9, 0.8, 0.7, 0.6], False), ([1, 1, 1, 1, 1.1], False), ([1, 0.2, 0.1, 0.1, 0.1], True)]
)
def test_an_attack_that_still_falls_or_never_did_is_red(bench, curve, passed):
    records = [fake_record("a", 1, [1], advp__full=[0, 1])]
    records[0]["attacks"]["advp/full"]["loss"] = curve
    assert [c.passed for c in trust.convergence(bench._replace(records=records))] == [passed]


def test_convergence_is_of_the_images_that_are_left(bench):
    records = [fake_record("lost", 1, [1], advp__full=[0, 0]), fake_record("left", 1, [1], advp__full=[0, 1])]
    records[0]["attacks"]["advp/full"]["loss"] = [1.0, 0.9, 0.8, 0.7, 0.6]
    records[1]["attacks"]["advp/full"]["loss"] = [1.0, 0.2, 0.1, 0.1, 0.1]
    (check,) = trust.convergence(bench._replace(records=records))
    assert check.passed and check.name.endswith("images left right: 1") and check.figure.startswith("falls by 0.9,")
    (check,) = trust.convergence(bench._replace(records=records[:1]))
    assert check.passed and check.figure == "no image is left right"


class Slope(torch.nn.Module):
    """Linear, with one thing wrong with its gradient."""

    defense = None

    def __init__(self, wrong=""):
        super().__init__()
        self.wrong, self.backward, self.w = wrong, Backward(), Plain().w

    def under(self, backward):
        return self

    def sample_noise(self, image_ids, seed, purpose, k=0):
        return torch.stack([torch.randn(4, 768, generator=generator(seed, i, purpose, k)) for i in image_ids])

    def forward(self, x, noise):
        flat = x.flatten(1)
        if self.wrong == "zeros":
            flat = torch.where(torch.arange(768) % 50 > 0, flat, flat.detach())
        w = self.w + (200 if self.wrong == "cosine" else 0.1) * noise
        logits = torch.einsum("bd,bkd->bk", flat, w)
        return 1.2 * logits - 0.2 * logits.detach() if self.wrong == "finite differences" else logits


@pytest.mark.parametrize("wrong", ["", "zeros", "finite differences", "cosine"])
def test_unhealthy_gradients_are_red(small, wrong):
    bench = bench_of(Slope(wrong), small.x, small.y, mask=torch.ones(2, 1, 16, 16))
    checks = [*trust.zero_gradient(bench), *trust.gradient_health(bench)]
    found = {next(n for n in ("zero", "norm", "finite differences", "cosine") if n in c.name): c for c in checks}
    red = {name for name, check in found.items() if check.passed is False}
    assert red == ({wrong.removesuffix("s") if wrong == "zeros" else wrong} - {""})


def test_a_gradient_that_some_draw_gives_is_not_zero(small):
    """Each draw hides every other pixel."""

    class Striped(Slope):
        def forward(self, x, noise):
            shown = (torch.arange(768) % 2 == (noise[:, :1, 0] > 0)).float()
            return torch.einsum("bd,bkd->bk", x.flatten(1) * shown, self.w + 0 * noise)

    (check,) = trust.zero_gradient(bench_of(Striped(), small.x, small.y, mask=torch.ones(2, 1, 16, 16)))
    assert check.passed


def test_a_gradient_of_zero_is_right_where_nothing_changes():
    """As under a window that hides the patch."""
    x, mask = torch.full((1, 3, 8, 8), 0.5), torch.ones(1, 1, 8, 8)
    constant, cut = (lambda x: 0 * x.sum()), (lambda x: x.detach().sum() + 0 * x.sum())
    assert trust.finite_difference_error(constant, x, mask) == 0
    assert trust.finite_difference_error(cut, x, mask) == pytest.approx(1)


@pytest.mark.parametrize(("mode", "hide"), [("evade", "mean"), ("full+loc", "max")])
def test_a_hiding_term_without_its_gradient_is_red(bench, monkeypatch, mode, hide):
    attack, target = bench.adaptive
    victim = target.under(Backward(mode, hide=hide))
    hiding = bench._replace(plan=bench.plan._replace(adaptive={"full": (attack, victim)}))
    right = EVASIONS[hide]
    for term, passed in ((right, True), (lambda z, patch, theta: right(z.detach(), patch, theta), False)):
        monkeypatch.setitem(EVASIONS, hide, term)
        assert trust.hiding_gradient(hiding).passed is passed


def test_momentum_is_as_steady_as_a_mean_of_so_many_steps():
    g, momentum = torch.Generator().manual_seed(0), 0.9
    common, directions = torch.randn(4000, generator=g), torch.zeros(40, 4000)
    for _ in range(60):
        directions = momentum * directions + common + 8 * torch.randn(40, 4000, generator=g)
    k = AdvP(momentum=momentum).averaged_steps
    means = common + 8 * torch.randn(40, 4000, generator=g) / k**0.5
    cosines = [torch.nn.functional.cosine_similarity(v[::2], v[1::2]).mean().item() for v in (directions, means)]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.03)
    assert 0.1 < cosines[0] < 0.5
    assert k == pytest.approx(19, abs=0.01) and AdvP(iters=10).averaged_steps == pytest.approx(9.176, abs=1e-3)
    assert AdvP(iters=1).averaged_steps == AdvP(momentum=0.0).averaged_steps == 1


@pytest.mark.parametrize("k", [1, 20])
def test_steadiness_is_the_cosine_of_two_means(k):
    """Of gradients with a known common part, against the cosine of means of many fresh ones."""
    g = torch.Generator().manual_seed(k)
    common = torch.randn(1, 3, 4000, generator=g)
    made = lambda n: common + 4 * torch.randn(n, 3, 4000, generator=g)  # noqa: E731
    means = [torch.stack([made(k).mean(dim=0) for _ in range(20)]) for _ in range(2)]
    expected = torch.nn.functional.cosine_similarity(*means, dim=2).mean().item()
    assert trust.steadiness(made(8), k) == pytest.approx(expected, abs=0.03)
    assert trust.steadiness(torch.randn(8, 3, 4000, generator=g), 1) < 0.02, "noise alone has no direction"


@pytest.mark.slow
def test_every_check_runs(target, photos, tmp_path):
    x = photos[:1]
    y = target.classifier(x).argmax(dim=1)
    plan = Plan("advp", ATTACKS["advp"](iters=5, eot=1), {"full": (ATTACKS["advp"](iters=1, eot=1), target)})
    record = {"accuracy": 1.0, "low": 0.5, "high": 1.0, "n": 1, "right": 1}
    rows = [{"attack": "advp", "gradient": "transfer", "undefended": record, "average": record}]
    records = [fake_record("a", y.item(), [y.item()], advp__transfer=[0], advp__full=[0])]
    records[0]["attacks"]["advp/full"]["loss"] = [1.0, 0.5]
    through_files(tmp_path / "adv/advp/transfer", ["a"], plan.base(Task(Undefended(target.classifier), x, y, ["a"], 0)))
    few = Task(target, x, y, ["a"], 0)
    checks = trust.trust_report(change(Options(), trust="full"), few, [plan], records, {"rows": rows}, tmp_path)
    passed = {c["name"]: c["passed"] for c in checks}
    assert len(passed) == len(checks) >= 18
    for name in ("patch size", "one fixed noise, attacked and judged", "patches from other prompts", "step size"):
        assert name in passed
    assert passed["the defence is random"]
    assert passed["patch gradient exactly zero"]
    assert passed["exact gradient against finite differences, soft mask"]
    assert len(trust_table(checks).splitlines()) == 2 + len(checks)


# Memory


def test_peak_memory_grows_with_images_and_is_bounded_by_micro_batches(model, classifier):
    one = footprint(model, classifier.net, 224)
    assert all(v > 1e6 for v in one)
    assert peak_bytes(one, 8, 3, None) == pytest.approx(8 * peak_bytes(one, 1, 3, None), rel=0.01)
    ours = one._replace(classifier=0)  # which no micro-batch divides
    assert peak_bytes(ours, 8, 3, 1) < 0.6 * peak_bytes(ours, 8, 3, None)
    allowed = peak_bytes(ours, 8, 3, 4)
    assert fit_micro_batch(ours, 8, 3, 0, allowed) >= 4
    assert fit_micro_batch(ours, 8, 3, 0, 10 * allowed) is None
    with pytest.raises(InputError, match="is too little for 8 images side by side"):
        fit_micro_batch(one, 8, 3, 0, 10**6)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(64, 48), "dropout_p": 0.0}])
def test_attention_is_counted_as_its_fused_kernel_keeps_it(options):
    from diffender.evaluation.memory import saved_bytes

    def kept(device):
        q, k, v = (torch.rand(1, 2, n, 16, device=device, requires_grad=True) for n in (64, 48, 48))
        given = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
        return saved_bytes(torch.nn.Identity(), lambda *a: F.scaled_dot_product_attention(*a, **given), q, k, v)

    assert kept("meta") == kept("cpu")


def test_what_autograd_keeps_does_not_grow_with_sampler_steps(model, classifier, photos, monkeypatch):
    """Between the networks only small tensors are kept: their bytes, counted for 2 and for 8 steps."""
    from diffender.evaluation.memory import saved_bytes

    monkeypatch.setattr(model, "keep", False)  # small models keep them
    kept = {}
    with torch.no_grad():
        contexts = contexts_for("tuned", model)
    for steps in (2, 8):
        defense = DIFFender(model, contexts, DIFFenderConfig(draws=1, steps=steps, guidance=1.0, sampler="dpmpp"))
        noise = defense.sample_noise(["a"], 0, "memory")
        x = photos[:1].clone().requires_grad_()
        kept[steps] = saved_bytes(model, lambda x, d=defense, n=noise: d(x, n).image, x)
    latent = 4 * 4 * 28 * 28
    assert kept[8] - kept[2] < 6 * 40 * latent  # some latents a step, no activations
    assert kept[8] < 1.1 * kept[2]


def test_what_autograd_keeps_does_not_grow_with_eot():
    toy, mask = Toy("ste"), torch.ones(1, 1, 32, 32)
    x = torch.rand(1, 3, 32, 32)
    task = Task(toy, x, torch.tensor([0]), ["a"], 0, lambda z: z[:, 0])

    def most(eot):
        now, peak = 0, 0

        class Kept:
            def __init__(self, t):
                nonlocal now, peak
                self.t, now = t, now + t.nbytes
                peak = max(now, peak)

            def __del__(self):
                nonlocal now
                now -= self.t.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            list(samples(task, lambda k: (x, mask, task.noise("eot", k)), eot))
        return peak

    assert most(4) == most(1) > 4 * x.numel()


@pytest.fixture
def module(target):
    return WithFreshNoise(target).eval()


def test_fresh_noise_in_every_call(module, photos):
    with torch.no_grad():
        a, b = module(photos[:1]), module(photos[:1])
        again = WithFreshNoise(module.victim)(photos[:1])
    assert not torch.equal(a, b)
    assert torch.equal(a, again)


def test_fresh_noise_for_every_image(module, photos):
    first, second = module(photos[:1].repeat(2, 1, 1, 1)).detach()
    assert not torch.equal(first, second)


# The command line's arithmetic


def test_presets_fill_what_was_not_given():
    opts = with_preset(Options(attack="gdpa", eot=10))
    assert (opts.images, opts.iters, opts.eot, opts.verdicts) == (6, 40, 10, 10), "no other flag changes"
    strong = with_preset(Options(preset="strong", iters=7))
    assert (strong.images, strong.iters, strong.eot, strong.grad.split(",")[-1]) == (512, 7, 10, "evade")
    laptop, every = (costs(o, COST) for o in (with_preset(Options()), strong))
    assert list(laptop) == ["clean", "advp/transfer", "advp/evade"]
    assert laptop["advp/evade"] == 10 + 40 * 2 * COST["evade"] + 3 * 3
    assert sum(every.values()) > 10 * sum(laptop.values())
    messy = with_preset(Options(attack="AdvP, LaVAN", grad="BPDA, Full", defense="diffender"))
    assert (messy.attack, messy.grad) == ("advp,lavan", "bpda,full"), "whatever their case, with blanks after commas"
    assert with_preset(Options(defense="JPEG:quality=50")).defense == "jpeg:quality=50"
    assert with_preset(Options(grad="All")).grad == strong.grad
    assert kinds(with_preset(Options(grad="all", defense="jpeg"))) == ["transfer", "bpda", "auto"]
    told = [adaptive_kinds(with_preset(Options(attack=attack))) for attack in ("advp,rhde", "rhde", "none")]
    assert told == [["evade"], [], []], "what asks for answers alone takes no gradient"
    curves = {d: with_preset(Options(defense=d)).curves for d in ("diffender", "jpeg", "hardened")}
    assert curves == {"diffender": "theta", "jpeg": "off", "hardened": "off"}
    assert duration(90) == "90 seconds" and duration(86400 * 3) == "3 days"


def test_budgets_go_to_the_attacks_that_they_are_for():
    """On the classifier alone nothing is random but the place."""
    opts = with_preset(Options(attack="advp,rhde", grad="bpda,evade", iters=7, iters_undefended=9, eot=4, restarts=3))
    opts = change(opts, queries=50, queries_undefended=60, ste="sigmoid")
    random = SimpleNamespace(sample_noise=lambda *_: 0, under=lambda backward: backward)
    advp, rhde = plans.build_plans(opts, random)
    assert (advp.base.iters, advp.base.eot, advp.base.restarts) == (9, 1, 1)
    attack, backward = advp.adaptive["evade"]
    assert (attack.iters, attack.eot, attack.restarts, backward.mode, backward.ste) == (7, 4, 3, "evade", "sigmoid")
    assert (rhde.base.queries, rhde.base.iters, rhde.adaptive["queries"][0].queries) == (60, 9, 50)
    assert rhde.adaptive["evade"][1].mode == "evade" and rhde.adaptive["evade"][0] == rhde.adaptive["queries"][0]
    (plain,) = plans.build_plans(change(opts, attack="rhde", grad="bpda"), random)
    assert list(plain.adaptive) == ["queries"]
    (moving,) = plans.build_plans(change(opts, attack="advp", location="eot"), random)
    assert (moving.base.eot, moving.adaptive["bpda"][0].eot) == (4, 4)
    same = SimpleNamespace(sample_noise=lambda *_: None)
    drawn = [plans.as_drawn(change(opts, location=place), who).eot for who in (random, same) for place in (None, "eot")]
    assert drawn == [4, 4, 1, 4], "a defence that is not random needs one sample, of a patch that stays"
    for preset, targeted in (("laptop", True), ("strong", False)):
        (lavan,) = plans.build_plans(with_preset(Options(preset=preset, attack="lavan")), random)
        assert lavan.base.targeted is targeted


def test_an_attack_by_any_other_name_is_refused(monkeypatch):
    for name, made, says in (
        ("mine", lambda task: task, r"ATTACKS\['mine'\] is .*; an attack is a class that inherits from Attack"),
        ("a/b", ATTACKS["grey"], "ATTACKS has 'a/b'; names are of a-z, 0-9 and -"),
        ("all", ATTACKS["grey"], "neither all nor none"),
    ):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=says):
            patch.setitem(ATTACKS, name, made)
            attacks(Options(attack="grey"))


def test_evaluations_are_recorded_where_gradients_pass_through_restoration():
    """Guidance takes two of a step."""
    assert [replace(PAPER, guidance=g, steps=4).evaluations for g in (1.0, 7.5)] == [4, 8]
    assert replace(PAPER, restore=False).evaluations == 0  # grey takes none
    opts = change(Options(), steps=4, guidance=1.0)
    assert [plans.recorded_steps(replace(opts, grad=grad)) for grad in ("bpda,evade", "bpda,full")] == [0, 4]


def test_a_forecast_is_of_every_image_step_and_restart(monkeypatch):
    """GDPA also tries four moves and staying every ten steps; a deterministic defence is judged once."""
    opts = with_preset(Options(attack="gdpa", grad="evade", iters=5, eot=2, restarts=3, verdicts=4))
    opts, of = replace(opts, trust="off", curves="off"), {what: 2 * cost for what, cost in COST.items()}
    monkeypatch.setattr(forecasts, "measured", lambda *_: of)
    monkeypatch.setattr(forecasts, "memory_needed", lambda *_: (0, ""))
    attempt = 5 * (2 * of["evade"] + 5 / 10 * of["pass"]) + 3 * 3 * of["pass"]
    for noise, verdicts in ((0, 4), (None, 1)):
        target = SimpleNamespace(sample_noise=lambda *_, noise=noise: noise)
        two, one = forecasts.forecast(opts, target, None, [[0, 1], [2]], [False, False]).parts
        assert one["clean"] == verdicts * of["pass"]
        assert one["gdpa/evade"] == pytest.approx(verdicts * of["pass"] + 3 * attempt)
        assert two == {variant: 2 * cost for variant, cost in one.items()}
        (shared,) = forecasts.forecast(opts, target, None, [[2]], [True]).parts
        own = opts.iters_undefended * (of["undefended"] + 5 / 10 * of["query"])
        assert one["gdpa/transfer"] - shared["gdpa/transfer"] == pytest.approx(own), "another experiment makes them"


def test_seconds_are_of_one_row_of_the_second_run(monkeypatch):
    monkeypatch.setattr(forecasts, "time", SimpleNamespace(monotonic=iter([0, 8, 10, 14]).__next__))
    assert forecasts.timed(lambda rows: None, 4) == 1


def test_a_forecast_of_queries_checks_and_curves():
    opts = with_preset(Options(attack="rhde", grad="evade", queries=50, queries_undefended=60, verdicts=4, eot=2))
    found = costs(opts, COST)
    assert found["rhde/transfer"] == pytest.approx(4 + 60 * COST["query"])
    assert (found["rhde/queries"], found["rhde/evade"]) == (4 + 50, 4 + 50 * COST["hiding"])
    assert forecasts.curve_costs(replace(opts, curves="theta"), COST) == 3 * 4, "clean, transfer, queries and evade"
    advp = with_preset(Options(grad="evade"))
    of = lambda which: forecasts.curve_costs(replace(advp, curves=which), COST)  # noqa: E731
    assert (of("off"), of("theta")) == (0, 3 * 3), "clean, transfer and evade"
    assert of("all") == pytest.approx(of("theta") + 4 * sum(costs(advp, COST).values())), "at each of four sizes"
    target = SimpleNamespace(sample_noise=lambda *_: 0)
    opts = change(opts, quiet=True, curves="off", trust_images=5, iters=7)
    after = lambda trust: forecasts.forecast(replace(opts, trust=trust), target, None, [[0]], [False]).after  # noqa: E731
    assert [after(trust) for trust in ("off", "quick", "full")] == [0, 5 * 70, 5 * (70 + 100 * 2 * 7)]


def test_each_gradient_is_measured_through_its_own_victim(monkeypatch):
    asked = []
    target = SimpleNamespace(sample_noise=lambda *_: None, looks=lambda *_: [], undefended=lambda: lambda *_: None)
    target.under = lambda backward: backward.mode
    monkeypatch.setattr(forecasts, "samples", lambda task, *_: asked.append(task.victim) or [])
    opts = with_preset(Options(attack="advp", grad="bpda,evade"))
    forecasts.measured(opts, target, torch.zeros(1, 3, 32, 32))
    assert asked[2:] == ["bpda", "bpda", "evade", "evade"], "each twice, after the classifier alone"


def test_with_quiet_nothing_is_measured_before_the_start(monkeypatch):
    for name in ("measured", "memory_needed"):
        monkeypatch.setattr(forecasts, name, lambda *_: pytest.fail("nobody is told"))
    opts, target = with_preset(change(Options(), quiet=True)), SimpleNamespace(sample_noise=lambda *_: None)
    assert forecasts.forecast(opts, target, None, [[0, 1]], [False]).work > 0, "the shares of the bar"


def test_a_limit_of_memory_keeps_no_activations(model, monkeypatch):
    monkeypatch.setattr(model, "keep", True)
    limited = plans.build_target(with_preset(change(Options(), max_memory=6.0)), model).defense.model
    assert limited.keep is False and limited.unet is model.unet
    assert model.keep is True, "what one experiment keeps and splits is its own"


def test_memory_by_hand(monkeypatch):
    """Localisation asks twice in each draw; restoration encodes and decodes once more; the classifier sees all rows."""
    one = Footprint(unet=10_000, encoder=300, decoder=200, classifier=50_000)
    assert kept_bytes(one, 2, 3, 4) == round(WORKING * 2 * (10 * 10_000 + 2 * 300 + 200 + 50_000))
    assert kept_bytes(one, 1, 3, 0) == round(WORKING * (6 * 10_000 + 300 + 50_000))
    assert peak_bytes(one, 2, 3, 1) == round(WORKING * 2 * 50_000), "no micro-batch divides the classifier"
    for free, keeps in ((4.01, True), (3.99, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda _, n=free: n * kept_bytes(one, 2, 3, 4))
        assert memory.keep_or_recompute(one, 2, 3, 4, torch.device("cpu")) is keeps


def test_flags_override_the_papers_settings():
    given = plans.method_of(change(Options(preset="paper"), theta=9.0))
    assert (given["theta"], given["draws"]) == (9.0, PAPER.draws)


def test_the_papers_settings():
    cfg = (PAPER.noise_ratio, PAPER.draws, PAPER.theta, PAPER.steps, PAPER.guidance, PAPER.sampler)
    assert cfg == (0.5, 3, 2.0, 20, 7.5, "ddim")
    opts = with_preset(Options(preset="paper"))
    assert (opts.images, opts.iters, opts.eot, opts.restarts, opts.grad) == (512, 100, 2, 1, "bpda-mask")
    assert (opts.queries, opts.verdicts, opts.iters_undefended) == (2400, 1, 100)
    assert plans.config_of(opts) == PAPER, "with the embedded model, too"


def test_masks_of_attack_and_control_agree(photos):
    """Controls lie where AdvP's patch lies."""
    task = Task(None, photos[:2], torch.zeros(2).long(), ["a", "b"], 0)
    grey = ATTACKS["grey"]()(task)
    assert torch.equal(grey.mask, masks_for(task, "patch", 0.05))
    half = torch.full_like(photos[:2], 0.5)
    assert torch.allclose(grey.image, to_8bit(apply_patch(to_8bit(photos[:2]), half, grey.mask)), atol=1e-3)


# Tuning on images that are attacked anew


def test_versions_take_turns():
    """Each image is in another version from round to round, and every version comes up equally often."""
    ids, mask = ["a", "b", "c"], torch.ones(3, 1, 8, 8)
    clean = torch.rand(3, 3, 8, 8)
    shots = [
        Shots(ids, clean, torch.full((3, 3, 8, 8), v / 4), mask, Posterior(mask + v, mask), [mask]) for v in range(2)
    ]
    rows = torch.tensor([2, 0])
    seen = [mixed(shots, rows, r) for r in range(4)]
    assert all(s.ids == ["c", "a"] and torch.equal(s.clean, clean[rows]) for s in seen)
    assert [[round(4 * v) for v in s.attacked[:, 0, 0, 0].tolist()] for s in seen] == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert all(torch.equal(s.posterior.mean[:, 0, 0, 0], 1 + 4 * s.attacked[:, 0, 0, 0]) for s in seen)
    assert torch.equal(mixed(shots[:1], rows, 5).attacked, shots[0].attacked[rows])
