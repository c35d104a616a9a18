"""The product of sparse training: forward by the pruned weight, the weight's gradient to the dense one."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import autocast_dtype
from ..ops import nm_prune, prune_both_to_hardware24, prune_to_hardware24, transposable_mask
from .hardware import hardware_layout


@dataclass(frozen=True)
class Recipe:
    """How a layer trains, in the words of ``sparse_training_``."""

    backward: Literal["straight_through", "transposable"]
    decay: float

    @property
    def transposable(self) -> bool:
        return self.backward == "transposable"

    def prune(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(pruned, mask)`` of a weight, ranked by magnitude."""
        if self.transposable:
            mask = transposable_mask(weight)
            return torch.where(mask, weight, 0), mask
        return nm_prune(weight, 2, 4)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
    """Computes ``x @ pruned.T + bias``, where ``pruned`` is what the recipe leaves of ``weight``.

    Gradients of ``x`` and ``bias`` are those of this product. ``weight`` gets the gradient of ``pruned``, also where
    nothing was kept, plus ``decay * (weight - pruned)``. Autocast follows ``F.linear``; masks are always those of the
    weight as it is stored.

    Nothing is kept from one call to the next. A cache could not know when it is stale: fused optimizers, writes through
    ``.data`` and FSDP's gathering change a weight without a new ``_version``.
    """
    autocast = autocast_dtype(x)
    dtype = autocast or weight.dtype
    layout, _ = hardware_layout(weight.device, dtype, *weight.shape, recipe.transposable)
    if layout is None:
        return F.linear(x, _Prune.apply(weight, recipe), bias)
    # Packing for both products prunes too, but it ranks what it is given, and returns no dense copy for the decay.
    if not recipe.transposable or recipe.decay or weight.dtype != dtype:
        weight = _Prune.apply(weight, recipe).to(dtype)
    if autocast is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _HardwareLinear.apply(x, weight, bias, layout, recipe.transposable)


class _Prune(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, recipe: Recipe) -> Tensor:
        return recipe.prune(weight)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        weight, recipe = inputs
        ctx.decay = recipe.decay
        if ctx.decay:
            ctx.save_for_backward(weight, output)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.decay:
            weight, pruned = ctx.saved_tensors
            grad = torch.add(grad, weight - pruned, alpha=ctx.decay)
        return grad, None


class _HardwareLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layout, transposable):  # type: ignore[no-untyped-def]
        if transposable:
            packed, other, _ = prune_both_to_hardware24(weight, layout)
        else:
            packed, other = prune_to_hardware24(weight, layout), weight
        ctx.layout, ctx.transposable = layout, transposable
        ctx.save_for_backward(x, other)
        return hardware_linear24(x, packed, bias, weight.shape[0], layout)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, other = ctx.saved_tensors
        tokens = grad.reshape(-1, grad.shape[-1])  # [tokens, rows]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if ctx.transposable:
                grad_x = hardware_linear24(grad, other, None, x.shape[-1], ctx.layout)
            else:
                grad_x = grad @ other
        if ctx.needs_input_grad[1]:
            grad_weight = tokens.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = tokens.sum(0)
        return grad_x, grad_weight, grad_bias, None, None
