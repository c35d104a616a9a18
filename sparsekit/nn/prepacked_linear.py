"""The dense linear layer whose weight oneDNN has reordered."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.prepacked import prepack, prepacked_linear
from .common import autocast_dtype, carry_mask
from .compressed_linear import CompressedLinear, weight_of
from .prepacked import Prepacked


class PrepackedLinear(Prepacked, CompressedLinear):
    """A dense linear layer for inference on a CPU, whose weight oneDNN has reordered once instead of at every call.

    It stores the reordered weight and the bias. The state dict has the dense ``weight`` in the usual order; loading it
    reorders it again, and so does ``to(dtype)``. If oneDNN has no reordered form (on another device, or for a 16-bit
    dtype that the CPU does not compute in), the weight stays as it is and ``F.linear`` multiplies it. Gradients reach
    the input and ``bias``. The weight cannot be trained: a call in training mode that would need its gradient raises.

    Args:
        weight: ``[out_features, in_features]``.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        tokens: the number of tokens that the layout is chosen for. It is fast for fewer, less so for more.
        transposed: whether ``.weight`` and that of the state dict are ``[in_features, out_features]``, as in
            ``Linear24``.

    Raises:
        ValueError: ``weight`` is not a matrix.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None = None, *, tokens: int = 128, transposed: bool = False
    ):
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.tokens, self.transposed = tokens, transposed
        self.frozen = weight.requires_grad
        self.register_parameter("bias", bias)
        self._prepack(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, tokens: int = 128, transposed: bool = False) -> "PrepackedLinear":
        """Reorders the weight of a layer. The bias is the layer's own Parameter, not a copy, and so is a stored mask.

        Raises:
            TypeError: ``linear`` is not a linear layer.
        """
        weight, trained = weight_of(linear, transposed)
        layer = cls(weight, linear.bias, tokens=tokens, transposed=transposed)
        layer.frozen = trained
        carry_mask(linear, layer)
        return layer.train(linear.training)

    def _reorder(self, dense: Tensor) -> Tensor:
        return prepack(dense, self.tokens)

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        return prepacked_linear(input, self.packed, self._parameters["bias"]) if self.reordered else None

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_call()
        if not self.reordered or autocast_dtype(input) is not None:
            return F.linear(input, self._dense() if self.reordered else self.packed, self.bias)
        return prepacked_linear(input, self.packed, self.bias)
