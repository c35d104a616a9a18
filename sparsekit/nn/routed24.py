"""The 2:4 linear layer that multiplies different numbers of tokens by different kernels."""

from typing import Any

import torch
from torch import Tensor

from ..ops import pack_hardware24
from ..ops._define import call_op
from ..ops.hardware_linear24 import padded_shape
from .linear24 import LINEAR24, Linear24
from .routed import Route, Routed, in_memory_of

HARDWARE = torch.ops.sparsekit.hardware_linear24.default


class RoutedLinear24(Routed, Linear24):
    """A ``Linear24`` that multiplies different numbers of tokens by different kernels, as its plan says.

    If the plan has a layout, the layer stores ``hardware``, the weight in the layout that the GPU's tensor cores read.
    ``values`` is a view of the beginning of ``hardware``, so the values are stored once; the ``bitmask`` beside them
    takes 1/16 of the bytes of the dense 16-bit weight. Loading, copying and moving make ``hardware`` again from these
    two, and loading does so in the same memory, as for a dense copy.
    """

    hardware: Tensor | None = None
    layout = ""  # the layout of ``hardware``
    on_gpu = False  # whether the plan is for one model of GPU
    name_in_errors = "a Linear24 with a dense copy"

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def _prepare(self) -> None:
        old, self.hardware, self.ready_for = self.hardware, None, None  # nothing half packed is ever multiplied by
        plan = self.plan
        self.on_gpu = plan is not None and plan.device is not None
        if plan is not None and plan.layout is not None and plan.fits(self.values):
            self.layout = plan.layout
            new = pack_hardware24(self.packed._replace(values=self.values.detach()), self.layout)
            self.hardware = in_memory_of(old, new)
            rows, cols = padded_shape(self.out_features, self.in_features, self.layout)
            head = self.hardware[: rows * cols // 2].view(rows, cols // 2)
            self.values.data = head[: self.out_features, : self.values.shape[1]]
        super()._prepare()

    def _is_sparse(self, route: Route) -> bool:
        return route.kernel == "sparse" and not self.on_gpu

    # To start a kernel on a GPU sooner, this reads parameters from their dictionary, and calls the ops without checking
    # the weight, which was checked when it was packed.
    def run(self, route: Route, x: Tensor) -> Tensor:
        kernel = route.kernel
        if kernel == "dense" or self._is_sparse(route):
            return super().run(route, x)
        parameters = self._parameters
        values = parameters["values"] if "values" in parameters else None
        if not torch.compiler.is_compiling() and values is not self.packed_weights[0]:
            return Linear24._multiply(self, x)  # functional_call has put another weight in place for this call
        bias: Tensor | None = parameters["bias"] if "bias" in parameters else self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if kernel == "hardware" and (hardware := self.hardware) is not None:
            _, _, alg_id, split_k, mode = route
            return call_op(HARDWARE, x, hardware, bias, self.out_features, self.layout, alg_id, split_k, mode)
        return call_op(LINEAR24, x, values, self._buffers["bitmask"], bias)

    def resident_tensors(self) -> list[Tensor]:
        """Returns ``hardware``, or ``values`` where there is none; the bits; and the dense copy."""
        tensors = super().resident_tensors()
        if self.hardware is None:
            return tensors
        return [self.hardware, *(tensor for tensor in tensors if tensor is not self.values)]

    # ``hardware`` is made again, because the ``values`` of a copy would not be a view of its ``hardware``.
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "hardware": None}
