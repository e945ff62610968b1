"""The tensors of tests/cases.py, computed by diffusers and transformers: the reference that parity is measured against.

    python -m tests.oracle        writes golden.safetensors, in float64 arithmetic, rounded to float32

Imported by tests only where diffusers and transformers are installed; they are no requirement of the project.
"""

import diffusers
import torch
import transformers
from torch import Tensor

from diffender.utils.files import save_atomic
from diffender.weights.layouts import unet_name, vae_name
from tests.cases import CONFIGS, GOLDEN, GROUPS, GUIDANCE, POINTS, RUNS, build, normal, picture_and_mask

diffusers.utils.logging.set_verbosity_error()
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1
}  # fmt: skip
DDIM = SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False}


def copy(ours: torch.nn.Module, theirs: torch.nn.Module, name) -> None:
    state = {name(k): v for k, v in ours.state_dict().items()}
    like = theirs.state_dict()
    assert state.keys() == like.keys(), sorted(state.keys() ^ like.keys())
    theirs.load_state_dict({k: v.reshape(like[k].shape) for k, v in state.items()})
    theirs.requires_grad_(False).eval()


def unet(family: str, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
    cfg = CONFIGS[family].unet
    widths = [cfg.model_channels * m for m in cfg.channel_mult]
    blocks = ("CrossAttn",) * 3 + ("",)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=9,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=[f"{b}DownBlock2D" for b in blocks],
        up_block_types=[f"{b}UpBlock2D" for b in blocks[::-1]],
        cross_attention_dim=cfg.context_dim,
        attention_head_dim=[cfg.heads(w) for w in widths],
        use_linear_projection=cfg.linear_proj,
        sample_size=8,
    ).to(dtype)
    copy(build(family, dtype).unet, theirs, lambda k: unet_name(k, 2))
    return theirs


def vae(dtype: torch.dtype) -> diffusers.AutoencoderKL:
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).to(dtype)
    copy(build("sd15", dtype).vae, theirs, lambda k: vae_name(k, 4))
    return theirs


def theirs(group: str, dtype: torch.dtype) -> dict[str, Tensor]:
    kind, _, family = group.partition("/")
    return {"unet": theirs_unet, "text": theirs_text, "vae": theirs_vae, "sampler": theirs_sampler}[kind](family, dtype)


def theirs_unet(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    net, out = unet(family, dtype), {}
    for name, (t, size) in POINTS.items():
        z = normal(f"z {name}", 1, 4, *size, dtype=dtype).requires_grad_()
        context = normal(f"context {name}", 1, 77, 64, dtype=dtype).requires_grad_()
        x = torch.cat([z, normal(f"conditioning {name}", 1, 5, *size, dtype=dtype)], dim=1)
        eps = net(x, t, context).sample
        out[f"unet {name}"] = eps.detach()
        weights = normal(f"weights {name}", *eps.shape, dtype=dtype)
        grads = torch.autograd.grad((eps * weights).sum(), (z, context))
        out[f"gradient sample {name}"], out[f"gradient context {name}"] = grads
    grey = 0.18215 * vae(dtype).encode(torch.zeros(1, 3, 64, 64, dtype=dtype)).latent_dist.mean
    scheduler = diffusers.DDIMScheduler(**DDIM)
    z0, context = (normal("z0", 1, 4, 8, 8, dtype=dtype), normal("context x0", 1, 77, 64, dtype=dtype))
    z_t = scheduler.add_noise(z0, normal("noise x0", 1, 4, 8, 8, dtype=dtype), torch.tensor([481]))
    eps = net(torch.cat([z_t, torch.ones_like(z0[:, :1]), grey], dim=1), 481, context).sample
    scheduler.set_timesteps(50)
    out["unet one-step x0"] = scheduler.step(eps, 481, z_t).pred_original_sample
    return out


def theirs_text(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    cfg = CONFIGS[family].text
    net = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=cfg.width,
            intermediate_size=4 * cfg.width,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            hidden_act="quick_gelu" if family == "sd15" else "gelu",
        )
    ).to(dtype)
    prefix = "text_model." if any(k.startswith("text_model.") for k in net.state_dict()) else ""
    copy(build(family, dtype).text, net, lambda k: prefix + k)
    cat, empty = ([49406, 320, 1125, 539, 320, 2368, 49407], [49406, 49407])  # by the published tokenizers, as is
    pad = 49407 if family == "sd15" else 0  # the padding
    tokens = torch.tensor([row + [pad] * (77 - len(row)) for row in (cat, empty)])
    return {"text": net(tokens).last_hidden_state}


def theirs_vae(_family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    net, scale = vae(dtype), 0.18215
    x, mask = picture_and_mask(48, dtype)
    x = 2 * x - 1
    noise = normal("posterior", 1, 4, 6, 8, dtype=dtype)
    dist, masked = (net.encode(picture).latent_dist for picture in (x, x * (mask < 0.5)))
    decoded = net.decode(normal("latents", 1, 4, 6, 8, dtype=dtype)).sample
    return {
        "vae mean": dist.mean,
        "vae logvar": dist.logvar,
        "vae latents": scale * (dist.mean + dist.std * noise),
        "vae decode": (decoded + 1) / 2,
        "vae mask": torch.nn.functional.interpolate(mask, size=(6, 8)),
        "vae masked latents": scale * (masked.mean + masked.std * noise),
    }


def theirs_sampler(family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    net, autoencoder, out = unet(family, dtype), vae(dtype), {}
    x, mask = picture_and_mask(64, dtype)
    contexts = [normal(f"context {i}", 1, 77, 64, dtype=dtype) for i in range(2)]
    posterior, start = (normal(name, 1, 4, 8, 8, dtype=dtype) for name in ("posterior 64", "start"))
    masked = autoencoder.encode((2 * x - 1) * (mask < 0.5)).latent_dist
    z_masked = 0.18215 * (masked.mean + masked.std * posterior)
    small = torch.nn.functional.interpolate(mask, size=(8, 8))
    for name, (sampler, steps, eta, prediction) in RUNS.items():
        if sampler == "ddim":
            kind = "v_prediction" if prediction == "v" else prediction
            scheduler = diffusers.DDIMScheduler(**DDIM, prediction_type=kind)
        else:
            scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULE, final_sigmas_type="zero")
        scheduler.set_timesteps(steps)
        z_t = start
        noise = normal("steps", 1, steps, 4, 8, 8, dtype=dtype)
        for i, t in enumerate(scheduler.timesteps):
            inputs = torch.cat([z_t, small, z_masked], dim=1)
            eps, eps_empty = (net(inputs, t, context).sample for context in contexts)
            extra = {"eta": eta, "variance_noise": noise[:, i] if eta else None} if sampler == "ddim" else {}
            z_t = scheduler.step(eps_empty + GUIDANCE * (eps - eps_empty), t, z_t, **extra).prev_sample
        out[f"trajectory {name}"] = z_t
    out["trajectory inpaint"] = stock_pipeline(net, autoencoder, x, mask, contexts, posterior, start)
    return out


def stock_pipeline(net, autoencoder, x, mask, contexts, posterior, start) -> Tensor:
    """StableDiffusionInpaintPipeline itself; its one random draw, the posterior of the masked image, is handed in."""
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=autoencoder,
        text_encoder=None,
        tokenizer=None,
        unet=net,
        scheduler=diffusers.DDIMScheduler(**DDIM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    sample, gaussian.sample = (gaussian.sample, lambda self, generator=None: self.mean + self.std * posterior)
    try:
        return pipeline(
            prompt_embeds=contexts[0],
            negative_prompt_embeds=contexts[1],
            image=x,
            mask_image=mask,
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=GUIDANCE,
            latents=start,
            output_type="pt",
        ).images
    finally:
        gaussian.sample = sample


def main() -> None:
    tensors = {
        f"{group} {name}": value.float() for group in GROUPS for name, value in theirs(group, torch.float64).items()
    }
    versions = {module.__name__: module.__version__ for module in (diffusers, transformers, torch)}
    save_atomic(tensors, GOLDEN, versions)
    print(f"{len(tensors)} tensors, {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
