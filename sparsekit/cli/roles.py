"""What the weights in a transformers folder are, from the configuration alone: no weight is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from .._layers import borrowed, input_dim
from .models import empty_model, head_of, read_config
from .stored import Role


def roles_of(folder: Path, files: Sequence[Path]) -> Mapping[str, Role] | None:
    """The linear and convolutional layers by the names that the files use; None where the folder does not tell."""
    if not (folder / "config.json").exists():
        return None
    try:
        with torch.device("meta"):
            model = empty_model(read_config(str(folder)))
    except ValueError:  # a kind of model that transformers does not know
        return None
    held, head = borrowed(model), head_of(model)
    roles = {}
    for name, module in model.named_modules():
        if (axis := input_dim(module)) is not None:
            exempt = "tied" if module in held else "output head" if module is head else ""
            roles[name] = Role(axis, exempt)
    names = set[str]()
    for path in files:
        with safe_open(path, "pt") as file:
            names.update(key.rpartition(".")[0] for key in file.keys())
    prefix = f"{model.base_model_prefix}."  # a checkpoint of the base model lacks it, or alone has it
    for name in list(roles):
        for other in (name.removeprefix(prefix), prefix + name):
            if name not in names and other in names:
                roles[other] = roles[name]
    return roles if roles.keys() & names else None
