"""How the layouts of Stable Diffusion checkpoints name their tensors, as pure functions.

Ours is the layout of the CompVis single file. A Hugging Face folder and SD2's OpenCLIP text encoder are renamed to it.
"""

import re
from typing import NamedTuple

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
OPEN_CLIP = "cond_stage_model.model."
OLD_TEXT = "cond_stage_model.transformer."  # of the text encoder before transformers put it into `text_model`
EMA = "model_ema."

# Tensors of the official files that the model does not need: schedule tables (recomputed), EMA counters, leftovers of
# training, and of SD2's text encoder what lies behind the layer that it reads.
IGNORED = re.compile(
    r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|scale_factor"
    r"|model_ema\.(decay|num_updates)|(.*\.)?position_ids|(first_stage_model\.)?loss\..*"
    r"|cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)"
    r"|cond_stage_model\.model\.(logit_scale|text_projection|attn_mask|transformer\.resblocks\.23\..*))"
)

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out.",
}  # fmt: skip
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
VAE = (
    (r"encoder\.down\.(\d)", r"encoder.down_blocks.\1"), (r"\.block\.(\d)", r".resnets.\1"),
    (r"\.downsample\.", ".downsamplers.0."), (r"\.upsample\.", ".upsamplers.0."),
    (r"mid\.block_1", "mid_block.resnets.0"), (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"norm_out", "conv_norm_out"), (r"nin_shortcut", "conv_shortcut"),
)  # fmt: skip
OLD_VAE_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OPEN_CLIP_TEXT = (
    ("token_embedding.weight", "embeddings.token_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final", "final_layer_norm"), ("transformer.resblocks.", "encoder.layers."), ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("attn.", "self_attn."),
)  # fmt: skip


def unet_name(key: str, num_res_blocks: int) -> str:
    """The Hugging Face name of a UNet tensor that we call `key`."""
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(.*)", key)
    assert found is not None, f"{key} is no tensor of a UNet"
    side, index, rest = found[1], int(found[2]), found[3]
    if side == "middle":
        name = f"mid_block.{MIDDLE[index]}.{rest}"
    else:
        down = side == "input"
        level, j = divmod(index - down, num_res_blocks + 1)  # input block 0 is conv_in
        layer, rest = rest.split(".", 1)
        if down and j == num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if rest.startswith("conv."):  # behind the last resnet of a level, and its transformer where there is one
            return f"up_blocks.{level}.upsamplers.0.{rest}"
        name = f"{'down' if down else 'up'}_blocks.{level}.{('resnets', 'attentions')[int(layer)]}.{j}.{rest}"
    for ours, theirs in RESNET.items():
        name = name.replace(ours, theirs)
    return name


def vae_name(key: str, levels: int) -> str:
    """The Hugging Face name of a VAE tensor that we call `key`; the decoder's levels count the other way."""
    key = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", key)
    for ours, theirs in VAE:
        key = re.sub(ours, theirs, key)
    return key


def new_vae_name(key: str) -> str:
    """The present Hugging Face name of a VAE tensor from a file of any age."""
    for old, new in OLD_VAE_ATTENTION.items():
        key = key.replace(old, new)
    return key


def open_clip_names(key: str) -> list[str]:
    """Our names, within the text encoder, of one of OpenCLIP's tensors: three for a fused q, k, v projection."""
    for theirs, ours in OPEN_CLIP_TEXT:
        key = key.replace(theirs, ours)
    if ".in_proj_" in key:
        return [key.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
    return [key]


def ema_name(key: str) -> str:
    """The name of the averaged copy of a UNet tensor that we call `key`: without the dots, in files of training."""
    return EMA + (PREFIXES["unet"] + key).removeprefix("model.").replace(".", "")


class Signature(NamedTuple):
    """What the shapes of a UNet's tensors tell of its family; the number of heads they do not tell."""

    in_channels: int
    model_channels: int
    context_dim: int


def signature(shapes: dict[str, tuple[int, ...]]) -> Signature | None:
    """The signature of UNet tensors in our names or Hugging Face's; None where this is no such UNet."""
    ours = ("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    for keys in (ours, tuple(unet_name(k, 2) for k in ours)):
        conv_in, to_k = (shapes.get(k) for k in keys)
        if conv_in and len(conv_in) == 4 and to_k and len(to_k) == 2:
            return Signature(conv_in[1], conv_in[0], to_k[1])
    return None
