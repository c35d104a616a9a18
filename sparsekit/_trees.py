"""Maps and copies the inputs and outputs of models, which are tensors in nested containers and plain objects."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)


def map_tree(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any]) -> Any:
    """Rebuilds nested lists, tuples, mappings and dataclasses, with two functions that replace their contents.

    Args:
        value: any object; an object that occurs twice is replaced by one object that occurs twice.
        tensor: returns the replacement of a tensor.
        other: returns the replacement of a value that is neither a tensor, nor a container, nor a constant.
    """
    return _walk(value, tensor, other, {})


# These are no closures, because closures that call each other are a reference cycle, which would keep tensors alive.
def _walk(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    if isinstance(value, ATOMS):
        return value
    if id(value) not in done:
        done[id(value)] = _built(value, tensor, other, done)
    return done[id(value)]


def _built(value: Any, tensor: Callable[[Tensor], Any], other: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) is list:
        items: list[Any] = []
        done[id(value)] = items  # before it is filled: it may hold itself
        items.extend(_walk(item, tensor, other, done) for item in value)
        return items
    if isinstance(value, tuple):
        parts = [_walk(item, tensor, other, done) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, MutableMapping):
        done[id(value)] = mapping = copy.copy(value)
        for key, item in value.items():
            mapping[key] = _walk(item, tensor, other, done)
        return mapping
    if dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
        done[id(value)] = record = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(record, field.name, _walk(getattr(value, field.name), tensor, other, done))
        return record
    return other(value)


def copied(value: Any) -> Any:
    """Copies everything that a model may write to: containers, plain objects, and tensors, detached from their graph.

    Modules, and objects that cannot be copied, such as a lock or a generator, are not copied.
    """
    return map_tree(value, _fresh, _other)


def _fresh(tensor: Tensor) -> Tensor:
    try:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    except (RuntimeError, NotImplementedError, TypeError):
        return tensor  # a layout without copies


def _other(value: Any) -> Any:
    if isinstance(value, type | nn.Module) or callable(value):
        return value
    try:
        if _is_plain(type(value)):
            new = object.__new__(type(value))
            new.__dict__.update(copied(value.__dict__))
            return new
        return copy.deepcopy(value)
    except Exception:
        return value


def _is_plain(kind: type) -> bool:
    """Returns whether objects of this class hold nothing but their attributes."""
    special = {"__new__", "__slots__", "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__"}
    return not any(special & vars(base).keys() for base in kind.__mro__[:-1])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
