"""Base class of compressed linear layers."""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops._define import DTYPES
from .shared import carry_mask, fx_node, oriented
from .weight import show_weight, shows


class Compressed(nn.Module):
    """A linear layer that stands for another one and holds its weight in a form that is smaller or faster.

    ``transposed`` says whether the other one keeps its weight as ``[in_features, out_features]``, as the ``Conv1D`` of
    transformers does. A subclass says what it holds (``_parts``), how that becomes dense (``_unpack``), and how it
    multiplies (``_multiply``).
    """

    unsupported_reason: ClassVar[str] = "it is compressed: call decompress_ first"

    in_features: int
    out_features: int
    transposed: bool
    bias: nn.Parameter | None
    frozen = False  # whether the weight would be trained, but for a form of it that would not follow an optimizer
    called = ""  # what an error calls it; empty for its class
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = DTYPES  # that it computes in; None for any

    @property
    def trainable(self) -> bool:
        """Whether the weight of the layer that this one stands for is trained."""
        raise NotImplementedError

    def _parts(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is stored in; the first has its dtype."""
        raise NotImplementedError

    def _unpack(self, *parts: Tensor) -> Tensor:
        """The weight ``[out_features, in_features]`` that is stored in ``parts``, in memory of its own."""
        raise NotImplementedError

    def _multiply(self, input: Tensor) -> Tensor:
        """``forward`` of a plain tensor."""
        raise NotImplementedError

    def _refusal(self) -> str | None:
        """Why the weight cannot be trained although it should be; None where it can, or need not."""
        if not (self.training and self.frozen):
            return None
        return (
            f"{self.called or type(self).__name__} cannot train its weight: call model.eval(), use torch.no_grad(), "
            "or turn it back with sparsekit.decompress_"
        )

    def _check_training(self) -> None:
        if torch.is_grad_enabled() and (refusal := self._refusal()):
            raise RuntimeError(refusal)

    def forward(self, input: Tensor) -> Tensor:
        """Computes ``input @ weight.T + bias``, as ``nn.Linear`` does.

        Args:
            input: ``[..., in_features]``, dense or nested.
        """
        if type(input) is Tensor and not input.is_nested:
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

    @torch.no_grad()
    def _dense(self) -> Tensor:
        """The weight ``[out_features, in_features]``, without a gradient, in memory of its own."""
        return self._unpack(*(part.detach() for part in self._parts()))

    def _unpack_oriented(self, *parts: Tensor) -> Tensor:
        return oriented(self._unpack(*parts), self.transposed)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew by whatever computes with it; writing to it raises RuntimeError.

        Its shape, dtype and device cost nothing, and its gradients reach what the layer holds.
        """
        rows, cols = self.out_features, self.in_features
        shape, stride = ((cols, rows), (1, max(cols, 1))) if self.transposed else ((rows, cols), (max(cols, 1), 1))
        return show_weight(self._unpack_oriented, self._parts(), shape, stride, self._refusal())

    @weight.setter
    def weight(self, value: Any) -> None:
        if not shows(value, self._parts()):  # its own weight is no change: PEFT hands a layer what it took from it
            _refuse_weight("weight")

    @weight.deleter
    def weight(self) -> NoReturn:
        _refuse_weight("weight")

    # Where torch's weight_norm, spectral_norm and prune begin.
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.split("_")[0] == "weight":
            _refuse_weight(name)
        super().register_parameter(name, param)

    @torch.inference_mode(False)  # what is made there could be neither trained nor used outside
    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` that computes the same, with the same bias Parameter and the stored mask."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._dense(), requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        if not self.transposed:
            carry_mask(self, linear)
        return linear.train(self.training)

    def _check_state(self, given: dict[str, Tensor], assigned: bool) -> None:
        """Rejects tensors, by name, that cannot take the place of the layer's own, which they do where ``assigned``.

        Raises:
            TypeError, ValueError: why not.
        """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        stored = [name for name in (*self._parameters, *self._buffers) if name not in self._non_persistent_buffers_set]
        found = {name: state_dict.get(prefix + name) for name in stored}
        given = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        try:
            self._check_state(given, local_metadata.get("assign_to_params_buffers", False))
        except (TypeError, ValueError) as error:
            error_msgs: list[str] = rest[-1]
            error_msgs.append(f"layer {prefix[:-1]}: {error}" if prefix else str(error))
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Compressed":
        if (reason := self.refuses_conversion(fn)) is not None:
            raise TypeError(f"{type(self).__name__} {reason}")

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor.is_floating_point() or converted.dtype == tensor.dtype:
                return converted
            return tensor.to(converted.device)  # bits and positions are no numbers

        return super()._apply(convert, recurse)

    def refuses_conversion(self, fn: Callable[[Tensor], Tensor]) -> str | None:
        """Why ``fn``, which ``nn.Module.to`` and the like hand to every tensor, must not have this layer; else None."""
        stored = self._parts()[0]
        dtype = fn(torch.empty(0, dtype=stored.dtype, device=stored.device)).dtype
        if self.dtypes is None or dtype in self.dtypes:
            return None
        return (
            f"is compressed and computes in float32, float16 or bfloat16, not {dtype}: "
            "call sparsekit.decompress_(model) first"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile a compressed layer: use torch.export, or call "
            "sparsekit.decompress_(model) first"
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _refuse_weight(name: str) -> NoReturn:
    raise RuntimeError(
        f"a compressed layer has no Parameter {name!r} to set: call sparsekit.decompress_(model) first, "
        "or merge LoRA with sparsekit.integrations.peft"
    )


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
    if isinstance(layer, Compressed):
        return oriented(
            layer._unpack_oriented(*(part.detach() for part in layer._parts())), transposed
        ), layer.trainable
    return oriented(weight.detach(), transposed), weight.requires_grad


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape of ``layer.weight`` as a tuple."""
    return tuple(layer.weight.shape)  # type: ignore[arg-type]
