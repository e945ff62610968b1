"""PatchCleanser's certificate (Xiang et al. 2022) on clean images: what no patch up to a size can change.

python -m diffender certify --data PHOTOS --images 32 --area 0.02,0.05 --masks 3,4,5

"Certified wherever it is" counts images whose answer no patch can change at any place. "Certified places" is the mean
share of places where no patch can change the answer.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from diffender.config import RunOptions, TargetOptions
from diffender.evaluation.records import append_records, open_run, read_records
from diffender.utils.errors import InputError
from diffender.utils.files import sha256, write_json, write_text
from diffender.utils.formats import table
from diffender.utils.options import check_range, option, parse, part, run
from diffender.utils.progress import bar
from diffender.utils.provenance import command, machine

SETTINGS = {"area": (0.0005, 0.5, float), "masks": (1, None, int)}  # lowest, highest, type


@dataclass(frozen=True)
class Options:
    target: TargetOptions = part(TargetOptions(), "data", "classifier", "classifier_weights", "classes")
    images: int = option(6, "Number of images, of those that the classifier gets right.", low=1)
    area: str = option(
        "0.05", "Share of the image that the patch to withstand covers; several with commas.", group="the certificate"
    )
    masks: str = option("6", "Masks of the first round along each axis; several with commas.")
    out: str | None = option(
        None, "Output folder. Without it: one in runs/ for these images and this classifier. A run there is resumed."
    )
    run: RunOptions = part(RunOptions())


def numbers(flag: str, text: str) -> list[float | int]:
    """The values of a flag. Raises InputError for what is no number or out of its range."""
    low, high, kind = SETTINGS[flag]
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError as e:
        raise InputError(f"--{flag} is {text}; give numbers, with commas") from e
    for value in values:
        check_range(f"--{flag}", value, low, high)
    return list(dict.fromkeys(values))


def key(image_id: str, area: float, masks: float) -> str:
    """The id of a record: an image under these windows."""
    return f"{image_id}, {area:g}, {masks}"


def main() -> None:
    opts = parse(Options, __doc__)
    asked = [(area, masks) for area in numbers("area", opts.area) for masks in numbers("masks", opts.masks)]
    # Imported after the options are known to be good: torch takes seconds.
    from diffender.classifiers.dataset import correct_subset, list_items
    from diffender.classifiers.imagenet import load_classifier
    from diffender.defenses.patchcleanser import PatchCleanser
    from diffender.factory import pick_device

    target, device = opts.target, pick_device(opts.run.device)
    classifier = load_classifier(target.classifier, target.classifier_weights, target.classes).to(device)
    batch = correct_subset(list_items(target.data, target.classes), classifier, opts.images, opts.run.seed)
    config = {"data": target.data, "classifier": target.classifier}
    if target.classifier_weights:
        config["sha256"] = sha256(Path(target.classifier_weights))
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    folder = Path(opts.out or f"runs/certify-{digest}")
    own = folder / "per_image.jsonl"
    done = {name: r.get("hash") for name, r in open_run(folder, config, own).items()}
    images = zip(batch.ids, batch.hashes, batch.x.to(device), batch.y.tolist(), strict=True)
    for image_id, hashed, x, y in bar(list(images), "certifying", opts.run.quiet):
        for area, masks in asked:
            if done.get(key(image_id, area, masks)) not in (None, hashed):
                raise InputError(f"{folder} holds results of another file of the name {image_id}; choose another --out")
            if key(image_id, area, masks) not in done:
                started = time.monotonic()
                cleanser = PatchCleanser(classifier, area, int(masks))
                found = {"right": cleanser(x) == y, "places": cleanser.certified_places(x, y)}
                seconds = {"seconds": time.monotonic() - started}
                append_records(own, [{"id": key(image_id, area, masks), "hash": hashed} | found | seconds])

    records = read_records(folder)
    parts = [(area, masks, [records[key(i, area, masks)] for i in batch.ids]) for area, masks in asked]
    print(write_table(opts, parts, folder, machine(device)))


def write_table(opts: Options, parts: list[tuple[float, float, list[dict]]], folder: Path, where: str) -> str:
    """A row for each area and number of masks, from the records of all images; beside it results.json."""
    from diffender.evaluation.metrics import bounded, proportion

    rows, results = [], []
    for area, masks, mine in parts:
        columns = {
            "right, without a patch": [float(r["right"]) for r in mine],
            "certified wherever it is": [float(r["places"] == 1) for r in mine],
            "certified places": [r["places"] for r in mine],
        }
        rows.append((f"{100 * area:g} %", f"{masks}²", *(bounded(proportion(values)) for values in columns.values())))
        results.append({"area": area, "masks": masks, "n": len(mine)} | {k: sum(v) for k, v in columns.items()})
    seconds = sum(sum(r["seconds"] for r in mine) for *_, mine in parts)
    text = table(("patches of", "masks", *columns), rows) + (
        f"\n`{command()}`: PatchCleanser, {results[0]['n']} clean images, {opts.target.classifier}, seed "
        f"{opts.run.seed}, {seconds:.0f} s on {where}, {time.strftime('%Y-%m-%d')}.\n"
    )
    write_json(folder / "results.json", {"command": command(), "rows": results})
    write_text(folder / "table.md", text)
    return text


if __name__ == "__main__":
    run(main)
