"""Data lineage: tells from which outputs of stages the tensors that are still alive were computed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..._trees import tensors_in
from ..._undo import restoring

Source = tuple[int, int]  # one call of a stage: the index of the stage, and how often it was called before in the pass

# Functions whose result does not depend on the values of a tensor.
SHAPES = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point is_complex "
    "is_signed get_device is_inference is_conj is_neg __len__ __hash__ __deepcopy__ type dtype".split()
)


class Lineage(TorchFunctionMode):
    """A mode that records from which stages' outputs every tensor is computed, while it is on and not paused.

    These are the sources of a tensor. They are recorded by storage, so a view has the sources of its base, and writing
    to a view adds sources to its base. A value that leaves torch (a number, a NumPy array) may affect anything after
    it, so its sources are needed until the end of the pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paused = self._taken_off = False
        self._pinned: set[Source] = set()
        self._sources: dict[StorageWeakRef, frozenset[Source]] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Switches the mode on until the end of the ``with``."""
        before = torch._C._len_torch_function_stack()

        def restore() -> None:
            while torch._C._len_torch_function_stack() > before:
                self.__exit__(None, None, None)

        with restoring(restore):
            self.__enter__()
            yield

    def pause(self) -> None:
        """Records nothing until ``resume``. If the mode is on top of torch's stack, it is taken off, to save time."""
        top = torch._C._len_torch_function_stack() - 1
        self._paused = True
        self._taken_off = top >= 0 and torch._C._get_function_stack_at(top) is self
        if self._taken_off:
            self.__exit__(None, None, None)

    def resume(self) -> None:
        """Ends a ``pause``."""
        if self._taken_off:
            self.__enter__()
        self._paused = self._taken_off = False

    def mark(self, value: Any, sources: Iterable[Source]) -> None:
        """Adds ``sources`` to the sources of the tensors in ``value``."""
        sources = frozenset(sources)
        for tensor in tensors_in(value):
            if (storage := _storage(tensor)) is None:
                self._pinned |= sources
            else:
                self._sources[storage] = self._sources.get(storage, frozenset()) | sources

    def pin(self, sources: Iterable[Source]) -> None:
        """Counts ``sources`` as needed until the end of the pass."""
        self._pinned.update(sources)

    def alive(self) -> frozenset[Source]:
        """Returns the sources of every tensor that still exists, and those that are pinned."""
        self._sources = {storage: names for storage, names in self._sources.items() if not storage.expired()}
        return frozenset(self._pinned).union(*self._sources.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        sources = self._of((args, kwargs))
        result = func(*args, **kwargs)
        if sources:
            name = getattr(func, "__name__", "")
            if any(True for _ in tensors_in(result)):
                self.mark(result, sources)
            elif result is None:  # such as x[0] = y
                self.mark(args[:1], sources)
            elif name not in SHAPES and name != "__get__":
                self._pinned |= sources
        return result

    def _of(self, value: Any) -> frozenset[Source]:
        storages = (_storage(tensor) for tensor in tensors_in(value))
        return frozenset().union(*(self._sources.get(storage, ()) for storage in storages if storage is not None))


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None
