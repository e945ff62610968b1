"""Seconds an image of every defence, the classifier included, beside the bare classifier.

    python benchmarks/latency.py

The sample photographs go through one at a time, each defence at its defaults: clean ones, and the same with a patch of
uniform noise, in which most of the defences find something.
"""

import torch
from attack_step import task_for
from common import in_turn, parser, report
from torch import Tensor

from diffender.attacks.fixed import UniformNoise
from diffender.classifiers.imagenet import load_classifier
from diffender.config import EMBEDDED
from diffender.defenses import DEFENSES, build
from diffender.pipeline import Defended, DIFFender
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for

CONTROLS = ("resize", "vae")  # of what DIFFender does besides, no defences


@torch.no_grad()
def main() -> None:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--images", type=int, default=4)
    args = flags.parse_args()
    model = load_model("tiny").to(args.device)
    classifier = load_classifier("efficientnet_lite0").to(args.device)
    target = Defended(DIFFender(model, contexts_for("tuned", model), EMBEDDED), classifier)
    task = task_for(target, args.images)
    victims = {name: build(name, target) for name in ("none", *DEFENSES) if name not in CONTROLS}

    def answers(victim: Defended, images: Tensor) -> None:
        for x, image_id in zip(images, task.image_ids, strict=True):
            victim(x[None], victim.sample_noise([image_id], 0, "benchmark"))

    rows, figures = {name: [name] for name in victims}, {}
    for what, images in {"clean": task.x, "patched": UniformNoise()(task).image}.items():
        runs = {name: lambda victim=victim: answers(victim, images) for name, victim in victims.items()}  # noqa: B023
        seconds, _ = in_turn(runs, args.repeats, args.device)
        figures[what] = {name: s / args.images for name, s in seconds.items()}
        for name, s in figures[what].items():
            rows[name] += [f"{s:.3f}", f"**{s / figures[what]['none']:.1f}**"]
    head = ("embedded model, one image at a time", "clean, s", "in bare answers", "patched, s", "in bare answers")
    report(head, [*rows.values()], {"seconds": figures}, args)


if __name__ == "__main__":
    main()
