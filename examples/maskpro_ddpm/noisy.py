"""Batches of images with noise that the number of a batch chooses: every mask meets the same ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from ddpm_parts import Part, scaled
from models import Denoiser
from torch import Tensor, nn
from tqdm import tqdm

Noisy = tuple[dict[str, Tensor | None], Tensor]  # the arguments of the UNet, and the noise that it is to predict


def add_noise(denoiser: Denoiser, part: Part, seed: int, number: int) -> Noisy:
    """Returns a batch of images with noise, each at a timestep of its own; seed and number choose both."""
    x, labels = scaled(part[0]), part[1] + 1
    start = torch.Generator().manual_seed(seed)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=start)) + number)
    t = torch.randint(denoiser.diffusion.steps, (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    sample = denoiser.diffusion.q_sample(x, t, noise)
    sample, t, labels, noise = (each.to(denoiser.unet.device) for each in (sample, t, labels, noise))
    return {"sample": sample, "timestep": t, "class_labels": labels if denoiser.classes else None}, noise


class NoisyBatches(Sequence[Noisy]):
    """Batches of images, each at a timestep and with noise of its own, made when they are asked for.

    Args:
        denoiser: the model, which decides the process, the labels and the device.
        part: uint8 images, and their labels from 0.
        batch_size: images in a batch; the last batch has what is left.
        seed: chooses timesteps and noise, together with the number of the batch.
    """

    def __init__(self, denoiser: Denoiser, part: Part, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise SystemExit(f"--batch_size must be at least 1, got {batch_size}")
        self.denoiser, self.images, self.labels = denoiser, *part
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, index: int) -> Noisy:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return add_noise(self.denoiser, (self.images[which], self.labels[which]), self.seed, index)


def loss(unet: nn.Module, batch: Noisy) -> Tensor:
    """Computes the mean squared error of the predicted noise."""
    inputs, noise = batch
    return F.mse_loss(unet(**inputs, return_dict=False)[0], noise)


@torch.no_grad()
def image_losses(unet: nn.Module, batches: Sequence[Noisy], what: str) -> Tensor:
    """Computes the loss of every image, float64 on the CPU."""
    unet.eval()
    parts = []
    for index in tqdm(range(len(batches)), what, leave=False, disable=None):
        inputs, noise = batches[index]
        parts.append((unet(**inputs, return_dict=False)[0] - noise).square().flatten(1).mean(1))
    return torch.cat(parts).double().cpu()
