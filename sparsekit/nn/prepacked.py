"""The dense linear layer whose weight oneDNN has reordered."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import is_jit_tracing
from ..ops.prepacked import prepack, prepacked_dense, prepacked_linear
from .common import autocast_dtype, carry_mask, oriented
from .compressed import Compressed, weight_of, weight_shape


class PrepackedLinear(Compressed):
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

    packed: Tensor
    sparse = False
    dtypes = None  # any, because the weight stays plain in a dtype that oneDNN does not reorder

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

    @property
    def trainable(self) -> bool:
        return self.frozen

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    def _prepack(self, dense: Tensor) -> None:
        self.packed = prepack(dense, self.tokens)
        self.reordered = self.packed.is_mkldnn  # read once, because a traced tensor does not tell

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.packed,)

    def resident_tensors(self) -> list[Tensor]:
        """Returns the reordered weight."""
        return [self.packed]

    def _unpack(self, *parts: Tensor) -> Tensor:
        return prepacked_dense(*parts)

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        return prepacked_linear(input, self.packed, self._parameters["bias"]) if self.reordered else None

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        if self.reordered and is_jit_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot hold a weight that oneDNN has reordered: use torch.export, or call "
                "sparsekit.decompress_(model) first"
            )
        if not self.reordered or autocast_dtype(input) is not None:
            return F.linear(input, self._dense() if self.reordered else self.packed, self.bias)
        return prepacked_linear(input, self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrepackedLinear":
        dense = fn(self._dense())
        super()._apply(fn, recurse)
        self._prepack(dense)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = oriented(self._dense(), self.transposed)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is None:
            missing_keys.append(key)
        elif not isinstance(weight, Tensor):
            error_msgs.append(f"{key} must be a tensor, got {type(weight).__name__}")
        elif weight.shape != (shape := weight_shape(self)):
            error_msgs.append(f"{key} must have shape {shape}, got {tuple(weight.shape)}")
        else:
            dense = oriented(weight, self.transposed)
            assigned = local_metadata.get("assign_to_params_buffers", False)
            self._prepack(dense if assigned else dense.to(self.packed.device, self.packed.dtype, copy=True))
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    # A tensor that oneDNN has reordered can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self._dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepack(self.packed)

    def extra_repr(self) -> str:
        form = "reordered" if self.reordered else "plain"
        return f"{super().extra_repr()}, weight={form}"
