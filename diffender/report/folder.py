"""What people read of a finished run, beside its records: table.md, .csv and .tex, grid.png and report.html."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from diffender.classifiers.imagenet import short_class_names
from diffender.evaluation.records import read_config, read_finished
from diffender.report.page import page
from diffender.report.tables import csv_table, latex_table, markdown
from diffender.utils.errors import InputError
from diffender.utils.files import one_line, write_text
from diffender.utils.images import save_figure, stage_files

# What reading a damaged results.json or record may raise.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError)


def write_report(folder: Path) -> dict:
    """Write them all anew, and return the results.

    Raises InputError where the folder holds no finished run, a damaged one, or results of another command.
    """
    if not (folder / "results.json").is_file():
        raise InputError(f"no finished run in {folder}; give a folder that evaluate.py wrote")
    try:
        results, records = read_finished(folder)
        if results and "verdicts" not in results:
            raise InputError(f"{folder} holds results of another kind; give a folder that evaluate.py wrote")
        names = results["names"] or short_class_names()
        texts = {
            "table.md": markdown(results),
            "table.csv": csv_table(results),
            "table.tex": latex_table(results),
            "report.html": page(results, records, folder / "images", names, read_config(folder)),
        }
    except InputError:
        raise
    except DAMAGE as e:
        raise InputError(f"{folder} is damaged ({one_line(e)}); run it again") from e
    save_grid(folder / "images", records, folder / "grid.png", names)
    for file, text in texts.items():
        write_text(folder / file, text)
    return results


def save_grid(folder: Path, records: Sequence[dict], path: Path, names: Sequence[str], rows: int = 8) -> None:
    """A row an image, under its last attack: clean, attacked, difference map, mask, restored, with what the classifier
    sees in each. Nothing where no images are there."""
    saved = [(r, stage_files(folder, r, list(r["attacks"] or [""])[-1])) for r in records]
    saved = [(r, files) for r, files in saved if files][:rows]
    if not saved:
        return
    stages = list(saved[0][1])
    figure = Figure(figsize=(2.1 * len(stages), 2.35 * len(saved)), layout="constrained")
    axes = figure.subplots(len(saved), len(stages), squeeze=False)
    for row, (record, files) in zip(axes, saved, strict=True):
        for axis, (stage, file) in zip(row, files.items(), strict=False):
            image = Image.open(file)
            axis.imshow(image, cmap="inferno" if stage == "heatmap" else "gray", vmin=0, vmax=255)
            axis.set_axis_off()
            axis.set_title(stage, fontsize=8)
            last = list(record["attacks"].values() or [record])[-1]
            seen = {"clean": record["undefended"], "attacked": last["undefended"], "restored": last["defended"][0]}
            if stage in seen:
                answer = seen[stage]
                colour = "green" if answer == record["label"] else "firebrick"
                axis.set_title(f"{stage}: {names[answer][:20]}", fontsize=8, color=colour)
    save_figure(figure, path, dpi=100)
