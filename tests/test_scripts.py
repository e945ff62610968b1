"""Both scripts, run as a user runs them, to their last line; and what they say to bad input."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from diffender import photographs
from diffender.classifiers.dataset import Batch, digest_of_all
from diffender.evaluation import certify, workers
from diffender.evaluation import run as running
from diffender.evaluation.options import Options, with_preset
from diffender.evaluation.plan import of_this_shard
from diffender.evaluation.records import append_records, open_run, read_records
from diffender.faces import __main__ as faces
from diffender.utils import options as cli
from diffender.utils import provenance
from diffender.utils.errors import InputError
from diffender.utils.files import read_header, save_atomic, sha256
from diffender.utils.images import STAGES, save_png, stage_files
from diffender.weights.prompts import SHIPPED, load_prompts, save_prompts
from tests.conftest import ROOT, SMALL


def script(name, *args, cwd):
    return subprocess.run([sys.executable, ROOT / name, *args], cwd=cwd, capture_output=True, text=True, timeout=1200)


def test_an_evaluation(tmp_path, here):
    """Files, counts, images, resumption, with prompts from a file."""
    prompts = tmp_path / "prompts.safetensors"
    save_prompts(load_prompts(SHIPPED, 64), prompts, {"hashes": []})
    args = [*SMALL, "--prompts", str(prompts), "--name", "a"]
    code, out, err = here(*args)
    assert code == 0, err
    folder = tmp_path / "runs" / "a"
    records = [json.loads(line) for line in (folder / "per_image.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    assert len(records) == 2
    env = json.loads((folder / "env.json").read_text())
    assert env["torch"] == torch.__version__ and env["machine"] == results["machine"]
    assert {(r["date"], r["commit"]) for r in records} == {(env["date"], env["commit"])}
    assert results["date"] == env["date"] and results["commits"] == [env["commit"]][: env["commit"] is not None]
    assert json.loads((folder / "config.json").read_text())["sha256"]["prompts"] == sha256(prompts) != sha256(SHIPPED)
    (folder / "env.json").write_text("{}")
    clean, transfer, adaptive, strongest = results["rows"]
    assert clean["undefended"]["right"] == 2  # the subset is correct by construction
    assert strongest["single"]["right"] <= min(transfer["single"]["right"], adaptive["single"]["right"])
    assert [(r["attack"], r["gradient"]) for r in (transfer, adaptive)] == [("advp", "transfer"), ("advp", "evade")]
    # 3 verdicts and 9 choices among patches of 2 evaluations, and 2 more where something is masked; one attack step of
    # 2 draws, recomputed, unrestored
    localised, restored = 2 * ((3 + 9) * 2 + 2 * (2 * 2)), 2 * (3 + 9) * 2
    assert localised < results["unet_evaluations"] < localised + restored
    assert (folder / "table.md").read_text() in out
    for record in records:
        for variant in record["attacks"]:
            files = stage_files(folder / "images", record, variant)
            assert set(files) == set(STAGES)
            assert all(Image.open(file).size == (224, 224) for file in files.values())
        assert set(stage_files(folder / "images", record)) == set(STAGES) - {"attacked"}
    for line in ("pass ", "evade ", "GiB", "left out against --preset strong", "peak memory"):
        assert line in out

    # Killed in the middle of a line; another process goes on with a share of the images that happens to be the rest.
    lines = (folder / "per_image.jsonl").read_text().splitlines(keepends=True)
    (folder / "per_image.jsonl").write_text(lines[0] + lines[1][:20])
    code, out, err = here(*args, "--batch-size", "1", "--shard", "1/2")
    assert code == 0, err
    assert "1 images done before" in out
    resumed = json.loads((folder / "results.json").read_text())
    assert resumed["rows"] == results["rows"]
    assert (folder / "env.json").read_text() == "{}", "it tells of who began"
    code, out, err = here(*args, "--seed", "5")
    assert code == 2
    assert "other settings (seed" in err


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    commit = provenance.commit.__wrapped__
    assert commit() is None
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert commit() is None, "nothing is committed yet"
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert commit() == asked and provenance.shortened([asked]) == f", commit {asked[:7]}"
    (tmp_path / "code.py").write_text("1")
    for words in (["add", "code.py"], [*author, "commit", "-q", "-m", "y"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    asked = commit()
    (tmp_path / "code.py").write_text("2")
    assert commit() == asked + provenance.CHANGED
    assert provenance.shortened([commit()]) == f", commit {asked[:7]} with changes"
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "within").mkdir()
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path / "within")
    assert commit() is None, "the repository around it is another one"
    subprocess.run(["git", "worktree", "add", "-q", "-b", "other", "w"], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path / "w")
    assert commit() == asked, "of a worktree, too"
    monkeypatch.setenv("PATH", "")
    assert commit() is None, "where git is not installed"


def test_a_shard_does_its_share(tmp_path, here):
    code, out, err = here(*SMALL, "--attack", "none", "--quiet", "--name", "s", "--shard", "1/2")
    assert code == 0, err
    assert "1 of 2 images are done" in out
    assert not (tmp_path / "runs" / "s" / "results.json").exists()
    # The other shard is lost: any number of processes goes on with the same command.
    code, _, err = here(*SMALL, "--attack", "none", "--quiet", "--name", "s")
    assert code == 0, err
    assert json.loads((tmp_path / "runs" / "s" / "results.json").read_text())["rows"][0]["single"]["n"] == 2


@pytest.mark.slow
def test_workers_of_torchrun_give_the_results_of_one_process(tmp_path):
    args = [*SMALL, "--images", "3", "--grad", "transfer", "--name", "w"]
    engine = ["-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "evaluate.py"]
    found = []
    for n, start in enumerate((engine, [ROOT / "evaluate.py"])):
        (tmp_path / str(n)).mkdir()
        run = subprocess.run([sys.executable, *start, *args], cwd=tmp_path / str(n), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        folder = tmp_path / str(n) / "runs" / "w"
        found.append(json.loads((folder / "results.json").read_text())["rows"])
        assert len(list(folder.glob("per_image*.jsonl"))) == 2 - n
    assert found[0] == found[1]


@pytest.mark.slow
def test_workers_of_torchrun_tune_the_prompts_of_one_process(tmp_path):
    args = ["--shots", "2", "--batch-size", "2", "--held-out", "0", "--rounds", "1", "--iters", "5", "--draws", "1"]
    engine = ["-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # other threads round the attack otherwise
    found = []
    for n, start in enumerate((engine, [ROOT / "train.py"])):
        out = tmp_path / f"{n}.safetensors"
        command = [sys.executable, *start, *args, "--out", out]
        run = subprocess.run(command, capture_output=True, text=True, env=alone)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("fool") == 1, "one of them speaks"
        found.append(load_file(out))
    for name, ctx in found[0].items():
        assert torch.allclose(ctx, found[1][name], atol=1e-3)  # a tenth of a step: gradients near zero round apart


def test_every_image_is_one_workers_of_one_shard(monkeypatch):
    """Of two shards with three processes each."""
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda names: None)
    found = []
    for shard in ("0/2", "1/2"):
        for rank in range(3):
            monkeypatch.setattr(workers, "start", lambda rank=rank: (rank, 3))
            found += of_this_shard(workers.join(Options(shard=shard, name="w")), 50)
    assert sorted(found) == list(range(50))


def test_an_unfinished_line_is_cut_off_by_its_own_process_alone(tmp_path):
    own, other = (tmp_path / "run" / f"per_image-{i}-of-2.jsonl" for i in (0, 1))
    assert open_run(tmp_path / "run", {"seed": 0}, own) == {}
    own.write_text('{"id": "a"}\n{"id": "b')
    other.write_text('{"id": "c"}\n{"id": "d')
    assert open_run(tmp_path / "run", {"seed": 0}, own) == {"a": {"id": "a"}, "c": {"id": "c"}}
    assert own.read_text() == '{"id": "a"}\n'
    assert other.read_text().endswith('{"id": "d')


def test_a_setting_more_or_less_is_another_run(tmp_path):
    own = tmp_path / "run" / "per_image.jsonl"
    open_run(tmp_path / "run", {"seed": 0, "theta": 2.0}, own)
    for other in ({"seed": 0}, {"seed": 0, "theta": 2.0, "grow": 1.0}):
        with pytest.raises(InputError, match="other settings"):
            open_run(tmp_path / "run", other, own)


def test_a_resumed_run_shares_all_that_its_results_depend_on(monkeypatch):
    """Files by their content. The number of images may differ, and how they are worked on."""
    monkeypatch.setattr(running, "hashes_of", lambda model, **files: {k: str(v) for k, v in files.items() if v})
    settings = lambda name, value: running.resolved(with_preset(cli.change(Options(), **{name: value})))  # noqa: E731
    usual = running.resolved(with_preset(Options()))
    assert set(usual["sha256"]) == {"prompts"}
    other = {"iters": 1, "iters_undefended": 1, "eot": 9, "restarts": 9, "queries": 9, "verdicts": 9, "seed": 9}
    other |= {"theta": 9.0, "draws": 9, "area": 0.1, "grad": "bpda", "ste": "sigmoid", "evasion": 9.0, "defense": "lgs"}
    other |= {"attack": "lavan", "prompt": "empty", "data": "folder", "classifier": "resnet50", "targeted": True}
    for name, value in other.items():
        assert settings(name, value) != usual, name
    assert "jedi" in settings("defense", "jedi")["sha256"]
    for name in ("generator", "patch_file", "classifier_weights", "prompts"):
        assert f"a {name}" in settings(name, f"a {name}")["sha256"].values(), name
    same = {"images": 3, "batch_size": 3, "eot_batch": 3, "trust": "off", "curves": "off", "name": "a", "shard": "1/2"}
    for name, value in same.items():
        assert settings(name, value) == usual, name


def test_files_that_no_flag_names_count(tmp_path, photos):
    """Jedi's own, FNC's photographs, and the known faces, but not those that are asked for."""
    for person in ("ann", "bob"):
        for i in range(2):
            save_png(photos[i], tmp_path / person / f"{i}.png")
    of = lambda **given: running.unnamed_files(with_preset(cli.change(Options(), **given)))  # noqa: E731
    assert of() == of(defense="lgs") == {}
    assert [p.name for p in of(defense="jedi")["jedi"]] == ["jedi.safetensors"]
    assert len(of(defense="fnc:statistics=samples")["statistics"]) == 20
    gallery = of(classifier="facenet", data=str(tmp_path))["gallery"]
    assert [p.relative_to(tmp_path).as_posix() for p in gallery] == ["ann/1.png", "bob/1.png"]
    before = digest_of_all(gallery)
    save_png(photos[2], gallery[0])
    assert digest_of_all(gallery) != before


def test_a_file_that_changes_within_its_size_is_read_again(tmp_path):
    told = []
    for time, content in enumerate("ab"):
        (tmp_path / "file").write_text(content)
        os.utime(tmp_path / "file", (time, time))
        told.append(sha256(tmp_path / "file"))
    assert told == [hashlib.sha256(content).hexdigest() for content in (b"a", b"b")]


def test_photographs_that_prompts_or_patches_were_made_of_are_not_evaluated(tmp_path, monkeypatch):
    asked, patch = [], tmp_path / "patch.safetensors"
    save_atomic({"patches": torch.zeros(1, 3, 8, 8)}, patch, {"hashes": ["a"]})
    monkeypatch.setattr(running, "correct_subset", lambda *given: asked.append(given[-1]) or Batch([], None, None, []))
    own = (
        {"prompt": "tuned", "prompts": str(patch)},
        *({"prompt": "manual", n: str(patch)} for n in ("patch_file", "generator")),
    )
    for given in ({"prompt": "tuned"}, {"prompt": "manual"}, *own):
        running.load_images(with_preset(cli.change(Options(), **given, quiet=True)), SimpleNamespace(bare=None))
    assert asked == [frozenset(read_header(SHIPPED)["hashes"]), frozenset(), {"a"}, {"a"}, {"a"}]
    assert len(asked[0]) >= 8


def test_images_share_the_cost_of_their_batch_and_results_count_those_asked_for(tmp_path, monkeypatch):
    progress = SimpleNamespace(evaluations=0, through=lambda cost: None)

    def judged(task, *_):
        assert task.seed == 3
        progress.evaluations += 6
        seen = {"label": 1, "undefended": 1, "defended": [1], "masked": None, "attacks": {}}
        return [{"id": i, "file": i} | seen for i in "ab"]

    monkeypatch.setattr(running, "evaluate_batch", judged)
    classifier = SimpleNamespace(mean=torch.zeros(1))
    target = SimpleNamespace(undefended=lambda: None, undefended_is="", defense=None, classifier=classifier)
    opts = with_preset(cli.change(Options(attack="none", trust="off", curves="off"), seed=3))
    e = running.Experiment(opts, tmp_path, tmp_path / "per_image.jsonl", target, [], {}, None)
    batch = Batch(["a", "b"], torch.zeros(2, 3, 8, 8), torch.ones(2), [])
    running.judge_part(e, batch, [0, 1], {"clean": 8.0}, progress, {})
    records = read_records(tmp_path).values()
    assert [r["unet_evaluations"] for r in records] == [3, 3]
    results = running.finish(e, Batch(["b"], batch.x[1:], batch.y[1:], []))
    assert (results["rows"][0]["single"]["n"], results["unet_evaluations"]) == (1, 3)
    changed = [record | {"seconds": 50.0, "machine": f"machine {i}"} for i, record in enumerate(records)]
    e.own.write_text("".join(json.dumps(record) + "\n" for record in changed))
    again = running.finish(e, batch)
    assert again["seconds"] == pytest.approx(100, abs=5)
    assert (again["seconds_attacked"], again["forecast"]) == (100, 8), "a forecast stands beside what it took"
    assert again["machine"] == "machine 0 and machine 1"


def test_checks_and_curves_have_the_seed_of_the_run(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(running, "trust_report", lambda opts, task, *_: seeds.append(task.seed) or [])
    monkeypatch.setattr(running, "draw_curves", lambda which, task, *_: seeds.append(task.seed) or {})
    seen = {"label": 1, "undefended": 1, "defended": [1], "masked": None, "seconds": 1.0, "unet_evaluations": 1}
    append_records(tmp_path / "per_image.jsonl", [{"id": "a", "file": "a", "attacks": {}} | seen])
    target = SimpleNamespace(undefended_is="", classifier=SimpleNamespace(mean=torch.zeros(1)))
    opts = with_preset(cli.change(Options(trust="quick", curves="theta"), seed=3, quiet=True))
    e = running.Experiment(opts, tmp_path, tmp_path / "per_image.jsonl", target, ["a plan"], {}, None)
    running.finish(e, Batch(["a"], torch.zeros(1, 3, 8, 8), torch.ones(1), []))
    assert seeds == [3, 3]


def test_certified_are_right_answers_and_images_without_a_place_left(tmp_path, call, monkeypatch):
    """Of three images one is read wrong, and one has all its places certified, but not with more masks. Results of
    other images, data or weights are not mixed in."""

    class Certifier:
        def __init__(self, classifier, area, masks):
            self.part = 0.05 / area / (masks - 2)

        def __call__(self, x):
            return 1 if x.max() > 0 else 2

        def certified_places(self, x, label):
            return x.max().item() * self.part

    def run(*flags):
        code, _, error = call(certify.main, "certify", "--out", "c", "--quiet", *flags)
        return code, error

    x = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    batch = Batch(["a", "b", "c"], x, torch.ones(3).long(), ["0", "1", "2"])
    monkeypatch.setattr("diffender.defenses.patchcleanser.PatchCleanser", Certifier)
    monkeypatch.setattr("diffender.classifiers.imagenet.load_classifier", lambda *_: torch.nn.Identity())
    monkeypatch.setattr("diffender.classifiers.dataset.list_items", lambda *_: [])
    monkeypatch.setattr("diffender.classifiers.dataset.correct_subset", lambda *_: batch)
    weights = tmp_path / "net.safetensors"
    weights.write_text("one")
    flags = ("--masks", "3,4", "--classifier-weights", weights)
    assert run(*flags, "--area", "0.05,0.1") == (0, "")
    rows = json.loads((tmp_path / "c" / "results.json").read_text())["rows"]
    names = ("right, without a patch", "certified wherever it is", "certified places")
    found = [[row[name] for name in names] for row in rows]
    assert found == [[2, 1, 1.5], [2, 0, 0.75], [2, 0, 0.75], [2, 0, 0.375]]
    assert "other settings (data: samples, now photos)" in run(*flags, "--data", "photos")[1]
    batch.hashes[0] = "9"
    assert "results of another file of the name a" in run(*flags)[1]
    weights.write_text("another")
    assert "other settings (sha256" in run(*flags)[1]


def test_a_dry_run_tells_and_does_nothing(tmp_path, here):
    code, out, err = here(*SMALL, "--dry-run", "--name", "d")
    assert code == 0, err
    assert "pass " in out
    assert '"theta": 2.0' in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_table_tells_the_cost_of_each_row(tmp_path, here):
    budget = ("--images", "2", "--iters", "1", "--steps", "2", "--draws", "1", "--verdicts", "1")
    code, out, err = here(*budget, "--dry-run", "--quiet", "--table", "2", "--rows", "without mask,diffender")
    assert code == 0, err
    assert re.search(r"2 experiments, about \d+", out)
    assert len(re.findall(r"^runs/tables/efficientnet_lite0-\S+: \d+ ", out, re.M)) == 2
    assert not (tmp_path / "runs").exists()


def test_flags_stand_under_their_heads(capsys):
    heads = {
        Options: "the defence: --defense; the run: --device --batch-size --shard; the budget: --preset --images",
        train.Options: "tuning: --rounds; the photographs: --shots; the attack: --area; results: --out --track",
        photographs.Options: "the run: --device; images: paths --out; what a classifier sees: --classifier",
        certify.Options: "classifier and images: --data --images; the certificate: --area --masks --out",
        faces.Options: "options: -h --pairs --data",
    }
    for options, wanted in heads.items():
        with pytest.raises(SystemExit):
            cli.parse(options, "", ["--help"])
        text = capsys.readouterr().out
        assert "option_strings" not in text, "a percent sign is a percent sign"
        found = [part.partition(":\n") for part in text.split("\n\n")[1:]]
        sections = {head: text for head, _, text in found}
        assert len(sections) == len(found), "no head stands twice"
        for part in wanted.split("; "):
            head, flags = part.split(": ")
            for flag in flags.split():
                assert re.search(rf"^  {flag}\b", sections[head], re.MULTILINE), (options, head, flag)


@pytest.mark.parametrize("text", ["8", "8G", "8GB", "8GiB", "8gb"])
def test_a_unit_may_stand_behind_the_memory(text):
    assert cli.parse(Options, "", ["--max-memory", text]).max_memory == 8


def test_names_are_listed(here):
    code, out, err = here("--list")
    assert code == 0, err
    assert all(name in out for name in ("sd2-inpainting", "resnet50", "gdpa", "bpda-mask", "diffpure"))


def test_without_attack_and_with_the_empty_prompt(here):
    fast = ["--sampler", "ddim", "--guidance", "3", "--dtype", "bfloat16", "--micro-batch", "3"]
    args = [*SMALL, *fast, "--attack", "none", "--prompt", "empty", "--name", "e"]
    code, out, err = here(*args)
    assert code == 0, err
    assert "empty prompts" in out
    assert "| none |  | 100.0 % (2/2;" in out


@pytest.mark.slow
def test_the_four_attacks_and_the_checks(tmp_path):
    """Every attack of the paper, through every kind of gradient that it takes, and the quick checks."""
    args = "--preset smoke --images 1 --attack all --grad bpda,full+loc --iters 1 --max-memory 6 --name all"
    run = script("evaluate.py", *args.split(), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "runs" / "all" / "results.json").read_text())
    made = {(r["attack"], r["gradient"]) for r in results["rows"]}
    assert {("rhde", "queries"), ("gdpa", "full+loc"), ("lavan", "bpda"), ("advp", "transfer")} <= made
    assert len(results["trust"]) > 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["universal", "gdpa"])
def test_made_beforehand_then_used(tmp_path, kind):
    made = tmp_path / "made.safetensors"
    args = f"-m diffender.pretrain {kind} --images 4 --updates 2 --width 2 --batch-size 2 --out {made}"
    run = subprocess.run([sys.executable, *args.split()], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    use = {
        "universal": ["--attack", "ready", "--patch-file"],
        "gdpa": ["--gdpa-mode", "amortised", "--attack", "gdpa", "--generator"],
    }
    budget = SMALL[:2] + SMALL[6:] if kind == "universal" else SMALL  # a ready patch takes no steps
    run = script("evaluate.py", *budget, *use[kind], str(made), cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def ablation(out, *args):
    args = ["-m", "diffender", "ablate", "--iters", "2", "--draws", "1", "--steps", "2", "--out", str(out), *args]
    run = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert (out / "table.md").read_text() in run.stdout
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_ablation_changes_one_choice_at_a_time(tmp_path):
    results = ablation(tmp_path, "--images", "1")
    rows = {row["setting"]: row for row in results["choices"]}
    assert len(rows) == len({tuple(row.values()) for row in rows.values()}) == 19
    assert rows["theta 3.0"]["auc"] == rows["base"]["auc"]  # of the map, which theta does not touch
    assert rows["theta 3.0"]["clean_area"] <= rows["base"]["clean_area"] < rows["theta 1.0"]["clean_area"]


@pytest.mark.slow
def test_ablation_attacks_anew_through_what_is_changed(tmp_path):
    budget = ("--images", "1", "--iters-anew", "2", "--eot", "1")
    results = ablation(tmp_path, "--study", "restoring,defender,attacker,schedule", *budget)
    assert len({row["l1_patch"] for row in results["restoring"]}) == len(results["restoring"]) == 6
    for study, count in (("defender", 7), ("attacker", 6)):
        base, *others = results[study]
        assert len(others) == count - 1 and len(base["right"]) == 1
        assert any(row["auc"] != base["auc"] for row in others), "of another patch"
    harder = {row["setting"]: row["auc"] for row in results["defender"]}
    assert harder["theta 1.0"] != harder["base"], "the attacker knows theta, of which the map knows nothing"
    assert "then evade and full, 2 steps, EOT 1" in (tmp_path / "table.md").read_text()
    assert len({row["loss"] for row in results["schedule"]}) > 1, "the steps differ"


@pytest.mark.slow
def test_ablation_tells_parts_apart_and_follows_the_noise_ratio(tmp_path):
    results = ablation(tmp_path, "--study", "parts,noise,examples", "--images", "2")
    parts = {row["setting"]: row for row in results["parts"]}
    assert parts["true mask, no restoration"]["l1_patch"] != parts["true mask, restored"]["l1_patch"]
    assert parts["true mask, restored"]["clean_right"] == 1  # the subset is correct by construction
    assert len(results["noise"]) == 18
    assert 15 < results["examples"]["psnr"] < 40
    for name in ("noise.png", "images.png"):
        assert Image.open(tmp_path / name).size[0] > 400


@pytest.mark.slow
def test_examples_of_a_classifier_whose_size_the_vae_cannot_take(tmp_path):
    results = ablation(tmp_path, "--study", "examples", "--images", "1", "--classifier", "efficientnet_lite2")
    assert 15 < results["examples"]["psnr"] < 40


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of its own")
def test_large_blocks_are_reused():
    """Page faults of taking and returning 64 MiB twenty times, before and after; a process of its own."""
    code = """if True:
        from resource import RUSAGE_SELF, getrusage
        from diffender.utils.malloc import keep_freed_memory
        def faults():
            bytearray(2**26)
            before = getrusage(RUSAGE_SELF).ru_minflt
            for _ in range(20):
                bytearray(2**26)
            return getrusage(RUSAGE_SELF).ru_minflt - before
        before = faults()
        keep_freed_memory()
        print(before, faults())
    """
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=plain)
    before, after = map(int, run.stdout.split())
    assert after < before / 10, run.stderr


@pytest.mark.slow
def test_exact_gradients_and_eight_shots(tmp_path):
    """The two commands of the first milestone, word for word."""
    assert script("train.py", "--shots", "8", cwd=tmp_path).returncode == 0
    run = script("evaluate.py", *["--attack", "advp", "--grad", "full", "--eot", "2", "--images", "4"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
