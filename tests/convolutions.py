"""Models of convolutions to compress."""

import torch
from torch import nn

import sparsekit as sk
from sparsekit.nn import Conv2d24, PrepackedConv2d

FORMS = {"conv24": Conv2d24, "prepacked conv": PrepackedConv2d}


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


def pruned_conv(inputs=10, outputs=6, kernel=(3, 2), **options):
    conv = nn.Conv2d(inputs, outputs, kernel, **options)
    sk.prune_(conv, sk.Magnitude("2:4"))
    return conv.eval()
