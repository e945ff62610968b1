"""Train Jedi's autoencoder on drawn masks, and estimate the entropy of clean images."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffender.classifiers.dataset import list_items, load_image
from diffender.classifiers.imagenet import CLASSIFIERS
from diffender.defenses.jedi import SIDE, STRIDES, WINDOWS, Autoencoder, entropy_windows
from diffender.noise import generator
from diffender.pretrain.options import Jedi
from diffender.utils.errors import InputError
from diffender.utils.files import new_file, save_atomic


def draw_mask(g: Generator) -> Tensor:
    """A square, rectangle (1 : 0.7 to 1.4) or ellipse over 1 to 10 % of an image, somewhere, (64, 64) in {0, 1}."""
    kind = int(torch.randint(3, (), generator=g))  # 0: square, 1: rectangle, 2: ellipse
    u, v, w, a = torch.rand(4, generator=g).tolist()
    area = (0.01 + 0.09 * a) * SIDE**2
    ratio = 1 if kind == 0 else 0.7 * 2**w
    if kind == 2:
        area *= 4 / math.pi
    height, width = (min(round(n), SIDE) for n in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
    top, left = round(u * (SIDE - height)), round(v * (SIDE - width))
    y, x = (torch.arange(SIDE)[:, None] - top - (height - 1) / 2, torch.arange(SIDE)[None] - left - (width - 1) / 2)
    if kind == 2:
        return ((2 * y / height) ** 2 + (2 * x / width) ** 2 <= 1).float()
    return ((y.abs() < height / 2) & (x.abs() < width / 2)).float()


def train_jedi(opts: Jedi) -> None:
    """Write the weights of `defenses.jedi` to opts.out, with the statistics of clean images in the header."""
    path, g = new_file(Path(opts.out)), generator(opts.seed, "jedi")
    clean = clean_statistics(opts)
    print(f"entropy of clean windows: {clean['clean_mean']}, deviations {clean['clean_std']}")
    masks = torch.stack([draw_mask(g) for _ in range(opts.masks)]).flatten(1)
    net = Autoencoder()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0)
    optimizer = torch.optim.Adam(net.parameters(), opts.lr)
    for epoch in range(opts.epochs):
        total = 0.0
        for batch in masks[torch.randperm(len(masks), generator=g)].split(64):
            loss = F.binary_cross_entropy_with_logits(net.logits(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch) / len(masks)
        print(f"epoch {epoch} loss {total:.4f}")
    header = {k: v for k, v in asdict(opts).items() if k != "out"} | clean
    save_atomic({k: v.half() for k, v in net.state_dict().items()}, path, header)


def clean_statistics(opts: Jedi) -> dict:
    """Mean and standard deviation over images of their mean window entropy, in each scale; the number of images."""
    items = list_items(opts.data)
    if len(items) < 2:
        raise InputError(f"--data {opts.data} has one photograph; a deviation takes two: give more")
    order = torch.randperm(len(items), generator=generator(opts.seed, "jedi clean")).tolist()[: opts.images]
    cfg = replace(CLASSIFIERS["efficientnet_lite0"], size=opts.size, resize=round(opts.size * 8 / 7))
    images = [load_image(items[i].path, cfg)[None] for i in order]
    means = torch.tensor(
        [[entropy_windows(x, w, s).mean() for w, s in zip(WINDOWS, STRIDES, strict=True)] for x in images]
    )
    mean, std = ([round(v, 3) for v in t.tolist()] for t in (means.mean(dim=0), means.std(dim=0)))
    return {"images": len(images), "clean_mean": mean, "clean_std": std}
