"""State dicts as safetensors files: the tensors, and all else as JSON in the header."""

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._json import parse_json
from .._safetensors import read_tensors, seal, unique_tensors, write_tensors

KEY, VERSION = "sparsekit.values", 1


def write_values(path: Path, values: Any) -> None:
    """Writes nested dicts, lists and tuples of tensors and plain values, such as the state dict of an optimizer.

    ``read_values`` returns the same, on the CPU: int and float, list and tuple, a number and a tensor of one number
    stay what they are, and the state dict of a module keeps the versions of its modules.

    Raises:
        TypeError: a value of another type is among them; the message names it.
        ValueError: a tensor cannot be written.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(values, path.stem, tensors)
    unique, shared = unique_tensors(tensors)
    header = json.dumps({"version": VERSION, "values": structure, "shared": shared}, allow_nan=False)
    write_tensors(path, unique, seal(header, unique, KEY))


def read_values(path: Path) -> Any:
    """Reads a file that ``write_values`` wrote; nothing is unpickled.

    Raises:
        ValueError: the file is missing, was altered or is of another kind; the message names it.
    """
    try:
        text, tensors = read_tensors(path, KEY)
        if text is None:
            raise ValueError(f"its header has no {KEY}")
        header = parse_json(text)
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        for name, first in header["shared"].items():
            tensors[name] = tensors[first]
        return _decode(header["values"], tensors)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except RecursionError as error:
        raise ValueError(f"{path} holds no state: it is nested too deeply") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no state: {error}") from error


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON, in which an object with one key says what it is; adds its tensors under their names."""
    kind = type(value)
    if isinstance(value, Tensor):
        unique = name
        while unique in tensors:  # the keys 1 and "1" read alike
            unique += "'"
        tensors[unique] = value
        return {"tensor": unique}
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [_encode(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encode(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [[_encode(key, name, tensors), _encode(each, f"{name}.{key}", tensors)] for key, each in value.items()]
        if hasattr(value, "_metadata"):  # the versions of the modules, by which load_state_dict reads their states
            return {"module": [pairs, _encode(value._metadata, name, tensors)]}
        return {"counter" if kind is Counter else "dict": pairs}
    raise TypeError(f"{name} must hold tensors, numbers, strings, lists, tuples and dicts, got {kind.__name__}")


def _decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_decode(each, tensors) for each in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError("an object in its header is of no known kind")
    ((kind, inner),) = data.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "float":
        return float(inner)
    if kind == "tuple":
        return tuple(_decode(each, tensors) for each in inner)
    if kind == "module":
        state: Any = OrderedDict(_decode({"dict": inner[0]}, tensors))  # which can have an attribute, unlike a dict
        state._metadata = _decode(inner[1], tensors)
        return state
    if kind in ("dict", "counter"):
        pairs = {_decode(key, tensors): _decode(each, tensors) for key, each in inner}
        return Counter(pairs) if kind == "counter" else pairs
    raise ValueError(f"a {kind!r} in its header is of no known kind")
