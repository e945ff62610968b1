"""From the records of a run to what people read.

    python -m diffender report README.md docs/*.md            # put the tables of results/ into documents, anew
    python -m diffender report compare runs/A runs/B          # two runs, image by image
    python -m diffender report page runs/NAME                 # write report.html there anew
    python -m diffender report chart FILE.png runs/A runs/B   # accuracy over what the attacker knows, a line each
    python -m diffender report steps FILE.png runs/NAME       # losses over the steps of each attack on the defence

A document takes a table between the marks <!-- results/NAME --> and <!-- end -->.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from diffender.evaluation.records import read_config, read_records
from diffender.utils.errors import InputError
from diffender.utils.files import write_text
from diffender.utils.formats import table
from diffender.utils.options import run
from diffender.utils.provenance import command


def filled(document: str, results: Path) -> str:
    """The document with the NAME/table.md of `results` between its marks, <!-- results/NAME --> and <!-- end -->.

    Raises InputError for a table that is not there, and for a start without an end.
    """

    def content(match: re.Match) -> str:
        path = results / match["name"] / "table.md"
        if not path.is_file():
            raise InputError(f"no {path}, whose table the document asks for; make it, or take out its marks")
        return f"<!-- results/{match['name']} -->\n{path.read_text(encoding='utf-8')}<!-- end -->"

    start, rest = r"<!-- results/(?P<name>[\w-]+) -->\n", r"(?:(?!<!-- results/).)*?<!-- end -->"
    if unended := re.search(f"{start}(?!{rest})", document, re.DOTALL):
        raise InputError(f"{unended[0].strip()} has no <!-- end --> before the next table; add it")
    return re.sub(start + rest, content, document, flags=re.DOTALL)


def compare(a: Path, b: Path) -> str:
    """Two runs on the images and attacks that they share: who is right where the other is not, by the first
    purification of each; McNemar's exact p. `strongest` counts an image under all shared attacks. Runs are named by
    their defences, or by their folders if these are the same. What their attackers differ in is said beneath.

    Raises InputError where they share no images, or images of one name are not the same.
    """
    from diffender.config import Backward
    from diffender.evaluation.metrics import counted, discordant, mcnemar, proportion
    from diffender.evaluation.options import BUDGET, OURS, PatchOptions

    left, right = (read_records(folder) for folder in (a, b))
    ids = [i for i in left if i in right]
    if not ids:
        raise InputError(f"{a} and {b} share no images; compare runs of evaluate.py on the same --data and --seed")
    if any("attacks" not in run[i] for run in (left, right) for i in ids):
        raise InputError(f"{a} or {b} holds no evaluation; compare two folders that evaluate.py wrote")
    configs = [read_config(folder) for folder in (a, b)]
    images = [config.get("sha256", {}).get("images") for config in configs]
    both = [(left[i].get(key), right[i].get(key)) for i in ids for key in ("label", "hash")]
    if images[0] != images[1] or any(x != y for x, y in both if None not in (x, y)):  # old records have no hash
        raise InputError(f"{a} and {b} are of different images, or labels; compare runs on the same ones")
    variants = list(left[ids[0]]["attacks"])
    shared = [v for v in variants if all(v in run[i]["attacks"] for run in (left, right) for i in ids)]

    def is_right(record: dict, attacks: Sequence[str]) -> bool:
        seen = [record["attacks"][v]["defended"][0] for v in attacks] if attacks else [record["defended"][0]]
        return all(c == record["label"] for c in seen)

    rows = []
    compared = {"none": []} | {v: [v] for v in shared} | ({"strongest": shared} if shared else {})
    for name, attacks in compared.items():
        pairs = [(is_right(left[i], attacks), is_right(right[i], attacks)) for i in ids]
        shares = (counted(proportion(column)) for column in zip(*pairs, strict=True))
        rows.append((name, *shares, *map(str, discordant(pairs)), f"{mcnemar(pairs):.2g}"))
    defenses = [config.get("defense", "") for config in configs]
    x, y = (OURS.get(name, name) for name in defenses)
    if x == y:
        x, y = a.name, b.name
    head = (f"{len(ids)} images", f"{x} right", f"{y} right", f"only {x}", f"only {y}", "p")
    attackers = ("classifier", "seed", *BUDGET, *(f.name for part in (PatchOptions, Backward) for f in fields(part)))
    told = [(name, *(config.get(name) for config in configs)) for name in attackers]
    differ = ", ".join(f"{name} ({one} and {other})" for name, one, other in told if one != other)
    note = f" **The attackers differ**: {differ}." if differ else ""
    said = "first purifications, Wilson intervals of 95 %; p: McNemar, exact."
    return f"{table(head, rows)}\n`{command()}`: {said}{note}\n"


def check_runs(folders: Sequence[str]) -> None:
    """Raises InputError unless each is the folder of a run."""
    missing = [folder for folder in folders if not (Path(folder) / "config.json").is_file()]
    if missing:
        raise InputError(f"there is no run in {missing[0]}; give folders that evaluate.py wrote")


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    if what == "" or {"-h", "--help"} & {what, *rest}:
        print(__doc__)
        return
    if what == "compare":
        check_runs(rest)
        if len(rest) != 2:
            raise InputError(f"compare: {len(rest)} given; give two folders that evaluate.py wrote")
        print(compare(*map(Path, rest)), end="")
        return
    if what in ("chart", "steps"):
        from diffender.report.chart import draw_knowledge, draw_steps

        picture, *runs = rest or [""]
        check_runs(runs)
        if Path(picture).suffix != ".png" or not runs or (what == "steps" and len(runs) > 1):
            wanted = "runs" if what == "chart" else "one run"
            raise InputError(f"{what}: {' '.join(rest) or 'nothing'} given; give a file, as {what}.png, and {wanted}")
        if what == "chart":
            draw_knowledge([*map(Path, runs)], Path(picture))
        else:
            draw_steps(Path(runs[0]), Path(picture))
        return
    if what == "page":
        from diffender.report.folder import write_report

        if not rest:
            raise InputError("page: no folder given; give folders that evaluate.py wrote")
        for folder in rest:
            write_report(Path(folder))
            print(Path(folder) / "report.html")
        return
    for path in map(Path, sys.argv[1:]):
        if not path.is_file():
            raise InputError(f"no document {path}; give Markdown files, or compare, page, chart or steps")
        try:
            document = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is no text in UTF-8; give Markdown files") from e
        write_text(path, filled(document, Path("results")))


if __name__ == "__main__":
    run(main)
