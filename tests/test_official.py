"""Fetching from a server on loopback that speaks the hub's file protocol; turning pickles into safetensors, unrun."""

import fcntl
import hashlib
import os
import pickle
import pty
import struct
import subprocess
import sys
import termios
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffender.classifiers.imagenet import CLASSIFIERS
from diffender.utils.errors import InputError
from diffender.weights import official
from diffender.weights.loading import WEIGHTS
from tests.conftest import ROOT

CONTENT = (WEIGHTS / "prompts.safetensors").read_bytes()
KNOWN = hashlib.sha256(CONTENT).hexdigest()
FETCH = """
import sys
from diffender.utils import options as cli
from diffender.weights import official
from diffender.weights import __main__ as weights
official.FILES["sd2-inpainting"] = official.Published("some/model", "m.safetensors", {bytes}, {sha256!r})
sys.argv = ["weights", "fetch", "sd2-inpainting"]
cli.run(weights.main)
"""


@pytest.fixture
def hub():
    """A server with one file, and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: bool) -> None:
            asked.append((self.command, self.path))
            found = self.path == "/some/model/resolve/main/m.safetensors"
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            self.send_response((206 if start else 200) if found else 404)
            self.send_header("Content-Length", str(len(CONTENT) - start if found else 0))
            if found:
                self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
                self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body and found:
                self.wfile.write(CONTENT[start:])

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def fetch(
    home,
    endpoint: str,
    sha256: str | None = hashlib.sha256(CONTENT).hexdigest(),
    stderr: int = subprocess.PIPE,
    **env: str,
) -> subprocess.CompletedProcess:
    code = FETCH.format(bytes=len(CONTENT), sha256=sha256)
    env = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | env
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        env.pop(proxy, None)
    args = [sys.executable, "-c", code]
    return subprocess.run(args, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=120)


def test_fetch_checks_the_hash_and_uses_the_cache(hub, tmp_path):
    endpoint, asked = hub
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    run = fetch(tmp_path, endpoint, stderr=stderr)
    shown = os.read(terminal, 1 << 16).decode()
    assert run.returncode == 0, shown
    path = run.stdout.strip()
    assert path.startswith(str(tmp_path))  # HF_HOME is honoured
    assert Path(path).read_bytes() == CONTENT
    assert "100%" in shown  # the progress bar
    assert ("GET", "/some/model/resolve/main/m.safetensors") in asked
    asked.clear()
    offline = fetch(tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout.strip()) == (0, path)
    assert not asked
    wrong = fetch(tmp_path, endpoint, sha256="0" * 64)
    assert wrong.returncode == 2
    assert "is not the published file" in wrong.stderr.splitlines()[-1]


def test_without_a_known_hash_the_hubs_counts(hub, tmp_path):
    """And what was fetched is found again, as load_classifier does; a damaged copy is refused."""
    endpoint, _ = hub
    run = fetch(tmp_path, endpoint, sha256=None)
    assert run.returncode == 0, run.stderr
    path = Path(run.stdout.strip())
    blob = path.resolve()
    blob.write_bytes(CONTENT[:-1] + b"x")
    damaged = fetch(tmp_path, endpoint, sha256=None, HF_HUB_OFFLINE="1")
    assert damaged.returncode == 2
    assert f"expected {len(CONTENT)} and {blob.name}" in damaged.stderr


def test_classifiers_are_published_under_the_names_of_the_registry():
    for name, cfg in CLASSIFIERS.items():
        assert cfg.package or official.FILES[name] == official.Published(f"timm/{cfg.tag}", "model.safetensors")


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "not on the mirror"])
def test_fetch_fails_in_one_line(hub, tmp_path, env):
    endpoint = hub[0] + "/elsewhere"
    run = fetch(tmp_path, endpoint, **env)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert f"cannot get m.safetensors of some/model from {endpoint}" in run.stderr
    assert "copy the file here and give it as --weights" in run.stderr


def test_a_classifier_that_cannot_be_fetched_names_its_flag(monkeypatch):
    def offline(*_args):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="copy the file here and give it as --classifier-weights$"):
        official.fetch("inception_v3")


def test_the_published_files_are_those_of_the_manifest(manifest):
    published = {(f["path"], f["bytes"], f["sha256"]) for f in manifest("official-files")}
    for f in official.FILES.values():
        assert (f.file, f.bytes, f.sha256) in published or f.repository.startswith("timm/")


@pytest.fixture
def lightning(monkeypatch):
    """A class of a training framework, as official .ckpt files name it; gone when the file is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    return module.ModelCheckpoint


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_pickle_is_converted_and_nothing_in_it_is_run(lightning, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.randn(3, 4), "b": torch.arange(5), "c.d": torch.randn(2, dtype=torch.float64).half()}
    state["tied"] = state["a"]
    callback = lightning()
    callback.best = np.float64(0.5)
    content = {"state_dict": state, "callbacks": {lightning: {"x": callback}}, "global_step": 7}
    torch.save(content, tmp_path / "m.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.delitem(sys.modules, part)
    out = official.convert(tmp_path / "m.ckpt", tmp_path / "m.safetensors")
    loaded = load_file(out)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state.items())
    with pytest.raises(InputError, match="is there already"):
        official.convert(tmp_path / "m.ckpt", out)
    torch.save(state, tmp_path / "plain.bin")  # a Hugging Face .bin: the tensors at the top
    assert load_file(official.convert(tmp_path / "plain.bin", tmp_path / "plain.safetensors")).keys() == state.keys()


def test_what_is_no_checkpoint_says_so(tmp_path, monkeypatch):
    def said(name: str) -> str:
        with pytest.raises(InputError) as e:
            official.convert(tmp_path / name, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
        return str(e.value)

    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Malicious()}, tmp_path / "hidden.ckpt")
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    monkeypatch.chdir(tmp_path)
    assert "no file" in said("gone.ckpt")
    for name in ("text.ckpt", "evil.ckpt", "empty.ckpt", "hidden.ckpt"):
        assert "cannot be read safely" in said(name), name
    assert "mkdir whose module" in said("hidden.ckpt")
    assert not (tmp_path / "hacked").exists()
    for name in ("none.ckpt", "list.ckpt"):
        assert "holds no state_dict" in said(name)
