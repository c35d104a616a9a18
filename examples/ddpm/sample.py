"""Draws images by a trained model, each class in turn, and writes them as a picture and as tensors.

python examples/ddpm/sample.py --save-dir out/train --w 1.8 --sampler ddim --sampling-steps 50
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from config import Config, Sampling, config_of, device_of
from data import Images, as_bytes, load
from model import Eps, load_unet
from safetensors.torch import save_file
from show import save_grid
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.diffusion import guided


class Drawn(NamedTuple):
    """What was drawn: uint8 images, the labels from 0 that were asked for, and the noise that they came from."""

    images: Tensor
    labels: Tensor
    noise: Tensor


def main(settings: Sampling) -> Path:
    """Returns the path of the images that it wrote."""
    if settings.save_dir is None:
        raise SystemExit("--save-dir must name the folder of a run")
    config, device = config_of(settings.save_dir), device_of(settings.device)
    config = replace(config, **{each.name: getattr(settings, each.name) for each in fields(Sampling)})
    images = load(config.data, config.img_size, config.held_out)
    unet = load_unet(settings.test_load_weight or settings.save_dir / "model").to(device)
    folder = settings.sampled_dir or settings.save_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=config.count, desc="sample", leave=False, disable=None) as bar:
        for first in range(0, config.count, config.sampling_batch):
            count = min(config.sampling_batch, config.count - first)
            parts.append(draw(unet, config, images, count, device, first))
            bar.update(count)
    drawn = Drawn(*map(torch.cat, zip(*parts, strict=True)))
    save_grid(drawn.noise[: config.nrow**2], folder / config.sampledNoisyImgName, config.nrow)
    save_grid(drawn.images[: config.nrow**2], folder / config.sampledImgName, config.nrow)
    path = folder / "samples.safetensors"
    save_file({"images": drawn.images, "labels": drawn.labels}, path)
    return path


def draw(unet: nn.Module, config: Config, images: Images, count: int, device: torch.device, first: int = 0) -> Drawn:
    """Draws images, numbered from ``first``: image i is of class i modulo the number of classes."""
    generator = torch.Generator().manual_seed(config.seed + first)
    noise = torch.randn(count, images.channels, config.img_size, config.img_size, generator=generator.clone_state())
    labels = torch.arange(first, first + count) % len(images.classes)
    was_training = unet.training
    unet.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        drawn = config.diffusion().sample(
            guided(Eps(unet), config.w) if config.conditional else Eps(unet),
            noise.shape,
            (labels + 1).to(device) if config.conditional else None,
            sampler=config.sampler,
            steps=None if config.sampler == "ancestral" else config.sampling_steps,
            generator=generator,
            device=device,
        )
    unet.train(was_training)
    return Drawn(as_bytes(drawn.cpu()), labels, as_bytes(noise / 3))


if __name__ == "__main__":
    main(tyro.cli(Sampling, description=__doc__))
