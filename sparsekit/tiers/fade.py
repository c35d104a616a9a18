"""Fading: what later steps will drop shrinks to nothing while a model is fine-tuned, so no demotion is a blow."""

from types import TracebackType

import torch
from torch import Tensor, nn

from ..ops import pack_bits, unpack_bits

FADING = "weight_fading"


def mark_fading(module: nn.Module, fading: Tensor | None) -> None:
    """Stores which entries of a layer's weight fade, bit-packed as its mask is; None forgets it."""
    module._buffers.pop(FADING, None)
    module._non_persistent_buffers_set.discard(FADING)
    if fading is not None:
        module.register_buffer(FADING, pack_bits(fading), persistent=False)


def fading_of(module: nn.Module) -> Tensor | None:
    """Which entries of a layer's weight fade, bool of its shape; None where none do."""
    bits = module._buffers.get(FADING)
    return None if bits is None else unpack_bits(bits, module.get_parameter("weight").shape[1])


class Fade:
    """Shrinks the entries that fade after every step of an optimizer, until ``remove()`` or the end of a ``with``.

    Made by ``fade``.
    """

    def __init__(self, fading: dict[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer, updates: int) -> None:
        self._fading, self._left = fading, updates
        self._handle = optimizer.register_step_post_hook(lambda *_: self.apply())

    @torch.no_grad()
    def apply(self) -> None:
        """Shrinks them once: by 1 / n with n updates left, so without gradients they fall in a straight line."""
        for parameter, fading in self._fading.items():
            parameter.copy_(torch.where(fading, parameter * (1 - 1 / max(self._left, 1)), parameter))
        self._left -= 1

    def remove(self) -> None:
        """Stops; the weights stay."""
        self._handle.remove()

    def __enter__(self) -> "Fade":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def fade(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int) -> Fade:
    """Makes what the rest of the schedule will drop shrink to zero over the next updates of an optimizer.

    ``tier_iteration`` marks these entries, given the shares of the last step. A demotion that drops what has faded
    changes nothing, so the model learns to do without while the learning rate still lets it. Entries that the next
    iteration, scoring anew, keeps after all grow back. Without marked entries it does nothing::

        with sk.keep_masks(model, optimizer), fade(model, optimizer, max(0, updates_of_all_steps // 10 - done)):
            for batch in batches:
                ...

    Args:
        model: as ``tier_iteration`` left it.
        optimizer: holds its weights.
        updates: steps of the optimizer after which they are zero; it may be left, and begun anew, before that. A tenth
            of the updates of all steps did better than a half, which leaves too few of them for the final shape, and
            than no fading, which drops everything at one blow.

    Returns:
        A handle with ``remove()``, which is a context manager too.

    Raises:
        ValueError: ``updates`` is negative, or the optimizer holds none of the weights that fade.
    """
    if updates < 0:
        raise ValueError(f"updates must be from 0 on, got {updates}")
    fading = {
        module.get_parameter("weight"): found for module in model.modules() if (found := fading_of(module)) is not None
    }
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if fading and not held & fading.keys():
        raise ValueError("the optimizer holds none of the weights that fade: it was made for other parameters")
    return Fade(fading, optimizer, updates)
