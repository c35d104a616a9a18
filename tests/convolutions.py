"""Convolutions: models to compress, pruned weights, geometries, and what a result is compared with."""

import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.nn import ArrangedConv2d24, Conv2d24, PrepackedConv2d

FORMS = {"conv24": Conv2d24, "arranged conv24": ArrangedConv2d24, "prepacked conv": PrepackedConv2d}


class Convolved(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels=8):
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, 12, 3, padding=1), nn.Conv2d(12, channels, 1, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def convolved(count=1, pruned=True, channels_last=False):
    model = nn.Sequential(*[Convolved() for _ in range(count)]).eval()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if pruned:
        sk.prune_(model, sk.Magnitude("2:4"))
    return model


def pruned_conv(inputs=12, outputs=6, kernel=(3, 2), **options):
    conv = nn.Conv2d(inputs, outputs, kernel, **options)
    sk.prune_(conv, sk.Magnitude("2:4"))
    return conv.eval()


GEOMETRIES = [
    (1, 0, 1), (1, 1, 1), (2, 1, 1), (1, 2, 2), ((2, 1), (0, 3), (1, 2)), (3, (4, 0), 1), (1, "same", (1, 2)),
]  # fmt: skip


def sparse_conv24(outputs, inputs, height=3, width=3, dtype=torch.float32):
    """A normal weight pruned to 2:4 along the input channels, and its mask."""
    weight = torch.randn(outputs, height, width, inputs).to(dtype)
    pruned, mask = sk.nm_prune(weight.flatten(0, 2), 2, 4)
    return tuple(each.view(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous() for each in (pruned, mask))


def assert_convolution(actual, x, weight, bias, *geometry):
    """Compares with float64, allowing fp32 sums in any order and one rounding to the dtype."""
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *geometry)
    size = F.conv2d(x.abs().double(), weight.abs().double(), None if bias is None else bias.abs().double(), *geometry)
    bound = size * (weight[0].numel() + 2) * 2**-24 + exact.abs() * torch.finfo(x.dtype).eps + 1e-7
    assert actual.dtype == x.dtype and actual.shape == exact.shape and actual.is_contiguous()
    assert ((actual.double() - exact).abs() <= bound).all()
