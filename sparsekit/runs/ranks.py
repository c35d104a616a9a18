"""The processes of a run: what the first one does, and what all others learn of it."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; 0 and 1 without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def from_first(work: Callable[[], T]) -> T:
    """Returns in every process what ``work`` returned in the first one, which alone calls it.

    Raises:
        Exception: what ``work`` raised, in every process; in the others a RuntimeError where it cannot be sent.
    """
    rank, size = rank_and_size()
    if size == 1:
        return work()
    said: list[Any] = [None, None]
    if rank == 0:
        try:
            said[0] = work()
        except BaseException as error:  # an interrupt as well: the others would wait for ever
            said[1] = _sendable(error)
            dist.broadcast_object_list(said)
            raise
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


def in_each(work: Callable[[], None]) -> None:
    """Calls ``work`` in every process.

    Raises:
        Exception: what it raised in this process; where it failed only in others, what the first of them raised.
    """
    mine: Exception | None = None
    try:
        work()
    except Exception as error:
        mine = error
    failed = [error for error in gather(None if mine is None else _sendable(mine)) if error is not None]
    if failed:
        raise mine or failed[0]


def _sendable(error: BaseException) -> BaseException:
    """Returns an error for the other processes: the same, or if it cannot be pickled or ends a process, its text."""
    try:
        if isinstance(error, Exception) and type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"another process ended with {type(error).__name__}: {error}")


def gather(value: T) -> list[T]:
    """Returns the values of all processes in the order of their ranks."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values
