"""A pass of the defence and a step of each attack, of this checkout and of another one, in turn.

    git worktree add ../before b941bf2 && python benchmarks/generations.py --before ../before

Each runs in a process of its own through its own benchmarks/attack_step.py, so code, weights and settings of the
embedded model are those of its commit. b941bf2 is the last one with the first generation, whose restoration took four
steps. One image at a time, activations kept, as the scripts do it. In the image is a loud square that both mask. Where
nothing is masked, as in most clean images, today's code restores nothing, while b941bf2 restored every image.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import in_turn, parser, report

HERE = Path(__file__).parents[1]
PASS, CLEAN = "a pass", "a pass, nothing masked"
NOW = 2  # steps of today's restoration
MODES = ("bpda-mask", "surrogate", "full")


def measure(checkout: Path, steps: int, repeats: int) -> dict[str, float]:
    """Seconds of each, with the code of the checkout."""
    words = ["--checkout", checkout.resolve(), "--steps", steps, "--repeats", repeats]
    command = [sys.executable, __file__, *map(str, words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def work(args: argparse.Namespace) -> None:
    """Print the seconds as JSON. What is imported here is the checkout's."""
    sys.path[:0] = [str(args.checkout), str(args.checkout / "benchmarks")]
    for name in [name for name in sys.modules if name.split(".")[0] in ("diffender", "common")]:
        del sys.modules[name]
    import attack_step
    import torch
    from attack_step import build, step, task_for

    photographs = attack_step.sample_items()[1:]  # in the first one today's map sees something
    attack_step.sample_items = lambda: photographs

    setting = argparse.Namespace(model="tiny", dtype="float32", device="cpu", guidance=1.0, sampler="dpmpp", draws=3)
    clean = task_for(build(setting, args.steps), 1)
    loud = torch.randint(0, 2, (1, 3, 25, 25), generator=torch.Generator().manual_seed(0))
    x = clean.x.clone()
    x[..., 60:110, 100:150] = loud.repeat_interleave(2, 2).repeat_interleave(2, 3).float()
    patched = clean._replace(x=x)

    def forward(task: tuple) -> torch.Tensor:
        with torch.no_grad():
            return task.victim.defense(task.x, task.noise("benchmark")).mask

    vae = clean.victim.defense.model.vae
    with torch.no_grad():
        z = vae.encode(x)
    runs = {PASS: lambda: forward(patched), CLEAN: lambda: forward(clean)}
    runs |= {"encoding": torch.no_grad()(lambda: vae.encode(x)), "decoding": torch.no_grad()(lambda: vae.decode(z))}
    runs |= {f"a step, {mode}": lambda mode=mode: step(patched, mode, keep=True) for mode in MODES}
    seconds, outputs = in_turn(runs, args.repeats)
    if not outputs[PASS].any() or (args.steps == NOW and outputs[CLEAN].any()):
        raise AssertionError("the square is not masked, or the clean image is")
    print(json.dumps(seconds))


def main() -> None:
    flags = parser(__doc__, repeats=5)
    flags.set_defaults(device="cpu")  # where it runs, whatever there is
    flags.add_argument("--before", type=Path, help="the other checkout")
    flags.add_argument("--rounds", type=int, default=3, help="processes of each checkout (3)")
    flags.add_argument("--steps", type=int, default=4, help="of the other checkout's restoration (4)")
    flags.add_argument("--checkout", type=Path, help="measure this checkout alone")
    args = flags.parse_args()
    if args.checkout:
        work(args)
        return
    if not args.before:
        flags.error("give the other checkout: --before FOLDER")
    contenders = {"before": (args.before, args.steps), "now": (HERE, NOW)}
    rounds = [{who: measure(*of, args.repeats) for who, of in contenders.items()} for _ in range(args.rounds)]
    rows, figures = [], {}
    for name in rounds[0]["now"]:
        before, now = (statistics.median(r[who][name] for r in rounds) for who in contenders)
        rows.append((name, f"{before:.3f}", f"{now:.3f}", f"**{now / before:.2f}**"))
        figures[name] = {"before": before, "now": now, "ratio": now / before}
    report(("one image", "before, s", "now, s", "ratio"), rows, figures, args)


if __name__ == "__main__":
    main()
