"""Energy that the machine has taken, as far as it tells: processors by Linux's powercap, GPUs by NVIDIA's library."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")  # Intel's and AMD's processors; readable by root alone on many machines


class Counter(NamedTuple):
    joules: float
    top: float  # value at which the counter starts again from 0


def counters(powercap: Path = POWERCAP) -> dict[str, Counter]:
    """Counters by name, of the whole machine, other work included. Empty where the machine tells nothing."""
    found = {}
    for package in powercap.glob("intel-rapl:*"):
        if package.name.count(":") == 1:  # more are parts of a package
            try:
                joules, top = (int((package / f).read_text()) / 1e6 for f in ("energy_uj", "max_energy_range_uj"))
            except (OSError, ValueError):
                continue
            found[package.name] = Counter(joules, top)
    return found | of_gpus()


def of_gpus() -> dict[str, Counter]:
    """The energy counters of NVIDIA's GPUs; empty without any, or without the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        told = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 for handle in handles]
    except pynvml.NVMLError:
        return {}
    return {f"GPU {i}": Counter(joules, float("inf")) for i, joules in enumerate(told)}


def watt_hours(before: Mapping[str, Counter], after: Mapping[str, Counter]) -> float | None:
    """What was taken in between; None where nothing is told. A counter may have begun anew once."""
    both = before.keys() & after.keys()
    return sum((after[k].joules - before[k].joules) % after[k].top for k in both) / 3600 if both else None
