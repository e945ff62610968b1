"""Studies of the parts of the defence, one choice changed at a time; paper.ablate is their command."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from diffender.attacks import ATTACKS
from diffender.attacks.attack import attack_all, slices
from diffender.attacks.expectation import Attacked, Task
from diffender.classifiers.dataset import Batch, correct_subset
from diffender.classifiers.imagenet import Classifier
from diffender.config import Backward, DIFFenderConfig
from diffender.evaluation.metrics import counted, map_auc, mask_scores, mcnemar, percent, proportion
from diffender.factory import config_of, hashes_of, open_classifier, open_items, open_model, pick_device
from diffender.ops import resize
from diffender.paper.ablate import ANEW, Options
from diffender.pipeline import Defended, DIFFender, Localized, Undefended
from diffender.utils.errors import InputError
from diffender.utils.files import place_for, read_header, write_json, write_text
from diffender.utils.formats import table
from diffender.utils.images import save_figure, save_png, stretch
from diffender.utils.options import settings
from diffender.utils.progress import bar
from diffender.utils.provenance import command, machine
from diffender.weights.prompts import SHIPPED, contexts_for

EVADE = Backward("evade")
USUAL = "tuned prompts"  # of the parts, the setting that the others are compared with


class Setting(NamedTuple):
    name: str
    prompt: str
    cfg: DIFFenderConfig
    oracle: bool = False  # the true mask instead of the localised one
    backward: Backward = EVADE  # of the attacker in the studies ANEW
    steps: Mapping[str, Any] = {}  # fields of that attacker's AdvP


CHOICES = {  # field of DIFFenderConfig, or prompt: what it is changed to
    "prompt": ("empty", "manual", "tuned"),
    "noise_ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7),
    "draws": (1, 3, 6, 10),
    "score": ("z", "mad"),
    "theta": (1.0, 1.5, 2.0, 2.5, 3.0),
    "sigma": (0.0, 1.0),
    "dilation": (1, 3, 5),
}
RESTORING = {"steps": (1, 2, 4, 8), "guidance": (1.0, 3.0), "sampler": ("ddim", "dpmpp")}
DEFENDER = {"prompt": ("manual", "tuned"), "noise_ratio": (0.1, 0.2, 0.3), "theta": (1.0, 2.0)}
DEFENDER |= {"score": ("z", "mad"), "grow": (0.0, 1.0)}
ATTACKER = {"evasion": (1.0, 3.0, 10.0, 30.0), "hide": ("mean", "max"), "decoy": (0.0, 1.0)}  # fields of Backward

SCHEDULES = {"momentum 0.8": {"momentum": 0.8}, "linear decay": {"decay": "linear"}}
SCHEDULES |= {"momentum 0.8, linear from 0.04": {"momentum": 0.8, "decay": "linear", "lr": 0.04}}


def choices(prompt: str, base: DIFFenderConfig, changes: Mapping[str, tuple] = CHOICES) -> list[Setting]:
    settings = [Setting("base", prompt, base)]
    for field, values in changes.items():
        for value in values:
            if field == "prompt" and value != prompt:
                settings.append(Setting(f"prompt {value}", value, base))
            elif field != "prompt" and value != getattr(base, field):
                settings.append(Setting(f"{field} {value}", prompt, replace(base, **{field: value})))
    return settings


def parts(prompt: str, base: DIFFenderConfig) -> list[Setting]:
    return [
        Setting("empty prompt (EP)", "empty", base),
        Setting("manual prompt (MP)", "manual", base),
        Setting(USUAL, "tuned", base),
        Setting("tuned prompts, no restoration (NR)", "tuned", replace(base, restore=False)),
        Setting("true mask, restored", prompt, base, oracle=True),
        Setting("true mask, no restoration", prompt, replace(base, restore=False), oracle=True),
    ]


def noise(_prompt: str, base: DIFFenderConfig) -> list[Setting]:
    return [
        Setting(f"{prompt}, {ratio}", prompt, replace(base, noise_ratio=ratio))
        for prompt in CHOICES["prompt"]
        for ratio in CHOICES["noise_ratio"]
    ]


def restoring(prompt: str, base: DIFFenderConfig) -> list[Setting]:
    return [s._replace(oracle=True) for s in choices(prompt, base, RESTORING)]


def attacker(prompt: str, base: DIFFenderConfig) -> list[Setting]:
    settings = [Setting("base", prompt, base)]
    for name, values in ATTACKER.items():
        for value in values:
            if value != getattr(EVADE, name):
                settings.append(Setting(f"{name} {value}", prompt, base, backward=replace(EVADE, **{name: value})))
    return settings


def schedule(prompt: str, base: DIFFenderConfig) -> list[Setting]:
    plain = Setting("base", prompt, base, backward=Backward("full"))
    return [plain, *(plain._replace(name=name, steps=steps) for name, steps in SCHEDULES.items())]


STUDIES = {
    "choices": choices,
    "parts": parts,
    "noise": noise,
    "restoring": restoring,
    "defender": partial(choices, changes=DEFENDER),
    "attacker": attacker,
    "schedule": schedule,
}
PURIFYING = {"parts", "restoring"} | ANEW


def ablate(opts: Options) -> None:
    """Run the studies that --study names; writes results.json, table.md and curves to --out."""
    names = opts.study.split(",")
    started, asked = time.monotonic(), opts.target.defense
    if not asked.method.get("composite", True):
        raise InputError("--no-composite is not studied here: leave it out")
    if not asked.method.get("restore", True) and {"parts", "restoring"} & set(names):
        raise InputError("--no-restore leaves nothing of these studies, which compare restorations: leave it out")
    base = config_of(asked.model, asked.method)
    studied = {name: STUDIES[name](asked.prompt_kind, base) for name in names if name != "examples"}
    tuned = next((name for name, mine in studied.items() if "tuned" in {s.prompt for s in mine}), None)
    if tuned and asked.prompts is None and not asked.model.embedded:
        raise InputError(f"--study {tuned} asks for tuned prompts: give --prompts FILE, tuned on this model")
    out = place_for(Path(opts.out) / "results.json").parent
    prompts = Path(asked.prompts or SHIPPED)
    told = {
        "options": settings(opts, "out", "batch_size") | asdict(base),
        "sha256": hashes_of(asked.model, prompts=prompts, classifier=opts.target.classifier_weights),
    }
    refuse_to_replace(out, told)
    device = pick_device(opts.run.device)
    classifier = open_classifier(opts.target, device)
    model = open_model(asked.model, device)
    tuned_on = frozenset(read_header(prompts).get("hashes", []))
    batch = correct_subset(open_items(opts.target), classifier, opts.images, opts.run.seed, tuned_on).to(device)
    attack = ATTACKS[opts.attack].from_flags(vars(opts) | {"eot": 1})
    task = Task(Undefended(classifier), batch.x, batch.y, batch.ids, opts.run.seed)
    attacked = attack_all(attack, task, opts.batch_size, quiet=opts.run.quiet)
    kind = f"targeted {opts.attack}" if attack.targeted else opts.attack
    kinds = ["evade"] if {"defender", "attacker"} & set(names) else []
    kinds += ["full"] if "schedule" in names else []
    anew = f"; then {' and '.join(kinds)}, {opts.iters_anew} steps, EOT {opts.eot}" if kinds else ""
    results = {
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "images": len(batch.ids),
        "seed": opts.run.seed,
        "attack": f"{kind}, {attack.shape} of {100 * attack.area:g} %, {attack.iters} steps{anew}",
        **told,
        "undefended": is_right(classifier, attacked.image, batch.y, opts.batch_size).mean().item(),
    }
    for name in names:
        if name == "examples":
            defense = DIFFender(model, contexts_for(asked.prompt_kind, model, asked.prompts), base)
            results[name] = show(opts, defense, classifier, batch, attacked)
            continue
        changed = bar(studied[name], name, opts.run.quiet)
        results[name] = []
        for s in changed:
            target = Defended(DIFFender(model, contexts_for(s.prompt, model, asked.prompts), s.cfg), classifier)
            shown = attacked
            if name in ANEW:
                harder = replace(attack, iters=opts.iters_anew, eot=opts.eot, **s.steps)
                known = task._replace(victim=target.under(s.backward))
                shown = attack_all(harder, known, opts.batch_size, attacked.state)
            loss = {"loss": shown.trace[:, -1].mean().item()} if name in ANEW else {}
            results[name].append(measure(opts, name, target, s, batch, shown) | loss)
    results["seconds"] = time.monotonic() - started
    write_json(out / "results.json", results)
    write_text(out / "table.md", markdown(results))
    if "noise" in results:
        plot_noise(results, out / "noise.png")
    print(f"\n{markdown(results)}")


def refuse_to_replace(out: Path, told: dict) -> None:
    """Raises InputError where the folder has results of another command, or of a study with other settings."""
    try:
        there = json.loads((out / "results.json").read_text(encoding="utf-8"))
        same = all(there[what].get(name, value) == value for what in told for name, value in told[what].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        same = False
    held = [name for name in ("config.json", "results.json", "table.md") if (out / name).is_file()]
    if "config.json" in held or (held and not same):
        raise InputError(f"{out} holds other results; choose another --out, or move them away")


def is_right(classifier: Classifier, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Of images (B, 3, S, S) with labels (B,), those that the classifier gets right: (B,) in {0, 1}."""
    return torch.cat([(classifier(part).argmax(dim=1)) for part in x.split(size)]).eq(y).float()


def measure(
    opts: Options, study: str, target: Defended, setting: Setting, batch: Batch, attacked: Attacked
) -> dict[str, object]:
    """Means over the photographs: of map and mask; in PURIFYING, of what the classifier sees after purification. There
    `right` tells of each attacked photograph whether it is read right."""
    defense, classifier = target.defense, target.classifier
    columns: dict[str, list[Tensor]] = {}
    for rows in slices(opts.batch_size, batch.ids):
        x, y, image, mask = (batch.x[rows], batch.y[rows], attacked.image[rows], attacked.mask[rows])
        noise = defense.sample_noise(batch.ids[rows], opts.run.seed, "ablation")
        found = defense.localize(image, noise)
        values = map_columns(found, mask)
        if study != "noise":
            clean = defense.localize(x, noise)
            values["clean_area"] = clean.mask.mean(dim=(1, 2, 3))
        if study in PURIFYING:
            unharmed = x if setting.oracle else defense.repaint(x, clean.mask, noise)
            covered = mask if setting.oracle else found.mask
            purified = defense.repaint(image, covered, noise)
            values |= {
                "clean_right": is_right(classifier, unharmed, y, opts.batch_size),
                "right": is_right(classifier, purified, y, opts.batch_size),
                "l1_patch": ((purified - x).abs() * mask).sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3))),
            }
        for name, value in values.items():
            columns.setdefault(name, []).append(value.cpu())
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    error = joined["auc"].std().item() / len(batch.ids) ** 0.5 if len(batch.ids) > 1 else 0.0
    means: dict[str, object] = {name: values.mean().item() for name, values in joined.items()}
    if study in PURIFYING:
        means["right"] = joined["right"].int().tolist()  # photograph by photograph, for paired tests
    told = {"setting": setting.name, "prompt": setting.prompt, "oracle": setting.oracle, **asdict(setting.cfg)}
    return told | means | {"auc_error": error}


def map_columns(found: Localized, mask: Tensor) -> dict[str, Tensor]:
    """Difference map and mask against the true mask (B, 1, H, W), (B,) each."""
    inside = F.interpolate(mask, found.heatmap.shape[-2:], mode="area")
    heat = [(found.heatmap * w).sum(dim=(1, 2, 3)) / w.sum(dim=(1, 2, 3)) for w in (inside, 1 - inside)]
    scores = {"auc": map_auc(found.heatmap, mask), "inside": heat[0], "outside": heat[1]}
    return scores | mask_scores(found.mask, mask)._asdict()


def show(
    opts: Options, defense: DIFFender, classifier: Classifier, batch: Batch, attacked: Attacked
) -> dict[str, float]:
    """What the VAE keeps of the clean photographs; and an image of the first eight, `images.png`."""
    first = 8
    parts = [batch.x[rows] for rows in slices(opts.batch_size, batch.ids)]
    recon = torch.cat([round_trip(defense, x) for x in parts])
    psnr = -10 * (recon - batch.x).square().mean(dim=(1, 2, 3)).log10()
    x, image, mask = batch.x[:first], attacked.image[:first], attacked.mask[:first]
    noise = defense.sample_noise(batch.ids[:first], opts.run.seed, "ablation")
    out = defense(image, noise)
    heat = stretch(out.heatmap, x.shape[-2:])
    stages = [
        x,
        recon[:first],
        image,
        defense.repaint(image, mask, noise),
        heat.expand_as(x),
        out.mask.expand_as(x),
        out.image,
    ]
    save_png(make_grid(torch.cat(stages), len(x)), Path(opts.out) / "images.png")
    right = is_right(classifier, recon, batch.y, opts.batch_size)
    return {"psnr": psnr.mean().item(), "round_trip_right": right.mean().item()}


def round_trip(defense: DIFFender, x: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] out of the VAE, at the size that the defence works at; latents are the means."""
    posterior = defense.posterior(x)
    z = defense.model.latents(posterior, torch.zeros_like(posterior.mean))
    return resize(defense.model.decode(z), x.shape[-2:]).clamp(0, 1)


def markdown(results: dict) -> str:
    """A table a study, then how it came about."""
    tables = []
    if "choices" in results:
        head = ("setting", "AUC", "inside / outside", "recall", "precision", "IoU", "masked when clean")
        rows = [(r["setting"], *mask_cells(r), percent(r["clean_area"])) for r in results["choices"]]
        tables.append(table(head, rows))
    for study in (name for name in ("parts", "restoring") if name in results):
        scores = ("recall", "precision", "IoU", "masked when clean", "error in the patch")
        p, base = beside_base(results[study])
        head = ("defence", "clean", "attacked", f"p, beside {base}", *scores)
        blank = ("",) * 4
        rows = [("undefended", "100.0 %", percent(results["undefended"]), "", *blank, "")]
        for r in results[study]:
            masks = blank if r["oracle"] else (*mask_cells(r)[2:], percent(r["clean_area"]))
            clean = "" if r["oracle"] else percent(r["clean_right"])
            attacked = counted(proportion(r["right"])), p[r["setting"]]
            rows.append((r["setting"], clean, *attacked, *masks, f"{r['l1_patch']:.3f}"))
        tables.append(table(head, rows))
    for study in (name for name in ("defender", "attacker", "schedule") if name in results):
        p, base = beside_base(results[study])
        head = ("setting", "attacked", f"p, beside {base}", "recall", "IoU", "AUC", "clean", "masked when clean")
        head = (*head, "attacker's loss, last step") if study == "schedule" else head
        rows = []
        for r in results[study]:
            auc, _, recall, _, iou = mask_cells(r)
            clean = percent(r["clean_right"]), percent(r["clean_area"])
            last = (f"{r['loss']:.2f}",) if study == "schedule" else ()
            rows.append(
                (r["setting"], counted(proportion(r["right"])), p[r["setting"]], recall, iou, auc, *clean, *last)
            )
        tables.append(table(head, rows))
    if "noise" in results:
        prompts = CHOICES["prompt"]
        head = ("noise ratio", *(f"{prompt}: {column}" for prompt in prompts for column in ("inside / outside", "AUC")))
        cells = {(r["prompt"], r["noise_ratio"]): mask_cells(r) for r in results["noise"]}
        rows = [
            (str(ratio), *(cells[prompt, ratio][column] for prompt in prompts for column in (1, 0)))
            for ratio in CHOICES["noise_ratio"]
        ]
        tables.append(table(head, rows))
    if "examples" in results:
        p = results["examples"]
        tables.append(
            f"VAE round trip of the clean photographs: {p['psnr']:.1f} dB; the classifier is right on "
            f"{percent(p['round_trip_right'])}.\n"
        )
    tables.append(
        f"`{results['command']}`: {results['images']} photographs, {results['attack']}, seed {results['seed']}, "
        f"{results['seconds']:.0f} s on {results['machine']}, {results['date']}.\n"
    )
    return "\n".join(tables)


def beside_base(rows: Sequence[dict]) -> tuple[dict[str, str], str]:
    """McNemar's p of each setting beside the usual one, on the same attacked photographs; and that one's name."""
    base = next(r for r in rows if r["setting"] in ("base", USUAL))
    p = {r["setting"]: f"{mcnemar(list(zip(r['right'], base['right'], strict=True))):.2g}" for r in rows}
    return p | {base["setting"]: ""}, base["setting"]


def mask_cells(r: dict) -> tuple[str, ...]:
    return (
        f"{r['auc']:.3f} ± {r['auc_error']:.3f}",
        f"{r['inside'] / r['outside']:.2f}",
        f"{r['recall']:.3f}",
        f"{r['precision']:.3f}",
        f"{r['iou']:.3f}",
    )


def plot_noise(results: dict, path: Path) -> None:
    """Over the noise ratio: the difference map inside and outside the patch, and its AUC."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"inside": "-", "outside": "--"}
    for colour, prompt in (("tab:grey", "empty"), ("tab:blue", "manual"), ("tab:red", "tuned")):
        rows = [r for r in results["noise"] if r["prompt"] == prompt]
        ratios = [r["noise_ratio"] for r in rows]
        for name, style in styles.items():
            left.plot(ratios, [r[name] for r in rows], style, color=colour, label=f"{prompt}, {name}")
        right.plot(ratios, [r["auc"] for r in rows], color=colour, label=prompt)
    left.set(xlabel="noise ratio", ylabel="mean difference map", yscale="log")
    left.legend(fontsize=6, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    right.set(xlabel="noise ratio", ylabel="AUC, patch against the rest", ylim=(0.4, 1))
    right.legend(fontsize=7)
    save_figure(figure, path)
