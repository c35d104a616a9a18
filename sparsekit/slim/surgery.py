"""``slim_``: removes units and stages from a model, which becomes smaller and computes the same as with zeros."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._batches import Forward, check_functions
from .._layers import check_model, count_weights
from .._replace import guard_saving
from .._state import SLIM_PLAN, get_attribute, remove_attribute, set_attribute
from .._undo import Undo, change
from .check import check_fits
from .fold import fold, means
from .plan import SlimPlan
from .resize import channels, drop_full_masks, padding, resize, sides, taking
from .stages import drop_stages


@dataclass(frozen=True)
class SlimReport:
    """What ``slim_`` did; ``str(report)`` says it in words.

    Args:
        plan: the plan.
        weights: the entries of all parameters of the model now.
        weights_before: those before.
    """

    plan: SlimPlan
    weights: int
    weights_before: int

    def __str__(self) -> str:
        share = 1 - self.weights / self.weights_before
        return f"{self.weights_before:,} -> {self.weights:,} weights, {share:.1%} removed\n{self.plan}"


def slim_(model: nn.Module, plan: SlimPlan, batches: Any = None, *, forward: Forward | None = None) -> SlimReport:
    """Removes the units and stages that a plan drops: the model becomes smaller, and is an ordinary one.

    What a dropped unit says is taken out of the sum of the layer that reads it. With ``batches``, its mean over them is
    added to that layer's bias. So the slim model computes the same as one in which the units are masked by zeros,
    also where their biases were kept: such a unit says the same at every token, which is its mean. A model on the meta
    device gets the shapes, so that the weights of a slim model can be loaded into it.

    Parameters of changed layers are new objects: make the optimizer afterwards. Masks that ``mask_units_`` stored go
    with their units, and so do those that drop nothing. The plan is stored, for ``unslim_``, and in the configuration
    of a model of transformers as ``slim_plan``: with the names that the units have once the dropped stages are gone,
    whose number is ``num_hidden_layers`` then.

    Args:
        model: a model that ``find_units`` was given, or one of the same structure.
        plan: what stays.
        batches: batches whose mean is folded into biases; one is enough where the units are masked. None folds nothing.
        forward: ``forward(model, batch)`` replaces how the model is called, as in ``Calibration``.

    Returns:
        The report.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the plan does not fit the model, a layer is shared or has another mask, or masked units say
            something and cannot be folded: without batches, or because the layer that reads them has no bias. The model
            is as it was.
        RuntimeError: the model is being changed already.
    """
    check_model(model)
    check_functions(forward=forward)
    if not isinstance(plan, SlimPlan):
        raise TypeError(f"plan must be a SlimPlan, got {type(plan).__name__}")
    check_fits(model, plan)

    def work(undo: Undo) -> SlimReport:
        before = count_weights(model)
        with torch.inference_mode(False), torch.no_grad():
            fold(model, plan, None if batches is None else means(model, plan, batches, forward), undo)
            shrink(model, plan, undo)
            for stages, kept in plan.dropping_stages():
                drop_stages(model, stages, kept, undo)
            _remember(model, plan, undo)
        return SlimReport(plan, count_weights(model), before)

    return change(model, "slimmed", work)


def unslim_(model: nn.Module) -> None:
    """Puts zeros in the places of the units that ``slim_`` removed: the model has the shapes that it began with.

    It computes the same as the slim model, and other programs can load it. Dropped stages do not come back: a model of
    transformers with fewer of them is an ordinary one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``slim_`` has removed no units of it.
        RuntimeError: the model is being changed already.
    """
    check_model(model)
    plan = slim_plan(model)
    if plan is None:
        raise ValueError("slim_ has removed no units of this model, so there are none to bring back")

    def work(undo: Undo) -> None:
        with torch.inference_mode(False), torch.no_grad():
            _grow(model, plan, undo)
            _store(model, None, undo)

    change(model, "slimmed", work)


def slim_plan(model: nn.Module) -> SlimPlan | None:
    """Returns the plan by which ``slim_`` has removed units of a model, in one if it was called twice; else None."""
    return get_attribute(model, SLIM_PLAN)


def shrink(model: nn.Module, plan: SlimPlan, undo: Undo) -> None:
    touched: list[nn.Module] = []
    for branch, kept in plan.dropping_units():
        for layer, side, width, segments in sides(branch, model):
            resize(layer, side, taking(channels(kept, branch.units, width, segments)), undo)
            touched.append(layer)
        _scale(model, branch.attributes, branch.units, len(kept), undo)
    drop_full_masks(touched, undo)
    whole = [branch for branch, kept in plan.units.items() if len(kept) == branch.units]
    others = {layer for branch in whole for layer, *_ in sides(branch, model)}
    drop_full_masks(others - {*touched}, undo, only=True)


def _grow(model: nn.Module, plan: SlimPlan, undo: Undo) -> None:
    for branch, kept in plan.dropping_units():
        for layer, side, width, segments in sides(replace(branch, units=len(kept)), model):
            index = channels(kept, branch.units, width, segments)
            resize(layer, side, padding(index, branch.units * width * segments), undo)
        _scale(model, branch.attributes, len(kept), branch.units, undo)


def _scale(model: nn.Module, attributes: Sequence[str], now: int, after: int, undo: Undo) -> None:
    """Changes integers that are multiples of the number of units."""
    for full_name in attributes:
        owner, _, name = full_name.rpartition(".")
        module = model.get_submodule(owner)
        value = get_attribute(module, name)
        undo.callback(set_attribute, module, name, value)
        set_attribute(module, name, value // now * after)


def _remember(model: nn.Module, plan: SlimPlan, undo: Undo) -> None:
    """Stores the plan, put together with that of an earlier call."""
    now = plan.without_stages()
    if (earlier := slim_plan(model)) is not None:
        now = now.after(SlimPlan(earlier.units, plan.stages).without_stages())
    _store(model, now if any(now.dropping_units()) else None, undo)


def _store(model: nn.Module, plan: SlimPlan | None, undo: Undo) -> None:
    holders: list[Any] = [model]
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):  # of transformers, which writes all of its attributes
        holders.append(config)
    for holder in holders:
        value = plan if holder is model or plan is None else plan.to_json()
        undo.callback(_set_or_remove, holder, get_attribute(holder, SLIM_PLAN))
        _set_or_remove(holder, value)
    undo.callback(guard_saving, model)
    guard_saving(model)


def _set_or_remove(holder: Any, value: Any) -> None:
    if value is None:
        remove_attribute(holder, SLIM_PLAN)
    else:
        set_attribute(holder, SLIM_PLAN, value)
