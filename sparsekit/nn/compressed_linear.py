"""Base class of compressed linear layers."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops._define import can_call_directly
from .common import carry_mask, fx_node, oriented
from .compressed import Compressed


class CompressedLinear(Compressed):
    """A compressed linear layer.

    ``transposed`` says whether the replaced layer has its weight as ``[in_features, out_features]``, as the ``Conv1D``
    of transformers does. A subclass says besides how it multiplies an input (``_multiply``).
    """

    in_features: int
    out_features: int
    transposed: bool

    def _multiply(self, input: Tensor) -> Tensor:
        """Computes ``forward`` for an input that is not nested."""
        raise NotImplementedError

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        """Computes ``forward`` where torch adds nothing to a call, with as few steps in Python as it can.

        The input has ``in_features`` columns; nothing else is known of it, nor that the tensors of the layer fit.

        Returns:
            The result; None where only ``_multiply`` can compute it. Where this raises, ``_multiply`` is called too,
            and raises an error that says what does not fit.
        """
        return None

    def reference(self, input: Tensor) -> Tensor:
        """Returns what ``forward`` should return, up to rounding, in float64; a kernel is checked against it."""
        bias: Tensor | None = self.bias
        return F.linear(input.double(), self._dense().double(), None if bias is None else bias.double())

    def forward(self, input: Tensor) -> Tensor:
        """Computes ``input @ weight.T + bias``, as ``nn.Linear`` does.

        Args:
            input: ``[..., in_features]``, dense or nested.
        """
        if type(input) is Tensor and not input.is_nested:
            if can_call_directly():
                try:
                    output = self._multiply_directly(input) if input.shape[-1] == self.in_features else None
                except Exception:
                    output = None
                if output is not None:
                    return output
            return self._multiply(input)
        if isinstance(input, torch.fx.Proxy):
            return fx_node(self, input)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        return self._multiply_nested(input) if input.is_nested else self._multiply(input)

    def _multiply_nested(self, input: Any) -> Tensor:
        if input.layout != torch.jagged:
            return torch.nested.as_nested_tensor([self._multiply(part) for part in input.unbind()])
        if input.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} columns, got shape {tuple(input.shape)}")
        values = self._multiply(input.values())
        return torch.nested.nested_tensor_from_jagged(values, input.offsets(), input.lengths(), input._ragged_idx)

    def _unpack_oriented(self, *parts: Tensor) -> Tensor:
        return oriented(self._unpack(*parts), self.transposed)

    def _layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, cols = self.out_features, self.in_features
        return ((cols, rows), (1, max(cols, 1))) if self.transposed else ((rows, cols), (max(cols, 1), 1))

    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def to_linear(self) -> nn.Linear:
        """Returns the dense ``nn.Linear`` that computes the same, with the same bias Parameter and stored mask."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._dense(), requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        if not self.transposed:
            carry_mask(self, linear)
        return linear.train(self.training)

    def to_plain(self) -> nn.Linear:
        return self.to_linear()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def weight_of(layer: nn.Module, transposed: bool) -> tuple[Tensor, bool]:
    """Returns the weight of a linear layer, plain or compressed, as ``[outputs, inputs]``, and whether it is trained.

    Raises:
        TypeError: ``layer`` has no weight and bias, as ``nn.Linear`` has them.
        ValueError: the weight is no matrix, or was not initialized.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", layer)
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"linear must have a weight and a bias as nn.Linear has them, got {type(layer).__name__}")
    if is_lazy(weight):
        raise ValueError(f"linear must be initialized, got a {type(layer).__name__} that was not called yet")
    if weight.dim() != 2:
        raise ValueError(f"linear must have a matrix as its weight, got shape {tuple(weight.shape)}")
    if isinstance(layer, CompressedLinear):
        return oriented(
            layer._unpack_oriented(*(part.detach() for part in layer._parts())), transposed
        ), layer.trainable
    return oriented(weight.detach(), transposed), weight.requires_grad
