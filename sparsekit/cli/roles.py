"""Finds out what the modules of a stored model are, from its configuration alone: no weight is read."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .._layers import expert_axes, input_dim, output_head, shared_weight_reasons, unsupported_reason
from .models import empty_model, read_config
from .stored import Role


def names_in(files: Iterable[Path]) -> set[str]:
    """Returns the names of all modules that have a tensor in the files."""
    names = set[str]()
    for path in files:
        with safe_open(path, "pt") as file:
            names.update(key.rpartition(".")[0] for key in file.keys())
    return names


def roles_of(folder: Path, names: set[str]) -> Mapping[str, Role | None]:
    """Returns the role of every module, by the ``names`` in the files: None unless it is linear or a convolution.

    Parameters that hold the matrices of experts have a role as well, by their own names. Empty if the folder has no
    configuration, or one of a model that transformers does not know.
    """
    if not (folder / "config.json").exists():
        return {}
    try:
        with torch.device("meta"):
            model = empty_model(read_config(str(folder)))
    except ValueError:  # transformers does not know this kind of model
        return {}
    held, head = shared_weight_reasons(model, fast_paths=False), output_head(model)
    roles: dict[str, Role | None] = {}
    for name, module in model.named_modules():
        axis = input_dim(module)
        exempt = "tied" if (module, "weight") in held else "output head" if module is head else ""
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            exempt = "a convolution in groups"
        if axis is not None:
            exempt = exempt or unsupported_reason(module, prepare=True) or ""
        roles[name] = None if axis is None else Role(axis, exempt)
        for key, along in expert_axes(module).items():
            roles[f"{name}.{key}".lstrip(".")] = Role(along, experts=True)
    prefix = f"{model.base_model_prefix}."  # only one of the two may have it: the names in the files or the modules'
    for name in list(roles):
        for other in (name.removeprefix(prefix), prefix + name):
            if name not in names and other in names:
                roles[other] = roles[name]
    return roles
