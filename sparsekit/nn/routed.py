"""Sparse layers that multiply different numbers of tokens by different kernels, and may hold a dense copy for some."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import is_jit_tracing
from ..ops.layouts import device_name
from ..ops.prepacked import prepack, prepacked_linear
from .common import Stamp, are_same, autocast_dtype, stamp_of
from .compressed_linear import CompressedLinear
from .tiered import TieredLinear

Layer = TypeVar("Layer", bound="Routed")


class Route(NamedTuple):
    """The kernel that multiplies up to a number of tokens.

    Args:
        max_tokens: the most tokens that it multiplies; the last route of a plan takes any number.
        kernel: ``"sparse"``, the op of the sparse layer; ``"dense"``, a product with a dense copy of the weight; or in
            a ``RoutedLinear24`` also ``"hardware"``, the op ``hardware_linear24``.
        alg_id, split_k, split_k_mode: arguments of ``hardware_linear24``.
    """

    max_tokens: int
    kernel: Literal["sparse", "dense", "hardware"]
    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True)
class Plan:
    """The routes of a layer, and what they were measured for.

    Args:
        routes: by rising ``max_tokens``. On a CPU, oneDNN lays a dense copy out for the ``max_tokens`` of the last one.
        device: the model of GPU, as ``ops.layouts.device_name`` returns it; None if the plan holds on every device.
        dtype: the dtype of the weight; None if the plan holds for every dtype.
        layout: the layout of ``hardware_layouts`` that the weight is packed in; None if no route needs one.

    Raises:
        ValueError: there is no route, or a route needs a layout and there is none.
    """

    routes: tuple[Route, ...]
    device: str | None = None
    dtype: torch.dtype | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("routes must hold at least one route, got none")
        if self.layout is None and any(route.kernel == "hardware" for route in self.routes):
            raise ValueError("layout must name the layout that the hardware routes read, got None")

    @property
    def keeps_dense(self) -> bool:
        """Whether a route needs a dense copy of the weight."""
        return any(route.kernel == "dense" for route in self.routes)

    def fits(self, weight: Tensor) -> bool:
        """Returns whether the plan holds for the device and the dtype of a weight."""
        return self.dtype in (None, weight.dtype) and self.device in (None, device_name(weight.device))


class Routed(CompressedLinear):
    """A mixin for sparse layers, which multiplies different numbers of tokens by different kernels, as its plan says.

    The state dict is that of the sparse layer. The layer multiplies as the sparse layer does if the plan does not hold
    for its device or dtype, also that of autocast; if gradients reach the weight; in ``torch.jit.trace``; and if
    another weight takes the place of its own, as in ``torch.func.functional_call``.

    If a route is dense, the layer stores a dense copy of the weight, which oneDNN reorders on a CPU if it can. The copy
    is made again when the layer is loaded, copied or moved, and when anything else writes to the weight, such as an
    average of weights; only a write through ``.data`` goes unnoticed, and in a graph that ``torch.compile`` has made,
    to which the copy is a constant, any write or replacement. Loading makes it in the same memory, so that a captured
    CUDA graph computes with the new weight. To make the copy at every step of an optimizer would cost too much, so the
    weight gets no gradient, and a call in training mode that would need one raises. In a transform of ``torch.func``
    the sparse kernel takes the dense routes.
    """

    plan: Plan | None = None
    ready_for: torch.dtype | None = None  # the dtype that the plan multiplies; None if it does not hold for the layer
    copy: Tensor | None = None
    reordered = False  # whether oneDNN reordered the copy; read once, because a traced tensor does not tell
    packed_weights: Sequence[Tensor] = ()  # the tensors of the sparse weight that were packed
    stamp: Stamp = ()  # of these when they were packed

    def follow(self: Layer, plan: Plan) -> Layer:
        """Packs the weight for ``plan``, by which the layer multiplies from then on; returns the layer itself."""
        trainable = self.trainable
        self.plan, self.frozen = plan, trainable and plan.keeps_dense
        for weight in self._weights():
            weight.requires_grad_(trainable and not self.frozen)
        self._prepare()
        return self

    @property
    def trainable(self) -> bool:
        return self.frozen or super().trainable

    def resident_tensors(self) -> list[Tensor]:
        """Returns the tensors of the sparse weight, and its dense copy."""
        return [*super().resident_tensors(), *([] if self.copy is None else [self.copy])]

    def _weights(self) -> list[nn.Parameter]:
        return [weight for name, weight in self._parameters.items() if name != "bias" and weight is not None]

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def _prepare(self) -> None:
        """Makes the copy and whatever else the plan needs of the weight."""
        old, weight, weights = self.copy, self._parts()[0], self._weights()
        self.copy = self.ready_for = None
        if self.plan is None or not self.plan.fits(weight) or not weights:
            return
        if self.plan.keeps_dense:
            self.copy = in_memory_of(old, prepack(self._dense(), self.plan.routes[-1].max_tokens))
            self.reordered = self.copy.is_mkldnn
        self.packed_weights, self.stamp, self.ready_for = weights, stamp_of(weights), weight.dtype

    # A small call on a GPU takes as long as the host needs to start it, which is 3 us for `nn.Linear`. So this and
    # `run` look up as little as they can.
    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        route = self._route(input) if input.dtype == self.ready_for else None
        if route is None or self._is_sparse(route):
            return super()._multiply_directly(input)
        return self.run(route, input)

    def _needs_gradient(self) -> bool:
        """Returns whether gradients reach the weight; raises RuntimeError if they should and cannot."""
        if self.frozen and self.training:
            self._check_training()
        for name, parameter in self._parameters.items():
            if name != "bias" and parameter is not None and parameter.requires_grad:
                return True
        return False

    def _multiply(self, input: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and self._needs_gradient()
        dtype = autocast_dtype(input) or input.dtype
        if trained or dtype != self.ready_for or is_jit_tracing():
            return super()._multiply(input)
        x = input.to(dtype)
        route = self._route(x)
        return super()._multiply(x) if route is None else self.run(route, x)  # which rejects a wrong shape

    def _route(self, x: Tensor) -> Route | None:
        """Returns the route of the plan for the tokens of ``x``; None without a plan, or for a wrong shape."""
        plan, in_features = self.plan, self.in_features
        if plan is None or x.shape[-1:] != (in_features,) or in_features == 0:
            return None  # a wrong shape might fit a padded weight
        tokens = x.numel() // in_features
        for route in plan.routes:
            if tokens <= route.max_tokens:
                break
        return route

    def _is_sparse(self, route: Route) -> bool:
        """Returns whether a route multiplies as the sparse layer does."""
        return route.kernel == "sparse"

    def run(self, route: Route, x: Tensor) -> Tensor:
        """Multiplies ``x``, which has the weight's dtype and columns, by the kernel of one route.

        The number of tokens may be larger than that of the route.
        """
        if route.kernel == "dense" and self._has_right_copy() and (copy := self.copy) is not None:
            parameters = self._parameters
            bias: Tensor | None = parameters["bias"] if "bias" in parameters else self.bias
            if bias is not None and bias.dtype != x.dtype:
                bias = bias.to(x.dtype)
            return prepacked_linear(x, copy, bias) if self.reordered else F.linear(x, copy, bias)
        return super()._multiply(x)

    def _has_right_copy(self) -> bool:
        """Returns whether the dense copy may answer a call, after making it again if the weight was written to."""
        if torch.compiler.is_compiling():
            return True  # a compiled graph treats the copy as a constant
        weights = self._weights()
        if torch._C._are_functorch_transforms_active() or not are_same(weights, self.packed_weights):
            return False
        if self.stamp != stamp_of(weights):
            self._prepare()
        return True

    # DataParallel copies parameters and buffers to another GPU, but not what was packed.
    def _replicate_for_data_parallel(self: Layer) -> Layer:
        replica = super()._replicate_for_data_parallel()
        replica.copy = replica.ready_for = None
        return replica

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        before = [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]
        super()._apply(fn, recurse)
        if before != [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]:
            self._prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare()

    # A tensor that oneDNN has reordered can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copy": None, "packed_weights": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def extra_repr(self) -> str:
        routes = self.plan.routes if self.plan is not None and self.ready_for is not None else (Route(1, "sparse"),)
        ranges = [f"{route.kernel} to {route.max_tokens}" for route in routes[:-1]]
        ranges.append(f"then {routes[-1].kernel}" if ranges else routes[-1].kernel)
        return f"{super().extra_repr()}, routes=({', '.join(ranges)})"


class RoutedTieredLinear(Routed, TieredLinear):
    """A ``TieredLinear`` that multiplies the numbers of tokens that its plan says by a dense copy of its weight."""

    name_in_errors = "a TieredLinear with a dense copy"


def in_memory_of(old: Tensor | None, new: Tensor) -> Tensor:
    """Copies ``new`` into ``old``, which a captured CUDA graph reads, and returns it; returns ``new`` if it cannot."""
    if old is None or old.is_mkldnn or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
