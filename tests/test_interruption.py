"""Work that is stopped, or killed, goes on as if it had not been."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import diffender
import train
from diffender import tuning
from diffender.evaluation.options import Options
from diffender.utils import options as cli
from diffender.utils.interruption import Interrupted, patient
from tests.conftest import ROOT, SMALL

# A process that has imported everything and forks a child for each command line that it reads: the child runs
# evaluate.py, the parent kills it after so many seconds (none: waits) and answers with its exit status.
FORKING = """if True:
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[1])
    import evaluate, timm, diffender.evaluation.run
    from diffender.utils import options as cli
    for line in sys.stdin:
        delay, *args = line.split()
        if not (child := os.fork()):
            sys.argv = ["evaluate.py", *args]
            os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
            cli.run(evaluate.main)
        if delay != "none":
            time.sleep(float(delay))
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def told(folder):
    """The records of a run without what a clock says."""
    records = [json.loads(line) for line in (folder / "per_image.jsonl").read_text().splitlines()]
    for record in records:
        for part in (record, *record["attacks"].values()):
            part.pop("seconds")
            part.pop("forecast", None)
    return records


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_results_are_those_of_one_go(tmp_path):
    args = [*SMALL, "--images", "3", "--grad", "transfer", "--quiet"]
    command = [sys.executable, "-c", FORKING, ROOT]
    engine = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(name, delay="none"):
        engine.stdin.write(" ".join([str(delay), *args, "--name", name]) + "\n")
        engine.stdin.flush()
        return int(engine.stdout.readline())

    def lines(name):
        path = tmp_path / "runs" / name / "per_image.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    started = time.monotonic()
    assert go("whole") == 0
    seconds = time.monotonic() - started
    whole, draw, kills, run = told(tmp_path / "runs" / "whole"), random.Random(0), 0, 0
    while kills < 20:
        run += 1
        before = 0
        while go(f"killed-{run}", draw.uniform(0, seconds)) == signal.SIGKILL:
            kills += 1
            assert lines(f"killed-{run}") >= before, "what was done is done again"
            before = lines(f"killed-{run}")
            for path in (tmp_path / "runs" / f"killed-{run}").rglob("*.png"):
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), f"{path} is half-written"
        assert told(tmp_path / "runs" / f"killed-{run}") == whole
    engine.stdin.close()
    assert engine.wait() == 0


def interrupt_after(monkeypatch, module, name, times):
    """Have this process sent SIGINT within the n-th call of a function."""
    function, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


def test_ctrl_c_finishes_the_picture_in_hand_and_says_how_to_go_on(tmp_path, monkeypatch, here):
    from diffender.evaluation import run as experiment

    args = [*SMALL, "--images", "3", "--attack", "none", "--quiet"]
    interrupt_after(monkeypatch, experiment, "evaluate_batch", 2)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    code, _, error = here(*args)
    assert code == 130
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(told(folder)) == 2
    assert "finishing what is in hand" in error
    assert "go on with: python" in error
    assert error.endswith(f" {' '.join(args)} --name {folder.name}\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_benchmark_that_is_stopped_names_the_call_that_goes_on(tmp_path, monkeypatch):
    from diffender.evaluation import run as experiment

    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    call = "diffender.benchmark(model, images, labels, attack='none', gradient=None, budget='smoke', name='s')"
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        interrupt_after(patch, experiment, "evaluate_batch", 1)
        diffender.benchmark(net, images, labels, attack="none", budget="smoke", name="s")
    assert str(stopped.value).endswith(f"go on with: {call}")
    assert len(told(tmp_path / "runs/s")) == 1
    results = eval(call, {"diffender": diffender, "model": net, "images": images, "labels": labels})
    assert results["command"] == call


def test_in_a_thread_of_the_callers_nothing_waits_for_signals():
    said = []
    with ThreadPoolExecutor() as pool:

        def work():
            with patient("go on") as may_stop:
                may_stop()
                said.append("done")

        pool.submit(work).result()
    assert said == ["done"]


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), patient("") as may_stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interrupted, match="again"), patient("again") as may_stop:
        may_stop()
        signal.raise_signal(signal.SIGTERM)
        may_stop()


ADAPTIVE = ["--adaptive", "1", "--adaptive-iters", "1"]


@pytest.mark.parametrize(
    "given", [pytest.param([], id="paper"), pytest.param(ADAPTIVE, marks=pytest.mark.slow, id="adaptive")]
)
def test_a_tuning_goes_on_to_the_same_prompts(tmp_path, monkeypatch, call, given):
    small = "--shots 1 --held-out 1 --rounds 2 --iters 2 --steps 2 --draws 1 --no-keep"

    def tune(name, *more):
        code, out, error = call(train.main, "train.py", *small.split(), *given, "--out", f"{name}.safetensors", *more)
        said.append(out)
        return code, error

    said = []
    assert tune("whole")[0] == 0
    for term in ("mask", "l1", "feature", "total", "grad_L", "grad_R", "held_out_iou"):
        assert f"{term} " in said[0]
    code, error = tune("whole")
    assert code == 2
    assert error.endswith("whole.safetensors is there already; delete it, or choose another with --out\n")
    with monkeypatch.context() as patch:
        interrupt_after(patch, tuning, "eq_7", 1)
        code, error = tune("stopped")
    assert code == 130
    assert "stopped after a round; go on with: python" in error
    code, error = tune("stopped", "--lr", "0.5")
    assert code == 2
    assert "other settings (lr)" in error
    with monkeypatch.context() as patch:
        chosen = train.photographs
        patch.setattr(train, "photographs", lambda *given: chosen(*given)._replace(hashes=["changed"] * 2))
        code, error = tune("stopped")
    assert code == 2
    assert "a tuning on other photographs than --data samples has" in error
    assert not (tmp_path / "stopped.safetensors").exists()
    assert tune("stopped")[0] == 0
    from safetensors.torch import load_file

    whole, stopped = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert all((stopped[k] == whole[k]).all() for k in whole)
    assert not (tmp_path / "stopped.safetensors.unfinished").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, here):
    """A limit on the size of files stands for the end of the disk; an image of 224 pixels is the first to meet it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        code, _, error = here(*SMALL, "--attack", "none", "--quiet", "--name", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "File too large; free some space" in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.partial"))
    code, _, error = here(*SMALL, "--attack", "none", "--quiet", "--name", "full")
    assert code == 0, error


def no_memory(e):
    raise e


@pytest.mark.parametrize(
    "fail",
    [lambda: no_memory(MemoryError()), lambda: no_memory(torch.OutOfMemoryError("a\nb")), lambda: torch.empty(1 << 50)],
    ids=["python", "gpu", "cpu"],
)
def test_out_of_memory_is_one_line_with_the_flags_that_help(fail, call):
    code, _, error = call(lambda: cli.parse(Options, "") and fail(), "evaluate.py")
    assert code == 2
    flags = "--max-memory or --micro-batch or --batch-size or --eot-batch"
    assert f"out of memory; give a lower {flags}: what is written stays; start the same command again" in error
    assert len(error.strip().splitlines()) == 1


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="multiplied"):
        cli.run(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_without_a_terminal_progress_is_lines_and_quiet_is_quiet(tmp_path, here):
    args = [*SMALL, "--attack", "none", "--name"]
    code, _, error = here(*args, "a")
    assert code == 0
    assert "\r" not in error
    assert "left" in error
    assert "100 %" in error, "the forecast work has all been done"
    code, out, error = here(*args, "b", "--quiet")
    assert (code, error) == (0, "")
    assert out.strip() == (tmp_path / "runs" / "b" / "table.md").read_text().strip()


def test_a_reader_who_goes_leaves_no_traceback():
    """As in `python -m diffender | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "diffender"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("program", [["evaluate.py"], ["train.py"], ["-m", "diffender", "ablate", "--images", "1"]])
def test_ctrl_c_during_imports_is_at_most_one_line(program, late):
    def listens() -> None:  # the background of a shell ignores SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-X", "importtime", *program]
    place = {"cwd": ROOT, "preexec_fn": listens, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **place) as process:
        for line in process.stderr:
            if line.startswith("import time:") and (" torch." if late else " argparse") in line:
                break
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    if late:
        assert process.returncode == 130
        assert len(rest) == 1
        assert ": stopped; " in rest[0]
    else:
        assert process.returncode == -signal.SIGINT
        assert rest == []
