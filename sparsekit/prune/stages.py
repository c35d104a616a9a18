"""The parts of a model that are calibrated together."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .layers import Layer


@dataclass(frozen=True)
class Stage:
    """Layers that are calibrated together, and the module that is waited for: all of them run inside it."""

    module: nn.Module
    layers: tuple[Layer, ...]


def split_stages(model: nn.Module, layers: Iterable[Layer]) -> list[Stage]:
    """Splits layers by the outermost list they are in: each child of a ModuleList or Sequential is a stage.

    A layer outside any list is a stage of its own. A list that is an item of a list is looked through: only what is
    called can be waited for.
    """
    stages: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        stages.setdefault(_stage_module(model, layer.path), []).append(layer)
    return [Stage(module, tuple(members)) for module, members in stages.items()]


def split_layers(layers: Iterable[Layer]) -> list[Stage]:
    """Makes each module with layers a stage of its own."""
    stages: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        stages.setdefault(layer.module, []).append(layer)
    return [Stage(module, tuple(members)) for module, members in stages.items()]


def _stage_module(model: nn.Module, name: str) -> nn.Module:
    parent = model
    for part in name.split(".") if name else ():
        child = parent.get_submodule(part)
        if isinstance(parent, nn.ModuleList | nn.ModuleDict | nn.Sequential) and not isinstance(
            child, nn.ModuleList | nn.ModuleDict
        ):
            return child
        parent = child
    return parent
