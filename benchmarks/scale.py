"""What 50,000 images and four attacks cost on 1, 8 and 64 GPUs. Arithmetic; nothing runs but a count of operations.

    python benchmarks/scale.py --tflops 300

Passes of the defence an image are those that evaluate.py forecasts (`forecast.costs`). A pass of SD1.5 at 512 px, m 3,
T 20, takes its operations, counted, at the rate --tflops that the GPU sustains: an assumption, to be replaced by what
benchmarks/defense.py and attack_step.py measure there (--pass-seconds). Images do not depend on each other, so GPUs
divide the time.
"""

import torch
from common import parser, report
from torch.utils.flop_counter import FlopCounterMode

from diffender.evaluation.forecast import COST, costs
from diffender.evaluation.options import Options, with_preset
from diffender.stable_diffusion.model import MODELS, LatentDiffusion
from diffender.utils.options import change

IMAGES = 50_000
BUDGETS = {  # what an image is given
    "100 steps, EOT 10, transfer and bpda-mask, one restart": {"grad": "bpda-mask", "restarts": 1},
    "the same with full+loc": {"grad": "bpda-mask,full+loc", "restarts": 1},
    "--preset strong: every gradient, three restarts": {},
}


def teraflops_of_a_pass(name: str, draws: int, steps: int) -> float:
    """10^12 operations of one purification with guidance, counted on tensors without storage."""
    with torch.device("meta"):
        model = LatentDiffusion(MODELS[name])
        z = torch.empty(draws, model.cfg.unet.in_channels, *model.cfg.latent_shape[1:])
        context = torch.empty(2 * draws, 77, model.cfg.unet.context_dim)
        x, t = (torch.empty(1, 3, model.cfg.image_size, model.cfg.image_size), torch.empty(draws))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.unet(z, t, context)
        for _ in range(steps):
            model.unet(z[:1], t[:1], context[:2])
        for _ in range(2):
            model.vae.posterior(x)
        model.vae.decode(z[:1, : model.cfg.vae.z_channels])
    return counter.get_total_flops() / 1e12


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(device="cpu")  # where it runs, whatever there is
    flags.add_argument("--model", choices=tuple(MODELS), default="sd15-inpainting")
    flags.add_argument("--draws", type=int, default=3)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--tflops", type=float, default=300, help="10^12 operations a second that a GPU sustains")
    flags.add_argument("--pass-seconds", type=float, help="of one purification, where it was measured")
    args = flags.parse_args()
    work = teraflops_of_a_pass(args.model, args.draws, args.steps)
    seconds = args.pass_seconds or work / args.tflops
    given = "measured" if args.pass_seconds else f"{work:.1f} TFLOP at {args.tflops:.0f} TFLOP/s, assumed"
    print(f"a pass: {seconds:.3f} s ({given})")
    rows, figures = ([], {"teraflops of a pass": work, "seconds of a pass": seconds, "passes an image": {}})
    for name, budget in BUDGETS.items():
        opts = with_preset(
            change(Options(), preset="strong", attack="all", draws=args.draws, steps=args.steps, **budget)
        )
        passes = sum(costs(opts, COST).values())
        figures["passes an image"][name] = passes
        days = IMAGES * passes * seconds / 86400
        rows.append((name, f"{passes:,.0f}", *(f"{days / n:,.0f}" for n in (1, 8, 64))))
    head = (f"{IMAGES:,} images, four attacks, {args.model}", "passes an image", "days on 1 GPU", "on 8", "on 64")
    report(head, rows, figures, args)


if __name__ == "__main__":
    main()
