"""PatchCleanser (Xiang et al. 2022): two rounds of masks, and a certificate against every patch up to a size.

    python -m diffender.defenses.patchcleanser --data PHOTOS --images 32

Beyond the paper: no attack is needed for the certificate, it is a lower bound of accuracy under all of them.
"""

import math
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from torch import Tensor

from diffender.cli import option, parse, run
from diffender.data import correct_subset, list_items
from diffender.files import sha256, write_json, write_text
from diffender.metrics import wilson
from diffender.models.classifiers import Classifier, load_classifier
from diffender.progress import bar
from diffender.report import table
from diffender.runs import append_records, command, machine, open_run


@dataclass(frozen=True)
class PatchCleanser:
    classifier: Classifier
    patch: int  # side in pixels of the largest patch that it must withstand
    masks: int = 6  # an axis
    batch_size: int = 64

    def windows(self, size: int) -> list[tuple[int, int, int]]:
        """Masks as (top, left, side) such that every patch x patch square lies inside one."""
        stride = math.ceil((size - self.patch + 1) / self.masks)
        side = min(self.patch + stride - 1, size)
        starts = [*range(0, size - side, stride), size - side]
        return [(top, left, side) for top in starts for left in starts]

    def predict(self, x: Tensor, pairs: list[tuple[int, int]]) -> list[int]:
        """The classes of one picture (3, S, S) under pairs of masks; a pair of the same is a single mask."""
        windows, classes = self.windows(x.shape[-1]), []
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            covered = x.repeat(len(part), 1, 1, 1)
            for row, pair in zip(covered, part, strict=True):
                for top, left, side in (windows[i] for i in pair):
                    row[:, top : top + side, left : left + side] = self.classifier.mean  # 0 to the network
            classes += self.classifier(covered).argmax(dim=1).tolist()
        return classes

    def __call__(self, x: Tensor) -> int:
        """The class of one picture (3, S, S): the one all first masks agree on, else a dissenter that a second round
        confirms, else the majority."""
        n = len(self.windows(x.shape[-1]))
        first = self.predict(x, [(i, i) for i in range(n)])
        majority = max(set(first), key=first.count)
        for i, label in enumerate(first):
            if label != majority and set(self.predict(x, [(i, j) for j in range(n)])) == {label}:
                return label
        return majority

    def certified(self, x: Tensor, label: int) -> bool:
        """Whether no patch of that size, wherever it is, can change the answer from the true label: every pair of
        masks must already give it (their theorem 1)."""
        n = len(self.windows(x.shape[-1]))
        singles = self.predict(x, [(i, i) for i in range(n)])
        return set(singles) == {label} and set(self.predict(x, list(combinations(range(n), 2)))) == {label}


@dataclass(frozen=True)
class Options:
    data: str = option("samples", "samples, a folder by wnid, or a csv of file and label")
    images: int = option(6, "number of pictures, of those the classifier gets right", low=1)
    area: float = option(0.05, "share of the picture that the patch to withstand covers", low=0.0005, high=0.5)
    masks: int = option(6, "of the first round, an axis", low=1)
    classifier: str = option("efficientnet_lite0", "a name of diffender.models.classifiers, or timm:TAG")
    classifier_weights: str | None = option(None, "its safetensors file in timm's names; none for the embedded one")
    seed: int = option(0, "of the choice of pictures", low=0)
    out: str = option("runs/patchcleanser", "folder for records, results and table; a run there is resumed")


def main() -> None:
    opts = parse(Options, __doc__)
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
            found = {"right": cleanser(x) == y, "certified": cleanser.certified(x, y)}
            append_records(own, [{"id": image_id, **found, "seconds": time.monotonic() - started}])
    records = [r for r in open_run(folder, settings, own) if r["id"] in batch.ids]
    rows = []
    results: dict[str, object] = {"command": command()}
    for name in ("right", "certified"):
        k, n = sum(r[name] for r in records), len(records)
        low, high = wilson(k, n)
        results[name] = {"k": k, "n": n, "low": low, "high": high}
        rows.append((name, f"{100 * k / n:.1f} % ({k}/{n}; {100 * low:.0f}-{100 * high:.0f})"))
    text = table(("PatchCleanser, clean pictures", f"patches of {100 * opts.area:g} %, {opts.masks}² masks"), rows) + (
        f"\n`{results['command']}`: {len(records)} pictures, {opts.classifier}, seed {opts.seed}, "
        f"{sum(r['seconds'] for r in records):.0f} s on {machine(batch.x.device)}, "
        f"{time.strftime('%Y-%m-%d')}.\n"
    )
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
