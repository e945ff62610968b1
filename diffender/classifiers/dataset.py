"""Images with ImageNet labels: the embedded sample photographs, folders by wnid, or a csv of file and label."""

import csv
import hashlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffender.classifiers.imagenet import Classifier, ClassifierConfig
from diffender.noise import generator
from diffender.utils.errors import InputError
from diffender.utils.files import one_line, printable, sha256

VALIDATION = "ILSVRC2012_val_"  # with which the names of ImageNet's validation images begin
LONGEST = 20  # longer side over shorter side, at most
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
KINDS = f"files of the kinds {', '.join(sorted(SUFFIXES))}"  # what is allowed, for messages


TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Item(NamedTuple):
    id: str  # path within the data set, without its suffix
    path: Path
    label: int


class Batch(NamedTuple):
    ids: list[str]
    x: Tensor  # (B, 3, S, S) in [0, 1]
    y: Tensor  # (B,)
    hashes: list[str]  # `digest_of` the files

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return self._replace(x=self.x.to(device), y=self.y.to(device))


def list_items(data: str, classes: int | None = None) -> list[Item]:
    """The images of `data`.

    samples             the photographs of foolbox
    a folder            with one folder for each wnid; or ImageNet's validation images in one folder, with
                        LOC_val_solution.csv or the development kit's ground truth in it or in a folder above
    a csv file          with the columns file and label, which is a 0-based class index or a wnid

    With `classes`, their number where they are not ImageNet's: a folder with a folder for each, or a csv of indices.
    """
    if data == "samples" and classes is None:
        return sample_items()
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        items = csv_items(path, classes)
    elif classes is not None:
        items = own_items(path, classes)
    elif path.is_dir():
        items = validation_items(path) or folder_items(path)
    else:
        raise InputError(f"no data at {data!r}; give samples, a folder of wnid folders, or a csv with file and label")
    if not items:
        raise InputError(f"no images in {data}; wanted are {KINDS}")
    items = [item._replace(id=printable(item.id)) for item in items]
    if twice := [name for name, n in Counter(item.id for item in items).items() if n > 1]:
        raise InputError(f"{data} has more than one image {twice[0]}, whatever their kind; rename or remove one")
    return items


def list_photographs(data: str) -> list[Path]:
    """Image files without labels: of foolbox (`samples`), of a csv's column `file`, or of a folder with its folders."""
    if data == "samples":
        return [item.path for item in sample_items()]
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() == ".csv":
        files = [path.parent / row["file"] for row in read_csv(path, "file")]
    else:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"no images in {data}; wanted are {KINDS}, in a folder or named by a csv")
    return files


def sample_items() -> list[Item]:
    """The 20 ImageNet photographs that the foolbox package carries, label in the name."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or not spec.origin:
        raise InputError("the sample photographs come with the package foolbox; pip install -r requirements.txt")
    paths = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    return [Item(p.stem, p, int(p.stem.split("_")[2])) for p in paths]


def csv_items(table: Path, classes: int | None) -> list[Item]:
    wnids, items = ranks() if classes is None else {}, []
    allowed = "class indices from 0 to 999, or ImageNet-1k wnids" if classes is None else f"0 to {classes - 1}"
    for number, row in enumerate(read_csv(table, "file", "label"), start=2):
        if not Path(row["file"]).name:
            raise InputError(f"{table}, line {number}: no file")
        label = row["label"].strip()
        if label not in wnids and not (label.isdecimal() and int(label) < (classes or 1000)):
            raise InputError(f"{table}, line {number}: label {label!r}; labels are {allowed}")
        rank = wnids[label] if label in wnids else int(label)
        items.append(Item(str(Path(row["file"]).with_suffix("")), table.parent / row["file"], rank))
    return items


@cache
def ranks() -> dict[str, int]:
    """The 0-based class index of every ImageNet-1k wnid: its rank among all."""
    from timm.data import ImageNetInfo

    return {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}


def validation_items(root: Path) -> list[Item]:
    """ImageNet's own validation images, flat in a folder, with the published labels; empty for any other folder."""
    images = sorted(p for p in root.glob(f"{VALIDATION}*") if p.suffix.lower() in SUFFIXES)
    if not images:
        return []
    places = [root, *root.absolute().parents[:4]]
    solution = next((p for d in places if (p := d / "LOC_val_solution.csv").is_file()), None)
    if solution is not None:
        rows = read_csv(solution, "ImageId", "PredictionString")
        wnids = {row["ImageId"]: row["PredictionString"].strip().partition(" ")[0] for row in rows}
    else:
        wnids = ground_truth(places)
    if unknown := [p.name for p in images if wnids.get(p.stem) not in ranks()]:
        raise InputError(f"{solution or root} has no label for {', '.join(unknown[:5])}; fetch the labels again")
    return [Item(p.stem, p, ranks()[wnids[p.stem]]) for p in images]


def ground_truth(places: Sequence[Path]) -> dict[str, str]:
    """Wnids by image, of the development kit's ILSVRC2012_validation_ground_truth.txt and meta.mat."""
    kits = [k for d in places for k in (d, d / "data", d / "ILSVRC2012_devkit_t12" / "data")]
    name = "ILSVRC2012_validation_ground_truth.txt"
    kit = next((k for k in kits if (k / name).is_file() and (k / "meta.mat").is_file()), None)
    if kit is None:
        raise InputError(
            f"{places[0]} has ImageNet's validation images without labels; put LOC_val_solution.csv, or the "
            f"development kit's {name} and meta.mat, beside them or in a folder above"
        )
    try:
        from scipy.io import loadmat
    except ImportError as e:
        raise InputError(f"{kit / 'meta.mat'} is read by scipy: pip install scipy, or use LOC_val_solution.csv") from e
    try:
        synsets = loadmat(kit / "meta.mat", squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(n) for n in (kit / name).read_text(encoding="utf-8").split()]
    except Exception as e:  # scipy says nothing of what a damaged file may raise
        raise InputError(f"meta.mat or {name} in {kit} is damaged ({one_line(e)}); fetch the kit again") from e
    return {f"{VALIDATION}{i:08}": wnids.get(n, "") for i, n in enumerate(numbers, start=1)}


def read_csv(table: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a csv file that has these columns, at least, in every row. Raises InputError for any other file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, skipinitialspace=True)
            found, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{table} cannot be read as a csv file in UTF-8 ({one_line(e)})") from e
    if missing := set(columns) - set(found):
        raise InputError(
            f"{table} has the columns {', '.join(found) or 'none'}; wanted are {', '.join(columns)}: "
            f"{', '.join(sorted(missing))} is missing"
        )
    for number, row in enumerate(rows, start=2):
        if short := [column for column in columns if row[column] is None]:
            raise InputError(f"{table}, line {number}: no {short[0]}; give as many values as the first line has names")
    return rows


def folder_items(root: Path) -> list[Item]:
    """root/<wnid>/* or root/<wnid>_*: the class is the wnid's rank among all 1000, however few of them are there."""
    rank = ranks()
    files = sorted(p for p in [*root.glob("*"), *root.glob("*/*")] if p.suffix.lower() in SUFFIXES)
    wnids = [(p.name.split("_")[0] if p.parent == root else p.parent.name) for p in files]
    unknown = sorted(set(wnids) - set(rank))
    flat = [p.parent for p, wnid in zip(files, wnids, strict=True) if wnid in unknown and p.name.startswith(VALIDATION)]
    if flat:
        raise InputError(f"{root} has ImageNet's validation images in a folder of it; give that one: {flat[0]}")
    if unknown:
        raise InputError(
            f"{root} has images under names that are no ImageNet-1k wnids: {', '.join(unknown[:5])}; for your own "
            "classes give --classes and --classifier-weights"
        )
    ids = [str(p.relative_to(root).with_suffix("")) for p in files]
    return [Item(i, p, rank[wnid]) for i, p, wnid in zip(ids, files, wnids, strict=True)]


def own_items(root: Path, classes: int) -> list[Item]:
    """root/<class>/**: a folder for each class, as torchvision's ImageFolder takes them, but hidden folders are none;
    classes in order of names."""
    files = [(f, i) for i, name in enumerate(own_classes(str(root), classes)) for f in sorted((root / name).rglob("*"))]
    images = [(f, i) for f, i in files if f.suffix.lower() in SUFFIXES]
    return [Item(str(f.relative_to(root).with_suffix("")), f, i) for f, i in images]


def own_classes(data: str, classes: int) -> list[str]:
    """The names of the classes: those of the folders in `data`, in order; of a csv, numbers."""
    path = Path(data).expanduser()
    if path.is_file():
        return [str(i) for i in range(classes)]
    if not path.is_dir():
        raise InputError(f"no folder at {data!r}; --classes wants one with a folder for each class, or a csv")
    names = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and folder.name[0] != ".")
    if len(names) != classes:
        raise InputError(
            f"{data} has {len(names)} folders ({', '.join(names[:5])}); --classes {classes} wants one for each class"
        )
    return names


def load_image(path: Path, cfg: ClassifierConfig) -> Tensor:
    """Decode, resize the short side, crop the middle: float32 (3, S, S) in [0, 1], as this classifier was trained.

    For recognisers of faces: the middle 160 pixels of an LFW image, and anything else whole, stretched to the square.
    """
    image = open_image(path)
    try:
        return fit_image(image, cfg)
    except InputError as e:
        raise InputError(f"{path} is {e}") from e


def open_image(path: Path, upright: bool = False) -> Image.Image:
    """A file's image in RGB: of an animation the first frame; turned `upright` where the camera says how. Raises
    InputError for a file that is missing, no image, one of 32 bits, or one of more than 179 million pixels, which is
    Pillow's limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_rgb(turned(image) if upright else image)
    except InputError as e:
        raise InputError(f"{path} is {e}") from e
    except MemoryError:
        raise
    except Exception as e:  # Pillow says nothing of what a damaged file may raise
        reason = "no such file" if isinstance(e, FileNotFoundError) else f"it does not decode ({one_line(e)})"
        raise InputError(f"cannot read image {path}: {reason}; wanted are {KINDS}") from e


def turned(image: Image.Image) -> Image.Image:
    """An image turned as its camera says. Unlike Pillow's exif_transpose it writes no EXIF anew, which fails where any
    part of that is damaged."""
    image.load()  # Pillow turns a TIFF itself
    try:
        how = TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # of whatever kind: what cannot be read says nothing
        return image
    if how is None:
        return image
    image = image.transpose(how)
    for told in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):  # where it would be read again
        image.info.pop(told, None)
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB: 16 bits become 8, and what is transparent becomes white. Raises InputError for one without
    pixels, and for one of 32 bits, whose range nobody knows."""
    if not all(image.size):
        raise InputError(f"an image of {image.width} x {image.height} pixels; give one that has some")
    if image.mode == "F" or image.mode == "I" and not is_16_bit(image):
        raise InputError(f"an image of 32 bits (mode {image.mode}); allowed are 8 and 16 bits a channel: convert it")
    if image.mode.startswith("I"):  # Pillow would cut values off at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_16_bit(image: Image.Image) -> bool:
    """Whether an image of mode I holds 16-bit values: all from 0 to 65535, and some above 255.

    Pillow opens files of 16 and of 32 bits in this mode.
    """
    values = np.asarray(image)
    return bool(values.min() >= 0 and 255 < values.max() < 1 << 16)


def fit_image(image: Image.Image, cfg: ClassifierConfig) -> Tensor:
    """An RGB image as `load_image` gives it."""
    if cfg.aspect is not None:
        if image.size == (250, 250):  # LFW: the face is in the middle
            left = (250 - round(160 * cfg.aspect)) // 2
            image = image.crop((left, 45, 250 - left, 205))
        return pil_to_tensor(image.resize((cfg.size, cfg.size), Image.Resampling.BILINEAR)).float() / 255
    if max(image.size) > LONGEST * min(image.size):
        raise InputError(
            f"an image of {' x '.join(map(str, image.size))} pixels; one side is at most {LONGEST} times the "
            "other: crop it"
        )
    image = resized(image, cfg.resize, cfg.interpolation)
    left, top = ((n - cfg.size) // 2 for n in image.size)
    return pil_to_tensor(image.crop((left, top, left + cfg.size, top + cfg.size))).float() / 255


def resized(image: Image.Image, short_side: int, interpolation: str = "bicubic") -> Image.Image:
    """The image in its proportions, with so many pixels on the shorter side."""
    scale = short_side / min(image.size)
    size = [max(short_side, round(side * scale)) for side in image.size]
    return image.resize(size, getattr(Image.Resampling, interpolation.upper()))


def digest_of(path: Path) -> str:
    """The first 16 digits of a file's sha256: by these images are told apart, whatever their names."""
    return sha256(path)[:16]


def digest_of_all(paths: Sequence[Path]) -> str:
    """A digest of what these files hold, in this order."""
    return hashlib.sha256(" ".join(map(digest_of, paths)).encode()).hexdigest()


def correct_subset(
    items: list[Item], classifier: Classifier, count: int, seed: int, exclude: frozenset[str] = frozenset()
) -> Batch:
    """The first `count` images of a seeded permutation that the undefended classifier gets right.

    Images whose file hash is in `exclude` (those that prompts or patches were made of) are left out. Raises InputError
    where none is left.
    """
    order = torch.randperm(len(items), generator=generator(seed, "subset")).tolist()
    right: list[tuple[str, Tensor, int, str]] = []
    excluded = 0
    for item in (items[i] for i in order):
        if len(right) == count:
            break
        x, digest = load_image(item.path, classifier.cfg), digest_of(item.path)
        if digest in exclude:
            excluded += 1
        elif classifier(x[None].to(classifier.mean)).argmax().item() == item.label:
            right.append((item.id, x, item.label, digest))
    if not right and excluded == len(items):
        raise InputError(
            f"the prompts or patches were made of all {excluded} of these images; give other --data, --prompts, "
            "--patch-file or --generator"
        )
    if not right:
        raise InputError(
            f"{classifier.cfg.tag} gets none of these images right ({len(items)}, without {excluded} that prompts or "
            "patches were made of); check the labels and the classifier's weights"
        )
    ids, images, labels, hashes = zip(*right, strict=True)
    return Batch(list(ids), torch.stack(images), torch.tensor(labels), list(hashes))
