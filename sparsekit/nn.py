"""Modules: tensors and one op call."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import get_mask, get_mask_info
from .ops import linear24, nm_mask, pack24, unpack24, unpack_bits
from .ops.prepacked import prepack, prepacked_dense, prepacked_linear


class Linear24(nn.Module):
    """A linear layer whose weight is stored and multiplied in the packed 2:4 format.

    Holds the neutral form and nothing else: ``values``, a Parameter ``[out_features, 2 * (in_features // 4) +
    in_features % 4]`` that gradients reach; ``bitmask``, a uint8 buffer ``[out_features, ceil(in_features / 8)]``; and
    ``bias``. The state dict holds these three. A new layer draws its weight as ``nn.Linear`` does and keeps the two
    largest magnitudes of every four. Autocast follows ``F.linear``.

    Args:
        in_features: columns of the weight; any number, a tail of ``in_features % 4`` columns is stored whole.
        out_features: rows of the weight.
        bias: whether a bias is added.
        transposed: whether ``.weight`` is shown as ``[in_features, out_features]``, which is how the layer that this
            one stands for keeps it (the ``Conv1D`` of transformers).
        device: where the tensors are made.
        dtype: float32, float16 or bfloat16; None is torch's default.
    """

    values: nn.Parameter
    bitmask: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        values, bitmask = pack24(weight, nm_mask(weight, 2, 4))
        self.values = nn.Parameter(values)
        self.register_buffer("bitmask", bitmask)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, transposed: bool = False) -> "Linear24":
        """Packs a layer whose weight is 2:4: by its stored mask where it has one, else by its non-zeros.

        A stored mask may keep fewer than two of a group (1:4, say), never more; what it drops is not packed. The bias
        is the layer's own Parameter, not a copy, and a stored mask comes along.

        Args:
            linear: ``nn.Linear``, or a layer with its ``weight`` and ``bias``.
            transposed: whether ``linear.weight`` is ``[in_features, out_features]``.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16.
            ValueError: a group of four keeps more than two; the message names the first one.
        """
        weight, mask = _oriented(linear.weight.detach(), transposed), get_mask(linear)
        if mask is None:
            values, bitmask = pack24(weight, check=True)
        else:
            _, completed = pack24(_oriented(mask, transposed).to(weight.dtype), check=True)
            values, bitmask = pack24(weight, unpack_bits(completed, weight.shape[1]))
        rows, cols = weight.shape
        layer = cls(cols, rows, False, transposed=transposed, device="meta", dtype=weight.dtype)
        layer.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        layer.bitmask = bitmask
        layer.bias = linear.bias
        carry_mask(linear, layer)
        if not transposed and (bits := layer._buffers.get("weight_mask")) is not None and torch.equal(bits, bitmask):
            layer.weight_mask = bitmask  # one buffer for both
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same, with the same bias Parameter and the stored mask."""
        linear = _dense_linear(self, self._dense(), self.values.requires_grad)
        if not self.transposed:
            carry_mask(self, linear)
        return linear

    def _dense(self) -> Tensor:
        return unpack24(self.values.detach(), self.bitmask, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at every access; writing to it changes nothing."""
        return _oriented(self._dense(), self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        values, bias = self.values, self.bias
        if (dtype := autocast_dtype(x)) is not None:
            return linear24(x.to(dtype), values.to(dtype), self.bitmask, None if bias is None else bias.to(dtype))
        return linear24(x, values, self.bitmask, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PrepackedLinear(nn.Module):
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
    """

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None = None, *, tokens: int = 128, transposed: bool = False
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.tokens, self.transposed = tokens, transposed
        self.trainable = weight.requires_grad
        self.register_parameter("bias", bias)
        self._keep(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, tokens: int = 128, transposed: bool = False) -> "PrepackedLinear":
        """Reorders the weight of a layer; the bias is its own Parameter, and a stored mask comes along."""
        layer = cls(_oriented(linear.weight, transposed), linear.bias, tokens=tokens, transposed=transposed)
        carry_mask(linear, layer)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` that computes the same, with the same bias Parameter and the stored mask."""
        linear = _dense_linear(self, self._dense().clone(), self.trainable)
        if not self.transposed:
            carry_mask(self, linear)
        return linear

    def _keep(self, dense: Tensor) -> None:
        self.packed = prepack(dense, self.tokens)
        self.reordered = self.packed.is_mkldnn  # tracing forgets it

    def _dense(self) -> Tensor:
        return prepacked_dense(self.packed) if self.reordered else self.packed

    @property
    def weight(self) -> Tensor:
        """The dense weight, restored anew at every access; writing to it changes nothing."""
        return _oriented(self._dense().clone(), self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.trainable and torch.is_grad_enabled():
            raise RuntimeError(
                "PrepackedLinear cannot train its weight: call model.eval(), use torch.no_grad(), "
                "or turn it back with sparsekit.decompress_"
            )
        if not self.reordered or autocast_dtype(x) is not None:
            return F.linear(x, self._dense(), self.bias)
        return prepacked_linear(x, self.packed, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrepackedLinear":
        super()._apply(fn, recurse)
        self._keep(fn(self._dense()))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
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
        shape = weight_shape(self)
        if weight is None:
            missing_keys.append(key)
        elif weight.shape != shape:
            error_msgs.append(f"{key} must have shape {shape}, got {tuple(weight.shape)}")
        else:
            self._keep(_oriented(weight, self.transposed).to(self.packed.device, self.packed.dtype, copy=True))
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
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={form}"
        )


Compressed = Linear24 | PrepackedLinear


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of ``layer.weight``, of a compressed layer without unpacking it."""
    if isinstance(layer, Compressed):
        shape = (layer.out_features, layer.in_features)
        return shape[::-1] if layer.transposed else shape
    return tuple(layer.weight.shape)  # type: ignore[arg-type]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes linear layers in on ``x``'s device; None where it is off."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def _oriented(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t() if transposed else weight


def _dense_linear(layer: Compressed, weight: Tensor, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)


def carry_mask(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the stored mask of ``source``: the same buffer, not a copy."""
    if get_mask_info(source) is not None:
        target.register_buffer("weight_mask", source._buffers["weight_mask"], persistent=False)
        target.weight_mask_info = source.weight_mask_info
