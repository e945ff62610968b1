"""A table of bad input to every program: one clear line, exit code 2, and nothing lost or half-made."""

import importlib
import json
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffender.__main__ import COMMANDS
from diffender.classifiers.dataset import as_rgb, load_image, sample_items
from diffender.classifiers.imagenet import CLASSIFIERS
from diffender.weights.loading import WEIGHTS
from diffender.weights.prompts import SHIPPED
from tests.conftest import SMALL

TINY = WEIGHTS / "tiny.safetensors"
PROGRAMS = {"evaluate": "evaluate", "train": "train", "diffender": "diffender.__main__"}
PROGRAMS |= {name: module for name, (module, _) in COMMANDS.items()}


def png(width, height, data, crc=None):
    """A PNG of one grey channel with these bytes in it, whatever they are."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content) if crc is None else crc
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    photo = sample_items()[0].path.read_bytes()
    images = {
        "text.jpg": b"I am no image",
        "empty.png": b"",
        "cut.jpg": photo[: len(photo) // 3],
        "head.jpg": photo[:20],
        "crc.png": png(8, 8, zlib.compress(bytes(72)), crc=1),
        "short.png": png(64, 64, zlib.compress(b"few")),
        "garbage.png": png(8, 8, b"no zlib"),
        "huge.png": png(20_000, 20_000, zlib.compress(b"")),
        "zero.png": png(0, 8, zlib.compress(b"")),
        "page.jpg": b"<!doctype html><title>404</title>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "film.jpg": b"\x00\x00\x00\x18ftypmp42" + bytes(64),
        "document.jpg": b"%PDF-1.7\n",
        "cut.webp": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
        "cut.bmp": b"BM\x36\x00\x00\x00",
    }
    for name, content in images.items():
        (folder / name).write_bytes(content)
        (folder / f"of-{name}.csv").write_text(f"file,label\n{name},1\n")
    Image.new("L", (20_000, 1)).save(folder / "thin.png")
    (folder / "of-thin.png.csv").write_text("file,label\nthin.png,1\n")
    (folder / "of-gone.png.csv").write_text("file,label\ngone.png,1\n")
    (folder / "folder.png").mkdir()
    (folder / "of-folder.png.csv").write_text("file,label\nfolder.png,1\n")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    tables = {
        "blank": "",
        "columns": "name,class\na.png,1\n",
        "label": "file,label\na.png,cat\n",
        "none": "file,label\n",
        "high": "file,label\na.png,1000\n",
        "low": "file,label\na.png,-1\n",
        "half": "file,label\na.png,1.5\n",
        "nameless": "file,label\n,3\n",
        "dot": "file,label\n.,3\n",
        "short": "file,label\na.png\n",
        "faces": "file,identity\na.png,ann\nb.png\n",
        "wrong": "file,label\ndot.png,1\n",
        "twice": "file,label\na.png,1\na.jpg,2\n",
    }
    for name, content in tables.items():
        (folder / f"{name}.csv").write_text(content)
    for name, rows in {"none": "", "gone": "gone.png,a cat\n", "text": "captions.csv,a cat\n"}.items():
        (folder / "captioned" / name).mkdir(parents=True)
        (folder / "captioned" / name / "captions.csv").write_text("file,caption\n" + rows)
    (folder / "latin.csv").write_bytes("file,label\nä.png,1\n".encode("latin-1"))
    for name in ("nothing", "people/only", "classes/n00000000"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "people/only/a.png")
    Image.new("RGB", (8, 8)).save(folder / "classes/n00000000/a.png")
    ones = torch.ones(2, 2)
    save_file({"a": ones}, folder / "other.safetensors")
    save_file({"ctx_locate": ones, "ctx_restore": ones.clone()}, folder / "narrow.safetensors")
    save_file({"ctx_locate": ones}, folder / "half.safetensors")
    save_file({"a": ones}, folder / "header.safetensors", metadata={"diffender": "{"})
    save_file({"patches": torch.ones(1, 3, 8, 8), "targets": torch.tensor([[1]])}, folder / "targets.safetensors")
    save_file({"patches": torch.ones(1, 8), "targets": torch.tensor([1])}, folder / "flat.safetensors")
    save_file({"patches": torch.ones(1, 3, 8, 9), "targets": torch.tensor([1])}, folder / "oblong.safetensors")
    save_file({"patches": 2 * torch.ones(1, 3, 8, 8), "targets": torch.tensor([1])}, folder / "bright.safetensors")
    save_file({"patches": torch.ones(0, 3, 8, 8), "targets": torch.ones(0).long()}, folder / "few.safetensors")
    (folder / "cut.safetensors").write_bytes(SHIPPED.read_bytes()[:-100])
    (folder / "text.safetensors").write_text("weights")
    (folder / "heic.png").write_text("of another kind than its name says")
    torch.save({"a": ones}, folder / "pickle.ckpt")
    torch.save({"state": {}}, folder / "optimizer.bin")
    (folder / "pairs.txt").write_text("10 300\nA 1 2\n")
    (folder / "pairs.csv").write_text("a,b\nx,y\n")
    (folder / "file").write_text("in the way")
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text("{")
    (folder / "tuning.safetensors.unfinished").write_text("no tuning")
    torch.save(ones, folder / "tensor.safetensors.unfinished")
    torch.save({"settings": None}, folder / "none.safetensors.unfinished")
    (folder / "empty.safetensors.unfinished").touch()
    (folder / "damaged").mkdir()
    (folder / "damaged/config.json").write_text("{}")
    (folder / "damaged/results.json").write_text("{}")
    (folder / "damaged/per_image.jsonl").write_text('{"id": "a"}\nnot json\n')
    (folder / "certified").mkdir()
    (folder / "certified/config.json").write_text("{}")
    (folder / "certified/results.json").write_text('{"command": "python -m diffender certify", "rows": []}')
    (folder / "certified/per_image.jsonl").write_text('{"id": "a, 0.05, 6", "right": true}\n')
    (folder / "open.md").write_text("<!-- results/a -->\ntext\n<!-- results/b -->\n<!-- end -->\n")
    (folder / "unnamed").mkdir()
    (folder / "unnamed/config.json").write_text("{}")
    (folder / "unnamed/per_image.jsonl").write_text("{}\n[]\n")
    return folder


def below(name):
    """A number that is too small for every option of this list."""
    return [(f"evaluate --{name} {value}", f"--{name} is {value}; allowed is ") for value in ("0", "-3")]


UNREAD = [  # flags that nothing in the command reads, and who would
    ("evaluate --attack gdpa --shape circle", "--shape circle is read by advp, lavan, and --attack is gdpa"),
    ("pretrain pack --data x --out o --steps 7", "--steps is read by single stages alone: add that, or leave it out"),
    ("pretrain join --data x --out o --device cpu", "--device is read by stages that train alone"),
    ("pretrain pack --data x --out o --batch 3", "--batch is read by stages that train alone"),
    ("pretrain vae --data x --samples 9", "--samples is read by unet and all alone"),
    ("pretrain vae --data x --reuse 3", "--reuse is read by unet and all alone"),
    ("pretrain decoder --data x --locate 3", "--locate is read by unet and all alone"),
    ("pretrain decoder --data x --parts 3", "--parts is read by all alone"),
    ("pretrain unet --data x --crop 96", "--crop is read by vae, decoder and all alone"),
    ("pretrain unet --data x --hiding 3", "--hiding is read by --locate alone: add that, or leave it out"),
    ("pretrain all --data x --minutes 1 --locate 0 --hiding 3", "--hiding is read by --locate alone"),
    ("pretrain unet --data x --samples 9 --reuse 3", "--reuse is read by runs without --samples alone"),
    ("evaluate --attack none --area 0.1", "--area 0.1 is read by advp, lavan"),
    ("evaluate --sticker smiley", "--sticker smiley is read by rhde, and --attack is advp"),
    ("evaluate --queries 10", "--queries 10 is read by rhde, sparse-rs"),
    ("evaluate --table 1 --attack gdpa", "--attack is read by runs without --table and --figure alone"),
    ("evaluate --figure 2 --trust full", "--trust is read by runs with an attack, without --table and --figure alone"),
    ("evaluate --attack none --trust full", "--trust is read by runs with an attack, without --table and --figure al"),
    ("evaluate --table 5 --classifier efficientnet_lite1", "--classifier is read by tables other than 5"),
    ("evaluate --table 4 --prompt manual", "--prompt is read by --defense diffender and hardened, and tables other"),
    ("evaluate --defense jpeg --prompt manual", "--prompt is read by --defense diffender and hardened, and tables"),
    ("evaluate --defense hardened --curves theta", "--curves theta is read by --defense diffender alone"),
    ("evaluate --figure 8 --theta 0", "--theta is read by runs and other tables and figures alone"),
    ("evaluate --table 3 --no-restore", "--restore is read by tables other than 3"),
    ("evaluate --table 7 --grad full", "--grad is read by runs and other tables and figures alone"),
    ("evaluate --table 7 --verdicts 3", "--verdicts is read by runs and other tables and figures alone"),
    ("evaluate --figure 5 --queries 7", "--queries 7 is read by rhde, sparse-rs, and --figure 5 runs advp"),
    ("evaluate --figure 2 --verdicts 3", "--verdicts is read by runs and other tables and figures alone"),
    ("evaluate --figure 2 --grad transfer", "--figure 2 shows a patch made on the defence beside that of transfer"),
    ("evaluate --table 1 --name big", "--name is read by runs without --table and --figure alone"),
    ("evaluate --attack rhde --restarts 2", "--restarts 2 is read by advp, lavan, gdpa"),
    ("evaluate --attack sparse-rs --iters-undefended 9", "--iters-undefended 9 is read by advp, lavan, gdpa, rhde"),
    ("evaluate --table 2 --prompts {bad}/gone", "--prompts is read by --defense diffender --prompt tuned, and tables"),
    ("evaluate --trust off --trust-images 3", "--trust-images is read by --trust quick and full alone"),
    ("evaluate --defense jpeg --eot 7 --images 1", "--eot 7: jpeg draws no noise, so all samples are the same"),
    ("train --adaptive-iters 5", "--adaptive-iters is read by --adaptive alone"),
    ("train --without mask --printed-eq4", "--printed-eq4 and --without mask: there is no Eq. 4 then"),
    ("evaluate --ste-k 2", "--ste-k is read by --ste sigmoid alone"),
    ("evaluate --evasion 2 --grad full", "--evasion is read by --grad full+loc and evade alone"),
    ("evaluate --grad full --hide max", "--hide is read by --grad full+loc and evade alone"),
    ("evaluate --attack none --evasion 2", "--evasion is read by --grad full+loc and evade alone"),
    ("evaluate --attack rhde --ste sigmoid", "--ste is read by --grad bpda-mask, surrogate, full, full+loc alone"),
    ("evaluate --figure 5 --decoy 1", "--decoy is read by --grad full+loc and evade alone"),
    ("evaluate --table 1 --trust-images 4", "--trust-images is read by --trust quick and full alone"),
    ("evaluate --figure 8 --theta 3", "--theta is read by runs and other tables and figures alone"),
    ("evaluate --figure 2 --queries 50", "--queries 50 is read by rhde, sparse-rs, and --figure 2 runs advp"),
    ("evaluate --table 7 --gdpa-mode generator", "--gdpa-mode generator is read by gdpa, and --table 7 runs"),
    ("evaluate --max-memory 6 --micro-batch 4", "--max-memory sets --micro-batch and keeps no activations"),
    ("evaluate --max-memory 6 --keep", "--max-memory sets --micro-batch and keeps no activations"),
    ("evaluate --ste sigmoid", "--ste is read by --grad bpda-mask, surrogate, full, full+loc alone"),
    ("evaluate --tuning-data samples2", "--tuning-data is read by --table 2 alone"),
    (
        "evaluate --attack gdpa --gdpa-mode amortised --generator {bad}/other.safetensors --trust full",
        "--gdpa-mode amortised has a generator for one size",
    ),
    ("evaluate --attack gdpa --generator {bad}/other.safetensors", "--generator is read by --gdpa-mode amortised"),
    ("evaluate --defense jpeg --theta 3", "--theta is read by --defense diffender or hardened alone"),
    ("evaluate --prompt manual --prompts {bad}/other.safetensors", "--prompts is read by --defense diffender"),
    ("evaluate --fold 1", "--fold is read by a run with a face recogniser alone"),
    ("evaluate --folds 2", "--folds is read by --table 6 alone"),
    ("defend {bad}/dot.png --prompt manual --prompts a", "--prompts is read by --prompt tuned alone"),
    ("defend {bad}/dot.png --classifier-weights a", "--classifier-weights is read by --classifier alone"),
    ("defend {bad}/dot.png --classes 5", "--classes is read by --classifier alone: add that, or leave it out"),
]
OUT_OF_RANGE = [
    *(case for name in ("draws", "steps", "batch-size", "micro-batch", "images", "iters", "iters-undefended", "eot",
                        "eot-batch", "restarts", "queries", "queries-undefended", "verdicts", "trust-images", "table",
                        "folds", "dilation") for case in below(name)),
    ("evaluate --noise_ratio 7", "--noise-ratio is 7.0; allowed is from 0.02 to 1"),  # underscores are hyphens
    ("evaluate --noise-ratio 0", "allowed is from 0.02 to 1"),
    ("evaluate --noise-ratio nan", "--noise-ratio is nan; allowed is from 0.02 to 1"),
    ("evaluate --theta -1", "--theta is -1.0; allowed is at least 0"),
    ("evaluate --theta nan", "--theta is nan"),
    ("evaluate --guidance inf", "--guidance is inf; allowed is at least 1"),
    ("evaluate --sigma -0.5", "--sigma is -0.5"),
    ("evaluate --dilation 2", "dilation is 2; it is an odd number of latents"),
    ("evaluate --eta 1.5", "--eta is 1.5; allowed is from 0 to 1"),
    ("evaluate --steps 1000", "--steps is 1000; allowed is from 1 to 999"),
    ("evaluate --seed -1", "--seed is -1; allowed is at least 0"),
    ("evaluate --fold -1", "--fold is -1"),
    ("evaluate --area 1.5", "--area is 1.5; allowed is from 0.0005 to 0.9"),
    ("evaluate --area 0", "--area is 0.0; allowed is from 0.0005 to 0.9"),
    ("evaluate --ste-k 0", "--ste-k is 0.0"),
    ("evaluate --evasion -1", "--evasion is -1.0"),
    ("evaluate --max-memory 0.1", "--max-memory is 0.1; allowed is at least 0.5"),
    ("evaluate --table 8", "--table is 8; allowed is from 1 to 7"),
    *((f"evaluate --figure {n}", f"--figure is {n}; choose from 1, 2, 3, 4, 5, 8, 9") for n in (-1, 0, 6, 12)),
    ("evaluate --images many", "--images is 'many'; give a whole number"),
    ("evaluate --images 1.5", "--images is '1.5'; give a whole number"),
    ("evaluate --theta two", "--theta is 'two'; give a number"),
    ("train --shots 0", "--shots is 0; allowed is at least 1"),
    ("train --n-ctx 76", "--n-ctx is 76; allowed is from 1 to 75"),
    ("train --lr nan", "--lr is nan"),
    ("train --rounds 0", "--rounds is 0"),
    ("certify --masks 0", "--masks is 0"),
    ("certify --area 0.9", "--area is 0.9; allowed is from 0.0005 to 0.5"),
    ("defend photo.jpg --draws 0", "--draws is 0"),
]  # fmt: skip

NAMES = [
    ("evaluate --attack advp,pgd", "--attack pgd is unknown; choose from advp, lavan, gdpa, rhde"),
    ("evaluate --attack advq", "(nearest: advp)"),
    ("evaluate --grad exact", "--grad exact is unknown for diffender; choose from transfer, bpda, bpda-mask"),
    ("evaluate --grad bpda-msk", "(nearest: bpda-mask)"),
    ("evaluate --defense jpeg --grad every", "choose from transfer, bpda, auto, with commas, or all"),
    ("evaluate --defense jpg", "(nearest: jpeg)"),
    ("evaluate --defense jpeg:quality=high", "setting 'quality=high' of defence jpeg; its settings and their defaults"),
    ("evaluate --defense jpeg:colour=1", "setting 'colour=1' of defence jpeg"),
    ("evaluate --classifier vgg", "unknown classifier 'vgg'"),
    ("evaluate --classifier resnet5", "(nearest: resnet50)"),
    ("evaluate --classifier face", "facenet, mobilefacenet, or timm:TAG with a name of timm (nearest: facenet)"),
    ("train --classifier facenet", "unknown classifier 'facenet'; choose one of efficientnet_lite0"),
    ("evaluate --classifier timm:no_such_net", "no_such_net"),
    ("evaluate --model sd15", "(nearest: sd15-inpainting)"),
    ("evaluate --attack rhde --area 0.4", "the sticker sign covers 0.334 of an image at most, and area is 0.4"),
    ("evaluate --attack rhde --sticker smiley --area 0.7", "the sticker smiley covers 0.679 of an image at most"),
    ("evaluate --attack rhde --sticker dog", "unknown sticker 'dog'; choose one of smiley"),
    ("evaluate --device tpu9", "--device tpu9 is not here; there is cpu"),
    ("evaluate --device gpu", "--device gpu is not here; there is cpu"),
    ("evaluate --device mps", "--device mps is not here; there is cpu"),
    ("evaluate --device hpu", "--device hpu is not here; there is cpu"),
    ("evaluate --device meta", "--device meta is not here; there is cpu"),
    ("evaluate --sampler euler", "invalid choice: 'euler'"),
    ("evaluate --dtype int8", "invalid choice: 'int8'"),
    ("evaluate --prompt best", "invalid choice: 'best'"),
    ("evaluate --preset huge", "invalid choice: 'huge'"),
    ("evaluate --score mean", "invalid choice: 'mean'"),
    ("evaluate --shape star", "invalid choice: 'star'"),
    ("evaluate --trust some", "invalid choice: 'some'"),
    ("evaluate --track mlflow", "invalid choice: 'mlflow'"),
    ("evaluate --imges 4", "unrecognized arguments: --imges 4 (nearest: --images)"),
    ("evaluate --num_img 4", "unrecognized arguments: --num-img 4 (here: --images)"),
    ("evaluate --data-dir=x", "unrecognized arguments: --data-dir=x (here: --data)"),
    ("evaluate --patch-size 50", "(here: --area, a share of the image)"),
    ("evaluate --resume", "(here: --name, that of the run)"),
    ("evaluate --save-adv", "(here: --name, whose folder has them in adv/ in any case)"),
    ("train --resume", "(here: --out, that of the run)"),
    ("evaluate --max-memory 512MB", "--max-memory is '512MB'; give a number"),
    ("evaluate --max-memory 0.1GB", "--max-memory is 0.1; allowed is at least 0.5"),
    ("evaluate photo.jpg", "unrecognized arguments: photo.jpg"),
    ("train --without colour", "invalid choice: 'colour'"),
    ("train --optimizer sgd", "unrecognized arguments: --optimizer sgd"),
    ("ablate --study parts --no-restore", "--no-restore leaves nothing of these studies"),
    ("ablate --study colours", "unknown study colours; choose from"),
    ("ablate --study parts --iters-anew 5", "--iters-anew is read by --study defender, attacker and schedule alone"),
    ("pretrain pgd", "unknown stage pgd; choose one of pack, all, join"),
    ("pretrain vae", "--data is missing; give a folder with captions.csv"),
    ("pretrain text --data x", "unknown stage text"),
    ("pretrain vae --data x --batch 0", "--batch is 0; allowed is at least 1"),
    ("pretrain vae --data x --crop 33", "--crop is 33; it is a multiple of 8"),
    ("pretrain unet --data x --steps -3", "--steps is -3"),
    ("pretrain vae --data x --device foo", "--device foo is not here"),
    ("pretrain pack --data x", "--out is missing; name the file to write"),
    ("pretrain join --data x", "--out is missing; name the file to write"),
    ("weights", "the following arguments are required"),
    ("diffender evaluate", "evaluate is a script in the repository: python evaluate.py"),
    ("diffender defnd photo.jpg", "unknown command 'defnd'; choose one of defend, weights"),
    ("diffender certify --masks 0", "--masks is 0"),
    ("certify --masks many", "--masks is many; give numbers, with commas"),
    ("weights fetch sd3", "invalid choice: 'sd3'"),
]

CONFLICTS = [
    ("evaluate --shard 2/2 --name a", "--shard is 2/2; give i/n with i from 0 to n-1"),
    ("evaluate --shard one", "--shard is one; give i/n"),
    ("evaluate --shard 1/2", "--shard 1/2 needs --name"),
    ("evaluate --dry-run --figure 8", "--dry-run is for single runs and for Tables 1 to 6"),
    ("evaluate --data ~nobody-of-this-name/photos", "~ and a name that no user here has; write the path out"),
    ("evaluate --attack advp, --grad evade,evade --name ..", "--name is ..; it is a folder within runs/"),
    ("ablate --out {bad}/run", "holds other results; choose another --out"),
    ("pretrain pack --data {bad}/captioned/text --out {bad}/wrong.csv", "wrong.csv is there already; delete it, or"),
    ("pretrain jedi --data {bad}/wrong.csv", "wrong.csv has one photograph; a deviation takes two: give more"),
    ("pretrain jedi --out {bad}/wrong.csv", "wrong.csv is there already; delete it, or choose another with --out"),
    ("pretrain universal --out {bad}/wrong.csv", "wrong.csv is there already; delete it, or choose another with --out"),
    ("evaluate --table 1 --figure 5", "--table 1 and --figure 5: one at a time"),
    ("evaluate --table 7 --defense jpeg", "tables and figures choose their defences"),
    ("evaluate --frames {bad}/none.csv", "--frames is for --table 7"),
    ("evaluate --table 7 --frames a.csv --images 3", "--images is read by runs without --frames alone"),
    ("evaluate --table 7 --frames a.csv --area 0.1", "ready, noise, grey, crop, and --frames attacks nothing"),
    ("evaluate --table 7 --frames a.csv --iters-undefended 5", "--iters-undefended is read by runs without --frames"),
    ("evaluate --classifier facenet --classes 5", "--classes is read by classifiers other than of faces alone"),
    ("evaluate --table 7 --frames gone.csv", "--frames gone.csv: no such file"),
    ("evaluate --name ../elsewhere", "--name is ../elsewhere; it is a folder within runs/"),
    ("evaluate --name /tmp/elsewhere", "it is a folder within runs/"),
    ("evaluate --name .", "--name is .; it is a folder within runs/: give a name of 1 to 255 bytes"),
    (f"evaluate --name {300 * 'n'}", f"--name is {99 * 'n'}; it is a folder within runs/"),
    ("evaluate --sampler dpmpp --eta 1", "eta is 1.0; DPM-Solver++(2M) is deterministic"),
    ("evaluate --no-composite --grad bpda-mask", "--grad bpda-mask needs pixels that --no-composite repaints"),
    (
        "evaluate --no-composite",
        "--grad evade needs pixels that --no-composite repaints: give --grad bpda, surrogate, full",
    ),
    ("train --adaptive 9 --rounds 3", "--adaptive 9 with --rounds 3: no round would be compared"),
    (
        "evaluate --attack rhde --no-composite",
        "--grad evade needs pixels that --no-composite repaints: give --grad transfer",
    ),
    ("evaluate --attack rhde --grad bpda", "attacks with gradients (as advp; a search reads transfer and evade) alone"),
    ("evaluate --no-restore --no-composite", "restore and composite are both off: no decoded image"),
    ("evaluate --figure 1 --prompt empty", "--prompt empty has none: leave it out"),
    ("evaluate --shape circle --area 0.9 --trust off", "a circle of 0.9 of the image does not fit into it"),
    ("evaluate --data samples --defense fnc:statistics=samples", "of the images are among FNC's, samples"),
    ("evaluate --data samples --defense fnc:alpha=1.2,statistics=samples", "of the images are among FNC's, samples"),
    ("evaluate --attack ready", "give --patch-file"),
    ("evaluate --attack gdpa --gdpa-mode amortised", "give --generator"),
    ("evaluate --defense hardened:otherwise=none", "otherwise is 'none'; choose diffender or majority"),
    ("evaluate --defense jpeg --grad full", "--grad full is unknown for jpeg"),
    ("evaluate --max-memory 0.6", "--max-memory 0.6 GiB is too little"),
    ("evaluate --model sd15-inpainting", "needs --weights"),
    ("evaluate --weights random", "give --model, one of tiny"),
    ("train --model tiny --weights random --vae gone", "--weights random makes a whole model; leave out --ema, --vae"),
    ("evaluate --ema", "holds no averaged (EMA) copies; leave out --ema"),
    ("evaluate --table 6", "--table 6 is of faces"),
    ("evaluate --classifier facenet --data {bad}/people", "identification needs two such people"),
    ("evaluate --classifier facenet --data {bad}/faces.csv", "line 3: no identity"),
    ("train --shots 8 --held-out 500", "photographs"),
    ("train --classifier timm:resnet18 --classifier-weights {bad}/other.safetensors", "does not fit"),
]

FILES = [
    ("evaluate --data nowhere", "no data at 'nowhere'"),
    ("evaluate --data {bad}/nothing", "no images in"),
    ("evaluate --data {bad}/file", "no data at"),
    ("evaluate --data {bad}/classes", "names that are no ImageNet-1k wnids: n00000000"),
    *((f"evaluate --data {{bad}}/{name}.csv", says) for name, says in (
        ("blank", "has the columns none; wanted are file, label"), ("columns", "wanted are file, label"),
        ("label", "line 2: label 'cat'; labels are class indices from 0 to 999"), ("high", "label '1000'"),
        ("low", "label '-1'"), ("half", "label '1.5'"), ("none", "no images in"), ("nameless", "line 2: no file"),
        ("dot", "line 2: no file"), ("short", "line 2: no label"), ("twice", "more than one image a"),
        ("latin", "csv file in UTF-8"),
    )),
    ("certify --data {bad}/wrong.csv", "tf_efficientnet_lite0 gets none of these images right (1, without 0"),
    *((f"certify --data {{bad}}/of-{name}.csv", f"{name}: {says}") for name, says in (
        ("text.jpg", "it does not decode"), ("cut.jpg", "it does not decode"), ("gone.png", "no such file"),
    )),
    *((f"certify --data {{bad}}/of-{name}.csv", f"{name}") for name in (
        "empty.png", "head.jpg", "crc.png", "short.png", "garbage.png", "huge.png", "zero.png",
        "page.jpg", "vector.png", "film.jpg", "document.jpg", "cut.webp", "cut.bmp", "thin.png", "folder.png",
    )),
    ("evaluate --prompts gone.safetensors", "no file gone.safetensors"),
    ("evaluate --prompts {bad}/nothing", "is a folder; give the path of a .safetensors file"),
    ("evaluate --prompts {bad}/other.safetensors", "prompts are two tensors, ctx_locate and ctx_restore"),
    ("evaluate --prompts {bad}/half.safetensors", "prompts are two tensors"),
    ("evaluate --prompts {bad}/narrow.safetensors", "tune new ones (train.py)"),
    ("evaluate --prompts {bad}/cut.safetensors", "is not a whole safetensors file"),
    ("evaluate --prompts {bad}/text.safetensors", "is not a whole safetensors file"),
    ("evaluate --prompts {bad}/header.safetensors", "damaged header"),
    ("evaluate --prompts {bad}/pickle.ckpt", "looks like a pickle"),
    ("evaluate --weights gone.safetensors", "no file or folder gone.safetensors; give the path of a checkpoint"),
    ("evaluate --weights tinny", "or the name of a model: tiny, sd15-inpainting, sd2-inpainting (nearest: tiny)"),
    ("evaluate --weights {bad}/nothing", "nothing"),
    ("evaluate --weights {bad}/text.safetensors", "is not a whole safetensors file"),
    ("evaluate --weights {bad}/other.safetensors", "other.safetensors"),
    ("evaluate --weights {bad}/pickle.ckpt", "looks like a pickle"),
    ("evaluate --vae gone", "no file gone"),
    (f"evaluate --locate-unet {TINY}", "holds an unknown UNet"),
    ("evaluate --classifier-weights gone.safetensors", "no file gone.safetensors"),
    ("defend {bad}/dot.png --prompts gone.safetensors", "no file gone.safetensors"),
    ("defend {bad}/dot.png --classifier efficientnet_lite0 --classifier-weights gone.safetensors", "no file gone"),
    ("evaluate --classifier-weights {bad}/text.safetensors", "is not a whole safetensors file"),
    ("evaluate --classifier-weights {bad}/other.safetensors", "other.safetensors"),
    ("faces --pairs {bad}/pairs.csv --classifier-weights {bad}/text.safetensors", "is not a whole safetensors file"),
    ("faces --pairs gone.txt", "no pairs at 'gone.txt'"),
    ("faces --pairs {bad}/pairs.txt", "has no weights in this package"),
    ("evaluate --attack ready --patch-file gone.safetensors", "no file gone.safetensors"),
    *((f"evaluate --attack ready --patch-file {{bad}}/{name}.safetensors", says) for name, says in (
        ("other", "wanted are patches and targets"), ("targets", "targets"), ("flat", "patches"),
        ("oblong", "patches (1, 3, 8, 9) and targets (1,); wanted are patches (N, 3, s, s)"),
        ("bright", "[0, 1]"), ("few", "patches"),
    )),
    ("evaluate --attack gdpa --gdpa-mode amortised --generator gone.safetensors", "no file gone.safetensors"),
    ("evaluate --attack gdpa --gdpa-mode amortised --generator {bad}/other.safetensors", "other.safetensors"),
    ("weights inspect gone.safetensors", "no file gone.safetensors"),
    ("weights convert gone.ckpt", "no file gone.ckpt"),
    ("weights convert {bad}/text.jpg --out a.safetensors", "cannot be read safely as a checkpoint"),
    ("weights convert {bad} --out a.safetensors", "--out a.safetensors is for one file; those of a folder stay in it"),
    ("weights convert {bad}", "no *pytorch_model*.bin file in"),
    ("pretrain vae --data {bad}/nothing", "training wants a folder with captions.csv"),
    ("pretrain unet --data {bad}/nothing --out o", "run the vae stage first"),
    ("pretrain all --data {bad}/nothing", "all needs --minutes"),
    ("pretrain all --data {bad}/nothing --minutes 1 --steps 9", "--steps is read by single stages alone"),
    ("pretrain all --data x --minutes 1 --init {bad}/other.safetensors", "--init is read by single stages alone"),
    ("pretrain vae --data {bad}/other.safetensors --out o", "holds no photographs; give a file of `pretrain pack`"),
    ("pretrain vae --data {bad}/captioned/none --out o", "captions.csv lists no photographs"),
    ("pretrain pack --data {bad}/captioned/gone --out o", "captions.csv lists gone.png, which is not there"),
    ("pretrain pack --data {bad}/captioned/text --out {bad}/file/a", "choose another place"),
    ("pretrain join --data {bad}/nothing --out m", "no parts of a model in"),
    ("defend", "no images given; name files or folders"),
    ("defend {bad}/nothing", "no images in"),
    ("ablate --study restoring --prompt manual --weights gone.safetensors", "no file gone.safetensors; give"),
    ("ablate --study choices --model sd2-inpainting --weights random", "--study choices asks for tuned prompts: give"),
    ("defend {bad}/heic.png", "heic.png is no image that can be read; save it as PNG or JPEG"),
    ("defend {bad}/heic.png {bad}/heic.png", "is no image that can be read, nor is any of the 1 others"),
    ("report compare", "compare: 0 given; give two folders that evaluate.py wrote"),
    ("report compare {bad}/run", "compare: 1 given; give two folders that evaluate.py wrote"),
    ("report compare {bad}/nothing {bad}/nothing", "nothing; give folders that evaluate.py wrote"),
    ("report compare {bad}/damaged {bad}/damaged", "per_image.jsonl, line 2 is damaged"),
    ("report compare {bad}/unnamed {bad}/unnamed", "per_image.jsonl, line 1 is damaged"),
    ("report compare {bad}/certified {bad}/certified", "certified holds no evaluation; compare two folders that"),
    ("report chart", "chart: nothing given; give a file, as chart.png, and runs"),
    ("report chart {bad}/run {bad}/run", "give a file, as chart.png, and runs"),
    ("report steps steps.png {bad}/run {bad}/run", "give a file, as steps.png, and one run"),
    ("report steps steps.png {bad}/certified", "certified holds no losses of an attack on the defence"),
    ("report chart chart.png {bad}/nothing", "nothing; give folders that evaluate.py wrote"),
    ("report chart chart.png {bad}/certified", "certified holds no evaluation under advp; the chart is of that attack"),
    ("report gone.md", "gone.md"),
    ("report {bad}/dot.png", "dot.png is no text in UTF-8; give Markdown files"),
    ("report {bad}/open.md", "<!-- results/a --> has no <!-- end --> before the next table; add it"),
    ("report page {bad}/certified", "certified holds results of another kind; give a folder that evaluate.py wrote"),
    ("report page {bad}/run", "no finished run in"),
    ("report page {bad}/damaged", "is damaged"),
    ("report page", "no folder given; give folders that evaluate.py wrote"),
]  # fmt: skip

PLACES = [
    ("train --out {bad}/file/prompts.safetensors", "choose another place"),
    ("train --out {bad}/nothing", "is a folder; give the name of a file"),
    ("train --out {bad}/tuning.safetensors", "is damaged"),
    ("train --out {bad}/tensor.safetensors", "is damaged"),
    ("train --out {bad}/none.safetensors", "is damaged"),
    ("train --out {bad}/empty.safetensors", "is damaged"),
    ("train --out /sys/prompts/a.safetensors", "choose another place"),
    ("defend {bad}/dot.png --out {bad}/file", "choose another place"),
    ("defend {bad}/dot.png --out /sys/images", "choose another place"),
    ("defend {bad}/dot.png --out {bad}/run", "config.json is damaged"),
    ("ablate --images 1 --out {bad}/file", "choose another place"),
    ("pretrain universal --out {bad}/file/a", "choose another place"),
    ("certify --images 1 --out {bad}/file/a", "choose another place"),
    ("pretrain vae --data {bad} --out {bad}/file/a", "choose another place"),
]
TABLE = UNREAD + OUT_OF_RANGE + NAMES + CONFLICTS + FILES + PLACES


def test_no_line_stands_twice():
    assert len({line for line, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("line", "says"), TABLE, ids=[line.replace("/", "|") for line, _ in TABLE])
def test_one_line_and_exit_code_2(bad, tmp_path, call, line, says):
    program, *args = line.format(bad=bad).split()
    before = {path: path.is_file() and path.read_bytes() for path in bad.rglob("*")}
    code, _, error = call(importlib.import_module(PROGRAMS[program]).main, program, *args)
    assert code == 2
    assert says in error
    assert len(error.strip().splitlines()) == 1, error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half-made is left behind"
    assert before == {path: path.is_file() and path.read_bytes() for path in bad.rglob("*")}, "nothing is lost"


def test_a_place_in_the_way_of_runs(tmp_path, here):
    (tmp_path / "runs").write_text("a file")
    code, _, error = here("--attack", "none", "--images", "1", "--quiet")
    assert code == 2
    assert "choose another place" in error


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 3), (31, 17), (4000, 250)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I"])
def test_images_of_every_mode_and_size_are_taken(tmp_path, mode, size):
    image = Image.new("RGB", size, (40, 120, 200))
    image = Image.new(mode, size, 30_000) if mode in ("I", "I;16") else image.convert(mode)
    if mode in ("PA", "HSV", "LAB", "I"):  # of no file that is taken; they reach the package from Python
        assert as_rgb(image).mode == "RGB"
        return
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    x = load_image(path, CLASSIFIERS["efficientnet_lite0"])
    assert x.shape == (3, 224, 224)
    assert mode == "1" or 0.3 < x.mean() < 0.6, "the colour is what it was"


def test_a_damaged_record_is_named_and_nothing_else_is_lost(tmp_path, here):
    args = [*SMALL, "--attack", "none", "--quiet", "--name", "a"]
    assert here(*args)[0] == 0
    path = tmp_path / "runs/a/per_image.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:50]}\n{second}\n")
    code, _, error = here(*args)
    assert code == 2
    assert "per_image.jsonl, line 1 is damaged" in error
    path.write_text(f"{second}\n")  # as the message says
    assert here(*args)[0] == 0
    assert {json.loads(line)["id"] for line in path.read_text().splitlines()} == {
        json.loads(line)["id"] for line in (first, second)
    }
