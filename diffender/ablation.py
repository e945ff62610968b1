"""What matters for localisation: the same attacked photographs, one choice changed at a time.

    python -m diffender.ablation --data PHOTOS --images 96 --out results/ablation

Photographs that the classifier gets right are attacked with AdvP on the classifier alone; each setting then localises
on the attacked and on the clean ones. Choose by this, on photographs that no evaluation is made on.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffender.cli import ModelOptions, option, parse, run

if TYPE_CHECKING:
    from torch import Tensor

    from diffender.attacks.patch import Attacked
    from diffender.data import Batch
    from diffender.diffusion import LatentDiffusion
    from diffender.pipeline import DIFFenderConfig


@dataclass(frozen=True)
class Options(ModelOptions):
    data: str = option("samples", "samples, a folder by wnid, or a csv of file and label")
    images: int = option(16, "number of photographs", low=1)
    classifier: str = option("efficientnet_lite0", "classifier under attack")
    area: float = option(0.05, "share of the picture that a patch covers", low=0.0005, high=0.9)
    iters: int = option(100, "steps of AdvP on the classifier alone", low=1)
    noise_ratio: float = option(0.2, "t* of the setting that the others depart from", low=0.02, high=1)
    draws: int = option(3, "m, likewise", low=1)
    theta: float = option(2.0, "likewise", low=0)
    prompt: str = option("manual", "likewise", choices=("tuned", "manual", "empty"))
    batch_size: int = option(8, "pictures side by side; changes no result", low=1)
    seed: int = option(0, "of every random choice", low=0)
    out: str = option("runs/ablation", "folder for results.json and table.md")


CHOICES = {  # field of DIFFenderConfig, or prompt: what it is changed to
    "prompt": ("empty", "manual", "tuned"),
    "noise_ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
    "draws": (1, 3, 6, 10),
    "shared_noise": (True, False),
    "decoded": (False, True),
    "score": ("z", "mad"),
    "theta": (1.0, 1.5, 2.0, 2.5, 3.0),
    "sigma": (0.0, 1.0),
    "dilation": (1, 3, 5),
}


def main() -> None:
    opts = parse(Options, __doc__)
    import torch
    from tqdm import tqdm

    from diffender.attacks import AdvP
    from diffender.data import correct_subset, list_items
    from diffender.files import read_header
    from diffender.models.classifiers import load_classifier
    from diffender.pipeline import DIFFenderConfig, Undefended
    from diffender.prompts import SHIPPED
    from diffender.runs import open_model, pick_device, write_json

    started = time.monotonic()
    device = pick_device(opts.device)
    classifier = load_classifier(opts.classifier).to(device)
    model = open_model(opts, device)
    tuned_on = frozenset(read_header(SHIPPED).get("hashes", []))
    batch = correct_subset(list_items(opts.data), classifier, opts.images, opts.seed, tuned_on)
    attack = AdvP(area=opts.area, iters=opts.iters, eot=1)
    parts = []
    for i in tqdm(range(0, len(batch.ids), opts.batch_size), desc="attacking", mininterval=1):
        rows = slice(i, i + opts.batch_size)
        x, y = batch.x[rows].to(device), batch.y[rows].to(device)
        parts.append(attack(Undefended(classifier), x, y, batch.ids[rows], opts.seed))
    attacked = type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))

    base = DIFFenderConfig(**{f.name: getattr(opts, f.name) for f in fields(DIFFenderConfig) if hasattr(opts, f.name)})
    settings = [("base", opts.prompt, base)]
    for field, values in CHOICES.items():
        for value in values:
            if field == "prompt" and value != opts.prompt:
                settings.append((f"prompt {value}", value, base))
            elif field != "prompt" and value != getattr(base, field):
                settings.append((f"{field} {value}", opts.prompt, replace(base, **{field: value})))
    rows = []
    for name, prompt, cfg in tqdm(settings, desc="settings", mininterval=1):
        rows.append({"setting": name} | measure(opts, model, prompt, cfg, batch, attacked))
    command = " ".join(["python -m diffender.ablation", *sys.argv[1:]])
    results = {"command": command, "date": time.strftime("%Y-%m-%d"), "images": len(batch.ids), "seed": opts.seed}
    results |= {"base": f"{opts.prompt} prompts, {base}", "seconds": time.monotonic() - started, "rows": rows}
    out = Path(opts.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    (out / "table.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}")


def measure(
    opts: Options, model: LatentDiffusion, prompt: str, cfg: DIFFenderConfig, batch: Batch, attacked: Attacked
) -> dict[str, float]:
    """Means over the photographs, and the standard error of the AUC."""
    import torch
    import torch.nn.functional as F

    from diffender.metrics import auc, mask_scores
    from diffender.pipeline import DIFFender
    from diffender.prompts import Contexts, contexts_for

    contexts = Contexts(*(c if c is None else c.detach() for c in contexts_for(prompt, model)))
    defense = DIFFender(model, contexts, cfg)
    columns: dict[str, list[Tensor]] = {}
    for i in range(0, len(batch.ids), opts.batch_size):
        rows = slice(i, i + opts.batch_size)
        noise = defense.sample_noise(batch.ids[rows], opts.seed, "ablation")
        found = defense.localize(attacked.image[rows], noise)
        clean = defense.localize(batch.x[rows].to(attacked.image), noise)
        inside = F.interpolate(attacked.mask[rows], found.heatmap.shape[-2:], mode="area")
        heat = [(found.heatmap * w).sum(dim=(1, 2, 3)) / w.sum(dim=(1, 2, 3)) for w in (inside, 1 - inside)]
        values = {
            "auc": torch.tensor([auc(h.flatten(), t.flatten()) for h, t in zip(found.heatmap, inside, strict=True)]),
            "contrast": heat[0] / heat[1], **mask_scores(found.mask, attacked.mask[rows])._asdict(),
            "clean_area": clean.mask.mean(dim=(1, 2, 3)),
        }  # fmt: skip
        for name, value in values.items():
            columns.setdefault(name, []).append(value.cpu())
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    error = joined["auc"].std().item() / len(batch.ids) ** 0.5 if len(batch.ids) > 1 else 0.0
    return {name: values.mean().item() for name, values in joined.items()} | {"auc_error": error}


def markdown(results: dict) -> str:
    head = ("setting", "AUC", "inside / outside", "recall", "precision", "IoU", "masked when clean")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in results["rows"]:
        lines.append(
            f"| {r['setting']} | {r['auc']:.3f} ± {r['auc_error']:.3f} | {r['contrast']:.2f} | {r['recall']:.3f} | "
            f"{r['precision']:.3f} | {r['iou']:.3f} | {100 * r['clean_area']:.1f} % |"
        )
    lines.append(
        f"\n`{results['command']}`: {results['images']} photographs, seed {results['seed']}, {results['date']}; base: "
        f"{results['base']}"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
