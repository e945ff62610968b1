"""Time and peak memory of loading a checkpoint, against the size of the model that comes out.

    python benchmarks/loading.py sd-v1-5-inpainting.safetensors --dtype bfloat16

Linux only. Peak is of resident memory above what the imports take; it counts pages of the file that are mapped.
"""

import time
from pathlib import Path

import torch
from common import DTYPES, parser, report

from diffender.evaluation.memory import GIB, held_bytes, most_held_bytes
from diffender.weights.loading import load_model


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(device="cpu")  # where models are loaded
    flags.add_argument("path")
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the UNet")
    args = flags.parse_args()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held_bytes(args.device)
    start = time.perf_counter()
    model = load_model("auto", args.path, getattr(torch, args.dtype)).to(args.device)
    seconds = time.perf_counter() - start
    peak = (most_held_bytes(args.device) - before) / GIB
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    figures = {"seconds": seconds, "model, GiB": size, "peak, GiB": peak, "peak / model": peak / size}
    row = (args.path, args.dtype, *(f"{v:.2f}" for v in figures.values()))
    report(("file", "dtype", *figures), [row], figures, args)


if __name__ == "__main__":
    main()
