"""The folder of a run: its configuration and one JSON line for each image. A killed run resumes from them."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffender.utils.errors import InputError
from diffender.utils.files import cut_tail, one_line, place_for, write_json


def read_records(folder: Path, files: str = "per_image*.jsonl") -> dict[str, dict]:
    """The records of all processes by their ids, one for each image; a line that is being written is left out.

    Raises InputError for any other line that is not a record.
    """
    records: dict[str, dict] = {}
    for path in sorted(folder.glob(files)):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                    records.setdefault(record["id"], record)
                except (ValueError, TypeError, KeyError) as e:
                    raise InputError(
                        f"{path}, line {number} is damaged ({one_line(e)}); delete that line and give the same "
                        "command again, with the same --name or --out: its image is done anew"
                    ) from e
    return records


def read_finished(folder: Path) -> tuple[dict, list[dict]]:
    """The results of a run and the records of its images. A folder may hold more, of a run of the same name.

    Raises InputError for files that are damaged.
    """
    results, records = read_object(folder / "results.json"), read_records(folder)
    ids = set(results.get("ids", records))
    return results, [r for image_id, r in records.items() if image_id in ids]


def open_run(folder: Path, config: dict, own: Path) -> dict[str, dict]:
    """Make the folder, or resume in it: the records that are there. Another configuration there is refused.

    Each process appends to its `own` file; a last line there that a killed run left unfinished is cut off.
    """
    path = folder / "config.json"
    refuse_other(folder, config)
    if not path.is_file():
        place_for(path)
        write_json(path, config)
    cut_tail(own)
    return read_records(folder)


def refuse_other(folder: Path, config: dict) -> None:
    """Raises InputError where the folder holds a run with another configuration."""
    if not (folder / "config.json").is_file():
        return
    config, other = (one_by_one(c) for c in (json.loads(json.dumps(config)), read_config(folder)))
    changed = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
    if changed:
        pairs = {k: f"{other.get(k, 'not told')}, now {config.get(k, 'not told')}" for k in changed}
        told = "; ".join(f"{k}: {pair}" if len(pair) < 60 else k for k, pair in pairs.items())
        raise InputError(f"{folder} holds a run with other settings ({told}); choose another --name or --out")


def one_by_one(config: dict) -> dict:
    """The settings, with the sha256 of each file under a name of its own."""
    files = config.get("sha256")
    if not isinstance(files, dict):
        return config
    return {k: v for k, v in config.items() if k != "sha256"} | {f"sha256 of {k}": v for k, v in files.items()}


def read_config(folder: Path) -> dict:
    """The configuration of a run. Raises InputError if the file is damaged."""
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict:
    """The object of a JSON file. Raises InputError if the file is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} is damaged ({one_line(e)}); move its folder away, or choose another --name") from e


def append_records(path: Path, records: Sequence[dict]) -> None:
    """Append records in one write. A killed process leaves whole records and at most one unfinished line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    try:
        with path.open("a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk names none
        raise
