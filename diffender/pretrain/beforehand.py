"""What is made once, on other images than those attacked: a universal AdvP patch, or GDPA's generator.

    python -m diffender pretrain universal --data DATA --out patch.safetensors
    python -m diffender pretrain gdpa --data DATA --out generator.safetensors

Then: python evaluate.py --attack ready --patch-file patch.safetensors, or
python evaluate.py --attack gdpa --gdpa-mode amortised --generator generator.safetensors. Both are for transfer and for
physical tests; a patch of its own for every image is stronger.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffender.attacks.expectation import Task, Victim, expect
from diffender.attacks.gdpa import PatchGenerator, place, step_samples
from diffender.attacks.patch import apply_patch, margin, masks_for, patch_side
from diffender.classifiers.dataset import Batch, correct_subset
from diffender.factory import open_classifier, open_items, pick_device
from diffender.noise import generator
from diffender.pipeline import Undefended
from diffender.pretrain.options import Beforehand
from diffender.utils.errors import InputError
from diffender.utils.files import new_file, save_atomic
from diffender.utils.progress import bar


def descend(
    task: Task, attacked: Tensor, covered: Tensor, step: int, optimizer: torch.optim.Optimizer, eot: int
) -> float:
    """One step of the optimizer on the task's loss, a mean over fresh noise; returns that loss.

    The attacked images (B, 3, S, S), patched where `covered` (B, 1, S, S) is 1, depend on what is optimised.
    """
    seen = expect(task, step_samples(task, attacked.detach(), covered.detach(), f"attack {step}"), eot)
    optimizer.zero_grad()
    attacked.backward(seen.gradient)
    optimizer.step()
    return seen.value.mean().item()


def batches(data: Batch, size: int, seed: int, updates: int):  # noqa: ANN201
    """Yield the indices of `size` images, `updates` times. Every image is drawn once before any is drawn again."""
    order: list[int] = []
    epochs = count()
    for _ in range(updates):
        while len(order) < size:
            order += torch.randperm(len(data.ids), generator=generator(seed, "order", next(epochs))).tolist()
        yield order[:size]
        order = order[size:]


def universal_patch(
    victim: Victim, data: Batch, opts: Beforehand, report: Callable[[float], None] = lambda loss: None
) -> Tensor:
    """One patch (3, s, s) in [0, 1] that leads images to `opts.target` wherever it is pasted (Brown et al. 2017)."""
    side = patch_side(data.x.shape[-1], opts.area)
    w = torch.zeros(3, side, side, device=data.x.device, requires_grad=True)  # tanh: grey
    optimizer = torch.optim.Adam([w], lr=0.03)
    for step, rows in enumerate(batches(data, opts.batch_size, opts.run.seed, opts.updates)):
        x, ids = data.x[rows], [data.ids[i] for i in rows]
        aim = torch.full((len(rows),), opts.target, device=x.device)
        task = Task(victim, x, aim, ids, opts.run.seed, partial(F.cross_entropy, target=aim, reduction="none"))
        mask = masks_for(task, f"universal {step}", opts.area)
        pixels = (w.tanh() / 2 + 0.5).repeat(len(rows), 1, 1, 1)
        attacked = apply_patch(x, torch.zeros_like(x).masked_scatter(mask.expand_as(x) == 1, pixels), mask)
        report(descend(task, attacked, mask, step, optimizer, opts.eot))
    return (w.tanh() / 2 + 0.5).detach()


def train_generator(
    victim: Victim, data: Batch, opts: Beforehand, report: Callable[[float], None] = lambda loss: None
) -> PatchGenerator:
    """The authors' generator, trained to lower the margin over many images (Li & Ji 2021)."""
    size, side = data.x.shape[-1], patch_side(data.x.shape[-1], opts.area)
    net = PatchGenerator(size, side, generator(opts.run.seed, "net"), opts.width).to(data.x.device)
    net.calibrate(data.x[: opts.batch_size])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-4, betas=(0.5, 0.9))
    for step, rows in enumerate(batches(data, opts.batch_size, opts.run.seed, opts.updates)):
        x, y, ids = data.x[rows], data.y[rows], [data.ids[i] for i in rows]
        canvas, covered = place(*net(x), size)
        attacked = x * (1 - covered) + canvas
        task = Task(victim, x, y, ids, opts.run.seed, lambda z, y=y: margin(z, y))
        report(descend(task, attacked, covered, step, optimizer, opts.eot))
    return net


def make(kind: str, opts: Beforehand) -> None:
    """`kind`, universal or gdpa, to the file opts.out."""
    path = new_file(Path(opts.out))
    classifier = open_classifier(opts.attacked, pick_device(opts.run.device))
    data = correct_subset(open_items(opts.attacked), classifier, opts.images, opts.run.seed)
    victim, data = Undefended(classifier), data.to(classifier.mean.device)
    classes = classifier(data.x[:1]).shape[1]
    if kind == "universal" and opts.target >= classes:
        raise InputError(f"--target is {opts.target}; {opts.attacked.classifier} knows 0 to {classes - 1}")
    header = {"kind": kind, "data": opts.attacked.data, "hashes": data.hashes, "updates": opts.updates}
    with bar(opts.updates, kind, opts.run.quiet) as progress:

        def report(loss: float) -> None:
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}")

        if kind == "universal":
            patch = universal_patch(victim, data, opts, report)
            save_atomic({"patches": patch[None], "targets": torch.tensor([opts.target])}, path, header)
        else:
            net = train_generator(victim, data, opts, report)
            header |= {"size": data.x.shape[-1], "side": net.side, "width": opts.width}
            save_atomic(net.state_dict(), path, header)
    print(f"written: {path}, from {len(data.ids)} images")
