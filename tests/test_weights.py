"""Our own files: they round-trip, are strict about every key, and tell in one line what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffender.prompts import PromptPair
from diffender.utils.errors import InputError
from diffender.utils.files import check_fit, read_header, save_atomic, save_state, sha256
from diffender.weights.loading import WEIGHTS, load_model, save_model
from diffender.weights.prompts import load_prompts, save_prompts


def test_round_trip_with_the_config_in_the_header(model, tmp_path):
    path = tmp_path / "copy.safetensors"
    save_model(model, path, {})
    again = load_model("tiny", path)
    assert again.cfg == model.cfg
    for (k, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), k  # the embedded weights are float16 already: saving loses nothing
    assert not any(p.requires_grad for p in again.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["copy.safetensors"]
    convolutions = model.to(memory_format=torch.channels_last)
    save_model(convolutions, path, {})  # the order of memory is no part of a file
    assert torch.equal(load_model("auto", path).unet.out[2].weight, model.unet.out[2].weight)


def test_embedded_files_are_within_budget():
    assert (WEIGHTS / "tiny.safetensors").stat().st_size <= 27e6
    assert sum(p.stat().st_size for p in WEIGHTS.iterdir()) <= 28e6
    assert read_header(WEIGHTS / "tiny.safetensors")["config"]["image_size"] == 224


def test_the_card_has_the_hash_of_every_file():
    card = (WEIGHTS / "README.md").read_text()
    files = list(WEIGHTS.glob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        assert f"`{sha256(path)}`" in card, path.name


def test_official_extras_are_passed_over(tmp_path):
    state = load_file(WEIGHTS / "tiny.safetensors")
    state["betas"] = torch.zeros(1000)
    state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "extras.safetensors", metadata=metadata())
    load_model("tiny", tmp_path / "extras.safetensors")


def metadata() -> dict[str, str]:
    header = read_header(WEIGHTS / "tiny.safetensors")
    del header["digest"]  # of the tensors as they are there
    return {"diffender": json.dumps(header)}


def damaged(tmp_path, change) -> str:
    state = load_file(WEIGHTS / "tiny.safetensors")
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
    assert "model.diffusion_model.out.2.bias (5,) for (16,)" in message


def test_tensors_of_another_shape_do_not_fit():
    with pytest.raises(InputError, match="a does not fit net: 1 tensors differ .w.; give the file made for it"):
        check_fit(
            Path("a"), "net", {"w": torch.zeros(2), "b": torch.zeros(1)}, {"w": torch.zeros(3), "b": torch.zeros(1)}
        )


def test_files_and_names_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone"):
        load_model("tiny", tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="choose one of auto, tiny, sd15-inpainting"):
        load_model("sd3")
    with pytest.raises(InputError, match="needs --weights; python -m diffender weights fetch sd15-inpainting"):
        load_model("sd15-inpainting")
    with pytest.raises(InputError, match="unknown prediction 'v_prediction'; choose one of epsilon, v, or None"):
        load_model(prediction="v_prediction")
    with pytest.raises(InputError, match="unknown part 'unet'; choose from vae, locator"):
        load_model(parts={"unet": WEIGHTS / "tiny.safetensors"})


def test_random_weights_are_the_same_each_time():
    a, b = (load_model("tiny", "random", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert {p.dtype for p in a.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for part in (a.vae, a.text) for p in part.parameters()} == {torch.float32}
    with pytest.raises(InputError, match="give --model"):
        load_model("auto", "random")
    for given in ({"ema": True}, {"parts": {"vae": "gone"}}, {"parts": {"locator": "gone"}}, {"prediction": "epsilon"}):
        with pytest.raises(
            InputError, match="random makes a whole model; leave out --ema, --vae, --locate-unet and --p"
        ):
            load_model("tiny", "random", **given)
    load_model("tiny", "random", parts={"vae": None, "locator": None})


def test_prompts_round_trip_and_must_fit(tmp_path):
    prompts = PromptPair(16, 64)
    save_prompts(prompts, tmp_path / "p.safetensors", {"shots": 8})
    again = load_prompts(tmp_path / "p.safetensors", 64)
    assert torch.equal(again.ctx_locate, prompts.ctx_locate)
    assert read_header(tmp_path / "p.safetensors")["shots"] == 8
    with pytest.raises(
        InputError, match=r"shapes \(16, 64\) and \(16, 64\); this model's are 768 wide: use --prompt manual"
    ):
        load_prompts(tmp_path / "p.safetensors", 768)
    with pytest.raises(InputError, match="two tensors"):
        load_prompts(WEIGHTS / "tiny.safetensors", 64)
    with pytest.raises(InputError, match="1 to 75"):
        PromptPair(76, 64)


def test_a_changed_bit_of_a_prompt_is_found(tmp_path):
    path = tmp_path / "p.safetensors"
    save_prompts(PromptPair(16, 64), path, {"shots": 8})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged: its checksum"):
        load_prompts(path, 64)


def test_weights_have_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_atomic({"a": torch.ones(2)}, tmp_path / "w.safetensors", {})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """Whose words the commands turn into one line; what was there before is still whole."""
    resource = pytest.importorskip("resource", reason="not a POSIX system: it has no limit for files")
    path = tmp_path / "state"
    save_state({"x": torch.zeros(3)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_state({"x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(path, weights_only=True)["x"].shape == (3,)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
