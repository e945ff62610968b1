"""The whole defence: localise, restore, composite. Fully differentiable; noise is an argument."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffender.config import FULL, WITH_PENALTY, Backward, DIFFenderConfig
from diffender.localize import SCORES, difference_map, predict_pair, refine_mask
from diffender.losses import EVASIONS, decoy
from diffender.noise import Noise, sample_noise, stack
from diffender.ops import binarize, resize, straight_through
from diffender.prompts import Contexts
from diffender.restore import composite, inpaint
from diffender.stable_diffusion.model import LatentDiffusion
from diffender.stable_diffusion.vae import Posterior
from diffender.utils.errors import InputError, check_finite
from diffender.utils.images import check_images

if TYPE_CHECKING:
    from diffender.classifiers.imagenet import Classifier

Drawn = TypeVar("Drawn", Noise, Tensor)
TOUCHED = 1e-3  # a pixel of a resized mask counts as masked if more than this share of it was masked


class Localized(NamedTuple):
    mask: Tensor  # (B, 1, H, W) in {0, 1}, 1 = patch
    heatmap: Tensor  # (B, 1, h, w), not negative: the difference map of Eq. 2 on the latent grid
    z_score: Tensor  # (B, 1, h, w): the difference map standardised; `refine_mask` makes the mask of it


class Purified(NamedTuple):
    image: Tensor  # (B, 3, H, W) in [0, 1]; without composite the clamped decode
    mask: Tensor | None = None  # this and the rest as in Localized; None where another defence has no such thing
    heatmap: Tensor | None = None
    z_score: Tensor | None = None


class Defense(Protocol):
    """What stands before the classifier: purified = defense(x, noise, backward) for x (B, 3, H, W) in [0, 1].

    `sample_noise` draws the noise of a call, or returns None if the defence is deterministic. `model` is its
    diffusion model, or None.
    """

    @property
    def model(self) -> LatentDiffusion | None: ...

    def __call__(self, x: Tensor, noise: Noise | Tensor | None, backward: Backward = FULL) -> Purified: ...

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise | Tensor | None: ...


class DIFFender(nn.Module):
    """The defence of Sec. 3.2: purified = defense(x, noise) for x (B, 3, H, W) in [0, 1] of any size.

    The same noise gives the same result, to the bit on a CPU. The networks see images at `size` (H, W), by default the
    square that the model was trained on; the result has the size of x. Without `cfg` the settings that suit the model
    are used. Raises InputError for a `size` whose sides are not multiples of `model.cfg.multiple`.
    """

    blank: Tensor

    def __init__(
        self,
        model: LatentDiffusion,
        contexts: Contexts,
        cfg: DIFFenderConfig | None = None,
        size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.model = model
        for name, context in contexts._asdict().items():  # buffers: they go where the model goes
            self.register_buffer(f"context_{name}", context, persistent=False)
        self.cfg = cfg or model.settings or DIFFenderConfig()
        self.work_at(size or (model.cfg.image_size,) * 2)
        self.eval()

    def work_at(self, size: tuple[int, int]) -> None:
        """Sets the working size (H, W). Raises InputError unless both are multiples of `model.cfg.multiple`."""
        if any(side < 1 or side % self.model.cfg.multiple for side in size):
            raise InputError(f"size is {size}; both sides are multiples of {self.model.cfg.multiple} for this model")
        self.size = (size[0], size[1])
        self.register_buffer("blank", self.model.blank_conditioning(size), persistent=False)

    @property
    def contexts(self) -> Contexts:
        return Contexts(*(getattr(self, f"context_{name}") for name in Contexts._fields))

    @contexts.setter
    def contexts(self, contexts: Contexts) -> None:
        for name, context in contexts._asdict().items():
            setattr(self, f"context_{name}", context)

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise:
        """The k-th noise of these images for this purpose, on the model's device."""
        steps = self.cfg.steps if self.cfg.eta > 0 else 0
        shape = self.blank[0, 1:].shape
        noise = sample_noise(shape, (self.cfg.draws, steps), seed, image_ids, purpose, k)
        return Noise(*(n.to(self.model.alphas_cumprod) for n in noise))

    def check_noise(self, x: Tensor, noise: Noise | None) -> None:
        """Raises InputError unless the noise is for as many images as x (B, 3, H, W) holds, and for this defence."""
        noise, latent = require_noise(noise), tuple(self.blank[0, 1:].shape)
        if not isinstance(noise, Noise):
            raise InputError(f"the noise is a {type(noise).__name__}; draw it by this defence's sample_noise")
        if (shape := tuple(noise.image.shape[1:])) != latent:
            raise InputError(f"noise for latents {shape}; here they are {latent}: draw it by this defence's own")
        if len(noise.image) != len(x):
            raise InputError(
                f"noise for {len(noise.image)} images with {len(x)} images; sample_noise takes an id for each image"
            )
        draws, steps = noise.draws.shape[1], noise.steps.shape[1]
        steps_taken = self.cfg.steps if self.cfg.eta > 0 else 0
        if draws != self.cfg.draws or steps < steps_taken:
            raise InputError(
                f"noise of {draws} draws and {steps} steps; with its settings this defence takes {self.cfg.draws} and "
                f"{steps_taken}: draw it by its own sample_noise"
            )

    def twin(self) -> "DIFFender":
        """The same defence, with whatever a subclass has changed. Networks are shared; contexts and size may be set."""
        other = copy(self)
        other._buffers = self._buffers.copy()
        return other

    def at(self, size: tuple[int, int]) -> "DIFFender":
        """The same defence, working at another size."""
        if size == self.size:
            return self
        other = self.twin()
        other.work_at(size)
        return other

    def posterior(self, x: Tensor) -> Posterior:
        """The VAE's posterior of images (B, 3, H, W) in [0, 1], resized to `size`. Localisation draws z0 from it."""
        return self.model.posterior(resize(x, self.size))

    def localize(
        self, x: Tensor, noise: Noise, backward: Backward = FULL, posterior: Posterior | None = None
    ) -> Localized:
        """Patch localisation (Sec. 3.2, Eq. 2) of images (B, 3, H, W) in [0, 1]. `posterior` is theirs, if known.

        Raises InputError for noise that does not fit, and NonFinite for NaN or infinity in the map.
        """
        self.check_noise(x, noise)
        z0 = self.model.latents(posterior or self.posterior(x), noise.image)
        heatmap = difference_map(*predict_pair(self.model, z0, self.contexts, noise, self.cfg, self.blank))
        check_finite("difference map", heatmap)
        z_score = SCORES[self.cfg.score](heatmap)
        mask = refine_mask(z_score, x.shape[-2:], self.cfg, backward)
        return Localized(mask, heatmap, z_score)

    def restore(self, x: Tensor, mask: Tensor, noise: Noise, steps: int | None = None) -> Tensor:
        """Patch restoration (Sec. 3.2): a whole new image (B, 3, H, W), about [0, 1], not clamped.

        x (B, 3, H, W) in [0, 1] is hidden inside mask (B, 1, H, W), 1 = repaint. `steps` replaces `cfg.steps`. Without
        `cfg.restore` (the paper's NR) the image is grey.
        """
        if not self.cfg.restore:
            return torch.full_like(x, 0.5)
        if mask.shape[-2:] != self.size:
            mask = binarize(resize(mask, self.size), TOUCHED)
        cfg = self.cfg if steps is None else replace(self.cfg, steps=steps)
        restored = inpaint(self.model, resize(x, self.size), mask, self.contexts, noise, cfg)
        return resize(restored, x.shape[-2:])

    def restore_masked(self, x: Tensor, mask: Tensor, noise: Noise) -> Tensor:
        """`restore` for compositing: images of which nothing is masked stay as they are and cost nothing."""
        rows = mask.flatten(1).any(dim=1).nonzero().flatten()
        if len(rows) == 0:
            return x
        noise = Noise(*(n[rows] for n in noise))
        return x.index_copy(0, rows, self.restore(x[rows], mask[rows], noise))

    def repaint(self, x: Tensor, mask: Tensor, noise: Noise) -> Tensor:
        """x (B, 3, H, W) with what a mask (B, 1, H, W) covers restored, whatever the map says."""
        return composite(x, self.restore(x, mask, noise), mask)

    def forward(
        self, x: Tensor, noise: Noise, backward: Backward = FULL, posterior: Posterior | None = None
    ) -> Purified:
        """Localise, restore and composite (Sec. 3.2). `posterior` is that of x, if it is known already.

        `backward` chooses the backward pass. Raises InputError for images or noise that do not fit, and NonFinite for
        NaN or infinity.
        """
        check_images(x, self.blank.dtype)
        if backward.mode == "bpda":
            out = self(x.detach(), noise)
            return out._replace(image=straight_through(out.image, x))
        found = self.localize(x, noise, backward, posterior)
        restore_all = found.mask.requires_grad or not self.cfg.composite  # an empty mask has a gradient, too
        restore = self.restore if restore_all else self.restore_masked
        if backward.mode in ("full", "full+loc", "auto"):
            mask = resize(found.mask, self.size) if backward.ste == "soft" else found.mask  # `restore` makes it binary
            x_hat = restore(x, mask, noise)
        else:  # bpda-mask, surrogate, evade: what restoration paints is a constant
            x_hat = restore(x.detach(), found.mask.detach(), noise)
        if backward.mode == "surrogate" and (x.requires_grad or found.mask.requires_grad):
            steps = min(backward.surrogate_steps, self.cfg.steps)
            x_hat = straight_through(x_hat, self.restore(x, found.mask, noise, steps))
        check_finite("restored image", x_hat)
        image = composite(x, x_hat, found.mask) if self.cfg.composite else x_hat.clamp(0, 1)
        return Purified(image, *found)

    def unnoticed(self, x: Tensor, noise: Noise) -> Tensor:
        """What the classifier sees of a patch that the map does not show: x as it is."""
        return x


class Defended(nn.Module):
    """The classifier behind the defence, as a victim: f(x (B, 3, H, W) in [0, 1], noise) -> logits (B, K).

    `bare` is the classifier without the defence. It differs from `classifier` only where the defence lies within the
    classifier (FNC). All modules are put into eval mode. Raises InputError for a defence without `sample_noise`, for
    one whose PatchCleanser holds another classifier, and for a gradient mode that the defence has no use for.
    """

    undefended_is = "undefended"  # the title that reports give to the column of `bare`

    def __init__(
        self, defense: Defense, classifier: "Classifier", backward: Backward = FULL, bare: "Classifier | None" = None
    ):
        super().__init__()
        if not hasattr(defense, "sample_noise"):
            raise InputError(
                f"the defence is a {type(defense).__name__}, without sample_noise; wrap it: diffender.Purifier(purify)"
            )
        cleanser = getattr(defense, "cleanser", None)  # PatchCleanser, where the defence has one
        if getattr(cleanser, "classifier", classifier) is not classifier:
            raise InputError("the defence's PatchCleanser holds another classifier than Defended; give both the same")
        self.defense, self.classifier = defense, classifier
        self.backward = useful(backward, defense)
        self.bare = classifier if bare is None else bare
        self.eval()

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> Noise | Tensor | None:
        """The noise that the defence takes."""
        return self.defense.sample_noise(image_ids, seed, purpose, k)

    def forward(self, x: Tensor, noise: Noise | Tensor | None) -> Tensor:
        return self.classifier(self.defense(x, noise, self.backward).image)

    def looks(
        self, x: Tensor, noises: Sequence[Noise | Tensor | None], batch: int = 1
    ) -> Iterator[tuple[Purified, Tensor]]:
        """Yields (purified images, their logits (B, K)) of x (B, 3, H, W) for each noise in turn.

        `batch` noises share a forward pass, which changes results by rounding. DIFFender encodes x only once.
        """
        posterior = self.defense.posterior(x) if isinstance(self.defense, DIFFender) else None
        for start in range(0, len(noises), batch):
            part = noises[start : start + batch]
            times = (len(part), 1, 1, 1)
            known: dict[str, Any] = {}
            if posterior is not None:
                known["posterior"] = Posterior(*(moment.repeat(times) for moment in posterior))
            purified = self.defense(x.repeat(times), stack(part), **known)
            fields = [[None] * len(part) if field is None else field.split(len(x)) for field in purified]
            for out in map(Purified, *fields):  # one for each noise
                yield out, self.classifier(out.image)

    def under(self, backward: Backward) -> "Defended":
        """The same victim with another backward pass, and with whatever a subclass has changed. Raises InputError as
        `Defended` does."""
        other = copy(self)
        other.backward = useful(backward, self.defense)
        return other

    def undefended(self) -> "Undefended":
        """The undefended classifier as a victim."""
        return Undefended(self.bare)

    def with_penalty(self, x: Tensor, noise: Noise | Tensor | None, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K), and the penalty (B,) that an attacker who hides from the localiser adds to its loss.

        The penalty is 0 except in modes full+loc and evade. In evade the classifier sees `defense.unnoticed(x, noise)`,
        as if nothing were masked. patch (B, 1, H, W) in {0, 1} is 1 at the attacker's pixels.
        """
        backward = self.backward
        if backward.mode not in WITH_PENALTY:
            logits = self(x, noise)
            return logits, logits.new_zeros(len(x))
        assert isinstance(self.defense, DIFFender) and isinstance(noise, Noise)  # no other defence has these modes
        if backward.mode == "evade":
            out = Purified(self.defense.unnoticed(x, noise), *self.defense.localize(x, noise, backward))
        else:
            out = self.defense(x, noise, backward)
        assert out.z_score is not None and out.heatmap is not None
        evasion = EVASIONS[backward.hide](out.z_score, patch, self.defense.cfg.theta)
        return self.classifier(out.image), backward.evasion * evasion + backward.decoy * decoy(out.heatmap)


def useful(backward: Backward, defense: Defense) -> Backward:
    """The backward pass unchanged. Raises InputError for a mode that the defence has no use for."""
    if isinstance(defense, DIFFender):
        if not defense.cfg.composite and backward.mode in ("bpda-mask", "evade"):
            raise InputError(
                f"{backward.mode} needs pixels that composite=False repaints; choose bpda, surrogate, full or full+loc"
            )
    elif backward.mode not in ("bpda", "auto", "full"):
        raise InputError(
            f"mode {backward.mode} is of DIFFender, and the defence is a {type(defense).__name__}; "
            "choose bpda, or auto, its own gradient"
        )
    return backward


def ours(target: Defended) -> DIFFender:
    """The defence of a target that is DIFFender. Raises AssertionError for another one."""
    assert isinstance(target.defense, DIFFender)
    return target.defense


class WithFreshNoise(nn.Module):
    """A victim as an ordinary module, x -> logits with new noise in every call: for foolbox, torchattacks, AutoAttack.

    The noise follows from (seed, place in the batch, number of the call).
    """

    def __init__(self, victim: Defended, seed: int = 0):
        super().__init__()
        self.victim, self.seed, self.calls = victim, seed, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = self.victim.sample_noise([str(i) for i in range(len(x))], self.seed, "call", self.calls)
        return self.victim(x, noise)


class Undefended(nn.Module):
    """The undefended classifier as a victim; its noise is None."""

    def __init__(self, classifier: "Classifier"):
        super().__init__()
        self.classifier = classifier
        self.eval()

    def sample_noise(self, image_ids: Sequence[str], seed: int, purpose: str, k: int = 0) -> None:
        return None

    def forward(self, x: Tensor, noise: None = None) -> Tensor:
        return self.classifier(x)


def require_noise(noise: Drawn | None) -> Drawn:
    """Returns the noise unchanged. Raises InputError if it is None: this defence needs noise."""
    if noise is None:
        raise InputError(
            "no noise; draw it by defense.sample_noise(ids, seed, purpose), or wrap the victim in "
            "diffender.WithFreshNoise"
        )
    return noise
