"""Official checkpoints in every layout, at reduced size: all load to the same weights; what does not fit says so."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffender.config import EMBEDDED, PAPER, ModelOptions
from diffender.evaluation import plan as plans
from diffender.evaluation.options import Options
from diffender.factory import hashes_of
from diffender.stable_diffusion.model import MODELS, LatentDiffusion
from diffender.stable_diffusion.text import TextConfig, TextTransformer
from diffender.stable_diffusion.unet import UNet
from diffender.utils.errors import InputError
from diffender.utils.files import sha256
from diffender.utils.options import change
from diffender.weights import loading as weights
from diffender.weights.layouts import OPEN_CLIP, PREFIXES, ema_name, open_clip_names, unet_name, vae_name
from diffender.weights.loading import WEIGHTS, fill_random, load_model, save_model
from diffender.weights.official import convert_folder
from diffender.weights.reading import folder_files
from tests.cases import CONFIGS, small_model_file

WIDE = TextConfig(width=96, heads=4, layers=2, quick_gelu=False, pad_token=0)  # families differ in the text's width
FAMILIES = {
    "sd15-inpainting": CONFIGS["sd15"],
    "sd2-inpainting": replace(CONFIGS["sd2"], unet=replace(CONFIGS["sd2"].unet, context_dim=96), text=WIDE),
}
BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    """The official families at the size of tests/cases.py."""
    for name, cfg in FAMILIES.items():
        monkeypatch.setitem(MODELS, name, cfg)


@pytest.fixture(scope="module")
def models():
    def make(name: str) -> LatentDiffusion:
        model = LatentDiffusion(FAMILIES[name])
        fill_random(model, torch.Generator().manual_seed(1))
        return model

    return {name: make(name) for name in FAMILIES}


def single_file(model: LatentDiffusion, openclip: bool, linear_vae: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a CompVis single file, with all that the real ones carry beside the model."""
    state = {PREFIXES["unet"] + k: v for k, v in model.unet.state_dict().items()}
    for k, v in model.vae.state_dict().items():
        state[PREFIXES["vae"] + k] = v.squeeze() if linear_vae and ".attn_1." in k else v
    text = model.text.state_dict()
    if openclip:
        state |= open_clip_tower(text)
    else:
        state |= {PREFIXES["text"] + k: v for k, v in text.items()}
        state[PREFIXES["text"] + "embeddings.position_ids"] = torch.arange(77)[None]
    state |= {k: torch.zeros(1000) for k in BUFFERS}
    return state | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def open_clip_tower(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SD2's text tower as open_clip's own module names it, with the block and the projections that are not read."""
    from open_clip.transformer import TextTransformer as Theirs

    theirs = Theirs(context_length=77, vocab_size=49408, width=96, heads=4, layers=3, output_dim=96, pad_id=0)
    out = {}
    for key, value in (theirs.state_dict() | {"logit_scale": torch.tensor(4.6)}).items():
        names = open_clip_names(key)
        found = names[0] in text
        renumbered = key.replace("resblocks.2.", "resblocks.23.")  # of 24 in the real file, where 23 are run
        out[OPEN_CLIP + renumbered] = torch.cat([text[n] for n in names]) if found else value
    return out


def folder(model: LatentDiffusion, root, old_names: bool = False, suffix: str = "", dtype=torch.float32):
    """The model as a Hugging Face folder."""
    cfg = model.cfg
    text = {f"text_model.{k}": v for k, v in model.text.state_dict().items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    vae = {vae_name(k, len(cfg.vae.ch_mult)): v for k, v in model.vae.state_dict().items()}
    vae = {k: v.squeeze() if ".attentions." in k else v for k, v in vae.items()}
    if old_names:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            vae = {k.replace(f".{new}.", f".{old}."): v for k, v in vae.items()}
    parts = {
        "unet/diffusion_pytorch_model": {unet_name(k, 2): v for k, v in model.unet.state_dict().items()},
        "vae/diffusion_pytorch_model": vae,
        "text_encoder/model": text,
    }
    for stem, state in parts.items():
        path = root / f"{stem}{suffix}.safetensors"
        path.parent.mkdir(parents=True)
        write(state, path, dtype)
    return root


def write(state, path, dtype=torch.float32):
    save_file({k: v.to(dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}, path)
    return path


def assert_same(loaded: LatentDiffusion, model: LatentDiffusion, dtype=torch.float32, parts=tuple(PREFIXES)):
    for part in parts:
        a, b = getattr(loaded, part).state_dict(), getattr(model, part).state_dict()
        assert a.keys() == b.keys()
        for k, v in b.items():
            assert torch.equal(a[k], v.to(dtype).float()), k


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("single", torch.float32), ("single", torch.float16), ("single, linear VAE", torch.float32),
        ("folder", torch.float16), ("folder, old names", torch.float32), ("folder, fp16 names", torch.float16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_loads_to_the_same_weights(name, layout, dtype, models, tmp_path):
    """And the family is recognised, in a float16 file as in a float32 one."""
    model = models[name]
    if layout.startswith("single"):
        path = write(single_file(model, name.startswith("sd2"), "linear" in layout), tmp_path / "m.safetensors", dtype)
    else:
        path = folder(model, tmp_path / "m", "old" in layout, ".fp16" if "fp16" in layout else "", dtype)
    loaded = load_model("auto", path)
    assert loaded.cfg == MODELS[name]
    assert_same(loaded, model, dtype)
    if layout == "single":
        inspected = weights.describe(weights.scan(path))
        assert f"family: {name} (9 input channels" in inspected
        assert "686 tensors" in inspected


def flattened(state):
    """With linear projections of the transformers, as merged and converted files have them."""
    return {k: v[..., 0, 0] if re.search(r"proj_(in|out)\.weight", k) and v.ndim == 4 else v for k, v in state.items()}


def old_text(state):
    """With the text tower's names before transformers put it into `text_model`."""
    return {k.replace("transformer.text_model.", "transformer."): v for k, v in state.items()}


def in_shards(root, stem, variant=""):
    """The file of one part cut in two, with its index."""
    state = load_file(root / f"{stem}.safetensors")
    (root / f"{stem}.safetensors").unlink()
    names, where = list(state), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}{variant}-{i:05}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, root / file)
        where |= dict.fromkeys(part, (root / file).name)
    index = root / (f"{stem}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


VARIANTS = {  # of a single file: the same numbers under other names and in other shapes
    "as published": lambda s: s,
    "flat projections": flattened,
    "old text names": old_text,
    "state_dict. before every name": lambda s: {f"state_dict.{k}": v for k, v in s.items()},
    "module. before every name": lambda s: {f"module.{k}": v for k, v in s.items()},
    "with projections that are not read": lambda s: s | {"cond_stage_model.logit_scale": torch.tensor(4.6)},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*(("as published", dtype) for dtype in DTYPES[2:]), *zip(list(VARIANTS)[1:], DTYPES, strict=True)],
    ids=str,
)
def test_variants_of_a_single_file(variant, dtype, models, tmp_path):
    model = models["sd15-inpainting"]
    path = write(VARIANTS[variant](single_file(model, openclip=False)), tmp_path / "m.safetensors", dtype)
    assert_same(load_model("auto", path), model, dtype)


def test_linear_projections_as_1x1_convolutions(models, tmp_path):
    """SD2's are linear; the other way around is the same numbers too."""
    state = single_file(models["sd2-inpainting"], openclip=True)
    state = {
        k: v[..., None, None] if re.search(r"proj_(in|out)\.weight", k) and v.ndim == 2 else v for k, v in state.items()
    }
    assert_same(load_model("auto", write(state, tmp_path / "m.safetensors")), models["sd2-inpainting"])


@pytest.mark.parametrize("suffix", [".non_ema", ".bf16"])
def test_variants_of_a_folder(suffix, models, tmp_path):
    root = folder(models["sd15-inpainting"], tmp_path / "m", suffix=suffix)
    assert_same(load_model("auto", root), models["sd15-inpainting"])


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(variant, models, tmp_path):
    root = folder(models["sd15-inpainting"], tmp_path / "m")
    index = in_shards(root, "unet/diffusion_pytorch_model", variant)
    in_shards(root, "text_encoder/model", variant)
    assert_same(load_model("auto", root), models["sd15-inpainting"])
    next(root.glob("unet/*-00002-of-*")).unlink()
    assert "lists shards that are not there: diffusion_pytorch_model" in refused(root)
    index.write_text("{}")
    assert "is no index of shards" in refused(root)


def test_pickled_shards_are_converted_with_their_index(models, tmp_path):
    root = folder(models["sd15-inpainting"], tmp_path / "m")
    for stem in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        index = in_shards(root, stem)
        names = {}
        for path in sorted(index.parent.glob("*.safetensors")):
            name = path.with_suffix(".bin").name
            names[path.name] = name if stem.startswith("unet") else f"pytorch_{name}"
            torch.save(load_file(path), path.with_name(names[path.name]))
            path.unlink()
        content = json.loads(index.read_text())
        where = {key: names[name] for key, name in content["weight_map"].items()}
        pickled = index.with_name(f"{next(iter(names.values())).split('-0')[0]}.bin.index.json")
        pickled.write_text(json.dumps(content | {"weight_map": where}))
        index.unlink()
    assert "its unet as a pickle alone" in refused(root)
    assert [path.name for path in convert_folder(root) if path.suffix == ".json"] == [
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert json.loads((root / "text_encoder" / "model.safetensors.index.json").read_text())["metadata"] == {}
    assert convert_folder(root) == []
    assert_same(load_model("auto", root), models["sd15-inpainting"])
    pickled.with_name("model.safetensors.index.json").unlink()
    pickled.write_text("[]")
    with pytest.raises(InputError, match="pytorch_model.bin.index.json is no index of shards"):
        convert_folder(root)


def test_the_folder_that_one_is_in(models, tmp_path, monkeypatch):
    monkeypatch.chdir(folder(models["sd15-inpainting"], tmp_path / "m") / "unet")
    assert list(folder_files(Path())) == ["unet"]


def test_the_home_folder(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(single_file(models["sd15-inpainting"], openclip=False), tmp_path / "m.safetensors")
    assert load_model("auto", "~/m.safetensors").cfg == MODELS["sd15-inpainting"]


def test_pickled_folders_are_named_and_converted(models, tmp_path):
    root = folder(models["sd15-inpainting"], tmp_path / "m")
    for path in sorted(root.glob("*/*.safetensors")):  # text_encoder, unet, vae
        published = path.stem if path.parent.name != "text_encoder" else "pytorch_model"
        torch.save(load_file(path), path.with_name(f"{published}.bin"))
        if path.parent.name != "text_encoder":
            path.unlink()
    assert f"{root} has its unet as a pickle alone (.bin); python -m diffender weights convert {root}" in refused(root)
    (root / "text_encoder" / "model.safetensors").unlink()
    assert f"its .bin files are pickles; python -m diffender weights convert {root}" in refused(root)
    variant = root / "text_encoder" / "pytorch_model.fp16.bin"
    variant.with_name("pytorch_model.bin").rename(variant)
    torch.save({"state": {}}, root / "unet" / "optimizer.bin")  # left by a training, and no part of the model
    (root / "safety_checker").mkdir()
    torch.save({"a": torch.ones(2)}, root / "safety_checker" / "pytorch_model.bin")  # none either
    assert [f"{path.parent.name}/{path.name}" for path in convert_folder(root)] == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert convert_folder(root) == []
    assert_same(load_model("auto", root), models["sd15-inpainting"])


STRANGE = {  # a key beside the model: what the message names
    "lora_unet_down_blocks_0.lora_up.weight": "a LoRA",
    "model.diffusion_model.input_blocks.1.1.proj_in.lora_A.weight": "a LoRA",
    "control_model.zero_convs.0.0.weight": "a ControlNet",
    "model.diffusion_model.motion_modules.0.weight": "motion modules",
    "model.diffusion_model.out.2.scale_weight": "float8 weights with scales",
    "model.diffusion_model.out.2.weight.absmax": "bitsandbytes",
    "conditioner.embedders.0.weight": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.weight": "a diffusion transformer",
    "embedding_manager.string_to_param.x": "a textual inversion",
}


@pytest.mark.parametrize("key", STRANGE)
def test_strangers_are_named(key, models, tmp_path):
    state = single_file(models["sd15-inpainting"], openclip=False) | {key: torch.ones(4)}
    said = refused(write(state, tmp_path / "m.safetensors"))
    assert STRANGE[key] in said
    assert key in said


def test_settings_follow_the_model(models, tmp_path):
    """The paper's for an official checkpoint, without a flag; a flag wins; each says where it comes from."""
    path = write(single_file(models["sd15-inpainting"], openclip=False), tmp_path / "m.safetensors")
    assert (
        load_model("auto", path).settings
        == load_model("auto", folder(models["sd15-inpainting"], tmp_path / "f")).settings
    )
    assert load_model("auto", path).settings == PAPER
    opts = change(Options(), weights=str(path), steps=5)
    assert plans.config_of(opts) == replace(PAPER, steps=5)
    assert opts.target.defense.prompt_kind == "manual"
    assert plans.sources(opts)["steps"] == "--steps"
    assert plans.sources(opts)["theta"] == f"suits {path}"
    assert plans.config_of(Options()) == EMBEDDED
    assert plans.config_of(Options(preset="paper")) == PAPER
    assert plans.config_of(change(Options(preset="paper"), theta=3.0)).theta == 3.0
    assert plans.sources(Options(preset="paper"))["theta"] == "--preset paper"
    model = load_model()
    save_model(model, tmp_path / "own.safetensors", {"settings": asdict(replace(PAPER, draws=6))})
    assert plans.config_of(change(Options(), weights=str(tmp_path / "own.safetensors"))).draws == 6


def test_averaged_copies_are_taken_when_asked_for(models, tmp_path):
    model = models["sd15-inpainting"]
    state = single_file(model, openclip=False)
    state |= {ema_name(k): v + 1 for k, v in model.unet.state_dict().items()}
    path = write(state, tmp_path / "m.safetensors")
    assert_same(load_model("auto", path), model)
    averaged = load_model("auto", path, ema=True)
    assert_same(averaged, model, parts=("vae", "text"))
    for k, v in model.unet.state_dict().items():
        assert torch.equal(averaged.unet.state_dict()[k], v + 1)
    del state[ema_name("out.2.bias")]
    with pytest.raises(InputError, match=r"1 keys missing \(first: model.diffusion_model.out.2.bias"):
        load_model("auto", write(state, tmp_path / "m.safetensors"), ema=True)
    plain = write(single_file(model, openclip=False), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="holds no averaged"):
        load_model("auto", plain, ema=True)


def test_another_vae(models, tmp_path):
    """Alone in either layout, in a whole model, in a folder of its own: the model's own VAE may then be missing."""
    model = models["sd15-inpainting"]
    other = LatentDiffusion(CONFIGS["sd2"])
    fill_random(other, torch.Generator().manual_seed(2))
    state = {k: v for k, v in single_file(model, openclip=False).items() if not k.startswith("first_stage_model.")}
    main = write(state, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="248 keys missing"):
        load_model("auto", main)
    training = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    vaes = [
        write(other.vae.state_dict() | training, tmp_path / "bare.safetensors"),
        write(single_file(other, openclip=True), tmp_path / "whole.safetensors"),
        folder(other, tmp_path / "hf", old_names=True),
        tmp_path / "hf" / "vae",
        tmp_path / "hf" / "vae" / "diffusion_pytorch_model.safetensors",
    ]
    for vae in vaes:
        loaded = load_model("auto", main, parts={"vae": vae})
        assert_same(loaded, model, parts=("unet", "text"))
        assert_same(loaded, other, parts=("vae",))
    with pytest.raises(InputError, match="keys missing"):
        load_model("auto", main, parts={"vae": main})
    state = {k: v for k, v in other.vae.state_dict().items() if k != "decoder.conv_out.bias"}
    with pytest.raises(InputError, match=r"short.safetensors does not hold this model: 1 keys missing .*conv_out.bias"):
        load_model("auto", main, parts={"vae": write(state, tmp_path / "short.safetensors")})


def test_a_vae_from_a_repository_of_its_own_and_beside_a_pickle(models, tmp_path):
    """Recognised by its keys; nothing else of a folder that is asked for a VAE is read, or hashed."""
    model = models["sd15-inpainting"]
    main = write(single_file(model, openclip=False), tmp_path / "m.safetensors")
    root = folder(model, tmp_path / "hf")
    alone = tmp_path / "sd-vae-ft-mse"
    alone.mkdir()
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    state = {k: v + 1 for k, v in load_file(file).items()}
    write(state, alone / file.name)
    write(state, alone / "diffusion_pytorch_model.fp16.safetensors")
    write(state, file)
    unet = root / "unet" / file.name
    unet.rename(unet.with_suffix(".bin"))
    assert "its unet as a pickle alone" in refused(root)
    for path, read in ((alone, alone / file.name), (root, file)):
        loaded = load_model("auto", main, parts={"vae": path})
        assert torch.equal(loaded.vae.decoder.conv_out.bias, model.vae.decoder.conv_out.bias + 1)
        assert hashes_of(ModelOptions(weights=str(main), vae=str(path)))["model"] == [sha256(main), sha256(read)]
    with pytest.raises(InputError, match="sd-vae-ft-mse; a model's folder has unet/diffusion_pytorch_model"):
        load_model("auto", main, parts={"locator": alone})


def test_a_run_is_known_by_what_its_unets_predict(models, tmp_path):
    """As it is by the files of its weights; the VAE predicts nothing, and the embedded model has one file."""
    root = folder(models["sd15-inpainting"], tmp_path / "m")
    opts = ModelOptions(weights=str(root), locate_unet=str(root / "unet"), vae=str(root))
    before = hashes_of(opts)["model"]
    (root / "scheduler").mkdir()
    config = root / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert sorted(hashes_of(opts)["model"]) == sorted([*before, *2 * [sha256(config)]])
    assert hashes_of(ModelOptions())["model"] == [sha256(WEIGHTS / "tiny.safetensors")]


def test_a_run_is_known_by_every_file_of_its_model(tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("weights", "vae", "locator")]
    for file in files:
        file.write_text(file.name)
    opts = ModelOptions(weights=str(files[0]), vae=str(files[1]), locate_unet=str(files[2]))
    assert hashes_of(opts)["model"] == [sha256(file) for file in files]


def test_two_tensors_for_one_place(models, tmp_path):
    root = folder(models["sd15-inpainting"], tmp_path / "m")
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["encoder.mid_block.attentions.0.query.weight"] = state["encoder.mid_block.attentions.0.to_q.weight"].clone()
    write(state, path)
    with pytest.raises(InputError, match=r"1 unexpected \(first: encoder.mid_block.attentions.0.to_q.weight\)"):
        load_model("auto", root)


def text_to_image(model: LatentDiffusion) -> LatentDiffusion:
    """The same with a 4-channel UNet, as SD 1.4 has."""
    cfg = replace(model.cfg, unet=replace(model.cfg.unet, in_channels=4))
    out = LatentDiffusion(cfg)
    fill_random(out, torch.Generator().manual_seed(3))
    return out


def test_a_separate_unet_for_localisation(models, tmp_path):
    model = models["sd15-inpainting"]
    plain = text_to_image(model)
    main = write(single_file(model, openclip=False), tmp_path / "m.safetensors")
    for path in (write(single_file(plain, False), tmp_path / "sd14.safetensors"), folder(plain, tmp_path / "sd14")):
        loaded = load_model("auto", main, parts={"locator": path})
        assert_same(loaded, model)
        state = plain.unet.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in loaded.locator.state_dict().items())
        with pytest.raises(
            InputError, match="4 input channels, a text-to-image model; inpainting needs 9: give the sd15"
        ):
            load_model("auto", path)
    z, context = torch.randn(2, 4, 8, 8), torch.randn(1, 77, 64)
    t = torch.full((2,), 481)
    direct = plain.unet(z, t, context.expand(2, -1, -1))
    assert torch.allclose(loaded.eps_from_text(z, 481, context, None), direct, atol=1e-5)
    with pytest.raises(InputError, match="--locate-unet .* has 9 input channels"):
        load_model("auto", main, parts={"locator": main})
    with pytest.raises(InputError, match="an unknown UNet .* known are sd15-inpainting, sd2-inpainting"):
        load_model("auto", main, parts={"locator": WEIGHTS / "tiny.safetensors"})


def test_the_wrong_family_says_which_is_right(models, tmp_path):
    path = write(single_file(models["sd2-inpainting"], openclip=True), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="holds sd2-inpainting, not sd15-inpainting; use --model sd2-inpainting"):
        load_model("sd15-inpainting", path)
    with pytest.raises(InputError, match="a model of its own configuration, not sd2-inpainting"):
        load_model("sd2-inpainting", WEIGHTS / "tiny.safetensors")
    state = single_file(models["sd15-inpainting"], openclip=False)
    state |= {k: torch.cat([v, v], 1) for k, v in state.items() if k.endswith("attn2.to_k.weight")}
    with pytest.raises(
        InputError, match=r"an unknown UNet .*context_dim=128.*known are sd15-inpainting, sd2-inpainting"
    ):
        load_model("auto", write(state, tmp_path / "m.safetensors"))


def test_a_folder_says_what_its_unet_predicts(models, tmp_path):
    root = folder(models["sd2-inpainting"], tmp_path / "m")
    assert load_model("auto", root, prediction="v").unet.cfg.prediction == "v"
    (root / "scheduler").mkdir()
    config = root / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"prediction_type": "v_prediction"}))
    assert load_model("auto", root).unet.cfg.prediction == "v"
    assert load_model("auto", root, prediction="epsilon").unet.cfg.prediction == "v"  # the file knows better
    config.write_text(json.dumps({"prediction_type": "sample"}))
    with pytest.raises(InputError, match="prediction_type 'sample'; supported are"):
        load_model("auto", root)
    config.write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        load_model("auto", root)


def test_a_locator_predicts_what_its_folder_says(models, tmp_path):
    """However the locator is given, and whatever the inpainting UNet predicts."""
    main = write(single_file(models["sd2-inpainting"], openclip=True), tmp_path / "main.safetensors")
    root = folder(text_to_image(models["sd2-inpainting"]), tmp_path / "m")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    for path in (root, root / "unet", root / "unet" / "diffusion_pytorch_model.safetensors"):
        loaded = load_model("auto", main, parts={"locator": path})
        assert (loaded.locator.cfg.prediction, loaded.unet.cfg.prediction) == ("v", "epsilon"), path


def test_open_clip_text_tower_computes_the_same():
    """Our transformer with open_clip's weights gives open_clip's hidden states (one block fewer, as SD2 reads them)."""
    from open_clip.transformer import TextTransformer as Theirs

    theirs = Theirs(context_length=77, vocab_size=49408, width=64, heads=4, layers=3, output_dim=64, pad_id=0)
    g = torch.Generator().manual_seed(0)
    for p in theirs.parameters():  # small branches: a wrong activation or norm epsilon shows
        p.data = 0.1 * torch.randn(p.shape, generator=g)
    theirs = theirs.double()
    ours = TextTransformer(TextConfig(width=64, heads=4, layers=2, quick_gelu=False, pad_token=0)).double()
    state = {}
    for key, value in theirs.state_dict().items():
        names = open_clip_names(key)
        state |= dict(zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True))
    ours.load_state_dict({k: state[k] for k in ours.state_dict()})
    tokens = ours.tokenize(["a photo of a cat", "adversarial"])
    x = theirs.token_embedding(tokens) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:2]:
        x = block(x, attn_mask=theirs.attn_mask)
    expected = theirs.ln_final(x)
    assert ((ours(ours.embed(tokens)) - expected).norm() / expected.norm()) < 1e-6


# Files that are not what they should be


def refused(path) -> str:
    with pytest.raises(InputError) as e:
        load_model("auto", path)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_model_file(tmp_path_factory.mktemp("small"))


def test_hostile_files(small, tmp_path):
    good = small.read_bytes()
    header = int.from_bytes(good[:8], "little")
    path = tmp_path / "m.safetensors"

    def said(content: bytes) -> str:
        path.write_bytes(content)
        return refused(path)

    assert "not a whole safetensors file" in said(b"")
    assert "not a whole safetensors file" in said(good[:7])
    assert "not a whole safetensors file" in said(good[: header // 2])
    assert "not a whole safetensors file" in said(good[:-1])
    assert "not a whole safetensors file" in said(good + b"\0")
    assert "not a whole safetensors file" in said((1 << 62).to_bytes(8, "little") + good[8:])
    assert "not a whole safetensors file" in said(good.replace(b'"shape":[8,', b'"shape":[9,', 1))
    assert "damaged" in said(good.replace(b'\\"num_heads\\": 2', b'\\"num_heads\\": 1'))
    assert "damaged" in said(good.replace(b'\\"layers\\": 1,', b'\\"layers\\": 9,'))
    assert "damaged" in said(good[:-1] + bytes([good[-1] ^ 1]))
    assert "is a folder" in refused_part(tmp_path)
    assert "no weights file in" in refused(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    assert "looks like a pickle" in refused(path)
    assert f"python -m diffender weights convert {path}" in refused(path)


def refused_part(path) -> str:
    from diffender.utils.files import open_safetensors

    with pytest.raises(InputError) as e:
        open_safetensors(path)
    return str(e.value)


def test_tensors_that_do_not_fit(models, tmp_path):
    model = models["sd15-inpainting"]
    path = tmp_path / "m.safetensors"
    key = PREFIXES["unet"] + "out.2.bias"

    def said(change: dict, drop: tuple[str, ...] = ()) -> str:
        state = single_file(model, openclip=False) | change
        for k in drop:
            del state[k]
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        return refused(path)

    assert f"{key} of dtype I32 for F16, BF16, F32, F64" in said({key: torch.zeros(4, dtype=torch.int32)})
    assert f"{key} (5,) for (4,)" in said({key: torch.zeros(5)})
    assert f"{key} (0,) for (4,)" in said({key: torch.zeros(0)})
    assert "1 keys missing (first: model.diffusion_model.out.2.bias), 0 unexpected" in said({}, (key,))
    assert "1 unexpected (first: another_model.x)" in said({"another_model.x": torch.zeros(1)})
    assert "1 unexpected (first: a\\nb\\x1b)" in said({"a\nb\x1b": torch.zeros(1)})  # names are shown tame
    assert f"{key} holds NaN or infinity" in said({key: torch.full((4,), torch.nan)})
    twice = {"cond_stage_model.model.ln_final.weight": torch.ones(64)}  # OpenCLIP's name beside SD1's
    assert "1 unexpected (first: cond_stage_model.model.ln_final.weight)" in said(twice)
    for shape in ((), (289,), (96,)):  # of a fused projection: 3 x 96 are wanted
        state = single_file(models["sd2-inpainting"], openclip=True)
        state[OPEN_CLIP + "transformer.resblocks.0.attn.in_proj_bias"] = torch.zeros(shape)
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        assert "transformer.resblocks.0.attn.in_proj_bias" in refused(path)
    huge = {key: torch.tensor([0, 0, 0, 1e6])}
    save_file({k: v.contiguous() for k, v in (single_file(model, openclip=False) | huge).items()}, path)
    load_model("auto", path)
    with pytest.raises(InputError, match=r"holds NaN or infinity in torch.float16; try --dtype float32"):
        load_model("auto", path, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    """The UNet in half precision, everything between in float32: eps within 2 % of float32's, gradients flow."""
    full, half = load_model(), load_model(dtype=dtype)
    g = torch.Generator().manual_seed(0)
    z, cond = (torch.randn(1, 4, 28, 28, generator=g), torch.randn(1, 5, 28, 28, generator=g))
    context = full.encode_text(["clean"])
    z.requires_grad_()
    a, b = full.eps(z, 481, context, cond), half.eps(z, 481, context, cond)
    assert b.dtype == torch.float32
    assert (a - b).norm() < 0.02 * a.norm()
    ga, gb = (torch.autograd.grad(y.square().sum(), z)[0] for y in (a, b))
    assert (ga - gb).norm() < 0.1 * ga.norm()


def test_micro_batches_change_nothing():
    model = load_model()
    model.keep = False
    g = torch.Generator().manual_seed(0)
    z, cond = (torch.randn(5, 4, 28, 28, generator=g), torch.randn(1, 5, 28, 28, generator=g))
    context = model.encode_text(["clean"]).requires_grad_()
    z.requires_grad_()
    results = []
    sizes: list[int] = []
    model.unet.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    for limit in (None, 2):
        model.micro_batch = limit
        eps = model.eps(z, 481, context, cond)
        results.append([eps, *torch.autograd.grad(eps.square().sum(), (z, context))])
    assert sizes == [5, 5, 2, 2, 1, *sizes[5:]]
    assert max(sizes[2:]) == 2
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


def test_the_embedded_file_is_described():
    assert "family: of our own" in weights.describe(weights.scan(WEIGHTS / "tiny.safetensors"))
    assert load_file(WEIGHTS / "tiny.safetensors").keys() >= {
        PREFIXES["unet"] + k for k in UNet(MODELS["tiny"].unet).state_dict()
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compvis", "hf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_the_published_size_load(name, layout, manifest, monkeypatch, tmp_path):
    """Every tensor of the manifests, in float16 with random values: strict, the family recognised. 2.7 GB of disk."""
    monkeypatch.undo()  # the presets at their full size
    g = torch.Generator().manual_seed(0)

    def make(manifest_name: str, path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: torch.rand(s, generator=g).half() for k, s in manifest(manifest_name).items()}, path)

    path = tmp_path / "m"
    if layout == "compvis":
        path = tmp_path / "m.safetensors"
        make(f"{name}.compvis", path)
    else:
        make(f"{name}.hf.unet", path / "unet/diffusion_pytorch_model.fp16.safetensors")
        make("sd-vae.hf.oldnames", path / "vae/diffusion_pytorch_model.safetensors")
        make(f"{name}.hf.text_encoder", path / "text_encoder/model.safetensors")
    model = load_model("auto", path, torch.float16)
    assert model.cfg == MODELS[name]
    assert sum(p.numel() for p in model.unet.parameters()) > 859_000_000
