"""Evaluate DIFFender under an adaptive patch attack.

    python evaluate.py                                     embedded model, sample photographs, AdvP; 5 minutes, 2 cores
    python evaluate.py --attack advp --grad full --eot 2 --images 4     exact gradients through the whole defence

Pictures that the undefended classifier gets right are attacked three ways: the classifier alone; the defence with
those same patches (transfer); the defence itself, starting from them, with gradients as --grad says and fresh noise
for each of --eot samples. The headline counts a picture as right only if every patch failed. Verdicts fall on 8-bit
pictures with noise that no attack has seen. Everything goes to runs/<name>/; a killed run resumes with --name.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffender.cli import DefenseOptions, option, parse, pick, run

if TYPE_CHECKING:
    from diffender.attacks import AdvP
    from diffender.pipeline import Defended


@dataclass(frozen=True)
class Options(DefenseOptions):
    # What is defended
    data: str = option("samples", "samples, a folder by wnid, or a csv of file and label")
    images: int = option(8, "number of pictures, of those the classifier gets right", low=1)
    classifier: str = option("efficientnet_lite0", "classifier under attack, a name of diffender.models.classifiers")
    classifier_weights: str | None = option(None, "its safetensors file in timm's names; none for the embedded one")
    # The attack
    attack: str = option("advp", "attack, or none", choices=("advp", "lavan", "none"))
    grad: str = option("bpda-mask", "backward pass of the adaptive attack", choices=("bpda", "bpda-mask", "full"))
    area: float | None = option(None, "share of the picture (default: advp 0.05, lavan 0.02)", low=0.0005, high=0.9)
    shape: str = option("square", "shape of the patch", choices=("square", "circle"))
    location: str = option("fixed", "one random place, or a new one for each EOT sample", choices=("fixed", "eot"))
    targeted: bool | None = option(
        None, "aim at a random class (default: lavan), or just away from the true one (advp)"
    )
    iters: int = option(20, "steps of the adaptive attack (paper: 100)", low=1)
    iters_undefended: int = option(100, "steps of the attack on the classifier alone", low=1)
    eot: int = option(2, "noise samples averaged in a step", low=1)
    # The run
    seed: int = option(0, "of every random choice", low=0)
    batch_size: int = option(8, "pictures attacked side by side; changes no result", low=1)
    name: str | None = option(None, "folder under runs/; a run of the same configuration there is resumed")


def main() -> None:
    opts = parse(Options, __doc__)
    # Imported after the options are known to be good: torch and timm take seconds.
    from diffender.data import correct_subset, list_items
    from diffender.errors import named_images
    from diffender.evaluation import evaluate_batch, summarize
    from diffender.files import read_header
    from diffender.pipeline import Undefended
    from diffender.prompts import SHIPPED
    from diffender.report import class_names, markdown, save_grid
    from diffender.runs import Progress, append_records, open_run, write_json

    started = time.monotonic()
    target = build_target(opts)
    tuned_on = read_header(Path(opts.prompts or SHIPPED)).get("hashes", []) if opts.prompt == "tuned" else []
    batch = correct_subset(list_items(opts.data), target.classifier, opts.images, opts.seed, frozenset(tuned_on))
    base, adaptive = build_attacks(opts)

    folder = Path("runs") / (opts.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{opts.attack}-{opts.grad}-{opts.prompt}")
    settings = resolved(opts)
    done = {r["id"] for r in open_run(folder, settings)}
    todo = [i for i, image_id in enumerate(batch.ids) if image_id not in done]
    device = target.classifier.mean.device
    print(f"{len(todo)} pictures to do, {len(done)} done before; {opts.prompt} prompts; {device}; results in {folder}")

    plain = 4  # UNet evaluations that a step on the classifier alone is worth, on a CPU
    total = len(todo) * (evaluations(opts) + (plain * opts.iters_undefended if base else 0))
    with Progress(target.defense.model, total, opts.attack) as progress:
        for start in range(0, len(todo), opts.batch_size):
            part = todo[start : start + opts.batch_size]
            ids, x, y = [batch.ids[i] for i in part], batch.x[part].to(device), batch.y[part].to(device)
            undefended = Undefended(target.classifier)
            with named_images(ids):
                records = evaluate_batch(
                    undefended, target, base, adaptive, ids, x, y, opts.seed, folder / "images",
                    on_step=lambda n: progress.advance(n * plain),
                )  # fmt: skip
            append_records(folder / "per_image.jsonl", records)

    records = sorted(open_run(folder, settings), key=lambda r: batch.ids.index(r["id"]))
    results = {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} {platform.machine()} CPU cores" if device.type == "cpu" else str(device),
        "seed": opts.seed,
        "attack": "none" if adaptive is None else f"{opts.attack}, {adaptive.shape} of {100 * adaptive.area:g} %",
        "seconds": time.monotonic() - started,
        "unet_evaluations": progress.evaluations,
    }
    budget = f"{opts.grad}, {opts.iters} steps, EOT {opts.eot}"
    results |= summarize(records, f"DIFFender ({opts.prompt} prompts)", budget)
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    save_grid(folder / "images", records, folder / "grid.png", class_names())
    print(f"\n{markdown(results)}\npictures: {folder / 'grid.png'}")


def build_target(opts: Options) -> Defended:
    """The classifier behind the defence."""
    import torch

    from diffender.models.classifiers import load_classifier
    from diffender.pipeline import Defended, DIFFender, DIFFenderConfig
    from diffender.prompts import SHIPPED, contexts_for
    from diffender.runs import open_model, pick_device

    device = pick_device(opts.device)
    classifier = load_classifier(opts.classifier, opts.classifier_weights).to(device)
    model = open_model(opts, device)
    with torch.no_grad():  # prompts are constants here
        contexts = contexts_for(opts.prompt, model, Path(opts.prompts or SHIPPED))
    return Defended(DIFFender(model, contexts, pick(DIFFenderConfig, opts)), classifier, opts.grad)


def build_attacks(opts: Options) -> tuple[AdvP, AdvP] | tuple[None, None]:
    """The attack on the classifier alone, where nothing is random but the place, and the one on the defence."""
    from diffender.attacks import ATTACKS

    if opts.attack == "none":
        return None, None
    adaptive = pick(ATTACKS[opts.attack], opts)
    return replace(adaptive, iters=opts.iters_undefended, eot=1 if opts.location == "fixed" else opts.eot), adaptive


def resolved(opts: Options) -> dict:
    """All that a result depends on: what a resumed run must share."""
    import torch

    from diffender.files import sha256
    from diffender.prompts import SHIPPED
    from diffender.runs import model_hashes, pick_device, pick_dtype

    settings = {k: v for k, v in asdict(opts).items() if k not in ("name", "batch_size", "micro_batch", "device")}
    settings["dtype"] = str(pick_dtype(opts.dtype, pick_device(opts.device))).removeprefix("torch.")
    hashes = {"model": model_hashes(opts)}
    if opts.classifier_weights:
        hashes["classifier"] = sha256(Path(opts.classifier_weights))
    if opts.prompt == "tuned":
        hashes["prompts"] = sha256(Path(opts.prompts or SHIPPED))
    return settings | {"torch": torch.__version__, "sha256": hashes}


def evaluations(opts: Options) -> int:
    """UNet evaluations that one picture will take, the recomputation in backward passes included."""
    locate, restore = 2 * opts.draws, (2 if opts.guidance != 1 else 1) * opts.steps * opts.restore
    if opts.attack == "none":
        return locate + restore
    step = {"bpda": locate + restore, "bpda-mask": 2 * locate + restore, "full": 2 * (locate + restore)}[opts.grad]
    return (3 + 2 * opts.eot) * (locate + restore) + opts.iters * opts.eot * step


if __name__ == "__main__":
    run(main)
