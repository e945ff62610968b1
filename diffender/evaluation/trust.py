"""Can the evaluation be trusted? Checks of the attack and its gradients, each with a measured figure, the
expected one and a verdict.

`quick` looks at gradients, noise, controls and masks of the first attack that has gradients; `full` also repeats it,
one setting changed at a time. A failed check does not stop a run: it is a red line in its table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from diffender.attacks import ATTACKS
from diffender.attacks.attack import Attack, attack_all, slices
from diffender.attacks.expectation import Attacked, Task, samples
from diffender.attacks.patch import margin, masks_for
from diffender.config import THROUGH_MASK, WITH_PENALTY, Backward
from diffender.defenses.hardened import Hardened
from diffender.evaluation.metrics import mcnemar
from diffender.evaluation.options import Options
from diffender.evaluation.verdicts import Plan, by_variant, file_names, load_attacked, strongest_of
from diffender.noise import generator
from diffender.pipeline import Defended, DIFFender, ours
from diffender.weights.prompts import contexts_for

DRAWS = 5  # purifications behind each accuracy of these checks
SPREAD_DRAWS = 8  # of gradients, behind the checks of their spread and of zeros
ENOUGH = 6  # images: of fewer, all may go one way by chance (McNemar, p >= 0.05)
BELOW = {  # of a gradient, the one that knows a little less; transfer for others
    "auto": "bpda", "bpda-mask": "bpda", "surrogate": "bpda-mask", "full": "bpda-mask", "full+loc": "full",
    "bpda": "transfer",
}  # fmt: skip
ACCEPT = {"advp": (0, 0.02), "lavan": (0, 0.15), "gdpa": (0, 0.05), "rhde": (0, 0.55)}  # undefended accuracy

FALLING = ("falling or flat, within 10 points", lambda s: s[-1] <= s[0] + 0.1)
SWEPT = {  # field of an attack: title, values to try given the usual one, what is expected, whether it is met
    "eot": ("EOT samples, equal steps", lambda _: (1, 2, 5), *FALLING),
    "iters": ("steps", lambda n: (max(1, n // 2), n, 2 * n), "twice the steps gain less than 10 points",
              lambda s: s[1] - s[2] < 0.1),
    "lr": ("step size", lambda _: (2 / 255, 4 / 255, 8 / 255, 13 / 255), "", lambda s: None),
    "restarts": ("restarts", lambda _: (1, 3), *FALLING),
}  # fmt: skip


class Check(NamedTuple):
    name: str
    figure: str
    wanted: str
    passed: bool | None  # None: nothing to pass, only to know


class Bench(NamedTuple):
    """What the checks work on."""

    task: Task  # few images, and the defended classifier
    plan: Plan  # the first attack of the run that has gradients, if one has
    records: Sequence[dict]  # of the run
    results: dict  # as summarised
    image: Tensor  # attacked by the run on the undefended classifier, (B, 3, S, S)
    mask: Tensor  # where, (B, 1, S, S)
    state: Tensor | None  # from where adaptive attacks start; `full` needs it
    kind: str | None  # of the last variant of the plan that uses gradients
    size: int = 1  # images side by side, as in the run: memory is reckoned for so many

    @property
    def adaptive(self) -> tuple[Attack, Defended]:
        """That variant's attack and victim."""
        assert self.kind is not None  # as the callers see to
        return self.plan.adaptive[self.kind]

    @property
    def target(self) -> Defended:
        return self.task.victim

    @property
    def parts(self) -> list[slice]:
        """The images, `size` at a time."""
        return slices(self.size, self.task.image_ids)

    def accuracy(self, x: Tensor, mask: Tensor | None = None) -> float:
        """Share of right answers over images and DRAWS purifications; or restorations under a mask (B, 1, S, S)."""
        right = []
        for rows in self.parts:
            part = self.task.part(rows)
            noises = [part.noise("trust verdict", k) for k in range(DRAWS)]
            if mask is None:
                readings = [logits for _, logits in self.target.looks(x[rows], noises)]
            else:
                repaint = self.target.defense.repaint
                readings = [self.target.classifier(repaint(x[rows], mask[rows], noise)) for noise in noises]
            right += [logits.argmax(dim=1).eq(part.y) for logits in readings]
        return torch.cat(right).cpu().double().mean().item()  # mps has no float64

    def attack(self, victim: Defended | None = None, init: Tensor | None = None, **changed: object) -> Attacked:
        """The adaptive attack again, with one thing changed."""
        attack, usual = self.adaptive
        start = self.state if init is None else init
        return attack_all(replace(attack, **changed), self.task._replace(victim=victim or usual), self.size, start)

    def attack_alone(self, **changed: object) -> Attacked:
        """The attack on the undefended classifier again."""
        task = self.task._replace(victim=self.target.undefended())
        return attack_all(replace(self.plan.base, **changed), task, self.size)


def trust_report(
    opts: Options, task: Task, plans: Sequence[Plan], records: Sequence[dict], results: dict, folder: Path
) -> list[dict]:
    """The checks of the run in `folder` that --trust asks for, as dictionaries; `task` holds the few images that they
    are made on, --batch-size of them at a time, and the defended classifier."""
    plan, target = next((plan for plan in plans if gradient_kind(plan)), plans[0]), task.victim
    saved = load_attacked(folder / "adv" / plan.name / "transfer", file_names(task.image_ids))
    image, mask = (t.to(task.x) for t in saved)
    kind = gradient_kind(plan)
    bench = Bench(task, plan, records, results, image, mask, None, kind, opts.batch_size)
    if opts.trust == "full" and kind is not None:
        bench = bench._replace(state=bench.attack_alone().state)
    alone = target.undefended_is == Defended.undefended_is  # else no classifier stands behind a defence
    found = [*(undefended_accuracy(bench, plans) if alone else ()), *controls(bench), *ladder(bench)]
    of_ours = isinstance(target.defense, DIFFender)
    if of_ours and not isinstance(target.defense, Hardened):
        found += noise_is_used(bench)
    if of_ours:
        found += masks(bench)
    if bench.kind is not None:
        found += [*zero_gradient(bench), *(gradient_health(bench) if of_ours else ()), *convergence(bench)]
        if opts.trust == "full":
            found += [one for check in (FULL if of_ours else FULL_OF_ANY) for one in check(bench)]
    return [check._asdict() for check in found]


def rounded(share: float) -> str:
    return f"{100 * share:.0f} %"


def gradient_kind(plan: Plan) -> str | None:
    """The last variant of a plan that uses gradients; None where none does."""
    return next((kind for kind in reversed(plan.adaptive) if plan.adaptive[kind][0].access == "gradient"), None)


def undefended_accuracy(bench: Bench, plans: Sequence[Plan]) -> Iterator[Check]:
    """An attack that does not break the undefended classifier is broken itself, if its patch is as large as usual; of
    other sizes the accuracy is only shown."""
    usual = {plan.name for plan in plans if plan.base.area == type(plan.base).area}
    for row in bench.results["rows"]:
        if row["gradient"] == "transfer" and row["attack"] in ACCEPT:
            low, high = ACCEPT[row["attack"]]
            p = row["undefended"]
            yield Check(
                f"{row['attack']} on the bare classifier",
                f"{rounded(p['accuracy'])} of {p['n']} right",
                f"{rounded(low)} to {rounded(high)} within its interval",
                p["low"] <= high and p["high"] >= low if row["attack"] in usual else None,
            )


def noise_is_used(bench: Bench) -> Iterator[Check]:
    """Two draws must differ where a patch is, or EOT averages copies of one gradient."""
    differ = 0.0
    for rows in bench.parts:
        part = bench.task.part(rows)
        a, b = (bench.target(bench.image[rows], part.noise("trust noise", k)) for k in (0, 1))
        differ = max(differ, (a - b).abs().amax().item())
    yield Check("the defence is random", f"logits differ by up to {differ:.2g} between draws", "above 0", differ > 0)


def controls(bench: Bench) -> Iterator[Check]:
    """Patches that nothing optimised, squares of the attack's size at places drawn by the seed; an attack must be worse
    for the defence."""
    area = bench.plan.base.area
    made = {k: ATTACKS[k](area=area)(bench.task).image for k in ("grey", "noise", "crop")}
    shares = {name: bench.accuracy(x) for name, x in made.items()}
    mine = [r for r in bench.records if r["id"] in bench.task.image_ids]
    least = mean(v.average for v in strongest_of(by_variant(mine).values(), [r["id"] for r in mine]))
    yield Check(
        "patches that nothing optimised",
        ", ".join(f"{k} {rounded(v)}" for k, v in shares.items()),
        f"at most 10 points below the attacks' {rounded(least)}",  # other draws of the noise are behind that
        min(shares.values()) >= least - 0.1,
    )


def masks(bench: Bench) -> Iterator[Check]:
    """The true mask restored bounds the defence from above; a random mask shows what painting costs."""
    oracle = bench.accuracy(bench.image, bench.mask)
    random = bench.accuracy(bench.task.x, masks_for(bench.task, "random mask", bench.mask.mean().item()))
    empty = bench.target.classifier(bench.image).argmax(dim=1).eq(bench.task.y).float().mean().item()
    wanted, passed = f"above the empty mask's {rounded(empty)}", oracle > empty
    if empty == 1:  # none of these patches fools the classifier
        wanted, passed = "", None
    yield Check("the true mask, restored", rounded(oracle), wanted, passed)
    yield Check("clean, a random mask of that area restored", rounded(random), "", None)


def ladder(bench: Bench) -> Iterator[Check]:
    """Knowing more must not make an attack weaker, beyond noise: each gradient beside the one below it in the run."""
    judged = by_variant(bench.records)
    for variant, found in judged.items():
        name, kind = variant.split("/")
        if kind == "transfer":
            continue
        below = BELOW.get(kind, "transfer")
        while f"{name}/{below}" not in judged:
            below = BELOW[below]
        pairs = [(found[i], judged[f"{name}/{below}"][i]) for i in found]
        singles = [(a.single, b.single) for a, b in pairs]
        mine, other = (mean(column) for column in zip(*singles, strict=True))
        wanted, passed = "not higher, beyond noise", mine <= other or mcnemar(singles) >= 0.05
        if len(pairs) < ENOUGH:
            wanted, passed = "", None
        yield Check(f"{name}, {kind} against {below}", f"{rounded(mine)} and {rounded(other)}", wanted, passed)


def gradients(bench: Bench, victim: Defended, n: int, purpose: str) -> Tensor:
    """Gradients of the margin inside the patch under n noises, (n, B, 3 S S)."""

    def of_part(rows: slice) -> Tensor:
        part, image, mask = bench.task.part(rows), bench.image[rows], bench.mask[rows]
        task = part._replace(victim=victim, loss=partial(margin, y=part.y))
        drawn = samples(task, lambda k: (image, mask, task.noise(purpose, k)), n)
        return torch.stack([(sample.gradient * mask).flatten(1) for sample in drawn])

    return torch.cat([of_part(rows) for rows in bench.parts], dim=1)


def zero_gradient(bench: Bench) -> Iterator[Check]:
    """Where the gradient is zero an attack by gradients stands still, and what it leaves right says nothing.

    Noise on pixels may leave some without gradient in one draw, by a clamp, so there a pixel has none if no draw gives
    it one. DIFFender's noise is on latents.
    """
    inside = bench.mask.expand(-1, 3, -1, -1).flatten(1) == 1
    draws = 1 if isinstance(bench.target.defense, DIFFender) else SPREAD_DRAWS
    found = gradients(bench, bench.adaptive[1], draws, "trust gradient")
    zeros = found.eq(0).all(dim=0)[inside].float().mean().item()
    yield Check("patch gradient exactly zero", f"{100 * zeros:.2g} % of pixels", "below 1 %", zeros < 0.01)


def gradient_health(bench: Bench) -> Iterator[Check]:
    """The part of the straight-through estimator, agreement with finite differences, spread."""
    attack, victim = bench.adaptive
    if victim.backward.mode in THROUGH_MASK:
        (gradient,) = gradients(bench, victim, 1, "trust gradient")
        cut = bench.target.under(replace(victim.backward, ste="none"))
        ratio = gradients(bench, cut, 1, "trust gradient").norm() / gradient.norm().clamp_min(1e-30)
        yield Check("its norm without the straight-through estimator", f"{ratio:.2g} of that with it", "", None)
    soft, first = bench.target.under(Backward(mode="full", ste="soft", ste_k=2.0)), bench.task.part(slice(1))
    noise = first.noise("trust finite differences")
    name = "exact gradient against finite differences, soft mask"
    yield exactness(name, bench, lambda x: margin(soft(x, noise), first.y))
    if victim.backward.mode in WITH_PENALTY and ours(bench.target).cfg.composite:
        yield hiding_gradient(bench)
    cosine = steadiness(gradients(bench, victim, SPREAD_DRAWS, "trust steadiness"), attack.eot * attack.averaged_steps)
    remembered = f" of {attack.averaged_steps:.0f} steps" if attack.averaged_steps > 1 else ""
    yield Check(
        f"two directions of the attack, each from {attack.eot} draws{remembered}, cosine",
        f"{cosine:.2f}",
        "at least 0.3: else raise --eot",
        cosine >= 0.3,
    )


def steadiness(gradients: Tensor, k: float) -> float:
    """The cosine that two means of k gradients each would have, mean over images, from n gradients (n, B, D).

    Inner products of different draws say how large the common part is. Those of a draw with itself add the noise, of
    which a mean of k has the k-th part.
    """
    n = len(gradients)
    products = torch.einsum("ibd,jbd->bij", gradients, gradients)
    alone = products.diagonal(dim1=1, dim2=2).mean(dim=1)
    common = ((products.sum(dim=(1, 2)) - n * alone) / (n * (n - 1))).clamp_min(0)
    return (common / (common + (alone - common) / k).clamp_min(1e-30)).mean().item()


def hiding_gradient(bench: Bench) -> Check:
    """The gradient of the penalty alone, by which a patch hides. Beside the classifier's an error would not show."""
    victim = bench.target.under(replace(bench.adaptive[1].backward, mode="evade"))
    noise = bench.task.part(slice(1)).noise("trust finite differences")
    name = "gradient that hides, against finite differences"
    return exactness(name, bench, lambda x: victim.with_penalty(x, noise, bench.mask[:1])[1])


def exactness(name: str, bench: Bench, value: Callable[[Tensor], Tensor]) -> Check:
    """Whether the gradient of value(x), (1,), of the first image is right."""
    x = 0.1 + 0.8 * bench.image[:1]  # away from the ends of the range
    error = finite_difference_error(value, x, bench.mask[:1])
    return Check(name, f"{100 * error:.2g} % off", "below 5 %", error < 0.05)


def finite_difference_error(value: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> float:
    """|FD - <g, d>| / |FD| of value(x) along the sign of its gradient within the mask; the best of four step widths,
    since curvature spoils wide ones and rounding narrow ones. Where the gradient is zero it is along random signs: 0 if
    the value does not change either, as under a window that hides the patch, else 1."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x).sum(), x)
    direction = gradient.sign() * mask
    if not direction.any():
        signs = torch.randint(2, x.shape, generator=generator("finite differences"))
        direction = (2 * signs.to(x) - 1) * mask
    slope = (gradient * direction).sum().item()
    errors = []
    for step in (2e-3, 2e-3 / 4, 2e-3 / 16, 2e-3 / 64):
        low, high = (value(x.detach() + sign * step * direction).sum().item() for sign in (-1, 1))
        fd = (high - low) / (2 * step)
        errors.append(abs(fd - slope) / max(abs(fd), 1e-12))
    return min(errors)


def convergence(bench: Bench) -> Iterator[Check]:
    """Whether the loss has levelled off, over the images that some purification still classifies correctly.

    On the other images more steps gain nothing.
    """
    attack, _ = bench.adaptive
    variant = f"{bench.plan.name}/{bench.kind}"
    made = {r["id"]: r["attacks"][variant]["loss"] for r in bench.records}
    if not all(made.values()):
        return  # made without steps, by a trained generator
    judged = by_variant(bench.records)[variant]
    curves = [curve for image_id, curve in made.items() if judged[image_id].average > 0]
    name = f"the loss over {attack.iters} {'steps' if attack.iters > 1 else 'step'}"
    if not curves:
        yield Check(name, "no image is left right", "", True)
        return
    curve = torch.tensor(curves).mean(dim=0)
    if len(curve) == 1:
        yield Check(name, "one step shows no fall", "falls: raise --iters", False)
        return
    fifth = max(1, len(curve) // 5)
    first, before, last = (part.mean().item() for part in (curve[:1], curve[-2 * fifth : -fifth], curve[-fifth:]))
    fall, late = first - last, before - last
    yield Check(
        f"{name}, images left right: {len(curves)}",
        f"falls by {fall:.2g}, of which {late:.2g} in the last fifth",
        "falls, at most a tenth of it late: else raise --iters",
        fall > 0 and late < 0.1 * fall,
    )


def sweep(field: str, bench: Bench) -> Iterator[Check]:
    """The attack again with other values of a field of SWEPT, where it has that."""
    attack, _ = bench.adaptive
    if not hasattr(attack, field):
        return
    title, values_by, wanted, judge = SWEPT[field]
    values = values_by(getattr(attack, field))
    shares = [bench.accuracy(bench.attack(**{field: value}).image) for value in values]
    text = ", ".join(f"{value:.3g}: {rounded(share)}" for value, share in zip(values, shares, strict=True))
    yield Check(title, text, wanted, judge(shares))


def fixed_noise(bench: Bench) -> Iterator[Check]:
    """Attack and judge on one and the same noise. The defence is then deterministic, and the attack must break it.

    `hardened` is left out: what its windows certify stays right even then.
    """
    if not hasattr(bench.adaptive[0], "fixed_noise") or isinstance(bench.target.defense, Hardened):
        return
    settings = {"eot": 1, "restarts": 1, "location": "fixed", "iters": max(40, bench.adaptive[0].iters)}
    made = bench.attack(fixed_noise=True, **settings)
    parts = [(made.image[rows], bench.task.part(rows)) for rows in bench.parts]
    right = torch.cat([bench.target(x, part.noise("attack 0")).argmax(dim=1).eq(part.y) for x, part in parts])
    right = right.float().mean().item()
    yield Check("one fixed noise, attacked and judged", rounded(right), "at most 20 %", right <= 0.2)


def size_sweep(bench: Bench) -> Iterator[Check]:
    """Patches smaller and larger than a fifth of the image. Of larger ones a part stays below theta 2."""
    shares, areas = [], (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    for area in areas:
        start = bench.attack_alone(area=area).state
        shares.append(bench.accuracy(bench.attack(init=start, area=area).image))
    text = ", ".join(f"{rounded(a)}: {rounded(s)}" for a, s in zip(areas, shares, strict=True))
    yield Check(
        "patch size", text, "falling, at most 10 % at half the image", shares[-1] <= 0.1 and shares[-1] <= shares[0]
    )


def ste_sweep(bench: Bench) -> Iterator[Check]:
    """Without the straight-through estimator the attack should be weaker."""
    if bench.adaptive[1].backward.mode not in THROUGH_MASK:
        return
    shares = {}
    for ste, k in (("none", 1.0), ("identity", 1.0), ("sigmoid", 1.0), ("sigmoid", 5.0)):
        backward = replace(bench.adaptive[1].backward, ste=ste, ste_k=k)
        victim = bench.target.under(backward)
        shares[ste if ste != "sigmoid" else f"sigmoid {k:g}"] = bench.accuracy(bench.attack(victim).image)
    text = ", ".join(f"{name}: {rounded(share)}" for name, share in shares.items())
    with_ste = min(share for name, share in shares.items() if name != "none")
    yield Check("straight-through estimator", text, "none is not the lowest", shares["none"] >= with_ste - 1e-9)


def transfer_matrix(bench: Bench) -> Iterator[Check]:
    """Patches made against the defence with other prompts, judged on this one."""
    defense, shares = bench.target.defense, {"own": bench.accuracy(bench.attack().image)}
    for prompt in ("empty", "manual"):
        other = defense.twin()
        other.contexts = contexts_for(prompt, defense.model)
        victim = Defended(other, bench.target.classifier, bench.adaptive[1].backward)
        shares[prompt] = bench.accuracy(bench.attack(victim).image)
    text = ", ".join(f"{name}: {rounded(share)}" for name, share in shares.items())
    yield Check(
        "patches from other prompts",
        text,
        "own is the lowest, within 10 points",
        shares["own"] <= min(shares.values()) + 0.1,
    )


def black_box(bench: Bench, queries: int = 200) -> Iterator[Check]:
    """A search without gradients must not beat the attack with them. Both start from what they found on the undefended
    classifier."""
    attack, undefended = ATTACKS["sparse-rs"](area=bench.plan.base.area, queries=queries), bench.target.undefended()
    start = attack_all(replace(attack, queries=5 * queries), bench.task._replace(victim=undefended), bench.size).state
    made = attack_all(attack, bench.task, bench.size, start)
    searched, own = bench.accuracy(made.image), bench.accuracy(bench.attack().image)
    yield Check(
        f"Sparse-RS, {queries} queries",
        f"{rounded(searched)}, gradients {rounded(own)}",
        "not lower than gradients",
        searched >= own - 1e-9,
    )


FULL_OF_ANY = (
    partial(sweep, "eot"), partial(sweep, "iters"), size_sweep, partial(sweep, "lr"), partial(sweep, "restarts"),
    black_box,
)  # fmt: skip
FULL = (*FULL_OF_ANY, fixed_noise, ste_sweep, transfer_matrix)
