"""What the command line of an evaluation takes: its flags, the presets' values, and what cannot stand together.

Torch is imported inside the functions, so that --help and mistakes on the command line answer at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffender.config import FULL, GRADIENT_MODES, THROUGH_MASK, WITH_PENALTY, Backward, RunOptions, TargetOptions
from diffender.utils.errors import InputError, nearest
from diffender.utils.options import change, check_read, flagged, option, part
from diffender.utils.progress import TRACKERS

if TYPE_CHECKING:
    from diffender.attacks.attack import Attack

GRADIENTS = {  # by defence
    "diffender": ("transfer", *(mode for mode in GRADIENT_MODES if mode != "auto")),
    "others": ("transfer", "bpda", "auto"),
}
OURS = {"diffender": "DIFFender", "hardened": "DIFFender, hardened"}  # what has DIFFender's settings and gradients
FIGURES = (1, 2, 3, 4, 5, 8, 9)  # of the paper
BUDGET = ("iters", "iters_undefended", "eot", "restarts", "queries", "queries_undefended")  # of attacks
# Flags that the figures and Table 7 settle themselves: to give one is a mistake.
ADAPTIVE = ("grad", "iters", "restarts", "verdicts")
FIXED = {f"figure {n}": (*ADAPTIVE, "eot") for n in (1, 3, 4, 5, 9)} | {
    "figure 2": ("verdicts",), "figure 8": ("theta",), "table 7": ADAPTIVE,
}  # fmt: skip
PRESETS = {  # what the options that default to none become
    "smoke": {
        "images": 2, "iters": 2, "iters_undefended": 20, "eot": 1, "restarts": 1, "grad": "bpda-mask", "verdicts": 3,
        "trust_images": 1, "queries": 20, "queries_undefended": 50, "curves": "off",
    },
    "laptop": {
        "images": 6, "iters": 40, "iters_undefended": 100, "eot": 2, "restarts": 1, "grad": "evade", "verdicts": 10,
        "trust_images": 2, "queries": 100, "queries_undefended": 600, "curves": "theta",
    },
    "paper": {  # Sec. 4.1: BPDA, EOT and the straight-through estimator; 64 hours are 4.5 s an image and step
        "images": 512, "iters": 100, "iters_undefended": 100, "eot": 2, "restarts": 1, "grad": "bpda-mask",
        "verdicts": 1, "trust_images": 8, "queries": 2400, "queries_undefended": 2400, "curves": "off",
    },
    "strong": {
        "images": 512, "iters": 100, "iters_undefended": 100, "eot": 10, "restarts": 3,
        "grad": ",".join(GRADIENTS["diffender"]), "verdicts": 10, "trust_images": 32,
        "queries": 2400, "queries_undefended": 2400, "curves": "theta",
    },
}  # fmt: skip


def budgeted(name: str, help: str, group: str | None = None, choices: tuple[str, ...] | None = None) -> Any:
    """An option whose default is the preset's, with all of them in its help."""
    values = ", ".join(f"{preset} {given[name]}" for preset, given in PRESETS.items())
    return option(None, f"{help} ({values})", choices, None if choices else 1, group=group)


@dataclass(frozen=True)
class PatchOptions:
    """Settings that only some attacks have. None keeps the attack's own default. See `Attack.flags`."""

    area: float | None = option(
        None,
        "Share of the image that the patch covers (default: 0.05, lavan 0.02; the paper does not say).",
        low=0.0005,
        high=0.9,
        group="the patch",
    )
    shape: str | None = option(
        None, "Shape of the patch of advp and lavan (default: square).", choices=("square", "circle")
    )
    location: str | None = option(
        None,
        "Where the patch of advp and lavan lies: at one random place (fixed, the default), in a corner, or at a new "
        "place for each EOT sample (eot).",
        choices=("fixed", "corner", "eot"),
    )
    targeted: bool | None = option(
        None, "Aim at a random class (default for lavan), or only away from the true one (advp)."
    )
    levels: int | None = option(
        None,
        "Values of each channel of the patch of advp and lavan (default: 256). 2: eight colours, too few for jedi.",
        low=2,
        high=256,
    )
    gdpa_mode: str | None = option(
        None, "Mode of gdpa (default: direct).", choices=("direct", "generator", "amortised")
    )
    generator: str | None = option(None, "File of the generator for amortised gdpa.")
    sticker: str | None = option(None, "Sticker of rhde. Without it: the best three.")
    patch_file: str | None = option(None, "Safetensors file with patches and targets, for --attack ready.")


@dataclass(frozen=True)
class Options:
    target: TargetOptions = part(TargetOptions())
    defense: str = option(
        "diffender", "Defence, a name of --list, with settings if any: jpeg:quality=50.", group="the defence"
    )
    preset: str = option(
        "laptop",
        "Budget of all that is not given: smoke, laptop, paper (Sec. 4.1 and its settings), strong (every gradient).",
        choices=tuple(PRESETS),
        group="the budget",
    )
    images: int | None = budgeted("images", "Number of images, of those that the classifier gets right.")
    attack: str = option(
        "advp", "Attacks, names of --list with commas; all: the paper's four; or none.", group="the attack"
    )
    grad: str | None = option(
        None,
        f"Gradients of the adaptive attack, separated by commas: {', '.join(GRADIENTS['diffender'])}; of other "
        f"defences {', '.join(GRADIENTS['others'])}; all: every one (smoke and paper bpda-mask, laptop evade, "
        "strong all)",
    )
    iters: int | None = budgeted("iters", "Steps of the adaptive attack; generations of rhde.")
    iters_undefended: int | None = budgeted("iters_undefended", "Steps of the attack on the classifier alone.")
    eot: int | None = budgeted("eot", "EOT samples in each step.")
    eot_batch: int = option(
        8,
        "EOT samples, and purifications of a verdict, in one batch. Takes memory. Changes results by rounding.",
        low=1,
    )
    restarts: int | None = budgeted("restarts", "Restarts of the attack. The best on fresh noise counts.")
    ste: str = option("identity", "Backward pass of the threshold.", choices=("identity", "sigmoid", "none"))
    backward: Backward = part(FULL, "ste_k", "evasion", "hide", "decoy")
    queries: int | None = budgeted("queries", "Queries of rhde and sparse-rs to the defence, for each image.")
    queries_undefended: int | None = budgeted(
        "queries_undefended", "Queries of rhde and sparse-rs to the classifier alone, for each image."
    )
    patch: PatchOptions = part(PatchOptions())
    verdicts: int | None = budgeted("verdicts", "Purifications that judge an image (paper: one).", group="the verdict")
    trust: str = option("quick", "Checks of the evaluation itself.", choices=("off", "quick", "full"))
    curves: str | None = budgeted(
        "curves",
        "Curves of the report over theta for these patches; all: also over the patch size, with new patches.",
        choices=("off", "theta", "all"),
    )
    trust_images: int | None = budgeted("trust_images", "Number of images for the checks.")
    table: int | None = option(
        None,
        "Make a table of the paper instead of a single run: 1 defences, 2 terms of the loss, 3 restoration, 4 prompts, "
        "5 classifiers, 6 faces, 7 filmed patches.",
        low=1,
        high=7,
        group="results",
    )
    rows: str | None = option(
        None, "Only these rows of a table, by name, separated by commas: jpeg,hardened,diffender. Without it: all."
    )
    figure: int | None = option(None, f"Make a figure of the paper: {', '.join(map(str, FIGURES))}.")
    folds: int = option(1, "Table 6: number of folds. In each, another image of every person is the probe.", low=1)
    frames: str | None = option(
        None, "Table 7 from photographs: a csv with the columns file, label, configuration and clean."
    )
    tuning_data: str = option("samples", "Table 2: photographs to tune prompts on, other ones than are evaluated.")
    run: RunOptions = part(RunOptions())
    batch_size: int = option(
        1, "Images per batch. A killed process loses one batch. Changes results by rounding.", low=1
    )
    shard: str = option(
        "0/1", "i/n: this process does image i, from 0, of every n. Shards share the folder that --name gives."
    )
    max_memory: float | None = option(None, "Memory limit in GiB. Sets --micro-batch.", low=0.5)
    name: str | None = option(None, "Folder under runs/. A run with the same configuration there is resumed.")
    track: str = option("none", "Tracker that receives the accuracies during the run.", choices=tuple(TRACKERS))
    dry_run: bool = option(False, "Print what would be done and what it would cost, and stop.")
    list: bool = option(False, "Print the names of models, classifiers, attacks, gradients and defences, and stop.")


def with_preset(opts: Options) -> Options:
    """The options with the preset's values where none were given; names in lower case, and `all` gradients by name."""
    opts = replace(opts, attack=tidy(opts.attack), defense=tidy(opts.defense, ":"))
    opts = opts if opts.grad is None else replace(opts, grad=tidy(opts.grad))
    opts = replace(opts, **{k: v for k, v in budget(opts, opts.preset).items() if getattr(opts, k) is None})
    if opts.preset == "strong" and opts.patch.targeted is None:  # LaVAN's own loss, to a random class, is the weaker
        opts = change(opts, targeted=False)
    return replace(opts, grad=",".join(gradients(opts))) if opts.grad == "all" else opts


def refuse_conflicts(opts: Options) -> None:
    """Raises InputError for gradients that do not exist, and for flags that cannot stand together. `opts` as given."""
    opts = with_preset(opts)
    allowed = gradients(opts)
    if unknown := sorted(set(kinds(opts)) - set(allowed)):
        raise InputError(
            f"--grad {', '.join(unknown)} is unknown for {opts.defense}; choose from {', '.join(allowed)}, with commas,"
            f" or all{nearest(unknown[0], allowed)}"
        )
    method, through = opts.target.defense.method, {"bpda-mask", "evade"} & set(kinds(opts))
    if not method.get("composite", True) and method.get("restore", True) and through:
        access = {cls.access for cls in attacks(opts).values()}
        given = "bpda, surrogate, full or full+loc" if "gradient" in access else "transfer"
        if "gradient" in access or ("queries" in access and "evade" in through):
            raise InputError(
                f"--grad {', '.join(sorted(through))} needs pixels that --no-composite repaints: give --grad {given}"
            )
    if shard_of(opts.shard)[1] > 1 and not (opts.name or opts.table or opts.figure):
        raise InputError(f"--shard {opts.shard} needs --name, the folder that the shards share")
    if opts.figure is not None and opts.figure not in FIGURES:
        raise InputError(f"--figure is {opts.figure}; choose from {', '.join(map(str, FIGURES))}")
    if opts.table and opts.figure:
        raise InputError(f"--table {opts.table} and --figure {opts.figure}: one at a time")
    memory = opts.target.defense.model
    if opts.max_memory is not None and (memory.micro_batch is not None or memory.keep):
        raise InputError("--max-memory sets --micro-batch and keeps no activations; leave out --micro-batch and --keep")
    if opts.frames and opts.table != 7:
        raise InputError("--frames is for --table 7, which judges photographs of printed patches")
    if opts.name is not None and not is_folder_within(opts.name):
        told = opts.name[:99].replace("\0", r"\0")
        raise InputError(f"--name is {told}; it is a folder within runs/: give a name of 1 to 255 bytes")
    if opts.patch.gdpa_mode == "amortised" and (opts.curves == "all" or opts.trust == "full"):
        raise InputError("--gdpa-mode amortised has a generator for one size: leave out --curves all and --trust full")
    if opts.curves == "theta" and opts.defense != "diffender":
        raise InputError("--curves theta is read by --defense diffender alone: add that, or leave it out")
    if opts.dry_run and (opts.figure or opts.table == 7):
        raise InputError("--dry-run is for single runs and for Tables 1 to 6; leave it out")
    if (opts.table or opts.figure) and opts.defense != "diffender":
        raise InputError(f"--defense {opts.defense}: tables and figures choose their defences; leave it out")


def is_folder_within(name: str) -> bool:
    """Whether this can be the name of a folder within another one."""
    parts = Path(name).parts
    lengths = [len(part.encode(errors="replace")) for part in parts]
    return (
        bool(parts) and max(lengths) < 256 and "\0" not in name and ".." not in parts and not Path(name).is_absolute()
    )


def tidy(names: str, until: str | None = None) -> str:
    """Names in lower case, without blanks; what follows `until` stays as it is."""
    head, sign, rest = names.partition(until) if until else (names, "", "")
    words = dict.fromkeys("".join(head.split()).lower().split(","))  # each once
    return ",".join(word for word in words if word) + sign + rest.strip()


def budget(opts: Options, preset: str) -> dict:
    """The values of a preset, as they are for this defence."""
    values = dict(PRESETS[preset])
    if not is_ours(opts):
        values |= {"grad": ",".join(GRADIENTS["others"][1:])}
    if opts.defense != "diffender":
        values |= {"curves": "off"}
    return values


def is_ours(opts: Options) -> bool:
    """Whether the defence is DIFFender, as published or hardened."""
    return opts.defense.partition(":")[0] in OURS


def gradients(opts: Options) -> tuple[str, ...]:
    """The kinds of gradient that this defence allows."""
    return GRADIENTS["diffender" if is_ours(opts) else "others"]


def kinds(opts: Options) -> list[str]:
    """The kinds of gradient in --grad, after `with_preset`."""
    assert opts.grad is not None
    return opts.grad.split(",")


def adaptive_kinds(opts: Options) -> list[str]:
    """The kinds by which the defence itself is attacked. Empty where no attack uses gradients."""
    takes = any(cls.access == "gradient" for cls in attacks(opts).values())
    return [kind for kind in kinds(opts) if takes and kind != "transfer"]


def attacks(opts: Options) -> dict[str, type[Attack]]:
    """The attacks asked for, by name. Raises InputError for others."""
    from diffender.attacks import ATTACKS, PAPER_ATTACKS
    from diffender.attacks.attack import Attack

    for name, cls in ATTACKS.items():
        if not (isinstance(cls, type) and issubclass(cls, Attack)):
            raise InputError(f"ATTACKS[{name!r}] is {cls!r}; an attack is a class that inherits from Attack")
        if not re.fullmatch(r"[a-z0-9-]+", name) or name in ("all", "none"):
            raise InputError(f"ATTACKS has {name!r}; names are of a-z, 0-9 and -, and neither all nor none")
    names = {"all": list(PAPER_ATTACKS), "none": []}.get(opts.attack, opts.attack.split(","))
    if unknown := sorted(set(names) - set(ATTACKS)):
        raise InputError(
            f"--attack {', '.join(unknown)} is unknown; choose from {', '.join(ATTACKS)}, with commas, or all or none"
            f"{nearest(unknown[0], ATTACKS)}"
        )
    return {name: ATTACKS[name] for name in names}


def refuse_unread(opts: Options) -> None:
    """Raises InputError for a flag that nothing in this command reads, and names what reads it. `opts` as given."""
    from diffender.attacks import ATTACKS, PAPER_ATTACKS
    from diffender.faces.identification import RECOGNIZERS

    filled, defense, number = with_preset(opts), opts.target.defense, opts.table
    ours, single = is_ours(filled), opts.table is None and opts.figure is None
    fixed = FIXED.get(f"figure {opts.figure}" if opts.figure else f"table {number}", ())
    chosen, runs = tuple(attacks(filled)), f"--attack is {opts.attack}"
    if not single:  # tables and Figure 8 share runs, which are named by all settings: they take flags of one another
        chosen = PAPER_ATTACKS if opts.figure == 8 or number not in (None, 7) else ("advp",)
        runs = f"{f'--table {number}' if number else f'--figure {opts.figure}'} runs {', '.join(chosen)}"
    if opts.frames:
        chosen, runs = (), "--frames attacks nothing"
    own = vars(opts.patch)
    if chosen:  # without an attack there is a budget still, which a preset may have given
        own = own | {flag: getattr(opts, flag) for flag in BUDGET}
    for flag, value in own.items():
        takers = [n for n, cls in ATTACKS.items() if flag.removesuffix("_undefended") in cls.reads()]
        if value is not None and not set(takers) & set(chosen):
            raise InputError(f"{flagged(flag)} {value} is read by {', '.join(takers)}, and {runs}: leave it out")
    access = {ATTACKS[name].access for name in chosen}
    through = set(kinds(filled)) if "gradient" in access and "grad" not in fixed else set()
    hiding = set(WITH_PENALTY) & through or ("queries" in access and "evade" in kinds(filled))
    searches = "queries" in access and kinds(filled) == ["transfer"]  # that do not hide
    readers = {  # flag: what reads it, and whether that is there
        "grad": (
            "attacks with gradients (as advp; a search reads transfer and evade)",
            "gradient" in access or hiding or searches or not chosen or opts.grad == "auto",
        ),
        "ste": (f"--grad {', '.join(THROUGH_MASK)}", set(THROUGH_MASK) & through),
        "ste_k": ("--ste sigmoid", opts.ste == "sigmoid"),
        **dict.fromkeys(("evasion", "hide", "decoy"), ("--grad full+loc and evade", hiding)),
        "generator": ("--gdpa-mode amortised", opts.patch.gdpa_mode == "amortised"),
        "folds": ("--table 6", number == 6),
        "rows": ("--table 1 to 6", number not in (None, 7)),
        "tuning_data": ("--table 2", number == 2),
        "classes": ("classifiers other than of faces", opts.target.classifier not in RECOGNIZERS),
        "fold": ("a run with a face recogniser", opts.target.classifier in RECOGNIZERS and single),
        **dict.fromkeys(("attack", "curves", "name"), ("runs without --table and --figure", single)),
        "trust": (
            "runs with an attack, without --table and --figure",
            single and (bool(chosen) or opts.trust == "off"),
        ),
        "classifier": ("tables other than 5", number != 5),
        "prompt": (
            "--defense diffender and hardened, and tables other than 2 and 4",
            (ours and number not in (2, 4)) or defense.prompt == "tuned",
        ),
        "trust_images": ("--trust quick and full", opts.trust != "off" and single),
        "prompts": (
            "--defense diffender --prompt tuned, and tables other than 2",
            ours and defense.prompt_kind == "tuned" and number != 2,
        ),
        **dict.fromkeys(defense.method, ("--defense diffender or hardened", ours)),
        **dict.fromkeys(("restore",) if number == 3 else (), ("tables other than 3", False)),
        **dict.fromkeys(fixed, ("runs and other tables and figures", False)),
        **dict.fromkeys(("images", "data", *BUDGET) if opts.frames else (), ("runs without --frames", False)),
    }
    check_read(opts, readers)


def shard_of(shard: str) -> tuple[int, int]:
    """ "i/n" as numbers. Raises InputError unless 0 <= i < n."""
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(f"--shard is {shard}; give i/n with i from 0 to n-1, as 0/2 and 1/2")
    return int(i), int(n)


def names() -> str:
    """Everything that a flag takes by name, one line for each flag."""
    from diffender.attacks import ATTACKS
    from diffender.classifiers.imagenet import CLASSIFIERS
    from diffender.defenses import DEFENSES
    from diffender.faces.identification import RECOGNIZERS
    from diffender.stable_diffusion.model import MODELS

    known = {
        "--model": MODELS,
        "--classifier": (*CLASSIFIERS, *RECOGNIZERS, "timm:TAG"),
        "--attack": (*ATTACKS, "all", "none"),
        "--grad": (*GRADIENTS["diffender"], "all"),
        "--grad of other defences": (*GRADIENTS["others"], "all"),
        "--defense": DEFENSES,
    }
    return "\n".join(f"{flag}: {', '.join(of)}" for flag, of in known.items())
