"""What launchers share: the device's architecture, its guard, and which configuration of a kernel to launch."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]  # constexpr blocks, num_warps, num_stages: passed to the kernel as they are

SHIPPED = Path(__file__).with_name("configs.json")
TABLES: dict[str, "Table"] = {}


def architecture(tensor: Tensor) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``""`` where there is no GPU, which is the interpreter."""
    return _architecture(tensor.device) if tensor.is_cuda else ""


@cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def processors(tensor: Tensor) -> int:
    """How many multiprocessors the GPU has: what a grid must fill. An H200's 132 where there is no GPU."""
    return _processors(tensor.device) if tensor.is_cuda else 132


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: this makes the tensor's device current."""
    return torch.cuda.device_of(tensor)


class Table:
    """The few configurations that a kernel is launched with, and which one answers an architecture and a shape class.

    What was measured fastest is read, once, from ``configs.json`` beside this file, and over it from
    ``$XDG_CACHE_HOME/sparsekit/triton.json`` (``~/.cache`` by default), which ``python -m bench.gpu --tune`` writes:
    ``{architecture: {kernel: {shape class: name}}}``. What neither names takes the kernel's own default.

    Args:
        kernel: the name of the table.
        configs: the configurations by name.
        default: the name per shape class, before anything was measured.
    """

    def __init__(self, kernel: str, configs: dict[str, Config], default: dict[str, str]):
        self.kernel, self.configs, self.default = kernel, configs, default
        self._forced: str | None = None
        TABLES[kernel] = self

    def config(self, tensor: Tensor, shape_class: str) -> Config:
        """The configuration for the device of ``tensor`` and a class of shapes."""
        return self.configs[self.name(architecture(tensor), shape_class)]

    def name(self, arch: str, shape_class: str) -> str:
        measured = _measured().get(arch, {}).get(self.kernel, {}).get(shape_class)
        return self._forced or (measured if measured in self.configs else self.default[shape_class])

    @contextmanager
    def force(self, name: str) -> Iterator[None]:
        """Launches one configuration for every shape, for tests and measurements.

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
    """Where measured choices of this user's GPUs are kept."""
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
            continue  # a table that cannot be read costs speed, not correctness
    return tables
