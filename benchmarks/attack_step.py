"""One gradient step of an attack on the defence, in forward passes of it, for every kind of gradient; then its memory.

    python benchmarks/attack_step.py                                  the embedded model, 4 photographs side by side
    python benchmarks/attack_step.py --model sd15-inpainting --dtype bfloat16 --images 1 --steps 20 --sampler ddim
                                     --guidance 7.5                   full size, for a GPU

`full` recomputes activations in the backward pass, `full, kept` keeps them; on a CPU their gradients must be equal to
the bit. Peak memory is that of a process of its own for each setting: more sampler steps, more samples of EOT.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch
from common import DTYPES, in_turn, parser, report
from torch import Tensor

from diffender.attacks.expectation import Task, samples
from diffender.attacks.patch import margin
from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import load_classifier
from diffender.config import EMBEDDED, GRADIENT_MODES, Backward
from diffender.evaluation.memory import GIB, footprint, held_bytes, most_held_bytes, peak_bytes
from diffender.pipeline import Defended, DIFFender
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for


def build(args: argparse.Namespace, steps: int) -> Defended:
    tiny = args.model == "tiny"
    model = load_model(args.model, None if tiny else "random", getattr(torch, args.dtype)).to(args.device)
    cfg = replace(EMBEDDED, guidance=args.guidance, sampler=args.sampler, draws=args.draws, steps=steps)
    with torch.no_grad():
        contexts = contexts_for("tuned" if tiny else "manual", model)
    defense = DIFFender(model, contexts, cfg)
    return Defended(defense, load_classifier("efficientnet_lite0").to(args.device))


def task_for(target: Defended, images: int) -> Task:
    items = sample_items()[:images]
    device = target.classifier.mean.device
    x = torch.stack([load_image(item.path, target.classifier.cfg) for item in items]).to(device)
    y = torch.tensor([item.label for item in items], device=device)
    return Task(target, x, y, [item.id for item in items], 0, lambda logits: margin(logits, y))


def step(task: Task, mode: str, eot: int = 1, keep: bool = False) -> Tensor:
    """The gradient of `eot` samples, one after the other."""
    victim = Defended(task.victim.defense, task.victim.classifier, Backward(mode))
    victim.defense.model.keep = keep
    task = task._replace(victim=victim)
    patch = torch.zeros_like(task.x[:, :1])
    patch[..., :50, :50] = 1  # 5 % of the image
    drawn = samples(task, lambda k: (task.x, patch, task.noise("benchmark", k)), eot)
    return sum(sample.gradient for sample in drawn)


def times(args: argparse.Namespace) -> tuple[list[tuple[str, ...]], dict]:
    task = task_for(build(args, args.steps), args.images)
    runs = {"forward": lambda: task.victim(task.x, task.noise("benchmark"))}
    modes = [mode for mode in GRADIENT_MODES if mode != "auto"]  # auto is full for ours
    runs |= {mode: lambda mode=mode: step(task, mode) for mode in modes}
    if args.kept:
        runs["full, kept"] = lambda: step(task, "full", keep=True)
    seconds, outputs = in_turn(runs, args.repeats, args.device)
    figures = {"seconds": seconds, "ratio": {name: s / seconds["forward"] for name, s in seconds.items()}}
    if args.kept:
        figures["gradients equal"] = torch.equal(outputs["full"], outputs["full, kept"])
    rows = [
        (name, f"{s / args.images:.2f}", f"**{figures['ratio'][name]:.2f}**", "", "", "") for name, s in seconds.items()
    ]
    return rows, figures


def memory(args: argparse.Namespace, steps: int, eot: int) -> None:
    """Print the peak of one full gradient in this process, and what was predicted, as JSON."""
    target = build(args, steps)
    task = task_for(target, args.images)
    one = footprint(target.defense.model, target.classifier.net, task.x.shape[-1])
    held = held_bytes(task.x.device)
    step(task, "full", eot)
    peak = most_held_bytes(task.x.device)
    predicted = held + peak_bytes(one, args.images, args.draws, None)
    print(json.dumps({"peak": peak / GIB, "above": (peak - held) / GIB, "predicted": predicted / GIB}))


def main() -> None:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--model", choices=("tiny", "sd15-inpainting", "sd2-inpainting"), default="tiny")
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the UNet")
    flags.add_argument("--images", type=int, default=4)
    flags.add_argument("--draws", type=int, default=3)
    flags.add_argument("--steps", type=int, default=2)
    flags.add_argument("--sampler", choices=("dpmpp", "ddim"), default="dpmpp")
    flags.add_argument("--guidance", type=float, default=1.0)
    flags.add_argument("--kept", action=argparse.BooleanOptionalAction, default=True, help="also without recomputation")
    flags.add_argument("--memory", nargs=2, type=int, metavar=("STEPS", "EOT"), help="one setting's peak, and no times")
    args = flags.parse_args()
    if args.memory:
        memory(args, *args.memory)
        return
    rows, figures = times(args)
    figures["memory"] = {}
    for setting in ("5 1", "40 1", "5 10"):  # in processes of their own: peaks do not sink
        child = [sys.executable, *sys.argv, "--memory", *setting.split()]
        steps, eot = setting.split()
        ended = subprocess.run(child, stdout=subprocess.PIPE, text=True)
        if ended.returncode:  # its own words are on stderr; what was measured before is kept
            rows.append((f"full, {steps} sampler steps, EOT {eot}", "", "", "failed", "", ""))
            continue
        found = json.loads(ended.stdout)
        figures["memory"][setting] = found
        flat = found["above"] / figures["memory"].get("5 1", found)["above"]
        rows.append(
            (
                f"full, {steps} sampler steps, EOT {eot}",
                "",
                "",
                f"{found['peak']:.2f}",
                f"**{flat:.2f}**",
                f"{found['predicted']:.2f}",
            )
        )
    head = (
        f"{args.model}, {args.dtype}, m {args.draws}, T {args.steps}, {args.images} side by side",
        "seconds an image",
        "in forward passes",
        "GiB at most",
        "above the start",
        "predicted",
    )
    report(head, rows, figures, args)
    if args.kept:
        print(f"gradients with and without recomputation equal to the bit, as on a CPU: {figures['gradients equal']}")


if __name__ == "__main__":
    main()
