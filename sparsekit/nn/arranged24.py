"""The 2:4 linear layer whose weight is arranged for the CPU product of few tokens, or of many."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops import Arranged24, Packed24, arrange24, arranged_linear24, backends
from ..ops._define import is_jit_tracing
from ..ops._kernels import call_kernel
from ..ops.arranged24 import LAYOUTS, Layout
from ..ops.sparse24 import check_packed24
from .common import autocast_dtype, carry_mask
from .linear24 import Linear24

LINEAR = {
    "input pairs": torch.ops.sparsekit.linear_input_pairs24.default,
    "row pairs": torch.ops.sparsekit.linear_row_pairs24.default,
}
BUFFERS = ("like", "data", "stored_values", "stored_bitmask")
Layer = TypeVar("Layer", bound="ArrangedLinear24")


class ArrangedLinear24(Linear24):
    """A ``Linear24`` for inference on a CPU, whose weight is arranged once in the layout that one product reads.

    It stores the arranged weight and the bias. The state dict is that of ``Linear24``; loading it arranges the weight
    again, and so does ``to(dtype)``. On another device, or without the compiled extension, it stores ``values`` and
    ``bitmask`` and multiplies as ``Linear24`` does. Gradients reach the input and ``bias``. The weight cannot be
    trained: a call in training mode that would need its gradient raises.

    Args:
        packed: the weight, which is not kept.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        layout: ``"row pairs"`` for many tokens, ``"input pairs"`` for fewer, as in ``arrange24``.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.

    Raises:
        TypeError, ValueError: ``packed`` is no packed weight, or there is no such layout.
    """

    like: Tensor  # without entries, of the dtype and on the device of the weight
    data: Tensor | None  # of the arranged weight; None where the packed one is stored
    stored_values: Tensor  # of the packed weight; None where the arranged one is stored
    stored_bitmask: Tensor

    def __init__(self, packed: Packed24, bias: nn.Parameter | None = None, *, layout: Layout, transposed: bool = False):
        nn.Module.__init__(self)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        check_packed24(packed)
        self.out_features, self.in_features = packed.shape
        self.transposed, self.layout, self.frozen = transposed, layout, packed.values.requires_grad
        self.register_parameter("bias", bias)
        for name in BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self._store(packed)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls: type[Layer], linear: nn.Linear, *, layout: Layout, transposed: bool = False
    ) -> Layer:
        """Arranges the weight of a layer that ``Linear24.from_linear`` takes, with the same arguments and errors.

        The bias is the layer's own Parameter, not a copy, and so is a stored mask.
        """
        packed = Linear24.from_linear(linear, transposed=transposed)
        layer = cls(packed.packed, linear.bias, layout=layout, transposed=transposed)
        carry_mask(linear, layer)
        return layer.train(linear.training)

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def _store(self, packed: Packed24) -> None:
        """Stores a weight: arranged where there is a compiled product for that, else as it is."""
        values, bitmask, shape = packed
        self._buffers.update(dict.fromkeys(BUFFERS))
        self.like = values.new_empty(0)
        if values.device.type == "cpu" and backends()["linear_row_pairs24"]["cpu"] != "reference":
            self.data = arrange24(Packed24(values.detach(), bitmask, shape), self.layout).data
        else:
            self.stored_values, self.stored_bitmask = values.detach(), bitmask

    @property
    def trainable(self) -> bool:
        return self.frozen

    @property
    def arranged(self) -> Arranged24 | None:
        """The arranged weight; None where the packed one is stored."""
        if self.data is None:
            return None
        return Arranged24(self.data, (self.out_features, self.in_features), self.like.dtype, self.layout)

    @property
    def packed(self) -> Packed24:
        """The weight as ``pack24`` returns it, rebuilt from the arranged one."""
        if (arranged := self.arranged) is not None:
            return arranged.to_packed()
        return Packed24(self.stored_values, self.stored_bitmask, (self.out_features, self.in_features))

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The kept values, rebuilt from the arranged weight."""
        return self.packed.values

    @property
    def bitmask(self) -> Tensor:  # type: ignore[override]
        """The bits of the kept entries, rebuilt from the arranged weight."""
        return self.packed.bitmask

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.stored_values, self.stored_bitmask) if self.data is None else (self.like, self.data)

    def _unpack(self, *parts: Tensor) -> Tensor:
        first, second = parts
        if second.dim() != 1:
            return super()._unpack(first, second)
        return Arranged24(second, (self.out_features, self.in_features), first.dtype, self.layout).to_dense()

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        buffers = self._buffers
        data, like = buffers["data"], buffers["like"]
        if data is None or like is None or input.dtype != like.dtype:
            return None
        return call_kernel(LINEAR[self.layout], input, data, self._parameters["bias"], self.out_features)

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        arranged, dtype = self.arranged, autocast_dtype(input)
        bias: Tensor | None = self.bias
        if arranged is None or dtype not in (None, arranged.dtype):
            return super()._multiply(input)
        if dtype is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if is_jit_tracing():
            return LINEAR[self.layout](input, arranged.data, bias, self.out_features)
        return arranged_linear24(input, arranged, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ArrangedLinear24":
        now = fn(self.like)
        if (now.dtype, now.device) == (self.like.dtype, self.like.device):
            super()._apply(fn, recurse)
            return self
        values, bitmask, shape = self.packed
        moved = fn(values), fn(bitmask)
        super()._apply(fn, recurse)
        self._store(Packed24(moved[0], moved[1] if moved[1].dtype == torch.uint8 else bitmask.to(now.device), shape))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values, bitmask, _ = self.packed
        destination[prefix + "values"], destination[prefix + "bitmask"] = values, bitmask
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.inference_mode(False)  # as in _store
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {name: tensor for name, tensor in state_dict.items() if name in (prefix + "values", prefix + "bitmask")}
        plain = Linear24(self.in_features, self.out_features, False, device="meta", dtype=self.like.dtype)
        values, plain.bitmask, _ = self.packed
        plain.values = nn.Parameter(values, requires_grad=False)
        plain._load_from_state_dict(own, prefix, *rest)
        if own:
            self._store(plain.packed)
        other = {name: tensor for name, tensor in state_dict.items() if name not in own}
        super()._load_from_state_dict(other, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, layout={self.layout!r}"
