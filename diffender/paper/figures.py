"""The paper's Figures 1, 2, 3, 4, 5, 8 and 9 from our own images: python evaluate.py --figure 5.

They show patches of AdvP made on the undefended classifier. Figure 2 shows patches made on the defence beside them, and
Figure 8 runs the adaptive attacks of the chosen budget for each theta. PNG files and the numbers behind them go to
runs/figure<N>-<preset>/.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffender.attacks import AdvP
from diffender.attacks.attack import attack_all, slices
from diffender.attacks.expectation import Attacked, Task
from diffender.classifiers.dataset import Batch
from diffender.classifiers.imagenet import short_class_names
from diffender.defenses import build
from diffender.evaluation.metrics import counted, mcnemar, proportion, whiskers
from diffender.evaluation.options import Options, kinds, with_preset
from diffender.evaluation.plan import attack_flags, backward_of, build_target, describe
from diffender.evaluation.run import load_images
from diffender.evaluation.workers import is_first
from diffender.factory import pick_device
from diffender.localize import predict_pair
from diffender.noise import Noise
from diffender.paper.quoted import FIGURE_8
from diffender.paper.studies import map_columns
from diffender.paper.tables import BESIDE, NAMES, run_rows
from diffender.pipeline import Defended
from diffender.utils.errors import InputError
from diffender.utils.files import write_json, write_text
from diffender.utils.formats import table
from diffender.utils.images import save_figure, stretch
from diffender.utils.options import change
from diffender.utils.provenance import command, machine

SHOWN = 6  # images of a figure
RATIOS = (0.15, 0.5, 0.7, 0.9)  # of Fig. 3
THETAS = (1.5, 2.0, 2.5)  # of Fig. 8
IN_FIGURE_5 = ("jpeg", "smoothing", "dw", "lgs", "diffpure", "jedi", "diffender")  # FNC changes no image


class Scene(NamedTuple):
    opts: Options
    target: Defended
    batch: Batch
    made: Attacked

    def noise(self, defended: Defended | None = None, rows: slice = slice(None)) -> Noise:
        return (defended or self.target).sample_noise(self.batch.ids[rows], self.opts.run.seed, "figure")


def run_figure(number: int, opts: Options) -> str:
    """Draw a figure; says where it is. Raises InputError for images and weights that are not there."""
    folder = Path("runs") / f"figure{number}-{opts.preset}"
    if number == 1 and opts.target.defense.prompt_kind == "empty":
        raise InputError("--figure 1 shows what a prompt changes; --prompt empty has none: leave it out")
    if number == 2 and kinds(with_preset(opts))[-1] == "transfer":
        raise InputError("--figure 2 shows a patch made on the defence beside that of transfer; give another --grad")
    if number != 8 and not is_first():  # its attacks are shared by all shards
        return ""
    text = DRAWN[number](opts, folder)
    if not text:
        return ""  # other shards are at work
    where = machine(pick_device(opts.run.device))
    text += f"\n`{command()}`, seed {opts.run.seed}, {where}, {time.strftime('%Y-%m-%d')}.\n"
    write_text(folder / "table.md", text)
    return text


def scene(opts: Options, most: int | None = SHOWN) -> Scene:
    """Images with AdvP's patches made on the undefended classifier."""
    opts = with_preset(opts)
    target = build_target(opts)
    batch = load_images(opts if most is None else change(opts, images=min(most, opts.images)), target)
    batch = batch.to(target.classifier.mean.device)
    attack = AdvP.from_flags(vars(opts.patch) | {"iters": opts.iters_undefended, "eot": 1, "restarts": 1})
    task = Task(target.undefended(), batch.x, batch.y, batch.ids, opts.run.seed)
    return Scene(opts, target, batch, attack_all(attack, task, opts.batch_size, quiet=opts.run.quiet))


class Column(NamedTuple):
    title: str
    images: Tensor  # (B, 1 or 3, S, S)
    seen: Sequence[tuple[str, str]] = ()  # a line above each image, and its colour


def draw(columns: Sequence[Column], path: Path) -> None:
    """Columns of images under their titles; a row an image."""
    rows = len(columns[0].images)
    figure = Figure(figsize=(1.7 * len(columns), 1.75 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for c, (title, images, seen) in enumerate(columns):
        for r, image in enumerate(images):
            shown = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).squeeze(2)
            axes[r, c].imshow(shown, cmap="inferno" if "difference" in title else "gray", vmin=0, vmax=1)
            axes[r, c].set_axis_off()
            text, colour = seen[r] if seen else ("", "black")
            lines = [line for line in (title if r == 0 else "", text) if line]
            axes[r, c].set_title("\n".join(lines), fontsize=8, color=colour)
    save_figure(figure, path)


def figure_1(opts: Options, folder: Path) -> str:
    """Two one-step predictions of the same noised image, where they differ, and the mask."""
    s = scene(opts)
    d, cfg = s.target.defense, s.target.defense.cfg
    model, image, noise = d.model, s.made.image, s.noise()
    pair = predict_pair(model, model.latents(d.posterior(image), noise.image), d.contexts, noise, cfg, d.blank)
    prompted, empty = (model.decode(x0[:, 0]) for x0 in pair)
    found = d.localize(image, noise)
    columns = {"attacked": image, "x0, prompt": prompted, "x0, empty prompt": empty}
    columns |= {"difference": stretch(found.heatmap, image.shape[-2:]), "mask": found.mask}
    draw([Column(*column) for column in columns.items()], folder / "figure.png")
    return (
        f"Fig. 1, noise ratio {cfg.noise_ratio}: what prompt and empty prompt predict of {len(s.batch.ids)} images, "
        "decoded; their difference.\n"
    )


def figure_2(opts: Options, folder: Path) -> str:
    """The pipeline on patches made without and with knowledge of the defence; what the classifier sees is green where
    it is right."""
    s = scene(opts)
    opts, classifier, y = s.opts, s.target.classifier, s.batch.y
    names = classifier.names or short_class_names()

    def seen(x: Tensor) -> list[tuple[str, str]]:
        answers = zip(classifier(x).argmax(dim=1).tolist(), y.tolist(), strict=True)
        return [(names[c][:18], "green" if c == label else "firebrick") for c, label in answers]

    grad = kinds(opts)[-1]
    task = Task(s.target.under(backward_of(opts, grad)), s.batch.x, y, s.batch.ids, opts.run.seed)
    knowing = attack_all(AdvP.from_flags(attack_flags(opts)), task, opts.batch_size, s.made.state)
    columns, right = [Column("clean", s.batch.x, seen(s.batch.x))], []
    for title, attacked in (("patch made on\nthe classifier", s.made), ("patch made on\nthe defence", knowing)):
        out = s.target.defense(attacked.image, s.noise())
        columns += [
            Column(title, attacked.image, seen(attacked.image)),
            Column("difference", stretch(out.heatmap, attacked.image.shape[-2:])),
            Column("mask", out.mask),
            Column("restored", out.image, seen(out.image)),
        ]
        right.append(sum(colour == "green" for _, colour in columns[-1].seen))
    draw(columns, folder / "figure.png")
    return (
        f"Fig. 2: of {len(y)} images, {right[0]} are read right after restoration from patches made on the classifier, "
        f"{right[1]} after restoration from patches made on the defence ({grad}, {describe(opts)}).\n"
    )


def figure_3(opts: Options, folder: Path) -> str:
    """Denoising the whole image: small ratios keep the patch, large ones lose the image."""
    s = scene(opts)
    columns, rows = [Column("attacked", s.made.image)], []
    for ratio in RATIOS:
        defended = build(f"diffpure:t_star={ratio}", s.target)
        out = defended.defense(s.made.image, s.noise(defended)).image
        columns.append(Column(f"t* = {ratio}", out))
        right = defended.classifier(out).argmax(dim=1).eq(s.batch.y).float().mean().item()
        away = [((out - s.batch.x).abs() * m).sum() / (3 * m.sum()) for m in (s.made.mask, 1 - s.made.mask)]
        rows.append((str(ratio), f"{100 * right:.0f} %", *(f"{v:.3f}" for v in away)))
    draw([*columns, Column("clean", s.batch.x)], folder / "figure.png")
    text = table(("t*", "right", "error to clean, in the patch", "outside"), rows)
    return f"{text}\n{len(s.batch.ids)} images.\n"


def figure_4(opts: Options, folder: Path) -> str:
    """The difference map inside and outside of the patch, a point an image."""
    s = scene(opts, None)
    parts = [
        map_columns(s.target.defense.localize(s.made.image[rows], s.noise(rows=rows)), s.made.mask[rows])
        for rows in slices(s.opts.batch_size, s.batch.ids)
    ]
    means = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    outer, inner = means["outside"].tolist(), means["inside"].tolist()
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.scatter(outer, inner, s=12)
    high = max(inner + outer)
    axis.plot([0, high], [0, high], color="grey", linewidth=0.8)
    axis.set(xlabel="mean difference outside of the patch", ylabel="inside")
    save_figure(figure, folder / "figure.png")
    write_json(folder / "points.json", {"ids": s.batch.ids, "inside": inner, "outside": outer})
    above = sum(i > o for i, o in zip(inner, outer, strict=True))
    return f"Fig. 4: the difference is larger inside of the patch in {above} of {len(inner)} images.\n"


def figure_5(opts: Options, folder: Path) -> str:
    """What each defence makes of the attacked image."""
    s = scene(opts)
    columns, rows = [Column("attacked", s.made.image)], []
    for name in IN_FIGURE_5:
        defended = build(name, s.target)
        out = defended.defense(s.made.image, s.noise(defended)).image
        columns.append(Column(name, out))
        rows.append((NAMES[name], f"{defended.classifier(out).argmax(dim=1).eq(s.batch.y).sum()} of {len(out)}"))
    draw([*columns, Column("clean", s.batch.x)], folder / "figure.png")
    return table(("defence", "right"), rows)


def figure_9(opts: Options, folder: Path) -> str:
    s = scene(opts)
    out = s.target.defense(s.made.image, s.noise())
    columns = {"attacked": s.made.image, "mask": out.mask, "restored": out.image, "clean": s.batch.x}
    draw([Column(*column) for column in columns.items()], folder / "figure.png")
    right = s.target.classifier(out.image).argmax(dim=1).eq(s.batch.y).sum()
    return f"Fig. 9: {right} of {len(out.image)} restored images are read right.\n"


def figure_8(opts: Options, folder: Path) -> str:
    """Clean and robust accuracy over theta, under the adaptive attacks of this budget, and under bpda alone."""
    rows = [("diffender", {"theta": theta}) for theta in THETAS]
    lines = run_rows(rows, change(opts, trust="off", curves="off"))[1:]
    if not lines:
        return ""
    right: dict[str, list[list[float]]] = {}  # by attack: for each theta, whether each image is read right
    for line in lines:
        for name, verdicts in line.verdicts.items():
            if name != "clean" or not line.reading:
                right.setdefault(name + BESIDE.get(line.reading, ""), []).append([v.single for v in verdicts])
    figure = Figure(figsize=(4, 3.2), layout="constrained")
    axis = figure.subplots()
    usual, shown = THETAS.index(2.0), []
    for name, by_theta in right.items():
        cells = [proportion(values) for values in by_theta]
        p = [f", p = {mcnemar(list(zip(values, by_theta[usual], strict=True))):.2g}" for values in by_theta]
        p[usual] = ""  # it is not compared with itself
        shown.append([counted(cell, unit="") + beside for cell, beside in zip(cells, p, strict=True)])
        axis.errorbar(THETAS, *whiskers(cells), marker="o", label=name, capsize=2, elinewidth=0.7)
    axis.set(xlabel="theta", ylabel="accuracy, %", ylim=(0, 102), xticks=THETAS)
    axis.legend(fontsize=7)
    save_figure(figure, folder / "figure.png")
    text = table(("theta", *right), list(zip(map(str, THETAS), *shown, strict=True)))
    quoted = "; ".join(f"theta {t}: clean {n['clean']}, AdvP {n['advp']}" for t, n in FIGURE_8.items())
    told = f"{len(right['clean'][0])} images, Wilson intervals of 95 %; p: McNemar, exact, beside theta 2."
    return f"{text}\n{told} The paper, quoted (Inception-v3): {quoted}.\n"


DRAWN = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 5: figure_5, 8: figure_8, 9: figure_9}  # all of FIGURES
