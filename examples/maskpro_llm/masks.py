"""Masks as files, one for each layer as the published code writes them: ``NAME.pt``, a bool tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.masks import get_mask


def layer_masks(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Returns the stored masks of layers by their names, which for experts end with that of a parameter."""
    modules = dict(model.named_modules())
    places = {name: (name, "weight") if name in modules else name.rsplit(".", 1) for name in names}
    found = {name: get_mask(modules[path], parameter) for name, (path, parameter) in places.items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def write_masks(masks: Mapping[str, Tensor], folder: Path) -> None:
    """Writes masks to a folder, in place of those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.pt"):
        path.unlink()
    for name, mask in masks.items():
        torch.save(mask.cpu(), folder / f"{name}.pt")


def read_masks(folder: Path, model: nn.Module, targets: Sequence[str]) -> dict[str, Tensor]:
    """Reads the masks of the layers that ``targets`` select: ``all``, or parts of names such as ``layers.0 mlp``.

    Raises:
        ValueError: there are no masks, they are of another model, or a target selects none.
    """
    masks = {path.stem: torch.load(path, "cpu", weights_only=True) for path in sorted(folder.glob("*.pt"))}
    if not masks:
        raise ValueError(f"{folder} has no masks: run get_mask.py first, with the same --model and --out")
    weights = {name.removesuffix(".weight"): weight.shape for name, weight in model.named_parameters()}
    for name, mask in masks.items():
        if weights.get(name) != mask.shape:
            raise ValueError(
                f"{folder} has a mask {tuple(mask.shape)} for {name}, which the model does not have in that shape: "
                "run get_mask.py with this --model"
            )
    for target in targets:
        if not any(selects(target, name) for name in masks):
            some = ", ".join(list(masks)[:3])
            raise ValueError(f"--targets {target} is no part of the names of the {len(masks)} masks: {some}, ...")
    return {name: mask for name, mask in masks.items() if any(selects(target, name) for target in targets)}


def selects(target: str, name: str) -> bool:
    """Returns whether a target is ``all``, or whole parts of a layer's name."""
    return target == "all" or f".{target}." in f".{name}."


@torch.no_grad()
def apply_masks(model: Any, masks: Mapping[str, Tensor]) -> Any:
    """Writes zeros into the weights that masks drop; returns the model."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = parameters.get(f"{name}.weight", parameters.get(name))
        weight.masked_fill_(~mask.to(weight.device), 0)
    return model
