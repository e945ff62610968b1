"""Images a second of the defence: one process of one thread, two such processes, and one process of two threads.

    python benchmarks/workers.py

What `torchrun --nproc-per-node 2 evaluate.py` gains over one process. Each purifies and classifies the same photographs
again and again for --seconds; the start of a process does not count.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from attack_step import build, task_for
from common import parser, report

SETTINGS = {
    "one process, one thread": (1, 1),
    "two processes, one thread each": (2, 1),
    "one process, two threads": (1, 2),
}


def work(args) -> None:  # noqa: ANN001
    """Print how many images a second this process manages, after everybody has started."""
    torch.set_num_threads(args.threads)
    task = task_for(build(args, args.steps), args.images)

    def once() -> None:
        task.victim(task.x, task.noise("benchmark"))

    once()
    print("ready", flush=True)
    sys.stdin.readline()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < args.seconds:
        once()
        done += args.images
    print(done / (time.perf_counter() - started))


def measure(processes: int, threads: int) -> float:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    child = [sys.executable, *sys.argv, "--threads", str(threads)]
    workers = [
        subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(processes)
    ]
    for w in workers:
        w.stdout.readline()
    for w in workers:
        w.stdin.write("go\n")
        w.stdin.flush()
    return sum(float(w.communicate()[0]) for w in workers)


def main() -> None:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--seconds", type=float, default=15)
    flags.add_argument("--threads", type=int, help="be a worker of so many threads")
    flags.set_defaults(model="tiny", dtype="float32", images=6, draws=3, steps=2, sampler="dpmpp", guidance=1.0)
    args = flags.parse_args()
    if args.threads:
        work(args)
        return
    rates = {name: [] for name in SETTINGS}
    for _ in range(args.repeats):
        for name, setting in SETTINGS.items():
            rates[name].append(measure(*setting))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians["one process, one thread"]
    rows = [(name, f"{rate:.2f}", f"**{rate / base:.2f}**") for name, rate in medians.items()]
    report(("embedded model", "images a second", "ratio"), rows, {"images a second": medians}, args)


if __name__ == "__main__":
    main()
