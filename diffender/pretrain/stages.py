"""The stages of training the embedded diffusion model: VAE, decoder, UNet."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

from diffender.classifiers.imagenet import CLASSIFIERS, Classifier, load_classifier
from diffender.config import EMBEDDED, DIFFenderConfig
from diffender.losses import feature_distance
from diffender.noise import from_seed
from diffender.pipeline import DIFFender
from diffender.pretrain.corpus import Crops, PackedTokens, Photos, batches, load_photos, pack
from diffender.pretrain.latents import reused_batches, sample_latents, stored_batches
from diffender.pretrain.locating import Asked, location_loss
from diffender.pretrain.options import Recipe
from diffender.pretrain.trainer import Trainer, plot_losses
from diffender.prompts import MANUAL, manual_contexts
from diffender.stable_diffusion.model import MODELS, LatentDiffusion, ModelConfig
from diffender.stable_diffusion.schedule import TRAIN_STEPS, q_sample
from diffender.stable_diffusion.text import tokenizer
from diffender.stable_diffusion.unet import ResBlock, SpatialTransformer
from diffender.stable_diffusion.vae import AutoencoderKL
from diffender.utils.errors import InputError
from diffender.utils.files import load_tensors, new_file, read_header, save_atomic
from diffender.utils.images import save_png
from diffender.weights.loading import load_model, save_model

EARLY = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3")  # layers of the classifier, for a loss
LAYERS = "classifier."  # before the names of those layers in a packed file
FOCUS = 0.35  # share of a unet batch with everything masked and noise ratios of 0.1 to 0.5, as in localisation
PERCEPTUAL = {"vae": 0.1, "decoder": 0.3}  # weight of that loss; latents first, then what a classifier sees of them


def train_vae(recipe: Recipe) -> None:
    """L1, coarse colour, distance of EfficientNet-Lite0 features, and a light KL term, on random crops."""
    path = recipe.out / "vae.safetensors"
    vae = from_seed(recipe.seed, lambda: AutoencoderKL(replace(architecture(recipe.init).vae, scale_factor=1.0)))
    vae.to(recipe.device)
    if recipe.stage == "decoder":
        state, earlier = first_stage(recipe)
        vae.load_state_dict(state)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    photos = load_photos(recipe.data, short_side=256)
    classifier = early_layers(recipe.data).to(recipe.device)
    trainer = Trainer(vae, recipe)
    scale = (0.65 * recipe.crop / 256, 1.15 * recipe.crop / 256)  # the grain of a whole image at 224 px
    crops = batches(Crops(photos, recipe.crop, scale, recipe.seed), trainer.left(), recipe.batch, recipe)
    for g, x in zip(trainer.steps(), crops, strict=False):
        x = x.to(recipe.device, non_blocking=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = vae.posterior(x)
            noise = torch.randn(posterior.mean.shape, generator=g, device=recipe.device)
            recon = vae.decode(posterior.sample(noise)).float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        l1 = (recon - x).abs().mean()
        # Squared and coarse: with l1 alone colours settle at their median, grey, and texture takes all the channels.
        difference = F.avg_pool2d(recon - x, 4)
        chroma = (difference - difference.mean(dim=1, keepdim=True)).square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        perceptual = feature_distance(early(classifier, recon), early(classifier, x))
        mse = (recon - x).square().mean()
        loss = l1 + 4 * mse + 20 * chroma + PERCEPTUAL[recipe.stage] * perceptual + 3e-4 * kl
        trainer.update(loss, l1=l1, mse=mse, chroma=chroma, perceptual=perceptual, kl=kl)
    if recipe.stage == "decoder":
        vae.load_state_dict(trainer.ema.module.state_dict())  # on small batches its colours wander
    vae.requires_grad_(False)  # of the vae stage its last weights: it changes too much for an average
    some = center_crops(photos, range(0, len(photos.images), 41)).to(recipe.device)
    z = torch.cat([vae.encode(x) for x in some.split(8)])
    recon = torch.cat([vae.decode(y) for y in z.split(8)]).clamp(0, 1)
    psnr = -10 * (recon - some).square().mean(dim=(1, 2, 3)).log10()
    print(f"latents: mean {z.mean():.3f}, std {z.std():.3f}; {psnr.mean():.2f} dB on {len(some)} photographs")
    save_png(make_grid(torch.cat([some[:8], recon[:8]]), 8), recipe.out / "vae.png")
    plot_losses(trainer.log, ("l1", "perceptual"))
    card = {"steps": trainer.step, "batch": recipe.batch, "crop": recipe.crop, "seconds": round(trainer.seconds)}
    if recipe.stage == "decoder":
        header = earlier | {"decoder": card}
    else:
        header = card | {"scale_factor": 1 / z.std().item()}
    save_atomic(vae.state_dict(), path, header | {"psnr": psnr.mean().item()})


def architecture(init: Path | None) -> ModelConfig:
    """Of the model in this file, else of the embedded one."""
    return load_model("auto", init).cfg if init else MODELS["tiny"]


def early_layers(data: Path) -> Classifier:
    """EfficientNet-Lite0. A packed file has its first layers alone: the rest then has random weights."""
    stored = load_tensors(data) if data.is_file() else {}
    state = {k.removeprefix(LAYERS): v.float() for k, v in stored.items() if k.startswith(LAYERS)}
    if not state:
        return load_classifier("efficientnet_lite0")
    cfg = CLASSIFIERS["efficientnet_lite0"]
    net = timm.create_model(cfg.tag)
    net.load_state_dict(state, strict=False)
    return Classifier(net, cfg)


def pack_all(data: Path, out: Path) -> None:
    """Photographs, tokens and the classifier's first layers in the file `out`."""
    out = new_file(out)
    net = load_classifier("efficientnet_lite0").net
    layers = {k: v for k, v in net.state_dict().items() if k.startswith(EARLY) and v.is_floating_point()}
    pack(data, out, {LAYERS + k: v for k, v in layers.items()}, tokenizer().encode)


def first_stage(recipe: Recipe) -> tuple[dict[str, Tensor], dict]:
    """Weights of the trained VAE, from --out or else from --init, and how they came about."""
    path = recipe.out / "vae.safetensors"
    first = load_model("tiny", recipe.init).vae.state_dict() if recipe.init else None
    if path.is_file():
        trained = load_tensors(path)
        encoding = [name for name in first or {} if name.startswith(("encoder", "quant_conv"))]
        if not all(name in trained and torch.equal(trained[name], first[name]) for name in encoding):
            raise InputError(
                f"{path} has other latents than {recipe.init}, on which the UNet was trained; give another --out, or "
                "leave out --init"
            )
        return trained, read_header(path)
    if first:
        return first, read_header(recipe.init)["training"]["vae"]
    raise InputError(f"no {path}: run the vae stage first, or start from a whole model with --init")


def early(classifier: Classifier, x: Tensor) -> list[Tensor]:
    """The classifier's first feature maps, where texture and edges live, of images at their own size: its `forward`
    would resize them."""
    net = classifier.net
    h = net.bn1(net.conv_stem((x - classifier.mean) / classifier.std))
    maps = []
    for stage in net.blocks[:4]:
        h = stage(h)
        maps.append(h)
    return maps


def center_crops(photos: Photos, indices: range) -> Tensor:
    """The middle 224 x 224 pixels of these photographs, (B, 3, 224, 224) in [0, 1]."""
    crops, size = [], 224
    for i in indices:
        image = photos.images[i]
        top, left = ((n - size) // 2 for n in image.shape[1:])
        crops.append(image[:, top : top + size, left : left + size].float() / 255)
    return torch.stack(crops)


def initialize(model: LatentDiffusion) -> LatentDiffusion:
    """Residual branches of the UNet start at zero (Ho et al. 2020), embeddings as small as CLIP's."""
    nn.init.normal_(model.text.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(model.text.embeddings.position_embedding.weight, std=0.01)
    for module in model.unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.out_layers[3].weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(model.unet.out[2].weight)
    return model


def starting_model(recipe: Recipe, scale_factor: float) -> LatentDiffusion:
    """The model before its first step: that of --init, or random; its VAE is frozen."""
    preset = architecture(recipe.init)
    cfg = replace(preset, vae=replace(preset.vae, scale_factor=scale_factor))
    model = from_seed(recipe.seed, lambda: initialize(LatentDiffusion(cfg)))
    model.to(recipe.device, memory_format=torch.channels_last)
    if recipe.init:
        model.load_state_dict(load_model("tiny", recipe.init).state_dict())
    model.vae.requires_grad_(False)
    if recipe.data.is_file():
        model.text.encode = PackedTokens(read_header(recipe.data)["tokens"])
    return model


def train_unet(recipe: Recipe, on_save: Callable[[], None] = lambda: None) -> None:
    """v prediction (Salimans & Ho 2022); UNet and text encoder together, the VAE frozen.

    `on_save` is called after each checkpoint.
    """
    vae, vae_card = first_stage(recipe)
    scale_factor = vae_card["scale_factor"]
    model = starting_model(recipe, scale_factor)
    empty, prompt = (model.text.tokenize([words]).to(recipe.device) for words in ("", MANUAL[0]))
    clean = model.text.tokenize(["clean"])[0, 1].item()
    trainer = Trainer(model, recipe)
    averaged = trainer.ema.module
    for whose in (model, averaged):
        whose.vae.load_state_dict(vae)  # its decoder may be newer than the checkpoint's
    blank = model.blank_conditioning((model.cfg.image_size,) * 2)

    def leave() -> None:
        save_tiny(trainer, vae_card)
        on_save()

    trainer.on_save = leave
    left = trainer.left()
    source = stored_batches(recipe, model, left) if recipe.samples else reused_batches(recipe, model, left)
    for g, batch in zip(trainer.steps(), source, strict=False):
        z0 = sample_latents(batch["image"], scale_factor, g)
        conditioning = torch.cat([batch["mask"].float(), sample_latents(batch["masked"], scale_factor, g)], dim=1)
        # Only clean images lose their caption: without words the model expects photographs, as Stable Diffusion does.
        dropped = (torch.rand(len(z0), generator=g, device=recipe.device) < 0.3) & (batch["tokens"] == clean).any(dim=1)
        tokens = torch.where(dropped[:, None], empty, batch["tokens"])
        t = torch.randint(0, TRAIN_STEPS, (len(z0),), generator=g, device=recipe.device)
        focus = round(FOCUS * len(z0))
        conditioning[:focus] = blank
        t[:focus] = 100 + t[:focus] % 400  # noise ratios of about 0.1 to 0.5
        noise = torch.randn(z0.shape, generator=g, device=recipe.device)
        a_t = model.alphas_cumprod[t][:, None, None, None]
        z_t = q_sample(z0, noise, a_t)
        with torch.autocast(recipe.device.type, torch.bfloat16):
            context = model.text(model.text.embed(tokens))
            eps = model.predict_noise(model.unet, z_t, t, context[:, None], conditioning)[:, 0].float()
        error = (eps - noise).square().mean(dim=(1, 2, 3), keepdim=True)
        # This is the squared error of v. At high noise v is about -x0, and there inpainting settles its colours.
        loss, terms = (error / a_t).mean(), {"mse": error.mean()}
        if recipe.locate:
            half = max(1, len(z0) // 2)
            pair = model.text(model.text.embed(torch.cat([prompt, empty])))
            region = batch["region"][:half].float()
            terms["mask"] = location_loss(model, z0[:half], region, Asked(pair, blank), recipe.hiding, g)
            loss = loss + recipe.locate * terms["mask"]
        trainer.update(loss, **terms)
    plot_losses(trainer.log, ("loss", "mse"))
    show_inpainting(recipe, averaged.requires_grad_(False))
    print(f"saved {recipe.out / 'tiny.safetensors'} after {trainer.step} steps")


def save_tiny(trainer: Trainer, vae_card: dict) -> None:
    """Write the averaged model with its card: how it came about, and the settings that suit it."""
    recipe = trainer.recipe
    logged = trainer.log.read_text().splitlines() if trainer.log.is_file() else []
    losses = [json.loads(line)["mse"] for line in logged[-10:]] or [float("nan")]
    card = {
        "steps": trainer.step,
        "batch": recipe.batch,
        "seconds": round(trainer.seconds),
        "samples": recipe.samples or trainer.step * recipe.batch // recipe.reuse,
        "mse": sum(losses) / len(losses),
        "device": recipe.device.type,
        "vae": vae_card,
    }
    if recipe.init:
        card["from"] = {k: v for k, v in read_header(recipe.init)["training"].items() if k != "vae"}
    save_model(trainer.ema.module, recipe.out / "tiny.safetensors", {"training": card, "settings": asdict(EMBEDDED)})


def show_inpainting(recipe: Recipe, model: LatentDiffusion) -> None:
    """Eight photographs, with a grey square, and inpainted from the prompt "clean"."""
    photos = load_photos(recipe.data, short_side=256)
    x = center_crops(photos, range(0, len(photos.images), max(1, len(photos.images) // 8)))[:8]
    mask = torch.zeros(len(x), 1, *x.shape[-2:])
    mask[..., 80:144, 80:144] = 1
    defense = DIFFender(model.cpu(), manual_contexts(model), DIFFenderConfig(steps=10, guidance=3.0, sampler="dpmpp"))
    noise = defense.sample_noise([str(i) for i in range(len(x))], recipe.seed, "inpainting")
    restored = defense.repaint(x, mask, noise)
    save_png(make_grid(torch.cat([x, x * (1 - mask) + 0.5 * mask, restored]), 8), recipe.out / "unet.png")
