"""What the scripts have in common: the model and its data, the layers that are masked, and errors in plain words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from ddpm_parts import Part, device_of
from mask_files import in_targets
from models import Denoiser, load_denoiser
from torch import nn

from sparsekit.runs import Run, open_tracker

OUT = Path("output/maskpro_ddpm")
INITIAL = OUT / "initial_mask_diffusion"
PROTECTED = ("conv_in", "conv_out", "time_emb", "class_emb")  # in names of layers that stay dense, as published
Targets = tuple[str, ...]


@dataclass
class Source:
    """The model, its images, and where it runs."""

    # mnist, the folder of a pipeline, of a UNet2DModel or of a run of examples/ddpm, or a pipeline of the hub; auto is
    # mnist where SPARSEKIT_DATA has it, else google/ddpm-cifar10-32.
    original_model: str = "auto"
    dataset: str = "auto"  # mnist, fashion_mnist, cifar10, shapes, or a folder of images by class
    device: str = "auto"
    seed: int = 0

    def data_name(self, denoiser: Denoiser) -> str:
        """Returns the name of the data set."""
        return Path(denoiser.data if self.dataset == "auto" else self.dataset).name

    def denoiser(self) -> Denoiser:
        with explained():
            return load_denoiser(self.original_model, device_of(self.device))


@dataclass
class Sizes(Source):
    """The images that losses are measured on while masks are learned."""

    dataset_size: int = 2048  # images of the training set
    batch_size: int = 32
    max_batches: int | None = None  # fewer batches than the images make

    def __post_init__(self) -> None:
        check_counts(self, "dataset_size", "batch_size", "max_batches")

    def part(self, denoiser: Denoiser) -> Part:
        """Returns the training images that make whole batches."""
        if self.dataset_size < self.batch_size:
            raise SystemExit(
                f"--batch_size must be from 1 to --dataset_size {self.dataset_size}, got {self.batch_size}"
            )
        images, labels = denoiser.images(self.dataset).train
        count = min(self.dataset_size, len(images)) // self.batch_size
        if self.max_batches is not None:
            count = min(count, self.max_batches)
        if not count:
            raise SystemExit(
                f"{len(images)} training images make no batch of {self.batch_size}: pass a smaller --batch_size"
            )
        return images[: count * self.batch_size], labels[: count * self.batch_size]


def chosen_on(denoiser: Denoiser, dataset: str) -> Part:
    """Returns the held-out images that decide whether the learned mask or the initial one is kept: the first half."""
    images, labels = _held_out(denoiser, dataset)
    return images[: len(images) // 2], labels[: len(images) // 2]


def judged_on(denoiser: Denoiser, dataset: str) -> Part:
    """Returns the held-out images that nothing was chosen on: the second half."""
    images, labels = _held_out(denoiser, dataset)
    return images[len(images) // 2 :], labels[len(images) // 2 :]


def _held_out(denoiser: Denoiser, dataset: str) -> Part:
    found = denoiser.images(dataset)
    count = len(found.held_out[0])
    if count < 4:
        raise SystemExit(
            f"{found.source} has {count} held-out images, and 4 are needed, to choose on and to judge on: name a "
            "folder of more images by --dataset"
        )
    return found.held_out


def check_counts(settings: Any, *names: str) -> None:
    """Ends the script if one of these settings is given and below 1."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < 1:
            raise SystemExit(f"--{name} must be at least 1, got {value}")


def is_protected(name: str) -> bool:
    return any(each in name for each in PROTECTED)


def check_targets(unet: nn.Module, targets: Targets) -> None:
    """Ends the script if a target names no part of the model."""
    names = [name for name, _ in unet.named_modules()]
    for target in targets:
        if not any(in_targets(name, (target,)) for name in names):
            parts = ", ".join(name for name, _ in unet.named_children())
            raise SystemExit(f"--targets {target} names no part of the model: pass all, a part or a layer of {parts}")


def open_run(settings: Any, folder: Path, config: dict[str, Any], steps: int) -> Run:
    """Opens the folder of a run with the tracker that is asked for; ends the script if one of both cannot be."""
    names = {"project_name": settings.project_name, "experiment_name": settings.experiment_name}
    try:
        return Run.open(folder, config, steps=steps, tracker=open_tracker(settings.tracker, **names))
    except (ValueError, OSError, RuntimeError) as error:  # another run's folder, no disk, or locked
        raise SystemExit(f"error: {error}") from error


def run_command(main: Callable[[Any], Any], settings: type, description: str | None) -> None:
    """Runs the function of a script with the settings of the command line; errors of the user become one sentence."""
    try:
        main(tyro.cli(settings, description=description))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


@contextmanager
def explained(batch_size: int | None = None) -> Iterator[None]:
    """Ends the script with one sentence where the memory is too small, for a batch or for a model."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(batch_size) from error
    except RuntimeError as error:  # what PyTorch raises where a CPU has no memory left
        if "allocate memory" not in str(error):
            raise
        raise _out_of_memory(batch_size) from error


def _out_of_memory(batch_size: int | None) -> SystemExit:
    if batch_size is None:
        return SystemExit("out of memory while a model was loaded: run it again with --device cpu or a smaller model")
    smaller = f"--batch_size {batch_size // 2}" if batch_size > 1 else "a model of fewer channels"
    return SystemExit(f"out of memory with {batch_size} images in a batch: run it again with {smaller}")
