"""Folds what dropped units say on average into the bias of the layer that reads them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Forward, as_batches, hooking, layer_input, observing
from .._layers import input_dim
from .._undo import Undo
from .plan import Branch, SlimPlan
from .resize import channels, replace_parameter, sides, weight_dim
from .run import run_plainly


def means(model: nn.Module, plan: SlimPlan, batches: Any, forward: Forward | None) -> dict[str, Tensor]:
    """Returns the mean input, in float64, of each layer that reads dropped units."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = layer_input(args, kwargs).detach().flatten(0, -2).double()
        total = tokens.sum(0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + len(tokens)

    with hooking() as hooks, observing(model):
        for branch, _ in plan.dropping_units():
            reader = model.get_submodule(branch.reader)
            hooks.append(reader.register_forward_pre_hook(partial(add, branch.reader), with_kwargs=True))
        for batch in as_batches(batches):
            run_plainly(model, batch, forward)
    if missing := [branch.reader for branch, _ in plan.dropping_units() if branch.reader not in sums]:
        raise ValueError(f"no batch reaches layer {missing[0]!r}, which reads dropped units")
    return {name: total / counts[name] for name, total in sums.items()}


def fold(model: nn.Module, plan: SlimPlan, found: dict[str, Tensor] | None, undo: Undo) -> None:
    """Adds to biases what dropped units say on average; ``undo`` records how to restore them.

    Raises:
        ValueError: masked units may say something, and it cannot be folded.
    """
    for branch, kept in plan.dropping_units():
        dropped = sorted({*range(branch.units)} - {*kept})
        reader = model.get_submodule(branch.reader)
        weight = reader.get_parameter("weight").detach()
        if weight.is_meta:
            continue
        index = channels(dropped, branch.units, branch.width).to(weight.device)
        read = weight.index_select(weight_dim(reader, "inputs"), index)
        masked = _constant(model, branch, dropped) & read.ne(0).any(1 - weight_dim(reader, "inputs"))
        mean = None if found is None else found[branch.reader].index_select(0, index).to(weight.device)
        if masked.any() and mean is None:
            raise ValueError(
                f"units of {branch.reader!r} are masked by zeros in the layers before it, and may still say something "
                "constant: pass batches, one is enough, to fold that into its bias"
            )
        if mean is None:
            continue
        matrix = read if input_dim(reader) == 1 else read.t()
        bias = reader._parameters.get("bias")
        if bias is not None:
            replace_parameter(reader, "bias", (bias.detach().double() + matrix.double() @ mean).to(bias.dtype), undo)
        elif (mean * masked).any():
            raise ValueError(f"masked units of {branch.reader!r} say something constant, but it has no bias to take it")


def _constant(model: nn.Module, branch: Branch, dropped: list[int]) -> Tensor:
    """Returns which of the reader's inputs from dropped units are the same at all tokens: their writers have zeros."""
    zero: list[Tensor] = []
    for layer, side, width, segments in sides(branch, model):
        if side == "outputs":
            index = channels(dropped, branch.units, width, segments)
            weight = layer.get_parameter("weight").detach()
            rows = weight.index_select(weight_dim(layer, side), index.to(weight.device)).movedim(
                weight_dim(layer, side), 0
            )
            zero.append(rows.reshape(segments, len(dropped), -1).eq(0).all(-1).all(0))
    return torch.stack(zero).all(0).repeat_interleave(branch.width)
