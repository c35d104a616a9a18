"""What a linear layer can become, and why it cannot."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import hooks_reason, is_transposed, unsupported_reason
from ..masks import get_mask, lost_zeros_reason, outdated_mask_reason, tier_sizes
from ..nn import (
    Compressed,
    DenseRoute,
    Linear24,
    Linear24WithDense,
    PrepackedLinear,
    Routes,
    TieredLinear,
    TieredLinearWithDense,
)
from ..ops import backends, pack_tiered
from ..ops.prepacked import prepack
from ..ops.sparse24 import values_per_row
from .tiered import Tiers, kept_matrix

MOST_BYTES = 0.9  # of the dense ones, to be worth measuring in tiers


@dataclass(frozen=True)
class Candidate:
    """A form that a linear layer could take.

    Args:
        name: what reports call it.
        dense: whether it computes with the whole weight, zeros included.
        unsupported_reason: why it cannot take a layer, or None where it can.
        nbytes: the bytes of a layer's weight in this form.
        build: makes the module from ``(layer, tokens, transposed)``.
        build_routed: the same with a dense copy beside it and an ``nn.DenseRoute`` for each call to follow; None where
            there is no such module.
    """

    name: str
    dense: bool
    unsupported_reason: Callable[[nn.Linear], str | None]
    nbytes: Callable[[nn.Linear], int]
    build: Callable[[nn.Linear, int, bool], Compressed]
    build_routed: Callable[[nn.Linear, int, bool, Routes], Compressed] | None = None


def unfit(layer: nn.Module) -> str | None:
    """Why a linear layer must stay what it is, whatever is faster; None where it may be swapped."""
    if reason := unsupported_reason(layer):
        return reason
    if type(layer) is not nn.Linear and not is_transposed(layer):
        return f"{type(layer).__name__} may compute something else than nn.Linear"
    if reason := hooks_reason(layer) or outdated_mask_reason(layer):
        return reason
    weight = layer.get_parameter("weight")
    if layer.training and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
        return "its weight has hooks, and is trained"
    known = {"weight", "bias", "weight_mask", "weight_fading"}
    own = (layer._parameters.keys() | layer._buffers.keys() | layer._modules.keys()) - known
    return f"it also holds {', '.join(sorted(own))}" if own else None


def _unsupported_24(layer: nn.Linear) -> str | None:
    if layer.weight.device.type != "cpu":
        return f"no 2:4 kernel for {layer.weight.device.type}"
    if backends()["linear24"]["cpu"] == "reference":
        return "no compiled 2:4 kernel"
    return _unsupported_weight(layer)


def unsupported_routed(layer: nn.Linear) -> str | None:
    """Why a layer on a GPU cannot become a ``RoutedLinear24``, or None where it can."""
    return _unsupported_weight(layer)


def unsupported_with_dense(layer: nn.Linear) -> str | None:
    """Why a layer cannot hold a dense copy beside its sparse weight, or None where it can."""
    if layer.training and layer.weight.requires_grad:
        return "with a dense copy it cannot be trained, and it is in training mode: call model.eval() first"
    return None


def _unsupported_weight(layer: nn.Linear) -> str | None:
    if reason := lost_zeros_reason(layer):
        return reason
    kept = kept_matrix(layer)
    if kept.shape[1] < 4:
        return f"{kept.shape[1]} inputs are less than a group of four"
    if get_mask(layer) is None and not kept.any():  # as LoRA's begins: in training all of it has to move
        return "all zeros, and has no mask that says so"
    return None if _is_24(kept) else "not 2:4"


def _is_24(kept: Tensor) -> bool:
    full = kept.shape[1] // 4 * 4
    return bool((kept[:, :full].reshape(kept.shape[0], -1, 4).sum(-1) <= 2).all())


def unsupported_tiered(layer: nn.Linear) -> str | None:
    """Why a layer cannot become a ``TieredLinear``, or is not worth measuring as one; None where it is."""
    if reason := lost_zeros_reason(layer):
        return reason
    kept = kept_matrix(layer)
    if int(kept.count_nonzero()) > MOST_BYTES * kept.numel():
        return "hardly sparse"
    if _is_24(kept):
        return "its whole weight is 2:4"
    if backends()["linear_tiered"].get(layer.weight.device.type, "reference") == "reference":
        return f"no compiled tiered kernel for {layer.weight.device.type}"
    block, k = tier_sizes(layer)
    try:
        pack_tiered(layer.weight.detach()[:0], block=block, k=k)
    except ValueError as error:
        return str(error)
    if (share := Tiers.of(layer).bytes_of_dense(layer.weight.itemsize)) > MOST_BYTES:
        return f"its blocks take {share:.0%} of the dense bytes"
    return None


def _unsupported_prepacked(layer: nn.Linear) -> str | None:
    if layer.weight.device.type != "cpu":
        return f"oneDNN has nothing for {layer.weight.device.type}"
    if layer.training and layer.weight.requires_grad:
        return "it cannot be trained, and the layer is in training mode: call model.eval() first"
    return None if _can_prepack(layer.weight.dtype) else f"oneDNN has nothing for {layer.weight.dtype} on this CPU"


@cache
def _can_prepack(dtype: torch.dtype) -> bool:
    return prepack(torch.zeros(16, 16, dtype=dtype, device="cpu"), 1).is_mkldnn


def _bytes_24(layer: nn.Linear) -> int:
    rows, cols = reversed(layer.weight.shape) if is_transposed(layer) else layer.weight.shape
    return rows * (values_per_row(cols) * layer.weight.itemsize + -(-cols // 8))


def _bytes_tiered(layer: nn.Linear) -> int:
    return round(Tiers.of(layer).bytes_of_dense(layer.weight.itemsize) * layer.weight.nbytes)


def _routed(kind: Any) -> Callable[[nn.Linear, int, bool, Routes], Compressed]:
    def build(layer: nn.Linear, tokens: int, transposed: bool, routes: Routes) -> Compressed:
        module: DenseRoute = kind.from_linear(layer, transposed=transposed)
        return module.follow(routes, tokens)

    return build


CANDIDATES = (
    Candidate(
        name="2:4",
        dense=False,
        unsupported_reason=_unsupported_24,
        nbytes=_bytes_24,
        build=lambda layer, tokens, transposed: Linear24.from_linear(layer, transposed=transposed),
        build_routed=_routed(Linear24WithDense),
    ),
    Candidate(
        name="tiered",
        dense=False,
        unsupported_reason=unsupported_tiered,
        nbytes=_bytes_tiered,
        build=lambda layer, tokens, transposed: TieredLinear.from_linear(layer, transposed=transposed),
        build_routed=_routed(TieredLinearWithDense),
    ),
    Candidate(
        name="prepacked",
        dense=True,
        unsupported_reason=_unsupported_prepacked,
        nbytes=lambda layer: layer.weight.nbytes,
        build=lambda layer, tokens, transposed: PrepackedLinear.from_linear(
            layer, tokens=tokens, transposed=transposed
        ),
    ),
)
