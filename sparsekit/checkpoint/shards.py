"""The tensors of a model in one safetensors file or a folder of them, read one by one and written file by file."""

import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .._json import parse_json, write_json
from .._safetensors import DTYPES, unique_tensors, write_tensors

INDEX = "model.safetensors.index.json"


class Shards(Mapping[str, Tensor]):
    """A mapping of names to tensors, each of which is read from its file on access.

    Args:
        path: a safetensors file, several of them, or a folder with one or with several and the index of transformers.
        skip: names of files in the folder to ignore.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file is broken, or not one of those that the index names; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str] | Sequence[Path], *, skip: Container[str] = ()) -> None:
        files = _files_in(Path(path), skip) if isinstance(path, str | os.PathLike) else path
        self._files: dict[str, Path] = {}
        for file in files:
            for name in _names(file):
                if name in self._files:
                    raise ValueError(f"{file}: the tensor {name!r} is in {self._files[name].name} too")
                self._files[name] = file
        index = Path(path) / INDEX if isinstance(path, str | os.PathLike) else None
        if index is not None and index.is_file() and (lost := _index(index).keys() - self._files.keys()):
            raise ValueError(f"{index} names the tensor {min(lost)!r}, which is in none of its files")

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            with safe_open(path, "pt", device="cpu") as file:
                return file.get_tensor(name).clone()  # a later change of the file must not change the tensor
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is truncated, or no safetensors file ({error})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""
        with safe_open(self._files[name], "pt", device="cpu") as file:
            return tuple(file.get_slice(name).get_shape())

    def files(self) -> list[Path]:
        """Returns the file of every tensor."""
        return list(self._files.values())

    def meta(self, name: str) -> Tensor:
        """Returns a tensor on the meta device with the shape and the dtype of a stored one.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._files:
            raise ValueError(f"the tensor {name!r} is missing")
        with safe_open(self._files[name], "pt", device="cpu") as file:
            stored = file.get_slice(name)
            dtype = next(dtype for dtype, code in DTYPES.items() if code == stored.get_dtype())
            return torch.empty(stored.get_shape(), dtype=dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: str | os.PathLike[str], *, max_bytes: int = 5 << 30
) -> list[Path]:
    """Writes tensors to a folder as transformers does: one file, or an index and several of at most ``max_bytes``.

    Only the tensors of one file are in memory at a time.

    Args:
        tensors: names and tensors, once each.
        folder: an existing folder.
        max_bytes: a larger tensor has a file of its own.

    Returns:
        The files, without the index.

    Raises:
        OSError: a file cannot be written.
        ValueError: a name comes twice, or a tensor cannot be written.
    """
    folder = Path(folder)
    files: list[Path] = []
    file_numbers: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def end() -> None:
        plain, shared = unique_tensors(shard)
        # A shared tensor is written under each of its names, because the readers of these files do not know sharing.
        whole = {name: plain[shared[name]] if name in shared else plain[name] for name in shard}
        files.append(folder / f"model-{len(files) + 1:05d}.safetensors")
        write_tensors(files[-1], whole, {"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if name in file_numbers:
            raise ValueError(f"the tensor {name!r} comes twice")
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > max_bytes:
            end()
        file_numbers[name] = len(files)
        shard[name] = tensor
        total += tensor.nbytes
    end()
    if len(files) == 1:
        return [files[0].rename(folder / "model.safetensors")]
    files = [file.rename(folder / f"{file.stem}-of-{len(files):05d}.safetensors") for file in files]
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: files[at].name for name, at in file_numbers.items()},
    }
    write_json(folder / INDEX, index)
    return files


def _files_in(folder: Path, skip: Container[str]) -> list[Path]:
    if not folder.is_dir():
        return [folder]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_index(folder / INDEX).values()))]
    files = sorted(path for path in folder.glob("*.safetensors") if path.name not in skip)
    if len(files) != 1:
        raise ValueError(f"{folder}: it is a directory of {len(files)} safetensors files, and has no {INDEX}")
    return files


def _index(path: Path) -> dict[str, str]:
    """Returns the name of the file that each tensor is in."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        found = data["weight_map"]
        # A name that contains a folder could lead to any place on the disk.
        good = all(isinstance(name, str) and Path(name).name == name != ".." for name in found.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors files: {error}") from error
    if not found or not good:
        raise ValueError(f"{path} is no index of safetensors files: it must map tensors to files beside it")
    return dict(found)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return list(file.keys())
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is truncated, or no safetensors file ({error})") from error
