"""Tables as Markdown, csv and LaTeX."""

import csv
import io
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def as_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def as_latex(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Two columns of words, then numbers, for \\usepackage{booktabs}."""
    first, *lines = (" & ".join(row).replace("%", r"\%").replace("_", r"\_") + r" \\" for row in (head, *rows))
    start = [r"\begin{tabular}{ll" + "r" * (len(head) - 2) + "}", r"\toprule", first, r"\midrule"]
    return "\n".join([*start, *lines, r"\bottomrule", r"\end{tabular}", ""])
