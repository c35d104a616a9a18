"""Digests of batches, weights and functions that are the same in every process."""

import dataclasses
import enum
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._safetensors import bytes_of


def digest(value: Any) -> str:
    """Returns the first 128 bits of a SHA-256 over everything that a value holds.

    A tensor counts by its dtype, shape and bytes, but not by its device; a mapping (in any order), a sequence or an
    object by its contents; a function or class by its name; and an object without readable contents, such as a lock, by
    its type.
    """
    sha = hashlib.sha256()
    _add(sha.update, value, ())
    return sha.hexdigest()[:32]


def digest_batches(batches: Iterable[Any]) -> list[Any]:
    """Returns the number of batches and a digest of them in their order; only one batch is in memory at a time."""
    count, sha = 0, hashlib.sha256()
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        sha.update(digest(batch).encode())
    return [count, sha.hexdigest()[:32]]


def digest_tensors(model: nn.Module) -> dict[str, str]:
    """Returns the digest of every parameter and buffer of a model by name, also of those outside its state dict."""
    known: dict[int, str] = {}
    found = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            found[name] = known[id(tensor)] if id(tensor) in known else known.setdefault(id(tensor), digest(tensor))
    return found


def digest_modules(model: nn.Module) -> str:
    """Returns a digest of the structure of a model: the class and ``extra_repr`` of each module."""
    modules = model.named_modules(remove_duplicate=False)
    return digest([(name, name_of(type(module)), without_addresses(module.extra_repr())) for name, module in modules])


def name_of(function: Callable[..., Any] | None) -> str | None:
    """Returns the full name of a function or class, by which it can be compared between processes; None for None."""
    if function is None:
        return None
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(owner, '__module__', '')}.{owner.__qualname__}"


def without_addresses(text: str) -> str:
    """Returns the result of ``repr`` without memory addresses, which differ in every process."""
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", text)


def _add(update: Callable[[bytes | memoryview], object], value: Any, above: tuple[int, ...]) -> None:
    """Adds a value to a hash; a tag and its length precede each part, so that different values have different bytes."""

    def tag(kind: str, *said: object) -> None:
        text = "\0".join((kind, *map(str, said))).encode(errors="surrogatepass")
        update(len(text).to_bytes(8, "little") + text)

    def inner(*values: Any) -> None:
        for each in values:
            _add(update, each, (*above, id(value)))

    if id(value) in above:
        tag("above", len(above) - above.index(id(value)))
    elif isinstance(value, Tensor):
        _add_tensor(tag, inner, update, value)
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum):
        tag(type(value).__name__, repr(value))
    elif isinstance(value, Mapping):
        tag("mapping", len(value))
        inner(*sorted((digest(key), digest(item)) for key, item in value.items()))
    elif isinstance(value, tuple | list):
        tag("sequence", len(value))
        inner(*value)
    elif isinstance(value, Set):
        tag("set", len(value))
        inner(*sorted(digest(item) for item in value))
    elif callable(getattr(value, "tobytes", None)):  # an array of NumPy, an image of PIL
        about = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        tag("bytes", name_of(type(value)), *about)
        tag("of", hashlib.sha256(value.tobytes()).hexdigest())
    elif isinstance(value, type) or hasattr(value, "__qualname__"):
        tag("name", name_of(value))
    elif isinstance(value, torch.dtype | torch.device | torch.layout):
        tag("torch", repr(value))
    else:
        tag("object", name_of(type(value)))
        fields = (
            {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            if (dataclasses.is_dataclass(value))
            else getattr(value, "__dict__", {})
        )
        for name in sorted(fields):
            tag("field", name)
            inner(fields[name])


def _add_tensor(
    tag: Callable[..., None], inner: Callable[..., None], update: Callable[[bytes | memoryview], object], tensor: Tensor
) -> None:
    kind = "tensor" if type(tensor) in (Tensor, nn.Parameter) else type(tensor).__name__
    if torch.nn.parameter.is_lazy(tensor):
        tag(kind)
        return
    tag(kind, tensor.dtype, tensor.layout)
    if is_traceable_wrapper_subclass(tensor):
        inner(*(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]))
    elif tensor.is_nested:
        inner(*tensor.unbind())
    elif tensor.layout != torch.strided:
        tag("shape", tuple(tensor.shape))
        inner(tensor.to_sparse_coo().coalesce().indices(), tensor.to_sparse_coo().coalesce().values())
    else:
        tag("shape", tuple(tensor.shape))
        if not tensor.is_meta:
            update(bytes_of(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()))
