"""A model from its files: which configuration their tensors call for, the weights in place, settings that suit it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import torch
from torch import Generator, nn

from diffender.config import EMBEDDED, PAPER, DIFFenderConfig
from diffender.stable_diffusion.model import MODELS, LatentDiffusion, ModelConfig
from diffender.stable_diffusion.schedule import make_alphas_cumprod
from diffender.stable_diffusion.text import TextConfig
from diffender.stable_diffusion.unet import UNet, UNetConfig
from diffender.stable_diffusion.vae import VAEConfig
from diffender.utils.errors import InputError, nearest
from diffender.utils.files import check_digest, load_tensors, one_line, read_header, save_checked
from diffender.utils.malloc import keep_freed_memory
from diffender.weights.layouts import PREFIXES, Signature, signature
from diffender.weights.reading import Checkpoint, check_match, match, read, scan, scheduler_of, stranger

PARTS = ("vae", "locator")  # of a model, that files of their own may hold
PREDICTIONS = ("epsilon", "v")
PACKAGE = Path(__file__).parents[1]
WEIGHTS = next(p for p in (PACKAGE / "embedded", PACKAGE.parent / "weights") if p.is_dir())  # installed; a checkout
RANDOM = "random"
SMALL = 96  # width of UNets whose activations a laptop can keep for a backward pass through every evaluation


def save_model(model: LatentDiffusion, path: Path, header: dict) -> None:
    """Write the whole model in float16, in CompVis names, with its configuration and a checksum in the header."""
    tensors = {
        prefix + k: v.half() for part, prefix in PREFIXES.items() for k, v in getattr(model, part).state_dict().items()
    }
    save_checked(tensors, path, {"config": asdict(model.cfg)} | header)


def load_model(
    name: str = "auto",
    path: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    ema: bool = False,
    parts: Mapping[str, str | Path | None] | None = None,
    prediction: str | None = None,
) -> LatentDiffusion:
    """A frozen model in eval mode.

    name        of `MODELS`, or auto: the embedded `tiny` without a path, else what the tensors at `path` are
    path        a CompVis single file, a Hugging Face folder, a file of ours, or "random", for trials
    dtype       of the UNets; text encoder and VAE stay in float32, as do the latents between evaluations
    ema         use the EMA weights of the UNet if the checkpoint has them
    parts       files of other parts, alone or in a whole checkpoint: "vae", and "locator", a 4-channel UNet for
                localisation as in the authors' demo
    prediction  epsilon or v, of UNets whose files do not say

    Raises InputError for files that are damaged or of another model.
    """
    if name not in (*MODELS, "auto"):
        raise InputError(f"unknown model {name!r}; choose one of auto, {', '.join(MODELS)}{nearest(name, MODELS)}")
    if unknown := [part for part in parts or () if part not in PARTS]:
        raise InputError(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if prediction not in (None, *PREDICTIONS):
        raise InputError(f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}, or None")
    given = {part: Path(file) for part, file in (parts or {}).items() if file}
    if str(path) == RANDOM:
        if ema or given or prediction:
            raise InputError(
                f"--weights {RANDOM} makes a whole model; leave out --ema, --vae, --locate-unet and --prediction"
            )
        return random_model(name, dtype)
    if path is None:
        if name not in ("tiny", "auto"):
            raise InputError(f"model {name!r} needs --weights; python -m diffender weights fetch {name} downloads them")
        path = WEIGHTS / "tiny.safetensors"
    elif not Path(path).expanduser().exists():
        raise InputError(
            f"no file or folder {path}; give the path of a checkpoint, or the name of a model: {', '.join(MODELS)}"
            f"{nearest(str(path), MODELS)}"
        )
    main = scan(Path(path))
    if "digest" in main.header:
        check_digest(main.path, load_tensors(main.path), main.header)
    cfg = config_for(name, main, prediction)
    sources = {"unet": main, "vae": scan(given["vae"], "vae") if "vae" in given else main, "text": main}
    with torch.device("meta"):
        model = LatentDiffusion(cfg)
        if "locator" in given:
            sources["locator"] = scan(given["locator"], "unet")
            model.locator = UNet(locator_config(sources["locator"], cfg, prediction))
    matches = {
        part: match(source, part.replace("locator", "unet"), getattr(model, part), ema and part == "unet")
        for part, source in sources.items()
    }
    for source in {id(source): source for source in sources.values()}.values():
        unknown = main.unknown if source is main else []  # of another file only a part is asked for
        check_match(source.path, unknown, [found for part, found in matches.items() if sources[part] is source])
    for part, found in matches.items():
        module = getattr(model, part)
        tensors = read(found.tensors, module.state_dict(), dtype if isinstance(module, UNet) else torch.float32)
        module.load_state_dict(tensors, assign=True)
    return ready(model, settings_in(main.header, main.path, name))


def ready(model: LatentDiffusion, settings: DIFFenderConfig) -> LatentDiffusion:
    """The model as users get it: frozen, in eval mode, with its settings, and as fast as memory allows. From here on
    `exact_convolutions` holds."""
    model.alphas_cumprod = make_alphas_cumprod()  # the only buffer, not in any file
    model.settings = settings
    model.keep = model.cfg.unet.model_channels <= SMALL
    keep_freed_memory()
    exact_convolutions()
    return model.requires_grad_(False).eval()


def exact_convolutions() -> None:
    """For the whole process: cuDNN convolves float32 in float32, not in TF32, and always adds in the same order."""
    torch.backends.cudnn.allow_tf32 = False  # a map is a difference of two near numbers
    torch.backends.cudnn.deterministic = True


def settings_of(weights: str | Path | None, name: str = "auto") -> DIFFenderConfig:
    """The settings of the method that suit a model, without reading more of it than its file's header."""
    if weights is None and name in ("auto", "tiny"):
        weights = WEIGHTS / "tiny.safetensors"
    return settings_in(header_of(weights), Path(weights or "").expanduser(), name)


def header_of(weights: str | Path | None) -> dict:
    """The header of a model's file, which has a configuration if the model is of ours; empty for what is no file."""
    path = Path(weights or "").expanduser()
    return read_header(path) if path.is_file() else {}


def settings_in(header: dict, path: Path, name: str) -> DIFFenderConfig:
    """The settings in a file's header; without any, EMBEDDED for models of ours and PAPER for all others."""
    if "settings" not in header:
        return EMBEDDED if "config" in header or name == "tiny" else PAPER
    try:
        return DIFFenderConfig(**header["settings"])
    except (TypeError, InputError) as e:
        raise InputError(f"{path} has damaged settings ({one_line(e)}); fetch or copy it again") from e


def random_model(name: str, dtype: torch.dtype) -> LatentDiffusion:
    """A preset with random weights, always the same: full size, real cost, no meaning."""
    if name == "auto":
        raise InputError(f"--weights {RANDOM} is for a named model; give --model, one of {', '.join(MODELS)}")
    with torch.device("meta"):
        model = LatentDiffusion(MODELS[name])
    model.unet.to(dtype)
    model.to_empty(device="cpu")
    fill_random(model, Generator().manual_seed(0))
    model.to(memory_format=torch.channels_last)  # as `read` has it
    return ready(model, settings_of(None, name))


def fill_random(module: nn.Module, g: Generator) -> None:
    """Normal weights that keep the size of what passes through; norms and biases at their start."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.data.normal_(std=p[0].numel() ** -0.5, generator=g)
        else:
            p.data.fill_(float(name.endswith("weight")))


def config_for(name: str, checkpoint: Checkpoint, prediction: str | None) -> ModelConfig:
    """The configuration that the tensors call for; raises InputError where it is not what `name` asks for."""
    path = checkpoint.path
    if "config" in checkpoint.header:
        cfg = config_from_json(checkpoint.header["config"], path)
        if name not in ("auto", "tiny") and cfg != MODELS[name]:
            raise InputError(f"{path} holds a model of its own configuration, not {name}; leave out --model")
        return cfg
    found, family = family_of(checkpoint)
    wanted = MODELS[family].unet.in_channels
    if found.in_channels != wanted:
        raise InputError(
            f"{path} holds a UNet with {found.in_channels} input channels, a text-to-image model; inpainting needs "
            f"{wanted}: give the {family} checkpoint (this one can serve as --locate-unet)"
        )
    if name not in ("auto", family):
        raise InputError(f"{path} holds {family}, not {name}; use --model {family}")
    cfg = MODELS[family]
    return replace(cfg, unet=replace(cfg.unet, prediction=stated_prediction(path) or prediction or "epsilon"))


def locator_config(checkpoint: Checkpoint, cfg: ModelConfig, prediction: str | None) -> UNetConfig:
    """The configuration of a 4-channel UNet that reads the same text as the model of `cfg`."""
    found, family = family_of(checkpoint)
    if found.in_channels != 4 or found.context_dim != cfg.unet.context_dim:
        raise InputError(
            f"--locate-unet {checkpoint.path} has {found.in_channels} input channels and reads text of width "
            f"{found.context_dim}; wanted is a text-to-image UNet with 4 and {cfg.unet.context_dim}"
        )
    return replace(
        MODELS[family].unet, in_channels=4, prediction=stated_prediction(checkpoint.path) or prediction or "epsilon"
    )


def family_of(checkpoint: Checkpoint) -> tuple[Signature, str]:
    """Signature of the UNet, and the preset that it belongs to whatever its input channels."""
    found = signature({k: s.shape for k, s in checkpoint.parts.get("unet", {}).items()})
    known = {
        (c.unet.model_channels, c.unet.context_dim): name
        for name, c in MODELS.items()
        if name != "tiny"  # its files say what they are
    }
    if found is None or found[1:] not in known:
        names = [*checkpoint.unknown, *(k for part in checkpoint.parts.values() for k in part)]
        what = stranger(names) or (
            "no UNet of Stable Diffusion 1 or 2" if found is None else f"an unknown UNet ({found})"
        )
        raise InputError(f"{checkpoint.path} holds {what}; known are {', '.join(known.values())}")
    return found, known[found[1:]]


def stated_prediction(path: Path) -> str | None:
    """What the scheduler of a UNet's folder says that the UNet predicts; None where nothing is said."""
    file = scheduler_of(path)
    if file is None:
        return None
    try:
        stated = json.loads(file.read_text(encoding="utf-8")).get("prediction_type")
    except (ValueError, AttributeError) as e:
        raise InputError(f"{file} is not a JSON object ({one_line(e)})") from e
    if stated not in (None, "epsilon", "v_prediction"):
        raise InputError(f"{file} says prediction_type {stated!r}; supported are epsilon and v_prediction")
    return stated and stated.removesuffix("_prediction")


def config_from_json(config: dict, path: Path) -> ModelConfig:
    """The configuration in a file's header; raises InputError for one that no file of ours has."""

    def build(cls: type, values: dict):  # noqa: ANN202
        sizes = [n for v in values.values() for n in (v if isinstance(v, list) else [v]) if type(n) is int]
        if not all(0 <= n < 1 << 16 for n in sizes):  # seen before anything is built from it
            raise ValueError(f"absurd sizes: {sizes}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
    try:
        cfg = ModelConfig(**{k: build(parts[k], v) if k in parts else v for k, v in config.items()})
        depths = (*cfg.unet.channel_mult, *cfg.vae.ch_mult, cfg.unet.num_res_blocks, cfg.vae.num_res_blocks)
        if len(depths) > 20 or max(depths) > 16 or cfg.text.layers > 64:
            raise ValueError(f"absurd depths or widths: {depths}, {cfg.text.layers}")
        with torch.device("meta"):
            LatentDiffusion(cfg)
    except (AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise InputError(f"{path} has a damaged configuration ({one_line(e)}); fetch or copy it again") from e
    return cfg


def describe(checkpoint: Checkpoint) -> str:
    """A few lines for people: family, layout, dtypes, counts."""
    lines = [f"{checkpoint.path}"]
    if sorted(checkpoint.unknown) == ["ctx_locate", "ctx_restore"]:
        return f"{lines[0]}\ntuned prompts; --prompts takes them"
    if "config" in checkpoint.header:
        lines.append(f"family: of our own, {config_from_json(checkpoint.header['config'], checkpoint.path)}")
    elif "unet" in checkpoint.parts:
        found, family = family_of(checkpoint)
        what = (
            family if found.in_channels == MODELS[family].unet.in_channels else f"text to image, relative of {family}"
        )
        lines.append(f"family: {what} ({found.in_channels} input channels, text of width {found.context_dim})")
    for part, tensors in checkpoint.parts.items():
        count = sum(prod(s.shape) for s in tensors.values())
        dtypes = ", ".join(f"{n} {d}" for d, n in Counter(s.dtype for s in tensors.values()).items())
        lines.append(f"{part}: {checkpoint.layouts[part]} layout, {len(tensors)} tensors ({dtypes}), {count:,} numbers")
    lines.append(
        f"EMA copies: {len(checkpoint.ema)}; ignored: {len(checkpoint.ignored)}; unknown: {len(checkpoint.unknown)}"
    )
    return "\n".join(lines)
