"""Damaged files of every kind: each is read rightly or refused in one line; no crash, no hang, no GiB of memory."""

import json
import mmap
import re
import signal
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from diffender.classifiers.dataset import list_items, open_image
from diffender.evaluation.records import open_run
from diffender.report.folder import write_report
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors
from diffender.weights.loading import describe, load_model
from diffender.weights.official import convert
from diffender.weights.prompts import SHIPPED, load_prompts, save_prompts
from diffender.weights.reading import scan
from tests.cases import small_model_file

GIB = 2**30
SECONDS = 20  # that no file takes


def mutated(content: bytes, r: Random) -> bytes:
    """Cut short, overwritten, shifted, with parts repeated or lost, or with one number made huge."""
    data, at = bytearray(content), r.randrange(len(content))
    n = r.choice((1, 2, 8, 64))
    match r.randrange(6):
        case 0:
            return bytes(data[:at])
        case 1:
            data[at : at + n] = r.randbytes(n)
        case 2:
            data[at:at] = r.randbytes(n)
        case 3:
            del data[at : at + n]
        case 4:
            other = r.randrange(len(content))
            data[at:at] = data[other : other + 50 * n]
        case 5:
            digits = [i for i, byte in enumerate(data[:100_000]) if chr(byte).isdigit()] or [at]
            i = r.choice(digits)
            data[i : i + 1] = r.choice((b"-1", b"99999999999999999999", b"1e999", b"null", b"[" * 5000, b"{}", b'"x"'))
    return bytes(data)


def photograph(folder: Path, kind: str) -> Path:
    path = folder / f"photo.{kind}"
    image = Image.radial_gradient("L").resize((60, 40))
    extra = {"exif": Image.Exif()} if kind in ("jpg", "png", "webp") else {}
    if extra:
        extra["exif"][0x0112] = 6
    Image.merge("RGB", [image] * 3).save(path, **extra)
    return path


def csv_file(folder: Path) -> Path:
    path = folder / "labels.csv"
    path.write_text("file,label\n" + "".join(f"photo{i}.jpg,{7 * i}\n" for i in range(30)), encoding="utf-8")
    return path


def prompts_file(folder: Path) -> Path:
    save_prompts(load_prompts(SHIPPED, 64), folder / "prompts.safetensors", {"shots": 8})
    return folder / "prompts.safetensors"


def read_weights(path: Path) -> None:
    describe(scan(path))
    found, sound = (load_model("auto", p).state_dict() for p in (path, path.with_name("small.safetensors")))
    assert found.keys() == sound.keys()
    assert all(torch.equal(found[k], sound[k]) for k in sound), "other weights, in silence"


def read_prompts(path: Path) -> None:
    found, shipped = load_prompts(path, 64).state_dict(), load_prompts(SHIPPED, 64).state_dict()
    assert all(torch.equal(found[k], shipped[k]) for k in shipped), "another prompt, in silence"


def pickled(folder: Path, zipped: bool) -> Path:
    path = folder / "model.ckpt"
    tensors = {f"layer{i}": torch.arange(i, i + 50.0) for i in range(4)}
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    return path


def read_pickled(path: Path, zipped: bool) -> None:
    out = path.with_suffix(".safetensors")
    out.unlink(missing_ok=True)
    found = load_tensors(convert(path, out))
    if zipped:  # an older file has no checksum, so it may hold other numbers
        for i in range(4):
            assert torch.equal(found[f"layer{i}"], torch.arange(i, i + 50.0)), "other weights, in silence"


def run_folder(folder: Path) -> Path:
    """Records of a finished run, small but whole."""
    attack = {"undefended": 2, "defended": [1, 1], "loss": [1.0], "fooled": [0.0], "confidence": [0.9, 0.2]}
    same = {"label": 1, "undefended": 1, "defended": [1, 0], "masked": 0.1, "confidence": [0.8, 0.7]}
    records = [{"id": f"p{i}", "file": f"p{i}"} | same | {"attacks": {"advp/full": attack}} for i in range(4)]
    p = {"right": 3.0, "n": 4, "accuracy": 0.75, "low": 0.3, "high": 0.95}
    row = {"undefended": p, "single": p, "average": p, "worst": p, "majority": p}
    rows = [row | {"attack": a, "gradient": ""} for a in ("none", "strongest on each image")]
    told = {"setting": "s", "seed": 0, "machine": "m", "date": "d", "command": "c", "seconds": 1.0, "trust": []}
    told |= {
        "rows": rows,
        "defense": "D",
        "verdicts": 2,
        "votes": 1,
        "curves": {},
        "names": None,
        "masked_clean": 0.1,
        "unet_evaluations": 9,
        "masks": {},
    }
    for stage in ("clean", "advp/full/attacked", "advp/full/restored"):
        for record in records:
            path = folder / "images" / stage.replace("/full/", f"/full/{record['file']}_")
            path = path if "/" in stage else folder / "images" / f"{record['file']}_{stage}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(f"{path}.png")
    (folder / "config.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps(told))
    (folder / "per_image.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / "per_image.jsonl"


def read_run(path: Path) -> None:
    write_report(path.parent)
    open_run(path.parent, {}, path.with_name("per_image.jsonl"))


KINDS = {
    "weights": (small_model_file, read_weights),
    "prompts": (prompts_file, read_prompts),
    "ckpt": (lambda folder: pickled(folder, zipped=True), lambda path: read_pickled(path, zipped=True)),
    "old ckpt": (lambda folder: pickled(folder, zipped=False), lambda path: read_pickled(path, zipped=False)),
    "csv": (csv_file, lambda path: list_items(str(path))),
    "records": (lambda folder: run_folder(folder / "run"), read_run),
    "results": (lambda folder: run_folder(folder / "run").with_name("results.json"), read_run),
} | {
    kind: (lambda folder, kind=kind: photograph(folder, kind), lambda path: open_image(path, upright=True))
    for kind in ("jpg", "png", "webp", "bmp", "gif", "tiff")
}


def too_slow(*_: object) -> None:
    raise AssertionError(f"took more than {SECONDS} s")


@pytest.fixture
def alarm():
    """Ends what takes too long."""
    before = signal.signal(signal.SIGALRM, too_slow)
    yield
    signal.signal(signal.SIGALRM, before)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most since `forget_the_peak`. 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0


def forget_the_peak() -> None:
    if (clear := Path("/proc/self/clear_refs")).is_file():
        clear.write_text("5")


def hold_for_a_moment(size: int) -> None:
    with mmap.mmap(-1, size) as pages:
        for at in range(0, size, mmap.PAGESIZE):
            pages[at] = 1


def test_the_peak_is_of_what_comes_after():
    if not resident("VmHWM"):
        pytest.skip("not Linux: this system does not tell a peak that can be forgotten")
    forget_the_peak()
    before = resident("VmRSS")
    hold_for_a_moment(100 * 2**20)
    assert resident("VmHWM") > before + 50 * 2**20
    forget_the_peak()
    assert resident("VmHWM") < before + 50 * 2**20


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path, kind, count):
    make, read = KINDS[kind]
    good = make(tmp_path)
    read(good)
    content, bad = good.read_bytes(), good if kind in ("records", "results") else tmp_path / f"bad{good.suffix}"
    forget_the_peak()
    before, refused = resident("VmRSS"), 0
    for seed in range(count):
        bad.write_bytes(mutated(content, Random(f"{kind} {seed}")))
        signal.alarm(SECONDS)
        try:
            read(bad)
        except InputError as e:
            refused += 1
            assert len(str(e).splitlines()) == 1, (seed, str(e))
            assert len(str(e)) < 1000, (seed, str(e))
        finally:
            signal.alarm(0)
    assert refused > count / 20
    grown = resident("VmHWM") - before
    assert grown < GIB, f"{grown / GIB:.1f} GiB"
