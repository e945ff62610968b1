"""Prompt tuning: it descends Eq. 7, keeps the best round, leaves out what it is told to."""

import pytest
import torch

import train
from diffender import tuning as tunings
from diffender.config import DIFFenderConfig, TuningConfig
from diffender.losses import TuningLoss
from diffender.noise import generator
from diffender.pipeline import Defended, DIFFender
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


def test_a_tuning_goes_on_with_the_same_classifier_alone():
    opts = change(train.Options(), classifier_weights=str(SHIPPED))  # any file
    assert train.resolved(opts)["sha256"]["classifier"] == sha256(SHIPPED)
