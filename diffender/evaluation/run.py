"""One defence under attack in one folder: prepared, worked on image by image, resumed, finished.

A table is a list of experiments on the same images; they share the patches made on the undefended classifier.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffender.attacks.attack import check_square
from diffender.attacks.expectation import Task
from diffender.attacks.patch import loud
from diffender.classifiers.dataset import Batch, correct_subset, digest_of, digest_of_all, list_photographs
from diffender.defenses import parse_defense
from diffender.defenses.hardened import Hardened
from diffender.defenses.jedi import COMPLETION
from diffender.evaluation.curves import draw_curves
from diffender.evaluation.forecast import announce, duration, forecast
from diffender.evaluation.options import OURS, Options, attacks, shard_of
from diffender.evaluation.plan import (
    as_drawn,
    attack_flags,
    build_plans,
    build_target,
    config_of,
    default_name,
    describe,
    of_this_shard,
)
from diffender.evaluation.records import append_records, open_run, read_records, refuse_other
from diffender.evaluation.trust import trust_report
from diffender.evaluation.verdicts import Judge, Plan, Verdict, evaluate_batch, file_names, summarize, voters
from diffender.faces.identification import RECOGNIZERS, list_faces, split_faces
from diffender.factory import dtype_name, hashes_of, open_items
from diffender.noise import preserved_rng
from diffender.pipeline import Defended, DIFFender
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.energy import counters, watt_hours
from diffender.utils.errors import InputError, check_finite, named_images
from diffender.utils.files import read_header, write_json
from diffender.utils.interruption import patient
from diffender.utils.options import settings
from diffender.utils.progress import TRACKERS, Progress, bar
from diffender.utils.provenance import CHANGED, command, commit, environment, machine, origin, shortened
from diffender.weights.prompts import SHIPPED

NO_MATTER = (  # settings that a resumed run may change; batches change results by rounding alone
    "name", "images", "batch_size", "eot_batch", "max_memory", "trust", "trust_images", "shard", "table", "rows",
    "figure", "tuning_data", "folds", "frames", "dry_run", "list", "curves",
)  # fmt: skip


class Experiment(NamedTuple):
    opts: Options
    folder: Path
    own: Path  # the records of this process
    target: Defended
    plans: list[Plan]
    config: dict  # everything that an image's result depends on
    names: Sequence[str] | None  # of the classes; none: ImageNet's
    call: str | None = None  # from Python, that made it and resumes it; none: this process's command line

    @property
    def device(self) -> torch.device:
        return self.target.classifier.mean.device


def prepare(opts: Options, model: LatentDiffusion | None = None) -> Experiment:
    """The experiment that these options ask for: target, attacks and folder. Writes nothing yet.

    Raises InputError for attacks, defences and files that do not exist.
    """
    open_items(opts.target)  # what does not exist, or does not fit, shows before anything is loaded
    parse_defense(opts.defense)
    for cls in attacks(opts).values():
        cls.from_flags(attack_flags(opts))
    target = build_target(opts, model)
    opts = as_drawn(opts, target)
    folder = Path("runs") / (opts.name or default_name(opts))
    shard, shards = shard_of(opts.shard)
    own = folder / ("per_image.jsonl" if shards == 1 else f"per_image-{shard}-of-{shards}.jsonl")
    return Experiment(opts, folder, own, target, build_plans(opts, target), resolved(opts), target.classifier.names)


def load_images(opts: Options, target: Defended) -> Batch:
    """Images that the undefended classifier gets right, without those that prompts, patches or a generator were made
    of."""
    asked = opts.target.defense
    files = [opts.patch.patch_file, opts.patch.generator]
    if asked.prompt_kind == "tuned":
        files.append(asked.prompts or SHIPPED)
    seen = frozenset(h for file in files if file for h in read_header(Path(file)).get("hashes", []))
    batch = correct_subset(open_items(opts.target), target.bare, opts.images, opts.run.seed, seen)
    if len(batch.ids) < opts.images and not opts.run.quiet:
        print(f"images: {len(batch.ids)} instead of {opts.images}, all that the classifier reads right")
    return batch


def work(experiments: Sequence[Experiment], batch: Batch) -> None:
    """Attack and judge what is not done yet; images outermost, so that experiments share patches.

    With --dry-run nothing is attacked or written; only the forecast's passes run. Raises InputError where a folder
    holds a run with other settings.
    """
    opts = experiments[0].opts
    names = file_names(batch.ids)
    if len({*names, *(f"{name}_mask" for name in names)}) < 2 * len(names):
        raise InputError(
            "two images have names that differ in / and __ alone, or in _mask, so they would share files; rename one"
        )
    if attacks(opts):
        check_square(batch.x)
    for e in experiments:
        refuse_seen(e.opts, batch)
        refuse_hidden_noise(e.target, batch.x[:1].to(e.device))
        refuse_other(e.folder, e.config)
    there = [read_records(e.folder) for e in experiments]
    for e, records in zip(experiments, there, strict=True):
        refuse_changed(e.folder, e.plans, records, batch)
    own = of_this_shard(opts, len(batch.ids))
    parts = [own[i : i + opts.batch_size] for i in range(0, len(own), opts.batch_size)]
    left = [[[i for i in part if batch.ids[i] not in records] for part in parts] for records in there]
    forecasts = []
    for n, (e, todo) in enumerate(zip(experiments, left, strict=True)):
        made = [any(earlier[k] for earlier in left[:n]) for k in range(len(parts))]
        forecasts.append(forecast(e.opts, e.target, batch.x[:1].to(e.device), todo, made))
    if opts.dry_run or not opts.run.quiet:
        announce(opts, forecasts)
        tell_of_other_code([r for records in there for r in records.values()])
    if opts.dry_run:
        if len(experiments) > 1:
            print("\n".join(f"{e.folder}: {duration(f.work)}" for e, f in zip(experiments, forecasts, strict=True)))
        return
    follow = [TRACKERS[opts.track](e.folder, e.config) for e in experiments]
    for e in experiments:
        open_run(e.folder, e.config, e.own)
        if not (e.folder / "env.json").is_file():  # of the first process: one that resumes may have another machine
            write_json(e.folder / "env.json", environment(e.device))
    models = (getattr(e.target.defense, "model", None) for e in experiments)
    model = next((model for model in models if model is not None), None)
    total = sum(f.work for f in forecasts)
    with (
        patient(how_to_go_on(experiments[0])) as may_stop,
        Progress(model, total, opts.attack, opts.run.quiet) as progress,
    ):
        for k in range(len(parts)):
            bases = {}  # the patches on the undefended classifier, for this batch
            for e, todo, expected, log in zip(experiments, left, forecasts, follow, strict=True):
                if todo[k]:
                    judge_part(e, batch, todo[k], expected.parts[k], progress, bases)
                    if opts.track != "none":
                        log_accuracies(e, log)
                    may_stop()


def refuse_seen(opts: Options, batch: Batch) -> None:
    """Raises InputError where FNC's statistics would be estimated from images that are evaluated."""
    photographs = parse_defense(opts.defense)[1].get("statistics") if opts.defense.startswith("fnc:") else None
    if photographs and (both := set(batch.hashes) & {digest_of(path) for path in list_photographs(str(photographs))}):
        raise InputError(f"{len(both)} of the images are among FNC's, {photographs}; its statistics need other ones")


def refuse_changed(folder: Path, plans: Sequence[Plan], records: Mapping[str, dict], batch: Batch) -> None:
    """Raises InputError where a file is another one than when its image was attacked, or where the patches made for it
    are not those that these settings make today."""
    now = dict(zip(batch.ids, batch.hashes, strict=False))  # from Python there are none: the settings hash all images
    if changed := [i for i, r in records.items() if "hash" in r and now.get(i, r["hash"]) != r["hash"]]:
        raise InputError(
            f"{folder} holds results of another file of the name {changed[0]}; move the folder away, or choose another "
            "--name"
        )
    made = {f"{plan.name}/{kind}" for plan in plans for kind in ("transfer", *plan.adaptive)}
    for image_id, record in records.items():
        if differ := sorted(made ^ record.get("attacks", {}).keys()):
            raise InputError(
                f"{folder} has other patches of {image_id} than are made today: {', '.join(differ)}; move the folder "
                "away, or choose another --name"
            )


def tell_of_other_code(records: Sequence[dict]) -> None:
    """Say what is resumed if another code may have made it: folders are named by settings, not by the code."""
    now = commit()
    made = [r["commit"] for r in records if r.get("commit")]
    if now and (now.endswith(CHANGED) and made or set(made) - {now}):
        before, today = (shortened(commits).removeprefix(", ") for commits in (sorted(set(made)), [now]))
        print(
            f"{len(made)} results are kept that were made at {before}; the code is now at {today}. For new ones move "
            "the folder away, or choose another --name"
        )


def refuse_hidden_noise(target: Defended, x: Tensor) -> None:
    """Raises InputError for a defence that draws noise which it is not given: no answer of it could be repeated."""
    if type(target.defense) in (DIFFender, Hardened):
        return  # all their noise is an argument
    noise, x = target.sample_noise(["a", "b"], 0, "a"), torch.cat([x, loud(x)[0]])  # some are random at patches alone
    with preserved_rng(x.device):  # the caller's numbers stay as they are
        (one, first), (two, second) = target.looks(x, [noise, noise])
    check_finite("logits of the defended classifier", first)
    # Images may differ by half a level of 8 bits.
    if torch.allclose(one.image, two.image, atol=2e-3) and torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        return
    if noise is None:
        raise InputError(
            "the defence answers the same image in different ways, but has no noise to repeat that by; say "
            "Purifier(purify, random=True), or give it a sample_noise"
        )
    raise InputError(
        "the defence answers the same image and the same noise in different ways; let it draw from torch's global "
        "generator, which is seeded for each image, and not from numpy's or Python's"
    )


def how_to_go_on(e: Experiment) -> str:
    """The command, or the call, that resumes a run: its own, and the name that it was given."""
    if e.call:
        return f"stopped between two images; go on with: {e.call}"
    named = any(a.startswith("--name") for a in sys.argv) or e.opts.table or e.opts.figure
    name = "" if named else f" --name {e.folder.name}"
    return f"stopped between two images; go on with: {command(from_here=True)}{name}"


def log_accuracies(e: Experiment, log: Callable[[dict, int], None]) -> None:
    """Send the accuracies of the images done so far to the tracker."""
    records = list(read_records(e.folder).values())
    rows = summarize(records)["rows"]
    told = {f"{r['attack']}/{r['gradient'] or 'all'}/{v}": r[v]["accuracy"] for r in rows for v in Verdict._fields}
    log(told, len(records))


def judge_part(
    e: Experiment, batch: Batch, rows: list[int], cost: dict[str, float], progress: Progress, bases: dict
) -> None:
    """Attack, judge and record some images, each variant of which should `cost` so many seconds."""
    ids, x, y = ([batch.ids[i] for i in rows], batch.x[rows].to(e.device), batch.y[rows].to(e.device))
    begun, before, energy = time.monotonic(), progress.evaluations, counters()
    with named_images(ids):
        task = Task(e.target.undefended(), x, y, ids, e.opts.run.seed)
        judge = Judge(e.target, e.opts.verdicts, e.opts.eot_batch)
        records = evaluate_batch(task, judge, e.plans, e.folder, progress.through(cost), bases)
    spent = {"seconds": time.monotonic() - begun, "unet_evaluations": progress.evaluations - before}
    if not e.opts.run.quiet:  # else nothing was measured, and the shares of the bar are not seconds
        spent["forecast"] = sum(cost.values())
    alone = shard_of(e.opts.shard)[1] == 1  # the counters are the whole machine's
    if alone and (taken := watt_hours(energy, counters())) is not None:
        spent["watt_hours"] = taken
    shares = {name: value / len(records) for name, value in spent.items()}
    hashes = [{"hash": batch.hashes[i]} if batch.hashes else {} for i in rows]
    where = origin() | {"machine": machine(e.device)}
    append_records(e.own, [record | own | shares | where for record, own in zip(records, hashes, strict=True)])


def made_in(records: Sequence[dict], key: str) -> list[str]:
    """The dates, commits or machines that made the records: a run may have been resumed. Older ones do not say."""
    return sorted({r[key] for r in records if r.get(key)})


def finish(e: Experiment, batch: Batch) -> dict | None:
    """Results, checks and curves of a run whose records are all there, in results.json; None while shards work."""
    opts = e.opts
    found = read_records(e.folder)
    records = [found[i] for i in batch.ids if i in found]
    if len(records) < len(batch.ids):
        print(f"{len(records)} of {len(batch.ids)} images are done; the shard that ends last writes the table")
        return None
    if len(found) > len(records) and not opts.run.quiet:
        print(f"the folder holds {len(found)} images; the table is of {len(records)}, as --images asks")
    results = {
        "command": e.call or command(),
        "date": " and ".join(made_in(records, "date")) or time.strftime("%Y-%m-%d"),
        "commits": made_in(records, "commit"),
        "machine": " and ".join(made_in(records, "machine")) or machine(e.device),
        "defense": OURS.get(opts.defense, opts.defense),
        "undefended": e.target.undefended_is,
        "names": e.names,
        "ids": batch.ids,
        "seed": opts.run.seed,
        "setting": describe(opts),
        "verdicts": opts.verdicts,
        "votes": voters(opts.verdicts),
    } | summarize(records)
    results |= costs(records)
    write_json(e.folder / "results.json", results)  # what is done is kept, whatever befalls the checks
    checked = time.monotonic()
    if opts.trust != "off" and e.plans:
        n = min(opts.trust_images, len(batch.ids))
        if not opts.run.quiet:
            print(f"checking the evaluation on {n} images (--trust {opts.trust})")
        few = Task(e.target, batch.x[:n].to(e.device), batch.y[:n].to(e.device), batch.ids[:n], opts.run.seed)
        results["trust"] = trust_report(opts, few, e.plans, records, results, e.folder)
    if opts.curves != "off":
        with patient(how_to_go_on(e)) as may_stop:
            every = Task(e.target, batch.x.to(e.device), batch.y.to(e.device), batch.ids, opts.run.seed)
            progress = bar(records, "curves", opts.run.quiet, " images")
            results["curves"] = draw_curves(opts.curves, every, e.plans, progress, e.folder, may_stop)
    results["seconds"] += time.monotonic() - checked
    write_json(e.folder / "results.json", results)
    return results


def costs(records: Sequence[dict]) -> dict:
    """What the records took, all together."""
    seconds = sum(r["seconds"] for r in records)
    spent = {"seconds_attacked": seconds, "seconds": seconds}
    spent |= {"unet_evaluations": round(sum(r["unet_evaluations"] for r in records))}
    told = [name for name in ("forecast", "watt_hours") if all(name in r for r in records)]
    return spent | {name: sum(r[name] for r in records) for name in told}


def unnamed_files(opts: Options) -> dict[str, list[Path]]:
    """Files that results depend on and no flag of a file names: Jedi's network, FNC's photographs, known faces."""
    name, given = parse_defense(opts.defense)
    found = {"jedi": [COMPLETION]} if name == "jedi" else {}
    if statistics := given.get("statistics"):
        found["statistics"] = list_photographs(str(statistics))
    if opts.target.classifier in RECOGNIZERS:
        found["gallery"] = [item.path for item in split_faces(list_faces(opts.target.data), opts.target.fold).gallery]
    return found


def resolved(opts: Options) -> dict:
    """Everything that an image's result depends on. A resumed run must share it; the number of images may differ."""
    asked = opts.target.defense
    found = settings(opts, *NO_MATTER) | asdict(config_of(opts)) | {"prompt": asked.prompt_kind}
    found["attack"] = ",".join(attacks(opts))  # all is its four by name
    found["dtype"] = dtype_name(asked.model, opts.run.device)
    own = {what: digest_of_all(paths) for what, paths in unnamed_files(opts).items()}
    hashes = own | hashes_of(
        asked.model,
        classifier=opts.target.classifier_weights,
        generator=opts.patch.generator,
        patches=opts.patch.patch_file,
        prompts=(asked.prompts or SHIPPED) if asked.prompt_kind == "tuned" else None,
    )
    return found | {"torch": torch.__version__, "sha256": hashes}
