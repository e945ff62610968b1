"""One UNet evaluation and the whole defence of one photograph on the embedded model, as the scripts run it.

    python benchmarks/defense.py

Prints medians in milliseconds, and what share of the defence the UNet has.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffender.cli import DefenseOptions, pick
from diffender.data import load_image, sample_items
from diffender.models.classifiers import load_classifier
from diffender.pipeline import DIFFender, DIFFenderConfig
from diffender.prompts import contexts_for
from diffender.weights import load_model


def milliseconds(f: Callable[[], object], repeats: int) -> float:
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


@torch.no_grad()
def main() -> None:
    model = load_model("tiny")
    cfg = pick(DIFFenderConfig, DefenseOptions())
    defense = DIFFender(model, contexts_for("tuned", model), cfg)
    x = load_image(sample_items()[0].path, load_classifier("efficientnet_lite0").cfg)[None]
    noise = defense.sample_noise(["photograph"], 0, "benchmark")
    z, context = noise.start, defense.contexts.locate
    evaluation = milliseconds(lambda: model.eps(z, 200, context, defense.blank), 50)
    whole = milliseconds(lambda: defense(x, noise), 10)
    evaluations = 2 * cfg.draws + cfg.steps * (1 if cfg.guidance == 1 else 2)
    print(f"{torch.get_num_threads()} threads: one UNet evaluation {evaluation:.1f} ms")
    share = evaluations * evaluation / whole
    print(f"a whole defence of {evaluations} evaluations {whole:.0f} ms; the UNet's share {share:.2f}")


if __name__ == "__main__":
    main()
