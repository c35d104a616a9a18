"""The UNet of the trained MNIST model in ``SPARSEKIT_DATA``, called and stored as diffusers' models are."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

UNUSED = "b_out.2.ln."  # stored, but the published forward leaves this norm out


class Block(nn.Module):
    """A LayerNorm over whole images, and two convolutions."""

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


class MnistUNet(ModelMixin, ConfigMixin):
    """A UNet of three levels with 10, 20 and 40 channels for images of 28 x 28 pixels, without labels."""

    @register_to_config
    def __init__(self, sample_size: int = 28, in_channels: int = 1, num_class_embeds: int | None = None) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        for name, channels in {"1": 1, "2": 10, "3": 20, "_mid": 40, "4": 80, "5": 40, "_out": 20}.items():
            setattr(self, f"te{name}", time_layers(channels))
        self.b1, self.b2, self.b3 = blocks(28, 1, 10, 10, 10), blocks(14, 10, 20, 20, 20), blocks(7, 20, 40, 40, 40)
        self.b_mid, self.b4 = blocks(3, 40, 20, 20, 40), blocks(7, 80, 40, 20, 20)
        self.b5, self.b_out = blocks(14, 40, 20, 10, 10), blocks(28, 20, 10, 10, 10)
        self.b_out[2].ln = nn.Identity()
        self.down1, self.down2 = nn.Conv2d(10, 10, 4, 2, 1), nn.Conv2d(20, 20, 4, 2, 1)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.up2, self.up3 = nn.ConvTranspose2d(20, 20, 4, 2, 1), nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        time = self.time_embed(timestep)

        def level(name: str, x: Tensor) -> Tensor:
            return getattr(self, f"b{name}")(x + getattr(self, f"te{name}")(time)[:, :, None, None])

        large = level("1", sample)
        middle = level("2", self.down1(large))
        small = level("3", self.down2(middle))
        x = torch.cat((small, self.up1(level("_mid", self.down3(small)))), 1)
        x = torch.cat((middle, self.up2(level("4", x))), 1)
        x = torch.cat((large, self.up3(level("5", x))), 1)
        eps = self.conv_out(level("_out", x))
        return UNet2DOutput(eps) if return_dict else (eps,)

    @classmethod
    def load_trained(cls, path: Path) -> "MnistUNet":
        """Loads the weights of ``ddpm_mnist.pt``."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = {name.removeprefix("network."): tensor for name, tensor in state.items()}
        unet = cls()
        unet.load_state_dict({name: tensor for name, tensor in names.items() if not name.startswith(UNUSED)})
        return unet
