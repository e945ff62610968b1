"""Losses of prompt tuning, Sec. 3.3: mask (Eq. 4), restoration (Eq. 5), classifier features (Eq. 6).

And those of the attacker against localisation: evasion and decoy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class TuningLoss(NamedTuple):
    """The terms of Eq. 7 and their plain sum, scalars."""

    mask: Tensor
    l1: Tensor
    feature: Tensor
    total: Tensor


def mask_cross_entropy(logits: Tensor, mask: Tensor, printed: bool = False) -> Tensor:
    """Eq. 4: cross-entropy of the soft mask sigmoid(logits) against the true mask, mean over latents.

    logits (B, 1, h, w): the standardised difference less its threshold. mask (B, 1, H, W) in {0, 1}, brought to h, w
    by area. As printed, Eq. 4 has the positive term alone and is smallest for a mask of ones: `printed=True`.
    """
    target = F.interpolate(mask, logits.shape[-2:], mode="area")
    if printed:
        return -(target * F.logsigmoid(logits)).mean()
    return F.binary_cross_entropy_with_logits(logits, target)


def restoration_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Eq. 5, |x_r - x|, as a mean over all values of images (B, 3, H, W)."""
    return (restored - clean).abs().mean()


def feature_distance(features_r: Sequence[Tensor], features_c: Sequence[Tensor]) -> Tensor:
    """Eq. 6 with w_l = 1, mean over layers and images: squared distance of channel-normalised features.

    Each layer lies in [0, 4]. Both arguments list (B, C_l, H_l, W_l) maps; see `Classifier.features`.
    """
    layers = [
        (F.normalize(r, dim=1, eps=1e-10) - F.normalize(c, dim=1, eps=1e-10)).square().sum(dim=1).mean()
        for r, c in zip(features_r, features_c, strict=True)
    ]
    return sum(layers[1:], layers[0]) / len(layers)


def evasion(z_score: Tensor, patch: Tensor, theta: float) -> Tensor:
    """How far the patch sticks out above the threshold, (B,): mean over its latents of softplus(z - theta).

    z_score (B, 1, h, w); patch (B, 1, H, W) in {0, 1}, brought to h, w by area.
    """
    inside = F.interpolate(patch, z_score.shape[-2:], mode="area")
    excess = F.softplus(z_score - theta)
    return (excess * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp_min(1e-8)


def evasion_max(z_score: Tensor, patch: Tensor, theta: float, temperature: float = 0.25) -> Tensor:
    """How far the most conspicuous latent of the patch sticks out, (B,): softplus of a soft maximum of z - theta.

    For masks that grow from one latent above theta (`localize.grown`): the mean of `evasion` hardly sees that latent.
    z_score (B, 1, h, w); patch (B, 1, H, W) in {0, 1}. A latent is weighted by the share of it that the patch covers.
    The lower `temperature` (in standard deviations), the nearer to the plain maximum.
    """
    inside = F.interpolate(patch, z_score.shape[-2:], mode="area").flatten(1)
    highest = temperature * (z_score.flatten(1) / temperature + inside.log()).logsumexp(dim=1)
    return F.softplus(highest - theta)


EVASIONS = {"mean": evasion, "max": evasion_max}


def decoy(heatmap: Tensor) -> Tensor:
    """Minus the standard deviation over the mean of each difference map (B, 1, h, w), (B,).

    An attacker who lowers it makes a few latents extreme. The threshold counts in standard deviations, so it rises for
    all other latents.
    """
    flat = heatmap.flatten(1)
    return -flat.std(dim=1) / flat.mean(dim=1).clamp_min(1e-8)
