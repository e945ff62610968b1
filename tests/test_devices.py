"""A second device where there is none: tensors that say they lie on `lazy` and hold their values here. Everything runs,
and what mixes devices in one operation raises, as on a GPU."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from diffender import factory
from diffender.attacks import ATTACKS
from diffender.attacks.expectation import Task
from diffender.classifiers.imagenet import Classifier
from diffender.config import EMBEDDED, Backward, ModelOptions
from diffender.defenses import DEFENSES, build
from diffender.evaluation.workers import own_device
from diffender.pipeline import Defended, DIFFender
from diffender.pretrain import stages
from diffender.pretrain.__main__ import train
from diffender.pretrain.options import Training
from diffender.stable_diffusion.model import MODELS, LatentDiffusion
from diffender.weights.loading import WEIGHTS, ready
from diffender.weights.prompts import contexts_for

FEW = {"hardened": ":masks=2", "diffpure": ":steps=1", "rhde": {"queries": 24, "population": 4, "iters": 1}}
FEW |= {"sparse-rs": {"queries": 20}, "advp": {"iters": 1, "eot": 2, "restarts": 2}, "lavan": {"iters": 1, "eot": 2}}
FEW |= {"gdpa": FEW["lavan"], "noise": {}, "grey": {}, "crop": {}}


class There(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda cls, func, *_: pytest.fail(f"{func} outside of the fixture"))
    data = property(lambda self: self.detach(), lambda self, new: setattr(self, "here", new.here))
    tolist = lambda self: self.here.tolist()  # noqa: E731

    def __new__(cls, here: Tensor):
        made = Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), dtype=here.dtype, device="lazy")
        made.here = here
        return made


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs, copies = str(func), dict(kwargs or {}), "copy_" in str(func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = any(isinstance(t, There) for t in tensors[: 1 if copies else None])
        if kwargs.get("device") is not None and (there := torch.device(kwargs["device"]).type == "lazy"):
            kwargs["device"] = "cpu"
        elif there and not copies and "device" not in kwargs:
            loose = torch.Tag.pointwise in func.tags or "fill" in name  # numbers may lie anywhere, as may indices
            strict = tensors[:1] if "aten.index" in name and isinstance(tensors[0], There) else tensors
            if any(not isinstance(t, There) and t.ndim > (0 if loose else -1) for t in strict):
                raise RuntimeError(f"{name} of tensors on two devices")
        assert not (there and any(isinstance(a, Generator) for a in (*args, *kwargs.values()))), "a CPU's generator"
        out = func(*tree_map_only(There, lambda t: t.here, args), **tree_map_only(There, lambda t: t.here, kwargs))
        first = func._schema.arguments[0].alias_info if func._schema.arguments else None
        return args[0] if first and first.is_write else tree_map_only(Tensor, There, out) if there else out


@pytest.fixture(scope="module")
def moved(target, make=torch.tensor):
    with pytest.MonkeyPatch.context() as patch, SecondDevice():
        patch.setattr(torch, "lazy", torch.cpu, raising=False)  # recomputation asks for the device's module
        patch.setattr(torch, "tensor", lambda *a, device="cpu", **k: make(*a, **k).to(device))  # is not dispatched
        yield copy.deepcopy(target).to("lazy")


def test_devices_do_not_mix(moved):
    x = torch.ones(2, 3, device="lazy")
    assert (x + torch.tensor(1))[torch.tensor([0])].tolist() == [[2, 2, 2]]
    for wrong in (lambda: x + x.cpu(), lambda: x.cpu()[x[0].long()], lambda: torch.stack([x, x.cpu()]), x.numpy):
        with pytest.raises(RuntimeError, match="two devices|numpy"):
            wrong()


@pytest.mark.parametrize("name", [n for n in DEFENSES if n not in ("none", "vae")])
def test_every_defence_answers_the_same_there(moved, target, pasted, name):
    here, there = (build(name + FEW.get(name, ""), victim) for victim in (target, moved))
    noises = (victim.sample_noise(["a"], 0, "test") for victim in (here, there))
    assert torch.allclose(here(pasted, next(noises)), there(pasted.to("lazy"), next(noises)).cpu(), atol=1e-3)


@pytest.mark.parametrize(("mode", "sampler"), [("surrogate", "ddim"), ("full+loc", "dpmpp"), ("evade", "dpmpp")])
def test_every_gradient(moved, pasted, mode, sampler):
    """Between them, every line of the pass: with noise in the steps, with guidance, with and without recomputation."""
    cfg = replace(moved.defense.cfg, sampler=sampler, guidance=2.0, eta=0.5 if sampler == "ddim" else 0.0)
    victim = Defended(DIFFender(moved.defense.model, moved.defense.contexts, cfg), moved.classifier, Backward(mode))
    moved.defense.model.keep = mode == "full+loc"
    x, noise = pasted.to("lazy").requires_grad_(), victim.sample_noise(["a"], 0, "test")
    logits, penalty = victim.with_penalty(x, noise, torch.ones_like(x[:, :1]))
    assert torch.autograd.grad(logits.sum() + penalty.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["empty", "manual", "tuned"])
def test_contexts_are_made_where_the_model_is(moved, kind):
    assert {c.device.type for c in contexts_for(kind, moved.defense.model) if c is not None} == {"lazy"}


class Colour(torch.nn.Module):
    """As cheap a victim as there is: the mean colour and some noise, on the noise's device."""

    def __init__(self, sample_noise):
        super().__init__()
        self.sample_noise = sample_noise

    def forward(self, x, noise):
        return x.mean(dim=(2, 3)) + noise.image[:, :3].mean(dim=(2, 3))


@pytest.mark.parametrize("name", [n for n in ATTACKS if n != "ready"])
def test_every_attack(moved, photos, name):
    attack, y = ATTACKS[name](**FEW[name]), torch.zeros(2, dtype=torch.long, device="lazy")
    task = Task(Colour(moved.sample_noise), photos[:2].to("lazy"), y, ["a", "b"], 0)
    again = attack(task, init=attack(task).state.to("lazy"))
    assert {again.image.device.type, again.mask.device.type} == {"lazy"}


def test_a_classifier_is_where_its_network_is(moved, pasted):
    made = Classifier(moved.classifier.net, moved.classifier.cfg)
    assert made(pasted.to("lazy")).tolist() == moved.classifier(pasted.to("lazy")).tolist()


def test_half_precision_is_of_official_models_on_a_gpu_where_nothing_else_is_asked():
    cpu, gpu, official = torch.device("cpu"), torch.device("cuda"), ModelOptions(model="sd15-inpainting")
    assert factory.pick_dtype(official, gpu) == torch.bfloat16
    assert factory.pick_dtype(official, cpu) == factory.pick_dtype(ModelOptions(), gpu) == torch.float32
    assert factory.pick_dtype(replace(official, dtype="float16"), gpu) == torch.float16
    ours = ModelOptions(weights=str(WEIGHTS / "tiny.safetensors"))
    assert factory.pick_dtype(ours, gpu) == torch.float32, "a file of ours, whatever its name"


def test_the_gpu_that_is_picked_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cpu"):
        assert factory.pick_device(name) == torch.device(name)
    assert factory.pick_device(torch.device("cpu")).type == "cpu"
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("do", [lambda _: factory.pick_device("cpu"), lambda model: ready(model, EMBEDDED)])
def test_cudnn_is_exact_and_repeatable(monkeypatch, do):
    with torch.device("meta"):
        model = LatentDiffusion(MODELS["tiny"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    do(model)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == (False, True)


def test_training_keeps_the_number_of_its_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(factory, "pick_device", torch.device)
    monkeypatch.setattr(stages, "train_vae", lambda recipe: pytest.fail(str(recipe.device)))
    with pytest.raises(pytest.fail.Exception, match="cuda:1"):
        train("vae", Training(data=tmp_path, out=tmp_path, device="cuda:1"))


def test_processes_share_gpus_where_there_are_fewer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert [own_device(name) for name in ("auto", "cpu")] == ["cuda:1", "cpu"]
