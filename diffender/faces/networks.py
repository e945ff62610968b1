"""Face recognisers, images to embeddings, and the head that makes a classifier of one: cosine to a gallery.

InceptionResnetV1 (FaceNet, Szegedy et al. 2017 and Schroff et al. 2015) has the key names of the published
`20180402-114759-vggface2.pt`, but for its class head; MobileFaceNet (Chen et al. 2018) those of its common PyTorch
files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 64.0  # of the cosines that become logits


class BasicConv(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    """x + scale * mix(branches(x)); `branches` are lists of (c_out, kernel, padding)."""

    def __init__(self, channels: int, branches: tuple, scale: float, relu: bool = True):
        super().__init__()
        self.scale, self.relu, self.count = scale, relu, len(branches)
        for i, branch in enumerate(branches):
            convs, c = [], channels
            for c_out, kernel, padding in branch:
                convs.append(BasicConv(c, c_out, kernel, padding=padding))
                c = c_out
            setattr(self, f"branch{i}", convs[0] if len(convs) == 1 else nn.Sequential(*convs))
        self.conv2d = nn.Conv2d(sum(branch[-1][0] for branch in branches), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.count)], dim=1)
        y = x + self.scale * self.conv2d(y)
        return F.relu(y) if self.relu else y


def block35() -> Residual:
    return Residual(256, (((32, 1, 0),), ((32, 1, 0), (32, 3, 1)), ((32, 1, 0), (32, 3, 1), (32, 3, 1))), 0.17)


def block17() -> Residual:
    return Residual(896, (((128, 1, 0),), ((128, 1, 0), (128, (1, 7), (0, 3)), (128, (7, 1), (3, 0)))), 0.10)


def block8(scale: float = 0.20, relu: bool = True) -> Residual:
    return Residual(1792, (((192, 1, 0),), ((192, 1, 0), (192, (1, 3), (0, 1)), (192, (3, 1), (1, 0)))), scale, relu)


class Mixed6a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch0 = BasicConv(256, 384, 3, 2)
        self.branch1 = nn.Sequential(BasicConv(256, 192, 1), BasicConv(192, 192, 3, 1, 1), BasicConv(192, 256, 3, 2))
        self.branch2 = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x)], dim=1)


class Mixed7a(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch0 = nn.Sequential(BasicConv(896, 256, 1), BasicConv(256, 384, 3, 2))
        self.branch1 = nn.Sequential(BasicConv(896, 256, 1), BasicConv(256, 256, 3, 2))
        self.branch2 = nn.Sequential(BasicConv(896, 256, 1), BasicConv(256, 256, 3, 1, 1), BasicConv(256, 256, 3, 2))
        self.branch3 = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], dim=1)


class InceptionResnetV1(nn.Module):
    """FaceNet: images (B, 3, 160, 160), normalised, to unit embeddings (B, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d_1a, self.conv2d_2a = BasicConv(3, 32, 3, 2), BasicConv(32, 32, 3)
        self.conv2d_2b = BasicConv(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b, self.conv2d_4a = BasicConv(64, 80, 1), BasicConv(80, 192, 3)
        self.conv2d_4b = BasicConv(192, 256, 3, 2)
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(5)))
        self.mixed_6a = Mixed6a()
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(10)))
        self.mixed_7a = Mixed7a()
        self.repeat_3 = nn.Sequential(*(block8() for _ in range(5)))
        self.block8 = block8(1.0, relu=False)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (
            self.conv2d_1a, self.conv2d_2a, self.conv2d_2b, self.maxpool_3a, self.conv2d_3b, self.conv2d_4a,
            self.conv2d_4b, self.repeat_1, self.mixed_6a, self.repeat_2, self.mixed_7a, self.repeat_3, self.block8,
        ):  # fmt: skip
            x = layer(x)
        x = self.last_bn(self.last_linear(x.mean(dim=(2, 3))))
        return F.normalize(x, dim=1)


class ConvBlock(nn.Module):
    """Convolution and norm, with a PReLU unless it is linear; `conv` are stride, padding and groups of nn.Conv2d."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple, linear: bool = False, **conv: int):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, bias=False, **conv)
        self.bn = nn.BatchNorm2d(c_out)
        self.prelu = nn.Identity() if linear else nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        c = c_in * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, c, 1, bias=False),
            nn.BatchNorm2d(c),
            nn.PReLU(c),
            nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False),
            nn.BatchNorm2d(c),
            nn.PReLU(c),
            nn.Conv2d(c, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.connect else self.conv(x)


class MobileFaceNet(nn.Module):
    """Square images (B, 3, S, S), normalised, to unit embeddings (B, 128); inside they are 112 x 96, as it was trained.

    Aligned faces of 6:7 are stretched to squares on reading, and brought back here.
    """

    STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))  # expand, width, n, stride

    def __init__(self):
        super().__init__()
        self.conv1 = ConvBlock(3, 64, 3, stride=2, padding=1)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks, c = [], 64
        for expansion, width, n, stride in self.STAGES:
            for i in range(n):
                blocks.append(Bottleneck(c, width, stride if i == 0 else 1, expansion))
                c = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(128, 512, 1)
        self.linear7 = ConvBlock(512, 512, (7, 6), groups=512, linear=True)
        self.linear1 = ConvBlock(512, 128, 1, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (112, 96), mode="bilinear", antialias=True)
        x = self.conv2(self.blocks(self.dw_conv1(self.conv1(x))))
        return F.normalize(self.linear1(self.linear7(x)).flatten(1), dim=1)


class Gallery(nn.Module):
    """Closed-set identification: logits are the cosines to a prototype of each person, times SCALE."""

    prototypes: Tensor

    def __init__(self, embed: nn.Module, prototypes: Tensor):
        super().__init__()
        self.embed = embed
        self.register_buffer("prototypes", prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * self.embed(x) @ self.prototypes.T


def prototypes(embeddings: Tensor, people: Tensor) -> Tensor:
    """The mean unit embedding of each person, normalised again, (P, D), from (N, D) and their numbers (N,)."""
    return F.normalize(torch.stack([embeddings[people == p].mean(dim=0) for p in range(int(people.max()) + 1)]), dim=1)
