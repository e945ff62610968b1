"""A pass of the defence and a step of each attack with two embedded models, each with its settings.

    git show b941bf2:weights/tiny.safetensors > first.safetensors        the first generation
    python benchmarks/generations.py first.safetensors --out results/speed-generations

One image at a time. Both run in this process with today's code, so the ratio is that of the models and their settings.
The settings of the other model are those of its commit: --theta and --steps. Where nothing is masked, as in most clean
images, today's code restores nothing. That has a line of its own, beside a whole pass of the other model, whose commit
restored every image.
"""

from dataclasses import replace

import torch
from common import in_turn, parser, report

from diffender.attacks.patch import margin
from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import load_classifier
from diffender.config import EMBEDDED, Backward
from diffender.pipeline import Defended, DIFFender
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for

PASS, CLEAN = "a pass", "a pass, nothing masked"
MODES = ("bpda-mask", "evade", "surrogate", "full")


def main() -> None:
    flags = parser(__doc__, repeats=5)
    flags.add_argument("other", help="weights of the other model")
    flags.add_argument("--theta", type=float, default=2.5, help="of the other model (2.5)")
    flags.add_argument("--steps", type=int, default=4, help="of the other model's restoration (4)")
    args = flags.parse_args()
    classifier = load_classifier("efficientnet_lite0").requires_grad_(False)
    settings = {"other": replace(EMBEDDED, theta=args.theta, steps=args.steps), "embedded": EMBEDDED}
    item = sample_items()[1]
    x, y = load_image(item.path, classifier.cfg)[None], torch.tensor([item.label])
    patch = torch.zeros_like(x[:, :1])
    patch[..., 60:110, 100:150] = 1
    loud = torch.randint(0, 2, (1, 3, 25, 25), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 2)
    patched = x.clone()
    patched[..., 60:110, 100:150] = loud.repeat_interleave(2, 3).float()

    def forward(victim: Defended, image: torch.Tensor) -> None:
        with torch.no_grad():
            victim(image, victim.sample_noise([item.id], 0, "benchmark"))

    def step(victim: Defended, mode: str) -> None:
        attacked = patched.clone().requires_grad_()
        noise = victim.sample_noise([item.id], 0, "benchmark")
        logits, penalty = victim.under(Backward(mode)).with_penalty(attacked, noise, patch)
        torch.autograd.grad((margin(logits, y) + penalty).sum(), attacked)

    runs = {}
    for name, path in (("other", args.other), ("embedded", None)):
        model = load_model("auto", path).requires_grad_(False)
        model.keep = True
        victim = Defended(DIFFender(model, contexts_for("manual", model), settings[name]), classifier)
        runs[name, PASS] = lambda victim=victim: forward(victim, patched)
        noise = victim.sample_noise([item.id], 0, "benchmark")
        assert victim.defense.localize(patched, noise).mask.any(), "a pass is measured where something is masked"
        if name == "embedded":
            assert not victim.defense.localize(x, noise).mask.any()
            runs[name, CLEAN] = lambda victim=victim: forward(victim, x)
        for mode in MODES:
            runs[name, f"a step, {mode}"] = lambda victim=victim, mode=mode: step(victim, mode)
    seconds, _ = in_turn(runs, args.repeats)
    rows, figures = [], {}
    for name, what in runs:
        if name == "embedded":
            a, b = seconds["other", PASS if what == CLEAN else what], seconds["embedded", what]
            rows.append((what, f"{a:.3f}", f"{b:.3f}", f"**{b / a:.2f}**"))
            figures[what] = {"other": a, "embedded": b, "ratio": b / a}
    report(("one image", "other, s", "embedded, s", "ratio"), rows, figures, args)


if __name__ == "__main__":
    main()
