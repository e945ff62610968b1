"""Fixtures: the embedded model, a few real photographs, and the material that only some machines have."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the numbers that tests expect are a CPU's

import torch

import evaluate
from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import Classifier, load_classifier
from diffender.config import DIFFenderConfig
from diffender.pipeline import Defended, DIFFender
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils import options as cli
from diffender.utils.malloc import keep_freed_memory
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
SMALL = [  # flags of an evaluation that is soon done
    "--images", "2", "--iters", "1", "--iters-undefended", "3", "--steps", "2", "--draws", "1", "--verdicts", "1",
    "--trust", "off", "--curves", "off", "--no-keep",
]  # fmt: skip
keep_freed_memory()  # as the scripts do
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # share the cores, and so do the scripts they start
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Inputs drawn without a generator of their own are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """call(main, program, *args) in this process, which spares its imports, as from a shell in an empty folder: exit
    code, stdout, stderr."""

    def run(main, program, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
        with pytest.raises(SystemExit) as e:
            cli.run(main)
        return e.value.code, *capfd.readouterr()

    return run


@pytest.fixture
def here(call):
    """here(*args): evaluate.py, as `call` has it."""
    return partial(call, evaluate.main, "evaluate.py")


@pytest.fixture(scope="session")
def manifest():
    """manifest(name) -> {key: shape} of an official checkpoint; skips where the manifests are not there."""

    def load(name: str) -> dict[str, list[int]]:
        path = SHARED / "manifests" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"no {path.name} here: manifests of the official checkpoints are not part of the repository")
        return json.loads(path.read_text())

    return load


@pytest.fixture(scope="session")
def model() -> LatentDiffusion:
    return load_model("tiny")


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    return load_classifier("efficientnet_lite0")


@pytest.fixture(scope="session")
def target(model, classifier) -> Defended:
    """The classifier behind the defence, with settings that are fast."""
    cfg = DIFFenderConfig(noise_ratio=0.2, theta=2.5, draws=1, steps=2, guidance=1.0, sampler="dpmpp")
    with torch.no_grad():
        return Defended(DIFFender(model, contexts_for("tuned", model), cfg), classifier)


@pytest.fixture(scope="session")
def photos(classifier) -> torch.Tensor:
    """Four of the sample photographs, (4, 3, 224, 224) in [0, 1]."""
    return torch.stack([load_image(item.path, classifier.cfg) for item in sample_items()[:4]])


@pytest.fixture(scope="session")
def pasted(photos) -> torch.Tensor:
    """A photograph with a square of noise, which every localiser finds, (1, 3, 224, 224)."""
    x = photos[:1].clone()
    x[..., 60:116, 100:156] = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return x


@pytest.fixture(scope="session")
def browser():
    """Chromium, as Debian packages it. Without it, tests are skipped; where DIFFENDER_BROWSER demands it, they fail."""
    lacks = pytest.fail if os.environ.get("DIFFENDER_BROWSER") else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacks("playwright is not installed: pip install -r requirements-test.txt")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        lacks("no Chromium: apt install chromium")
    with sync_playwright() as p:
        yield p.chromium.launch(executable_path=path, args=["--no-sandbox"])
