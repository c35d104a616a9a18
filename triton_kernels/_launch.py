"""What all launchers use: the GPU's architecture, its device guard, and the tables of kernel configurations."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]  # a kernel's constexpr sizes, num_warps and num_stages, passed to it as keyword arguments

SHIPPED = Path(__file__).with_name("configs.json")
TABLES: dict[str, "Table"] = {}


def architecture(tensor: Tensor) -> str:
    """Returns ``"sm_90"``, ``"gfx942"``, ..., or ``""`` for a tensor that is not on a GPU (Triton's interpreter)."""
    return _architecture(tensor.device) if tensor.is_cuda else ""


@cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def processors(tensor: Tensor) -> int:
    """Returns the number of multiprocessors that a grid should fill: an H200's 132 where there is no GPU."""
    return _processors(tensor.device) if tensor.is_cuda else 132


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which kernels are launched on the tensor's device."""
    return torch.cuda.device_of(tensor)


class Table:
    """The configurations of a kernel, and the choice among them for an architecture and a class of shapes.

    The choices that were measured fastest are read once: from ``configs.json`` beside this file, then from
    ``$XDG_CACHE_HOME/sparsekit/triton.json`` (``~/.cache`` by default), which overrides it and which
    ``python -m bench.gpu --tune`` writes. Both hold ``{architecture: {kernel: {shape class: name}}}``.
    Where neither has a choice, ``default`` decides.

    Args:
        kernel: the name of the table in these files.
        configs: the configurations by name.
        default: the name of a configuration for each shape class.
    """

    def __init__(self, kernel: str, configs: dict[str, Config], default: dict[str, str]):
        self.kernel, self.configs, self.default = kernel, configs, default
        self._forced: str | None = None
        TABLES[kernel] = self

    def config(self, tensor: Tensor, shape_class: str) -> Config:
        """Returns the configuration for the device of ``tensor`` and a class of shapes."""
        return self.configs[self.name(architecture(tensor), shape_class)]

    def name(self, arch: str, shape_class: str) -> str:
        """Returns the name of the configuration for an architecture and a class of shapes."""
        measured = _measured().get(arch, {}).get(self.kernel, {}).get(shape_class)
        return self._forced or (measured if measured in self.configs else self.default[shape_class])

    @contextmanager
    def force(self, name: str) -> Iterator[None]:
        """Uses one configuration for every shape within the context, for tests and measurements.

        Raises:
            ValueError: the table has no configuration of this name.
        """
        if name not in self.configs:
            raise ValueError(f"a configuration of {self.kernel} is one of {tuple(self.configs)}, got {name!r}")
        before, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = before


def user_table() -> Path:
    """Returns the path of the choices that were measured on this user's GPUs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit" / "triton.json"


@cache
def _measured() -> dict[str, dict[str, dict[str, str]]]:
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for path in (SHIPPED, user_table()):
        try:
            for arch, kernels in json.loads(path.read_text(encoding="utf-8")).items():
                for kernel, choices in kernels.items():
                    tables.setdefault(arch, {}).setdefault(kernel, {}).update(choices)
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # the defaults are correct too, if slower
    return tables
