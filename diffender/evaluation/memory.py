"""What a gradient step will need in memory, known before it runs: activations counted on tensors without storage."""

import copy
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffender.stable_diffusion.model import LatentDiffusion
from diffender.utils.errors import InputError

GIB = 2**30
WORKING = 1.7  # gradients in flight and the largest layer's buffers, as a multiple of the stored activations; measured


class Footprint(NamedTuple):
    """Bytes that each network keeps for the backward pass of one row of a batch."""

    unet: int
    encoder: int
    decoder: int
    classifier: int


class Fused(TorchFunctionMode):
    """Attention on meta tensors keeps what its fused kernels keep on CPUs and GPUs. Of itself torch takes another path
    there, which keeps the whole matrix of every head."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not (args and args[0].is_meta):
            return function(*args, **kwargs)
        asked = dict(zip(("attn_mask", "dropout_p", "is_causal"), args[3:], strict=False)) | kwargs
        asked.pop("enable_gqa", None)  # heads that share keys: their shapes say so
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], **asked)[0]


def saved_bytes(net: nn.Module, function: Callable[..., Tensor], *args: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of function(*args), each storage once, less the weights of `net`,
    which are there anyway. Meta tensors will do."""
    weights = [*net.parameters(), *net.buffers()]
    kept = {w.untyped_storage()._cdata: (w, 0) for w in weights}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept.setdefault(storage._cdata, (t, storage.nbytes()))  # the tensor is held, so its address stays unique
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Fused():
        function(*args)
    return sum(nbytes for _, nbytes in kept.values())


def footprint(model: LatentDiffusion, classifier: nn.Module, size: int) -> Footprint:
    """The footprint of a model and a classifier network at this image size, counted on meta tensors."""
    cfg, dtype = model.cfg, model.unet.dtype
    with torch.device("meta"):
        model = LatentDiffusion(cfg).requires_grad_(False)
        z = torch.empty(1, *cfg.latent_shape, requires_grad=True)
        x = torch.empty(1, 3, cfg.image_size, cfg.image_size, requires_grad=True)
        image = torch.empty(1, 3, size, size, requires_grad=True)
        t, context = (torch.zeros(1, dtype=torch.long), torch.empty(1, 77, cfg.unet.context_dim, dtype=dtype))
    channels = cfg.unet.in_channels - cfg.vae.z_channels
    latents = torch.cat([z, torch.empty(1, channels, *cfg.latent_shape[1:], device="meta")], dim=1).to(dtype)
    unet = model.unet.to(dtype)
    net = copy.deepcopy(classifier).to("meta")
    return Footprint(
        saved_bytes(unet, lambda x: unet(x, t, context), latents),
        saved_bytes(model.vae, lambda x: model.vae.posterior(x).sample(torch.empty_like(z)), x),
        saved_bytes(model.vae, model.vae.decode, z),
        saved_bytes(net, net, image),
    )


def peak_bytes(one: Footprint, images: int, draws: int, micro_batch: int | None) -> int:
    """Bytes that a full gradient of so many images side by side needs, besides what the process holds already.

    Networks are recomputed one after the other in the backward pass, so the largest counts, the classifier included.
    Steps of the sampler and samples of EOT do not enter.
    """
    limit = micro_batch or sys.maxsize
    rows = min(images * 2 * draws, max(2, limit)), min(images, limit)  # the two texts of a row stay in one micro-batch
    largest = max(one.unet * rows[0], one.encoder * rows[1], one.decoder * rows[1])
    return round(WORKING * max(largest, one.classifier * images))


def kept_bytes(one: Footprint, images: int, draws: int, steps: int) -> int:
    """`peak_bytes` if nothing is recomputed: every evaluation of localisation and of `steps` of restoration is kept."""
    unets = 2 * draws + steps
    encoders, decoders = (2, 1) if steps > 0 else (1, 0)  # restoration encodes and decodes, too
    total = one.unet * unets + one.encoder * encoders + one.decoder * decoders + one.classifier
    return round(WORKING * images * total)


def keep_or_recompute(one: Footprint, images: int, draws: int, steps: int, device: torch.device) -> bool:
    """Whether keeping all activations takes no more than a quarter of what is free."""
    return kept_bytes(one, images, draws, steps) <= free_bytes(device) / 4


def free_bytes(device: torch.device) -> int:
    """Memory that can be had, what only caches files included; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return min(1024 * int(found[1]), left_in_container()) if found else 0


def left_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes until a container's limit, cached files not counted as used; without a limit a very large number."""
    limit = group / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return sys.maxsize
    cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
    return max(0, int(most) - used)


def fit_micro_batch(one: Footprint, images: int, draws: int, held: int, allowed: int) -> int | None:
    """The largest micro-batch that stays within `allowed` bytes, `held` of them taken already; None: no need of one.

    Raises InputError where one row is too much.
    """
    for micro_batch in (None, *range(images * 2 * draws, 0, -1)):
        if held + peak_bytes(one, images, draws, micro_batch) <= allowed:
            return micro_batch
    need = (held + peak_bytes(one, 1, draws, 1)) / GIB
    raise InputError(
        f"--max-memory {allowed / GIB:.1f} GiB is too little for {images} images side by side; one takes about "
        f"{need:.1f} GiB: lower --batch-size or raise --max-memory"
    )


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds: resident memory, or what is allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return most_held_bytes(device)
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def most_held_bytes(device: torch.device) -> int:
    """The largest number of bytes that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:  # getrusage counts what the parent held when it started this process
        return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
