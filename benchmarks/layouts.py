"""Channels-last weights with an exact norm, for the embedded model: a pass of the defence, and gradient steps.

    python benchmarks/layouts.py

Three contenders in turn: channels last as loaded, contiguous, and channels last with torch's own GroupNorm, which is
not exact there (tests/test_exactness.py). Ratios are to the first.
"""

from collections.abc import Callable

import torch
from attack_step import step, task_for
from common import in_turn, parser, report
from torch import nn

from diffender.attacks.expectation import Task
from diffender.classifiers.imagenet import load_classifier
from diffender.config import EMBEDDED
from diffender.pipeline import Defended, DIFFender
from diffender.stable_diffusion.layers import GroupNorm
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for


def build(layout: torch.memory_format, exact: bool, images: int, device: str) -> Task:
    model = load_model("tiny").to(device).to(memory_format=layout)
    for module in model.modules():
        if isinstance(module, GroupNorm) and not exact:
            module.forward = nn.GroupNorm.forward.__get__(module)
    defense = DIFFender(model, contexts_for("tuned", model), EMBEDDED)
    return task_for(Defended(defense, load_classifier("efficientnet_lite0").to(device)), images)


def main() -> None:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--images", type=int, default=4)
    args = flags.parse_args()
    tasks = {
        "channels last": build(torch.channels_last, True, args.images, args.device),
        "contiguous": build(torch.contiguous_format, True, args.images, args.device),
        "channels last, torch's norm": build(torch.channels_last, False, args.images, args.device),
    }
    work: dict[str, Callable[[Task], object]] = {
        "a pass": lambda task: task.victim(task.x, task.noise("benchmark")),
        "a step of bpda-mask": lambda task: step(task, "bpda-mask"),
        "a step of full": lambda task: step(task, "full"),
    }
    rows, figures = [], {}
    for name, function in work.items():
        runs = {layout: lambda task=task: function(task) for layout, task in tasks.items()}  # noqa: B023
        seconds, _ = in_turn(runs, args.repeats, args.device)
        ratios = {layout: s / seconds["channels last"] for layout, s in seconds.items()}
        figures[name] = {"seconds": seconds, "ratio": ratios}
        rows.append((name, f"{seconds['channels last'] / args.images:.3f}", *(f"**{r:.2f}**" for r in ratios.values())))
    report(("", "s an image", *tasks), rows, figures, args)


if __name__ == "__main__":
    main()
