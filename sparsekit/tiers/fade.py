"""Fading: entries that later steps will drop shrink to zero during fine-tuning, so that dropping them does no harm."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .._optimizers import local_part, local_part_of, stepping_optimizers, trained_parameters
from .._state import FADING, get_bits, remove_bits, set_bits
from .._undo import undoing
from ..ops import pack_bits, unpack_bits


def mark_fading(module: nn.Module, fading: Tensor | None) -> None:
    """Stores which entries of a layer's weight fade, as bits like its mask; None removes what is stored."""
    remove_bits(module, FADING)
    if fading is not None:
        set_bits(module, FADING, pack_bits(fading))


def fading_of(module: nn.Module) -> Tensor | None:
    """Returns which entries of a layer's weight fade, bool of the weight's shape; None if nothing is stored."""
    bits = get_bits(module, FADING)
    return None if bits is None else unpack_bits(bits, module.get_parameter("weight").shape[1])


class Fade:
    """The handle of ``fade``: shrinks the marked entries after each step, until ``remove()`` or the ``with`` ends."""

    def __init__(self, fading: dict[nn.Parameter, Tensor], optimizer: Optimizer, updates: int) -> None:
        self._fading, self._left, self._due = fading, updates, False
        self._handles: list[RemovableHandle] = []
        with undoing() as undo:
            undo.callback(self.remove)
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: setattr(self, "_due", True)))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))
            undo.commit()

    @torch.no_grad()
    def apply(self) -> None:
        """Shrinks the marked entries by 1 / n if n updates are left, so that without gradients they fall linearly."""
        for parameter, fading in self._fading.items():
            part = local_part(parameter)
            part.copy_(torch.where(fading, part * (1 - 1 / max(self._left, 1)), part))
        self._left -= 1

    def remove(self) -> None:
        """Stops shrinking; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()

    def _after_step(self) -> None:
        if self._due:  # a step that calls the step of its base class runs this hook twice
            self._due = False
            self.apply()

    def __enter__(self) -> "Fade":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def fade(model: nn.Module, optimizer: Any, updates: int) -> Fade:
    """Shrinks the entries that the rest of the schedule will drop to zero over the next updates of an optimizer.

    ``tier_iteration`` marks these entries if it knows the shares of the last step (``TierOptions.goal``). Dropping
    entries that have faded does not change the model, so it learns to do without them while the learning rate is still
    high enough. If the next iteration keeps some of them after all, they grow back. Without marked entries this does
    nothing::

        with sk.keep_masks(model, optimizer), fade(model, optimizer, max(0, updates_of_all_steps // 10 - done)):
            for batch in batches:
                ...

    Args:
        model: a model that ``tier_iteration`` has pruned.
        optimizer: an optimizer of its weights, or a wrapper of one, as for ``keep_masks``.
        updates: steps of the optimizer until the entries are zero; fading may be stopped before that and started again
            with the rest. A tenth of all updates worked better than a half, which leaves too few updates for the
            final masks, and better than no fading, which drops everything at once.

    Returns:
        A handle with ``remove()``, which is also a context manager.

    Raises:
        TypeError: ``optimizer`` is neither a torch optimizer nor a wrapper of one.
        ValueError: ``updates`` is negative, or the optimizer holds none of the weights that fade.
    """
    if updates < 0:
        raise ValueError(f"updates must be from 0 on, got {updates}")
    optimizers = stepping_optimizers(optimizer)
    fading = {
        (weight := module.get_parameter("weight")): local_part_of(found, weight)
        for module in model.modules()
        if (found := fading_of(module)) is not None
    }
    if fading and not trained_parameters(optimizers) & fading.keys():
        raise ValueError("the optimizer holds none of the weights that fade: it was made for other parameters")
    return Fade(fading, optimizers[0], updates)
