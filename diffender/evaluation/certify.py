"""PatchCleanser's certificate (Xiang et al. 2022) on clean images: what no patch up to a size can change.

Whole images are certified where no patch can change the answer wherever it is; places where no patch at that place can.

python -m diffender certify --data PHOTOS --images 32
"""

import time
from dataclasses import dataclass
from pathlib import Path

from diffender.utils.options import option, parse, run


@dataclass(frozen=True)
class Options:
    data: str = option(
        "samples", "Images: samples, a folder with a folder for each wnid, or a csv with file and label."
    )
    images: int = option(6, "Number of images, of those that the classifier gets right.", low=1)
    area: float = option(0.05, "Share of the image that the patch to withstand covers.", low=0.0005, high=0.5)
    masks: int = option(6, "Masks of the first round along each axis.", low=1)
    classifier: str = option("efficientnet_lite0", "Name in diffender.classifiers.imagenet, or timm:TAG.")
    classifier_weights: str | None = option(None, "Safetensors file of the classifier, in timm's names.")
    seed: int = option(0, "Seed of the choice of images.", low=0)
    out: str = option("runs/patchcleanser", "Output folder. A run that is there is resumed.")


def main() -> None:
    opts = parse(Options, __doc__)
    # Imported after the options are known to be good: torch takes seconds.
    from diffender.classifiers.dataset import correct_subset, list_items
    from diffender.classifiers.imagenet import load_classifier
    from diffender.defenses.patchcleanser import PatchCleanser
    from diffender.evaluation.metrics import wilson
    from diffender.evaluation.records import append_records, open_run
    from diffender.factory import command, machine
    from diffender.utils.files import sha256, write_json, write_text
    from diffender.utils.markdown import table
    from diffender.utils.progress import bar

    classifier = load_classifier(opts.classifier, opts.classifier_weights)
    batch = correct_subset(list_items(opts.data), classifier, opts.images, opts.seed)
    cleanser = PatchCleanser(classifier, round(batch.x.shape[-1] * opts.area**0.5), opts.masks)
    folder = Path(opts.out)
    own = folder / "per_image.jsonl"
    settings = {"data": opts.data, "area": opts.area, "masks": opts.masks, "classifier": opts.classifier}
    if opts.classifier_weights:
        settings["sha256"] = sha256(Path(opts.classifier_weights))
    done = {r["id"] for r in open_run(folder, settings, own)}
    for image_id, x, y in zip(bar(batch.ids, "certifying"), batch.x, batch.y.tolist(), strict=True):
        if image_id not in done:
            started = time.monotonic()
            found = {"right": cleanser(x) == y, "places": cleanser.certified_places(x, y)}
            append_records(own, [{"id": image_id, **found, "seconds": time.monotonic() - started}])
    records = [r for r in open_run(folder, settings, own) if r["id"] in batch.ids]
    rows = []
    results: dict[str, object] = {"command": command()}
    counts = {
        "right, without a patch": [r["right"] for r in records],
        "certified, wherever the patch is": [r["places"] == 1 for r in records],
        "certified, of all places": [r["places"] for r in records],
    }
    for name, values in counts.items():
        k, n = sum(values), len(values)
        low, high = wilson(k, n)
        results[name] = {"k": k, "n": n, "low": low, "high": high}
        rows.append((name, f"{100 * k / n:.1f} % ({k:.4g}/{n}; {100 * low:.0f}-{100 * high:.0f})"))
    text = table(("PatchCleanser, clean images", f"patches of {100 * opts.area:g} %, {opts.masks}² masks"), rows) + (
        f"\n`{results['command']}`: {len(records)} images, {opts.classifier}, seed {opts.seed}, "
        f"{sum(r['seconds'] for r in records):.0f} s on {machine(batch.x.device)}, "
        f"{time.strftime('%Y-%m-%d')}.\n"
    )
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
