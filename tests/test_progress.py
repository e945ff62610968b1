"""Curves of a run, and numbers sent along the way."""

import json
import sys
import types
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from diffender.attacks.expectation import Task
from diffender.evaluation import curves
from diffender.evaluation.forecast import COST, Forecast, announce
from diffender.evaluation.memory import left_in_container
from diffender.evaluation.options import Options, with_preset
from diffender.evaluation.records import append_records
from diffender.evaluation.verdicts import Plan
from diffender.pipeline import Defended, DIFFender
from diffender.report.page import charts
from diffender.utils.energy import counters, watt_hours
from diffender.utils.errors import InputError
from diffender.utils.images import save_png
from diffender.utils.options import change
from diffender.utils.progress import TRACKERS, bar
from tests.conftest import SMALL


def test_curves_agree_with_the_verdicts_and_are_resumed(tmp_path, monkeypatch, here):
    monkeypatch.setattr(curves, "AREAS", (0.01, 0.1))
    args = [*SMALL, "--images", "1", "--curves", "all", "--theta", "2.5", "--quiet", "--name", "c"]
    code, _, error = here(*args)
    assert code == 0, error
    folder = tmp_path / "runs/c"
    results = json.loads((folder / "results.json").read_text())
    theta, area = results["curves"]["theta"], results["curves"]["area"]
    own = theta["at"].index(2.5)
    rows = {f"{r['attack']}/{r['gradient']}" if r["gradient"] else r["attack"]: r for r in results["rows"]}
    for name in ("none", "advp/transfer", "advp/evade"):
        assert theta[name][own] == rows[name]["single"]["accuracy"], "the same images, noise and threshold"
    assert len(area["advp/undefended"]) == len(area["advp/evade"]) == 2
    records = [json.loads(line) for line in (folder / "per_image.jsonl").read_text().splitlines()]
    assert len(charts(results, records)) == 4
    assert len((folder / "curves-all.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(curves, "over_theta", None)  # what is there is not done again
    assert here(*args)[0] == 0
    assert json.loads((folder / "results.json").read_text())["curves"] == results["curves"]


def test_a_curve_uses_its_own_thresholds(target, pasted, monkeypatch):
    monkeypatch.setattr(curves, "THRESHOLDS", (1.5, 4.0))
    defense = target.defense
    noise = defense.sample_noise(["a"], 0, "test")
    low, high = curves.at_thresholds(defense, pasted, noise)
    for image, theta in ((low, 1.5), (high, 4.0)):
        alone = DIFFender(defense.model, defense.contexts, replace(defense.cfg, theta=theta))
        assert torch.allclose(image, alone(pasted, noise).image[0], atol=1e-5)
    assert (low - high).abs().max() > 0.1


def test_no_curve_over_theta_of_masks_that_come_from_elsewhere(target, pasted):
    own = type("Mine", (DIFFender,), {"localize": lambda self, *_: None})
    defense = own(target.defense.model, target.defense.contexts)
    task = Task(Defended(defense, target.classifier), pasted, torch.zeros(1).long(), ["a"], 0)
    assert curves.over_theta(task, {"label": 0, "attacks": {}}, None) == {}


@dataclass(frozen=True)
class Sized:
    """An attack with a size."""

    area: float = 0.05


def test_curves_are_of_the_last_gradient_and_under_the_first_noise_of_the_verdicts(target, monkeypatch, tmp_path):
    made, noises, shown = [], [], []

    def craft(plan, *_):
        made.append((plan.base, {kind: attack for kind, (attack, _) in plan.adaptive.items()}))
        return []

    def at_thresholds(_, x, noise):
        noises.append(noise)
        shown.append(x)
        return x.expand(len(curves.THRESHOLDS), -1, -1, -1)

    monkeypatch.setattr(curves, "craft", craft)
    monkeypatch.setattr(curves, "at_thresholds", at_thresholds)
    patched = torch.ones(1, 3, 32, 32)
    for name in ("f", "f_mask"):
        save_png(patched[0], tmp_path / f"adv/advp/evade/{name}.png")
    task = Task(target, torch.rand(1, 3, 32, 32), torch.zeros(1).long(), ["a"], 0)
    plan = Plan("advp", Sized(), {kind: (Sized(), None) for kind in ("bpda", "evade")})
    curves.over_area(task, plan)
    curves.over_theta(task, {"label": 0, "file": "f", "attacks": {"advp/evade": {}}}, tmp_path)
    assert made == [(Sized(area), {"evade": Sized(area)}) for area in curves.AREAS]
    assert torch.equal(noises[0].draws, target.sample_noise(["a"], 0, "verdict", 0).draws)
    assert torch.equal(torch.cat(shown), torch.cat([task.x, patched])), "clean, then attacked"


class Turned:
    """A defence of images that are logits: it turns them round."""

    def sample_noise(self, *_):
        return None

    def undefended(self):
        return "the classifier alone"

    def bare(self, x):
        return x

    def __call__(self, x, noise):
        return x.flip(1)


def test_patches_of_every_size_are_made_without_the_defence_and_read_with_it_and_without(monkeypatch):
    victims, made = [], SimpleNamespace(image=torch.tensor([[0.0, 1.0]]))
    found = [("transfer", made, 0), ("evade", made, 0)]
    monkeypatch.setattr(curves, "craft", lambda plan, task, *_: victims.append(task.victim) or found)
    task = Task(Turned(), torch.tensor([[1.0, 0.0]]), torch.ones(1).long(), ["a"], 0)
    right = curves.over_area(task, Plan("advp", Sized(), {}))
    assert right == {"advp/transfer": [False] * 4, "advp/undefended": [True] * 4, "advp/evade": [False] * 4}
    assert victims == ["the classifier alone"] * 4


def test_a_curve_is_of_the_images_asked_for(tmp_path):
    done = [{"id": name, "theta": {"none": [float(name == "a")]}} for name in "ab"]
    append_records(tmp_path / "curves-theta.jsonl", done)
    task = Task(None, None, None, ["a"], 0)
    assert curves.draw_curves("theta", task, [], [{"id": "a"}], tmp_path, None)["theta"]["none"] == [1.0]


def test_a_forecast_counts_the_gradients_that_are_taken(capsys):
    """Of the paper's budget with every gradient: transfer takes none on the defence."""
    opts = with_preset(Options(preset="paper", grad="all"))
    one = Forecast([{"clean": 1.0}], 0.0, dict.fromkeys(COST, 0.5), (0, ""))
    announce(opts, [one])
    assert f"that is {2 * 6 * 0.5:.1f} s an image and step" in capsys.readouterr().out
    announce(opts, [one, one])
    assert capsys.readouterr().out == "2 experiments, about 2 seconds\n"


def test_a_bar_within_another_moves_no_cursor_in_a_file(capsys):
    for _ in bar([1], "outer"):
        list(bar([1], "inner"))
    said = capsys.readouterr().err
    assert "outer" in said and "inner" in said and "\x1b" not in said


def test_a_container_has_less_than_its_machine(tmp_path):
    assert left_in_container(tmp_path) == sys.maxsize, "no group of processes"
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_container(tmp_path) == sys.maxsize, "no limit"
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert left_in_container(tmp_path) == 8000 - (5000 - 3000)


def test_energy_is_counted_where_the_machine_tells(tmp_path):
    def tell(*microjoules):
        for name, value in zip(("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"), microjoules, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "energy_uj").write_text(f"{value}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("10000000000\n")
        return counters(tmp_path)

    before, after = tell(1_000_000_000, 9_900_000_000, 5), tell(4_600_000_000, 100_000_000, 900_000_000)
    assert watt_hours(before, after) == pytest.approx((3600 + 200) / 3600), "one has begun anew; a part is not added"
    assert watt_hours({}, {}) is None


def test_options_stay_in_the_order_given():
    """Not in that of a set, which is another one in each process: Table 2 names its prompts by them."""
    given = {"theta": 2.5, "noise_ratio": 0.3, "guidance": 2.0, "draws": 4, "sigma": 0.5, "dilation": 5, "steps": 9}
    for order in (list(given), sorted(given), sorted(given, reverse=True)):
        assert list(change(Options(), **{k: given[k] for k in order}).target.defense.method) == order


def test_wandb_hears_what_is_logged(tmp_path, monkeypatch):
    heard = []
    run = types.SimpleNamespace(log=lambda values, step: heard.append((step, values)))
    fake = types.SimpleNamespace(init=lambda **given: heard.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    TRACKERS["wandb"](tmp_path / "a", {"seed": 0})({"loss": 1.0}, 3)
    assert (heard[0]["name"], heard[0]["config"]) == ("a", {"seed": 0})
    assert heard[1] == (3, {"loss": 1.0})


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--track wandb needs a package that is not here; pip install wandb"):
        TRACKERS["wandb"](tmp_path, {})


def test_accuracies_reach_a_tracker_after_each_image(monkeypatch, here):
    heard = []
    run = types.SimpleNamespace(log=lambda values, step: heard.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    code, _, error = here(*SMALL, "--attack", "none", "--track", "wandb", "--name", "t")
    assert code == 0, error
    assert [step for step, _ in heard] == [1, 2]
    assert heard[-1][1]["none/all/single"] in (0, 0.5, 1)


def test_numbers_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    TRACKERS["tensorboard"](tmp_path, {"seed": 0})({"loss": 1.0}, 3)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("loss")] == [3]
