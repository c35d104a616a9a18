"""The trained diffusion model of ``SPARSEKIT_DATA``, which draws digits, and the digits that it is tried on."""

import gzip
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.diffusion import GaussianDiffusion

DIFFUSION = GaussianDiffusion(1000, 1e-4, 0.02)


class Block(nn.Module):
    """LayerNorm over whole images, and two convolutions."""

    def __init__(self, size: int, channels: int, out: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm((channels, size, size))
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv2(F.silu(self.conv1(self.ln(x)))))


def blocks(size: int, *channels: int) -> nn.Sequential:
    return nn.Sequential(*(Block(size, *pair) for pair in pairwise(channels)))


def time_layers(out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, out), nn.SiLU(), nn.Linear(out, out))


class UNet(nn.Module):
    """A function of images and timesteps that predicts the noise, ``(x, t, labels) -> eps`` without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        for name, channels in {"1": 1, "2": 10, "3": 20, "_mid": 40, "4": 80, "5": 40, "_out": 20}.items():
            setattr(self, f"te{name}", time_layers(channels))
        self.b1, self.b2, self.b3 = blocks(28, 1, 10, 10, 10), blocks(14, 10, 20, 20, 20), blocks(7, 20, 40, 40, 40)
        self.b_mid, self.b4 = blocks(3, 40, 20, 20, 40), blocks(7, 80, 40, 20, 20)
        self.b5, self.b_out = blocks(14, 40, 20, 10, 10), blocks(28, 20, 10, 10, 10)
        self.down1, self.down2 = nn.Conv2d(10, 10, 4, 2, 1), nn.Conv2d(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.up2, self.up3 = nn.ConvTranspose2d(20, 20, 4, 2, 1), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.b_out[2].ln = nn.Identity()  # the stored parameters of this norm were never used
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        time = self.time_embed(t)

        def level(name: str, x: Tensor) -> Tensor:
            return getattr(self, f"b{name}")(x + getattr(self, f"te{name}")(time)[:, :, None, None])

        large = level("1", x)
        middle = level("2", self.down1(large))
        small = level("3", self.down2(middle))
        x = torch.cat((small, self.up1(level("_mid", self.down3(small)))), 1)
        x = torch.cat((middle, self.up2(level("4", x))), 1)
        x = torch.cat((large, self.up3(level("5", x))), 1)
        return self.conv_out(level("_out", x))


def trained(data) -> UNet:
    state = torch.load(data / "ckpt_ddpm_mnist" / "ddpm_mnist.pt", map_location="cpu", weights_only=True)
    unet = UNet()
    unet.load_state_dict(
        {name.removeprefix("network."): tensor for name, tensor in state.items() if "b_out.2.ln" not in name}
    )
    return unet.eval()


def digits(data, count: int) -> Tensor:
    """Returns the first test digits, in [-1, 1]."""
    with gzip.open(next((data / "mnist").glob("t10k-images*"))) as file:
        pixels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8, offset=16)
    return pixels.view(-1, 1, 28, 28)[:count].float() / 127.5 - 1
