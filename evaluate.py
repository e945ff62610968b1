"""Evaluate DIFFender under adaptive patch attacks.

    python evaluate.py                                  embedded model, sample photographs, AdvP; 5 minutes, 2 cores
    python evaluate.py --attack gdpa --eot 10           another attack; --attack all runs the paper's four
    python evaluate.py --grad bpda,bpda-mask,full       one attack after the other, each with its row in the table
    python evaluate.py --preset paper --data DATA       512 pictures, 100 steps, EOT 10, every gradient, 3 restarts

Patches are made on the classifier alone first (transfer), then on the defence itself, starting from those, with each
kind of gradient that --grad lists and fresh noise for each of --eot samples. Verdicts fall on 8-bit files, after
--verdicts purifications with noise that no attack has seen. The headline counts a picture as right only as far as under
the strongest patch made for it. Everything goes to runs/<name>/; a killed run resumes with --name, and
shards of one run may share a folder: --name big --shard 0/2 and --name big --shard 1/2, at once or one after the other.
"""

import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from diffender.cli import parse, run
from diffender.plans import (
    COSTLY,
    PLAIN,
    Options,
    announce,
    attacks,
    build_plans,
    build_target,
    describe,
    fill,
    share,
    split,
    without,
)  # fmt: skip


def main() -> None:
    opts = fill(parse(Options, __doc__))
    # Imported after the options are known to be good: torch and timm take seconds.
    from diffender.data import correct_subset, list_items
    from diffender.errors import named_images
    from diffender.evaluation import VOTES, evaluate_batch, summarize
    from diffender.files import read_header
    from diffender.memory import GIB, most_held_bytes
    from diffender.pipeline import Undefended
    from diffender.prompts import SHIPPED
    from diffender.report import class_names, markdown, save_grid
    from diffender.runs import Progress, append_records, open_run, read_records, write_json
    from diffender.trust import trust_report

    attacks(opts)  # an unknown name shows at once
    target = build_target(opts)
    undefended = Undefended(target.classifier)
    plans = build_plans(opts, target)
    tuned_on = read_header(Path(opts.prompts or SHIPPED)).get("hashes", []) if opts.prompt == "tuned" else []
    batch = correct_subset(list_items(opts.data), target.classifier, opts.images, opts.seed, frozenset(tuned_on))
    folder = Path("runs") / (opts.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{opts.attack.replace(',', '+')}")
    settings = resolved(opts)
    shard, shards = share(opts.shard)
    own = folder / ("per_image.jsonl" if shards == 1 else f"per_image-{shard}-of-{shards}.jsonl")
    done = {r["id"] for r in open_run(folder, settings, own)}
    device = target.classifier.mean.device
    print(f"{opts.prompt} prompts; {device}; {len(done)} pictures done before; results in {folder}")
    parts = split(opts, [i for i, name in enumerate(batch.ids) if i % shards == shard and name not in done])
    total = announce(opts, target, batch.x[:1].to(device), parts)
    with Progress(target.defense.model, total, opts.attack) as progress:
        for part, costly in parts:
            ids, x, y = [batch.ids[i] for i in part], batch.x[part].to(device), batch.y[part].to(device)
            begun, before = time.monotonic(), progress.evaluations
            with named_images(ids):
                records = evaluate_batch(
                    undefended, target, [without(p, () if costly else COSTLY) for p in plans], ids, x, y, opts.seed,
                    folder, opts.verdicts, on_step=lambda n: progress.advance(n * PLAIN),
                )  # fmt: skip
            spent = {"seconds": time.monotonic() - begun, "unet_evaluations": progress.evaluations - before}
            shares = {name: value / len(records) for name, value in spent.items()}
            append_records(own, [record | shares for record in records])

    records = sorted(read_records(folder), key=lambda r: batch.ids.index(r["id"]))
    if len(records) < len(batch.ids):
        print(f"{len(records)} of {len(batch.ids)} pictures are done; the shard that ends last writes the table")
        return
    results = {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} {platform.machine()} CPU cores" if device.type == "cpu" else str(device),
        "seed": opts.seed,
        "setting": describe(opts),
        "verdicts": opts.verdicts,
        "votes": min(VOTES, opts.verdicts - (opts.verdicts + 1) % 2),
    } | summarize(records)
    checked = time.monotonic()
    if opts.trust != "off" and plans:
        n = min(opts.trust_images, len(batch.ids))
        few = batch._replace(ids=batch.ids[:n], x=batch.x[:n].to(device), y=batch.y[:n].to(device))
        results["trust"] = trust_report(opts.trust, target, plans, few, opts.seed, records, results)
    results["seconds"] = sum(r["seconds"] for r in records) + time.monotonic() - checked
    results["unet_evaluations"] = round(sum(r["unet_evaluations"] for r in records))
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    save_grid(folder / "images", records, folder / "grid.png", class_names())
    print(f"\n{markdown(results)}\npictures: {folder / 'grid.png'}")
    print(f"peak memory {most_held_bytes(device) / GIB:.1f} GiB")


def resolved(opts: Options) -> dict:
    """All that a result depends on: what a resumed run must share."""
    import torch

    from diffender.files import sha256
    from diffender.prompts import SHIPPED
    from diffender.runs import model_hashes, pick_device, pick_dtype

    no_matter = ("name", "batch_size", "eot_batch", "micro_batch", "max_memory", "device", "trust", "trust_images",
                 "shard")  # fmt: skip
    settings = {k: v for k, v in asdict(opts).items() if k not in no_matter}
    settings["dtype"] = str(pick_dtype(opts.dtype, pick_device(opts.device))).removeprefix("torch.")
    hashes = {"model": model_hashes(opts)}
    files = {"classifier": opts.classifier_weights, "generator": opts.generator, "patches": opts.patch_file}
    hashes |= {what: sha256(Path(path)) for what, path in files.items() if path}
    if opts.prompt == "tuned":
        hashes["prompts"] = sha256(Path(opts.prompts or SHIPPED))
    return settings | {"torch": torch.__version__, "sha256": hashes}


if __name__ == "__main__":
    run(main)
