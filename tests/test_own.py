"""`diffender.benchmark` on models of other people: ten classes, random ones, a purifier of one's own."""

import copy
import importlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import diffender
import evaluate
from diffender.classifiers.dataset import Batch
from diffender.classifiers.imagenet import Classifier, ClassifierConfig
from diffender.defenses import DEFENSES, build
from diffender.defenses.hardened import Hardened
from diffender.defenses.jpeg import JPEG
from diffender.defenses.patchcleanser import PatchCleanser
from diffender.evaluation import certify
from diffender.evaluation.options import OURS, Options, is_ours, with_preset
from diffender.evaluation.records import read_records
from diffender.evaluation.run import refuse_changed, refuse_hidden_noise
from diffender.evaluation.verdicts import Plan
from diffender.noise import from_seed
from diffender.own import AnyModel, options_for, resolved, title
from diffender.pipeline import DIFFender
from diffender.report.__main__ import compare
from diffender.utils.code import code_digest
from diffender.utils.errors import InputError
from diffender.utils.images import save_png
from diffender.utils.options import change

FAST = {"iters": 3, "iters_undefended": 20, "curves": "off", "verdicts": 3}
ONE = FAST | {"iters": 1, "iters_undefended": 1}  # where the attack's strength does not matter
TEN = [f"class {i}" for i in range(10)]


class Bright(nn.Module):
    """Ten classes by the mean brightness of the image's middle; with `spread`, of a noisy one."""

    def __init__(self, spread: float = 0.0):
        super().__init__()
        self.spread = spread
        self.register_buffer("centres", torch.linspace(0, 1, 10))

    def forward(self, x):
        x = x + self.spread * torch.randn(x.shape)
        return -100 * (x[..., 16:48, 16:48].mean(dim=(1, 2, 3))[:, None] - self.centres).square()


@pytest.fixture
def images():
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (0.2 * x + torch.tensor([0.1, 0.4, 0.7])[:, None, None, None]).clamp(0, 1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def right(results, gradient):
    return next(r["single"]["right"] for r in results["rows"] if r["gradient"] == gradient)


def test_ten_classes(images, tmp_path):
    model = Bright()
    y = model(images).argmax(dim=1)
    results = diffender.benchmark(model, images, y, name="ten", area=0.4, names=TEN, **FAST)
    assert results["rows"][0]["single"]["accuracy"] == 1
    assert right(results, "transfer") < 3, "the attack must hurt"
    folder = tmp_path / "runs/ten"
    assert {f.name for f in folder.iterdir()} >= {"config.json", "per_image.jsonl", "results.json", "report.html"}
    assert TEN[y[0]] in (folder / "report.html").read_text("utf-8")
    assert json.loads((folder / "results.json").read_text("utf-8"))["names"] == TEN
    before = (folder / "per_image.jsonl").read_bytes()
    again = diffender.benchmark(model, images, y, name="ten", area=0.4, names=TEN, **FAST)
    assert again["rows"] == results["rows"]
    assert (folder / "per_image.jsonl").read_bytes() == before, "nothing is done twice"
    with pytest.raises(InputError, match="runs/ten holds a run with other settings"):
        diffender.benchmark(model, 0.9 * images, y, name="ten", area=0.4, **FAST)


def test_the_full_gradient_is_the_models_own(images, classifier):
    """As one says it of any model; DIFFender alone has a `full` beside others."""
    for victim in (AnyModel(Bright(), images), diffender.Defended(diffender.Purifier(nn.Identity()), classifier)):
        full, auto = (options_for(victim, {"grad": grad, "preset": "smoke"}, {}) for grad in ("full", "auto"))
        assert full == auto


def test_a_model_on_the_cpu_asks_no_gpu(images, monkeypatch):
    for name, answer in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("asked a GPU"))
    victim = AnyModel(Bright(spread=2.0), images)
    victim(images, victim.sample_noise(["a", "b", "c"], 0, "test"))


def test_a_model_on_a_gpu_draws_from_its_generator(monkeypatch):
    gpus = (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: gpus[device.index].get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: gpus[device.index].set_state(state))
    drawn = from_seed(5, lambda: torch.rand(3, generator=gpus[1]), torch.device("cuda:1"))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    for gpu, seed in zip(gpus, (1, 2), strict=True):
        assert torch.equal(gpu.get_state(), torch.Generator().manual_seed(seed).get_state()), "put back"


def test_rounding_is_not_randomness(images):
    """As on a GPU, where the same sum may end in another last bit."""

    class Rounds(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return Bright()(x) * (1 + 2**-22 * self.calls)

    assert not AnyModel(Rounds(), images).random
    assert AnyModel(Bright(spread=2.0), images).random


def test_a_model_may_change_its_images_in_place(images):
    class Halves(Bright):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    before = images.clone()
    victim = AnyModel(Halves(), images)
    assert not victim.random
    assert torch.equal(victim(images), Bright()(0.5 * before))
    assert torch.equal(images, before)


def test_a_random_model_knows_no_batch(images):
    victim = AnyModel(Bright(spread=2.0), images)
    ids = ["a", "b", "c"]
    noise = victim.sample_noise(ids, 0, "test")
    state = torch.get_rng_state()
    logits = victim(images, noise)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is put back"
    assert torch.equal(victim(images[1:2], victim.sample_noise(["b"], 0, "test"))[0], logits[1])
    assert not torch.equal(victim(images, victim.sample_noise(ids, 0, "test", 1)), logits)
    assert AnyModel(Bright(), images).sample_noise(ids, 0, "test") is None
    y = Bright()(images).argmax(dim=1)
    results = [
        diffender.benchmark(Bright(2.0), images, y, name=f"batch {n}", batch_size=n, eot=2, **FAST) for n in (1, 3)
    ]
    assert results[0]["rows"] == results[1]["rows"]


def test_every_purification_seed_and_purpose_of_a_random_model_has_its_noise(images):
    victim, ids = AnyModel(Bright(spread=2.0), images), ["a", "b", "c"]
    drawn = [victim.sample_noise(ids, *given) for given in ((0, "test"), (0, "test", 1), (1, "test"), (0, "attack"))]
    seen = [logits for _, logits in victim.looks(images, drawn)]
    assert all(torch.equal(logits, victim(images, noise)) for logits, noise in zip(seen, drawn, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_places_drawn_at_random_take_samples_of_a_model_without_noise(images):
    y, fast = Bright()(images).argmax(dim=1), FAST | {"iters": 1, "iters_undefended": 1}
    results = diffender.benchmark(Bright(), images, y, name="places", location="eot", **fast)
    assert "EOT 2," in results["setting"]
    with pytest.raises(InputError, match=r"--eot 7: Bright \(own\) draws no noise, so all samples are the same"):
        diffender.benchmark(Bright(), images, y, name="fixed", eot=7, **fast)
    assert not Path("runs/fixed").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_other_weights_is_told_to_be_float32(dtype, images):
    net = nn.Sequential(nn.Conv2d(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
    says = f"the model's weights are {str(dtype)[6:]}; benchmark takes float32: call .float..$"
    wrapped = diffender.Defended(
        diffender.Purifier(nn.Identity()), Classifier(net, ClassifierConfig("", 64, 64, (0, 0, 0), (1, 1, 1), ()))
    )
    for model in (net, wrapped):
        with pytest.raises(InputError, match=says):
            diffender.benchmark(model, images, [0, 1, 2])


def test_noise_that_no_seed_repeats_is_refused(images):
    class ByNumpy(Bright):
        numbers = np.random.default_rng(0)

        def forward(self, x):
            return super().forward(x) + 100 * self.numbers.random()

    with pytest.raises(InputError, match="the same image and the same noise in different ways; let it draw from torch"):
        diffender.benchmark(ByNumpy(), images, [0] * len(images), name="numpy", **FAST)
    assert not Path("runs/numpy").exists()


def test_hidden_noise_of_a_changed_defence_is_refused(target, images):
    class Noisy(DIFFender):
        def localize(self, x, noise, *given):
            found = super().localize(x, noise, *given)
            return found._replace(mask=torch.rand_like(found.mask).round())

    noisy = Noisy(target.defense.model, target.defense.contexts, target.defense.cfg)
    x = torch.rand(1, 3, 224, 224)
    with pytest.raises(InputError, match="the same image and the same noise in different ways"):
        refuse_hidden_noise(diffender.Defended(noisy, target.classifier), x)
    refuse_hidden_noise(target, x)


class Eraser(Bright):
    """Adds noise to images with many edges alone."""

    @staticmethod
    def noisy(x):
        rough = x.diff(dim=-1).abs().mean(dim=(1, 2, 3), keepdim=True) > 0.001
        return x + rough * torch.randn_like(x)

    def forward(self, x):
        return super().forward(self.noisy(x))


def test_what_is_random_at_patches_alone_is_random():
    x = torch.full((2, 3, 32, 32), 0.5)
    assert AnyModel(Eraser(), x).random
    assert not AnyModel(Bright(), x).random
    hidden = diffender.Defended(diffender.Purifier(Eraser.noisy), Bright())
    with pytest.raises(InputError, match="but has no noise to repeat that by; say Purifier.purify, random=True"):
        refuse_hidden_noise(hidden, x[:1])


def test_a_purifier_that_says_it_is_random_is_another_one():
    digests = {code_digest(diffender.Purifier(nn.Identity(), random=random)) for random in (False, True)}
    hooked = diffender.Purifier(nn.Identity())
    hooked.register_forward_hook(lambda module, args, out: out)
    assert len(digests | {code_digest(hooked)}) == 3


def test_runs_on_other_files_of_the_same_names_are_not_compared(tmp_path):
    for name, hashed in (("a", {"hash": "1"}), ("b", {"hash": "2"}), ("old", {})):
        record = {"id": "0", "label": 1, "defended": [1], "attacks": {}} | hashed
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "per_image.jsonl").write_text(json.dumps(record) + "\n")
    assert "| none | 100.0 % (1/1; 21-100) | 100.0 % (1/1; 21-100) |" in compare(tmp_path / "a", tmp_path / "old")
    with pytest.raises(InputError, match="are of different images"):
        compare(tmp_path / "a", tmp_path / "b")
    batch = Batch(["0"], torch.zeros(1, 3, 8, 8), torch.zeros(1), ["1"])
    refuse_changed(tmp_path / "a", [], read_records(tmp_path / "a"), batch)
    with pytest.raises(InputError, match="another file of the name 0; move the folder away"):
        refuse_changed(tmp_path / "b", [], read_records(tmp_path / "b"), batch)


def test_a_run_whose_patches_are_not_all_that_would_be_made_is_not_gone_on_with(tmp_path):
    batch = Batch(["0"], torch.zeros(1, 3, 8, 8), torch.zeros(1), [])
    plan = Plan("rhde", None, {"queries": None, "evade": None})
    old = {"0": {"id": "0", "attacks": {"rhde/transfer": {}, "rhde/queries": {}}}}
    with pytest.raises(InputError, match="other patches of 0 than are made today: rhde/evade; move the folder away"):
        refuse_changed(tmp_path, [plan], old, batch)
    old["0"]["attacks"]["rhde/evade"] = {}
    refuse_changed(tmp_path, [plan], old, batch)


def test_records_of_other_patches_stop_a_benchmark_that_goes_on(images):
    again = partial(diffender.benchmark, Bright(), images, [0, 1, 2], attack="none", curves="off", name="odd")
    again()
    path = Path("runs/odd/per_image.jsonl")
    path.write_text(path.read_text().replace('"attacks": {}', '"attacks": {"advp/full": {}}'))
    with pytest.raises(InputError, match="other patches of 00000 than are made today: advp/full"):
        again()


def test_a_model_is_left_as_it_was(images):
    """It is judged in evaluation mode, and looking whether it is random takes none of the caller's numbers."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), Bright())
    before = torch.get_rng_state()
    victim = AnyModel(model, images)
    assert not victim.random
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    AnyModel(Bright(spread=0.1), images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_purifier_of_ones_own(images, classifier, photos):
    class Dim(nn.Module):
        def forward(self, x):
            return 0.9 * x

    victim = diffender.Defended(diffender.Purifier(Dim()), classifier)
    y = classifier(photos[:1]).argmax(dim=1)
    results = diffender.benchmark(victim, photos[:1], y, gradient="bpda,auto", name="own", trust="off", **ONE)
    assert [r["gradient"] for r in results["rows"]] == ["", "transfer", "bpda", "auto", ""]
    assert results["defense"] == "Dim (own)"


def test_a_title_is_no_name_of_this_package(classifier, images):
    """So a class that is called Diffender is neither taken for DIFFender nor for any other defence."""

    def hardened(x):
        return x

    for own in (type("Diffender", (nn.Module,), {})(), hardened, JPEG(50), lambda x: x, type("A|B*<i>`", (), {})()):
        victim = diffender.Defended(diffender.Purifier(own), classifier)
        assert not is_ours(options_for(victim, {"preset": "smoke", "grad": None}, {}))
        assert title(victim).removesuffix(" (own)").isidentifier()
        assert title(victim) not in (*OURS, *DEFENSES)
    model = AnyModel(type("Hardened", (Bright,), {})(), images)
    assert not is_ours(options_for(model, {"preset": "smoke", "grad": None}, {}))


def test_the_defence_itself(target, classifier, photos):
    victim = diffender.Defended(target.defense, classifier)
    y = classifier(photos[:1]).argmax(dim=1)
    few = FAST | {"iters": 1, "iters_undefended": 5, "verdicts": 1, "eot": 1, "trust": "off"}
    results = diffender.benchmark(victim, photos[:1], y, gradient="bpda-mask", name="ours", **few)
    assert results["defense"] == "DIFFender"
    assert results["masks"]["advp/transfer"]["auc"] > 0.5
    again = diffender.benchmark(victim, photos[:1], y, gradient="bpda-mask", name="ours", **few)
    assert again["rows"] == results["rows"], "the same call goes on where it stopped"
    cleanser = diffender.PatchCleanser(classifier, area=0.05, masks=2)
    hardened = diffender.Defended(diffender.Hardened(victim.defense, cleanser), classifier)
    assert OURS[title(hardened)] == "DIFFender, hardened"


def test_a_classifier_that_looks_at_values_has_no_forecast_of_memory(target, classifier, photos, capsys):
    class Looks(nn.Module):
        def forward(self, x):
            assert x.max() < 100
            return classifier.net(x)

    victim = diffender.Defended(target.defense, Classifier(Looks(), classifier.cfg))
    few = ONE | {"verdicts": 1, "eot": 1, "trust": "off", "quiet": False}
    diffender.benchmark(victim, photos[:1], [0], gradient="bpda", name="looks", **few)
    assert "the memory needed is not known" in capsys.readouterr().out


class Noisy(nn.Module):
    def forward(self, x):
        return (x + 0.5 * torch.randn(x.shape)).clamp(0, 1)


def test_a_random_purifier(classifier, photos):
    """Every purification has a draw of its own, and all follow from the seed; undeclared, it is refused."""
    y = classifier(photos[:1]).argmax(dim=1)
    seen = []
    for n, seed in enumerate((0, 0)):
        torch.manual_seed(n)
        victim = diffender.Defended(diffender.Purifier(Noisy(), random=True), classifier)
        given = {"gradient": "bpda", "eot": 1, "trust": "off", "seed": seed, "name": f"noisy {n}"} | ONE
        diffender.benchmark(victim, photos[:1], y, **given)
        seen.append(json.loads((Path("runs") / f"noisy {n}" / "per_image.jsonl").read_text("utf-8"))["attacks"])
    assert seen[0]["advp/bpda"]["defended"] == seen[1]["advp/bpda"]["defended"]
    noise = victim.sample_noise(["a", "a"], 0, "test")
    assert torch.equal(*victim(photos[:1].repeat(2, 1, 1, 1), noise).split(1))
    assert not torch.equal(victim(photos[:1], noise[:1]), victim(photos[:1], victim.sample_noise(["a"], 0, "test", 1)))
    hidden = diffender.Defended(diffender.Purifier(Noisy()), classifier)
    with pytest.raises(InputError, match=r"say Purifier\(purify, random=True\)"):
        diffender.benchmark(hidden, photos[:1], y, gradient="bpda", **FAST)
    faint = diffender.Defended(diffender.Purifier(Noisy()), nn.Sequential(classifier, Scaled(1e-4)))
    with pytest.raises(InputError, match=r"say Purifier\(purify, random=True\)"):
        refuse_hidden_noise(faint, photos[:1])  # however little the logits tell of it


def test_a_random_purifier_with_masks(photos):
    def purify(x):
        mask = (torch.rand_like(x[:, :1]) > 0.9).float()
        return x * (1 - mask), mask

    defense = diffender.Purifier(purify, random=True)
    noise = defense.sample_noise(["a", "b"], 0, "test")
    out = defense(photos[:2], noise)
    assert torch.equal(out.image, photos[:2] * (1 - out.mask))
    assert torch.equal(defense(photos[1:2], noise[1:]).mask, out.mask[1:])


def test_attacks_without_gradients_take_any_module(images):
    y = Bright()(images).argmax(dim=1)
    model = Bright().train()
    given = {"attack": "rhde", "queries": 20, "queries_undefended": 20, "curves": "off", "trust": "quick"}
    results = diffender.benchmark(model, images, y, **given)
    assert results["trust"], "an option that is given wins"
    assert [r["gradient"] for r in results["rows"]] == ["", "transfer", "queries", ""]
    assert model.training, "the caller's model goes on as it was"
    (report,) = Path("runs").glob("*/report.html")
    assert "undefended classifier" not in report.read_text("utf-8")
    assert "one fixed noise" in (report.parent / "table.md").read_text("utf-8")


def test_runs_on_other_images_are_not_compared(images):
    y = Bright()(images).argmax(dim=1)
    for name, x in (("a", images), ("b", images.flip(3)), ("c", images)):
        diffender.benchmark(Bright(), x, y, attack="none", curves="off", name=name, verdicts=1 + (name == "c"))
    assert compare(Path("runs/a"), Path("runs/c"))
    with pytest.raises(InputError, match="are of different images"):
        compare(Path("runs/a"), Path("runs/b"))


class Column(nn.Module):
    def forward(self, logits):
        return logits[:, :1]


def test_wrong_input_is_one_clear_line(images, classifier):
    y, own = [0, 1, 2], diffender.Defended(diffender.Purifier(nn.Identity()), Bright())
    for model, given, says in (
        (Bright(), {"names": TEN[:2]}, "a list of 10 strings, one for each class"),
        (Bright(), {"names": []}, "names are ..; they are a list of 10 strings"),
        (Bright(), {"names": list(range(10))}, "names are .0, 1, .*; they are a list of 10 strings"),
        (Bright(), {"names": np.array(TEN)}, "they are a list of 10 strings"),
        (Bright(), {"names": "cat"}, "a list of 10"),
        (Bright(), {"names": 4}, "names are 4; they are a list of 10"),
        (Bright(), {"name": ""}, "--name is ; it is a folder within runs/: give a name of 1 to 255 bytes"),
        (Bright(), {"name": "a\0b"}, "--name is a.0b; it is a folder within runs/"),
        (Bright(), {"name": "a/" + 86 * "\u20ac"}, "it is a folder within runs/: give a name of 1 to 255 bytes"),
        (Bright(), {"gradient": "bpda"}, "has its own gradient alone, auto or full"),
        (Bright(), {"iter": 3}, "option iter is unknown .nearest: iters.; options are"),
        (Bright(), {"theta": 3.0}, "option theta is settled in the model that you give"),
        (Bright(), {"device": "cpu"}, "option device belongs to evaluate.py alone"),
        (Bright(), {"attack": None}, "attack is None; it must be of type str"),
        (Bright(), {"budget": "lapptop"}, "budget is 'lapptop'; choose one of .*nearest: laptop"),
        (Bright(), {"shape": "triangle"}, "unknown shape 'triangle'"),
        (Bright(), {"iters": "3"}, "iters is '3'; it must be of type int"),
        (Bright(), {"iters": -1}, "iters is -1; allowed is at least 1"),
        (Bright(), {"area": 2}, "area is 2; allowed is from 0.0005 to 0.9"),
        (nn.Flatten(0), {}, "the model returns a Tensor .24576,."),
        (nn.Sequential(Bright(), Column()), {}, "has logits .B, 1.; classes are 2 or more: return a logit"),
        (nn.Identity(), {}, "it maps images .B, 3, H, W. to logits"),
        (nn.Sequential(Bright(), nn.Softmax(dim=1)), {}, "the model returns probabilities; return logits"),
        (lambda x: x, {}, "the model is a function; give a torch.nn.Module"),
        (own, {}, "wrap it so that its size and normalisation are known"),
        (
            type("Louder", (diffender.Defended,), {"forward": scaled_by(2)})(own.defense, classifier),
            {},
            "overrides forward but not",
        ),
        (own.defense, {}, "a defence alone has no classes"),
    ):
        with pytest.raises(InputError, match=says):
            diffender.benchmark(model, images, y, **given)
    for labels in ([True, False, True], ["a", "b", "c"]):
        with pytest.raises(InputError, match="one whole number for each of the 3 images"):
            diffender.benchmark(Bright(), images, labels)
    with pytest.raises(InputError, match="images are a ndarray"):
        diffender.benchmark(Bright(), images.numpy(), y)
    for labels in ([0, 1], [0, 1, 10], [0, 1, -1], [0.0, 1.0, 2.0]):
        with pytest.raises(InputError, match="one whole number for each of the 3 images, from 0 to 9"):
            diffender.benchmark(Bright(), images, labels)
    with pytest.raises(InputError, match="divide by 255"):
        diffender.benchmark(Bright(), 255 * images, [0, 1, 2])
    with pytest.raises(InputError, match="nearest: advp"):
        diffender.benchmark(Bright(), images, [0, 1, 2], attack="advq")
    with pytest.raises(InputError, match="is read by"):
        diffender.benchmark(Bright(), images, [0, 1, 2], queries=5)


def test_a_run_goes_on_with_the_same_labels_and_settings_alone(images, target, classifier):
    opts, y = with_preset(Options()), torch.tensor([0, 1, 2])
    usual = resolved(opts, AnyModel(Bright(), images), images, y)
    assert resolved(opts, AnyModel(Bright(), images), images, y) == usual
    assert resolved(opts, AnyModel(Bright(), images), images, y + 1) != usual
    for name, value in {"seed": 1, "area": 0.1, "iters": 1, "eot": 9, "verdicts": 9}.items():
        assert resolved(change(opts, **{name: value}), AnyModel(Bright(), images), images, y) != usual, name
    assert "jedi" in resolved(opts, build("jedi", target), images, y)["sha256"], "its network is no part of the model"
    plain, told = target.defense, []
    others = DIFFender(plain.model, plain.contexts, replace(plain.cfg, theta=3.5))
    cleansers = [PatchCleanser(classifier, area, masks) for area, masks in ((0.05, 2), (0.05, 3), (0.02, 2))]
    for defense in (plain, others, *(Hardened(plain, cleanser) for cleanser in cleansers)):
        told.append(resolved(opts, diffender.Defended(defense, classifier), images, y))
    assert all(a != b for i, a in enumerate(told) for b in told[:i])


def test_folders_of_ones_own_classes(tmp_path, call, photos):
    """A folder for each class, a network with so many outputs: attacked from the command line, with their names,
    however long and whatever their bytes."""
    net = timm.create_model("efficientnet_lite0", num_classes=2)
    net.classifier.bias.data[0] = 100.0  # it sees cats everywhere
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for name, photo in zip(("cats", "dogs"), photos, strict=False):
        save_png(photo, tmp_path / "pets" / name / "a.png")
    (tmp_path / "pets/.ipynb_checkpoints").mkdir()
    cat, odd = tmp_path / "pets/cats/a.png", "b" * 230
    with suppress(OSError):  # not every file system takes such names
        cat.rename(os.fsdecode(os.fsencode(cat.parent) + b"/\xff" + odd.encode() + b".png"))
    common = ["--data", "pets", "--classifier", "efficientnet_lite0", "--classes", "2"]
    weights = ["--classifier-weights", "net.safetensors"]

    def run(*args, main=evaluate.main):
        code, _, error = call(main, "evaluate.py", *args)
        return code, error

    fast = ["--draws", "1", "--steps", "1", "--verdicts", "1", "--curves", "off", "--quiet", "--no-keep"]
    code, error = run(*common, *weights, *fast, "--attack", "none", "--trust", "off", "--name", "own")
    assert code == 0, error
    results = json.loads((tmp_path / "runs/own/results.json").read_text("utf-8"))
    assert results["names"] == ["cats", "dogs"]
    assert results["ids"] == ["cats/a" if cat.exists() else f"cats/\\xff{odd}"]
    code, error = run(*common, *weights, "--images", "1", "--masks", "2", "--out", "certified", main=certify.main)
    assert code == 0, error
    assert json.loads((tmp_path / "certified/results.json").read_text("utf-8"))["rows"][0]["n"] == 1
    code, error = run(*common)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "2 classes of your own need --classifier-weights" in error
    with pytest.raises(InputError, match="knows 2 classes, not 1000; give --classes 2"):
        diffender.load_classifier("efficientnet_lite0", "net.safetensors")
    code, error = run(*common, *weights, "--classes", "3")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "pets has 2 folders (cats, dogs); --classes 3 wants one for each class" in error
    (tmp_path / "labels.csv").write_text("file,label\npets/dogs/a.png,2\n")
    code, error = run("--data", "labels.csv", "--classes", "2", *weights)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "line 2: label '2'; labels are 0 to 1" in error


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Shifted(Scaled):
    def forward(self, x):
        return self.by * x + 0.1


def test_settings_of_our_own_modules_count(classifier, target):
    """What they are asked for differs, and their weights do not."""
    model, smaller, other = target.defense.model, copy.copy(classifier), copy.copy(target.defense.model.unet)
    smaller.cfg = replace(classifier.cfg, size=128)
    other.cfg = replace(other.cfg, prediction="epsilon")
    plain, cleansers = target.defense, [PatchCleanser(c, 0.05) for c in (classifier, smaller)]
    pairs = [(classifier, smaller), (model.unet, other), [Hardened(plain, c) for c in cleansers]]
    for one, two in pairs:
        assert code_digest(one) == code_digest(one) != code_digest(two)


def test_what_tensors_do_not_tell_of_a_model_counts(classifier):
    """A run goes on only with the same attributes and methods, of modules, functions and our own purifiers."""
    modules = [Scaled(1), Scaled(2), Shifted(1)]
    purifiers = [*modules, JPEG(75), JPEG(50), lambda x: x.sin(), lambda x: x.cos(), lambda x: 0.5 * x]
    victims = [*modules, *(diffender.Defended(diffender.Purifier(p), classifier) for p in purifiers)]
    told = [code_digest(v) for v in victims]
    assert len(set(told)) == len(told)
    assert told == [code_digest(v) for v in victims]


@dataclass(slots=True)
class Gain:
    by: float


def test_attributes_in_slots_count():
    one, two, again = (Scaled(1) for _ in range(3))
    one.gain, two.gain, again.gain = Gain(1.0), Gain(2.0), Gain(1.0)
    assert code_digest(one) == code_digest(again) != code_digest(two)


def scaled_by(k):
    return lambda x: x * k


def by_default(k):
    def purify(x, k=k, *, shift=k):
        return k * x + shift

    return purify


def within(body):
    """A purifier whose inner function has this body."""
    found = {}
    exec(f"def purify(x):\n def inner(y):\n  return {body}\n return inner(x)", found)
    return found["purify"]


def held(value):
    module = Scaled(1)
    module.held = value
    return module


class Plain:
    """No module, but an object that can be called."""

    def __init__(self, value):
        self.value = value

    def __call__(self, x):
        return self.value * x


SETTING, HELPER = 1, scaled_by(1)


def by_globals(x):
    return HELPER(x) * SETTING


@pytest.mark.parametrize(
    "make",
    [
        scaled_by,
        by_default,
        lambda k: within(f"y * {k}"),
        lambda k: type("Derived", (type("Base", (Scaled,), {"forward": scaled_by(k)}),), {})(1),
        lambda k: type("WithConstant", (Scaled,), {"constant": k})(1),
        lambda k: held([k]),
        lambda k: held({"k": k}),
        lambda k: held({k}),
        lambda k: held(torch.tensor(k)),
        lambda k: held(np.array([k])),
        lambda k: held([Scaled(k)]),
        lambda k: held(partial(scaled_by, k)),
        lambda k: held(SimpleNamespace(k=k)),
        lambda k: held(JPEG(k).__call__),
        lambda k: nn.Sequential(nn.MaxPool2d(k)),
        Plain,
    ],
)
def test_what_a_function_or_module_holds_counts(make):
    """Twice made with the same value it is the same, with another it is another."""
    one, again, two = (code_digest(diffender.Purifier(make(k))) for k in (1, 1, 2))
    assert one == again != two


@pytest.mark.parametrize(("place", "counts"), [("my-packages", True), ("lib/site-packages", False)])
def test_code_of_the_users_own_counts_wherever_it_lies(place, counts, tmp_path, monkeypatch):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / place)
    name, told = f"own_{'in' * counts}side", []
    for factor in (1, 2):
        code = f"class Purify:\n    def __call__(self, x):\n        return x * {factor}\n"
        (tmp_path / place / f"{name}.py").write_text(code)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        told.append(code_digest(diffender.Purifier(importlib.import_module(name).Purify())))
    assert (told[0] != told[1]) is counts


def test_the_order_of_a_set_does_not_count():
    """It follows from how it was filled where hashes collide, and differs between processes where it is of words."""
    assert list(frozenset([0, 8])) != list(frozenset([8, 0]))
    for a, b in ((within("y in {0, 8}"), within("y in {8, 0}")), (held({0, 8}), held({8, 0}))):
        assert code_digest(diffender.Purifier(a)) == code_digest(diffender.Purifier(b))


def test_addresses_that_torch_compile_leaves_do_not_count():
    one, two = Scaled(1), Scaled(1)
    one._torchdynamo_wrapper_id, two._torchdynamo_wrapper_id = id(one), id(two)
    assert code_digest(one) == code_digest(two)


@pytest.mark.parametrize(("name", "value"), [("SETTING", 2), ("HELPER", scaled_by(2)), ("HELPER", lambda x: x)])
def test_what_a_function_reads_of_its_module_counts(name, value, monkeypatch):
    victim = diffender.Purifier(by_globals)
    before = code_digest(victim)
    monkeypatch.setitem(globals(), name, value)
    assert code_digest(victim) != before


def test_an_attack_of_ones_own_counts_by_its_code(monkeypatch, images):
    """One that is entered again as another class does not go on with the results of the first."""
    opts, victim, y = with_preset(Options(attack="mine")), AnyModel(Bright(), images), torch.tensor([0, 1, 2])

    def entered(cls):
        monkeypatch.setitem(diffender.ATTACKS, "mine", cls)
        return resolved(opts, victim, images, y)

    one, two = (type("Mine", (diffender.AdvP,), {"towards": scaled_by(k)}) for k in (1, 2))
    assert entered(one) == entered(one) != entered(two)
    assert entered(diffender.AdvP) != entered(diffender.LaVAN)


def test_windows_take_square_images_alone(target, classifier):
    """No window would cover the rest of another one, and a certificate would be false."""
    cleanser = PatchCleanser(classifier, area=0.05, masks=2)
    hardened, x = Hardened(target.defense, cleanser), torch.rand(1, 3, 128, 64)
    noise = hardened.sample_noise(["a"], 0, "a")
    for call in (lambda: hardened(x, noise), lambda: cleanser.certified_places(x[0], 1), lambda: cleanser(x[0])):
        with pytest.raises(InputError, match="windows cover square images, and this one is of .128, 64. pixels; crop"):
            call()


def test_windows_ask_the_classifier_that_answers(target, classifier):
    """A certificate for another one's answers would be none."""
    windows = PatchCleanser(copy.copy(classifier), 0.05)
    with pytest.raises(InputError, match="PatchCleanser holds another classifier than Defended"):
        diffender.Defended(Hardened(target.defense, windows), classifier)


def test_purifiers_that_do_not_fit_are_named(classifier, images):
    with pytest.raises(InputError, match="the defence is a Scaled, without sample_noise; wrap it: diffender.Purifier"):
        diffender.Defended(Scaled(1), classifier)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("purify", "says"),
    [
        (lambda x: None, "returns a NoneType; it returns a tensor of images"),
        (lambda x: [x], "returns a list; it"),
        (lambda x: (x, x, x), "returns a tuple of 3; it"),
        (lambda x: (None, x[:, :1]), "returns a tuple of 2 that holds a NoneType; it"),
        (lambda x: (x, "mask"), "returns a tuple of 2 that holds a str; it"),
        (lambda x: x.numpy(), "returns a ndarray; it"),
        (
            lambda x: x[..., 1:],
            "makes images .1, 3, 64, 63., torch.float32, cpu of images .1, 3, 64, 64.; return images",
        ),
        (lambda x: x.double(), "torch.float64, cpu of .*; return images .1, 3, 64, 64., torch.float32, cpu$"),
        (lambda x: (x, x[:, :1] > 1), "makes masks .1, 1, 64, 64., torch.bool"),
        (lambda x: (x, x[:, 0]), "makes masks .1, 64, 64., torch.float32, cpu of .*; return masks .1, 1, 64, 64., "),
        (lambda x: (x, x), "makes masks .1, 3, 64, 64., torch.float32"),
        (lambda x: (x, x[:, :1, 1:]), "makes masks .1, 1, 63, 64."),
        (lambda x: 255 * x, "images with values in .*; they lie in .0, 1.: divide by 255$"),
        (lambda x: (x, 255 * x[:, :1]), "masks with values in"),
    ],
)
def test_what_a_purifier_returns_is_checked(purify, says, random, images):
    defense = diffender.Purifier(purify, random=random)
    with pytest.raises(InputError, match=says):
        defense(images[:1], defense.sample_noise(["a"], 0, "test"))


def test_a_purifier_may_return_no_mask_and_change_its_images_in_place(images):
    x = images.clone()
    out = diffender.Purifier(lambda x: (x.mul_(0.5), None))(x)
    assert torch.equal(x, images)
    assert torch.equal(out.image, 0.5 * images)
    assert out.mask is None
