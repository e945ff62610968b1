"""What the embedded model is trained on: captioned photographs, pasted stand-ins for patches, and inpainting masks.

The photographs' captions teach no word for what the prompts of DIFFender ask about. So half of the images get a
region pasted in (noise, a crop of another photograph, a flat colour) and say so in their caption; the others say that
they are clean. No patch that was optimised against a classifier ever enters.
"""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from diffender.utils.errors import InputError
from diffender.utils.files import read_header, save_atomic
from diffender.utils.progress import bar


class Photos(NamedTuple):
    images: list[Tensor]  # uint8 (3, H, W), short side as asked for
    captions: list[str]  # "" where there is none


class Sample(NamedTuple):
    image: Tensor  # (3, S, S) in [0, 1]
    caption: str
    mask: Tensor  # (1, S, S) in {0, 1}, 1 = repaint


def load_photos(source: Path, short_side: int) -> Photos:
    """Every photograph of a folder with captions.csv (columns file, caption), or of a file of `pack`, resized."""
    images = []
    if source.is_file():
        captions = read_header(source)["captions"]
        packed = load_file(source)
        files = [io.BytesIO(part.numpy().tobytes()) for part in packed["jpeg"].split(packed["lengths"].tolist())]
    else:
        rows = captioned_files(source)
        captions = [caption for _, caption in rows]
        files = [path for path, _ in rows]
    for file in bar(files, "reading photographs"):
        images.append(pil_to_tensor(resized(Image.open(file), short_side)))
    return Photos(images, captions)


def captioned_files(root: Path) -> list[tuple[Path, str]]:
    table = root / "captions.csv"
    if not table.is_file():
        raise InputError(
            f"no {table}: training wants a folder with captions.csv (columns file, caption), or a packed one"
        )
    with table.open(encoding="utf-8") as f:
        return [(root / row["file"], row["caption"]) for row in csv.DictReader(f)]


def resized(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    size = [max(short_side, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def pack(root: Path, out: Path, short_side: int = 256, quality: int = 80) -> None:
    """Put a folder of photographs into one small safetensors file of JPEGs, to carry to another machine."""
    parts, captions = [], []
    for path, caption in bar(list(captioned_files(root)), "packing"):
        buffer = io.BytesIO()
        resized(Image.open(path), short_side).save(buffer, "JPEG", quality=quality, optimize=True)
        parts.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
        captions.append(caption)
    tensors = {"jpeg": torch.cat(parts), "lengths": torch.tensor([len(part) for part in parts])}
    save_atomic(tensors, out, {"captions": captions})
    print(f"{len(parts)} photographs, {out.stat().st_size / 1e6:.1f} MB in {out}")


def randint(low: int, high: int, g: Generator) -> int:
    """A random integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def uniform(low: float, high: float, g: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=g))


def random_crop(image: Tensor, size: int, scale: tuple[float, float], g: Generator) -> Tensor:
    """A random square of the uint8 image, `scale` of its short side, resized and perhaps flipped: float in [0, 1]."""
    side = min(min(image.shape[1:]), max(size // 4, round(min(image.shape[1:]) * uniform(*scale, g))))
    top, left = (randint(0, n - side, g) for n in image.shape[1:])
    crop = image[:, top : top + side, left : left + side].float() / 255
    if side != size:
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return crop.flip(-1) if randint(0, 1, g) else crop


def random_region(size: int, low: float, high: float, g: Generator) -> Tensor:
    """A mask (1, S, S): a rectangle, disc or blob of a share of the area between low and high."""
    area = uniform(low, high, g) * size**2
    kind = randint(0, 3, g)
    yy, xx = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    if kind < 2:  # squares and near-squares, half of all
        ratio = math.exp(uniform(-0.5, 0.5, g)) if kind else 1.0
        h, w = (min(size, max(4, round(math.sqrt(area * r)))) for r in (ratio, 1 / ratio))
        top, left = randint(0, size - h, g), randint(0, size - w, g)
        mask = (yy >= top) & (yy < top + h) & (xx >= left) & (xx < left + w)
    elif kind == 2:
        r = math.sqrt(area / math.pi)
        cy, cx = uniform(0, size, g), uniform(0, size, g)
        mask = (yy - cy) ** 2 + (xx - cx) ** 2 < r**2
    else:  # low-frequency noise, its highest values
        field = torch.rand(1, 1, 6, 6, generator=g)
        field = F.interpolate(field, (size, size), mode="bicubic", align_corners=True)[0, 0]
        mask = field >= field.flatten().kthvalue(max(1, round(size**2 - area))).values
    return mask[None].float()


def random_content(photos: Photos, size: int, g: Generator) -> tuple[Tensor, str]:
    """The content of a paste, (3, S, S), and its caption."""
    kind = randint(0, 9, g)
    if kind < 6:  # noise of several grains, contrasts and distributions
        grain = 2 ** randint(0, 3, g)
        cells = -(-size // grain)
        noise = torch.rand(3, cells, cells, generator=g)
        if randint(0, 1, g):  # saturated corners of the colour cube, as sign steps make them
            noise = (noise > 0.5).float()
        low = F.interpolate(torch.rand(1, 3, 4, 4, generator=g), (cells, cells), mode="bilinear")[0]
        noise = torch.lerp(noise, low, uniform(0, 0.6, g))
        mode = "nearest" if randint(0, 1, g) else "bilinear"
        noise = F.interpolate(noise[None], (cells * grain, cells * grain), mode=mode)[0]
        return noise[:, :size, :size], "noise patch"
    if kind < 8:
        other = photos.images[randint(0, len(photos.images) - 1, g)]
        return random_crop(other, size, (0.3, 1.0), g), "photo patch"
    return torch.rand(3, 1, 1, generator=g).expand(3, size, size), "flat patch"


def training_sample(photos: Photos, index: int, size: int, g: Generator) -> Sample:
    """One image of the UNet's training set: half with a pasted region, captioned; a mask to inpaint.

    A quarter of the masks cover everything, and no mask says anything about where the paste is.
    """
    image = random_crop(photos.images[index], size, (0.6, 1.0), g)
    words = photos.captions[index]
    if randint(0, 1, g):
        content, name = random_content(photos, size, g)
        image = torch.lerp(image, content, random_region(size, 0.01, 0.16, g))
        caption = ("adversarial", f"adversarial {name}", name)[randint(0, 2, g)]
    else:
        caption = "clean"
    if words and randint(0, 1, g):  # half the captions name the object, all name the state
        caption = f"{words}, {caption}"
    mask = torch.ones(1, size, size) if randint(0, 3, g) == 0 else random_region(size, 0.01, 0.5, g)
    return Sample(image, caption, mask)


class Crops(Dataset):
    """The VAE's training set: random crops, the n-th always the same. A crop is a share `scale` of the short side."""

    def __init__(self, photos: Photos, size: int, scale: tuple[float, float], seed: int):
        self.photos, self.size, self.scale, self.seed = photos, size, scale, seed

    def __getitem__(self, n: int) -> Tensor:
        g = Generator().manual_seed(self.seed * 1_000_000_000 + n)
        index = randint(0, len(self.photos.images) - 1, g)
        return random_crop(self.photos.images[index], self.size, self.scale, g)


class Samples(Dataset):
    """The UNet's training set: images, masks and the tokens of their captions, the n-th always the same."""

    def __init__(self, photos: Photos, size: int, tokenize: Callable[[list[str]], Tensor], seed: int):
        self.photos, self.size, self.tokenize, self.seed = photos, size, tokenize, seed

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        g = Generator().manual_seed(self.seed * 1_000_000_000 + 500_000_000 + n)
        sample = training_sample(self.photos, n % len(self.photos.images), self.size, g)
        return sample.image, sample.mask, self.tokenize([sample.caption])[0]


def batches(dataset: Dataset, indices: range, batch: int, workers: int) -> DataLoader:
    """Batches of the dataset's items at `indices`, made by `workers` processes beside the training."""
    return DataLoader(dataset, batch, sampler=indices, num_workers=workers, pin_memory=torch.cuda.is_available())
