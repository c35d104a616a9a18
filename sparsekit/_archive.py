"""A safetensors file that is written whole or not at all, and proves on reading that it is what was written."""

import ctypes
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def unique(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, on the CPU and contiguous, and which other names share them."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor to be saved, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data to save")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        plain = tensor.detach().cpu().contiguous()
        # A view into a storage that another tensor is written from: safetensors refuses overlapping memory.
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, shared


def write(path: Path, structure: str, tensors: dict[str, Tensor]) -> None:
    """Writes tensors, and ``structure`` in the metadata, beside ``path``; flushes them to the disk; then renames."""
    metadata = {"sparsekit": structure, "sha256": _digest(structure, tensors)}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The structure and the tensors that ``write`` wrote.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is truncated, altered, or something else; the message says which, and not the path.
    """
    if path.is_dir():
        raise ValueError("it is a directory")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "sparsekit" not in metadata or "sha256" not in metadata:
                raise ValueError("it is a safetensors file, but not one that sparsekit.save wrote")
            # Copies: the file is mapped into memory, and who changes it later must not change the model.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"it is truncated, or no safetensors file ({error})") from error
    if _digest(metadata["sparsekit"], tensors) != metadata["sha256"]:
        raise ValueError("it was altered: its digest is not the one that was saved")
    return metadata["sparsekit"], tensors


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            sha.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
    return sha.hexdigest()
