"""One forward pass of UNet, VAE encoder and VAE decoder at full size, ours and diffusers' on the same random weights.

    python benchmarks/networks.py --dtype bfloat16

UNet: batch 2, latents of 64 x 64, a text for each row. `guidance` is the same with one pair of latents under two texts,
as both stages of the defence ask it. `linear`: one layer of the UNet, ours and torch's. VAE: one image of 512 px,
always in float32, as the defence runs it. Both sides have the very same weight tensors, channels last. Needs diffusers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import DTYPES, difference, diffusers_unet, diffusers_vae, in_turn, parser, report
from torch import Tensor

from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.unet import CrossAttention
from diffender.weights.loading import load_model

PARTS = ("linear", "unet", "guidance", "encode", "decode")


def contenders(part: str, model: LatentDiffusion, dtype: torch.dtype, wrap: Callable) -> dict[str, Callable]:
    """Ours and theirs on the same input, by name."""
    device, cfg, vae = model.alphas_cumprod.device, model.cfg, model.vae
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    side, size, scale = cfg.latent_shape[1], cfg.image_size, cfg.vae.scale_factor
    if part == "linear":
        layer = next(m for m in model.unet.modules() if isinstance(m, CrossAttention)).to_q
        x = normal(2, side * side, layer.in_features).to(dtype)
        return {"ours": lambda: layer(x), "torch": lambda: F.linear(x, layer.weight)}
    if part in ("unet", "guidance"):
        unet, their_unet = wrap(model.unet), wrap(diffusers_unet(model))
        x = normal(1 if part == "guidance" else 2, cfg.unet.in_channels, side, side).to(dtype)
        both, t = (x.expand(2, -1, -1, -1).contiguous(), torch.full((2,), 481, device=device))
        context = normal(2, 77, cfg.unet.context_dim).to(dtype)
        return {"ours": lambda: unet(x, t[: len(x)], context), "diffusers": lambda: their_unet(both, t, context).sample}
    their_vae = diffusers_vae(model)
    if part == "encode":
        x = torch.rand(1, 3, size, size, generator=g).to(device)
        encode, theirs = (wrap(lambda x: vae.posterior(x).mean), wrap(lambda x: their_vae.encode(x).latent_dist.mean))
        return {"ours": lambda: encode(x), "diffusers": lambda: theirs(2 * x - 1)}
    z = normal(1, cfg.vae.z_channels, side, side)
    decode, theirs = wrap(vae.decode), wrap(lambda z: their_vae.decode(z).sample)
    return {"ours": lambda: decode(z), "diffusers": lambda: (theirs(z / scale) + 1) / 2}


@torch.no_grad()
def main() -> None:
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--model", choices=("sd15-inpainting", "sd2-inpainting"), default="sd15-inpainting")
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the UNet")
    flags.add_argument("--parts", default=",".join(PARTS))
    flags.add_argument("--compile", action="store_true", help="torch.compile both")
    args = flags.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        flags.error(f"--parts {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model, "random", dtype).to(args.device)
    wrap = torch.compile if args.compile else lambda f: f
    rows, figures = [], {}
    for part in args.parts.split(","):
        pair = contenders(part, model, dtype, wrap)
        seconds, outputs = in_turn(pair, args.repeats, args.device)
        (ours, theirs), off = seconds.values(), difference(*outputs.values())
        kind = "float32" if part in ("encode", "decode") else args.dtype
        rows.append((part, kind, f"{ours:.4g}", f"{theirs:.4g}", f"**{ours / theirs:.2f}**", f"{off:.1e}"))
        figures[part] = seconds | {"ratio": ours / theirs, "difference": off}
        print(" ".join(rows[-1]), flush=True)
    head = (f"{args.model}{', compiled' * args.compile}", "dtype", "ours, s", "diffusers, s", "ratio", "difference")
    report(head, rows, figures, args)


if __name__ == "__main__":
    main()
