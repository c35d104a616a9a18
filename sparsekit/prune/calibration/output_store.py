"""A store for outputs from one pass to the next: in memory up to a limit, beyond it in a temporary file."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import IO, Any

import torch
from torch import Tensor

from ..._trees import map_tree

MEMORY = 128 << 20  # bytes
DISK_SHARE = 4  # a quarter of the free disk space is used at most


class _Opaque(Exception):
    """Raised if an output contains something that cannot be stored."""


class StoredOutput:
    """A stored output. After ``drop``, ``load`` returns tensors of the same shapes, filled with NaN or 0."""

    __slots__ = ("_form", "_records", "_store", "dropped")  # saves memory: there is one per stage and batch

    def __init__(self, store: "OutputStore", form: Any, records: "Sequence[_Record]") -> None:
        self._store, self._form, self._records = store, form, records
        self.dropped = False

    def load(self) -> Any:
        """Returns a new copy of the output."""
        return map_tree(self._form, _never, lambda slot: slot.load() if isinstance(slot, _Record) else slot)

    def drop(self) -> None:
        """Frees the memory, or the space in the file."""
        for record in self._records:
            self._store.free(record)
        self._records = ()
        self.dropped = True


class _Record:
    """A stored tensor, in memory or in the file; once it is dropped, only its shape and dtype."""

    __slots__ = ("device", "file", "held", "like", "offset")

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.like, self.device = like, device
        self.held: Tensor | None = None
        self.file: IO[bytes] | None = None
        self.offset = 0

    @property
    def nbytes(self) -> int:
        return self.like.numel() * self.like.element_size()

    def load(self) -> Tensor:
        if self.held is not None:
            return self.held.clone()
        empty = torch.empty_like(self.like, device=self.device)
        if self.file is None:
            # NaN makes it visible if a dropped tensor is used; integers become 0, which is a valid index.
            return empty.fill_(torch.nan) if self.like.is_floating_point() else empty.zero_()
        buffer = bytearray(self.nbytes)
        self.file.seek(self.offset)
        if self.file.readinto(buffer) != self.nbytes:  # type: ignore[attr-defined]
            raise OSError("the temporary file of the calibration has become shorter")
        return empty.copy_(torch.frombuffer(buffer, dtype=self.like.dtype).view(self.like.shape))


class OutputStore:
    """A store of outputs: at most ``memory`` bytes in memory, the rest in a temporary file that is deleted with it."""

    def __init__(self, memory: int | None = None) -> None:
        self._room = MEMORY if memory is None else memory
        self._file: IO[bytes] | None = None
        self._disk = self._end = 0
        self._likes: dict[Any, Tensor] = {}  # on the meta device, by shape, strides and dtype
        self._gaps: dict[int, list[int]] = {}  # offsets of free space in the file, by size: outputs have few sizes

    def keep(self, value: Any) -> StoredOutput | None:
        """Stores an output of strided tensors in containers; None if it holds anything else or there is no room."""
        records: list[_Record] = []

        def record(tensor: Tensor) -> _Record:
            if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
                raise _Opaque
            records.append(self._record(tensor))
            return records[-1]

        try:
            return StoredOutput(self, map_tree(value, record, _refuse), records)
        except (_Opaque, OSError):
            for each in records:
                self.free(each)
            return None

    def free(self, record: _Record) -> None:
        """Frees the space of a record for others."""
        if record.held is not None:
            self._room += record.nbytes
        elif record.file is not None:
            self._gaps.setdefault(record.nbytes, []).append(record.offset)
        record.held = record.file = None

    def close(self) -> None:
        """Deletes the file."""
        if self._file is not None:
            self._file.close()

    def _record(self, tensor: Tensor) -> _Record:
        key = tensor.shape, tensor.stride(), tensor.dtype
        if key not in self._likes:
            self._likes[key] = tensor.detach().to("meta")
        record = _Record(self._likes[key], tensor.device)
        if record.nbytes <= self._room:
            self._room -= record.nbytes
            record.held = tensor.detach().clone()
        else:
            self._write(record, tensor)
        return record

    def _write(self, record: _Record, tensor: Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)
            weakref.finalize(self, self._file.close)
            self._disk = shutil.disk_usage(tempfile.gettempdir()).free // DISK_SHARE
        if gaps := self._gaps.get(record.nbytes):
            record.offset = gaps.pop()
        elif self._end + record.nbytes <= self._disk:
            record.offset, self._end = self._end, self._end + record.nbytes
        else:
            raise OSError("no room in the temporary folder")
        buffer = bytearray(record.nbytes)
        torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
        self._file.seek(record.offset)
        written = 0
        while written < len(buffer):
            written += self._file.write(memoryview(buffer)[written:])
        record.file = self._file


def _refuse(_: object) -> Any:
    raise _Opaque


def _never(tensor: Tensor) -> Any:
    raise AssertionError("a form holds records in the place of tensors")
