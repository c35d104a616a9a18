"""Small models and losses to learn masks from."""

import torch
from torch import nn

import sparsekit as sk

WANDA = sk.Wanda("2:4")


def problem(seed=0, batches=24):
    """A layer, and batches of correlated inputs, some larger than others, with the outputs of the dense layer."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=g)
    x = torch.randn(batches, 32, 32, generator=g) @ mix * (torch.rand(32, generator=g) + 0.5)
    x = x * (torch.rand(batches, 1, 1, generator=g) + 0.5)
    layer = nn.Linear(32, 4, bias=False)
    layer.weight.data = torch.randn(4, 32, generator=g)
    return layer, [(each, each @ layer.weight.detach().T) for each in x]


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def make(data=0, loss=loss_fn, **options):
    layer, batches = problem(data)
    options = {"init": WANDA, **options}
    return sk.MaskPro(layer, loss, batches=batches[:16], held_out=batches[16:], **options), layer


class Network(nn.Module):
    """A convolution, a layer whose inputs fill no group at the end, two tied layers, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.fc, self.tied, self.other = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.dropout(self.other(self.tied(self.fc(self.conv(x).mean((2, 3))))))


IMAGES = [torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def noisy(model, images):
    return (model(images) - torch.randn(len(images), 8)).square().mean()
