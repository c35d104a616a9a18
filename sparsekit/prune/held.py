"""Batches that are read once from where they come, and can be given again."""

from collections.abc import Iterable, Iterator
from typing import Any

from .._trees import copied
from .store import Kept, Store


class HeldBatches:
    """Gives the same batches every time it is iterated, each as a copy that may be written to.

    A loader that shuffles, or one that looks as if it could be read again and cannot (a stream in a DataLoader), is
    read a single time. What it makes is held in bounded memory, and beyond it in a file.

    Args:
        batches: holds batches.
        store: where those are kept that do not lie in a list anyway; None holds no more than the first, and reads
            ``batches`` again for every iteration.
    """

    def __init__(self, batches: Iterable[Any], store: Store | None) -> None:
        self._batches, self._store = batches, store
        self._source: Iterator[Any] | None = None
        self._held: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        held = self._held[index]
        return held.load() if isinstance(held, Kept) else copied(held)

    def __iter__(self) -> Iterator[Any]:
        once = self._store is None and isinstance(self._batches, Iterator)
        if once:
            self.first()  # which can be asked for later, when the iterator is at its end
        yield from (self[index] for index in self.arriving())
        if self._store is None:
            yield from map(copied, self._reading())
            if not once:
                self._source, self._held = None, []

    def arriving(self) -> Iterator[int]:
        """The index of every batch that is held, as soon as it is."""
        index = 0
        while index < len(self._held) or (self._store is not None and self._hold()):
            yield index
            index += 1

    def first(self) -> list[Any]:
        """The first batch alone; nothing where there is none."""
        return [self[0]] if self._held or self._hold() else []

    def _reading(self) -> Iterator[Any]:
        if self._source is None:
            self._source = iter(self._batches)
        return self._source

    def _hold(self) -> bool:
        for batch in self._reading():
            made = self._store is not None and not isinstance(self._batches, list | tuple)
            self._held.append((self._store.keep(batch) if made and self._store is not None else None) or batch)
            return True
        return False
