"""Loading: the embedded model round-trips, official layouts load strictly, wrong files are told in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffender.errors import InputError
from diffender.layouts import OPEN_CLIP, PREFIXES, from_open_clip, unet_name, vae_name
from diffender.prompts import PromptPair, load_prompts, save_prompts
from diffender.weights import EMBEDDED, load_model, read_header, save_model


def test_round_trip_with_the_config_in_the_header(model, tmp_path):
    path = tmp_path / "copy.safetensors"
    save_model(model, path, {})
    again = load_model("tiny", path)
    assert again.cfg == model.cfg
    for (k, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), k  # the embedded weights are float16 already: saving loses nothing
    assert not any(p.requires_grad for p in again.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["copy.safetensors"]


def test_embedded_files_are_within_budget():
    assert (EMBEDDED / "tiny.safetensors").stat().st_size <= 24e6
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) <= 24.5e6
    assert read_header(EMBEDDED / "tiny.safetensors")["config"]["image_size"] == 224
    assert (EMBEDDED / "README.md").read_text().count("sha256") >= 1


def test_official_extras_are_passed_over(tmp_path):
    state = load_file(EMBEDDED / "tiny.safetensors")
    state["betas"] = torch.zeros(1000)
    state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "extras.safetensors", metadata=metadata())
    load_model("tiny", tmp_path / "extras.safetensors")


def metadata() -> dict[str, str]:
    return {"diffender": json.dumps(read_header(EMBEDDED / "tiny.safetensors"))}


def damaged(tmp_path, change) -> str:
    state = load_file(EMBEDDED / "tiny.safetensors")
    change(state)
    save_file(state, tmp_path / "damaged.safetensors", metadata=metadata())
    with pytest.raises(InputError) as e:
        load_model("tiny", tmp_path / "damaged.safetensors")
    message = str(e.value)
    assert "\n" not in message
    return message


def test_missing_and_unexpected_keys_are_named(tmp_path):
    def change(state):
        for i in (0, 2):
            state[f"extra.{i}"] = state.pop(f"model.diffusion_model.time_embed.{i}.weight")

    message = damaged(tmp_path, change)
    assert "2 keys missing (first: model.diffusion_model.time_embed.0.weight" in message
    assert "2 unexpected (first: extra.0, extra.2)" in message


def test_wrong_shapes_are_named(tmp_path):
    message = damaged(tmp_path, lambda s: s.update({"model.diffusion_model.out.2.bias": torch.zeros(5)}))
    assert "model.diffusion_model.out.2.bias (5,) for (4,)" in message


def test_a_pickle_is_refused_and_the_way_out_named(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(InputError, match=r"looks like a pickle.*save_file"):
        load_model("tiny", path)
    (tmp_path / "cut.safetensors").write_bytes((EMBEDDED / "prompts.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        load_model("tiny", tmp_path / "cut.safetensors")


def test_files_and_names_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no weights file .*gone"):
        load_model("tiny", tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="choose one of tiny, sd15-inpainting"):
        load_model("sd3")
    with pytest.raises(InputError, match="needs --weights"):
        load_model("sd15-inpainting")


def test_open_clip_text_tower_loads_and_computes_the_same():
    """Our transformer with open_clip's weights gives open_clip's hidden states (one block fewer, as SD2 reads them)."""
    from open_clip.transformer import TextTransformer as Theirs

    from diffender.models.text import TextConfig, TextTransformer

    torch.manual_seed(0)
    theirs = Theirs(context_length=77, vocab_size=49408, width=64, heads=4, layers=3, output_dim=64, pad_id=0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.2)  # large enough for a wrong activation or norm to show
    ours = TextTransformer(TextConfig(width=64, heads=4, layers=2, quick_gelu=False, pad_token=0))
    state = from_open_clip({OPEN_CLIP + k: v for k, v in theirs.state_dict().items()})
    prefix = PREFIXES["text"]
    keys = ours.state_dict().keys()
    ours.load_state_dict({k: state[prefix + k] for k in keys})
    tokens = ours.tokenize(["a photo of a cat", "adversarial"])
    x = theirs.token_embedding(tokens) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:2]:
        x = block(x, attn_mask=theirs.attn_mask)
    assert torch.allclose(ours(ours.embed(tokens)), theirs.ln_final(x), rtol=1e-4, atol=1e-4)


def test_a_hugging_face_folder_loads(model, tmp_path):
    """The embedded model written out as a folder, with the VAE attention names of old files, comes back the same."""
    cfg = model.cfg
    text = {f"text_model.{k}": v for k, v in model.text.state_dict().items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    vae = {vae_name(k, len(cfg.vae.ch_mult)): v for k, v in model.vae.state_dict().items()}
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {k.replace(f".{new}.", f".{old}."): v.squeeze() if new in k else v for k, v in vae.items()}
    parts = {
        "unet/diffusion_pytorch_model": {
            unet_name(k, cfg.unet.num_res_blocks): v for k, v in model.unet.state_dict().items()
        },
        "vae/diffusion_pytorch_model": vae,
        "text_encoder/model.fp16": text,
    }
    for name, state in parts.items():
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir()
        save_file(state, path)
    again = load_model("tiny", tmp_path)
    for (k, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), k
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights file .*unet/diffusion_pytorch_model.safetensors"):
        load_model("tiny", tmp_path)


def test_prompts_round_trip_and_must_fit(tmp_path):
    prompts = PromptPair(16, 64)
    save_prompts(prompts, tmp_path / "p.safetensors", {"shots": 8})
    again = load_prompts(tmp_path / "p.safetensors", 64)
    assert torch.equal(again.ctx_locate, prompts.ctx_locate)
    assert read_header(tmp_path / "p.safetensors") == {"shots": 8}
    with pytest.raises(InputError, match="prompts of width 64; this model's are 768 wide"):
        load_prompts(tmp_path / "p.safetensors", 768)
    with pytest.raises(InputError, match="two tensors"):
        load_prompts(EMBEDDED / "tiny.safetensors", 64)
    with pytest.raises(InputError, match="1 to 75"):
        PromptPair(76, 64)
