"""Attacks of other libraries beside ours, on the same images, places, first patches and number of gradient steps.

    python benchmarks/attackers.py --data nips17/labels.csv --images 16 --steps 40 --out results/attackers

Each starts from the patch that AdvP made on the classifier alone. The others see the defence as an ordinary module with
exact gradients and new noise in every call; their patch is pasted by that module, so that they may change all of it.
plain Adam lowers the margin; foolbox, torchattacks and ART take signed steps of projected gradient descent. The step
size is AdvP's for all. Verdicts fall on 8-bit images with noise that no attack has seen. Needs torchattacks and ART.
"""

import torch
from common import parser, report
from torch import Tensor, nn

from diffender.attacks.advp import AdvP
from diffender.attacks.expectation import Task
from diffender.attacks.patch import apply_patch, margin, to_8bit
from diffender.classifiers.dataset import correct_subset, list_items
from diffender.classifiers.imagenet import load_classifier
from diffender.config import Backward
from diffender.evaluation.metrics import counted, mcnemar, proportion
from diffender.evaluation.verdicts import Judge, purifications
from diffender.pipeline import Defended, DIFFender, Undefended, WithFreshNoise
from diffender.utils.progress import bar
from diffender.weights.loading import load_model
from diffender.weights.prompts import contexts_for

LR = AdvP.lr
OURS = ("bpda-mask", "full", "full+loc", "evade")  # the last is the one that the others are compared with


class Pasted(nn.Module):
    """The defended classifier, seen by an attacker who owns the pixels under a mask: x to logits."""

    def __init__(self, victim: Defended, image: Tensor, mask: Tensor):
        super().__init__()
        self.victim, self.image, self.mask = WithFreshNoise(victim), image, mask
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.victim(apply_patch(self.image, x, self.mask))


def adam(model: Pasted, x: Tensor, y: Tensor, steps: int) -> Tensor:
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        margin(model(x), y).sum().backward()
        optimizer.step()
        x.data.clamp_(0, 1)
    return x.detach()


def foolbox(model: Pasted, x: Tensor, y: Tensor, steps: int) -> Tensor:
    import foolbox

    attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=LR, random_start=False)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=1.0)[1]


def torchattacks(model: Pasted, x: Tensor, y: Tensor, steps: int) -> Tensor:
    import torchattacks

    return torchattacks.PGD(model, eps=1.0, alpha=LR, steps=steps, random_start=False)(x, y)


def art(model: Pasted, x: Tensor, y: Tensor, steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    where = {"clip_values": (0, 1), "device_type": "gpu" if x.is_cuda else "cpu"}  # gpu: the current one
    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), x.shape[1:], model(x).shape[1], **where)
    attack = ProjectedGradientDescent(wrapped, eps=1.0, eps_step=LR, max_iter=steps, verbose=False)
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)


OTHERS = {"plain Adam": adam, "foolbox, PGD": foolbox, "torchattacks, PGD": torchattacks, "ART, PGD": art}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--data", default="samples")
    flags.add_argument("--images", type=int, default=4)
    flags.add_argument("--steps", type=int, default=40)
    args = flags.parse_args()
    classifier = load_classifier("efficientnet_lite0").to(args.device)
    model = load_model("tiny").to(args.device)
    model.keep = True
    target = Defended(DIFFender(model, contexts_for("tuned", model)), classifier)
    batch = correct_subset(list_items(args.data), classifier, args.images, 0)
    right: dict[str, list[int]] = {}
    for i, x, y in zip(
        bar(batch.ids, "attacking"), to_8bit(batch.x).to(args.device), batch.y.to(args.device), strict=True
    ):
        task = Task(Undefended(classifier), x[None], y[None], [i], 0)
        base = AdvP(iters=100, eot=1)(task)
        made = {"start: transfer": base.image}
        for mode in OURS:
            victim = target.under(Backward(mode))
            made[f"AdvP, {mode}"] = AdvP(iters=args.steps, eot=1)(task._replace(victim=victim), init=base.state).image
        for name, attack in OTHERS.items():
            victim = Pasted(target.under(Backward("full")), task.x, base.mask)
            pixels = attack(victim, base.image.clone(), task.y, args.steps)
            made[name] = apply_patch(task.x, to_8bit(pixels), base.mask)
        with torch.no_grad():
            _, seen, _ = purifications(Judge(target, 1), torch.cat([*made.values()]), [i] * len(made), 0)
        for name, (label,) in zip(made, seen, strict=True):
            right.setdefault(name, []).append(int(label == y))
    best = right[f"AdvP, {OURS[-1]}"]
    rows, figures = [], {}
    for name, values in right.items():
        found, p = proportion(values), mcnemar(list(zip(best, values, strict=True)))
        figures[name] = {k: found[k] for k in ("right", "n", "low", "high")} | {"p": p}
        rows.append((name, counted(found), f"{p:.2g}"))
    report(("attack", "DIFFender right", f"p, beside {OURS[-1]}"), rows, figures, args)


if __name__ == "__main__":
    main()
