"""Tables and figures of the paper: rows, pooling, every format, and mistakes. Whole runs of them are slow tests."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffender.attacks.expectation import Task
from diffender.classifiers.dataset import Batch, sample_items
from diffender.config import PAPER, DIFFenderConfig
from diffender.defenses import DEFENSES, parse_defense
from diffender.defenses.fill import grey
from diffender.evaluation.options import FIGURES, Options, is_ours, with_preset
from diffender.evaluation.records import append_records, read_finished
from diffender.evaluation.run import Experiment, resolved
from diffender.evaluation.verdicts import Verdict
from diffender.noise import generator
from diffender.paper import controls as controlled
from diffender.paper import figures, filming, tables
from diffender.paper.ablate import Options as AblationOptions
from diffender.paper.controls import FILLED, controls, elsewhere, look
from diffender.paper.figures import DRAWN
from diffender.paper.physical import CONFIGURATIONS, Filmed, Pose, draw_frame, photograph, print_patch
from diffender.paper.quoted import COLUMNS, QUOTED
from diffender.paper.studies import Setting, beside_base, measure, refuse_to_replace, show
from diffender.paper.tables import (
    NAMES,
    Line,
    by_column,
    chosen_rows,
    columns,
    csv_table,
    in_common,
    latex_table,
    leaders,
    markdown,
    paired,
    pool,
    readings,
    run_table,
    undefended,
)
from diffender.pipeline import Defended, DIFFender, Localized, Purified
from diffender.report.chart import draw_knowledge, draw_steps, known
from diffender.report.page import table_page
from diffender.stable_diffusion.vae import Posterior
from diffender.utils.errors import InputError
from diffender.utils.files import write_json
from diffender.utils.images import save_png
from diffender.utils.options import change
from diffender.weights.prompts import contexts_for
from tests.conftest import ROOT, SHARED

RIGHT, WRONG = Verdict(1.0, 0.7, 0.0, 0.0), Verdict(0.0, 0.5, 0.0, 1.0)  # at first: later purifications differ


def line(key, right, of=4, classifier="efficientnet_lite0"):
    verdicts = [RIGHT] * right + [WRONG] * (of - right)
    return Line(classifier, key, dict.fromkeys(COLUMNS, verdicts))


def test_quoted_numbers_are_in_the_paper():
    path = SHARED / "reference" / "paper.txt"
    if not path.is_file():
        pytest.skip("the paper's text is not part of the repository")
    flat = " ".join(path.read_text().split())
    for models in QUOTED.values():
        for rows in models.values():
            for numbers in rows.values():
                assert " ".join(f"{n:.1f}" for n in numbers) in flat


@pytest.mark.parametrize("number", [1, 3, 4, 5, 6])
def test_rows_are_those_of_the_paper(number):
    rows = chosen_rows(number, Options())
    quoted = set().union(*QUOTED[number].values())
    beside = {"resize", "vae", "jedi-own", "hardened"}
    assert {key for key, _ in rows} - beside == quoted - {"undefended"}
    for key, changed in rows:
        assert key in NAMES
        opts = with_preset(change(Options(), **changed))
        assert parse_defense(opts.defense)[0] in DEFENSES
        assert opts.grad == ("evade" if is_ours(opts) else "bpda,auto")
    assert len(columns(number)) == len(next(iter(next(iter(QUOTED[number].values())).values())))


def test_table_in_every_format():
    lines = [line("undefended", 0), line("vae", 4), line("jpeg", 1), line("diffender", 3)]
    text = markdown(1, lines)
    assert "| DIFFender | 75.0 (3/4; 30-95) = |" in text
    assert "efficientnet" not in text  # it is the only classifier
    several = markdown(5, [line("diffender", 3), line("diffender", 2, classifier="efficientnet_lite1")])
    assert "| efficientnet_lite1 | DIFFender | 50.0 (2/4; 15-85) |" in several
    assert "100.0 (4/4; 51-100) |" in text  # a control is no defence
    assert "| 88.3 / 94.5 |" in text
    rows = list(csv.DictReader(io.StringIO(csv_table(lines))))
    assert len(rows) == 4 * 5 * 4
    worst = [r for r in rows if (r["defence"], r["attack"], r["verdict"]) == ("jpeg", "advp", "average")]
    assert float(worst[0]["accuracy"]) == pytest.approx((0.7 + 3 * 0.5) / 4)
    latex = latex_table(1, lines)
    assert r"efficientnet\_lite0 & DIFFender & 75.0" in latex
    assert latex.count(r"\\") == 5


@pytest.mark.parametrize(("right", "told"), [(6, True), (5, False)])
def test_bold_is_first_by_a_paired_test(right, told):
    """6 images against none are p = 0.03, 5 are p = 0.06."""
    text = markdown(1, [line("jpeg", 0, of=8), line("diffender", right, of=8)])
    assert (f"**{100 * right / 8:.1f} ({right}/8" in text) == told
    assert ("0.0 (0/8; 0-32) =" in text) != told


def test_first_is_the_defence_that_reads_most_images_right():
    """Not the one that reads the first image right."""
    one, most = line("jpeg", 1, of=16), line("diffender", 15, of=16)
    most = most._replace(verdicts={column: found[::-1] for column, found in most.verdicts.items()})
    assert leaders([one, most], most, "clean") == ["diffender"]


def test_defences_are_paired_with_diffender_attacked_alike():
    """Only defences are, and only with DIFFender before the same classifier and under the same gradients."""
    several = [line("undefended", 0, of=8), line("vae", 8, of=8), line("jpeg", 1, of=8), line("diffender", 7, of=8)]
    alike = [line("jpeg", 8, of=8)._replace(reading="bpda"), line("diffender", 2, of=8)._replace(reading="bpda")]
    proven = line("hardened", 8, of=8)._replace(reading="certified")
    text = paired(1, [*several, *alike, proven, line("jpeg", 8, of=8, classifier="another")])
    assert text.startswith("\n| beside DIFFender | clean | advp | lavan | gdpa | rhde |\n")
    rows = [row for row in text.splitlines() if row.startswith("| JPEG")]
    assert len(rows) == 2 and not any(word in text for word in ("Undefended", "control", "hardened"))
    assert rows[0].endswith(" | 0 : 6 (p = 0.031) |") and rows[1].endswith(" | 6 : 0 (p = 0.031) |")
    assert "attacked by transfer and bpda alone" in rows[1]
    assert paired(1, several[:2] + several[3:]) == "", "nothing to compare"
    text = paired(5, [several[0], several[-1], alike[-1]])  # there, beside no defence
    assert text.startswith("\n| undefended, beside | clean |")
    rows = text.splitlines()[3:5]
    assert rows[0].startswith("| efficientnet_lite0, DIFFender | 0 : 7 (p = 0.016) |")
    assert rows[1].startswith(
        "| efficientnet_lite0, DIFFender, attacked by transfer and bpda alone | 0 : 2 (p = 0.5) |"
    )


def test_figure_8_shows_bpda_beside_the_strongest(tmp_path, monkeypatch):
    """A column for each way to be attacked; clean images once, and thetas in their order."""
    rows = [Line("net", "diffender", {"clean": [RIGHT] * 2, "advp": [v, WRONG]}) for v in (WRONG, WRONG, RIGHT)]
    bpda = [line._replace(verdicts=line.verdicts | {"advp": [RIGHT] * 2}, reading="bpda") for line in rows]
    beside = Line("net", "undefended", {"clean": [RIGHT], "advp": [WRONG]})
    monkeypatch.setattr(figures, "run_rows", lambda rows, opts: [beside, *rows_made])
    rows_made = [*rows, *bpda]
    text = figures.figure_8(Options(), tmp_path)
    assert text.startswith("| theta | clean | advp | advp, attacked by transfer and bpda alone |\n")
    assert "| 1.5 | 100.0 (2/2; 34-100), p = 1 | 0.0 (0/2; 0-66), p = 1 | 100.0 (2/2; 34-100), p = 1 |" in text
    assert "| 2.5 | 100.0 (2/2; 34-100), p = 1 | 50.0 (1/2; 9-91), p = 1 | 100.0 (2/2; 34-100), p = 1 |" in text
    assert "\n2 images, Wilson" in text and (tmp_path / "figure.png").is_file()
    rows_made = rows
    assert "bpda" not in figures.figure_8(Options(), tmp_path)
    monkeypatch.setattr(figures, "run_rows", lambda rows, opts: [])
    assert figures.figure_8(Options(), tmp_path) == "", "other shards are at work"


def test_every_figure_has_a_function():
    assert tuple(DRAWN) == FIGURES


def test_rows_by_name():
    opts = change(Options(), rows="jpeg, diffender")
    assert [key for key, _ in chosen_rows(1, opts)] == ["jpeg", "diffender"]
    with pytest.raises(InputError, match=r"--rows jpg: table 1 has resize, .*nearest: jpeg"):
        chosen_rows(1, change(opts, rows="jpg"))
    with pytest.raises(InputError, match="--rows mask: table 2 has without mask, "):  # and tunes nothing before
        chosen_rows(2, change(opts, rows="mask", dry_run=True))


def test_readings_of_a_run(tmp_path):
    """Under the paper's gradient alone, and what is certified, in lines of their own that compete with no other."""
    variants = {"transfer": (1, True), "bpda": (0, True), "evade": (0, True)}
    found = {f"advp/{kind}": {"defended": [label], "certified": c} for kind, (label, c) in variants.items()}
    append_records(tmp_path / "per_image.jsonl", [{"id": "a", "label": 1, "defended": [1], "attacks": found}])
    opts = change(Options(), grad="bpda,evade", defense="hardened")
    run = SimpleNamespace(opts=opts, folder=tmp_path, plans=[SimpleNamespace(name="advp")], target=SimpleNamespace())
    run.target.defense = SimpleNamespace(certified=lambda x, labels, patch: [])
    assert by_column(run, ["a"])["advp"][0].single == 0
    told = readings("hardened", run, ["a"])
    assert {name: columns["advp"][0].single for name, columns in told.items()} == {"bpda": 0, "certified": 1}
    found["advp/bpda"]["certified"] = False
    append_records(tmp_path / "per_image.jsonl", [{"id": "b", "label": 1, "defended": [1], "attacks": found}])
    assert readings("hardened", run, ["b"])["certified"]["advp"][0].single == 0, "not for every patch"
    run.target.defense = None
    assert list(readings("jpeg", run, ["a"])) == ["bpda"]
    seen = {key: readings(key, run, ["a"])["bpda"]["advp"][0].single for key in ("jpeg", "fnc")}
    assert seen == {"jpeg": 0, "fnc": 1}, "FNC lies within the classifier: its bpda knows it"
    assert readings("jpeg", SimpleNamespace(opts=change(opts, grad="evade"), target=run.target), ["a"]) == {}
    lines = [line("jpeg", 0, of=8), line("hardened", 8, of=8), line("hardened", 8, of=8)._replace(reading="certified")]
    text = markdown(1, lines)
    assert "| DIFFender, hardened, certified at the patch's place | 100.0 (8/8; 68-100) |" in text
    assert "| DIFFender, hardened | **100.0 (8/8; 68-100)** |" in text


def test_the_undefended_line_is_of_the_classifier_alone_where_rows_are_other_defences(tmp_path, monkeypatch):
    attacks = {"advp/transfer": {"undefended": 2}, "advp/bpda": {"undefended": 1}}  # made on it, and on a defence
    append_records(tmp_path / "per_image.jsonl", [{"id": "a", "label": 1, "undefended": 1, "attacks": attacks}])
    found = undefended(SimpleNamespace(folder=tmp_path, plans=[SimpleNamespace(name="advp")]), ["a"])
    assert {name: verdicts[0].single for name, verdicts in found.items()} == {"clean": 1, "advp": 0}
    monkeypatch.setattr(tables, "run_rows", lambda rows, *_, **how: ["undefended", *(key for key, _ in rows)])
    first = {n: tables.run_block(n, Options(), "efficientnet_lite0", 0)[0] for n in (1, 3, 4, 5, 6)}
    assert first == {1: "undefended", 3: "NR", 4: "EP", 5: "undefended", 6: "undefended"}


def test_a_block_is_of_its_classifier_and_fold(monkeypatch):
    asked = []
    told = lambda rows, opts, **_: asked.append((opts.target.classifier, opts.target.fold, opts.attack)) or []  # noqa: E731
    monkeypatch.setattr(tables, "run_rows", told)
    run_table(5, Options())
    run_table(6, change(Options(), classifier="facenet", folds=2))
    nets = [(f"efficientnet_lite{i}", 0, "advp,lavan,gdpa,rhde") for i in range(3)]
    assert asked == [*nets, ("facenet", 0, "gdpa,rhde"), ("facenet", 1, "gdpa,rhde")]


def test_a_run_with_two_readings_costs_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append_records(tmp_path / "per_image.jsonl", [{"id": "a", "seconds": 3600.0, "unet_evaluations": 5}])
    write_json(tmp_path / "results.json", {"ids": ["a"]})
    usual = line("diffender", 1)._replace(run=tmp_path)
    monkeypatch.setattr(tables, "run_block", lambda *_: [usual, usual._replace(reading="bpda")])
    assert ", 1.0 h in all processes together and 5 UNet evaluations on " in run_table(3, Options())
    run_table(3, change(Options(), rows="NR, diffender"))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"table3-laptop", "table3-laptop-NR+diffender"}


def test_a_folder_is_named_by_its_settings():
    names = [tables.named(with_preset(change(Options(), seed=seed)), "jpeg").name for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_a_new_flag_renames_no_folder(monkeypatch):
    """As long as it is not given. The committed folders bear the names of their settings."""
    usual = tables.named(Options(), "jpeg").name
    monkeypatch.setattr(tables, "resolved", lambda opts: resolved(opts) | {"new": None})
    assert tables.named(Options(), "jpeg").name == usual
    for path in sorted((ROOT / "results/tables").glob("*/config.json")):
        monkeypatch.setattr(tables, "resolved", lambda opts, path=path: json.loads(path.read_text("utf-8")))
        assert tables.named(Options(), "").name.rpartition("-")[2] == path.parent.name.rpartition("-")[2], path


def test_the_ablations_prompts_are_each_tuned_without_one_term(monkeypatch):
    monkeypatch.setattr(tables, "retuned", lambda opts, without: without)
    left_out = {key: changed["prompts"] for key, changed in chosen_rows(2, Options())}
    assert left_out == {"without mask": "mask", "without feature": "feature", "without l1": "l1", "diffender": "none"}


def test_other_weights_have_prompts_tuned_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "is_first", lambda: False)
    made = []
    for weights in "aab":
        monkeypatch.setattr(tables, "hashes_of", lambda *_, weights=weights, **__: {"weights": weights})
        made.append(tables.retuned(Options(), "mask"))
    assert made[0] == made[1] != made[2]


def test_other_photographs_have_prompts_tuned_anew(tmp_path, monkeypatch):
    """The photographs count, and not where they lie; nor how many latents are in a pass."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "is_first", lambda: False)
    for folder, colours in {"a": "rg", "b": "rg", "c": "rb"}.items():
        for name, colour in zip("xy", colours, strict=True):
            save_png(torch.eye(3)["rgb".index(colour)].view(3, 1, 1).expand(3, 8, 8), tmp_path / folder / f"{name}.png")
    a, b, c = (tables.retuned(change(Options(), tuning_data=str(tmp_path / name)), "mask") for name in "abc")
    assert a == b != c
    assert tables.retuned(change(Options(), tuning_data=str(tmp_path / "a"), micro_batch=4, keep=False), "mask") == a


def test_no_defence_is_first_for_want_of_others():
    lines = [line("resize", 0), line("jpeg", 0), line("hardened", 0)]
    assert in_common(lines, [{"bpda": {}}, {"bpda": {}}, {"bpda": {}, "certified": {}}]) == {"bpda", "certified"}
    assert in_common(lines, [{"bpda": {}}, {"bpda": {}}, {"certified": {}}]) == {"certified"}


def test_knowing_more_is_never_worth_less(tmp_path):
    attacks = {"advp/transfer": [1, 1, 2], "advp/bpda": [1, 2, 1], "advp/evade": [1, 2, 1], "gdpa/transfer": [2, 2, 2]}
    records = [
        {"id": str(i), "label": 1, "attacks": {v: {"defended": [seen[i]]} for v, seen in attacks.items()}}
        for i in range(3)
    ]
    assert {stage: p["right"] for stage, p in known(records).items()} == {0: 2, 1: 1, 4: 1}
    assert {stage: p["right"] for stage, p in known(records, within=True).items()} == {0: 2, 4: 1}
    twice = [r | {"attacks": {"advp/transfer": {"defended": [1, 2]}}} for r in records]
    assert known(twice)[0]["right"] == 3, "of first purifications"
    for record in records:
        del record["attacks"]["advp/bpda"]
    assert {stage: p["right"] for stage, p in known(records).items()} == {0: 2, 4: 1}  # no point without its attack
    append_records(tmp_path / "per_image.jsonl", records)
    write_json(tmp_path / "results.json", {"ids": ["0", "1"]})
    assert [r["id"] for r in read_finished(tmp_path)[1]] == ["0", "1"]
    write_json(tmp_path / "config.json", {"defense": "diffender", "iters": 10, "eot": 1})
    draw_knowledge([tmp_path, tmp_path], tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").size == (990, 462)


def test_losses_are_drawn_of_each_attack_on_the_defence(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("diffender.report.chart.save_figure", lambda figure, path: drawn.append(figure))
    attacks = [
        {"advp/transfer": {"loss": [9, 9]}, "advp/bpda": {"loss": [2 * i, i]}, "rhde/queries": {}} for i in (0, 1)
    ]
    append_records(tmp_path / "per_image.jsonl", [{"id": str(i), "attacks": a} for i, a in enumerate(attacks)])
    write_json(tmp_path / "config.json", {"iters": 40})
    draw_steps(tmp_path, tmp_path / "steps.png")
    (axis,) = drawn[0].axes
    assert axis.get_title() == "advp/bpda"
    assert axis.lines[0].get_xydata().tolist() == [[0, 1], [100, 0.5]]


def test_a_table_as_a_page(tmp_path):
    lines = [line("jpeg", 0, of=8), line("diffender", 8, of=8)]
    text = markdown(1, lines) + "\n`python <x>`: what was run.\n" + paired(1, lines)
    html = table_page("Table 1", text, {"ours": tmp_path / "a b"}, tmp_path)
    assert '<a href="a%20b/report.html">ours</a>' in html
    assert (
        '<td><b>100.0 <span class="whole">(8/8; 68-100)</span></b></td>' in html
        and "python &lt;x&gt;: what was run." in html
    )
    first, second = html.split("<h2>")[1:3]
    assert first.startswith("Accuracy") and "0 : 8" not in first and "Images that" not in first
    assert second.startswith("Beside DIFFender") and "DIFFender alone reads right" in second
    assert '<td>0 : 8 <span class="whole">(p = 0.0078)</span></td>' in second
    assert html.count("<tr>") == 3 + 2


@pytest.mark.parametrize(("preset", "told"), [("laptop", False), ("strong", True)])
def test_a_table_says_that_no_attack_is_targeted(preset, told, monkeypatch):
    """Also where a preset makes it so."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--table", "3"])
    assert ("no attack targeted" in tables.notes(3, Options(preset=preset), [line("diffender", 1)], "1 h")) == told


def test_folds_are_pooled():
    both = pool([line("jpeg", 1), line("diffender", 4), line("jpeg", 2)])
    assert [(found.key, len(found.verdicts["advp"])) for found in both] == [("jpeg", 8), ("diffender", 4)]
    apart = [line("jpeg", 1), line("jpeg", 2, classifier="another"), line("jpeg", 3)._replace(reading="bpda")]
    assert pool(apart) == apart, "neither classifiers nor readings"


def test_controls_see_what_each_fill_leaves(tmp_path, model, classifier, photos, monkeypatch):
    x, ids = photos[:2], ["a", "b/c"]
    y = classifier(x).argmax(dim=1)
    mask = torch.zeros(2, 1, 224, 224)
    mask[..., 60:200, 40:180] = 1
    for name, image, m in zip(("a", "b__c"), x * (1 - mask), mask, strict=True):
        save_png(image, tmp_path / "adv" / "advp" / "transfer" / f"{name}.png")
        save_png(m, tmp_path / "adv" / "advp" / "transfer" / f"{name}_mask.png")
    cfg = DIFFenderConfig(steps=1, draws=1, guidance=1.0)
    target = Defended(DIFFender(model, contexts_for("manual", model), cfg), classifier)
    found = controls(target, tmp_path, ["advp"], Batch(ids, x, y, []), 0)
    with monkeypatch.context() as m:
        m.setattr("diffender.paper.controls.look", None)  # what is there is not made again
        assert controls(target, tmp_path, ["advp"], Batch(ids, x, y, []), 0) == found
    assert list(found) == [f"{whose} {fill}" for whose in ("true", "random") for fill in FILLED]
    assert all(key in NAMES for key in found)
    assert [v.single for v in found["true harmonic"]["clean"]] == [1, 1]  # nothing is covered
    there = (classifier(grey(x, mask)).argmax(dim=1) == y).tolist()
    assert [v.single for v in found["true grey"]["advp"]] == there
    moved = torch.cat([elsewhere(m, i, 0) for m, i in zip(mask.split(1), ids, strict=True)])
    assert torch.equal(moved.sum(dim=(1, 2, 3)), mask.sum(dim=(1, 2, 3)))
    assert not torch.equal(moved[0], moved[1])
    for corner in (0, 87, 174):  # wherever a patch of 5 % lies, the other one lies apart from it, in one piece
        small = torch.zeros(1, 1, 224, 224)
        small[..., corner : corner + 50, 174 - corner : 224 - corner] = 1
        (other,) = elsewhere(small, "a", corner)
        assert (other * small[0]).sum() == 0
        assert other[0].any(dim=1).sum() == other[0].any(dim=0).sum() == 50
        assert other[0].any(dim=1).nonzero().diff(dim=0).max() == 1
    large = torch.zeros(1, 1, 16, 16)
    large[..., :10, :10] = 1
    assert (elsewhere(large, "a", 0) * large).sum() <= 20, "16 is the least"
    cut = (classifier(grey(x, moved)).argmax(dim=1) == y).tolist()
    assert [v.single for v in found["random grey"]["clean"]] == cut


def test_random_masks_of_controls_lie_apart_from_true_ones(tmp_path, monkeypatch):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 2:6, 2:6] = 1
    for name, image in (("a.png", torch.rand(3, 16, 16)), ("a_mask.png", mask[0])):
        save_png(image, tmp_path / "adv" / "advp" / "transfer" / name)
    monkeypatch.setattr(controlled, "seen", lambda target, fill, x, m, *_: (m.sum().item(), (m * mask).sum().item()))
    found = look(None, tmp_path, ["advp"], torch.rand(1, 3, 16, 16), "a", 0)
    assert found["true grey"] == {"clean": (0, 0), "advp": (16, 16)}
    assert found["random grey"] == {"clean": (16, 0), "advp": (16, 0)}


def test_a_part_is_measured_by_hand():
    """A defence that finds white pixels and paints them grey; a classifier that is right where nothing is grey."""

    def localize(x, noise):
        mask = (x.amax(dim=1, keepdim=True) == 1).float()
        return Localized(mask, F.avg_pool2d(mask, 4) + 1, mask)

    def judge(x):
        return torch.stack([(x == 0.5).flatten(1).any(dim=1).float(), torch.full((len(x),), 0.5)], dim=1)

    defense = SimpleNamespace(localize=localize, sample_noise=lambda *_: None)
    defense.repaint = lambda x, mask, noise: torch.where(mask == 1, 0.5, x)
    x, mask = torch.zeros(3, 3, 16, 16), torch.zeros(3, 1, 16, 16)
    mask[0, :, :8, :8] = mask[1, :, 8:, 8:] = mask[2, :, :4, :4] = 1
    image = (x + mask).clamp(0, 1)
    image[2, :, 12:, 12:] = 1  # a false alarm
    batch, attacked = Batch(["a", "b", "c"], x, torch.ones(3).long(), []), SimpleNamespace(image=image, mask=mask)
    target, setting = SimpleNamespace(defense=defense, classifier=judge), Setting("s", "manual", PAPER)
    told = measure(AblationOptions(batch_size=2), "parts", target, setting, batch, attacked)
    assert [told[k] for k in ("clean_right", "l1_patch")] == pytest.approx([1, 0.5]) and told["right"] == [0, 0, 0]
    assert [told[k] for k in ("inside", "outside")] == pytest.approx([2, (1 + 1 + 16 / 15) / 3])
    auc = torch.tensor([1, 1, 1 - 0.5 / 15])
    assert [told["auc"], told["auc_error"]] == pytest.approx([auc.mean().item(), auc.std().item() / 3**0.5])


def test_a_study_writes_over_no_other_results(tmp_path):
    told, path = {"options": {"seed": 0, "images": 4}, "sha256": {"model": ["a"]}}, tmp_path / "results.json"
    refuse_to_replace(tmp_path, told)
    path.write_text(json.dumps(told | {"choices": []}))
    refuse_to_replace(tmp_path, told)
    for other in (told | {"options": {"seed": 1}}, {"command": "x"}, [], {"options": None}):
        path.write_text(json.dumps(other))
        with pytest.raises(InputError, match="holds other results"):
            refuse_to_replace(tmp_path, told)


def test_settings_are_paired_with_the_usual_one():
    """Six photographs of eight that it alone reads right are p = 0.03."""
    rows = [{"setting": "EP", "right": [0] * 8}, {"setting": "tuned prompts", "right": [1] * 6 + [0] * 2}]
    assert beside_base(rows) == ({"EP": "0.031", "tuned prompts": ""}, "tuned prompts")


def test_what_the_vae_keeps_is_told_in_decibels(tmp_path):
    """An error of 0.1 is 20 dB. The VAE sees images of the size that the defence works at."""
    x, mask = torch.full((2, 3, 20, 20), 0.5), torch.zeros(2, 1, 20, 20)

    class Plain:
        model = SimpleNamespace(latents=Posterior.sample, decode=lambda z: z + 0.1)
        posterior = staticmethod(lambda x: Posterior(F.interpolate(x, (16, 16)), torch.zeros(2, 3, 16, 16)))
        sample_noise, repaint = (lambda *_: None), (lambda self, x, mask, noise: x)

        def __call__(self, x, noise):
            return Purified(x, mask, mask[..., :4, :4], mask)

    def judge(x):
        return torch.eye(2)[:1].expand(len(x), -1)

    batch, attacked = Batch(["a", "b"], x, torch.tensor([1, 0]), []), SimpleNamespace(image=x, mask=mask)
    told = show(AblationOptions(out=str(tmp_path)), Plain(), judge, batch, attacked)
    assert told == pytest.approx({"psnr": 20, "round_trip_right": 0.5}, rel=1e-4)


def test_frames_are_graded_each_by_its_own_picture():
    black, white = torch.zeros(1, 1), torch.ones(1, 1)

    def judge(x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)

    for clean, attacked, purified in ((white, black, white), (black, white, black), (white, white, black)):
        told = filming.grade(judge, filming.Shot(clean, attacked), purified, 1)
        assert list(told) == ["clean", "undefended", "defended"]
        assert list(told.values()) == [bool(image.any()) for image in (clean, attacked, purified)]


def test_a_frame_shows_the_scene_and_the_printed_patch_alike(monkeypatch):
    monkeypatch.setattr(filming, "JPEG", lambda quality: lambda x: x)
    x, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 20:44, 20:44] = 1
    task, made = Task(None, x, torch.tensor([0]), ["a"], 0), SimpleNamespace(image=x * (1 - mask), mask=mask)
    (shot,) = filming.shots(task, made, (Pose(),), 1)
    frame = draw_frame([Pose()], 64, generator(0, "a", "frame", *Pose(), 0))
    assert torch.equal(shot.clean, photograph(x, x, frame))
    assert torch.equal(shot.attacked, photograph(print_patch(made.image, mask, frame.ink), x, frame))


@dataclass(frozen=True)
class Made:
    """In the place of AdvP: tells how it is called."""

    eot: int

    @classmethod
    def from_flags(cls, values):
        return cls(values["eot"])

    def __call__(self, task):
        return self.eot, type(task.victim)


def test_the_stronger_patch_is_made_over_poses(tmp_path, monkeypatch):
    """By at least four a step, before the camera."""
    made, black = [], torch.zeros(1, 3, 8, 8)
    monkeypatch.setattr(filming, "AdvP", Made)
    monkeypatch.setattr(filming, "shots", lambda task, told, *_: made.append(told) or [filming.Shot(black, black)])
    for name in ("grade", "save_example", "write_table"):
        monkeypatch.setattr(filming, name, lambda *_: {})
    target = SimpleNamespace(undefended=lambda: None, sample_noise=lambda *_: None)
    target.classifier, target.defense = torch.nn.Identity(), lambda x, noise: Purified(x)
    target.classifier.mean = torch.zeros(1)
    opts = with_preset(change(Options(), eot=2, quiet=True))
    e = Experiment(opts, tmp_path, tmp_path / "per_image.jsonl", target, [], {}, None)
    filming.film(e, Batch(["a"], black, torch.zeros(1), ["of a"]))
    with pytest.raises(InputError, match="results of another file of the name a"):
        filming.film(e, Batch(["a"], black, torch.zeros(1), ["of another"]))
    assert made == [(1, type(None))] * len(CONFIGURATIONS) + [(4, Filmed)] * len(CONFIGURATIONS)


def test_frames_of_one_image_are_one_trial(tmp_path, monkeypatch):
    """6 images of 4 frames each, half of which are read right when clean; DIFFender reads more right of each."""
    clean = [{"clean": k < 2, "undefended": k < 1, "defended": True} for k in range(4)]
    frames = {f"digital/{name}": clean for name in CONFIGURATIONS}
    append_records(tmp_path / "per_image.jsonl", [{"id": str(i), "frames": frames} for i in range(6)])
    e = SimpleNamespace(folder=tmp_path, opts=Options(), device=torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--table", "7"])
    rows = filming.write_table(e, [str(i) for i in range(6)], "images.").splitlines()[2:5]
    assert rows[0].startswith("| Undefended, patch made for the file | 50.0 (6/12; 19-81) |")
    assert rows[1].startswith("| DIFFender, patch made for the file | 100.0 (12/12; 61-100) |")
    assert rows[2].startswith("| more frames right, patch made for the file | 0 : 6 (p = 0.031) |")


def test_table_7_from_photographs(tmp_path, monkeypatch):
    """Each counts if its clean twin is read right, or if it has none."""
    a, b, c = sample_items()[:3]
    (tmp_path / "frames.csv").write_text(
        f"file,label,configuration,clean\n{a.path},{a.label},near,{a.path}\n{b.path},{b.label},far,\n"
        f"{c.path},{(c.label + 1) % 1000},far,{c.path}\n"
    )
    monkeypatch.chdir(tmp_path)
    opts = change(Options(), table=7, frames="frames.csv", draws=1, steps=1, preset="smoke")
    text = run_table(7, opts)
    assert text.splitlines()[0] == "| accuracy in per cent of frames | near | far |"
    (undefended,) = (line for line in text.splitlines() if "Undefended, patch as photographed" in line)
    assert undefended.endswith("| 100.0 (1/1; 21-100) | 100.0 (1/1; 21-100) |")
    assert "The 67 % of frames" in text
    assert run_table(7, opts) == text, "again, from its records"
    frames = (tmp_path / "frames.csv").read_text()
    (tmp_path / "frames.csv").write_text(frames.replace(",near,", ",far,"))
    with pytest.raises(InputError, match="with another file, label or configuration; delete that folder"):
        run_table(7, opts)
    (tmp_path / "frames.csv").write_text(f"file,label\n{a.path},{a.label}\n")
    with pytest.raises(InputError, match="wanted are file, label, configuration"):
        run_table(7, opts)


def evaluate(cwd, *args):
    run = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *args], cwd=cwd, capture_output=True, text=True, timeout=3000
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7])
def test_every_table_runs_and_resumes(tmp_path, number):
    budget = () if number == 7 else ("--iters", "1", "--queries", "2")
    args = ("--table", str(number), "--preset", "smoke", "--images", "1", *budget)
    first = evaluate(tmp_path, *args)
    assert "quoted" in first
    assert evaluate(tmp_path, *args).splitlines()[-6:] == first.splitlines()[-6:]


@pytest.mark.slow
def test_figure_1_of_a_classifier_of_another_size(tmp_path):
    args = ("--classifier", "efficientnet_lite1", "--preset", "smoke", "--images", "1", "--iters-undefended", "1")
    assert "Fig. 1" in evaluate(tmp_path, "--figure", "1", *args)


@pytest.mark.slow
def test_faces_run(tmp_path):
    faces = SHARED / "data" / "faces"
    if not faces.is_dir():
        pytest.skip("no faces here")
    data = ("--data", str(faces / "identities.csv"), "--classifier-weights", str(faces / "mobilefacenet.safetensors"))
    args = ("--table", "6", "--classifier", "mobilefacenet", "--preset", "smoke", "--images", "2", "--iters", "1")
    assert "57.2" in evaluate(tmp_path, *args, *data)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 4, 5, 8, 9])
def test_every_figure_is_drawn(tmp_path, number):
    least = "--iters" if number == 8 else "--iters-undefended"
    out = evaluate(tmp_path, "--figure", str(number), "--preset", "smoke", "--images", "1", least, "1")
    assert (tmp_path / "runs" / f"figure{number}-smoke" / "figure.png").stat().st_size > 5000
    assert f"--figure {number}" in out
