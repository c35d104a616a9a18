"""The batches of texts that are learned from, and the file with the losses of the initial masks on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from config import Shared
from torch import Tensor

SAME = {"float32": 1e-4}  # relative difference that two losses of the same masks stay below
SAME_IN_16_BITS = 5e-3


@dataclass
class Batched(Shared):
    """The settings that inference_loss.py and train.py have in common."""

    dataset_size: int = 1536  # texts to learn from
    batchsize: int = 8  # texts in a step
    microbatch: int = 32  # texts in a forward pass, at most; larger batches take several
    epoch: int = 1
    targets: tuple[str, ...] = ("all",)  # the layers that are masked, by parts of their names: layers.0 q_proj

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(dataset_size=1, microbatch=1, epoch=1)

    @property
    def texts_in_pass(self) -> int:
        """The number of texts in a forward pass."""
        return min(self.batchsize, self.microbatch)

    def batches(self, texts: Tensor) -> list[Tensor]:
        """Returns the texts in whole batches; what is left at the end is dropped.

        Raises:
            ValueError: there is no whole batch, or a batch is not made of whole microbatches.
        """
        if not 0 < self.batchsize <= len(texts):
            raise ValueError(f"--batchsize must be from 1 to --dataset_size {len(texts)}, got {self.batchsize}")
        if self.batchsize % self.texts_in_pass:
            raise ValueError(f"--batchsize {self.batchsize} must be a multiple of --microbatch {self.microbatch}")
        return [batch for batch in texts.split(self.batchsize) if len(batch) == self.batchsize]

    @property
    def baseline(self) -> Path:
        """The file with the losses of the initial masks."""
        sizes = f"{self.dataset_size}_bs{self.batchsize}_sql{self.sqlen}"
        return self.out / f"inference_loss_{self.data_name}_{sizes}_unshuffled.npy"

    @property
    def fix(self) -> str:
        """What to run if that file is not right."""
        return (
            f"run inference_loss.py with the same --dataset_size {self.dataset_size} --batchsize {self.batchsize} "
            f"--sqlen {self.sqlen} --targets {' '.join(self.targets)}, --model, --data and --out"
        )


def read_baseline(settings: Batched, count: int) -> np.ndarray:
    """Reads the losses of the initial masks on ``count`` batches.

    Raises:
        ValueError: there is no such file, or it is of other batches.
    """
    if not settings.baseline.exists():
        raise ValueError(f"{settings.baseline} is missing: {settings.fix}")
    losses = np.load(settings.baseline, allow_pickle=False)
    if losses.ndim != 1 or len(losses) < count:
        raise ValueError(f"{settings.baseline} has {losses.size} losses, {count} are needed: {settings.fix}")
    return losses[:count]


def check_baseline(settings: Batched, losses: Sequence[float], found: float) -> None:
    """Checks that the losses in the file, of the batches of a step, are those of the initial masks.

    Raises:
        ValueError: they are of other masks, or another model.
    """
    expected = sum(losses) / len(losses)
    if abs(found - expected) > SAME.get(settings.dtype, SAME_IN_16_BITS) * abs(found):
        raise ValueError(
            f"the initial masks have the loss {found:.4f} and {settings.baseline} says {expected:.4f}: {settings.fix}"
        )
