"""Safetensors files that are written whole or not at all, with a digest that is checked when they are read."""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._files import replacing

KEY = "sparsekit"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def unique_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns each tensor once, on the CPU and contiguous, and for every other name of a shared tensor its first name.

    Raises:
        TypeError: a value is not a tensor.
        ValueError: a tensor cannot be written, because it has no data here or a dtype that safetensors does not have.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages = set()
    for name, tensor in state.items():
        _check_writable(name, tensor)
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # A view into the storage of another tensor is copied, so that the two do not share memory when they are loaded.
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, shared


def check_holds_data(name: str, tensor: Tensor) -> None:
    """Checks that this process has all values of a tensor.

    Raises:
        ValueError: the tensor is sharded over processes, or not initialized.
    """
    if hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id"):  # a DTensor, a parameter of DeepSpeed's ZeRO
        raise ValueError(
            f"{name} is sharded over processes: gather the model first, as get_model_state_dict of "
            "torch.distributed.checkpoint.state_dict does with full_state_dict=True, into a model of one process"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{name} is not initialized: run the model on an input first")


def _check_writable(name: str, tensor: Any) -> None:
    """Raises unless the value is a tensor whose bytes can be written."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor to be saved, got {type(tensor).__name__}")
    check_holds_data(name, tensor)
    if is_traceable_wrapper_subclass(tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}, which holds other tensors: only plain ones are saved")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no data to save")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {tensor.layout}, only strided tensors are saved")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}, which safetensors has no name for")


def seal(structure: str, tensors: Mapping[str, Tensor], key: str = KEY) -> dict[str, str]:
    """Returns the metadata for a file of these tensors: the structure, and the digest that ``read_tensors`` checks."""
    return {key: structure, "sha256": digest_file(structure, tensors)}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, on the CPU and contiguous, and metadata, whole or not at all.

    The format is that of https://github.com/huggingface/safetensors. The writer of that library is not used: it makes a
    second temporary file, which only its owner may read and which stays if the process is killed, and its errors have
    no errno.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # The widest dtype comes first and the header ends at a multiple of 8, so that each tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if name in header:
            raise ValueError(f"{name!r} cannot be the name of a tensor in a safetensors file")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(bytes_of(tensors[name]))


def read_tensors(path: Path, key: str = KEY) -> tuple[str | None, dict[str, Tensor]]:
    """Returns the structure and the tensors of a file; the structure is None if it has no metadata under ``key``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is truncated, altered or of another kind; the message says which, without the path.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is a directory" if path.is_dir() else "it is a device")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # The file is mapped into memory: without copies, a later change of the file would change the model.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"it is truncated, or no safetensors file ({error})") from error
    structure = metadata.get(key)
    if structure is not None and digest_file(structure, tensors) != metadata.get("sha256"):
        raise ValueError("it was altered: its digest is not the one that was saved")
    return structure, tensors


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU without a copy; the view keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(b"")
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return file.metadata() or {}
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"it is truncated, or no safetensors file ({error})") from error


def check_header(path: Path) -> None:
    """Raises a ValueError if a byte of the header is not as ``write_tensors`` writes it, even one without a meaning."""
    with open(path, "rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    again = json.dumps(json.loads(text), separators=(",", ":")).encode()
    if again + b" " * (-len(again) % 8) != text:
        raise ValueError("it was altered: its header is not as it was written")


def digest_file(structure: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the structure and of all names, dtypes, shapes and bytes, reading one tensor at a time."""
    sha = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(bytes_of(tensor))
    return sha.hexdigest()
