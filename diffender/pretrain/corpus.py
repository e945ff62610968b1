"""What the embedded model is trained on: captioned photographs, pasted stand-ins for patches, and inpainting masks.

The photographs' captions teach no word for what the prompts of DIFFender ask about. So half of the images get a region
pasted in (noise, colours, a crop of another photograph, drawn shapes, text) and say so in their caption; the others say
that they are clean. No patch that was optimised against a classifier ever enters.
"""

import io
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from diffender.classifiers.dataset import open_image, read_csv, resized
from diffender.pretrain.options import Recipe
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors, read_header, save_atomic
from diffender.utils.progress import bar


class Photos(NamedTuple):
    images: list[Tensor]  # uint8 (3, H, W), short side as asked for
    captions: list[str]  # "" where there is none


CONTENTS = ("noise", "colour", "photo", "sticker", "text", "flat")  # of a paste


def said(content: str) -> tuple[str, str, str]:
    """How a caption may name a paste."""
    return "adversarial", f"adversarial {content} patch", f"{content} patch"


STATES = tuple(dict.fromkeys(["clean", *(state for content in CONTENTS for state in said(content))]))


class Sample(NamedTuple):
    image: Tensor  # (3, S, S) in [0, 1]
    caption: str
    mask: Tensor  # (1, S, S) in {0, 1}, 1 = repaint
    region: Tensor  # (1, S, S) in {0, 1}, 1 = pasted


@cache
def load_photos(source: Path, short_side: int) -> Photos:
    """Every photograph of a folder with captions.csv (columns file, caption), or of a file of `pack`, resized."""
    images = []
    if source.is_file():
        captions = read_header(source).get("captions")
        if captions is None:
            raise InputError(f"{source} holds no photographs; give a file of `pretrain pack`, or a folder")
        packed = load_tensors(source)
        parts = packed["photographs"].split(packed["lengths"].tolist())
        files = [io.BytesIO(part.numpy().tobytes()) for part in parts]
    else:
        rows = captioned_files(source)
        captions = [caption for _, caption in rows]
        files = [path for path, _ in rows]
    for file in bar(files, "reading photographs"):
        image = open_image(file) if isinstance(file, Path) else Image.open(file).convert("RGB")
        images.append(pil_to_tensor(resized(image, short_side)))
    return Photos(images, captions)


def captioned_files(root: Path) -> list[tuple[Path, str]]:
    table = root / "captions.csv"
    if not table.is_file():
        raise InputError(
            f"no {table}: training wants a folder with captions.csv (columns file, caption), or a packed one"
        )
    rows = read_csv(table, "file", "caption")
    if not rows:
        raise InputError(f"{table} lists no photographs; give it rows of file and caption")
    if gone := next((row["file"] for row in rows if not (root / row["file"]).is_file()), None):
        raise InputError(f"{table} lists {gone}, which is not there; copy it, or take out its row")
    return [(root / row["file"], row["caption"]) for row in rows]


def pack(root: Path, out: Path, extras: dict[str, Tensor], encode: Callable[[str], list[int]]) -> None:
    """Put all that training needs into one file, to carry to a machine without a network.

    Photographs go in as WebP of quality 58, short side 256 px, `extras` as float16. `encode` gives the token ids of
    the captions, which stand in the header, so that no tokenizer is needed there.
    """
    parts, captions = [], []
    for path, caption in bar(captioned_files(root), "packing"):
        buffer = io.BytesIO()
        resized(open_image(path), 256).save(buffer, "WEBP", quality=58, method=6)
        parts.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
        captions.append(caption)
    tensors = {"photographs": torch.cat(parts), "lengths": torch.tensor([len(part) for part in parts])}
    tensors |= {k: v.half() for k, v in extras.items()}
    texts = {*captions, *(f"{caption}," for caption in captions), *STATES, ""}
    save_atomic(tensors, out, {"captions": captions, "tokens": {text: encode(text) for text in sorted(texts)}})
    print(f"{len(parts)} photographs, {out.stat().st_size / 1e6:.1f} MB in {out}")


class PackedTokens(NamedTuple):
    """Token ids of the captions that a packed file can make: an object, a comma and a state, or one of both. The comma
    belongs to the object: after other punctuation it is no token of its own."""

    ids: dict[str, list[int]]

    def __call__(self, text: str) -> list[int]:
        if text in self.ids:
            return self.ids[text]
        words, _, state = text.rpartition(", ")
        return [*self.ids[f"{words},"], *self.ids[state]]


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


def noise(size: int, g: Generator) -> Tensor:
    """Noise of several grains, contrasts and distributions, (3, S, S)."""
    grain = 2 ** randint(0, 3, g)
    cells = -(-size // grain)
    field = torch.rand(3, cells, cells, generator=g)
    if randint(0, 1, g):  # saturated corners of the colour cube, as sign steps make them
        field = (field > 0.5).float()
    low = F.interpolate(torch.rand(1, 3, 4, 4, generator=g), (cells, cells), mode="bilinear")[0]
    field = torch.lerp(field, low, uniform(0, 0.6, g))
    mode = "nearest" if randint(0, 1, g) else "bilinear"
    return F.interpolate(field[None], (cells * grain, cells * grain), mode=mode)[0][:, :size, :size]


def colour_field(size: int, g: Generator) -> Tensor:
    """Colours that change slowly or in blocks, (3, S, S): 4 to 28 cells to a side, so a few to a patch."""
    cells = randint(4, 28, g)
    field = torch.rand(1, 3, cells, cells, generator=g)
    if randint(0, 1, g):
        field = (field > 0.5).float()
    mode = ("nearest", "bilinear", "bicubic")[randint(0, 2, g)]
    return F.interpolate(field, (size, size), mode=mode)[0].clamp(0, 1)


def drawing(size: int, g: Generator, text: bool) -> Tensor:
    """Shapes in flat colours, or lines of letters, all over a ground of one colour, (3, S, S)."""

    def colour() -> tuple[int, ...]:
        return tuple(randint(0, 255, g) for _ in range(3))

    image = Image.new("RGB", (size, size), colour())
    draw = ImageDraw.Draw(image)
    if text:
        height = randint(8, 40, g)
        font = ImageFont.load_default(height)
        inks = [colour() for _ in range(randint(1, 3, g))]
        for line, top in enumerate(range(0, size, height)):
            letters = "".join(chr(randint(65, 90, g) + 32 * randint(0, 1, g)) for _ in range(2 * size // height))
            draw.text((-randint(0, height, g), top), letters, inks[line % len(inks)], font)
    for _ in range(0 if text else randint(20, 120, g)):
        x, y, w, h = (randint(0, size, g), randint(0, size, g), randint(6, size // 4, g), randint(6, size // 4, g))
        corners = [(x + randint(-w, w, g), y + randint(-h, h, g)) for _ in range(randint(3, 7, g))]
        kind = randint(0, 3, g)
        if kind == 0:
            draw.ellipse((x, y, x + w, y + h), colour(), colour(), randint(0, 4, g))
        elif kind == 1:
            draw.rectangle((x, y, x + w, y + h), colour())
        elif kind == 2:
            draw.polygon(corners, colour(), colour())
        else:
            draw.line(corners, colour(), randint(1, 8, g))
    return pil_to_tensor(image).float() / 255


def random_content(photos: Photos, size: int, g: Generator) -> tuple[Tensor, str]:
    """The content of a paste, (3, S, S), and its name of CONTENTS."""
    kind = randint(0, 11, g)
    if kind < 5:
        return noise(size, g), "noise"
    if kind < 7:
        return colour_field(size, g), "colour"
    if kind < 9:
        other = photos.images[randint(0, len(photos.images) - 1, g)]
        return random_crop(other, size, (0.3, 1.0), g), "photo"
    if kind < 11:
        text = randint(0, 2, g) == 0
        return drawing(size, g, text), "text" if text else "sticker"
    return torch.rand(3, 1, 1, generator=g).expand(3, size, size), "flat"


def soft(region: Tensor, g: Generator) -> Tensor:
    """The region (1, S, S), half of the time with a blurred edge, a third of the time not quite opaque."""
    if randint(0, 1, g):
        reach = randint(1, 5, g)
        region = F.avg_pool2d(region[None], 2 * reach + 1, 1, reach, count_include_pad=False)[0]
    return region * (uniform(0.75, 1.0, g) if randint(0, 2, g) == 0 else 1.0)


def training_sample(photos: Photos, index: int, size: int, g: Generator) -> Sample:
    """One image of the UNet's training set: half with a pasted region, captioned; a mask to inpaint.

    A quarter of the masks cover everything, and no mask says anything about where the paste is.
    """
    image, region = random_crop(photos.images[index], size, (0.6, 1.0), g), torch.zeros(1, size, size)
    words = photos.captions[index]
    if randint(0, 1, g):
        content, name = random_content(photos, size, g)
        region = random_region(size, 0.01, 0.16, g)
        image = torch.lerp(image, content, soft(region, g))
        caption = said(name)[randint(0, 2, g)]
    else:
        caption = "clean"
    if words and randint(0, 1, g):  # half the captions name the object, all name the state
        caption = f"{words}, {caption}"
    mask = torch.ones(1, size, size) if randint(0, 3, g) == 0 else random_region(size, 0.01, 0.5, g)
    return Sample(image, caption, mask, region)


class Crops(Dataset):
    """The VAE's training set: random crops, the n-th always the same. A crop is a share `scale` of the short side."""

    def __init__(self, photos: Photos, size: int, scale: tuple[float, float], seed: int):
        self.photos, self.size, self.scale, self.seed = photos, size, scale, seed

    def __getitem__(self, n: int) -> Tensor:
        g = Generator().manual_seed(self.seed * 1_000_000_000 + n)
        index = randint(0, len(self.photos.images) - 1, g)
        return random_crop(self.photos.images[index], self.size, self.scale, g)


class Samples(Dataset):
    """The UNet's training set: images, masks, tokens of captions and pasted regions, the n-th always the same."""

    def __init__(self, photos: Photos, size: int, tokenize: Callable[[list[str]], Tensor], seed: int):
        self.photos, self.size, self.tokenize, self.seed = photos, size, tokenize, seed

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = Generator().manual_seed(self.seed * 1_000_000_000 + 500_000_000 + n)
        sample = training_sample(self.photos, n % len(self.photos.images), self.size, g)
        return sample.image, sample.mask, self.tokenize([sample.caption])[0], sample.region


def batches(dataset: Dataset, indices: range, batch: int, recipe: Recipe) -> DataLoader:
    """Batches of the dataset's items at `indices`, made by --workers processes beside the training.

    For training on a GPU they lie in pinned memory.
    """
    pinned = recipe.device.type == "cuda"
    return DataLoader(dataset, batch, sampler=indices, num_workers=recipe.workers, pin_memory=pinned)
