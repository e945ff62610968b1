"""Curves of a run, and numbers sent along the way."""

import json
import sys
import types

import pytest

from diffender.evaluation import curves
from diffender.report.page import charts
from diffender.utils.errors import InputError
from diffender.utils.progress import TRACKERS
from tests.test_scripts import SMALL, here


def test_curves_agree_with_the_verdicts_and_are_resumed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(curves, "AREAS", (0.01, 0.1))
    args = [*SMALL, "--images", "1", "--curves", "all", "--theta", "2.5", "--quiet", "--name", "c"]
    code, _, error = here(args, tmp_path, monkeypatch, capfd)
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
    assert here(args, tmp_path, monkeypatch, capfd)[0] == 0
    assert json.loads((folder / "results.json").read_text())["curves"] == results["curves"]


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


def test_accuracies_reach_tensorboard(tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = [*SMALL, "--attack", "none", "--track", "tensorboard", "--name", "t"]
    code, _, error = here(args, tmp_path, monkeypatch, capfd)
    assert code == 0, error
    found = EventAccumulator(str(tmp_path / "runs/t/tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("none/all/single")] == [1, 2]
