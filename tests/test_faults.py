"""Every call that opens, writes, closes, moves or deletes a file fails once, the n-th for every n, as SQLite's tests
have it.

After each failure the same command goes on to the same results, or one line says what to do.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from diffender.utils.files import load_tensors, read_header
from diffender.utils.images import save_png
from diffender.weights.loading import WEIGHTS
from tests.conftest import ROOT

# Imports all, then forks a child for each line that it reads: the fault, which call, folder, command line. Answers
# with the exit status and the calls that the child made.
ENGINE = """if True:
    import builtins, errno, io, os, sys
    here, calls, plan = os.getcwd(), [], ["none", 0]

    def event(kind, path):
        if os.path.abspath(path).startswith(here):
            calls.append(kind)
            if len(calls) == plan[1]:
                if plan[0] == "kill":
                    os._exit(137)
                number = getattr(errno, plan[0])
                raise OSError(number, os.strerror(number), str(path))

    class Raw(io.FileIO):  # below the buffers, where a disk is asked
        def __init__(self, path, mode, opener):
            event("open", path)
            super().__init__(path, mode, opener=opener)
            self.path, self.half = path, False
        def write(self, data):
            self.half = not self.half
            if self.half:  # the other half is asked for next
                return super().write(data[: len(data) // 2])
            event("write", self.path)
            return super().write(data)
        def close(self):
            if not self.closed:
                super().close()
                event("close", self.path)

    def opened(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None,
               real=io.open):
        if not isinstance(path, (str, os.PathLike)) or not set(mode) & set("wax+"):
            return real(path, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(path, mode.replace("b", "").replace("t", ""), opener)
        file = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

    builtins.open = io.open = opened
    for name in ("mkdir", "rename", "replace", "unlink", "chmod"):
        def hooked(path, *args, name=name, real=getattr(os, name), **kwargs):
            if os.path.lexists(path) != (name == "mkdir"):
                event(name, path)
            return real(path, *args, **kwargs)
        setattr(os, name, hooked)

    def created(path, flags, *args, real=os.open, **kwargs):  # as touch and temporary files are
        if flags & os.O_CREAT:
            event("open", path)
        return real(path, flags, *args, **kwargs)

    os.open = created

    import safetensors, safetensors.torch

    def saved(tensors, path, metadata=None, real=safetensors.torch.save_file):
        real(tensors, path, metadata)
        for size in (0, os.path.getsize(path) // 2):
            os.truncate(path, size)
            try:
                event("save", path)
            except OSError as e:  # in the library's words
                said = f"Error while serializing: I/O error: {e.strerror} (os error {e.errno})"
                raise safetensors.SafetensorError(said) from None
        real(tensors, path, metadata)

    safetensors.torch.save_file = saved
    sys.path.insert(0, sys.argv[1])
    import matplotlib.backends.backend_agg, timm, diffender.evaluation.run, diffender.pretrain.whole
    import diffender.report.folder, diffender.__main__, evaluate, train
    from diffender.evaluation import forecast
    from diffender.stable_diffusion.text import tokenizer
    from diffender.utils import options as cli
    tokenizer()
    forecast.measured, forecast.memory_needed = lambda *given: forecast.COST, lambda *given: (0, "")  # take seconds


    def stage(recipe, on_save=lambda: None):  # it would stop by time, never twice alike; its own calls are tried alone
        save_atomic({"x": torch.zeros(50_000)}, recipe.out / "tiny.safetensors", {})
        on_save()

    import torch
    from diffender.pretrain import whole
    from diffender.utils.files import save_atomic
    whole.train_vae = whole.train_unet = stage
    MAIN = {"evaluate.py": evaluate.main, "train.py": train.main, "diffender": diffender.__main__.main}

    for line in sys.stdin:
        fault, n, folder, program, *args = line.split()
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.makedirs(folder, exist_ok=True)
            os.chdir(folder)
            sys.argv = [program, *args]
            os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
            calls.clear()
            plan[:] = fault, int(n)
            try:
                cli.run(MAIN[program])
            except SystemExit as e:
                os.write(writing, " ".join(calls).encode())
                sys.stderr.flush()
                os._exit(e.code)  # an interpreter takes as long to end as some commands
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, os.read(reading, 1 << 16).decode(), flush=True)
        os.close(reading)
"""
FAULTS = ("ENOSPC", "EACCES", "EIO", "kill")  # no space, no permission, a broken disk
SMALL = ("--steps", "1", "--draws", "1", "--quiet")
SMOKE = ("--preset", "smoke", "--images", "1", "--trust", "off", "--keep", "--name", "e")
WHOLE = {"mkdir", "open", "write", "close", "replace"}  # calls that make a folder and a file of it
SAVED = {"save", "chmod"}  # beside them, where the file holds tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def engine(root):
    command = [sys.executable, "-c", ENGINE, ROOT]
    error = (root / "errors").open("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": error}
    process = subprocess.Popen(command, cwd=root, text=True, **pipes)

    def go(fault, n, folder, *args):
        """Exit status, kinds of the calls made, lines on stderr but those of progress."""
        before = error.seek(0, 2)
        process.stdin.write(" ".join([fault, str(n), folder, *args]) + "\n")
        process.stdin.flush()
        status, *calls = process.stdout.readline().split()
        error.seek(before)
        return int(status), calls, [line for line in error.read().splitlines() if " gone, " not in line]

    yield go
    process.kill()
    error.close()


@pytest.fixture
def tried(engine, root, request):
    """tried(command) fails the n-th call for every n, by a kill and by an error, and goes on; calls of a rare kind meet
    every error. `sparing`: each call fails once."""

    def run(*args, sparing=False):
        base = request.node.name
        status, calls, error = engine("none", 0, f"{base}/whole", *args)
        assert (status, error) == (0, [])
        whole, of_kind, before = outcome(root / base / "whole"), Counter(calls), Counter()
        print(f"{len(calls)} calls: {dict(of_kind)}")
        for n, call in enumerate(calls, start=1):
            errors = FAULTS[:3] if of_kind[call] < 3 else (FAULTS[before[call] % 3],)
            for fault in (FAULTS[before[call] % 4],) if sparing else (*errors, "kill"):
                fails(fault, n, f"{base}/{n}-{call}-{fault}", whole, *args)
            before[call] += 1
        return set(calls)

    def fails(fault, n, name, whole, *args):
        folder = root / name
        status, _, error = engine(fault, n, name, *args)
        if fault == "kill":
            assert status == 137, (name, error)
        else:
            assert (status, len(error)) in ((0, 0), (2, 1)), (name, error)
            assert not error or "free some space" in error[0] or "choose another place" in error[0], (name, error)
            assert not list(folder.rglob("*.partial")), name
        status, _, error = engine("none", 0, name, *args)
        assert (status, error) == (0, []) or "is there already" in error[0], (name, error)
        assert outcome(folder) == whole, name
        shutil.rmtree(folder)

    return run


def outcome(folder):
    """What the files of a folder say, by name, without what a kill left half-written."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".partial")
    return {str(p.relative_to(folder)): content(p) for p in files}


def content(path):
    """What a file says, without what a clock says; of texts for people the words, and of a checkpoint nothing."""
    if path.suffix == ".safetensors":
        return timeless(json.dumps(read_header(path))), {k: v.numpy().tobytes() for k, v in load_tensors(path).items()}
    if path.suffix == ".jsonl":
        return [timeless(line) for line in path.read_text("utf-8").splitlines()]
    if path.suffix == ".ckpt":
        return None
    return path.read_bytes() if path.suffix == ".png" else re.sub(r"[\d.e+-]", "", path.read_text("utf-8"))


def timeless(text):
    """The JSON in a text, without its seconds and the checksum over them."""
    return json.loads(text, object_hook=lambda r: {k: r[k] for k in r if k not in ("seconds", "digest")})


@pytest.mark.slow
def test_an_evaluation(tried):
    assert tried("evaluate.py", *SMOKE, *SMALL, "--attack", "none") == WHOLE


@pytest.mark.slow
def test_an_attack(tried):
    budget = ("--iters", "1", "--iters-undefended", "1", "--verdicts", "1")
    assert tried("evaluate.py", *SMOKE, *SMALL, *budget, sparing=True) == WHOLE


@pytest.mark.slow
def test_a_defence_of_photographs(tried, root, photos):
    save_png(photos[0], root / "photos/photo.png")
    photo = str(root / "photos/photo.png")
    assert tried("diffender", "defend", photo, *SMALL, "--out", "out") == WHOLE


@pytest.mark.slow
def test_a_tuning(tried):
    budget = ("--shots", "1", "--held-out", "0", "--rounds", "2", "--iters", "1", "--n-ctx", "1", "--keep")
    calls = tried("train.py", *budget, *SMALL, "--out", "out/prompts.safetensors")
    assert calls == WHOLE | SAVED | {"unlink"}


@pytest.fixture
def captioned(root, photos):
    save_png(photos[0], root / "captioned/photo.png")
    (root / "captioned/captions.csv").write_text("file,caption\nphoto.png,dog\n")
    return str(root / "captioned")


CHECKPOINTS = ("--batch", "1", "--save-minutes", "0", "--out", "out")  # one after each step


@pytest.mark.slow
def test_a_pretraining(tried, captioned):
    calls = tried("diffender", "pretrain", "vae", "--data", captioned, "--steps", "2", "--crop", "32", *CHECKPOINTS)
    assert calls == WHOLE | SAVED


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "unet"])
def test_a_pretraining_that_goes_on_from_a_whole_model(tried, captioned, stage):
    crop = ("--crop", "32") if stage == "decoder" else ()
    init = ("--init", str(WEIGHTS / "tiny.safetensors"), "--steps", "1", *crop)
    calls = tried("diffender", "pretrain", stage, "--data", captioned, *init, *CHECKPOINTS, sparing=True)
    assert calls == WHOLE | SAVED


def test_a_whole_model_in_parts(tried, captioned):
    args = ("--data", captioned, "--minutes", "1", "--parts", "0.1", "--device", "cpu", "--out", "out")
    assert tried("diffender", "pretrain", "all", *args, sparing=True) == WHOLE | SAVED


@pytest.mark.slow
def test_a_pack_of_photographs(tried, captioned):
    calls = tried("diffender", "pretrain", "pack", "--data", captioned, "--out", "out/photos.safetensors")
    assert calls == WHOLE | SAVED


def test_a_conversion(tried, root):
    torch.save({"x": torch.arange(100.0)}, root / "x.ckpt")
    calls = tried("diffender", "weights", "convert", str(root / "x.ckpt"), "--out", "x.safetensors")
    assert calls == SAVED | {"open", "replace"}


def test_joined_parts(tried, root):
    """Killed after its last call, it says that the file is there: it is whole, and `tried` compares it."""
    (root / "parts").mkdir()
    content = (WEIGHTS / "prompts.safetensors").read_bytes()
    for i, part in enumerate((content[:9999], content[9999:])):
        (root / f"parts/tiny.safetensors.{i}").write_bytes(part)
    calls = tried("diffender", "pretrain", "join", "--data", str(root / "parts"), "--out", "out/joined.safetensors")
    assert calls == WHOLE
