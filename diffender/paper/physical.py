"""The physical test (paper Sec. 4.5, Table 7) done digitally: a printed patch on a flat scene before a pinhole camera.

The image is a poster; the camera turns around it by yaw and pitch, or steps back. Every frame has a print, a pose a
little off, exposure, colour, blur and sensor noise of its own; `filming.shots` adds JPEG. All is a function of drawn
parameters, so an attack can be made over such frames (`Filmed`), and a frame of the clean scene has the same ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffender.noise import generator
from diffender.ops import gaussian_blur


class Pose(NamedTuple):
    yaw: float = 0.0  # degrees
    pitch: float = 0.0
    distance: float = 1.0  # 1: the image as it is; 2: half as large


CONFIGURATIONS = {  # of Table 7; signs and distances are averaged
    "0°": (Pose(),),
    "yaw ±15°": (Pose(yaw=15), Pose(yaw=-15)),
    "yaw ±30°": (Pose(yaw=30), Pose(yaw=-30)),
    "pitch ±15°": (Pose(pitch=15), Pose(pitch=-15)),
    "distance": (Pose(distance=1.5), Pose(distance=2.0)),
}


class Frame(NamedTuple):
    """The random parameters of one frame, one row for each image. Angles are in degrees."""

    pose: Tensor  # (B, 3): yaw, pitch, distance
    gain: Tensor  # (B, 3): exposure and white balance
    bias: Tensor  # (B, 1)
    gamma: Tensor  # (B, 1)
    blur: Tensor  # (B, 1): sigma in pixels of a 299-pixel image
    grain: Tensor  # (B, 1): standard deviation of the sensor's noise
    ink: Tensor  # (B, 1): how much colour the print loses
    noise: Tensor  # (B, 3, S, S): standard normal


def homography(pose: Tensor, size: int) -> Tensor:
    """Pixels of the poster to pixels of the camera, (B, 3, 3), for (B, 3) yaw, pitch in degrees and distance.

    A pinhole of focal length `size` (53 degrees across), the poster's centre on its axis: K [r1 r2 (0, 0, D)] A.
    """
    yaw, pitch = (pose[:, i].deg2rad() for i in (0, 1))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn_y = matrix([[yaw.cos(), zero, yaw.sin()], [zero, one, zero], [-yaw.sin(), zero, yaw.cos()]])
    turn_x = matrix([[one, zero, zero], [zero, pitch.cos(), -pitch.sin()], [zero, pitch.sin(), pitch.cos()]])
    turned = turn_y @ turn_x
    away = torch.stack([zero, zero, size * pose[:, 2]], dim=1)
    c, f = (size - 1) / 2, float(size)
    camera = torch.tensor([[f, 0, c], [0, f, c], [0, 0, 1]]).to(pose)
    centred = torch.tensor([[1, 0, -c], [0, 1, -c], [0, 0, 1]]).to(pose)
    return camera @ torch.stack([turned[:, :, 0], turned[:, :, 1], away], dim=2) @ centred


def matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def warp(x: Tensor, h: Tensor, beyond: str = "reflection") -> Tensor:
    """Images x (B, C, S, S) as the camera sees them through h (B, 3, 3); beyond their border they are mirrored."""
    size = x.shape[-1]
    line = torch.arange(size).to(x)
    v, u = torch.meshgrid(line, line, indexing="ij")
    seen = torch.stack([u, v, torch.ones_like(u)]).view(1, 3, -1)
    source = torch.linalg.inv(h) @ seen
    grid = (2 * source[:, :2] / source[:, 2:] / (size - 1) - 1).mT.view(len(x), size, size, 2)
    return F.grid_sample(x, grid, padding_mode=beyond, align_corners=True)


def draw_frame(poses: Sequence[Pose], size: int, g: Generator) -> Frame:
    """Parameters of a frame for each pose, its pose a little off (2 degrees, 5 %)."""
    b = len(poses)

    def uniform(low: float, high: float, n: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(b, n, generator=g)

    off = torch.cat([uniform(-2, 2, 2), uniform(0.95, 1.05)], dim=1)
    pose = torch.tensor([list(p) for p in poses], dtype=torch.float32)
    pose = torch.cat([pose[:, :2] + off[:, :2], pose[:, 2:] * off[:, 2:]], dim=1)
    gain = uniform(0.8, 1.2) * uniform(0.95, 1.05, 3)
    return Frame(
        pose,
        gain,
        uniform(-0.05, 0.05),
        uniform(0.8, 1.25),
        uniform(0, 1.5),
        uniform(0, 0.03),
        uniform(0, 0.15),
        torch.randn(b, 3, size, size, generator=g),
    )


def print_patch(x: Tensor, mask: Tensor, ink: Tensor) -> Tensor:
    """The patch as a printer gives it back, inside mask (B, 1, S, S): range [0.05, 0.95], paler colours, softer."""
    grey = x.mean(dim=1, keepdim=True)
    pale = x + ink[:, :, None, None] * (grey - x)
    printed = gaussian_blur(0.05 + 0.9 * pale, 3, 0.5)
    return x * (1 - mask) + printed * mask


def photograph(x: Tensor, scene: Tensor, frame: Frame) -> Tensor:
    """A frame of images x (B, 3, S, S) in [0, 1]; differentiable. Beyond them the clean scene (B or 1, 3, S, S) is
    mirrored: no patch is seen twice."""
    size = x.shape[-1]
    x = blur(x, [0.5 * max(d * d - 1, 0) ** 0.5 for d in frame.pose[:, 2].tolist()])  # a pixel sees more from afar
    h = homography(frame.pose.to(x), size)
    inside = warp(torch.ones_like(x[:, :1]), h, "zeros")
    x = warp(x, h) * inside + warp(scene.expand_as(x), h) * (1 - inside)
    gain, bias, gamma = (t[:, :, None, None].to(x) for t in (frame.gain, frame.bias, frame.gamma))
    x = (gain * x.clamp(1e-4, 1) ** gamma + bias).clamp(0, 1)
    x = blur(x, (frame.blur[:, 0] * size / 299).tolist())
    return (x + frame.grain[:, :, None, None].to(x) * frame.noise.to(x)).clamp(0, 1)


def blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Each image of x (B, C, S, S) by its own sigma in pixels."""
    rows = zip(x.split(1), sigmas, strict=True)
    return torch.cat([gaussian_blur(row, 9, sigma) if sigma > 0.1 else row for row, sigma in rows])


class Filmed(nn.Module):
    """A victim behind the camera, before one scene (1, 3, S, S): its noise is a frame, over the whole range of poses.

    What differs from the scene is a print. An attack on it is the honest adversary of Table 7 (Athalye et al. 2018):
    the patch must work as it is printed, from everywhere that the table looks from.
    """

    def __init__(self, classifier: nn.Module, scene: Tensor):
        super().__init__()
        self.classifier, self.scene, self.size = classifier, scene, scene.shape[-1]

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Frame:
        frames = []
        for image_id in image_ids:
            g = generator(seed, image_id, "film", purpose, k)
            yaw, pitch, distance = torch.rand(3, generator=g).tolist()
            frames.append(draw_frame([Pose(60 * yaw - 30, 60 * pitch - 30, 0.8 + 1.2 * distance)], self.size, g))
        return Frame(*map(torch.cat, zip(*frames, strict=True)))

    def forward(self, x: Tensor, noise: Frame) -> Tensor:
        patch = (x.detach() - self.scene).abs().amax(dim=1, keepdim=True) > 1 / 255  # more than rounding to 8 bits
        printed = print_patch(x, patch.to(x.dtype), noise.ink.to(x))
        return self.classifier(photograph(printed, self.scene, noise))
