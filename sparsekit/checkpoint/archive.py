"""A safetensors file that is written whole or not at all, and proves on reading that it is what was written."""

import ctypes
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import replacing


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


def seal(structure: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file with these tensors: their structure, and the digest that ``read`` checks."""
    return {"sparsekit": structure, "sha256": _digest(structure, tensors)}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors and metadata, whole or not at all."""
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The structure and the tensors of a file; the structure is None where ``seal`` made no metadata.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is truncated, altered, or something else; the message says which, and not the path.
    """
    if path.is_dir():
        raise ValueError("it is a directory")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file is mapped into memory, and who changes it later must not change the model.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"it is truncated, or no safetensors file ({error})") from error
    structure = metadata.get("sparsekit")
    if structure is not None and _digest(structure, tensors) != metadata.get("sha256"):
        raise ValueError("it was altered: its digest is not the one that was saved")
    return structure, tensors


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            sha.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
    return sha.hexdigest()
