"""One UNet forward at full size, ours and diffusers' side by side with the same random weights.

    python benchmarks/unet.py --model sd15-inpainting --dtype float32

Batch 2 (the two branches of guidance), latents of 64 x 64. Runs alternate; medians and their ratio are printed, and the
relative difference of the outputs. Without diffusers, ours alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffender.layouts import unet_name
from diffender.models.unet import UNet
from diffender.weights import load_model


def peer(ours: UNet) -> nn.Module | None:
    """diffusers' UNet on the very same weights."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    cfg = ours.cfg
    widths = [cfg.model_channels * m for m in cfg.channel_mult]
    blocks = ["CrossAttn{}Block2D" if i in cfg.attention_levels else "{}Block2D" for i in range(len(widths))]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            in_channels=cfg.in_channels, block_out_channels=widths, layers_per_block=cfg.num_res_blocks,
            down_block_types=[b.format("Down") for b in blocks], up_block_types=[b.format("Up") for b in blocks[::-1]],
            cross_attention_dim=cfg.context_dim, attention_head_dim=[cfg.heads(w) for w in widths],
            use_linear_projection=cfg.linear_proj,
        )  # fmt: skip
    state = {unet_name(k, cfg.num_res_blocks): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def clock(function, x: Tensor) -> tuple[float, Tensor]:  # noqa: ANN001
    sync = torch.cuda.synchronize if x.is_cuda else lambda: None
    sync()
    start = time.perf_counter()
    out = function(x)
    sync()
    return time.perf_counter() - start, out


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sd15-inpainting", "sd2-inpainting"), default="sd15-inpainting")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model, "random", dtype).to(args.device)
    theirs = peer(model.unet)
    g = torch.Generator().manual_seed(0)
    shape = model.cfg.latent_shape[1:]
    x = torch.randn(args.batch, model.cfg.unet.in_channels, *shape, generator=g).to(args.device, dtype)
    context = torch.randn(args.batch, 77, model.cfg.unet.context_dim, generator=g).to(args.device, dtype)
    t = torch.full((args.batch,), 481, device=args.device)

    contenders = {"ours": lambda x: model.unet(x, t, context)}
    if theirs is not None:
        contenders["diffusers"] = lambda x: theirs(x, t, context).sample
    seconds = {name: [] for name in contenders}
    for i in range(args.repeats + 1):
        outputs = {}
        for name, function in contenders.items():
            spent, outputs[name] = clock(function, x)
            if i > 0:  # the first warms up
                seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.model}, batch {args.batch}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {value:.2f} s" for name, value in median.items()))
    if theirs is not None:
        a, b = outputs["ours"].double(), outputs["diffusers"].double()
        print(
            f"ours / diffusers: {median['ours'] / median['diffusers']:.3f}; "
            f"relative difference {(a - b).norm() / b.norm():.1e}"
        )


if __name__ == "__main__":
    main()
