"""The whole defence of one image, ours and the authors' algorithm as one writes it with diffusers.

    python benchmarks/defense.py --dtype bfloat16             sd15-inpainting with random weights, 512 px: minutes

The authors' algorithm: for each of m draws the image is encoded and noised anew, and each of the two prompts predicts
x0 with its own guidance, four evaluations of the UNet; the mask goes to the stock inpainting pipeline with DDIM. Both
take the same weights and the same noise, so masks and images can be compared. `fast` is ours with DPM-Solver++ of
half as many steps, and how far its image is from DDIM's inside the mask, beside how far DDIM is from itself under
other noise. UNet in --dtype, VAE in float32, as the defence runs it. Needs diffusers.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from common import DTYPES, diffusers_unet, diffusers_vae, in_turn, parser, report
from torch import Tensor, nn

from diffender.classifiers.dataset import load_image, sample_items
from diffender.classifiers.imagenet import load_classifier
from diffender.config import DIFFenderConfig
from diffender.localize import refine_mask, standardize
from diffender.noise import Noise
from diffender.ops import resize
from diffender.pipeline import DIFFender
from diffender.prompts import manual_contexts
from diffender.stable_diffusion.schedule import noise_timestep
from diffender.weights.loading import load_model

PAPER = DIFFenderConfig(composite=False)  # m = 3, theta 2, DDIM, 20 steps, guidance 7.5; all that the VAE decodes


def stock_pipeline(unet: nn.Module, vae: nn.Module, prediction: str):  # noqa: ANN201
    """diffusers' inpainting pipeline around these networks, with the DDIM of the published models."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type={"v": "v_prediction"}.get(prediction, "epsilon"),
    )
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def authors(defense: DIFFender, unet: nn.Module, vae: nn.Module) -> Callable[[Tensor, Noise], tuple[Tensor, Tensor]]:
    """(image, mask) of the authors' algorithm, an image at a time."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Gaussian

    cfg, scale, texts = defense.cfg, vae.config.scaling_factor, defense.contexts
    pipeline = stock_pipeline(unet, vae, defense.model.cfg.unet.prediction)
    scheduler = pipeline.scheduler
    t = noise_timestep(cfg.noise_ratio)

    def guided(z_t: Tensor, context: Tensor) -> Tensor:
        inputs = torch.cat([z_t, defense.blank], dim=1).repeat(2, 1, 1, 1)
        eps, eps_empty = unet(*half(unet, inputs, t, torch.cat([context, texts.empty]))).sample.float().chunk(2)
        return eps_empty + cfg.guidance * (eps - eps_empty)

    def run(x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        big = resize(x, defense.size)
        total = 0
        scheduler.set_timesteps(50)
        for draw in noise.draws[0]:
            dist = vae.encode(2 * big - 1).latent_dist
            z0 = scale * (dist.mean + dist.std * noise.image)
            z_t = scheduler.add_noise(z0, draw[None], torch.tensor([t]))
            a, b = (scheduler.step(guided(z_t, c), t, z_t).pred_original_sample for c in (texts.locate, texts.empty))
            total = total + (a - b).abs()
        heatmap = (total / len(noise.draws[0])).mean(dim=1, keepdim=True)
        mask = refine_mask(standardize(heatmap), defense.size, cfg)
        sample = Gaussian.sample  # the pipeline's one random draw: the posterior of the masked image
        Gaussian.sample = lambda self, generator=None: self.mean + self.std * noise.masked
        try:
            image = pipeline(
                prompt_embeds=texts.restore,
                negative_prompt_embeds=texts.empty,
                image=big,
                mask_image=mask,
                height=defense.size[0],
                width=defense.size[1],
                num_inference_steps=cfg.steps,
                guidance_scale=cfg.guidance,
                latents=noise.start,
                output_type="pt",
            ).images
        finally:
            Gaussian.sample = sample
        return resize(image, x.shape[-2:]), mask

    return run


def half(unet: nn.Module, x: Tensor, t: int, context: Tensor) -> tuple[Tensor, int, Tensor]:
    return x.to(unet.dtype), t, context.to(unet.dtype)


def mixed(unet: nn.Module) -> nn.Module:
    """The UNet in its own dtype inside a pipeline whose latents are float32."""

    def inputs(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {k: v.to(unet.dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        return (args[0].to(unet.dtype), *args[1:]), kwargs

    unet.register_forward_pre_hook(inputs, with_kwargs=True)
    unet.register_forward_hook(lambda _m, _args, out: (out[0].float(),) if isinstance(out, tuple) else out)
    return unet


@torch.no_grad()
def main() -> None:
    flags = parser(__doc__, repeats=1)
    flags.add_argument("--model", choices=("sd15-inpainting", "sd2-inpainting"), default="sd15-inpainting")
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="of the UNets")
    flags.add_argument("--steps", type=int, default=PAPER.steps)
    args = flags.parse_args()
    model = load_model(args.model, "random", getattr(torch, args.dtype)).to(args.device)
    cfg = replace(PAPER, steps=args.steps)
    defense = DIFFender(model, manual_contexts(model), cfg)
    fast = DIFFender(model, defense.contexts, replace(cfg, sampler="dpmpp", steps=args.steps // 2))
    photo = replace(load_classifier("efficientnet_lite0").cfg, size=model.cfg.image_size, resize=model.cfg.image_size)
    x = load_image(sample_items()[0].path, photo)[None].to(args.device)
    noise = defense.sample_noise(["photograph"], 0, "benchmark")
    contenders = {
        "authors, diffusers": authors(defense, mixed(diffusers_unet(model)), diffusers_vae(model)),
        "ours": lambda x, noise: defense(x, noise)[:2],
        "fast": lambda x, noise: fast(x, noise)[:2],
    }
    runs = {name: lambda f=f: f(x, noise) for name, f in contenders.items()}
    seconds, outputs = in_turn(runs, args.repeats, args.device)
    (theirs, their_mask), (image, mask), (quick, _) = outputs.values()
    again = defense.restore(x, mask, defense.sample_noise(["photograph"], 1, "benchmark"))

    def apart(a: Tensor, b: Tensor) -> float:
        """Mean |a - b| inside the mask."""
        return (((a.clamp(0, 1) - b.clamp(0, 1)).abs() * mask).sum() / (3 * mask.sum().clamp_min(1))).item()

    flips = (mask != their_mask).float().mean().item()
    figures = {
        "seconds": seconds,
        "mask pixels that differ": flips,
        "masked": mask.mean().item(),
        "apart": {"authors": apart(image, theirs), "fast": apart(image, quick), "other noise": apart(image, again)},
    }
    base = seconds["authors, diffusers"]
    off = {"authors, diffusers": figures["apart"]["authors"], "fast": figures["apart"]["fast"]}
    rows = [(n, f"{s:.2f}", f"**{s / base:.2f}**", f"{off[n]:.1e}" if n in off else "") for n, s in seconds.items()]
    rows.append(("ours, other noise", "", "", f"{figures['apart']['other noise']:.1e}"))
    head = (f"{args.model}, {args.dtype}, m {cfg.draws}, T {cfg.steps}", "seconds", "ratio", "inside the mask, to ours")
    report(head, rows, figures, args)
    print(f"masks differ in {100 * flips:.2g} % of the pixels; {100 * figures['masked']:.1f} % are masked")


if __name__ == "__main__":
    main()
