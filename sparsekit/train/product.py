"""The product of sparse training, which multiplies by the pruned weight and has a gradient for the dense one."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..nn.common import autocast_dtype
from ..ops import nm_mask, transposable_mask24
from ..ops.train24 import train_linear24, train_prune24


@dataclass(frozen=True)
class Recipe:
    """The arguments of ``sparse_training_`` that say how a layer trains."""

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

    ``x`` and ``bias`` get the gradients of this product. ``weight`` gets the gradient of ``pruned``, for its dropped
    entries too, plus ``decay * (weight - pruned)``. Autocast works as in ``F.linear``; the mask is always chosen from
    the weight as it is stored.

    Nothing is cached from one call to the next, because there is no way to see that a weight has changed: fused
    optimizers, writes through ``.data`` and FSDP's gathering do not change its ``_version``.

    Args:
        x, weight, bias: as in ``F.linear``.
        recipe: chooses the mask.
        layout: the hardware layout to pack the pruned weight in; None multiplies by it as a dense weight.
    """
    autocast = autocast_dtype(x)
    dtype = autocast or weight.dtype
    # Packing in both directions prunes too, but it ranks the weight in the dtype of the product, and has no decay.
    if layout is None or not recipe.transposable or recipe.decay or weight.dtype != dtype:
        weight = train_prune24(weight, transposable=recipe.transposable, decay=recipe.decay)
    if layout is None:
        return F.linear(x, weight, bias)
    if autocast is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return train_linear24(x, weight, bias, transposable=recipe.transposable, layout=layout)
