"""Defend your own images.

    python -m diffender defend photo.jpg folder/ --out cleaned
    python -m diffender defend photo.jpg --classifier efficientnet_lite0     and what it sees before and after

For every image NAME, of any size, --out gets NAME_restored.png, NAME_mask.png and NAME_heatmap.png of that size, and
a line in per_image.jsonl; report.html shows them all. The model works at its own resolution and keeps the image's
proportions; pixels outside the mask stay as they were. Of an animation the first picture counts, and what is
transparent becomes white. An image takes about 140 bytes a pixel. A classifier is not asked about an image with one
side more than 20 times the other. Files that cannot be read are named at the end, the rest is done, and the exit code
is 1. Ctrl-C stops after the image in hand, and the same command goes on. In Python:

    diffender.defend(Image.open("photo.jpg")).save("clean.png")
    found = diffender.Defender()(Image.open("photo.jpg"))        # with the mask and the map
"""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffender.config import PAPER, DefenseOptions, ModelOptions, RunOptions
from diffender.evaluation.records import append_records, open_run, read_records
from diffender.utils.errors import InputError, named_images, nearest
from diffender.utils.files import printable, sha256, short, whole, write_text
from diffender.utils.interruption import patient
from diffender.utils.options import check_options, check_read, flat, option, parse, part, run, settings
from diffender.utils.progress import bar
from diffender.utils.provenance import command

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from diffender.classifiers.imagenet import Classifier
    from diffender.pipeline import DIFFender
    from diffender.stable_diffusion.model import ModelConfig

MADE = ("restored", "mask", "heatmap")  # files of every image, NAME_restored.png and so on


@dataclass(frozen=True)
class Options:
    defense: DefenseOptions = part(DefenseOptions())
    run: RunOptions = part(RunOptions())
    paths: tuple[str, ...] = option((), "Images, and folders that are searched for images.", group="images")
    out: str = option("defended", "Output folder.")
    classifier: str = option(
        "none", "Name in diffender.classifiers.imagenet, timm:TAG, or none.", group="what a classifier sees"
    )
    classifier_weights: str | None = option(None, "Safetensors file of the classifier, in timm's names.")
    classes: int | None = option(None, "Number of classes of a classifier of your own.", low=2)


class Found(NamedTuple):
    """What the defence makes of an image, all of its size."""

    restored: "Image.Image"
    mask: "Image.Image"  # white: taken for a patch and painted over
    heatmap: "Image.Image"  # the difference map, stretched to its own range
    record: dict  # size, masked share, largest z-score, seconds; what the classifier sees, if it can


class Defender:
    """The defence for PIL images of any size, of 8 or 16 bits. `opts` are those of the command `defend`.

    `defense` is used instead of opening one.
    """

    def __init__(self, opts: Options | None = None, defense: "DIFFender | None" = None):
        from diffender.classifiers.imagenet import class_names, load_classifier
        from diffender.factory import open_defense, pick_device

        self.opts = opts = opts or Options()
        self.defense = defense or open_defense(opts.defense, pick_device(opts.run.device))
        self.at = cache(self.defense.at)  # by size: one defence for all images of it
        device = self.defense.blank.device
        self.classifier: Classifier | None = None
        if opts.classifier != "none":
            self.classifier = load_classifier(opts.classifier, opts.classifier_weights, opts.classes).to(device)
            self.names = class_names() if opts.classes is None else [str(i) for i in range(opts.classes)]

    def __call__(self, image: "Image.Image", name: str = "image") -> Found:
        """An image of any size, turned upright where the camera says how; noise follows from its name."""
        import PIL.Image
        from torchvision.transforms.functional import pil_to_tensor

        from diffender.classifiers.dataset import as_rgb, turned
        from diffender.utils.images import stretch, to_image

        started = time.monotonic()
        if not isinstance(image, PIL.Image.Image):
            raise InputError(
                f"an image is a {type(image).__name__}; give a PIL image, or all in one tensor (B, 3, H, W) to "
                "diffender.defend"
            )
        image = as_rgb(turned(image))
        x = (pil_to_tensor(image).float() / 255)[None].to(self.defense.model.alphas_cumprod.device)
        defense = self.at(working_size(image.size, self.defense.model.cfg))
        with named_images([name]):
            out = defense(x, defense.sample_noise([name], self.opts.run.seed, "defend"))
        restored, mask, heatmap = map(to_image, (out.image[0], out.mask[0], stretch(out.heatmap, x.shape[-2:])[0]))
        record = {"size": list(image.size), "masked": round(out.mask.mean().item(), 5)}
        record["largest_z_score"] = round(out.z_score.max().item(), 2)
        if seen := self.look(image):
            record |= {"before": seen, "after": self.look(restored)}
        return Found(restored, mask, heatmap, record | {"seconds": round(time.monotonic() - started, 2)})

    def look(self, image: "Image.Image") -> dict | None:
        """What the classifier sees in an RGB image, fitted to it as its training was; None without a classifier, or
        where the image is too long for it."""
        from diffender.classifiers.dataset import fit_image

        if self.classifier is None:
            return None
        try:
            x = fit_image(image, self.classifier.cfg)
        except InputError:
            return None
        p = self.classifier(x[None].to(self.classifier.mean)).softmax(dim=1)[0]
        best = p.argmax().item()
        return {"class": best, "label": self.names[best], "confidence": round(p[best].item(), 4)}


def load(name: str | Path = "tiny", device: str = "auto", prompt: str | None = None, **method: Any) -> "DIFFender":
    """The defence around a model, with the prompts and settings that suit it, as the commands open it.

    name is that of the embedded model, or the path of a checkpoint; `prompt` is tuned, manual or empty; `method`
    replaces settings (theta=2.0, draws=6, see `DIFFenderConfig`). Raises InputError for what is not there or does not
    fit.
    """
    from diffender.factory import open_defense, pick_device
    from diffender.stable_diffusion.model import MODELS

    name = str(name) if isinstance(name, Path) else name
    model = ModelOptions(model=name) if name in MODELS else ModelOptions(weights=name)
    if unknown := sorted(method.keys() - flat(PAPER).keys()):
        raise InputError(
            f"unknown setting {unknown[0]}; choose from {', '.join(flat(PAPER))}{nearest(unknown[0], flat(PAPER))}"
        )
    opts = DefenseOptions(model, prompt, method=method)
    check_options(opts)
    return open_defense(opts, pick_device(device))


def defend(
    images: "Tensor | Image.Image | Sequence[Image.Image]", defense: "DIFFender | None" = None, seed: int = 0
) -> Any:
    """Images as they would be without patches, of the size that was given: a tensor for a tensor, else in RGB.

    images: a tensor (B, 3, H, W), float32 in [0, 1], which gradients reach; a PIL image of 8 or 16 bits, or several.
    defense: of `load`; without it, that around the embedded model. Noise follows from the seed and from the place of an
    image among them.
    """
    from torch import Tensor

    from diffender.pipeline import DIFFender
    from diffender.utils.images import check_images

    defense = load() if defense is None else defense
    if not isinstance(defense, DIFFender):
        raise InputError(f"the defence is a {type(defense).__name__}; give what diffender.load returns, or none")
    if isinstance(images, Tensor):
        check_images(images)
        defense = defense.at(working_size((images.shape[3], images.shape[2]), defense.model.cfg))
        noise = defense.sample_noise([str(i) for i in range(len(images))], seed, "defend")
        return defense(images.to(defense.blank.device), noise).image.to(images.device)
    if not isinstance(images, Sequence) or isinstance(images, str):
        return defend([images], defense, seed)[0]
    defender = Defender(Options(run=RunOptions(seed=seed)), defense)
    return [defender(image, str(i)).restored for i, image in enumerate(images)]


def working_size(size: tuple[int, int], cfg: "ModelConfig") -> tuple[int, int]:
    """(H, W) that the model sees of an image of (width, height): its proportions, to the nearest multiple, and about
    as many pixels as the model was trained on. Beyond 4:1 proportions are given up."""
    ratio = min(4.0, max(0.25, size[0] / size[1]))
    sides = cfg.image_size / ratio**0.5, cfg.image_size * ratio**0.5
    return tuple(cfg.multiple * max(1, round(side / cfg.multiple)) for side in sides)


def find_images(paths: tuple[str, ...], out: Path) -> list[tuple[str, Path]]:
    """(name, file) of every image given or in a folder given, but not in `out`; names are the files' paths, shortened
    and made unique."""
    from diffender.classifiers.dataset import KINDS, SUFFIXES

    if web := next((p for p in paths if "://" in p), None):
        raise InputError(f"{web} is a web address; download it, and give the file")
    if "" in paths:
        raise InputError("one of the images has an empty name; name files or folders, . for this folder")
    found = []
    for path in map(Path, paths):
        if path.is_file() and path.suffix.lower() not in SUFFIXES and not readable(path):
            raise InputError(f"{path} is no image that can be read; wanted are {KINDS}, and folders of them")
        if not path.exists():
            raise InputError(f"no file or folder {path}; give {KINDS}, and folders of them")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
            if real(path) in real(out).parents:
                inside = [p for p in inside if real(out) not in real(p).parents]
        if not inside:
            raise InputError(f"no images in {path}; wanted are {KINDS}")
        root = path if path.is_dir() else path.parent
        found += [(short(printable("__".join(p.relative_to(root).with_suffix("").parts))), p) for p in inside]
    if (out / "config.json").is_file():  # a run to go on with: what it made is no input
        names = {*read_records(out), *(name for name, _ in unique(found))}
        made = {real(out) / f"{name}_{kind}.png" for name in names for kind in MADE}
        found = [(name, file) for name, file in found if real(file.parent) / file.name not in made]
    if not found:
        raise InputError("no images given; name files or folders")
    return unique(found)


def unique(found: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The same files, each with a name of its own."""
    names: dict[str, Path] = {}
    for name, file in found:
        while name in names:
            name += "_"
        names[name] = file
    return [*names.items()]


def real(path: Path) -> Path:
    """The real path, with every link resolved. Unlike Path.resolve it accepts links in a circle."""
    return Path(os.path.realpath(path))


def refuse_to_replace(names: Iterable[str], out: Path) -> None:
    """Raises InputError where a new run would write over files that it has not made."""
    made = [f"{name}_{kind}.png" for name in names for kind in MADE] + ["report.html", "per_image.jsonl"]
    there = next((out / name for name in made if (out / name).exists()), None)
    if there is not None and not (out / "config.json").is_file():
        raise InputError(f"{there} is there already and would be written over; choose another --out")


def readable(path: Path) -> bool:
    """Whether Pillow knows files of this kind, by their first bytes."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(path).close()
    except Image.DecompressionBombError:
        return True  # it is an image; `open_image` says that it is too large
    except Exception:  # Pillow says nothing of what a damaged file may raise
        return False
    return True


def refuse_unreadable(images: Sequence[tuple[str, Path]]) -> None:
    """Raises InputError where not one of the files is an image; of several, those that are not are named in the end."""
    if not any(readable(file) for _, file in images):
        others = f", nor is any of the {len(images) - 1} others" if len(images) > 1 else ""
        raise InputError(f"{images[0][1]} is no image that can be read{others}; save it as PNG or JPEG")


def resolved(opts: Options) -> dict:
    """The settings in effect, given or not, that all images in one --out share."""
    from diffender.factory import config_of, dtype_name, hashes_of
    from diffender.weights.prompts import SHIPPED

    asked = opts.defense
    prompts = (asked.prompts or SHIPPED) if asked.prompt_kind == "tuned" else None
    return settings(opts, "paths", "out") | {
        "model": "tiny" if asked.model.embedded else asked.model.model,
        "prompt": asked.prompt_kind,
        **asdict(config_of(asked.model, asked.method)),
        "dtype": dtype_name(asked.model, opts.run.device),
        "sha256": hashes_of(asked.model, classifier=opts.classifier_weights, prompts=prompts),
    }


def main() -> None:
    opts = parse(Options, __doc__)
    tuned = ("--prompt tuned", opts.defense.prompt_kind == "tuned")
    looked = ("--classifier", opts.classifier != "none")
    check_read(opts, {"prompts": tuned, "classifier_weights": looked, "classes": looked})
    if not opts.out:
        raise InputError("--out is empty; name a folder for the results, . for this one")
    images = find_images(opts.paths, Path(opts.out))
    refuse_unreadable(images)
    refuse_to_replace((name for name, _ in images), Path(opts.out))
    # Imported after the options are known to be good: torch takes seconds.
    from diffender.classifiers.dataset import open_image
    from diffender.report.page import photographs_page

    defender, failed = Defender(opts), []
    config = resolved(opts)
    own = Path(opts.out) / "per_image.jsonl"
    done = {name: r["sha256"] for name, r in open_run(own.parent, config, own).items()}
    with patient(f"stopped between two images; go on with: {command(from_here=True)}") as may_stop:
        for name, file in bar(images, "defending", opts.run.quiet, unit=" images"):
            try:
                image, digest = open_image(file, upright=True), sha256(file)
                if done.get(name, digest) != digest:
                    raise InputError(f"{file} is not the image that {own} tells of; choose another --out")
                whole_before = name in done and all(own.with_name(f"{name}_{kind}.png").is_file() for kind in MADE)
                found = None if whole_before else defender(image, name)
            except InputError as e:
                failed.append(str(e) if str(file) in str(e) else f"{file}: {e}")
                continue
            if found is not None:
                for kind in MADE:
                    with whole(own.with_name(f"{name}_{kind}.png")) as partial:
                        getattr(found, kind).save(partial, format="PNG")
                if name not in done:
                    append_records(own, [{"id": name, "file": str(file), "sha256": digest} | found.record])
                may_stop()
    records = list(read_records(own.parent).values())
    write_text(own.with_name("report.html"), photographs_page(records, own.parent, config, command()))
    print(f"{len(images) - len(failed)} of {len(images)} images defended; results in {printable(opts.out)}")
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
