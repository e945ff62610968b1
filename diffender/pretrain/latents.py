"""What the UNet is trained on: samples encoded by the frozen VAE, each once, stored, or reused from a growing store."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffender.pretrain.corpus import Samples, batches, load_photos
from diffender.pretrain.options import Recipe
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.vae import Posterior
from diffender.utils.errors import InputError
from diffender.utils.files import digest, load_tensors, read_header, save_atomic
from diffender.utils.progress import bar

STORED = 65_536  # samples that a store holds at most, in 25 KB each
Encoded = dict[str, Tensor]  # posteriors of images and masked images, tokens; masks and regions on the latent grid


def encode(model: LatentDiffusion, x: Tensor, mask: Tensor, tokens: Tensor, region: Tensor) -> Encoded:
    with torch.autocast(x.device.type, torch.bfloat16):
        image = torch.cat(model.vae.posterior(x), dim=1)
        masked = torch.cat(model.vae.posterior(x * (1 - mask) + 0.5 * mask), dim=1)
    small = F.interpolate(mask, image.shape[-2:], mode="nearest").bool()
    pasted = F.interpolate(region, image.shape[-2:], mode="area").half()
    return {"image": image.half(), "masked": masked.half(), "mask": small, "tokens": tokens, "region": pasted}


def fresh_batches(recipe: Recipe, model: LatentDiffusion, indices: range, batch: int) -> Iterator[Encoded]:
    """Encoded samples, each seen once."""
    dataset = Samples(load_photos(recipe.data, short_side=256), model.cfg.image_size, model.text.tokenize, recipe.seed)
    for parts in batches(dataset, indices, batch, recipe):
        yield encode(model, *(part.to(recipe.device, non_blocking=True) for part in parts))


def stored_batches(recipe: Recipe, model: LatentDiffusion, indices: range) -> Iterator[Encoded]:
    """Batches of --samples encoded once and kept in --out."""
    path = recipe.out / "samples.safetensors"
    encoder = {k: v for k, v in model.vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    told = {"samples": recipe.samples, "seed": recipe.seed, "data": str(recipe.data), "encoder": digest(encoder, {})}
    if path.is_file():
        if others := [k for k, v in told.items() if read_header(path).get(k) != v]:
            raise InputError(f"{path} holds samples of another kind ({', '.join(others)}); delete it to make new ones")
        samples = load_tensors(path)
    else:
        with bar(recipe.samples // 16, "encoding") as progress:
            parts = []
            for part in fresh_batches(recipe, model, range(recipe.samples), 16):
                parts.append({k: v.cpu() for k, v in part.items()})
                progress.update()
        samples = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        save_atomic(samples, path, told)
    for start in indices[:: recipe.batch]:
        g = Generator().manual_seed(recipe.seed * 1_000_000_000 + start)
        picks = torch.randint(0, len(samples["mask"]), (recipe.batch,), generator=g)
        yield {k: v[picks].to(recipe.device) for k, v in samples.items()}


def reused_batches(recipe: Recipe, model: LatentDiffusion, indices: range) -> Iterator[Encoded]:
    """Batches out of a growing store of encoded samples, so that each is used --reuse times on average.

    Making a sample takes a CPU core longer than a training step takes a GPU for it.
    """
    store: Encoded = {}
    chunk = max(1, recipe.batch // recipe.reuse)
    for n, new in enumerate(fresh_batches(recipe, model, range(indices.start // recipe.reuse, indices.stop), chunk)):
        store = store or {k: v.new_empty(STORED, *v.shape[1:]) for k, v in new.items()}
        rows = (n * chunk + torch.arange(chunk)) % STORED  # the oldest make room
        for k, v in new.items():
            store[k][rows.to(v.device)] = v
        g = Generator().manual_seed(recipe.seed * 1_000_000_000 + indices.start + n)
        others = torch.randint(0, min((n + 1) * chunk, STORED), (recipe.batch - chunk,), generator=g)
        picks = torch.cat([rows, others]).to(recipe.device)
        yield {k: v[picks] for k, v in store.items()}


def sample_latents(posterior: Tensor, scale_factor: float, g: Generator) -> Tensor:
    mean, logvar = posterior.float().chunk(2, dim=1)
    return scale_factor * Posterior(mean, logvar).sample(torch.randn(mean.shape, generator=g, device=mean.device))
