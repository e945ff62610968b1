"""Time and peak memory of loading a checkpoint, against the size of the model that comes out.

    python benchmarks/loading.py sd-v1-5-inpainting.safetensors --dtype bfloat16

Linux only. Peak is of resident memory above what the imports take; it counts pages of the file that are mapped.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffender.weights.loading import load_model


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in GiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    start = time.perf_counter()
    model = load_model("auto", args.path, getattr(torch, args.dtype))
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    print(
        f"{args.path}, UNet in {args.dtype}: {seconds:.1f} s, model {size:.2f} GiB, "
        f"peak {peak:.2f} GiB, peak / model {peak / size:.2f}"
    )


if __name__ == "__main__":
    main()
