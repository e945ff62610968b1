"""The camera of the physical test: closed forms, and that a frame is a frame."""

import math

import pytest
import torch

from diffender.attacks import ATTACKS
from diffender.attacks.expectation import Task
from diffender.noise import generator
from diffender.paper import physical
from diffender.paper.physical import CONFIGURATIONS, Filmed, Pose, draw_frame, homography, photograph, print_patch, warp
from diffender.pipeline import Undefended


def at(pose, size, points):
    h = homography(torch.tensor([list(pose)], dtype=torch.float64), size)[0]
    p = torch.tensor([[u, v, 1.0] for u, v in points], dtype=torch.float64) @ h.T
    return p[:, :2] / p[:, 2:]


def test_nothing_moves_without_a_pose(photos):
    h = homography(torch.tensor([[0.0, 0.0, 1.0]]), 224)
    assert torch.allclose(h / h[0, 2, 2], torch.eye(3)[None], atol=1e-5)
    assert (warp(photos[:1], h) - photos[:1]).abs().max() < 1e-3


@pytest.mark.parametrize(("yaw", "pitch"), [(15, 0), (-30, 0), (0, 15), (0, -15)])
def test_homography_has_the_closed_form(yaw, pitch):
    size, c = 299, 149.0
    f = d = 299.0
    points = [(0, 0), (298, 0), (40, 210), (298, 298)]
    found = at((yaw, pitch, 1), size, points).tolist()
    for (u, v), (u2, v2) in zip(points, found, strict=True):
        x, y = u - c, v - c
        th, ph = math.radians(yaw), math.radians(pitch)
        depth = d - x * math.sin(th) + y * math.sin(ph)
        assert u2 - c == pytest.approx(f * x * math.cos(th) / depth, abs=1e-6)
        assert v2 - c == pytest.approx(f * y * math.cos(ph) / depth, abs=1e-6)


def test_numbers_of_the_specification():
    """Corners at yaw 15, and areas at distances 1.5 and 2."""
    corners = at((15, 0, 1), 299, [(0, 0), (298, 0), (298, 298), (0, 298)])
    assert corners[:, 0].min().item() == pytest.approx(21.5, abs=0.1)
    assert corners[:, 0].max().item() == pytest.approx(314.2, abs=0.1)
    assert corners[:, 1].min().item() == pytest.approx(-22, abs=0.5)
    for distance, area in ((1.5, 0.444), (2.0, 0.25)):
        side = at((0, 0, distance), 299, [(0, 0), (298, 0)])
        assert ((side[1, 0] - side[0, 0]) / 298).item() ** 2 == pytest.approx(area, abs=1e-3)


def test_far_away_shows_the_scene_smaller():
    x = torch.zeros(1, 1, 225, 225)
    x[..., 72:153, 72:153] = 1
    near, far = (warp(x, homography(torch.tensor([[0.0, 0.0, d]]), 225)) for d in (1.0, 2.0))
    assert far[..., 56:169, 56:169].sum().item() == pytest.approx(near.sum().item() / 4, rel=0.03)


def test_a_frame_is_a_function_of_what_it_drew(photos):
    x = photos[:2].clone().requires_grad_()
    poses = [Pose(), CONFIGURATIONS["yaw ±30°"][0]]
    frame = draw_frame(poses, 224, generator("frame"))
    y = photograph(x, x, frame)
    assert torch.equal(y, photograph(x, x, frame))
    assert not torch.equal(y, photograph(x, x, draw_frame(poses, 224, generator("other"))))
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def steady(**given):
    """A frame of 65 x 65 pixels that changes nothing, but for what is given."""
    still = {"pose": torch.tensor([[0.0, 0.0, 1.0]]), "gain": torch.ones(1, 3), "gamma": torch.ones(1, 1)}
    still |= dict.fromkeys(("bias", "blur", "grain"), torch.zeros(1, 1))
    return draw_frame([Pose()], 65, generator("steady"))._replace(**still | given)


def test_beyond_the_picture_lies_the_clean_scene():
    """A patch at the border is seen once."""
    scene = torch.full((1, 3, 65, 65), 0.5)
    x = scene.clone()
    x[..., :20, :20] = 1
    far = steady(pose=torch.tensor([[0.0, 0.0, 3.0]]))
    brighter = photograph(x, scene, far)[0, 0] > 0.6
    assert 0 < brighter.sum() < 60


def test_a_photograph_by_hand(monkeypatch):
    """Gamma is a power; from twice as far a pixel sees twice as much; blur is told in pixels of 299."""
    x, sigmas, blurred = torch.full((1, 3, 65, 65), 0.5), [], physical.blur
    monkeypatch.setattr(physical, "blur", lambda x, sigma: sigmas.extend(sigma) or blurred(x, sigma))
    assert torch.allclose(photograph(x, x, steady(gamma=torch.tensor([[2.0]]))), 0.5 * x, atol=1e-5)
    assert sigmas == [0, 0]
    photograph(x, x, steady(pose=torch.tensor([[0.0, 0.0, 2.0]]), blur=torch.tensor([[1.5]])))
    assert sigmas[2:] == pytest.approx([0.5 * 3**0.5, 1.5 * 65 / 299])


def test_a_frame_is_two_degrees_and_five_per_cent_off_its_pose_at_most():
    frame, most = draw_frame([Pose(15, -15, 2.0)] * 200, 4, generator("off")), torch.tensor([2.0, 2.0, 0.1001])
    off = (frame.pose - torch.tensor([15.0, -15.0, 2.0])).abs().amax(dim=0)
    assert (off < most).all()
    assert (off > 0.9 * most).all()


def test_print_loses_colour(photos):
    mask = torch.ones(1, 1, 224, 224)
    chroma = [print_patch(photos[:1], mask, torch.tensor([[ink]])).std(dim=1).mean().item() for ink in (0.0, 0.5, 1.0)]
    assert chroma[1] == pytest.approx(chroma[0] / 2, rel=1e-3)
    assert chroma[2] < 1e-6


def test_print_stays_in_its_range_and_its_place(photos):
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 50:100, 50:100] = 1
    black = torch.zeros_like(photos[:1])
    printed = print_patch(photos[:1] * (1 - mask) + black * mask, mask, torch.zeros(1, 1))
    assert torch.equal(printed * (1 - mask), photos[:1] * (1 - mask))
    assert printed[..., 55:95, 55:95].min().item() == pytest.approx(0.05, abs=1e-3)


def test_patches_are_made_before_the_camera(classifier, photos):
    """An attack on the filmed classifier lowers its loss over frames it draws itself."""
    victim = Filmed(classifier, photos[:1])
    y = classifier(photos[:1]).argmax(dim=1)
    made = ATTACKS["advp"](iters=8, eot=2)(Task(victim, photos[:1], y, ["a"], 0))
    assert made.trace[0, -2:].mean() < made.trace[0, :2].mean()


def test_the_camera_sees_the_patch_printed(classifier, photos):
    """As the frames that are judged, and from as far away as these."""
    victim = Filmed(torch.nn.Identity(), photos[:1])
    noise = victim.sample_noise(["a"], 0, "p")
    made = ATTACKS["noise"]()(Task(Undefended(classifier), photos[:1], torch.zeros(1).long(), ["a"], 0))
    expected = photograph(print_patch(made.image, made.mask, noise.ink), photos[:1], noise)
    frame, unprinted = victim(made.image, noise), photograph(made.image, photos[:1], noise)
    assert (frame - expected).abs().mean() < 0.2 * (frame - unprinted).abs().mean()
    poses = [victim.sample_noise([str(i)], 0, "p").pose[0] for i in range(200)]
    reached = torch.stack(poses).amax(dim=0)
    for configured in CONFIGURATIONS.values():
        for pose in configured:
            assert all(abs(p) <= r + 0.5 for p, r in zip(pose, reached.tolist(), strict=True))
