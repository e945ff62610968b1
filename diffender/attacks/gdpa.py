"""GDPA: pattern and place of the patch are optimised together (Li & Ji 2021), in three modes of one placement operator.

direct     free pattern and place for each image: the strongest
generator  the authors' network, trained anew for each image: a reparametrisation
amortised  that network trained beforehand by `python -m diffender pretrain gdpa`, one forward pass an image
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffender.attacks.attack import Callback, GradientAttack, check_init, steps_averaged_by, within
from diffender.attacks.expectation import Attacked, Course, Draw, Task, expect, judge, judgements, pick_rows
from diffender.attacks.patch import paste, patch_side, to_8bit
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors, read_header
from diffender.utils.options import option

MODES = {"direct": (0.9, 0.999), "generator": (0.5, 0.9), "amortised": (0.5, 0.9)}  # mode: Adam's betas
GRID = 7  # the coarse search looks at GRID x GRID places


def bound(size: int, side: int) -> float:
    """The theta that brings the patch flush with the border; the authors' 0.8 pushes large ones outside."""
    return (size - side) / (size - 1)


def place(pattern: Tensor, theta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pattern (B, 3, s, s) on an empty canvas (B, 3, S, S), and how much it covers there (B, 1, S, S).

    theta (B, 2), (x, y) in units of half the image less half a pixel: (0, 0) is the centre, positive values lead left
    and up, as affine_grid has it. The pattern is interpolated once: its border is not darkened by its own mask.
    """
    b, _, side, _ = pattern.shape
    before = (size - side) // 2
    padding = (before, size - side - before) * 2
    half = 1 / (size - 1) if (size - side) % 2 else 0.0  # half a pixel, where the centre lies between two
    canvas = F.pad(torch.cat([pattern, torch.ones_like(pattern[:, :1])], dim=1), padding)
    eye = torch.eye(2).to(pattern).expand(b, 2, 2)
    grid = F.affine_grid(torch.cat([eye, theta[:, :, None] - half], dim=2), list(canvas.shape), align_corners=True)
    warped = F.grid_sample(canvas, grid, align_corners=True)
    return warped[:, :3], warped[:, 3:]


def to_corner(theta: Tensor, size: int, side: int) -> Tensor:
    """theta (B, 2) to the whole pixel nearest to it: (top, left), (B, 2)."""
    shift = theta.flip(1) * (size - 1) / 2
    return ((size - side) / 2 - shift).round().long().clamp(0, size - side)


def to_theta(corner: Tensor, size: int, side: int) -> Tensor:
    """The inverse of `to_corner`."""
    return ((size - side) / 2 - corner.flip(1)) * 2 / (size - 1)


class PatchGenerator(nn.Module):
    """The authors' network: an image (B, 3, S, S) to a pattern (B, 3, s, s) in [0, 1] and theta (B, 2) in the bound.

    It has instance instead of batch normalisation, since it sees one image at a time. The pattern is squashed, since
    clamping would leave most pixels without gradient. beta follows the feature count, the learning rate and the
    features' size, so that a step moves the patch as far as theirs (beta 3000 at 802,816 features and lr 5e-4).
    """

    beta: Tensor

    def __init__(self, size: int, side: int, g: Generator, width: int = 64, blocks: int = 6, lr: float = 5e-4):
        super().__init__()
        self.size, self.side = size, side

        def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, reflect: bool = True) -> nn.Sequential:
            pad = nn.ReflectionPad2d(kernel // 2) if reflect else nn.ZeroPad2d(kernel // 2)
            return nn.Sequential(pad, nn.Conv2d(c_in, c_out, kernel, stride), nn.InstanceNorm2d(c_out, affine=True))

        w = width
        self.stem = nn.Sequential(
            conv(3, w, 7), nn.ReLU(), conv(w, 2 * w, 3, 2, False), nn.ReLU(), conv(2 * w, 4 * w, 3, 2, False), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(4 * w, 4 * w, 3), nn.ReLU(), conv(4 * w, 4 * w, 3)) for _ in range(blocks)
        )
        quarter = math.ceil(size / 4)
        self.pattern = nn.Sequential(conv(4 * w, 3, 3, 2, False), nn.ReLU(), nn.Flatten())
        self.to_pattern = nn.Linear(3 * math.ceil(quarter / 2) ** 2, 3 * side**2)
        features = 4 * w * quarter**2
        self.to_location = nn.Linear(features, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data.normal_(0, 0.02, generator=g)
                assert module.bias is not None
                module.bias.data.zero_()
            elif isinstance(module, nn.InstanceNorm2d):
                module.weight.data.normal_(1, 0.02, generator=g)
        self.register_buffer("beta", torch.tensor(3000 * features / 802816 * lr / 5e-4))

    def calibrate(self, x: Tensor) -> None:
        """Scale beta by the mean absolute feature of images x (B, 3, S, S); that of the authors' network is about 2."""
        self.beta *= self.encode(x).detach().abs().mean() / 2

    def encode(self, x: Tensor) -> Tensor:
        f = self.stem(x)
        for block in self.blocks:
            f = f + block(f)
        return f

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.encode(x)
        location = self.to_location(f.flatten(1)) / self.beta
        pattern = self.to_pattern(self.pattern(f)).tanh() / 2 + 0.5
        return pattern.view(-1, 3, self.side, self.side), bound(self.size, self.side) * location.tanh()


def check_generator(path: Path) -> dict:
    """The header of a trained network's file. Raises InputError for any other file."""
    header = read_header(path)
    if header.get("kind") != "gdpa":
        raise InputError(f"{path} holds no generator; python -m diffender pretrain gdpa trains one")
    return header


def load_generator(path: str, size: int, side: int) -> PatchGenerator:
    """A trained network from its safetensors file. Raises InputError where it was made for other sizes."""
    header = check_generator(Path(path))
    if (header.get("size"), header.get("side")) != (size, side):
        raise InputError(
            f"{path} makes patches of side {header.get('side')} for images of side {header.get('size')}; wanted are "
            f"{side} and {size}: python -m diffender pretrain gdpa trains one"
        )
    net = PatchGenerator(size, side, Generator(), header["width"])
    net.load_state_dict(load_tensors(Path(path)))
    return net


class Free(nn.Module):
    """Pattern and place as free variables, squashed into their ranges: no pixel is ever without gradient.

    A starting pattern is clamped to [0.05, 0.95]: nearer to the ends a few steps would not move a pixel.
    """

    def __init__(self, pattern: Tensor, theta: Tensor, limit: float):
        super().__init__()
        self.limit = limit
        self.w = nn.Parameter((2 * pattern - 1).clamp(-0.9, 0.9).atanh())
        self.u = nn.Parameter((theta / max(limit, 1e-8)).clamp(-0.999, 0.999).atanh())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.w.tanh() / 2 + 0.5, self.limit * self.u.tanh()

    def move(self, theta: Tensor) -> None:
        self.u.data = (theta / max(self.limit, 1e-8)).clamp(-0.999, 0.999).atanh()


class PerImage(nn.Module):
    """One network an image of x (B, 3, S, S): a batch of images shares no weights."""

    def __init__(self, nets: Sequence[PatchGenerator], x: Tensor):
        super().__init__()
        self.nets, self.x = nn.ModuleList(nets), x

    def forward(self) -> tuple[Tensor, Tensor]:
        patterns, thetas = zip(*(net(x[None]) for net, x in zip(self.nets, self.x, strict=True)), strict=True)
        return torch.cat(patterns), torch.cat(thetas)


@dataclass(frozen=True)
class GDPA(GradientAttack):
    """Adam on pattern and place. Restarts take the next best places and other first pixels, or another network of mode
    generator; the amortised one makes one attempt."""

    flags: ClassVar[dict[str, str]] = {"gdpa_mode": "mode", "generator": "weights"}
    moves: ClassVar[float] = 0.5

    mode: str = option("direct", "Free pixels, a generator for each image, or a trained one.", choices=tuple(MODES))
    lr: float = option(0.15, "Step size of the pattern in direct mode.", low=0)
    lr_place: float = option(0.005, "Step size of the place: half a pixel, so that the pattern can follow.", low=0)
    lr_net: float = option(5e-4, "Step size of the generator.", low=0)
    width: int = option(64, "Width of the generator.", low=1)
    weights: str | None = None  # the amortised generator's file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "amortised" and self.weights is None:
            raise InputError(
                "GDPA's amortised mode needs a trained generator; give --generator a file of python -m "
                "diffender pretrain gdpa"
            )
        if self.weights is not None:
            check_generator(Path(self.weights))

    @property
    def averaged_steps(self) -> float:
        return steps_averaged_by(MODES[self.mode][0], self.iters)

    def attempts(self, task: Task, init: Tensor | None, callback: Callback) -> Iterator[Attacked]:
        """`init` (B, 3 s^2 + 2): direct mode starts from it, and in the others it competes in the end."""
        x, size, side = task.x, task.x.shape[-1], patch_side(task.x.shape[-1], self.area)
        check_init(init, (3 * side**2 + 2,), f"(B, {3 * side**2 + 2}), pattern and place")
        known = [] if init is None else [init]
        if self.mode == "amortised":
            assert self.weights is not None  # as __post_init__ saw to
            net = load_generator(self.weights, size, side).to(x.device)
            yield self.finish(task, [*known, join(*(t.detach() for t in net(x)))], Course(), "")
        elif self.mode == "generator":
            for r in range(self.restarts):
                key = f" {r}" if r else ""
                heard = within(callback, r, self.restarts)
                draws = [generator(task.seed, i, f"net{key}") for i in task.image_ids]
                nets = [PatchGenerator(size, side, g, self.width, lr=self.lr_net) for g in draws]
                for b, net in enumerate(nets):
                    net.to(x.device).calibrate(x[b : b + 1])
                yield self.attempt(task, PerImage(nets, x).to(x.device), [] if r else known, key, heard)
        else:
            starts = self.starts(task, init)
            searched = 0 if init is not None and len(starts) == 1 else 2 * GRID**2  # queries
            for r, start in enumerate(starts):
                first = [] if r else known
                key = f" {r}" if r else ""
                heard = within(callback, r, len(starts))
                made = self.attempt(task, Free(*start, bound(size, side)), first, key, heard)
                yield made if r else made._replace(queries=made.queries + searched)

    def starts(self, task: Task, init: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pattern and theta of each attempt of direct mode: `init`, then the best places, each with random pixels."""
        size, side = task.x.shape[-1], patch_side(task.x.shape[-1], self.area)
        starts = [] if init is None else [split(init, side)]
        if len(starts) < self.restarts:
            corners = self.search(task, self.first_pixels(task, side, ""))
            for r in range(self.restarts - len(starts)):  # more than there are places: each again, with other pixels
                pixels = self.first_pixels(task, side, f" {r}" if r else "")
                starts.append((pixels, to_theta(corners[r % len(corners)], size, side)))
        return starts

    def search(self, task: Task, pattern: Tensor) -> list[Tensor]:
        """Top left corners (B, 2), best first for each image: GRID x GRID places, by the lower of the losses with a
        grey patch and with `pattern` (ROA's exhaustive search, Wu et al. 2020)."""
        size, side = task.x.shape[-1], pattern.shape[-1]
        line = torch.linspace(0, size - side, GRID).round().long().tolist()
        corners = [torch.tensor([[top, left]] * len(pattern)) for top in line for left in line]
        noise, losses = task.noise("search"), []
        for corner in corners:
            images = [paste(task.x, p, corner)[0] for p in (torch.full_like(pattern, 0.5), pattern)]
            with_grey, with_pattern = (task.loss(task.victim(image, noise)).detach() for image in images)
            losses.append(torch.minimum(with_grey, with_pattern))
        order = torch.stack(losses).argsort(dim=0, stable=True)
        table = torch.stack(corners).to(pattern.device)
        return list(table[order, torch.arange(len(pattern), device=order.device)])

    def attempt(self, task: Task, free: nn.Module, candidates: list[Tensor], key: str, callback: Callback) -> Attacked:
        """Adam on pattern and place; in direct mode also moves by forward passes, every ten steps."""
        if isinstance(free, Free):
            groups = [{"params": [free.w], "lr": self.lr}, {"params": [free.u], "lr": self.lr_place}]
            optimizer = torch.optim.Adam(groups, betas=MODES[self.mode])
        else:
            optimizer = torch.optim.Adam(free.parameters(), self.lr_net, MODES[self.mode])
        course = Course()
        for step in range(self.iters):
            if isinstance(free, Free) and step % 10 == 0:
                pattern, theta = (t.detach() for t in free())
                free.move(self.moved(task, pattern, theta, step, key))
            pattern, theta = free()
            canvas, covered = place(pattern, theta, task.x.shape[-1])
            attacked = task.x * (1 - covered) + canvas
            purpose = f"attack {step}{key}"
            seen = expect(
                task, step_samples(task, attacked.detach(), covered.detach(), purpose), self.eot, self.eot_batch
            )
            course.record(join(pattern, theta).detach(), seen)
            optimizer.zero_grad()
            attacked.backward(seen.gradient)
            optimizer.step()
            callback((step + 1) / self.iters)
        last = join(*(t.detach() for t in free()))
        return self.finish(task, [*candidates, *course.best, last], course, key)

    def moved(self, task: Task, pattern: Tensor, theta: Tensor, step: int, key: str) -> Tensor:
        """theta (B, 2) after the best of staying and four moves, of 8 pixels in the first third of the steps, then 4,
        then 2 (Rao et al. 2020); all on the same noise."""
        size, side = task.x.shape[-1], pattern.shape[-1]
        stride = (8, 4, 2)[min(2, 3 * step // self.iters)]
        corner, noise = to_corner(theta, size, side), task.noise(f"move {step}{key}")
        choices, losses = [], []
        for move in ((0, 0), (stride, 0), (-stride, 0), (0, stride), (0, -stride)):
            choice = (corner + torch.tensor(move, device=corner.device)).clamp(0, size - side)
            losses.append(task.loss(task.victim(paste(task.x, pattern, choice)[0], noise)).detach())
            choices.append(choice)
        chosen = torch.stack(losses).argmin(dim=0)
        best = torch.stack(choices)[chosen, torch.arange(len(chosen), device=chosen.device)]
        return pick_rows(chosen == 0, theta, to_theta(best, size, side))

    def finish(self, task: Task, states: list[Tensor], course: Course, key: str) -> Attacked:
        """The best state of each image on fresh noise, at whole pixels and in 8 bits."""
        steps = len(course.value)
        x, size, side = task.x, task.x.shape[-1], patch_side(task.x.shape[-1], self.area)
        parts = [split(state, side) for state in states]
        pasted = [paste(x, to_8bit(pattern), to_corner(theta, size, side)) for pattern, theta in parts]
        scores = [judge(task, image, "choice" + key, self.eot, self.eot_batch) for image, _ in pasted]
        chosen, rows = torch.stack(scores).argmax(dim=0), torch.arange(len(x), device=x.device)
        images, masks = zip(*pasted, strict=True)
        image, mask, state = (torch.stack(list(field))[chosen, rows] for field in (images, masks, states))
        moves = 5 * math.ceil(steps / 10) if self.mode == "direct" else 0
        passes = self.eot * steps + judgements(task, self.eot) * len(states) + moves
        queries = torch.full((len(x),), passes, device=x.device)
        return Attacked(image, mask, state, queries, *course.curves(x))


def step_samples(task: Task, attacked: Tensor, covered: Tensor, purpose: str) -> Draw:
    """The samples of a step: always the same attacked images, and fresh noise of the victim."""
    return lambda k: (attacked, covered, task.noise(purpose, k))


def join(pattern: Tensor, theta: Tensor) -> Tensor:
    """Pattern (B, 3, s, s) and theta (B, 2) as one row an image."""
    return torch.cat([pattern.flatten(1), theta], dim=1)


def split(state: Tensor, side: int) -> tuple[Tensor, Tensor]:
    return state[:, :-2].view(-1, 3, side, side), state[:, -2:]
