"""The 2:4 linear layer for GPUs, which runs the kernel that was measured fastest for each number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import pack_hardware24
from ..ops._define import call_op, is_jit_tracing
from ..ops.hardware_linear24 import padded_shape
from ..ops.layouts import device_name
from .common import Stamp, autocast_dtype, has_changed, stamp_of
from .linear24 import LINEAR24, Linear24

HARDWARE = torch.ops.sparsekit.hardware_linear24.default


class Route(NamedTuple):
    """The kernel that multiplies up to a number of tokens.

    Args:
        max_tokens: the most tokens that it multiplies; the last route of a plan takes any number.
        kernel: ``"linear24"``, the op of this name; ``"hardware"``, the op ``hardware_linear24``; or ``"dense"``,
            ``F.linear`` with a dense copy of the weight.
        alg_id, split_k, split_k_mode: arguments of ``hardware_linear24``.
    """

    max_tokens: int
    kernel: Literal["linear24", "hardware", "dense"]
    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True)
class Plan:
    """The routes of a layer, which were measured on one model of GPU in one dtype.

    Args:
        device: the model of GPU, as ``ops.layouts.device_name`` returns it.
        dtype: the dtype of the weight.
        layout: the layout of ``hardware_layouts`` that the weight is packed in; None if no route needs one.
        routes: by rising ``max_tokens``.
    """

    device: str
    dtype: torch.dtype
    layout: str | None
    routes: tuple[Route, ...]

    @property
    def keeps_dense(self) -> bool:
        """Whether a route needs a dense copy of the weight."""
        return any(route.kernel == "dense" for route in self.routes)


class RoutedLinear24(Linear24):
    """A ``Linear24`` that multiplies different numbers of tokens by different kernels, as its plan says.

    The state dict is that of ``Linear24``. On the device and in the dtype of its plan, the layer stores ``hardware``,
    the weight in the layout that the GPU's tensor cores read. ``values`` is a view of the beginning of ``hardware``, so
    the values are stored once; the ``bitmask`` beside them takes 1/16 of the bytes of the dense 16-bit weight. Loading,
    copying and moving make ``hardware`` again from these two. Loading does so in the same memory, so that a captured
    CUDA graph computes with the new weight. On another device, in another dtype, also that of autocast, and if
    gradients reach ``values``, the layer multiplies as a plain ``Linear24`` does.

    If a route is dense, the layer also stores a dense copy of the weight. Making it at every step of an optimizer would
    cost too much, so ``values`` gets no gradient, and a call in training mode that would need one raises.
    """

    plan: Plan | None = None
    hardware: Tensor | None = None
    dense: Tensor | None = None
    layout = ""  # the layout of ``hardware``
    device_type = ""
    stamp: Stamp = ()  # of ``values`` when it was packed
    name_in_errors = "a Linear24 with a dense copy"
    ready = False  # whether the layer is packed for its plan

    def follow(self, plan: Plan) -> "RoutedLinear24":
        """Packs the weight for ``plan``, by which the layer multiplies from then on; returns the layer itself."""
        trainable = self.trainable
        self.plan, self.frozen = plan, trainable and plan.keeps_dense
        self.values.requires_grad_(trainable and not self.frozen)
        self._pack()
        return self

    @property
    def trainable(self) -> bool:
        return self.frozen or self.values.requires_grad

    @property
    def matches_plan(self) -> bool:
        """Whether the layer has the device and the dtype of its plan."""
        plan, values = self.plan, self.values
        return plan is not None and plan.dtype == values.dtype and plan.device == device_name(values.device)

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def _pack(self) -> None:
        hardware, dense = self.hardware, self.dense
        self.hardware = self.dense = None
        self.ready = self.matches_plan
        if self.plan is None or not self.ready:
            return
        self.device_type = self.values.device.type
        if self.plan.layout is not None:
            self.layout = self.plan.layout
            new = pack_hardware24(self.packed._replace(values=self.values.detach()), self.layout)
            self.hardware = _in_memory_of(hardware, new)
            rows, cols = padded_shape(self.out_features, self.in_features, self.layout)
            head = self.hardware[: rows * cols // 2].view(rows, cols // 2)
            self.values.data = head[: self.out_features, : self.values.shape[1]]
        if self.plan.keeps_dense:
            self.dense = _in_memory_of(dense, self._dense())
        self.stamp = stamp_of(self.values)

    # A small call on a GPU takes as long as the host needs to start it, which is 3 us for `nn.Linear`. So `run` reads
    # parameters from their dictionary, and calls the ops without checking the weight, which was checked when packed.
    def _multiply(self, input: Tensor) -> Tensor:
        plan = self.plan
        if (
            plan is None
            or not self.ready
            or input.dtype != plan.dtype
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(self.device_type)
            or is_jit_tracing()
        ):
            return self._multiply_slow_path(input)
        return self._multiply_by_plan(plan, input)

    def _multiply_slow_path(self, input: Tensor) -> Tensor:
        """Multiplies with gradients, under autocast, in a trace, or on a device or in a dtype without a plan."""
        self._check_training()
        dtype = autocast_dtype(input) or input.dtype
        trained = self.values.requires_grad and torch.is_grad_enabled()
        if self.plan is None or not self.ready or trained or dtype != self.plan.dtype or is_jit_tracing():
            return super()._multiply(input)
        return self._multiply_by_plan(self.plan, input.to(dtype))

    def _multiply_by_plan(self, plan: Plan, x: Tensor) -> Tensor:
        shape = x.shape
        if shape[-1:] != (self.in_features,) or self.in_features == 0:
            return super()._multiply(x)  # rejects a wrong shape, which might fit the padded weight of ``hardware``
        tokens = x.numel() // self.in_features
        for route in plan.routes:
            if tokens <= route.max_tokens:
                break
        return self.run(route, x)

    def run(self, route: Route, x: Tensor) -> Tensor:
        """Multiplies ``x``, which has the weight's dtype and columns, by the kernel of one route.

        The number of tokens may be larger than that of the route.
        """
        parameters = self._parameters
        bias: Tensor | None = parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        kernel, values = route.kernel, parameters["values"]
        if not torch.compiler.is_compiling() and values is not self.stamp[0][0]:
            kernel = "linear24"  # functional_call has put another weight in place of the packed one for this call
        if kernel == "dense" and self.dense is not None:
            if has_changed(self.stamp, self.values):
                self._pack()
            return F.linear(x, self.dense, bias)
        if kernel == "hardware" and self.hardware is not None:
            _, _, alg_id, split_k, mode = route
            return call_op(HARDWARE, x, self.hardware, bias, self.out_features, self.layout, alg_id, split_k, mode)
        return call_op(LINEAR24, x, values, self._buffers["bitmask"], bias)

    def resident_tensors(self) -> list[Tensor]:
        """Returns ``hardware``, or ``values`` where there is none; the bits; and the dense copy."""
        tensors = super().resident_tensors()
        if self.hardware is not None:
            tensors = [self.hardware, *(tensor for tensor in tensors if tensor is not self.values)]
        return tensors if self.dense is None else [*tensors, self.dense]

    # DataParallel copies parameters and buffers to another GPU, but not these tensors.
    def _replicate_for_data_parallel(self) -> "RoutedLinear24":
        replica = super()._replicate_for_data_parallel()
        replica.hardware, replica.dense, replica.ready = None, None, False
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedLinear24":
        before = self.values.data_ptr(), self.values.dtype, self.values.device
        super()._apply(fn, recurse)
        if before != (self.values.data_ptr(), self.values.dtype, self.values.device):
            self._pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    # ``hardware`` is made again, because the ``values`` of a copy would not be a view of its ``hardware``.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hardware": None, "dense": None, "stamp": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def extra_repr(self) -> str:
        routes = self.plan.routes if self.plan is not None and self.ready else (Route(1, "linear24"),)
        return f"{super().extra_repr()}, kernels={'/'.join(dict.fromkeys(route.kernel for route in routes))}"


def _in_memory_of(old: Tensor | None, new: Tensor) -> Tensor:
    """Copies ``new`` into ``old``, which a captured CUDA graph reads, and returns it; returns ``new`` if it differs."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
