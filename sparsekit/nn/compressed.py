"""Base class of compressed linear layers."""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..ops._define import DTYPES, can_call_directly
from .common import carry_mask, fx_node, oriented
from .weight_view import is_view_of, view_weight


class Compressed(nn.Module):
    """A linear layer that replaces another one and stores its weight in a smaller or faster form.

    ``transposed`` says whether the replaced layer has its weight as ``[in_features, out_features]``, as the ``Conv1D``
    of transformers does. A subclass says which tensors it stores (``_parts``), how they become the dense weight
    (``_unpack``), and how it multiplies an input (``_multiply``).
    """

    unsupported_reason: ClassVar[str] = "it is compressed: call decompress_ first"
    sparse: ClassVar[bool] = True  # whether it stores only some entries of its weight
    lossy: ClassVar[bool] = False  # whether it multiplies by another weight than the layer that it replaces had

    in_features: int
    out_features: int
    transposed: bool
    bias: nn.Parameter | None
    frozen = False  # whether the replaced layer trained its weight, but this form of it cannot follow an optimizer
    name_in_errors = ""  # empty for the name of the class
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = DTYPES  # the dtypes that it computes in; None for any

    @property
    def trainable(self) -> bool:
        """Whether the weight of the replaced layer is trained."""
        raise NotImplementedError

    def _parts(self) -> tuple[Tensor, ...]:
        """Returns the tensors that the weight is stored in, all on one device."""
        raise NotImplementedError

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return self._parts()[0].dtype

    def resident_tensors(self) -> list[Tensor]:
        """Returns the tensors that hold the weight in memory, with every copy of it."""
        own = [*self._parameters.items(), *self._buffers.items()]
        return [tensor for name, tensor in own if tensor is not None and name not in ("bias", "weight_mask")]

    def _unpack(self, *parts: Tensor) -> Tensor:
        """Returns the weight ``[out_features, in_features]`` that is stored in ``parts``, as a new tensor."""
        raise NotImplementedError

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

    def _training_error(self) -> str | None:
        """Returns the error message if training mode asks for a gradient that the weight cannot have; else None."""
        if not (self.training and self.frozen):
            return None
        return (
            f"{self.name_in_errors or type(self).__name__} cannot train its weight: call model.eval(), use "
            "torch.no_grad(), or turn it back with sparsekit.decompress_"
        )

    def _check_training(self) -> None:
        if torch.is_grad_enabled() and (error := self._training_error()):
            raise RuntimeError(error)

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

    @torch.no_grad()
    def _dense(self) -> Tensor:
        """Returns the weight ``[out_features, in_features]`` as a new tensor, without a gradient."""
        return self._unpack(*(part.detach() for part in self._parts()))

    def _unpack_oriented(self, *parts: Tensor) -> Tensor:
        return oriented(self._unpack(*parts), self.transposed)

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked again by every operation that reads its values.

        Reading its shape, dtype or device unpacks nothing. Its gradients reach the tensors that the layer stores.
        Writing to it raises RuntimeError.
        """
        rows, cols = self.out_features, self.in_features
        shape, stride = ((cols, rows), (1, max(cols, 1))) if self.transposed else ((rows, cols), (max(cols, 1), 1))
        error = self._training_error()
        return view_weight(self._unpack_oriented, self._parts(), shape, stride, self.weight_dtype, error)

    @weight.setter
    def weight(self, value: Any) -> None:
        if not is_view_of(value, self._parts()):  # PEFT sets the weight that it has read, which changes nothing
            _refuse_weight("weight")

    @weight.deleter
    def weight(self) -> NoReturn:
        _refuse_weight("weight")

    # torch's weight_norm, spectral_norm and prune replace a Parameter "weight", which a compressed layer does not have.
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.split("_")[0] == "weight":
            _refuse_weight(name)
        super().register_parameter(name, param)

    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def to_linear(self) -> nn.Linear:
        """Returns the dense ``nn.Linear`` that computes the same, with the same bias Parameter and stored mask."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self._dense(), requires_grad=self.trainable)
        linear.register_parameter("bias", self.bias)
        if not self.transposed:
            carry_mask(self, linear)
        return linear.train(self.training)

    def _check_state(self, given: dict[str, Tensor], assigned: bool) -> None:
        """Rejects tensors of a state dict that do not fit the layer.

        Args:
            given: the tensors by the names of the layer's own ones.
            assigned: whether they will replace the layer's own ones instead of being copied into them.

        Raises:
            TypeError, ValueError: one does not fit.
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
        if (error := self.conversion_error(fn)) is not None:
            raise TypeError(f"{type(self).__name__} {error}")

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if tensor.is_floating_point() or converted.dtype == tensor.dtype:
                return converted
            return tensor.to(converted.device)  # bits and positions keep their dtype

        return super()._apply(convert, recurse)

    def conversion_error(self, fn: Callable[[Tensor], Tensor]) -> str | None:
        """Returns why the layer cannot be converted by ``fn``; None if it can be.

        Args:
            fn: what ``nn.Module.to``, ``double`` and the like apply to every tensor of a model.
        """
        dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self._parts()[0].device)).dtype
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
