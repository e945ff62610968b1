"""Every command in one place: python -m diffender COMMAND, or diffender COMMAND once the package is installed."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports shows no traceback; `run` listens again

import sys
from importlib import import_module

from diffender.utils.errors import InputError, nearest
from diffender.utils.options import run

COMMANDS = {
    "defend": ("diffender.photographs", "defend your own images"),
    "weights": ("diffender.weights.__main__", "fetch, convert or inspect checkpoints"),
    "report": ("diffender.report.__main__", "compare runs, write their pages, fill tables into documents"),
    "ablate": ("diffender.paper.ablate", "study the parts of the defence"),
    "certify": ("diffender.evaluation.certify", "PatchCleanser's certificate"),
    "faces": ("diffender.faces.__main__", "verify a face recogniser"),
    "pretrain": ("diffender.pretrain.__main__", "train the embedded model, Jedi's autoencoder, a universal patch"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__ + "\n\n" + "\n".join(f"    {name:10}{help}" for name, (_, help) in COMMANDS.items()))
        return
    if name in ("evaluate", "train"):
        more = "; from Python there is diffender.benchmark" if name == "evaluate" else ""
        raise InputError(f"{name} is a script in the repository: python {name}.py{more}")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    sys.argv = [f"diffender {name}", *sys.argv[2:]]  # what messages and records call the program
    import_module(COMMANDS[name][0]).main()


def entry() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    entry()
