"""One gradient step of an attack on the embedded model's defence, in forward passes of it, for every kind of gradient.

    python benchmarks/attack_step.py              4 photographs side by side, one process, interleaved, medians

Then peak memory beside what was predicted, for more sampler steps and more EOT samples: both should stay flat.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffender.attacks.patch import Task, margin, samples
from diffender.cli import DefenseOptions, pick
from diffender.data import load_image, sample_items
from diffender.memory import GIB, footprint, held_bytes, most_held_bytes, peak_bytes
from diffender.models.classifiers import load_classifier
from diffender.pipeline import GRADIENTS, Backward, Defended, DIFFender, DIFFenderConfig
from diffender.prompts import contexts_for
from diffender.weights import load_model


def build(steps: int) -> Defended:
    model = load_model("tiny")
    cfg = pick(DIFFenderConfig, DefenseOptions(), steps=steps)
    with torch.no_grad():
        contexts = contexts_for("tuned", model)
    return Defended(DIFFender(model, contexts, cfg), load_classifier("efficientnet_lite0"))


def task_for(target: Defended, images: int) -> Task:
    items = sample_items()[:images]
    x = torch.stack([load_image(item.path, target.classifier.cfg) for item in items])
    y = torch.tensor([item.label for item in items])
    return Task(target, x, y, [item.id for item in items], 0, lambda logits: margin(logits, y))


def step(task: Task, mode: str, eot: int = 1) -> None:
    victim = Defended(task.victim.defense, task.victim.classifier, Backward(mode))
    task = task._replace(victim=victim)
    for _ in samples(task, lambda k: (task.x, task.x[:, :1], task.noise("benchmark", k)), eot):
        pass


def times(images: int, rounds: int) -> None:
    task = task_for(build(4), images)
    runs = {"forward": lambda: task.victim(task.x, task.noise("benchmark"))}
    runs |= {mode: lambda mode=mode: step(task, mode) for mode in GRADIENTS}
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first warms up
        for name, function in runs.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    each = medians["forward"] / images
    print(f"{images} photographs, {torch.get_num_threads()} threads; a forward pass of one: {each:.2f} s")
    for name in GRADIENTS:
        print(f"{name:10s} {medians[name] / medians['forward']:.2f} forward passes")


def memory(images: int, steps: int, eot: int) -> None:
    target = build(steps)
    task = task_for(target, images)
    one = footprint(target.defense.model.cfg, torch.float32, target.classifier.net, task.x.shape[-1])
    held = held_bytes(task.x.device)
    predicted = held + peak_bytes(one, images, 3, None)
    step(task, "full", eot)
    peak = most_held_bytes(task.x.device)
    print(f"{steps:2d} steps, EOT {eot:2d}: {peak / GIB:.2f} GiB at most, {predicted / GIB:.2f} predicted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", nargs=2, type=int, metavar=("STEPS", "EOT"), help="measure one setting alone")
    args = parser.parse_args()
    if args.memory:
        memory(args.images, *args.memory)
        return
    times(args.images, args.rounds)
    for setting in (("5", "1"), ("40", "1"), ("5", "10")):  # in processes of their own: peaks do not sink
        subprocess.run([sys.executable, __file__, "--images", str(args.images), "--memory", *setting], check=True)


if __name__ == "__main__":
    main()
