"""The losses of masked models, each a function of the mask and the number of a batch alone."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import as_batches, observing
from .._trees import copied
from .calibration.ranks import Ranks, local_buffers
from .mask_arena import MaskArena

LossFn = Callable[[nn.Module, Any], Tensor | float]


def _as_sequence(batches: Any) -> Sequence[Any]:
    """Returns batches that can be read by their index; a loader is read once, and its batches are kept.

    Raises:
        TypeError: ``batches`` is neither a batch nor an iterable of them.
    """
    is_sequence = hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not hasattr(batches, "keys")
    return batches if is_sequence and not isinstance(batches, Tensor | tuple | str) else list(as_batches(batches))


def split_batches(batches: Any, held_out: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns the batches to learn from and those that are held out; without the latter, the last tenth is.

    Raises:
        TypeError: they are neither batches nor iterables of them.
        ValueError: there are too few.
    """
    learned = _as_sequence(batches)
    if held_out is not None:
        held = _as_sequence(held_out)
    else:
        count = max(len(learned) // 10, 1)
        learned = [learned[i] for i in range(len(learned))]
        learned, held = learned[:-count], learned[-count:]
    if not len(learned) or not len(held):
        raise ValueError(
            f"MaskPro needs batches to learn from and others to hold out, got {len(learned)} and {len(held)}"
        )
    return learned, held


def set_noise(model: nn.Module, seed: int) -> None:
    """Seeds the random states of torch that the model can draw from; the caller has forked them."""
    torch.default_generator.manual_seed(seed)
    for device in {tensor.device for tensor in model.parameters() if tensor.is_cuda}:
        torch.cuda.default_generators[device.index].manual_seed(seed)


class MaskedLosses:
    """The losses of a model with masks on batches, of which this process has its share.

    The random state is seeded by the number that a batch has among those of all processes, so that every mask meets the
    same timesteps, noise and dropout, in every epoch and in any number of processes.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)``.
        arena: the layers.
        batches: those of this process.
        kind: what they are for.
        seed: chooses the noise, with kind and number.
        microbatches: how many batches of this process make a step.
        ranks: the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        arena: MaskArena,
        batches: Sequence[Any],
        kind: Literal["learn", "held out"],
        seed: int,
        microbatches: int,
        ranks: Ranks,
    ) -> None:
        self._model, self._loss_fn, self._arena, self._batches = model, loss_fn, arena, batches
        self._kind, self._seed, self._microbatches, self._ranks = kind, seed, microbatches, ranks

    def __len__(self) -> int:
        return len(self._batches)

    def indices(self, turn: int) -> list[int]:
        """Returns the batches of this process that a turn has: the next ones, and after the last one the first."""
        return [(turn * self._microbatches + i) % len(self._batches) for i in range(self._microbatches)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Prepares the model to be run, without gradients and in evaluation mode; at the end it is as it was."""
        with torch.inference_mode(False), local_buffers(self._model), observing(self._model):
            yield

    def of(self, bits: Tensor, indices: Sequence[int]) -> list[float]:
        """Returns the loss of a mask on each of the batches, inside ``running``.

        Raises:
            TypeError: ``loss_fn`` returns something else than a number.
            ValueError: a loss is NaN or infinite.
        """
        with self._arena.masking(bits):
            return [self._loss(index) for index in indices]

    def mean(self, losses: Sequence[float]) -> float:
        """Returns the mean over all processes, exact in fp64 and so the same in any order."""
        every = [loss for own in self._ranks.exchange(list(losses)) for loss in own]
        return math.fsum(every) / len(every)

    def _loss(self, index: int) -> float:
        turn, place = divmod(index, self._microbatches)
        number = (turn * self._ranks.size + self._ranks.rank) * self._microbatches + place
        set_noise(self._model, random.Random(f"{self._seed} {self._kind} {number}").getrandbits(63))
        loss = self._loss_fn(self._model, copied(self._batches[index]))
        if not isinstance(loss, Real) and not (isinstance(loss, Tensor) and loss.numel() == 1):
            what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn(model, batch) must return a number or a tensor of one number, got {what}")
        if not math.isfinite(value := float(loss)):
            raise ValueError(
                f"the loss of a masked model is {value} on batch {index} ({self._kind}): check the batch with the "
                "initial mask, or make a learner with a smaller lr or fewer flips"
            )
        return value
