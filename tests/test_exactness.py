"""Every operation that is not torch's own, in every layout and dtype that runs, against float64 at hard inputs.

The worst errors, ours and torch's, are printed as a table: pytest -s -n 0 tests/test_exactness.py.
"""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffender.noise import generator
from diffender.stable_diffusion.layers import GroupNorm, Linear, Upsample
from diffender.stable_diffusion.unet import CrossAttention
from diffender.stable_diffusion.vae import AttnBlock

INPUTS = {  # mean and standard deviation of what enters
    "plain": (0, 1),
    "mean of 10 deviations": (1, 0.1),
    "mean of 100 deviations": (10, 0.1),
    "mean of 1000 deviations": (100, 0.1),
    "large": (0, 1e4),
    "tiny": (0, 1e-4),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def heads_apart(attention: CrossAttention, x, context):
    q, k, v = (rearrange(y, "b l (n d) -> b n l d", n=attention.heads) for y in (
        F.linear(x, attention.to_q.weight), F.linear(context, attention.to_k.weight),
        F.linear(context, attention.to_v.weight),
    ))  # fmt: skip
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)")
    return F.linear(out, attention.to_out[0].weight, attention.to_out[0].bias)


def over_positions(block: AttnBlock, x):
    h = F.group_norm(x, block.norm.num_groups, block.norm.weight, block.norm.bias, block.norm.eps)
    q, k, v = (rearrange(F.conv2d(h, f.weight, f.bias), "b c h w -> b 1 (h w) c") for f in (block.q, block.k, block.v))
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[-2])
    return x + F.conv2d(out, block.proj_out.weight, block.proj_out.bias)


OPERATIONS = {  # name: our module, shape of its input, the same in torch's functions
    "group norm": (
        lambda: GroupNorm(32, 64),
        (2, 64, 32, 32),
        lambda m, x: F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps),
    ),
    "group norm of 3x5 pixels": (
        lambda: GroupNorm(8, 64, eps=1e-6),
        (2, 64, 3, 5),
        lambda m, x: F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps),
    ),
    "upsample": (
        lambda: Upsample(32),
        (2, 32, 16, 16),
        lambda m, x: F.conv2d(F.interpolate(x, scale_factor=2), m.conv.weight, m.conv.bias, padding=1),
    ),
    "linear": (lambda: Linear(128, 256), (2, 1024, 128), lambda m, x: F.linear(x, m.weight, m.bias)),
    "self-attention": (lambda: CrossAttention(64, 64, 4), (2, 256, 64), lambda m, x: heads_apart(m, x, x)),
    "attention of the VAE": (lambda: AttnBlock(64, 32), (2, 64, 16, 16), over_positions),
}


def values_and_gradients(function, x, weights):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_are_at_most_three_times_those_of_torch(name, layout, dtype):
    """Relative L2 error against float64, of values and of gradients. Torch's is that of its contiguous kernels.

    An error of one unit in the last place counts as torch's where torch's own is smaller.
    """
    make, shape, in_torch = OPERATIONS[name]
    if len(shape) == 3 and layout == "channels last":
        pytest.skip("tokens have one layout")
    module = make().requires_grad_(False)
    for key, p in module.named_parameters():
        r = torch.randn(p.shape, generator=generator("exactness", name, key))
        nn.init.zeros_(p).add_(r / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * r + key.endswith("norm.weight"))
    module = module.to(dtype).to(memory_format=LAYOUTS[layout])
    exact = make().double().requires_grad_(False)
    exact.load_state_dict(module.state_dict())
    for kind, (mean, std) in INPUTS.items():
        if name == "self-attention" and kind not in ("plain", "tiny"):
            continue  # behind a layer norm; the others would saturate the softmax, and the true gradient is 0
        g = generator("exactness", name, kind)
        x = (mean + std * torch.randn(shape, generator=g)).to(dtype)
        weights = torch.randn(in_torch(exact, x.double()).shape, generator=g).to(dtype)
        expected = values_and_gradients(lambda x: in_torch(exact, x), x.double(), weights.double())  # noqa: B023
        plain = make().to(dtype).requires_grad_(False)
        plain.load_state_dict(module.state_dict())
        theirs = values_and_gradients(lambda x: in_torch(plain, x), x, weights)  # noqa: B023
        laid_out = x.contiguous(memory_format=LAYOUTS[layout]) if x.ndim == 4 else x
        ours = values_and_gradients(module, laid_out, weights) if name != "self-attention" else values_and_gradients(
            lambda x: module(x, x), laid_out, weights  # noqa: B023
        )  # fmt: skip
        for what, mine, other, truth in zip(("value", "gradient"), ours, theirs, expected, strict=True):
            error, usual = (((y.double() - truth).norm() / truth.norm()).item() for y in (mine, other))
            print(f"\n{name} | {layout} | {dtype} | {kind} | {what} | {error:.1e} | {usual:.1e}", end="")
            assert error <= 3 * max(usual, torch.finfo(dtype).eps), f"{kind}, {what}: {error:.1e}, torch {usual:.1e}"
