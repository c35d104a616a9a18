"""The dense linear layer whose weight oneDNN has reordered."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import is_jit_tracing
from ..ops.prepacked import prepack, prepacked_dense, prepacked_linear
from .compressed import Compressed, weight_of, weight_shape
from .shared import autocast_dtype, carry_mask, oriented


class PrepackedLinear(Compressed):
    """A dense linear layer for inference on a CPU, whose weight oneDNN has reordered once instead of at every call.

    Holds the reordered weight and the bias; the state dict holds the plain dense ``weight``, and loading one reorders
    it again, as ``to(dtype)`` does. Where oneDNN has no reordered form (another device, or a 16-bit dtype that the
    CPU does not compute in) the weight stays plain and ``F.linear`` answers. Gradients reach ``x`` and ``bias``. The
    weight cannot be trained: a call in training mode that would need its gradient raises.

    Args:
        weight: ``[out_features, in_features]``.
        bias: the layer's bias Parameter, kept as it is, or None.
        tokens: the number of rows of ``x`` that the layout is chosen for. It is fast for fewer, less so for more.
        transposed: whether ``.weight`` and the state dict show ``[in_features, out_features]``, as in ``Linear24``.

    Raises:
        ValueError: ``weight`` is no matrix.
    """

    packed: Tensor
    dtypes = None  # where oneDNN has no form, the plain weight takes any

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
        self._keep(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, tokens: int = 128, transposed: bool = False) -> "PrepackedLinear":
        """Reorders the weight of a layer; the bias is its own Parameter, and a stored mask comes along.

        Raises:
            TypeError: ``linear`` is no linear layer.
        """
        weight, trained = weight_of(linear, transposed)
        layer = cls(weight, linear.bias, tokens=tokens, transposed=transposed)
        layer.frozen = trained
        carry_mask(linear, layer)
        return layer.train(linear.training)

    @property
    def trainable(self) -> bool:
        return self.frozen

    @torch.inference_mode(False)  # what is made there could not be used outside
    def _keep(self, dense: Tensor) -> None:
        self.packed = prepack(dense, self.tokens)
        self.reordered = self.packed.is_mkldnn  # tracing forgets it

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.packed,)

    def _unpack(self, *parts: Tensor) -> Tensor:
        return prepacked_dense(*parts)

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
        self._keep(dense)
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
            self._keep(dense if assigned else dense.to(self.packed.device, self.packed.dtype, copy=True))
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    # An opaque tensor can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self._dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep(self.packed)

    def extra_repr(self) -> str:
        form = "reordered" if self.reordered else "plain"
        return f"{super().extra_repr()}, weight={form}"
