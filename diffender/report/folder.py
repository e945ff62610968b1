"""What people read of a finished run, beside its records: table.md, .csv and .tex, and report.html."""

from pathlib import Path

from diffender.classifiers.imagenet import short_class_names
from diffender.evaluation.records import read_config, read_finished
from diffender.report.page import page
from diffender.report.tables import accuracies, csv_table, markdown
from diffender.utils.errors import InputError
from diffender.utils.files import one_line, write_text
from diffender.utils.formats import as_latex

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
            "table.tex": as_latex(*accuracies(results)),
            "report.html": page(results, records, folder / "images", names, read_config(folder)),
        }
    except InputError:
        raise
    except DAMAGE as e:
        raise InputError(f"{folder} is damaged ({one_line(e)}); run it again") from e
    for file, text in texts.items():
        write_text(folder / file, text)
    return results
