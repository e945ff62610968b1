"""evaluate.py and train.py as the user runs them, of this checkout and of another one, in turn.

    git worktree add ../before COMMIT && python benchmarks/scripts.py --before ../before

Minutes to an hour: each script runs to its end in a folder of its own, defaults everywhere but for --rounds.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from common import in_turn, parser, report

HERE = Path(__file__).parents[1]
SCRIPTS = {"evaluate.py": ("evaluate.py",), "train.py": ("train.py", "--out", "prompts.safetensors")}


def run(checkout: Path, script: str, *flags: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, checkout.resolve() / script, *flags]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    flags = parser(__doc__, repeats=0)
    flags.add_argument("--before", type=Path, required=True, help="the other checkout")
    flags.add_argument("--only", choices=tuple(SCRIPTS), help="one of the two")
    flags.add_argument("--rounds", type=int, help="of train.py, in place of its default")
    args = flags.parse_args()
    rows, figures = [], {}
    for name in [args.only] if args.only else SCRIPTS:
        few = ("--rounds", str(args.rounds)) if args.rounds and name == "train.py" else ()
        contenders = {"before": args.before, "now": HERE}
        runs = {who: lambda c=checkout, n=name, f=few: run(c, *SCRIPTS[n], *f) for who, checkout in contenders.items()}
        seconds, _ = in_turn(runs, args.repeats)
        figures[name] = seconds
        rows.append(
            (
                " ".join(("python", name, *few)),
                *(f"{s:.0f}" for s in seconds.values()),
                f"**{seconds['now'] / seconds['before']:.2f}**",
            )
        )
        print(" ".join(rows[-1]), flush=True)
    report(("", "before, s", "now, s", "ratio"), rows, figures, args)


if __name__ == "__main__":
    main()
