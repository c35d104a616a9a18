"""Base class of compressed layers."""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ..ops._define import DTYPES
from .weight_view import is_view_of, view_weight


class Compressed(nn.Module):
    """A layer that replaces another one and stores its weight in a smaller or faster form.

    A subclass says which tensors it stores (``_parts``), how they become the dense weight (``_unpack``) of what layout
    (``_layout``), and which plain layer computes the same (``to_plain``).
    """

    unsupported_reason: ClassVar[str] = "it is compressed: call decompress_ first"
    sparse: ClassVar[bool] = True  # whether it stores only some entries of its weight
    lossy: ClassVar[bool] = False  # whether it multiplies by another weight than the layer that it replaces had

    transposed = False  # whether the replaced layer has its weight as ``[inputs, outputs]``
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
        """Returns the weight that is stored in ``parts``, outputs first, as a new tensor."""
        raise NotImplementedError

    def _unpack_oriented(self, *parts: Tensor) -> Tensor:
        """Returns the same as the replaced layer has it."""
        return self._unpack(*parts)

    def _layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shape and the strides of ``weight``."""
        raise NotImplementedError

    def to_plain(self) -> nn.Module:
        """Returns the plain layer that computes the same, with the same bias Parameter and stored mask."""
        raise NotImplementedError

    def reference(self, input: Tensor) -> Tensor:
        """Returns what ``forward`` should return, up to rounding, in float64; a kernel is checked against it."""
        raise NotImplementedError

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

    @torch.no_grad()
    def _dense(self) -> Tensor:
        """Returns the weight, outputs first, as a new tensor without a gradient."""
        return self._unpack(*(part.detach() for part in self._parts()))

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked again by every operation that reads its values.

        Reading its shape, dtype or device unpacks nothing. Its gradients reach the tensors that the layer stores.
        Writing to it raises RuntimeError.
        """
        error = self._training_error()
        return view_weight(self._unpack_oriented, self._parts(), *self._layout(), self.weight_dtype, error)

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


def _refuse_weight(name: str) -> NoReturn:
    raise RuntimeError(
        f"a compressed layer has no Parameter {name!r} to set: call sparsekit.decompress_(model) first, "
        "or merge LoRA with sparsekit.integrations.peft"
    )


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape of ``layer.weight`` as a tuple."""
    return tuple(layer.weight.shape)  # type: ignore[arg-type]
