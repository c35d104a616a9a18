"""The 2:4 linear layer on a GPU: the kernel that was measured fastest for each number of tokens."""

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
from .linear24 import LINEAR24, Linear24
from .shared import Stamp, autocast_dtype, has_changed, stamp_of

HARDWARE = torch.ops.sparsekit.hardware_linear24.default


class Route(NamedTuple):
    """What multiplies calls of up to ``max_tokens`` tokens.

    Args:
        max_tokens: the last route of a plan takes any number of them.
        kernel: the op ``"linear24"``; ``"hardware"``, which is the op ``hardware_linear24``; or ``"dense"``, which is
            ``F.linear`` with a dense copy of the weight.
        alg_id, split_k, split_k_mode: for ``hardware_linear24``.
    """

    max_tokens: int
    kernel: Literal["linear24", "hardware", "dense"]
    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


@dataclass(frozen=True)
class Plan:
    """How a layer multiplies, as it was measured: on one model of GPU, in one dtype.

    Args:
        device: the model, as ``ops.layouts.device_name`` gives it.
        dtype: the dtype of the weight.
        layout: the layout of ``hardware_layouts`` that the weight is packed in; None where no route needs one.
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
    """A ``Linear24`` that multiplies by a plan: other kernels for other numbers of tokens.

    The state dict is that of ``Linear24``. On the device and in the dtype of its plan the layer holds ``hardware``, the
    weight as the GPU's tensor cores read it. ``values`` is a view of its head, so they are stored once; beside it is
    the ``bitmask``, 1/16 of the dense 16-bit weight. Loading, copying and moving rebuild it from these two; loading, in
    the same memory, so that a captured CUDA graph goes on with the new weight. Elsewhere, where autocast asks for
    another dtype, and where gradients reach ``values``, the layer is a plain ``Linear24``.

    A plan with dense routes keeps a dense copy of the weight, which would not follow an optimizer: ``values`` gets no
    gradient then, and a call in training mode that would need it raises.
    """

    plan: Plan | None = None
    hardware: Tensor | None = None
    dense: Tensor | None = None
    layout = ""  # that ``hardware`` has
    device_type = ""
    stamp: Stamp = ()  # of the weight that was packed
    called = "a Linear24 with a dense copy"
    ready = False  # whether the plan is followed

    def follow(self, plan: Plan) -> "RoutedLinear24":
        """Multiplies by ``plan`` from now on; returns the layer itself."""
        trainable = self.trainable
        self.plan, self.frozen = plan, trainable and plan.keeps_dense
        self.values.requires_grad_(trainable and not self.frozen)
        self._pack()
        return self

    @property
    def trainable(self) -> bool:
        return self.frozen or self.values.requires_grad

    @property
    def on_plan(self) -> bool:
        """Whether the layer is where and what its plan was measured for."""
        plan, values = self.plan, self.values
        return plan is not None and plan.dtype == values.dtype and plan.device == device_name(values.device)

    @torch.inference_mode(False)  # what is made there could not be used outside
    @torch.no_grad()
    def _pack(self) -> None:
        hardware, dense = self.hardware, self.dense
        self.hardware = self.dense = None
        self.ready = self.on_plan
        if self.plan is None or not self.ready:
            return
        self.device_type = self.values.device.type
        if self.plan.layout is not None:
            self.layout = self.plan.layout
            new = pack_hardware24(self.packed._replace(values=self.values.detach()), self.layout)
            self.hardware = _kept(hardware, new)
            rows, cols = padded_shape(self.out_features, self.in_features, self.layout)
            head = self.hardware[: rows * cols // 2].view(rows, cols // 2)
            self.values.data = head[: self.out_features, : self.values.shape[1]]
        if self.plan.keeps_dense:
            self.dense = _kept(dense, self._dense())
        self.stamp = stamp_of(self.values)

    # On a GPU a small call waits for the host, to which `nn.Linear` costs 3 us: what is read here comes from
    # dictionaries, and what linear24 and hardware_linear24 check of a weight was checked when it was packed.
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
            return self._multiply_elsewhere(input)
        return self._route(plan, input)

    def _multiply_elsewhere(self, input: Tensor) -> Tensor:
        """The same with gradients, under autocast, or off the plan."""
        self._check_training()
        dtype = autocast_dtype(input) or input.dtype
        trained = self.values.requires_grad and torch.is_grad_enabled()
        if self.plan is None or not self.ready or trained or dtype != self.plan.dtype or is_jit_tracing():
            return super()._multiply(input)
        return self._route(self.plan, input.to(dtype))

    def _route(self, plan: Plan, x: Tensor) -> Tensor:
        shape = x.shape
        if shape[-1:] != (self.in_features,) or self.in_features == 0:
            return super()._multiply(x)  # which rejects it: padded, it might fit
        tokens = x.numel() // self.in_features
        for route in plan.routes:
            if tokens <= route.max_tokens:
                break
        return self.run(route, x)

    def run(self, route: Route, x: Tensor) -> Tensor:
        """Multiplies by one route, whatever the number of tokens; ``x`` is of the weight's dtype and columns."""
        parameters = self._parameters
        bias: Tensor | None = parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        kernel, values = route.kernel, parameters["values"]
        if not torch.compiler.is_compiling() and values is not self.stamp[0][0]:
            kernel = "linear24"  # the weight is another for this call, as functional_call makes it
        if kernel == "dense" and self.dense is not None:
            if has_changed(self.stamp, self.values):
                self._pack()
            return F.linear(x, self.dense, bias)
        if kernel == "hardware" and self.hardware is not None:
            _, _, alg_id, split_k, mode = route
            return call_op(HARDWARE, x, self.hardware, bias, self.out_features, self.layout, alg_id, split_k, mode)
        return call_op(LINEAR24, x, values, self._buffers["bitmask"], bias)

    # Which copies parameters and buffers to another GPU, but no other tensor.
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

    # Copied or pickled, ``values`` is no longer the head of ``hardware``.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hardware": None, "dense": None, "stamp": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def extra_repr(self) -> str:
        routes = self.plan.routes if self.plan is not None and self.ready else (Route(1, "linear24"),)
        return f"{super().extra_repr()}, kernels={'/'.join(dict.fromkeys(route.kernel for route in routes))}"


def _kept(old: Tensor | None, new: Tensor) -> Tensor:
    """What ``new`` holds, in the memory of ``old`` where it fits: there a captured CUDA graph reads it."""
    if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)
