"""The forms that a layer can take, and why it cannot take one."""

from collections.abc import Collection, Mapping
from functools import cache
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._layers import is_transposed
from .._timing import Call, Clock
from ..masks import get_mask, lost_zeros_reason, tier_sizes
from ..nn import (
    ArrangedLinear24,
    Compressed,
    Linear24,
    Plan,
    PrepackedLinear,
    Route,
    RoutedLinear24,
    RoutedTieredLinear,
    TieredLinear,
)
from ..ops import backends, pack_tiered
from ..ops.arranged24 import LAYOUTS, Layout
from ..ops.prepacked import prepack
from ..ops.sparse24 import values_per_row
from .kinds import Kind, matrix_shape
from .tiers import TierShares, kept_matrix

DENSE_COPY = "dense"  # the kernel that multiplies by a dense copy beside a sparse weight
# Tokens: where the largest count is beyond, the other layout is faster, so measuring this one would only take time.
MAX_INPUT_PAIRS, MIN_ROW_PAIRS = 64, 16
EXTRA_BITS = {"input pairs": 3, "row pairs": 5}  # for each weight; in row pairs about, as two rows share offsets
MAX_SHARE = 0.9  # of the dense bytes; a layer in tiers that takes more is not worth measuring


class Candidate:
    """A form that a layer could take, with the kernels that multiply by it; a subclass for each form.

    A kernel has a name, under which its times are kept and reported. Most candidates have a single one, of their own
    name, and a sparse one may have a dense copy beside it, whose kernel is ``"dense"``.
    """

    name: str  # in reports
    pattern: ClassVar[str] = ""  # of the zeros that it leaves out: "2:4", "tiers" or, where it computes with all, none
    allows_copy: ClassVar[bool] = False  # whether a dense copy may lie beside it

    @property
    def dense(self) -> bool:
        """Whether it computes with the whole weight, zeros included."""
        return not self.pattern

    def unsupported_reason(self, layer: Any) -> str | None:
        """Returns why a layer cannot take this form, or is not worth measuring in it; None where it is."""
        raise NotImplementedError

    def nbytes(self, layer: Any) -> int:
        """Returns the bytes of a layer's weight in this form."""
        raise NotImplementedError

    def build(self, layer: Any, kernels: Mapping[Any, str]) -> Compressed:
        """Returns the module that takes a layer's place.

        Args:
            layer: the plain layer.
            kernels: the kernel for each size of the input. The last one answers larger token counts as well.
        """
        raise NotImplementedError

    def routes(self, kernels: Mapping[Any, str]) -> tuple[Route, ...]:
        """Returns the routes by rising token count, with neighbors of one kernel joined."""
        groups = groupby(sorted(kernels.items()), key=lambda item: item[1])
        return tuple(self.route(max(group)[0], kernel) for kernel, group in groups)

    def route(self, tokens: int, kernel: str) -> Route:
        """Returns the route of one kernel."""
        return Route(tokens, "dense" if kernel == DENSE_COPY else "sparse")

    def calls(self, kind: Kind, plain: Any, x: Tensor, clock: Clock) -> dict[str, Call | None]:
        """Returns what is to be timed on an input, by the name of the kernel; None for one that is wrong.

        Args:
            kind: what is measured.
            plain: a layer of that kind.
            x: ``[tokens, in_features]``, or images.
            clock: times a call, for candidates that choose among many kernels.
        """
        names = [self.name, DENSE_COPY] if kind.keep_dense and self.allows_copy else [self.name]
        return {name: self.build(plain, {kind.layout_size: name}) for name in names}

    def kernel_sets(self, layer: Any, measured: Collection[str]) -> list[frozenset[str]]:
        """Returns the sets of sparse kernels, among those that were measured, that one module can hold together."""
        return [frozenset({self.name})]

    def can_add_copy(self, kernels: Collection[str]) -> bool:
        """Returns whether a dense copy may lie beside the weight that these kernels read."""
        return self.allows_copy

    def extra_bytes(self, layer: Any, kernels: Collection[str]) -> int:
        """Returns how many bytes more than ``nbytes`` a layer takes for these kernels, such as those of a copy."""
        return layer.weight.nbytes if DENSE_COPY in kernels else 0

    def remark(self, layer: Any) -> str:
        """Returns what there is to say about kernels that a layer cannot have; empty if there is nothing."""
        return ""


class Sparse24(Candidate):
    """The 2:4 form on a CPU: as it is stored or, for inference, arranged for few tokens or for many.

    A layer holds its weight once, in one layout. A dense copy is possible beside the weight as it is stored.
    """

    name = "2:4"
    pattern = "2:4"
    allows_copy = True
    layouts: ClassVar[dict[str, Layout]] = {f"2:4 {layout}": layout for layout in LAYOUTS}  # by the kernel's name

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        if layer.weight.device.type != "cpu":
            return f"no 2:4 kernel for {layer.weight.device.type}"
        if backends()["linear24"]["cpu"] == "reference":
            return "no compiled 2:4 kernel"
        return not_24_reason(layer)

    def nbytes(self, layer: nn.Linear) -> int:
        return bytes_24(layer)

    def extra_bytes(self, layer: nn.Linear, kernels: Collection[str]) -> int:
        """Returns the bytes of a copy, or what a layout takes more: offsets of inputs in place of the bits."""
        more = [EXTRA_BITS[self.layouts[name]] * layer.weight.numel() // 8 for name in self._arranged(kernels)]
        return super().extra_bytes(layer, kernels) + max(more, default=0)

    def calls(self, kind: Kind, plain: nn.Linear, x: Tensor, clock: Clock) -> dict[str, Call | None]:
        """Returns the kernel of the form as it is stored, and those of the layouts that suit the most tokens."""
        found, tokens = super().calls(kind, plain, x, clock), kind.layout_size
        assert isinstance(tokens, int)
        if kind.trained:  # an arranged weight cannot follow an optimizer
            return found
        suits = {"input pairs": tokens <= MAX_INPUT_PAIRS, "row pairs": tokens >= MIN_ROW_PAIRS}
        names = [name for name, layout in self.layouts.items() if suits[layout]]
        return {**found, **{name: self.build(plain, {tokens: name}) for name in names}}

    def kernel_sets(self, layer: nn.Linear, measured: Collection[str]) -> list[frozenset[str]]:
        return [frozenset({name}) for name in (self.name, *self._arranged(measured))]

    def can_add_copy(self, kernels: Collection[str]) -> bool:
        return not self._arranged(kernels)

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        transposed = is_transposed(layer)
        for name in self._arranged(kernels.values()):
            return ArrangedLinear24.from_linear(layer, layout=self.layouts[name], transposed=transposed)
        if DENSE_COPY not in kernels.values():
            return Linear24.from_linear(layer, transposed=transposed)
        return RoutedLinear24.from_linear(layer, transposed=transposed).follow(Plan(self.routes(kernels)))

    def _arranged(self, kernels: Collection[str]) -> list[str]:
        """Returns those of some kernels that read an arranged weight."""
        return [name for name in self.layouts if name in kernels]


class Tiered(Candidate):
    """The form in tiers: every block of the weight is dense, 2:4 or top-k."""

    name = "tiered"
    pattern = "tiers"
    allows_copy = True

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        if reason := lost_zeros_reason(layer):
            return reason
        kept = kept_matrix(layer)
        if int(kept.count_nonzero()) > MAX_SHARE * kept.numel():
            return "hardly sparse"
        if _is_24(kept):
            return "its whole weight is 2:4"
        device = layer.weight.device.type
        if backends()["linear_tiered"].get(device, "reference") == "reference":
            return f"no compiled tiered kernel for {device}"
        block, k = tier_sizes(layer)
        try:
            pack_tiered(layer.weight.detach()[:0], block=block, k=k)
        except ValueError as error:
            return str(error)
        share = TierShares.of(layer).bytes_of_dense(layer.weight.itemsize)
        return f"its blocks take {share:.0%} of the dense bytes" if share > MAX_SHARE else None

    def nbytes(self, layer: nn.Linear) -> int:
        return round(TierShares.of(layer).bytes_of_dense(layer.weight.itemsize) * layer.weight.nbytes)

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        transposed = is_transposed(layer)
        if DENSE_COPY not in kernels.values():
            return TieredLinear.from_linear(layer, transposed=transposed)
        return RoutedTieredLinear.from_linear(layer, transposed=transposed).follow(Plan(self.routes(kernels)))


class Prepacked(Candidate):
    """The dense form that oneDNN has reordered."""

    name = "prepacked"

    def unsupported_reason(self, layer: nn.Linear) -> str | None:
        weight = layer.weight
        if weight.device.type != "cpu":
            return f"oneDNN has nothing for {weight.device.type}"
        if reason := inference_only_reason(layer):
            return reason
        return None if _can_prepack(weight.dtype) else f"oneDNN has nothing for {weight.dtype} on this CPU"

    def nbytes(self, layer: nn.Linear) -> int:
        return layer.weight.nbytes

    def build(self, layer: nn.Linear, kernels: Mapping[Any, str]) -> Compressed:
        return PrepackedLinear.from_linear(layer, tokens=max(kernels), transposed=is_transposed(layer))


CPU_CANDIDATES = (Sparse24(), Tiered(), Prepacked())


def not_24_reason(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Returns why a layer's weight cannot be stored as 2:4, or None where it can."""
    if reason := lost_zeros_reason(layer):
        return reason
    kept = kept_matrix(layer)
    if kept.shape[1] < 4:
        return f"{kept.shape[1]} inputs are less than a group of four"
    if get_mask(layer) is None and not kept.any():  # as LoRA's begins: in training all of it has to move
        return "all zeros, and has no mask that says so"
    return None if _is_24(kept) else "not 2:4"


def inference_only_reason(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Returns why a layer cannot take a form that is for inference only, or None where it can."""
    if layer.training and layer.weight.requires_grad:
        return "it cannot be trained, and the layer is in training mode: call model.eval() first"
    return None


def no_dense_copy_reason(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Returns why a layer cannot hold a dense copy beside its sparse weight, or None where it can."""
    if layer.training and layer.weight.requires_grad:
        return "with a dense copy it cannot be trained, and it is in training mode: call model.eval() first"
    return None


def bytes_24(layer: nn.Linear | nn.Conv2d) -> int:
    """Returns the bytes of a layer's weight as 2:4 values and bits."""
    shape = tuple(layer.weight.shape)
    rows, cols = matrix_shape(shape[::-1] if is_transposed(layer) else shape)
    return rows * (values_per_row(cols) * layer.weight.itemsize + -(-cols // 8))


def _is_24(kept: Tensor) -> bool:
    full = kept.shape[1] // 4 * 4
    return bool((kept[:, :full].reshape(kept.shape[0], -1, 4).sum(-1) <= 2).all())


@cache
def _can_prepack(dtype: torch.dtype) -> bool:
    return prepack(torch.zeros(16, 16, dtype=dtype, device="cpu"), 1).is_mkldnn
