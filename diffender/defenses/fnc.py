"""FNC, feature norm clipping (Yu et al. 2021): no place of a feature map may be much stronger than its average."""

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffender.classifiers.imagenet import Classifier, channels_last
from diffender.utils.errors import InputError
from diffender.utils.options import check_range


def clip_norm(f: Tensor, alpha: float, dim: int = 1) -> Tensor:
    """Features f with channels along `dim`: norms over channels capped at alpha times the image's mean norm.

    The direction stays. The cap follows the features, gradient included.
    """
    norm = ((f**2).sum(dim=dim, keepdim=True) + 1e-12).sqrt()  # the plain norm has no gradient at 0, a dead ReLU's
    ones = (1,) * (f.ndim - 1)
    cap = alpha * norm.flatten(1).mean(dim=1).view(-1, *ones)
    return f * (cap / norm).clamp_max(1)


def clip_tokens(f: Tensor, alpha: float) -> Tensor:
    """ViT's (B, 1 + N, C): the patch tokens are clipped, the class token is not."""
    return torch.cat([f[:, :1], clip_norm(f[:, 1:], alpha, dim=2)], dim=1)


def fnc(classifier: Classifier, alpha: float = 1.1) -> Classifier:
    """A copy of the classifier, sharing its weights, that clips after every module of `cfg.clips`. Raises InputError
    where there is none."""
    if not classifier.cfg.clips:
        raise InputError(f"FNC does not know where to clip {classifier.cfg.tag}; set its ClassifierConfig.clips")
    check_range("alpha", alpha, 0.01, None)
    memo = {id(p): p for p in classifier.parameters()}  # not the buffers: batch statistics may be made anew
    twin = copy.deepcopy(classifier, memo)

    def hook(_module: nn.Module, _args: tuple, f: Tensor) -> Tensor:
        if f.ndim == 3:
            return clip_tokens(f, alpha)
        return clip_norm(f, alpha, dim=3 if channels_last(f) else 1)

    clipped = [module for name, module in twin.net.named_modules() if re.fullmatch(classifier.cfg.clips, name)]
    if not clipped:
        raise InputError(
            f"no module of {classifier.cfg.tag} is named {classifier.cfg.clips!r}; mend the expression "
            "ClassifierConfig.clips, which the whole name matches"
        )
    for module in clipped:
        module.register_forward_hook(hook)
    return twin


def reestimate_statistics(classifier: Classifier, batches: Iterable[Tensor]) -> None:
    """BatchNorm's running means and variances from clean images (B, 3, S, S) in [0, 1]: clipping shifts them.

    The original passes over ImageNet once. A thousand images cost EfficientNet-Lite0 9 % of clean ones even without
    clipping (results/fnc-statistics), so give many more, and none to be evaluated.
    """
    norms = [m for m in classifier.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
        m.train()
    for batch in batches:
        classifier(batch.to(classifier.mean))
    classifier.eval()
