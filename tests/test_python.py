"""The package as its users write it in Python: victims in other libraries, devices, wrong input in one clear line."""

import copy
from dataclasses import replace

import pytest
import torch

import diffender
from diffender.pipeline import Undefended
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError

EPS = 16 / 255


@pytest.fixture
def victim(target):
    """The target as a module of its own, whose mode is its own."""
    return diffender.Defended(target.defense, target.classifier)


def is_right(victim, x, y) -> list[bool]:
    return (victim(x).argmax(dim=1) == y).tolist()


def test_a_model_brings_its_settings(model):
    assert diffender.DIFFender(model, diffender.contexts_for("tuned", model)).cfg == diffender.EMBEDDED
    with torch.device("meta"):
        official = LatentDiffusion(diffender.MODELS["sd15-inpainting"])
    assert diffender.DIFFender(official, diffender.contexts_for("tuned", model)).cfg == diffender.DIFFenderConfig()


def test_contexts_are_constants_and_a_second_backward_pass_works(victim, photos):
    x = photos[:1].clone().requires_grad_()
    noise = victim.sample_noise(["a"], 0, "test")
    first, second = (torch.autograd.grad(victim(x, noise)[0, 0], x)[0] for _ in range(2))
    assert torch.equal(first, second)
    victim(photos[:1], noise).numpy()
    again = copy.deepcopy(victim)
    assert torch.equal(again(photos[:1], noise), victim(photos[:1], noise))
    assert not any(c.requires_grad for c in victim.defense.contexts)


def test_contexts_go_where_the_victim_goes(victim):
    moved = copy.deepcopy(victim).to("meta")
    assert {t.device.type for t in [*moved.parameters(), *moved.buffers(), *moved.defense.contexts]} == {"meta"}


def test_victims_stay_in_evaluation_mode(victim, classifier, photos):
    """What torchattacks does: it puts back the mode that it found. BatchNorm's statistics stay as they are."""
    wrapped = diffender.WithFreshNoise(victim)
    for module in (victim, wrapped, Undefended(classifier)):
        assert not module.training
        statistics = [b.clone() for b in module.buffers()]
        module.train()
        module.eval()
        module.train()
        module(*((photos[:2],) if module is wrapped else (photos[:2], module.sample_noise(["a", "b"], 0, "t"))))
        assert all(torch.equal(a, b) for a, b in zip(statistics, module.buffers(), strict=True))
        assert not module.get_submodule("classifier" if module is not wrapped else "victim.classifier").training


def test_wrong_input_is_one_clear_line(victim, classifier, photos):
    noise = victim.sample_noise(["a", "b"], 0, "test")
    with pytest.raises(InputError, match="noise for 2 images with 1 images; sample_noise takes an id for each image"):
        victim(photos[:1], noise)
    with pytest.raises(InputError, match="noise for 2 images with 3 images"):
        victim(photos[:1].repeat(3, 1, 1, 1), noise)
    many, stochastic = (replace(victim.defense.cfg, **k) for k in ({"draws": 5}, {"sampler": "ddim", "eta": 1.0}))
    for cfg, told in ((many, "takes 5 and 0"), (stochastic, f"and {stochastic.steps}: draw it by its own")):
        with pytest.raises(InputError, match=told):
            diffender.DIFFender(victim.defense.model, victim.defense.contexts, cfg)(photos[:2], noise)
    random = diffender.Purifier(torch.nn.Identity(), random=True)
    for defense in (victim.defense, random):
        with pytest.raises(InputError, match=r"no noise; draw it by defense.sample_noise.* diffender.WithFreshNoise"):
            defense(photos[:1], None)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(InputError, match=f"images of dtype {dtype}; they are torch.float32: convert them by"):
            victim(photos[:2].to(dtype), noise)
    task = diffender.Task(Undefended(classifier), photos[:1, :, :200], torch.tensor([1]), ["a"], 0)
    with pytest.raises(InputError, match=r"images of \(200, 224\) pixels; attacks take square ones"):
        diffender.AdvP(iters=1, eot=1)(task)
    assert victim(photos[:2, :, :200], noise).shape == (2, 1000), "the defence takes any size"


@pytest.fixture
def known(victim, classifier, photos):
    """One photograph that the defended classifier reads right, and its label."""
    x = photos[:1]
    return diffender.WithFreshNoise(victim), x, classifier(x).argmax(dim=1)


def attacked(known, adversarial) -> None:
    """Within the bound, and the same victim reads the clean photograph as before."""
    victim, x, y = known
    assert (adversarial - x).abs().max() <= EPS + 1e-5
    assert not torch.equal(adversarial, x)
    assert is_right(victim, x, y) == is_right(diffender.WithFreshNoise(victim.victim), x, y)


def test_foolbox(known):
    import foolbox

    victim, x, y = known
    fmodel = foolbox.PyTorchModel(victim, bounds=(0, 1), device=x.device)
    attacked(known, foolbox.attacks.LinfPGD(steps=3)(fmodel, x, y, epsilons=EPS)[1])


def test_torchattacks(known):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    victim, x, y = known
    attacked(known, torchattacks.PGD(victim, eps=EPS, steps=3)(x, y))


def test_art(known):
    pytest.importorskip("art", reason="adversarial-robustness-toolbox is not installed")
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    victim, x, y = known
    where = {"clip_values": (0, 1), "device_type": "cpu"}  # it would move the victim of all tests
    wrapped = PyTorchClassifier(victim, torch.nn.CrossEntropyLoss(), (3, 224, 224), 1000, **where)
    attack = ProjectedGradientDescent(wrapped, eps=EPS, max_iter=3, verbose=False)
    attacked(known, torch.from_numpy(attack.generate(x.numpy(), y.numpy())))


def test_autoattack(known):
    autoattack = pytest.importorskip("pyautoattack", reason="AutoAttack (pyautoattack) is not installed")
    victim, x, y = known
    attack = autoattack.AutoAttack(victim, norm="Linf", eps=EPS, version="rand", seed=0)
    attack.apgd.n_iter, attack.apgd.eot_iter, attack.apgd.n_restarts = 3, 2, 1
    adversarial = attack.run_standard_evaluation(x, y, batch_size=1)
    attacked(known, adversarial[0] if isinstance(adversarial, tuple) else adversarial)
