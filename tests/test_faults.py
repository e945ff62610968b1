"""Every call that opens, writes, closes or renames a file fails once, the n-th for every n, as SQLite's tests have it.

After each failure the same command goes on to the same results, or one line says what to do.
"""

import json
import subprocess
import sys

import pytest

from diffender.utils.images import save_png
from tests.conftest import ROOT

# Imports all, then forks a child for each line that it reads: kind of fault, which call, script, command line. Answers
# with the exit status and the number of calls that the child made.
ENGINE = """if True:
    import builtins, errno, io, os, sys
    sys.path.insert(0, sys.argv[1])
    import timm, evaluate, diffender.evaluation.run, diffender.report.folder, diffender.photographs
    from diffender.utils import options as cli
    MAIN = {"evaluate.py": evaluate.main, "defend": diffender.photographs.main}
    here, calls, plan = os.getcwd(), [], ["none", 0]

    def event(path):
        if not str(path).startswith("/") or str(path).startswith(here):
            calls.append(path)
            if len(calls) == plan[1]:
                if plan[0] == "kill":
                    os._exit(137)
                raise OSError(getattr(errno, plan[0]), os.strerror(getattr(errno, plan[0])), str(path))

    class File:
        def __init__(self, file, path):
            self.__dict__.update(file=file, path=path)
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, content):
            event(self.path)
            return self.file.write(content)
        def close(self):
            if not self.file.closed:
                self.file.close()
                event(self.path)
        def __enter__(self):
            return self
        def __exit__(self, *error):
            self.close()

    def opened(path, mode="r", *args, real=io.open, **kwargs):
        writes = isinstance(path, (str, os.PathLike)) and set(mode) & set("wax+")
        if writes:
            event(path)
        file = real(path, mode, *args, **kwargs)
        return File(file, path) if writes and str(path).startswith((here, "runs", "out")) else file

    def renamed(source, target, real=os.rename):
        event(target)
        real(source, target)

    for line in sys.stdin:
        kind, n, program, *args = line.split()
        reading, writing = os.pipe()
        if not (child := os.fork()):
            plan[:] = kind, int(n)
            builtins.open = io.open = opened
            os.rename = renamed
            sys.argv = [program, *args]
            os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
            try:
                cli.run(MAIN[program])
            finally:
                os.write(writing, str(len(calls)).encode())
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, os.read(reading, 20).decode() or -1, flush=True)
        os.close(reading)
"""
FAULTS = ("ENOSPC", "EACCES", "EIO")  # no space, no permission, a broken disk


@pytest.fixture
def engine(tmp_path):
    command = [sys.executable, "-c", ENGINE, ROOT]
    error = (tmp_path / "errors").open("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": error}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)

    def go(kind, n, *args):
        """Exit status, number of calls, lines on stderr."""
        before = error.seek(0, 2)
        process.stdin.write(" ".join([kind, str(n), *args]) + "\n")
        process.stdin.flush()
        status, calls = map(int, process.stdout.readline().split())
        error.seek(before)
        return status, calls, error.read().splitlines()

    yield go
    process.kill()
    error.close()


def outcome(folder):
    """The records without what a clock says, by image."""
    records = [json.loads(line) for line in (folder / "per_image.jsonl").read_text("utf-8").splitlines()]
    return {r["id"]: {k: v for k, v in r.items() if k not in ("seconds", "attacks")} for r in records}


def tried(engine, folder, finished, *args):
    """Fail the n-th call for every n, by an error and by a kill, and go on; the names of runs are made from both."""
    status, calls, error = engine("none", 0, *args, f"{folder.name}-whole")
    assert status == 0, error
    assert calls > 5
    whole = outcome(finished(f"{folder.name}-whole"))
    for n in range(1, calls + 1):
        for kind in (FAULTS[n % len(FAULTS)], "kill"):
            name = f"{folder.name}-{kind}-{n}"
            status, _, error = engine(kind, n, *args, name)
            if kind == "kill":
                assert status == 137
            else:
                assert status in (0, 1, 2), (n, kind, status, error)
                assert len(error) == (status == 2) or status == 1, (n, kind, error)
            status, _, error = engine("none", 0, *args, name)
            assert status == 0, (n, kind, error)
            found = finished(name)
            assert outcome(found) == whole, (n, kind)
            left = [p.name for p in found.rglob("*.partial")]
            assert kind == "kill" or not left, (n, kind, left)


@pytest.mark.slow
def test_an_evaluation(engine, tmp_path):
    budget = ["--preset", "smoke", "--images", "1", "--attack", "none", "--trust", "off"]
    small = [*budget, "--draws", "1", "--steps", "1", "--quiet"]
    tried(engine, tmp_path / "e", lambda name: tmp_path / "runs" / name, "evaluate.py", *small, "--name")
    report = (tmp_path / "runs/e-whole/report.html").read_text("utf-8")
    for folder in (tmp_path / "runs").iterdir():
        assert len((folder / "report.html").read_text("utf-8")) > 0.9 * len(report)


@pytest.mark.slow
def test_a_defence_of_photographs(engine, tmp_path, photos):
    save_png(photos[0], tmp_path / "in/photo.png")
    small = ["in", "--draws", "1", "--steps", "1", "--quiet"]
    tried(engine, tmp_path / "out", lambda name: tmp_path / name, "defend", *small, "--out")
