"""What the parts of the defence bring: the same attacked photographs, under one setting after another.

    python -m diffender ablate --data PHOTOS --images 96 --out results/choices
    python -m diffender ablate --study parts,noise --data PHOTOS --images 128 --out results/parts
    python -m diffender ablate --study defender,attacker --data PHOTOS --images 24 --out results/hiding

Photographs that the classifier gets right are attacked on the classifier alone. The studies:

    choices    localises with one choice changed at a time; choose by it, on photographs that no evaluation is made on
    parts      purifies and classifies with empty, manual and tuned prompts, without restoration, and with the true mask
               (the paper's Tables 3 and 4)
    noise      follows the difference map over the noise ratio (the paper's Figs. 3 and 4)
    restoring  restores the true mask, with one choice of restoration changed at a time
    defender   changes one choice of the localiser at a time; each is attacked anew by `evade`, which knows it
    attacker   changes one choice of `evade` at a time
    schedule   changes momentum and step size of AdvP, which attacks by the exact gradient through the defence (`full`)
    examples   shows the first photographs: reconstructed by the VAE, attacked, restored with the true mask and with
               the localised one
"""

from dataclasses import dataclass

from diffender.config import RunOptions, TargetOptions
from diffender.utils.errors import InputError
from diffender.utils.options import check_read, option, parse, part, run

STUDIES = ("choices", "parts", "noise", "restoring", "defender", "attacker", "schedule", "examples")
ANEW = {"defender", "attacker", "schedule"}  # of these, each setting is attacked anew, by an attacker who knows it


@dataclass(frozen=True)
class Options:
    target: TargetOptions = part(TargetOptions())
    run: RunOptions = part(RunOptions())
    batch_size: int = option(8, "Images per batch. Changes results by rounding.", low=1)
    study: str = option("choices", f"Studies, separated by commas: {', '.join(STUDIES)}.", group="the study")
    images: int = option(16, "Number of photographs.", low=1)
    attack: str = option("advp", "Attack on the classifier alone.", choices=("advp", "lavan"))
    area: float | None = option(
        None, "Share of the image that the patch covers (default: advp 0.05, lavan 0.02).", low=0.0005, high=0.9
    )
    shape: str = option("square", "Shape of the patch.", choices=("square", "circle"))
    targeted: bool | None = option(
        None, "Aim at a random class (default for lavan), or only away from the true one (advp)."
    )
    iters: int = option(100, "Steps of the attack.", low=1)
    iters_anew: int = option(
        40, "Steps of the attack on the defence, in the studies defender, attacker and schedule.", low=1
    )
    eot: int = option(2, "Noise samples in each of those steps.", low=1)
    out: str = option("runs/ablation", "Output folder for results.json, table.md and images.")


def main() -> None:
    opts = parse(Options, __doc__)
    studies = set(opts.study.split(","))
    if unknown := studies - {*STUDIES}:
        raise InputError(f"unknown study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    check_read(opts, dict.fromkeys(("iters_anew", "eot"), ("--study defender, attacker and schedule", studies & ANEW)))
    from diffender.paper.studies import ablate  # after the options are known to be good: torch takes seconds

    ablate(opts)


if __name__ == "__main__":
    run(main)
