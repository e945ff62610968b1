"""Prompt tuning: it descends Eq. 7, keeps the best round, leaves out what it is told to."""

from types import SimpleNamespace

import pytest
import torch

import train
from diffender import tuning as tunings
from diffender.attacks.expectation import Attacked, Task
from diffender.classifiers.dataset import Batch
from diffender.config import DIFFenderConfig, TuningConfig
from diffender.losses import TuningLoss, feature_distance, mask_cross_entropy, restoration_l1
from diffender.noise import generator
from diffender.pipeline import Defended, DIFFender, Localized, Purified
from diffender.prompts import PromptPair
from diffender.stable_diffusion.vae import Posterior
from diffender.tuning import Shots, Tuning, Work, eq_7, tune
from diffender.utils.files import sha256
from diffender.utils.options import change
from diffender.weights.prompts import SHIPPED

FAST = DIFFenderConfig(noise_ratio=0.2, draws=1, steps=1, guidance=1.0, sampler="dpmpp")


@pytest.fixture
def prompts():
    return PromptPair(16, 64, generator("prompts"))


@pytest.fixture
def tuned(model, classifier, prompts):
    """A defence of its own: tuning changes its prompts."""
    return Defended(DIFFender(model, prompts(model).detach(), FAST), classifier)


@pytest.fixture
def shots(tuned, photos):
    """Two photographs with a square of noise."""
    x, mask = photos[:2], torch.zeros(2, 1, 224, 224)
    mask[..., 60:116, 100:156] = 1
    attacked = torch.where(mask == 1, torch.rand(x.shape), x)
    features = tuned.classifier.features(x)
    return Shots(["a", "b"], x, attacked, mask, tuned.defense.posterior(attacked), features)


def nowhere():
    """One image of nothing."""
    one = torch.zeros(1, 3, 8, 8)
    return Shots(["a"], one, one, one[:, :1], Posterior(one, one), [one])


def mean_context(target, *_):
    """A loss of the prompts alone, in the place of Eq. 7."""
    mean = target.defense.contexts.locate.mean() + target.defense.contexts.restore.mean()
    return TuningLoss(mean, mean.new_zeros(()), mean.new_zeros(()), mean), mean.new_zeros(())


def test_rounds_go_downhill_for_both_prompts(tuned, prompts, monkeypatch):
    """In a bowl: how far the contexts are from 1."""

    def bowl(target, *_):
        contexts = target.defense.contexts
        locate, restore = ((c - 1).square().mean() for c in (contexts.locate, contexts.restore))
        return TuningLoss(locate, restore, locate.new_zeros(()), locate + restore), locate.new_zeros(())

    monkeypatch.setattr(tunings, "eq_7", bowl)
    cfg = TuningConfig(rounds=4, lr=0.05)
    work = Work(nowhere(), [(torch.tensor([0]), 1.0)], torch.arange(0), attack=None)
    terms = list(tune(tuned, Tuning(prompts, cfg, 1), work, cfg))
    for name in ("mask", "l1", "total"):
        falls = [t[name] for t in terms]
        assert falls == sorted(falls, reverse=True) and falls[-1] < falls[0], name


def test_the_rate_falls_to_zero_over_all_batches_of_all_rounds(prompts):
    tuning, rates = Tuning(prompts, TuningConfig(rounds=3, lr=0.05), batches=2), []
    for _ in range(6):
        rates.append(tuning.optimizer.param_groups[0]["lr"])
        tuning.optimizer.step()
        tuning.schedule.step()
    assert rates[::3] == pytest.approx([0.05, 0.025])
    assert tuning.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_step_of_adam_is_its_rate_and_a_share_of_a_batch_gives_its_share(tuned, monkeypatch):
    monkeypatch.setattr(tunings, "eq_7", mean_context)
    cfg, told = TuningConfig(lr=0.05), []
    for share in (1.0, 0.25):
        prompts = PromptPair(16, 64, generator("prompts"))
        start, tuning = prompts.ctx_locate.detach().clone(), Tuning(prompts, cfg, 1)
        told.append(tunings.step(tuned, tuning, nowhere(), share, cfg, lambda *tensors: None))
        assert (prompts.ctx_locate - start).abs().median().item() == pytest.approx(0.05, rel=0.01)
        assert tuning.optimizer.param_groups[0]["lr"] < 0.05, "the next one is smaller"
    for name in ("total", "grad_L", "grad_R"):
        assert told[1][name] == pytest.approx(0.25 * told[0][name], rel=1e-4)


def test_every_round_has_noise_of_its_own(tuned, prompts, monkeypatch):
    purposes = []
    monkeypatch.setattr(tunings, "eq_7", lambda *given: purposes.append(given[-1]) or mean_context(*given))
    cfg = TuningConfig(rounds=3)
    work = Work(nowhere(), [(torch.tensor([0]), 1.0)], torch.arange(0), attack=None)
    list(tune(tuned, Tuning(prompts, cfg, 1), work, cfg))
    assert len(set(purposes)) == 3


class Stand:
    """In the place of a defence: what it finds is told."""

    cfg, model, contexts = FAST, "model", "old"

    def __init__(self, found):
        self.found, self.asked = found, []

    def sample_noise(self, ids, seed, purpose):
        return None

    def __call__(self, x, noise, posterior):
        self.asked.append(x)
        return self.found

    localize = __call__


def test_eq_7_compares_like_with_like(monkeypatch):
    """The map less theta with the true mask, the image with the clean one, its features with theirs."""
    clean, attacked, restored, z = torch.rand(4, 1, 3, 8, 8).unbind()
    z, mask = 4 * z[:, :1], (clean[:, :1] > 0.5).float()
    monkeypatch.setattr(tunings, "ours", lambda target: target.defense)
    target = SimpleNamespace(defense=Stand(Purified(restored, mask, z, z)))
    target.classifier = SimpleNamespace(features=lambda x: [x**2])
    shots = Shots(["a"], clean, attacked, mask, None, [clean**2])
    for printed in (False, True):
        loss = eq_7(target, shots, TuningConfig(printed_eq4=printed), "test")[0]
        assert loss.mask == mask_cross_entropy(z - FAST.theta, mask, printed)
        assert loss.l1 == restoration_l1(restored, clean)
        assert loss.feature == feature_distance([restored**2], [clean**2])
    assert all(x is attacked for x in target.defense.asked)
    target.defense.found = Purified(restored, torch.ones_like(mask), z, z)
    assert eq_7(target, shots, TuningConfig(), "test")[1] == mask.mean(), "the IoU of a mask of ones"


def test_masks_are_fitted_through_the_present_prompts(monkeypatch):
    monkeypatch.setattr(tunings, "ours", lambda target: target)
    mask = torch.ones(1, 1, 8, 8)
    stand = Stand(Localized(mask, mask, mask))
    present = lambda model, empty: SimpleNamespace(detach=lambda: (model, empty))  # noqa: E731
    stand.contexts = SimpleNamespace(empty="empty")
    half = (torch.arange(8) < 4).float().expand_as(mask)
    assert tunings.mask_fit(stand, present, nowhere()._replace(mask=half), 0) == 0.5, "their IoU"
    assert stand.contexts == ("model", "empty")


def test_images_attacked_anew_have_a_posterior_of_their_own(monkeypatch):
    monkeypatch.setattr(tunings, "ours", lambda target: SimpleNamespace(posterior=lambda x: Posterior(x, -x)))
    anew = tunings.attacked_anew(None, nowhere(), torch.full((1, 3, 8, 8), 51, dtype=torch.uint8))
    assert torch.allclose(anew.attacked, torch.tensor(0.2))
    assert torch.equal(anew.posterior.mean, anew.attacked)


def test_a_term_is_left_out(tuned, shots):
    """Of what is descended; it is told all the same."""
    whole = eq_7(tuned, shots, TuningConfig(), "test")[0]
    assert whole.total == whole.mask + whole.l1 + whole.feature
    for term in ("mask", "l1", "feature"):
        less = eq_7(tuned, shots, TuningConfig(without=term), "test")[0]
        assert less.total.item() == pytest.approx((whole.total - getattr(whole, term)).item(), abs=1e-6)
        assert less[:3] == whole[:3]
        assert getattr(whole, term) > 0.001


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.5, 0.3], 2), ([0.5, 0.1, 0.3], 1), ([0.1, 0.3, 0.5], 3), ([], 3)]
)
def test_the_round_that_fits_the_held_out_best_is_kept(tuned, prompts, monkeypatch, scores, best):
    """Without any held out, the last one. Each round adds 1 to the prompts."""
    start, asked = prompts.ctx_locate.detach().clone(), iter(scores)

    def step(target, tuning, *_):
        with torch.no_grad():
            tuning.prompts.ctx_locate += 1
        return {"total": 1.0}

    monkeypatch.setattr(tunings, "step", step)
    monkeypatch.setattr(tunings, "mask_fit", lambda *_: next(asked))
    cfg = TuningConfig(rounds=3)
    tuning = Tuning(prompts, cfg, 1)
    rows = torch.tensor([0])
    list(tune(tuned, tuning, Work(nowhere(), [(rows, 1.0)], rows if scores else rows[:0], attack=None), cfg))
    assert torch.allclose(prompts.ctx_locate, start + best)


def test_terms_are_means_over_batches_and_versions_take_turns(tuned, prompts, monkeypatch):
    told, rounds = iter((1.0, 2.0, 4.0, 8.0)), []
    monkeypatch.setattr(tunings, "step", lambda *_: {"total": next(told)})
    monkeypatch.setattr(tunings, "mixed", lambda versions, rows, number: rounds.append(number))
    cfg, row = TuningConfig(rounds=2), torch.tensor([0])
    work = Work(nowhere(), [(row, 0.5)] * 2, row[:0], attack=None)
    assert list(tune(tuned, Tuning(prompts, cfg, 2), work, cfg)) == [{"total": 1.5}, {"total": 6.0}]
    assert rounds == [0, 0, 1, 1]


def test_only_compared_rounds_are_kept(tuned, prompts, monkeypatch):
    """With --adaptive 2 that is every second one, and of equals the first, even where no mask fits at all."""
    zero = torch.zeros(())

    def bowl(target, *_):
        mean = target.defense.contexts.locate.mean() + target.defense.contexts.restore.mean()
        return TuningLoss(mean, zero, zero, mean), zero

    monkeypatch.setattr(tunings, "eq_7", bowl)
    monkeypatch.setattr(tunings, "mask_fit", lambda *_: 0.0)
    monkeypatch.setattr(tunings, "attacked_anew", lambda target, every, images: every)
    cfg = TuningConfig(rounds=5, lr=0.05, adaptive=2)
    work = Work(nowhere(), [(torch.tensor([0]), 1.0)], torch.tensor([0]), attack=lambda: torch.zeros(1, 3, 8, 8))
    seen = []
    tuning = Tuning(prompts, cfg, 1)
    for _ in tune(tuned, tuning, work, cfg):
        seen.append(prompts.ctx_locate.detach().clone())
    assert torch.equal(tuning.kept["ctx_locate"], seen[1])
    assert torch.equal(prompts.ctx_locate, seen[1])


def test_new_attacks_know_the_present_prompts_and_are_what_masks_are_fitted_to(tuned, prompts, monkeypatch):
    monkeypatch.setattr(tunings, "eq_7", mean_context)
    monkeypatch.setattr(tunings, "attacked_anew", lambda target, every, images: every._replace(attacked=images / 255))
    fitted, levels = [], iter((50.6, 101.6))
    monkeypatch.setattr(tunings, "mask_fit", lambda *given: fitted.append(given[2].attacked.mean().item()) or 0.0)

    def attack():
        known = prompts(tuned.defense.model, tuned.defense.contexts.empty)
        assert torch.equal(tuned.defense.contexts.locate, known.locate)
        return torch.full((1, 3, 8, 8), next(levels) / 255)

    cfg, row = TuningConfig(rounds=4, lr=0.05, adaptive=2), torch.tensor([0])
    list(tune(tuned, Tuning(prompts, cfg, 1), Work(nowhere(), [(row, 1.0)], row, attack), cfg))
    assert fitted == pytest.approx([0.2, 0.4])


def test_new_attacks_start_from_the_first_ones():
    """Where there is no gradient, a patch stays as it is given."""
    victim = torch.nn.Module()
    victim.sample_noise, victim.forward = (lambda *_: None), (lambda x, noise: 0 * x.flatten(1)[:, :2])
    task = Task(victim, torch.zeros(2, 3, 16, 16), torch.zeros(2).long(), ["a", "b"], 0)
    starts = torch.full((2, 4, 16, 16), 0.2)
    starts[:, 3] = torch.arange(16) < 4  # where they are
    made = train.attack_through(change(train.Options(), adaptive_iters=1), task, starts)
    assert torch.allclose(made, starts[:, :3] * starts[:, 3:])


def test_what_the_first_of_two_processes_tunes_on(call, model, monkeypatch):
    """Half of the batch, towards the features of the clean images."""
    x, told = torch.rand(2, 3, 8, 8), []
    made = Attacked(1 - x, x[:, :1].round(), x, *torch.zeros(3, 2))

    class Same(torch.nn.Module):
        features = staticmethod(lambda x: [x])

    def stop(opts, target, tuning, work, *_):
        told.append(work)
        raise SystemExit(0)

    monkeypatch.setattr("diffender.classifiers.imagenet.load_classifier", lambda *_: Same())
    monkeypatch.setattr("diffender.factory.open_model", lambda *_: model)
    monkeypatch.setattr(DIFFender, "posterior", lambda self, x: x)
    monkeypatch.setattr(train, "photographs", lambda *_: Batch(["a", "b"], x, torch.zeros(2).long(), ["0", "1"]))
    monkeypatch.setattr(train, "attack_alone", lambda *_: made)
    monkeypatch.setattr(train, "join", lambda opts: (0, 2))
    monkeypatch.setattr(train, "tune_and_save", stop)
    small = ("--shots", "2", "--held-out", "0", "--no-keep", "--out", "p.safetensors")
    assert call(train.main, "train.py", *small)[0] == 0
    (work,) = told
    assert [(rows.tolist(), share) for rows, share in work.batches] == [([0], 0.5)]
    every = work.every
    assert [torch.equal(t, x) for t in (every.clean, *every.features, 1 - every.attacked)] == [True] * 3
    assert torch.equal(every.posterior, every.attacked)


def test_a_tuning_goes_on_with_the_same_classifier_alone():
    opts = change(train.Options(), classifier_weights=str(SHIPPED))  # any file
    assert train.resolved(opts)["sha256"]["classifier"] == sha256(SHIPPED)
