"""Runs the model on its calibration batches, any number of times, always under the same conditions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..._batches import Forward, eagerly, run_batch
from ..._undo import restoring
from .held_batches import HeldBatches


class BatchRunner:
    """A model with its calibration batches, which runs any of them with the same random numbers every time."""

    def __init__(self, model: nn.Module, batches: HeldBatches, forward: Forward | None) -> None:
        self._model, self._batches, self._forward = model, batches, forward
        self._seed = torch.initial_seed()
        self.current: Any = None  # the batch that is running

    def read(self) -> Iterator[int]:
        """Yields the index of each batch as soon as it has been read.

        Raises:
            ValueError: there is no batch.
        """
        count = 0
        for count, index in enumerate(self._batches.arriving(), start=1):  # noqa: B007
            yield index
        check_count(count)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Returns the context for calls of ``run``: modules run eagerly, and random states are restored at the end."""
        cpu = torch.default_generator.get_state()
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

        def restore() -> None:
            torch.default_generator.set_state(cpu)
            if gpus:
                torch.cuda.set_rng_state_all(gpus)
            self.current = None

        with restoring(restore), eagerly():
            yield

    def run(self, index: int) -> None:
        """Runs a copy of a batch, with the same random numbers every time."""
        self.current = self._batches[index]
        torch.clear_autocast_cache()  # it may hold a weight from before it was pruned
        seed = (self._seed + index) % (1 << 63)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        run_batch(self._model, self.current, self._forward)


def check_count(batches: int) -> None:
    """Rejects calibration without any batch."""
    if batches == 0:
        raise ValueError("batches gave no batch: calibration needs at least one, and a generator can be read only once")
