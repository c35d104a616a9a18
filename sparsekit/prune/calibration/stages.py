"""Stages: the parts of a model that are calibrated together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..layers import PrunableLayer


@dataclass(frozen=True)
class Stage:
    """Layers that are calibrated together, and the module in which all of them run."""

    module: nn.Module
    layers: tuple[PrunableLayer, ...]


def split_stages(model: nn.Module, layers: Iterable[PrunableLayer]) -> list[Stage]:
    """Makes each item of an outermost ModuleList, ModuleDict or Sequential a stage of the layers in it.

    A layer outside any list is a stage of its own. If an item is a ModuleList or ModuleDict itself, its items are the
    stages, because these two are never called, and a stage ends when its module returns.
    """
    return _group(layers, lambda layer: _stage_module(model, layer.path))


def split_layers(layers: Iterable[PrunableLayer]) -> list[Stage]:
    """Makes each module that holds layers a stage of its own."""
    return _group(layers, lambda layer: layer.module)


def _group(layers: Iterable[PrunableLayer], module_of: Callable[[PrunableLayer], nn.Module]) -> list[Stage]:
    members: dict[nn.Module, list[PrunableLayer]] = {}
    for layer in layers:
        members.setdefault(module_of(layer), []).append(layer)
    return [Stage(module, tuple(group)) for module, group in members.items()]


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
