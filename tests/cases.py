"""What parity is measured on: reduced models of both families with weights that hide nothing, and their outputs.

`ours(group, dtype)` computes a group's tensors with this package; tests/oracle.py computes the same with diffusers and
transformers, and writes them to golden.safetensors for machines without these.

The weights are random, but their scales are chosen: what enters a network and what a residual branch adds is small, so
that the input of every norm is about as small as the square root of its epsilon, and a wrong one shows.
"""

import atexit
import re
import shutil
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from diffender.config import DIFFenderConfig
from diffender.noise import Noise, generator
from diffender.prompts import Contexts
from diffender.restore import inpaint
from diffender.stable_diffusion.model import MODELS, LatentDiffusion, ModelConfig
from diffender.stable_diffusion.samplers import SAMPLERS
from diffender.stable_diffusion.schedule import ALPHAS_CUMPROD, predict_x0, q_sample
from diffender.stable_diffusion.text import TextConfig
from diffender.stable_diffusion.unet import UNetConfig
from diffender.stable_diffusion.vae import VAEConfig
from diffender.utils.files import save_atomic
from diffender.weights.layouts import PREFIXES
from diffender.weights.loading import fill_random, load_model, save_model

GOLDEN = Path(__file__).with_name("golden.safetensors")
CONFIGS = {
    "sd15": ModelConfig(
        UNetConfig(model_channels=32, context_dim=64, num_heads=4),
        VAEConfig(ch=32),
        TextConfig(width=64, heads=4, layers=2),
        image_size=64,
    ),
    "sd2": ModelConfig(
        UNetConfig(model_channels=32, context_dim=64, num_heads=None, head_dim=16, linear_proj=True),
        VAEConfig(ch=32),
        TextConfig(width=64, heads=4, layers=2, quick_gelu=False, pad_token=0),
        image_size=64,
    ),
}
GROUPS = ("unet/sd15", "unet/sd2", "text/sd15", "text/sd2", "vae", "sampler/sd15", "sampler/sd2")
# Relative L2 error allowed: in float32 by what is compared, in float64 throughout.
LIMITS = {"unet": 1e-5, "vae": 1e-5, "text": 1e-5, "gradient": 3e-5, "trajectory": 1e-4}
FLOAT64_LIMIT = 1e-6
BFLOAT16_LIMIT = 0.07  # of the UNet, whose products have 8 bits; diffusers in bfloat16 is off by 0.02 to 0.05

TEXTS = ["a photo of a cat", ""]
POINTS = {"t1": (1, (8, 16)), "t481": (481, (16, 8)), "t981": (981, (16, 16))}  # timestep, latent size
RUNS = {  # sampler, steps, eta, prediction
    "ddim": ("ddim", 6, 0.0, "epsilon"),
    "ddim_eta1": ("ddim", 6, 1.0, "epsilon"),
    "ddim_v": ("ddim", 4, 0.0, "v"),
    "dpmpp": ("dpmpp", 6, 0.0, "epsilon"),
}
GUIDANCE = 7.5

SCALES = (
    (r"input_blocks\.0\.0|.*(conv_in|out_layers\.3|proj_in|proj_out|conv2|to_out\.0|out_proj|_embedding)", 0.03),
    (r".*fc2", 0.1),
    (r".*(net\.0\.proj|fc1)", 2.0),  # what enters a GELU: its two forms differ most beyond 1
)


def randomize(module: nn.Module, seed: str) -> None:
    """Weights from their names alone."""
    for name, p in module.named_parameters():
        r = torch.randn(p.shape, generator=generator("parity", seed, name))
        layer = name.rpartition(".")[0]
        scale = next((s for pattern, s in SCALES if re.fullmatch(pattern, layer)), 1.0)
        if "_embedding" in name:
            value = scale * r
        elif p.ndim > 1:
            value = scale * r / p[0].numel() ** 0.5
        elif "norm" in name or re.search(r"(layers|out)\.0\.|layer_norm", name):
            value = 0.1 * r + name.endswith("weight")
        else:
            value = 0.1 * scale * r
        p.data.copy_(value)


def normal(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator("parity", name)).to(dtype)


@cache
def checkpoint(family: str) -> Path:
    """The family's model as a file: float32, in the names of a single file."""
    model = LatentDiffusion(CONFIGS[family])
    tensors = {}
    for part, prefix in PREFIXES.items():
        randomize(getattr(model, part), f"{family if part != 'vae' else ''}/{part}")
        tensors |= {prefix + k: v for k, v in getattr(model, part).state_dict().items()}
    path = Path(mkdtemp(prefix="diffender-parity-")) / f"{family}.safetensors"
    save_atomic(tensors, path, {"config": asdict(model.cfg)})
    atexit.register(shutil.rmtree, path.parent)
    return path


@cache
def loaded(family: str) -> LatentDiffusion:
    return load_model("auto", checkpoint(family))


def build(family: str, dtype: torch.dtype) -> LatentDiffusion:
    """The model as the product runs it, through its loading function: frozen, in the layout that it chooses.

    In bfloat16 the UNet alone, as on a GPU; in float64 everything, which no command does.
    """
    model = load_model("auto", checkpoint(family), dtype) if dtype == torch.bfloat16 else deepcopy(loaded(family))
    assert any(not p.is_contiguous() for p in model.unet.parameters()), "channels last"
    return model.double() if dtype == torch.float64 else model


def picture_and_mask(height: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An image (1, 3, height, 64) in [0, 1], and a mask with edges inside latent cells: nearest must be nearest."""
    x = torch.rand(1, 3, height, 64, generator=generator("parity", "picture", height)).to(dtype)
    mask = torch.zeros(1, 1, height, 64, dtype=dtype)
    mask[..., 5:30, 8:44] = 1
    mask[..., 40:43, 3:60] = 1
    return x, mask


def guided(model: LatentDiffusion, z_t: Tensor, t: int, contexts: list[Tensor], conditioning: Tensor) -> Tensor:
    eps, eps_empty = (model.eps(z_t, t, context, conditioning) for context in contexts)
    return eps_empty + GUIDANCE * (eps - eps_empty)


def ours(group: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """In bfloat16 that is the UNet's dtype, and what enters and leaves is float32."""
    kind, _, family = group.partition("/")
    model = build(family or "sd15", dtype)
    dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    return {"unet": ours_unet, "text": ours_text, "vae": ours_vae, "sampler": ours_sampler}[kind](model, dtype)


def ours_unet(model: LatentDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    out = {}
    for name, (t, size) in POINTS.items():
        z = normal(f"z {name}", 1, 4, *size, dtype=dtype).requires_grad_()
        context = normal(f"context {name}", 1, 77, 64, dtype=dtype).requires_grad_()
        conditioning = normal(f"conditioning {name}", 1, 5, *size, dtype=dtype)
        eps = model.eps(z, t, context, conditioning)
        out[f"unet {name}"] = eps.detach()
        weights = normal(f"weights {name}", *eps.shape, dtype=dtype)
        grads = torch.autograd.grad((eps * weights).sum(), (z, context))
        out[f"gradient sample {name}"], out[f"gradient context {name}"] = grads
    z0, context = (normal("z0", 1, 4, 8, 8, dtype=dtype), normal("context x0", 1, 77, 64, dtype=dtype))
    a_t = ALPHAS_CUMPROD[481]
    z_t = q_sample(z0, normal("noise x0", 1, 4, 8, 8, dtype=dtype), a_t)
    eps = model.eps_from_text(z_t, 481, context, model.blank_conditioning((64, 64)))
    out["unet one-step x0"] = predict_x0(z_t, eps, a_t)
    return out


def ours_text(model: LatentDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"text": model.encode_text(TEXTS)}


def ours_vae(model: LatentDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    x, mask = picture_and_mask(48, dtype)
    noise = normal("posterior", 1, 4, 6, 8, dtype=dtype)
    posterior = model.vae.posterior(x)
    conditioning = model.masked_conditioning(x, mask, noise)
    return {
        "vae mean": posterior.mean,
        "vae logvar": posterior.logvar,
        "vae latents": model.encode(x, noise),
        "vae decode": model.decode(0.18215 * normal("latents", 1, 4, 6, 8, dtype=dtype)),
        "vae mask": conditioning[:, :1],
        "vae masked latents": conditioning[:, 1:],
    }


def ours_sampler(model: LatentDiffusion, dtype: torch.dtype) -> dict[str, Tensor]:
    x, mask = picture_and_mask(64, dtype)
    contexts = [normal(f"context {i}", 1, 77, 64, dtype=dtype) for i in range(2)]
    posterior, start = (normal(name, 1, 4, 8, 8, dtype=dtype) for name in ("posterior 64", "start"))
    conditioning = model.masked_conditioning(x, mask, posterior)
    out = {}
    for name, (sampler, steps, eta, prediction) in RUNS.items():
        method = SAMPLERS[sampler]
        model.unet.cfg = replace(model.cfg.unet, prediction=prediction)
        grid = method.grid(steps)
        noise = normal("steps", 1, steps, 4, 8, 8, dtype=dtype)
        eps = partial(guided, model, contexts=contexts, conditioning=conditioning)
        out[f"trajectory {name}"] = method.run(eps, start, grid, eta, noise)
    model.unet.cfg = model.cfg.unet
    # Clamped, as the stock pipeline returns it.
    noise = Noise(posterior, start, start, posterior, start, start[:, None, :0])
    cfg = DIFFenderConfig(steps=4, guidance=GUIDANCE)
    out["trajectory inpaint"] = inpaint(model, x, mask, Contexts(None, *contexts), noise, cfg).clamp(0, 1)
    return out


def small_model_file(folder: Path, header: dict[str, Any] | None = None) -> Path:
    """A whole model in a small file of ours, with its configuration and checksum."""
    tiny = MODELS["tiny"]
    cfg = replace(
        tiny,
        unet=replace(tiny.unet, model_channels=8, norm_groups=4, context_dim=4, num_heads=2),
        vae=replace(tiny.vae, ch=4, norm_groups=4),
        text=replace(tiny.text, width=4, layers=1),
    )
    model = LatentDiffusion(cfg)
    fill_random(model, torch.Generator().manual_seed(0))
    path = folder / "small.safetensors"
    save_model(model, path, header or {})
    return path
