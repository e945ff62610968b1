"""Eight decals drawn from signed distance functions: flat colours, dark outline, transparent outside. No downloads.

Each lies within the disc inscribed in its square, so that it may be turned without leaving it.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 256  # of the master drawings, in pixels
PALETTE = {
    "black": (0.06, 0.06, 0.08), "white": (0.97, 0.97, 0.97), "red": (0.86, 0.12, 0.15), "yellow": (1.0, 0.82, 0.10),
    "brown": (0.50, 0.28, 0.13), "blue": (0.13, 0.35, 0.80), "pink": (0.96, 0.52, 0.66), "orange": (0.95, 0.50, 0.11),
}  # fmt: skip
OUTLINE = 0.07  # of half the side

Shape = Callable[[Tensor, Tensor], Tensor]  # (x, y) in [-1, 1], y down, to the distance: negative inside


def disc(cx: float, cy: float, r: float) -> Shape:
    return lambda x, y: ((x - cx) ** 2 + (y - cy) ** 2).sqrt() - r


def ellipse(cx: float, cy: float, a: float, b: float) -> Shape:
    """Approximate away from the border, where only the sign counts."""
    return lambda x, y: ((((x - cx) / a) ** 2 + ((y - cy) / b) ** 2).sqrt() - 1) * min(a, b)


def polygon(*points: tuple[float, float]) -> Shape:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        nearest, inside = (torch.full_like(x, torch.inf), torch.zeros_like(x, dtype=torch.bool))
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            t = (((x - ax) * ex + (y - ay) * ey) / (ex**2 + ey**2)).clamp(0, 1)
            nearest = torch.minimum(nearest, (x - ax - t * ex) ** 2 + (y - ay - t * ey) ** 2)
            crosses = ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay if by != ay else 1e-9) + ax)
            inside ^= crosses
        return torch.where(inside, -nearest.sqrt(), nearest.sqrt())

    return distance


def union(*shapes: Shape) -> Shape:
    return lambda x, y: torch.stack([shape(x, y) for shape in shapes]).amin(dim=0)


def both(a: Shape, b: Shape) -> Shape:
    return lambda x, y: torch.maximum(a(x, y), b(x, y))


def without(a: Shape, b: Shape) -> Shape:
    return lambda x, y: torch.maximum(a(x, y), -b(x, y))


def ring(cx: float, cy: float, angles: int, radius: float, r: float) -> Shape:
    turn = torch.arange(angles) * 2 * torch.pi / angles
    centres = zip((cx + radius * turn.cos()).tolist(), (cy + radius * turn.sin()).tolist(), strict=True)
    return union(*(disc(x, y, r) for x, y in centres))


def star(points: int, outer: float, inner: float) -> Shape:
    turn = torch.arange(2 * points) * torch.pi / points - torch.pi / 2
    radius = torch.tensor([outer, inner]).repeat(points)
    return polygon(*zip((radius * turn.cos()).tolist(), (radius * turn.sin()).tolist(), strict=True))


EYES = union(disc(-0.28, -0.2, 0.1), disc(0.28, -0.2, 0.1))
SMILE = both(without(disc(0, 0.05, 0.5), disc(0, -0.15, 0.5)), lambda x, y: 0.1 - y)
STICKERS: dict[str, list[tuple[Shape, str]]] = {  # the first shape is the silhouette, the others lie on it
    "smiley": [(disc(0, 0, 0.86), "yellow"), (EYES, "black"), (SMILE, "black")],
    "cat": [
        (union(disc(0, 0.12, 0.68), polygon((-0.62, -0.05), (-0.56, -0.72), (-0.1, -0.45)),
               polygon((0.62, -0.05), (0.56, -0.72), (0.1, -0.45))), "orange"),
        (EYES, "black"), (polygon((-0.1, 0.1), (0.1, 0.1), (0, 0.24)), "pink"), (disc(0, 0.36, 0.07), "black"),
    ],
    "monkey": [
        (union(disc(0, 0, 0.7), disc(-0.66, -0.1, 0.22), disc(0.66, -0.1, 0.22)), "brown"),
        (ellipse(0, 0.22, 0.5, 0.4), "orange"), (EYES, "white"),
        (union(disc(-0.28, -0.18, 0.05), disc(0.28, -0.18, 0.05)), "black"),
        (both(disc(0, 0.02, 0.36), disc(0, 0.66, 0.4)), "red"),
    ],
    "star": [(star(5, 0.9, 0.42), "yellow"), (star(5, 0.45, 0.2), "red")],
    "heart": [(union(disc(-0.32, -0.25, 0.4), disc(0.32, -0.25, 0.4),
                     polygon((-0.66, -0.05), (0.66, -0.05), (0, 0.78))), "red"), (disc(-0.34, -0.3, 0.12), "pink")],
    "flower": [
        (union(ring(0, 0, 6, 0.5, 0.36), disc(0, 0, 0.3)), "pink"), (disc(0, 0, 0.28), "yellow"),
        (disc(0, 0, 0.12), "brown"),
    ],
    "sign": [
        (polygon((0, -0.88), (0.76, 0.44), (-0.76, 0.44)), "red"),
        (polygon((0, -0.52), (0.48, 0.3), (-0.48, 0.3)), "white"), (ellipse(0, 0.0, 0.07, 0.24), "black"),
    ],
    "ladybird": [
        (union(disc(0, 0.08, 0.72), disc(0, -0.58, 0.28)), "red"), (disc(0, -0.62, 0.25), "black"),
        (both(disc(0, 0.08, 0.72), lambda x, y: x.abs() - 0.04), "black"),
        (union(disc(-0.34, -0.1, 0.14), disc(0.34, -0.1, 0.14), disc(-0.3, 0.4, 0.12), disc(0.3, 0.4, 0.12)), "black"),
    ],
}  # fmt: skip
NAMES = tuple(STICKERS)


@cache
def draw(name: str) -> Tensor:
    """Premultiplied RGBA (4, SIDE, SIDE) in [0, 1], anti-aliased by fourfold supersampling."""
    line = (torch.arange(4 * SIDE) + 0.5) / (2 * SIDE) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    (silhouette, colour), *details = STICKERS[name]
    inside = silhouette(x, y)
    alpha = (inside < OUTLINE).float()
    rgb = torch.tensor(PALETTE["black"])[:, None, None].expand(3, *x.shape)
    for shape, fill in [(silhouette, colour), *details]:
        painted = (shape(x, y) < 0) & (inside < 0)
        rgb = torch.where(painted, torch.tensor(PALETTE[fill])[:, None, None], rgb)
    return F.avg_pool2d(torch.cat([rgb * alpha, alpha[None]]), 4)


def largest_area(name: str) -> float:
    """The largest share of an image that this decal covers, by its opacity."""
    return draw(name)[3].mean().item()


def side_for(name: str, size: int, area: float) -> int:
    """Side of the square in which this decal covers a share `area` of an S x S image, by its opacity."""
    return max(1, min(size, round(size * (area / largest_area(name)) ** 0.5)))


def render(name: str, degrees: Tensor, side: int) -> Tensor:
    """The decal turned by each of `degrees` (N,), counter-clockwise: premultiplied RGBA (N, 4, side, side)."""
    a = torch.deg2rad(degrees)
    zero = torch.zeros_like(a)
    turn = torch.stack([torch.stack([a.cos(), -a.sin(), zero], 1), torch.stack([a.sin(), a.cos(), zero], 1)], 1)
    master = draw(name).to(degrees).expand(len(a), -1, -1, -1)
    turned = F.grid_sample(master, F.affine_grid(turn, list(master.shape), align_corners=False), align_corners=False)
    return F.interpolate(turned, (side, side), mode="area")
