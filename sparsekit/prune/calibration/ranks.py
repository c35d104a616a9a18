"""The processes that calibrate one model together, each with its own batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..._undo import Undo, restoring
from ..apply_mask import BITS, chunks
from ..layers import PrunableLayer
from .inputs import LayerInputs
from .statistics import Statistic

T = TypeVar("T")
S = TypeVar("S", bound=LayerInputs | None)
Group: TypeAlias = 'Literal["world", "alone"] | dist.ProcessGroup'  # a string: some builds of torch have no groups


class RankFailed(RuntimeError):
    """Raised in all other processes of a group when one of them fails, so that all of them undo their changes."""


class Ranks:
    """The processes of a group; only this one if torch.distributed is not initialized.

    Every process makes the same calls in the same order. If one fails, it sends its error in place of its next
    ``exchange``, so that the others do not wait for it.

    Args:
        group: ``"world"`` for all processes, ``"alone"`` for this one only, or a process group with this one in it.
        statistic: the statistic to add up, if any.

    Raises:
        TypeError, ValueError: ``group`` is something else or a group of other processes, or ``statistic`` cannot be
            added up.
    """

    def __init__(self, group: Group, statistic: type[Statistic] | None) -> None:
        known = isinstance(group, str) and group in ("world", "alone")
        if not known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(f'group must be "world", "alone" or a process group, got {group!r}')
        self._group = None if isinstance(group, str) else group
        running = group != "alone" and dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(self._group), dist.get_world_size(self._group)) if running else (0, 1)
        if self.rank < 0:
            raise ValueError("group must be a process group that this process belongs to")
        if self.size > 1 and statistic is not None and not hasattr(statistic, "reduce"):
            raise TypeError(f'{statistic.__name__} has no method "reduce" to add up processes: pass group="alone"')

    def exchange(self, value: Any = None) -> list[Any]:
        """Returns the values of all processes, in the order of their ranks.

        Raises:
            RankFailed: one of them has failed.
        """
        return [value] if self.size == 1 else self._exchange(None, value)

    def agree(self, call: Mapping[str, Any], layers: Sequence[PrunableLayer]) -> None:
        """Checks that all processes make the same ``call`` for the same model.

        Raises:
            ValueError: names what differs.
        """
        if self.size == 1:
            return
        own = {**call, **{f"layer {layer.name!r}": _fingerprint(layer.weight.detach()) for layer in layers}}
        for rank, other in enumerate(given := self.exchange(own)):
            for key in {**given[0], **other}:
                if given[0].get(key) != other.get(key):
                    raise ValueError(
                        f"rank {rank} and rank 0 differ in {key}: all must prune the same model in the same way, "
                        'or each by itself with group="alone"'
                    )

    def add_up(self, collected: Sequence[S]) -> Sequence[S]:
        """Adds up what the processes have collected for each layer, in place."""
        if self.size > 1:
            self.exchange()
            for inputs in collected:
                if inputs is not None:
                    inputs.reduce(self.exchange, self.all_reduce)
        return collected

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the first process, in all processes; those of the others have its shape and dtype."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor.view(-1).view(torch.uint8), group_src=0, group=self._group)
        return tensor

    def together(self, work: Callable[[Undo], T]) -> Callable[[Undo], T]:
        """Wraps ``work`` so that it succeeds in all processes or in none: an error in one is raised in all."""
        return partial(self._together, work)

    def all_or_none(self, work: Callable[[], T]) -> T:
        """Calls ``work()``; an error in one process is raised in all."""
        return self._together(lambda _: work(), Undo())

    def _together(self, work: Callable[[Undo], T], undo: Undo) -> T:
        try:
            result = work(undo)
            self.exchange()
            return result
        except RankFailed:
            raise
        except BaseException as error:
            if self.size > 1:
                self._exchange(f"{type(error).__name__}: {error}", None)
            raise

    def _exchange(self, failure: str | None, value: Any) -> list[Any]:
        given: list[Any] = [None] * self.size
        dist.all_gather_object(given, (failure, value), group=self._group)
        if failure is None:
            for rank, (message, _) in enumerate(given):
                if message is not None:
                    raise RankFailed(f"the model is as it was: rank {rank} failed with {message}")
        return [value for _, value in given]


@contextmanager
def local_buffers(model: nn.Module) -> Iterator[None]:
    """Keeps DistributedDataParallel from synchronizing buffers in each pass: ranks may have different batch counts."""
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    synced = [module.require_forward_param_sync for module in wrapped]

    def restore() -> None:
        for module, before in zip(wrapped, synced, strict=True):
            module.require_forward_param_sync = before

    with restoring(restore):
        for module in wrapped:
            module.require_forward_param_sync = False
        yield


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    bits = BITS[weight.element_size()]
    total = sum(int(part.view(bits).sum(dtype=torch.int64)) for part in chunks(weight))
    return tuple(weight.shape), str(weight.dtype), total
