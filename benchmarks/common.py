"""What the benchmarks share: contenders measured in turn, the same networks in diffusers, where the figures go."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffender.factory import pick_device
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError
from diffender.utils.files import write_json, write_text
from diffender.utils.formats import table
from diffender.utils.malloc import keep_freed_memory
from diffender.utils.provenance import machine
from diffender.weights.layouts import unet_name, vae_name

DTYPES = ("float32", "bfloat16", "float16")


def parser(doc: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """Flags of every benchmark; without a number of repeats, of one that runs once. Memory and the GPU's arithmetic are
    as the scripts have them."""
    keep_freed_memory()
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, help=f"measured rounds after a first one ({repeats})")
    made.add_argument("--device", type=device_named, default="auto")
    made.add_argument("--out", type=Path, help="folder for table.md and results.json")
    return made


def device_named(name: str) -> torch.device:
    """`pick_device`, whose message argparse prints."""
    try:
        return pick_device(name)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def in_turn(
    contenders: dict[str, Callable[[], object]], repeats: int, device: str | torch.device = "cpu"
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each, run one after the other, round by round, and what the last round gave.

    The first round warms up and does not count, unless it is the only one.
    """
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds, outputs = {name: [] for name in contenders}, {}
    for _ in range(repeats + 1):
        for name, function in contenders.items():
            sync()
            started = time.perf_counter()
            outputs[name] = function()
            sync()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}, outputs


def difference(a: Tensor, b: Tensor) -> float:
    """Relative, in the 2-norm."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def report(head: Sequence[str], rows: Sequence[Sequence[str]], figures: dict, args: argparse.Namespace) -> None:
    """Print the table, and write it with its figures to --out."""
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    foot = f"`{command}`, {machine(args.device)}{threads}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}."
    text = f"{table(head, rows)}\n{foot}\n"
    print(f"\n{text}", end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "results.json", figures | {"foot": foot})
        write_text(args.out / "table.md", text)


def diffusers_unet(model: LatentDiffusion) -> nn.Module:
    """diffusers' UNet on the very same weight tensors."""
    from diffusers import UNet2DConditionModel

    cfg = model.cfg.unet
    widths = [cfg.model_channels * m for m in cfg.channel_mult]
    blocks = ["CrossAttn{}Block2D" if i in cfg.attention_levels else "{}Block2D" for i in range(len(widths))]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            in_channels=cfg.in_channels,
            block_out_channels=widths,
            layers_per_block=cfg.num_res_blocks,
            down_block_types=[b.format("Down") for b in blocks],
            up_block_types=[b.format("Up") for b in blocks[::-1]],
            cross_attention_dim=cfg.context_dim,
            attention_head_dim=[cfg.heads(w) for w in widths],
            use_linear_projection=cfg.linear_proj,
            norm_num_groups=cfg.norm_groups,
            sample_size=model.cfg.latent_shape[-1],
        )
    return same_weights(theirs, model.unet, lambda k: unet_name(k, cfg.num_res_blocks))


def diffusers_vae(model: LatentDiffusion) -> nn.Module:
    """diffusers' VAE on the very same weight tensors."""
    from diffusers import AutoencoderKL

    cfg = model.cfg.vae
    levels = len(cfg.ch_mult)
    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=[cfg.ch * m for m in cfg.ch_mult],
            layers_per_block=cfg.num_res_blocks,
            latent_channels=cfg.z_channels,
            sample_size=model.cfg.image_size,
            norm_num_groups=cfg.norm_groups,
            scaling_factor=cfg.scale_factor,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
        )
    return same_weights(theirs, model.vae, lambda k: vae_name(k, levels))


def same_weights(theirs: nn.Module, ours: nn.Module, name: Callable[[str], str]) -> nn.Module:
    like = theirs.state_dict()
    state = {name(k): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict({k: v.reshape(like[k].shape) for k, v in state.items()}, assign=True)
    return theirs.eval().requires_grad_(False)
