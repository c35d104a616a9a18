"""Removes stages, such as layers of an encoder, from the list that holds them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .._state import get_attribute, set_attribute
from .._undo import Undo
from .plan import Stages

INDEX = "layer_idx"  # what transformers calls the place of a stage, by which it finds its part of a cache


def drop_stages(model: nn.Module, stages: Stages, kept: Sequence[int], undo: Undo) -> None:
    """Keeps some of the stages and numbers them anew, also in the model's configuration."""
    holder = model.get_submodule(stages.name)
    left = {str(new): holder._modules[str(old)] for new, old in enumerate(kept)}
    undo.callback(set_attribute, holder, "_modules", holder._modules)
    set_attribute(holder, "_modules", left)
    for new, old in enumerate(kept):
        stage = left[str(new)]
        for module in () if stage is None else stage.modules():
            if get_attribute(module, INDEX) == old:
                undo.callback(set_attribute, module, INDEX, old)
                set_attribute(module, INDEX, new)
    for config in _configs(model):
        _renumber(config, stages.count, kept, undo)


def _configs(model: nn.Module) -> list[Any]:
    """Returns the configurations of transformers that modules hold, each once."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in found.values() if hasattr(config, "num_hidden_layers")]


def _renumber(config: Any, count: int, kept: Sequence[int], undo: Undo) -> None:
    before, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    if before != count:
        return

    def put(number: int, kinds: Any) -> None:
        config.num_hidden_layers = number
        if types is not None:
            config.layer_types = kinds

    undo.callback(put, before, types)
    put(len(kept), types and [types[index] for index in kept])
