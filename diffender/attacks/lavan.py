"""LaVAN: localized and visible adversarial noise (Karmon et al. 2018), in the image domain: pixels stay in [0, 1]."""

from dataclasses import dataclass

from torch import Tensor

from diffender.attacks.advp import AdvP
from diffender.attacks.patch import logit
from diffender.utils.options import option


@dataclass(frozen=True)
class LaVAN(AdvP):
    """The steps of AdvP on the difference of the true and the target's logit, z_y - z_t.

    The target is a random class, as in the original. `targeted=False` takes the runner-up of every step, which is the
    margin and the stronger attack on accuracy.
    """

    area: float = option(0.02, "Share of the image that the patch covers.", low=0.0005, high=1)
    targeted: bool = True

    def towards(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return logit(logits, y) - logit(logits, target)
