"""The layer that trains sparse: an ``nn.Linear`` in all but its product."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..nn import autocast_dtype
from . import choose
from .hardware import hardware_layout
from .product import Recipe, multiply


class MaskedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by what a mask leaves of its weight; every call chooses the mask anew.

    ``sparse_training_`` makes one of an ``nn.Linear`` by changing its class, nothing else: the module, its hooks,
    Parameters and state dict stay what they are, so that an optimizer, DDP or a checkpoint sees no difference.
    Copies and pickles train sparse as well.
    """

    unsupported_reason: ClassVar[str] = "it trains sparse: call finish() or undo() of its training first"

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:
        weight, transposable = self.weight, self.recipe.transposable
        dtype = autocast_dtype(x) or weight.dtype
        layout, _ = hardware_layout(weight.device, dtype, weight.shape, transposable)
        if layout is not None:
            # The number of tokens of a traced graph may be unknown.
            tokens = choose.MAX_TOKENS if torch.compiler.is_compiling() else x.shape[:-1].numel()
            layout = _if_faster(layout, weight.device, dtype, *weight.shape, transposable, tokens)
        return multiply(x, weight, self.bias, self.recipe, layout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.recipe.backward}, decay={self.recipe.decay}"


@torch.compiler.assume_constant_result
def _if_faster(
    layout: str, device: torch.device, dtype: torch.dtype, rows: int, cols: int, transposable: bool, tokens: int
) -> str | None:
    kind = choose.Kind(device, dtype, torch.Size((rows, cols)), transposable, layout)
    return layout if choose.is_faster(kind, tokens) else None


def start(layer: nn.Linear, recipe: Recipe) -> None:
    """Makes a plain layer train sparse; one that does already goes on by the new recipe."""
    layer.__dict__["recipe"] = recipe
    layer.__class__ = MaskedLinear


def stop(layer: nn.Linear) -> None:
    """Makes the layer a plain one again; its weight stays as it is."""
    layer.__class__ = nn.Linear
    del layer.__dict__["recipe"]
