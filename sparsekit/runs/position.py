"""The position of a run in its data, and batches whose order depends on the seed and the epoch alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Position:
    """The place in the data from which a run goes on.

    Args:
        epoch: the epochs that are complete.
        batch: the batches of the next epoch that are complete.
        data: the ``count``, ``batch_size`` and ``seed`` of ``Run.batches``; None before its first batch.
    """

    epoch: int = 0
    batch: int = 0
    data: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for name, value in (("epoch", self.epoch), ("batch", self.batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if self.data is not None and not isinstance(self.data, Mapping):
            raise ValueError(f"data must be a mapping or None, got {self.data!r}")

    def of_data(self, **data: int) -> "Position":
        """Returns this position in the data that it is in already, or in these if it is in none yet.

        Raises:
            ValueError: it is in other data; the message says how they differ.
        """
        if self.data is not None and self.data != data:
            differ = [name for name in data if data[name] != self.data.get(name)]
            before, now = (", ".join(f"{name}={each.get(name)}" for name in differ) for each in (self.data, data))
            raise ValueError(f"the run was begun with {before} and cannot go on with {now}: that is another run")
        return replace(self, data=data)

    def after_batch(self, batches: int) -> "Position":
        """Returns the position after one more batch of an epoch that has so many batches."""
        last = self.batch + 1 == batches
        return replace(self, epoch=self.epoch + 1, batch=0) if last else replace(self, batch=self.batch + 1)


def epoch_batches(
    count: int, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """Returns the indices of each batch of an epoch, shuffled the same in every process.

    Args:
        count: the number of samples.
        batch_size: samples of a batch of all processes together; the last batch is left out if it is smaller, so that
            all batches weigh the same.
        seed: chooses the order, together with ``epoch``. The global random state is neither used nor changed.
        epoch: the number of the epoch.
        rank: the process whose part of each batch is returned.
        ranks: the number of processes, a divisor of ``batch_size``.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if not 0 < batch_size <= count:
        raise ValueError(f"batch_size must be from 1 to the number of samples, {count}, got {batch_size}")
    if batch_size % ranks:
        raise ValueError(f"batch_size must be a multiple of the number of processes, {ranks}, got {batch_size}")
    order = torch.randperm(count, generator=generator_of(seed, epoch), device="cpu").tolist()
    return [order[start + rank : start + batch_size : ranks] for start in range(0, count - batch_size + 1, batch_size)]


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """Returns a generator on the CPU whose draws depend on the seed and the epoch alone."""
    both = torch.Generator("cpu").manual_seed(seed)
    start = int(torch.randint(2**62, (), generator=both, device="cpu", dtype=torch.int64))
    return torch.Generator("cpu").manual_seed((start + epoch) % 2**63)


def load_batches(
    load: Callable[[list[list[int]]], Iterable[Any]], rest: list[list[int]], seed: int, epoch: int
) -> Iterator[Any]:
    """Begins to load batches in a random state of the epoch, as a DataLoader draws the seed of its workers from it."""
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(generator_of(seed, epoch).get_state())
        return iter(load(rest))
    finally:
        torch.set_rng_state(before)
