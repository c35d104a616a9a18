"""The product of sparse training: by the pruned weight, with a gradient for the dense weight."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..nn.common import autocast_dtype
from ..ops import nm_mask, transposable_mask24
from ..ops.train24 import train_linear24, train_prune24


@dataclass(frozen=True)
class Recipe:
    """How a layer trains; the fields are arguments of ``sparse_training_``."""

    backward: Literal["straight_through", "transposable"]
    decay: float

    @property
    def transposable(self) -> bool:
        return self.backward == "transposable"

    def mask(self, weight: Tensor) -> Tensor:
        """Returns the bool mask of a weight, in its shape."""
        return transposable_mask24(weight) if self.transposable else nm_mask(weight, 2, 4)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, layout: str | None) -> Tensor:
    """Computes ``x @ pruned.T + bias``, where ``pruned`` is ``weight`` with zeros where the recipe's mask drops it.

    Gradients of ``x`` and ``bias`` are those of this product. ``weight`` gets the gradient of ``pruned``, also for its
    dropped entries, plus ``decay * (weight - pruned)``. Autocast works as in ``F.linear``; the mask is always that of
    the weight as it is stored.

    Nothing is kept from one call to the next, because a cache could not know when it is stale: fused optimizers, writes
    through ``.data`` and FSDP's gathering change a weight without a new ``_version``.

    Args:
        x, weight, bias: as in ``F.linear``.
        recipe: chooses the mask.
        layout: the hardware layout of the pruned weight; None for a dense product with it.
    """
    autocast = autocast_dtype(x)
    dtype = autocast or weight.dtype
    # Packing a weight in both directions prunes it too, but ranks the weight in the dtype it is given, without decay.
    if layout is None or not recipe.transposable or recipe.decay or weight.dtype != dtype:
        weight = train_prune24(weight, transposable=recipe.transposable, decay=recipe.decay)
    if layout is None:
        return F.linear(x, weight, bias)
    if autocast is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return train_linear24(x, weight, bias, transposable=recipe.transposable, layout=layout)
