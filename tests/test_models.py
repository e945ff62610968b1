"""Shapes, names and counts of every preset on the meta device, against the official checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffender.stable_diffusion.layers import Linear, Upsample
from diffender.stable_diffusion.model import MODELS, LatentDiffusion
from diffender.stable_diffusion.unet import UNet, UNetConfig, timestep_embedding
from diffender.stable_diffusion.vae import AutoencoderKL, VAEConfig
from diffender.weights.layouts import (
    IGNORED,
    OPEN_CLIP,
    PREFIXES,
    ema_name,
    new_vae_name,
    open_clip_names,
    unet_name,
    vae_name,
)
from diffender.weights.loading import load_model

COUNTS = {  # parameters, tensors
    ("sd15-inpainting", "unet"): (859_535_364, 686),
    ("sd15-inpainting", "vae"): (83_653_863, 248),
    ("sd15-inpainting", "text"): (123_060_480, 196),
    ("sd2-inpainting", "unet"): (865_925_124, 686),
    ("sd2-inpainting", "vae"): (83_653_863, 248),
    ("sd2-inpainting", "text"): (340_387_840, 372),
}


def on_meta(name: str) -> LatentDiffusion:
    with torch.device("meta"):
        return LatentDiffusion(MODELS[name])


def shapes(model: LatentDiffusion) -> dict[str, list[int]]:
    return {
        prefix + k: list(v.shape)
        for part, prefix in PREFIXES.items()
        for k, v in getattr(model, part).state_dict().items()
    }


@pytest.mark.parametrize("name", ["sd15-inpainting", "sd2-inpainting"])
def test_counts(name):
    model = on_meta(name)
    for part in PREFIXES:
        parameters = list(getattr(model, part).parameters())
        assert (sum(p.numel() for p in parameters), len(parameters)) == COUNTS[name, part]


def test_every_preset_is_counted_or_embedded():
    assert {name for name, _ in COUNTS} | {"tiny"} == set(MODELS)


@pytest.mark.parametrize("name", ["sd15-inpainting", "sd2-inpainting"])
def test_names_and_shapes_equal_the_single_file(name, manifest):
    official = {}
    for key, shape in manifest(f"{name}.compvis").items():
        if IGNORED.fullmatch(key):
            continue
        ours = [key]
        if key.startswith(OPEN_CLIP):
            ours = [PREFIXES["text"] + k for k in open_clip_names(key.removeprefix(OPEN_CLIP))]
        for k in ours:
            assert k not in official
            official[k] = [shape[0] // len(ours), *shape[1:]]
    assert shapes(on_meta(name)) == official


def test_ignored_keys_are_few_and_named(manifest):
    """What is passed over in the official files is what the format's description lists, and not a tensor more."""
    for name, count in (("sd15-inpainting", 12 + 2 + 1), ("sd2-inpainting", 12 + 2 + 2 + 12)):
        assert sum(bool(IGNORED.fullmatch(k)) for k in manifest(f"{name}.compvis")) == count


@pytest.mark.parametrize("name", ["sd15-inpainting", "sd2-inpainting"])
def test_hugging_face_names_are_a_bijection(name, manifest):
    model = on_meta(name)
    unet = [unet_name(k, 2) for k in model.unet.state_dict()]
    vae = [vae_name(k, 4) for k in model.vae.state_dict()]
    for names, official in (
        (unet, manifest(f"{name}.hf.unet")),
        (vae, manifest(f"{name}.hf.vae")),
        (vae, [new_vae_name(k) for k in manifest("sd-vae.hf.oldnames")]),
    ):
        assert len(set(names)) == len(names)
        assert set(names) == set(official)


@pytest.mark.parametrize("name", ["sd15-inpainting", "sd2-inpainting"])
def test_averaged_copies_have_names_of_their_own(name):
    """Without their dots the names stay apart; the scheme as files of training have it."""
    keys = list(on_meta(name).unet.state_dict())
    assert len({ema_name(k) for k in keys}) == len(keys)
    assert ema_name("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_text_names_equal_the_hugging_face_file(manifest):
    for name in ("sd15-inpainting", "sd2-inpainting"):
        ours = {"text_model." + k: list(v.shape) for k, v in on_meta(name).text.state_dict().items()}
        assert ours == {k: v for k, v in manifest(f"{name}.hf.text_encoder").items() if "position_ids" not in k}


def test_timestep_embedding_has_cosines_first_and_divides_by_half():
    e = timestep_embedding(torch.tensor([3]), 320)[0]
    assert e[0].item() == pytest.approx(torch.tensor(3.0).cos().item())
    assert e[160].item() == pytest.approx(torch.tensor(3.0).sin().item())
    assert e[159].item() == pytest.approx(torch.tensor(3 * 10000 ** (-159 / 160)).cos().item(), rel=1e-6)


def test_sizes_that_do_not_fit_say_so():
    with torch.device("meta"):
        unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 1), attention_levels=(), num_heads=4))
        vae = AutoencoderKL(VAEConfig(ch=32, ch_mult=(1, 1)))
        with pytest.raises(ValueError, match="multiples of 2"):
            unet(torch.empty(1, 9, 7, 8), torch.empty(1), torch.empty(1, 77, 768))
        with pytest.raises(ValueError, match="multiples of 2"):
            vae.posterior(torch.empty(1, 3, 31, 32))


def test_a_vae_on_squares_of_pixels_has_the_same_latents_and_sees_each_pixel_once():
    cfg = VAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, patch=4)
    vae = AutoencoderKL(cfg)
    assert cfg.factor == 8
    assert vae.encoder.conv_in.weight.shape == (8, 48, 3, 3)
    x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = vae.encode(x)
    assert z.shape == (1, 4, 4, 8)
    assert vae.decode(z).shape == x.shape
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    assert gradient.ne(0).all()


def test_the_log_variance_of_latents_is_bounded_as_published():
    vae = AutoencoderKL(VAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4))
    torch.nn.init.zeros_(vae.quant_conv.weight)
    vae.quant_conv.bias.data = torch.tensor([0.0] * 4 + [99, -99, 19, -29])
    assert vae.posterior(torch.rand(1, 3, 8, 8)).logvar[0, :, 0, 0].tolist() == [20, -30, 19, -29]


def test_a_unet_on_squares_of_latents_has_the_same_inputs_and_outputs_and_sees_each_latent():
    cfg = UNetConfig(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), context_dim=8, num_heads=2,
        norm_groups=4, patch=2,
    )  # fmt: skip
    unet = UNet(cfg)
    assert cfg.multiple == 4
    assert unet.input_blocks[0][0].weight.shape == (8, 36, 3, 3)
    assert unet.out[2].weight.shape == (16, 8, 3, 3)
    g = torch.Generator().manual_seed(0)
    x, t, context = torch.randn(2, 9, 8, 12, generator=g).requires_grad_(), torch.tensor([3, 900]), torch.ones(2, 5, 8)
    eps = unet(x, t, context)
    assert eps.shape == (2, 4, 8, 12)
    (gradient,) = torch.autograd.grad(eps.square().sum(), x)
    assert gradient.ne(0).all()
    with pytest.raises(ValueError, match="must be multiples of 4"):
        unet(x[..., :10], t, context)


def test_tokens_are_those_of_the_published_tokenizers(model):
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert model.text.tokenize(["a photo of a cat"])[0].tolist() == cat + [49407] * 70
    with torch.device("meta"):
        sd2 = LatentDiffusion(MODELS["sd2-inpainting"]).text
    assert sd2.tokenize(["a photo of a cat"])[0].tolist() == cat + [0] * 70
    long = model.text.tokenize(["a photo of a" + " cat" * 200])[0]
    assert long.shape == (77,)
    assert long[:7].tolist() == [*cat[:6], 2368], "the first 75"
    assert long[-1] == 49407


def test_text_tower_is_causal(model):
    """What follows a position does not change it: learned vectors may stand before any padding."""
    g = torch.Generator().manual_seed(0)
    e = torch.randn(1, 77, 64, generator=g)
    changed = e.clone()
    changed[:, 40:] = torch.randn(1, 37, 64, generator=g)  # adding a constant would vanish in the layer norm
    assert torch.allclose(model.text(e)[:, :40], model.text(changed)[:, :40], atol=1e-6)
    assert not torch.allclose(model.text(e)[:, 40:], model.text(changed)[:, 40:], atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 3, 1, 4)])
def test_doubling_and_convolution_are_one(shape):
    layer = Upsample(3).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def written_out() -> torch.Tensor:
        return layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    def same() -> bool:
        a, b = layer(x), written_out()
        weights = [x, *layer.parameters()] if layer.conv.weight.requires_grad else [x]
        grads = [torch.autograd.grad(y.square().sum(), weights) for y in (a, b)]
        return torch.allclose(a, b, atol=1e-12) and all(torch.allclose(*g, atol=1e-12) for g in zip(*grads))  # noqa: B905

    assert same()
    layer.requires_grad_(False)
    assert same()
    with torch.no_grad():
        layer.conv.weight.mul_(2)
    assert same(), "changed in place"
    layer.conv.weight.data += 1
    assert same(), "changed behind autograd's back, as adapters are merged"
    assert list(layer.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("tokens", [7, 1200])
def test_a_convolution_over_tokens_is_the_linear_layer(tokens):
    ours, theirs = Linear(150, 100), nn.Linear(150, 100)  # small, and large enough
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, tokens, 150, requires_grad=True)
    results = [
        (layer(x), *torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))) for layer in (ours, theirs)
    ]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5 * b.detach().abs().max().item())


@pytest.mark.parametrize("n", [1, 3])
def test_contexts_that_share_their_latents(n):
    """n contexts for B images in one evaluation: what n B rows of their own give, gradients too."""
    g = torch.Generator().manual_seed(0)
    unet = load_model().unet
    x = torch.randn(2, 9, 28, 28, generator=g, requires_grad=True)
    context = torch.randn(2 * n, 77, 64, generator=g, requires_grad=True)
    t = torch.tensor([20, 700])
    shared = unet(x, t, context)
    alone = unet(x.repeat(n, 1, 1, 1), t.repeat(n), context)
    assert torch.allclose(shared, alone, atol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), (x, context)) for out in (shared, alone)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item())
