"""Base class of dense layers whose weight oneDNN has reordered."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops._define import is_jit_tracing
from ..ops.prepacked import prepacked_dense
from .common import oriented
from .compressed import Compressed, weight_shape


class Prepacked(Compressed):
    """A dense layer for inference on a CPU that holds its weight as oneDNN has reordered it, and nothing else.

    The state dict has the dense ``weight`` in the usual order; it is reordered again when it is loaded, copied or
    converted. If oneDNN has no reordered form, ``packed`` is the dense weight. A subclass says how it is reordered.
    """

    packed: Tensor
    sparse = False
    dtypes = None  # any, because the weight stays plain in a dtype that oneDNN does not reorder

    def _reorder(self, dense: Tensor) -> Tensor:
        """Returns a dense weight, outputs first, as oneDNN has reordered it, or as it is."""
        raise NotImplementedError

    @property
    def trainable(self) -> bool:
        return self.frozen

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    def _prepack(self, dense: Tensor) -> None:
        self.packed = self._reorder(dense)
        self.reordered = self.packed.is_mkldnn  # read once, because a traced tensor does not tell

    def _check_call(self) -> None:
        """Raises RuntimeError where the weight should be trained, or its form cannot be traced."""
        self._check_training()
        if self.reordered and is_jit_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot hold a weight that oneDNN has reordered: use torch.export, or call "
                "sparsekit.decompress_(model) first"
            )

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.packed,)

    def resident_tensors(self) -> list[Tensor]:
        """Returns the reordered weight."""
        return [self.packed]

    def _unpack(self, *parts: Tensor) -> Tensor:
        return prepacked_dense(*parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prepacked":
        dense = fn(self._dense())
        super()._apply(fn, recurse)
        self._prepack(dense)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._unpack_oriented(*self._parts())
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
