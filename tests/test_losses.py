"""Eq. 4 to 7 and the metrics, against hand-worked cases."""

import math

import pytest
import torch

from diffender.evaluation.metrics import auc, map_auc, mask_scores, whiskers, wilson
from diffender.losses import feature_distance, mask_cross_entropy, restoration_l1


def test_mask_cross_entropy_by_hand():
    logits = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., 8:] = 1
    want = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert mask_cross_entropy(logits, mask).item() == pytest.approx(want)


def test_eq_4_counts_the_share_of_a_latent_that_is_patched():
    """In the middle of a cell, where a nearest pixel sees nothing of it."""
    logits, mask = torch.tensor(2.0).view(1, 1, 1, 1), torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    positive, negative = (math.log(1 + math.exp(-z)) for z in (2, -2))
    assert mask_cross_entropy(logits, mask).item() == pytest.approx(0.25 * positive + 0.75 * negative)
    printed = mask_cross_entropy(logits.expand(1, 1, 2, 2), mask, printed=True)
    assert printed.item() == pytest.approx(0.25 * positive), "a mean as well"


def test_eq_4_as_printed_rewards_a_mask_of_ones():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2, :2] = 1
    good, ones = 20 * (2 * mask - 1), torch.full_like(mask, 20.0)
    assert mask_cross_entropy(good, mask) < mask_cross_entropy(ones, mask)
    assert mask_cross_entropy(good, mask, printed=True) >= mask_cross_entropy(ones, mask, printed=True)


def test_feature_distance():
    g = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(2, c, 5, 5, generator=g) for c in (3, 7)] for _ in "ab")
    assert feature_distance(a, a).item() == 0
    assert feature_distance(a, b).item() == pytest.approx(feature_distance(b, a).item())
    assert feature_distance(a, [-x for x in a]).item() == pytest.approx(4, rel=1e-5)  # unit vectors, opposite
    scaled = [x * torch.rand(2, 1, 5, 5, generator=g).add(0.1) for x in a]
    assert feature_distance(scaled, b).item() == pytest.approx(feature_distance(a, b).item(), rel=1e-5)


def test_a_patch_moves_features_more_than_a_little_noise(classifier, photos):
    patched, noisy = (photos.clone(), (photos + 0.004 * torch.randn_like(photos)).clamp(0, 1))
    patched[..., 80:130, 80:130] = torch.rand(3, 50, 50)
    clean = classifier.features(photos)
    assert [tuple(f.shape[1:]) for f in clean] == [
        (16, 112, 112),
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
        (320, 7, 7),
    ]
    assert feature_distance(classifier.features(patched), clean) > feature_distance(classifier.features(noisy), clean)


def test_restoration_l1_is_a_mean():
    assert restoration_l1(torch.zeros(2), torch.tensor([1.0, 3.0])) == 2


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 32, 0.0, 0.1072), (8, 10, 0.4902, 0.9433), (256, 512, 0.4569, 0.5431)]
)
def test_wilson_known_values(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_a_proportion_lies_within_its_interval():
    """Also where rounding says otherwise, as at 0 of 6: a chart refuses error bars of negative length."""
    for n in range(1, 601):
        for k in (0, n // 3, n):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1


def test_whiskers_reach_below_and_above():
    y, (below, above) = whiskers([{"accuracy": 0.5, "low": 0.4, "high": 0.8}])
    assert [*y, *below, *above] == pytest.approx([50, 10, 30])


def test_auc_of_a_patch_smaller_than_half_a_latent():
    """It counts the latents that it covers most."""
    truth = torch.zeros(1, 1, 16, 16)
    truth[..., 5:7, 9:11] = 1  # within latents (2, 4) and (2, 5), (3, 4) and (3, 5) at a stride of 2, one pixel each
    heat = torch.zeros(1, 1, 8, 8)
    heat[..., 2:4, 4:6] = 1
    assert map_auc(heat, truth).item() == 1
    assert map_auc(-heat, truth).item() == 0


def test_latents_are_a_patchs_that_it_covers_by_more_than_half():
    for width, beside in ((5, -1), (7, 1)):  # of the second latent a quarter, or three
        truth, heat = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 4, 4)
        truth[..., :4, :width] = 1
        heat[..., 0, :2] = torch.tensor([1, beside])
        assert map_auc(heat, truth).item() == 1


def test_mask_scores_and_auc_by_hand():
    truth, mask = torch.zeros(2, 1, 1, 4, 4).unbind()
    truth[..., :2] = 1  # 8 pixels
    mask[..., 1:4] = 1  # 12 pixels, 4 of them right
    scores = mask_scores(mask, truth)
    assert [s.item() for s in scores] == pytest.approx([4 / 8, 4 / 12, 4 / 16])
    assert auc(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 1, 0, 1])) == pytest.approx(0.75)
    assert auc(torch.zeros(9), torch.tensor([1.0] * 3 + [0.0] * 6)) == 0.5, "ties say nothing, wherever the patch is"
    assert auc(torch.tensor([2.0, 1, 2, 0]), torch.tensor([1.0, 1, 0, 0])) == pytest.approx((0.5 + 1 + 0 + 1) / 4)
