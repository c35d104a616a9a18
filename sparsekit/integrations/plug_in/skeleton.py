"""Prepares a model without weights: first the shapes of a slim one, then its compressed layers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...checkpoint.pretrained import parse_config
from ...checkpoint.skeleton import Skeleton, prepare, renaming
from ...slim import SlimPlan, slim_


def prepare_skeleton(model: nn.Module, entries: Mapping[str, Any], weights: Path) -> Skeleton:
    """Prepares a model on the meta device for the weights of a folder.

    Args:
        model: as its configuration describes it.
        entries: the ``quantization_config``.
        weights: the file that will be loaded.

    Raises:
        ValueError: the entries do not fit the model.
    """
    if (data := entries.get("slim")) is not None:
        plan = SlimPlan.from_json(data)
        rename = renaming(model, [branch.reader for branch in plan.units])
        slim_(model, SlimPlan.from_json(_renamed(data, rename)))
    return prepare(model, *parse_config(entries), weights)


def _renamed(data: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Returns a plan, as ``SlimPlan.to_json`` returns it, with other names."""
    units = {
        rename(reader): {
            **branch,
            "writers": {rename(writer): count for writer, count in branch["writers"].items()},
            "attributes": [rename(name) for name in branch["attributes"]],
        }
        for reader, branch in data["units"].items()
    }
    return {**data, "units": units, "stages": {rename(name): each for name, each in data["stages"].items()}}
