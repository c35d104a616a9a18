"""What the layers have in common whose packed 2:4 weight is arranged for a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compressed import Compressed

BUFFERS = ("like", "data", "stored_values", "stored_bitmask")


class Arranged(Compressed):
    """A 2:4 layer for inference on a CPU, whose weight is arranged once in the layout that one product reads.

    It comes before the class of the layer that stores the packed weight, whose state dict it has. A subclass says how a
    weight is arranged (``_arrange``) and restored (``_restore``), and makes a layer of that class (``_packed_layer``).
    """

    like: Tensor  # without entries, of the dtype and on the device of the weight
    data: Tensor | None  # of the arranged weight; None where the packed one is stored
    stored_values: Tensor  # of the packed weight; None where the arranged one is stored
    stored_bitmask: Tensor

    def _arrange(self, values: Tensor, bitmask: Tensor) -> Tensor | None:
        """Returns the bytes of the arranged weight; None where there is no compiled product for it."""
        raise NotImplementedError

    def _restore(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tensors of the packed weight."""
        raise NotImplementedError

    def _packed_layer(self) -> Any:
        """Returns a layer of the same shape and dtype that stores a packed weight, on the meta device."""
        raise NotImplementedError

    def _take(self, values: Tensor, bitmask: Tensor, bias: nn.Parameter | None) -> None:
        """Registers all tensors of a new layer."""
        self.frozen = values.requires_grad
        self.register_parameter("bias", bias)
        for name in BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self._store(values, bitmask)

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    @torch.no_grad()
    def _store(self, values: Tensor, bitmask: Tensor) -> None:
        """Stores a weight: arranged where there is a compiled product for that, else as it is."""
        self._buffers.update(dict.fromkeys(BUFFERS))
        self.like = values.new_empty(0)
        self.data = self._arrange(values.detach(), bitmask)
        if self.data is None:
            self.stored_values, self.stored_bitmask = values.detach(), bitmask

    @property
    def trainable(self) -> bool:
        return self.frozen

    def _packed_parts(self) -> tuple[Tensor, Tensor]:
        """Returns the tensors of the packed weight, rebuilt from the arranged one."""
        return (self.stored_values, self.stored_bitmask) if self.data is None else self._restore(self.data)

    @property
    def values(self) -> Tensor:
        """The kept values, rebuilt from the arranged weight."""
        return self._packed_parts()[0]

    @property
    def bitmask(self) -> Tensor:
        """The bits of the kept entries, rebuilt from the arranged weight."""
        return self._packed_parts()[1]

    def _parts(self) -> tuple[Tensor, ...]:
        return (self.stored_values, self.stored_bitmask) if self.data is None else (self.like, self.data)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Arranged":
        now = fn(self.like)
        if (now.dtype, now.device) == (self.like.dtype, self.like.device):
            super()._apply(fn, recurse)
            return self
        values, bitmask = self._packed_parts()
        moved = fn(values), fn(bitmask)
        super()._apply(fn, recurse)
        self._store(moved[0], moved[1] if moved[1].dtype == torch.uint8 else bitmask.to(now.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "values"], destination[prefix + "bitmask"] = self._packed_parts()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.inference_mode(False)  # as in _store
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {name: tensor for name, tensor in state_dict.items() if name in (prefix + "values", prefix + "bitmask")}
        packed = self._packed_layer()
        values, packed.bitmask = self._packed_parts()
        packed.values = nn.Parameter(values, requires_grad=False)
        packed._load_from_state_dict(own, prefix, *rest)
        if own:
            self._store(packed.values, packed.bitmask)
        other = {name: tensor for name, tensor in state_dict.items() if name not in own}
        super()._load_from_state_dict(other, prefix, *rest)
