"""DIFFender behind PatchCleanser's two rounds (Xiang et al. 2022): for attackers who hide from the difference map.

Beyond the paper, docs/hardened.md. An attacker who knows the defence hides the patch from the map, and the map is then
no help. A window that covers the patch cannot be deceived, whatever is under it. So windows come first, and DIFFender
answers where they do not agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffender.config import FULL, Backward
from diffender.defenses.patchcleanser import PatchCleanser
from diffender.noise import Noise
from diffender.pipeline import DIFFender, Purified
from diffender.restore import composite
from diffender.stable_diffusion.vae import Posterior
from diffender.utils.errors import InputError
from diffender.utils.images import check_images


class Hardened(DIFFender):
    """purified = defense(x, noise): x (B, 3, S, S) in [0, 1], square.

    Where the windows agree on a class the image is returned so that the classifier reads that class: as it is, or
    under the window whose row agrees. Elsewhere it is what DIFFender makes of it. With `otherwise` = majority the
    classifier reads the class that most windows give there: that is PatchCleanser alone. The map is DIFFender's in all
    cases. Raises InputError for another `otherwise`, and for a subclass of DIFFender, whose changes it would not use.
    """

    def __init__(self, plain: DIFFender, cleanser: PatchCleanser, otherwise: str = "diffender"):
        if otherwise not in ("diffender", "majority"):
            raise InputError(f"otherwise is {otherwise!r}; choose diffender or majority, for windows that do not agree")
        if type(plain) is not DIFFender:
            raise InputError(f"plain is a {type(plain).__name__}, whose own methods would be lost; subclass Hardened")
        super().__init__(plain.model, plain.contexts, plain.cfg, plain.size)
        self.cleanser, self.otherwise = cleanser, otherwise

    def forward(
        self, x: Tensor, noise: Noise, backward: Backward = FULL, posterior: Posterior | None = None
    ) -> Purified:
        """The purified image and how it came about. Gradients pass straight through the choice of the window."""
        if backward.mode == "bpda":  # comes back here, without gradient
            return super().forward(x, noise, backward, posterior)
        check_images(x, self.blank.dtype)
        self.check_noise(x, noise)
        images, place = x.detach().unique(dim=0, return_inverse=True)  # a verdict repeats its image
        windows = [self.window(image) for image in images]  # None where they do not agree
        agreed = torch.tensor([window is not None for window in windows], device=x.device)[place].view(-1, 1, 1, 1)
        nothing = x.new_zeros(1, *x.shape[2:])
        mask = torch.stack([nothing if window is None else window for window in windows])[place]
        if agreed.all():
            out = Purified(x, *self.localize(x, noise, backward, posterior))
        else:
            out = super().forward(x, noise, backward, posterior)
        covered = composite(x, self.cleanser.classifier.mean, mask)
        assert out.mask is not None
        return out._replace(image=torch.where(agreed, covered, out.image), mask=torch.where(agreed, mask, out.mask))

    def at(self, size: tuple[int, int]) -> "Hardened":
        """Itself: raises InputError for another size, which an image that is not square would need."""
        if size != self.size:
            raise InputError("windows are squares in a square image, and this one is none; crop it")
        return self

    def window(self, x: Tensor) -> Tensor | None:
        """What to cover of one image (3, S, S), as a mask (1, S, S): nothing, a window, or None for DIFFender."""
        agreed = self.cleanser.agreed(x)
        if agreed is None and self.otherwise == "majority":
            agreed = self.cleanser.majority(x)
        if agreed is None:
            return None
        label, i = agreed
        # The classifier reads it once more, in another batch, where a near tie may end otherwise. If the place of the
        # patch is certified, there is a window under which it is no near tie.
        singles = [(k, k) for k in range(len(self.cleanser.windows(x.shape[-1])))]
        for way in ((), (i, i), *singles):  # () covers nothing
            if self.cleanser.surely(x, [way], label)[0]:
                return self.cleanser.hidden(x, [way])[0]
        return self.cleanser.hidden(x, [(i, i)])[0]

    def unnoticed(self, x: Tensor, noise: Noise) -> Tensor:
        """Where the map shows nothing, the classifier sees x under one window. The noise decides which."""
        count = len(self.cleanser.windows(x.shape[-1]))
        drawn = (torch.special.ndtr(noise.start.flatten(1)[:, 0].float()) * count).long().clamp_max(count - 1)
        return torch.cat([self.cleanser.cover(row, [(i, i)]) for row, i in zip(x, drawn.tolist(), strict=True)])

    def certified(self, x: Tensor, labels: Sequence[int], patch: Tensor) -> list[bool]:
        """Whether no pixels within these patches (B, 1, S, S) can change the answer from the label, image by image."""
        return [self.cleanser.certified(*one) for one in zip(x, labels, patch, strict=True)]
