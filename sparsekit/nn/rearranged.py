"""Base class of compressed layers whose state dict has other tensors than the form that they multiply by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import autocast_dtype
from .compressed_linear import CompressedLinear


class Rearranged(CompressedLinear):
    """A layer for inference that holds its weight in the order in which a kernel reads it, and nothing else.

    The state dict has the tensors of the usual order, ``_stored``; they are made when it is saved, and made into the
    form of the kernel when it is loaded, by ``_hold``. The weight cannot be trained: a call in training mode that would
    need its gradient raises.
    """

    dtype: torch.dtype  # of the dense weight

    @property
    def trainable(self) -> bool:
        return self.frozen

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.dtype

    def _operands(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the input and the bias in the dtype to compute in, which is the layer's own or that of autocast.

        Raises:
            TypeError: the input has another dtype.
        """
        bias: Tensor | None = self.bias
        if (dtype := autocast_dtype(input)) is not None:
            return input.to(dtype), None if bias is None else bias.to(dtype)
        if input.dtype != self.dtype:
            raise TypeError(f"x must be {self.dtype}, as the weight, got {input.dtype}")
        return input, bias

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rearranged":
        probe = fn(torch.empty(0, dtype=self.dtype, device=self._parts()[0].device))
        own = [tensor for tensor in self._buffers.values() if tensor is not None]

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if converted.dtype != tensor.dtype and any(tensor is each for each in own):
                return tensor.to(converted.device)  # scales keep their dtype
            return converted

        super()._apply(convert, recurse)
        self.dtype = probe.dtype
        return self

    def _stored(self) -> dict[str, Tensor]:
        """Returns the tensors of the state dict besides the bias."""
        raise NotImplementedError

    def _templates(self) -> dict[str, Tensor]:
        """Returns tensors on the meta device with the names, shapes and dtypes of those of ``_stored``."""
        raise NotImplementedError

    def _hold(self, stored: dict[str, Tensor]) -> None:
        """Makes the form of the kernel of the tensors of ``_stored``."""
        raise NotImplementedError

    def _check_stored(self, stored: dict[str, Tensor]) -> None:
        """Rejects contents that no weight has.

        Raises:
            ValueError: names the tensor.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: tensor for name, tensor in self._stored().items()}
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
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
        templates, errors = self._templates(), len(error_msgs)
        given = {name: state_dict.get(prefix + name) for name in templates}
        missing = [prefix + name for name, tensor in given.items() if tensor is None]
        missing_keys += missing
        for name, tensor in given.items():
            if tensor is not None and (error := _misfit(tensor, templates[name])):
                error_msgs.append(f"{prefix}{name} {error}")
        if not missing and len(error_msgs) == errors:
            stored = {name: tensor.detach() for name, tensor in given.items() if tensor is not None}
            assigned = local_metadata.get("assign_to_params_buffers", False)
            device = self._parts()[0].device
            try:
                self._check_stored(stored)
                self._hold({name: t if assigned else t.to(device, copy=True) for name, t in stored.items()})
            except ValueError as error:
                error_msgs.append(f"layer {prefix[:-1]}: {error}" if prefix else str(error))
        rest = {name: tensor for name, tensor in state_dict.items() if name.removeprefix(prefix) not in templates}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _misfit(tensor: object, template: Tensor) -> str:
    """Returns how a tensor differs from what it should be; empty if it does not."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got {type(tensor).__name__}"
    if tensor.dtype != template.dtype:
        return f"must be {template.dtype}, got {tensor.dtype}"
    return (
        "" if tensor.shape == template.shape else f"must have shape {tuple(template.shape)}, got {tuple(tensor.shape)}"
    )
