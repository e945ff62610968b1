"""Train the embedded diffusion model (`--model tiny`) on a folder of captioned photographs.

    python -m diffender.pretrain vae  --data PHOTOS --out runs/pretrain --steps 4000
    python -m diffender.pretrain unet --data PHOTOS --out runs/pretrain --steps 4000

Each stage resumes from its checkpoint in --out and leaves `vae.safetensors` (last weights) or `tiny.safetensors`
(averaged weights) there, with a picture and a log of its losses. `unet` needs the VAE of the
first stage; it encodes a fixed number of augmented pictures once, since encoding costs more than training on them.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from diffender.cli import run
from diffender.corpus import Photos, load_photos, random_crop, training_sample
from diffender.diffusion import PRESETS, LatentDiffusion
from diffender.errors import InputError
from diffender.files import read_header, save_atomic
from diffender.losses import feature_distance
from diffender.models.classifiers import load_classifier
from diffender.models.unet import ResBlock, SpatialTransformer
from diffender.models.vae import AutoencoderKL, Posterior
from diffender.pipeline import DIFFender, DIFFenderConfig
from diffender.prompts import manual_contexts
from diffender.restore import composite
from diffender.schedule import TRAIN_STEPS, q_sample
from diffender.trainer import Trainer, plot_losses
from diffender.weights import save_model


def train_vae(args: argparse.Namespace) -> None:
    """L1, coarse colour, distance of EfficientNet-Lite0 features, and a light KL term, on random crops."""
    photos = load_photos(args.data, short_side=256)
    classifier = load_classifier("efficientnet_lite0")
    net = classifier.net  # fed crops at their own size; Classifier.forward would resize them
    vae = AutoencoderKL(replace(PRESETS["tiny"].vae, scale_factor=1.0)).to(args.device)
    trainer = Trainer("vae", vae, args)
    for g in trainer.steps():
        picks = torch.randint(0, len(photos.images), (args.batch,), generator=g)
        scale = (0.65 * args.crop / 256, 1.15 * args.crop / 256)  # the grain of a whole picture at 224 px
        x = torch.stack([random_crop(photos.images[i], args.crop, scale, g) for i in picks]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = vae.posterior(x)
            noise = torch.randn(posterior.mean.shape, generator=g).to(args.device)
            recon = vae.decode(posterior.sample(noise)).float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        l1 = (recon - x).abs().mean()
        # Squared and coarse: l1 alone sits where every colour is its median, grey, and texture takes all the channels.
        difference = F.avg_pool2d(recon - x, 4)
        chroma = (difference - difference.mean(dim=1, keepdim=True)).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        perceptual = feature_distance(early(net, classifier, recon), early(net, classifier, x))
        loss = l1 + 20 * chroma + 0.1 * perceptual + 3e-4 * kl
        trainer.update(loss, l1=l1, chroma=chroma, perceptual=perceptual, kl=kl)
    vae.requires_grad_(False)  # its last weights: late on it changes too much for an average
    some = center_crops(photos, range(0, len(photos.images), 41))
    z = torch.cat([vae.encode(x) for x in some.split(8)])
    recon = torch.cat([vae.decode(y) for y in z.split(8)]).clamp(0, 1)
    psnr = -10 * (recon - some).square().mean(dim=(1, 2, 3)).log10()
    print(f"latents: mean {z.mean():.3f}, std {z.std():.3f}; {psnr.mean():.2f} dB on {len(some)} photographs")
    save_image(torch.cat([some[:8], recon[:8]]), args.out / "vae.png", nrow=8)
    plot_losses(trainer.log, ("l1", "perceptual"))
    header = {"scale_factor": 1 / z.std().item(), "steps": trainer.step, "batch": args.batch, "crop": args.crop}
    header |= {"seconds": round(trainer.seconds), "psnr": psnr.mean().item()}
    save_atomic(vae.state_dict(), args.out / "vae.safetensors", header)


def early(net: nn.Module, classifier: nn.Module, x: Tensor) -> list[Tensor]:
    """The classifier's first feature maps, where texture and edges live."""
    h = net.bn1(net.conv_stem((x - classifier.mean) / classifier.std))
    maps = []
    for stage in net.blocks[:4]:
        h = stage(h)
        maps.append(h)
    return maps


def center_crops(photos: Photos, indices: range, size: int = 224) -> Tensor:
    crops = []
    for i in indices:
        image = photos.images[i]
        top, left = ((n - size) // 2 for n in image.shape[1:])
        crops.append(image[:, top : top + size, left : left + size].float() / 255)
    return torch.stack(crops)


def encode_samples(args: argparse.Namespace, model: LatentDiffusion) -> dict[str, Tensor]:
    """Augmented pictures as posteriors of picture and masked picture, with mask and tokens; kept in --out."""
    path = args.out / "samples.safetensors"
    if path.is_file():
        return load_file(path)
    photos = load_photos(args.data, short_side=256)
    size = model.cfg.image_size
    parts: list[dict[str, Tensor]] = []
    for start in tqdm(range(0, args.samples, 16), desc="encoding samples", mininterval=5):
        g = Generator().manual_seed(args.seed * 10_000_000 + 5_000_000 + start)
        batch = [training_sample(photos, i % len(photos.images), size, g) for i in range(start, start + 16)]
        x = torch.stack([s.image for s in batch]).to(args.device)
        mask = torch.stack([s.mask for s in batch]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            image = torch.cat(model.vae.posterior(x), dim=1)
            masked = torch.cat(model.vae.posterior(x * (1 - mask) + 0.5 * mask), dim=1)
        part = {"image": image.half(), "masked": masked.half()}
        part["mask"] = F.interpolate(mask, image.shape[-2:], mode="nearest").bool()
        part["tokens"] = model.text.tokenize([s.caption for s in batch])
        parts.append({k: v.cpu() for k, v in part.items()})
    samples = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    save_file(samples, path)
    return samples


def sample_latents(posterior: Tensor, scale_factor: float, g: Generator) -> Tensor:
    mean, logvar = posterior.float().chunk(2, dim=1)
    return scale_factor * Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=g))


def initialize(model: LatentDiffusion) -> None:
    """Residual branches of the UNet start at zero (Ho et al. 2020), embeddings as small as CLIP's."""
    nn.init.normal_(model.text.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text.embeddings.position_embedding.weight, std=0.01)
    for module in model.unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.out_layers[3].weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(model.unet.out[2].weight)


def train_unet(args: argparse.Namespace) -> None:
    """eps-prediction, weighted after min-SNR (Hang et al. 2023); UNet and text tower together, the VAE frozen."""
    vae_path = args.out / "vae.safetensors"
    if not vae_path.is_file():
        raise InputError(f"no {vae_path}: run the vae stage first")
    vae_card = read_header(vae_path)
    scale_factor = vae_card["scale_factor"]
    preset = PRESETS["tiny"]
    cfg = replace(preset, vae=replace(preset.vae, scale_factor=scale_factor))
    model = LatentDiffusion(cfg).to(args.device)
    initialize(model)
    model.vae.load_state_dict(load_file(vae_path))
    model.vae.requires_grad_(False)
    samples = encode_samples(args, model)
    empty = model.text.tokenize([""])
    blank = model.blank_conditioning((cfg.image_size,) * 2)
    trainer = Trainer("unet", model, args)
    for g in trainer.steps():
        i = torch.randint(0, len(samples["mask"]), (args.batch,), generator=g)
        z0 = sample_latents(samples["image"][i], scale_factor, g)
        z_masked = sample_latents(samples["masked"][i], scale_factor, g)
        conditioning = torch.cat([samples["mask"][i].float(), z_masked], dim=1).to(args.device)
        dropped = torch.rand(args.batch, 1, generator=g) < 0.15
        tokens = torch.where(dropped, empty, samples["tokens"][i]).to(args.device)
        t = torch.randint(0, TRAIN_STEPS, (args.batch,), generator=g).to(args.device)
        focus = round(args.focus * args.batch)
        conditioning[:focus] = blank
        t[:focus] = 100 + t[:focus] % 400  # noise ratios of about 0.1 to 0.5
        noise = torch.randn(z0.shape, generator=g).to(args.device)
        a_t = model.alphas_cumprod[t][:, None, None, None]
        z_t = q_sample(z0.to(args.device), noise, a_t)
        with torch.autocast(args.device, torch.bfloat16):
            eps = model(model.unet, z_t, t, model.text(model.text.embed(tokens)), conditioning).float()
        snr = a_t / (1 - a_t)
        error = (eps - noise).square().mean(dim=(1, 2, 3), keepdim=True)
        # Below snr 1 more than min-SNR's 1: there inpainting takes its colours from around the hole, or never.
        weight = snr.clamp(max=5) / snr * snr.clamp(max=1) ** -0.5
        trainer.update((error * weight).mean(), mse=error.mean())
    model.load_state_dict(trainer.ema.module.state_dict())
    losses = [json.loads(line)["mse"] for line in trainer.log.read_text().splitlines()[-10:]]
    card = {
        "steps": trainer.step,
        "batch": args.batch,
        "seconds": round(trainer.seconds),
        "samples": len(samples["mask"]),
    }
    card |= {"mse": sum(losses) / len(losses), "device": args.device, "vae": vae_card}
    save_model(model, args.out / "tiny.safetensors", {"training": card})
    plot_losses(trainer.log, ("loss", "mse"))
    show_inpainting(args, model.requires_grad_(False))
    print(f"saved {args.out / 'tiny.safetensors'}: {card}")


def show_inpainting(args: argparse.Namespace, model: LatentDiffusion) -> None:
    """Eight photographs, with a grey square, and inpainted from the prompt "clean"."""
    photos = load_photos(args.data, short_side=256)
    x = center_crops(photos, range(0, len(photos.images), len(photos.images) // 8))[:8]
    mask = torch.zeros(len(x), 1, *x.shape[-2:])
    mask[..., 80:144, 80:144] = 1
    defense = DIFFender(model.cpu(), manual_contexts(model), DIFFenderConfig(steps=20, guidance=3.0))
    noise = defense.sample_noise([str(i) for i in range(len(x))], args.seed, "inpainting")
    restored = composite(x, defense.restore(x, mask, noise), mask)
    save_image(torch.cat([x, x * (1 - mask) + 0.5 * mask, restored]), args.out / "unet.png", nrow=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "unet"])
    parser.add_argument("--data", type=Path, required=True, help="folder with photographs and captions.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps in all, those done before included")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=96, help="side of the VAE's training crops, in pixels")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights, a step")
    parser.add_argument("--decay", action=argparse.BooleanOptionalAction, default=True, help="lower --lr at the end")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--focus", type=float, default=0.0, help="share of a unet batch trained as localisation uses it"
    )
    parser.add_argument("--samples", type=int, default=10_400, help="augmented pictures that the unet stage encodes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "unet": train_unet}[args.stage](args)


if __name__ == "__main__":
    run(main)
