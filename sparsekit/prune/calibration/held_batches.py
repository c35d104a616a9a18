"""Batches that are read once from their source and can be given again."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..._trees import copied
from .output_store import OutputStore, StoredOutput


class HeldBatches:
    """A series of batches that is the same in every iteration; it gives copies, which may be written to.

    A loader is read only once, because it may shuffle, or may be a stream that cannot be read again. Its batches are
    held in bounded memory, and beyond that in a file.

    Args:
        batches: the source.
        store: keeps the batches, unless they are in a list or tuple already. None keeps only the first one, and reads
            ``batches`` again in every iteration.
    """

    def __init__(self, batches: Iterable[Any], store: OutputStore | None) -> None:
        self._batches, self._store = batches, store
        self._source: Iterator[Any] | None = None
        self._held: list[Any] = []

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        held = self._held[index]
        return held.load() if isinstance(held, StoredOutput) else copied(held)

    def __iter__(self) -> Iterator[Any]:
        once = self._store is None and isinstance(self._batches, Iterator)
        if once:
            self.first()  # holds the first batch, which may be asked for when the iterator is at its end
        yield from (self[index] for index in self.arriving())
        if self._store is None:
            yield from map(copied, self._reading())
            if not once:
                self._source, self._held = None, []

    def arriving(self) -> Iterator[int]:
        """Yields the index of every held batch, as soon as it is held."""
        index = 0
        while index < len(self._held) or (self._store is not None and self._hold()):
            yield index
            index += 1

    def first(self) -> list[Any]:
        """Returns a list of the first batch alone, or an empty list if there is none."""
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
