"""``keep_masks``: fine-tuning in which dropped weights stay zero."""

import logging
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._layers import check_model
from .._optimizers import local_part, stepping_optimizers, trained_parameters
from .._undo import Undo, undoing
from ..masks import get_mask_bits
from .masked_weight import MaskedWeight, masked_weights

logger = logging.getLogger("sparsekit")


class MaskKeeper:
    """The handle of ``keep_masks``, which keeps dropped weights at zero until ``remove()`` or the end of a ``with``.

    The optimizer's hooks keep it alive as long as the optimizer.
    """

    def __init__(self, weights: list[MaskedWeight], optimizer: Any) -> None:
        self._weights = weights
        self._optimizers = stepping_optimizers(optimizer)
        self._handles: list[RemovableHandle] = []
        self._stepping = False
        with undoing() as undo:
            undo.callback(_remove, self._handles)
            for weight in weights:
                weight.update()
                self._hook_grad(weight)
            for each in self._optimizers:
                self._handles.append(each.register_step_pre_hook(lambda *_: self._before_step()))
                self._handles.append(each.register_step_post_hook(lambda *_: self._after_step()))
            restored = self._restore(undo)
            undo.commit()
        if restored:
            logger.warning(
                "keep_masks zeroed %d weights that the stored masks drop: they were trained or merged without it",
                restored,
            )

    def apply(self) -> None:
        """Zeroes the dropped entries of the weights, and of the optimizer's states that have a weight's shape.

        Call it after anything but the optimizer has written to the weights: for instance, a checkpoint or an average of
        weights was copied in, or a wrapper of the optimizer changes weights itself.

        Raises:
            ValueError: a parameter was replaced since ``keep_masks`` was called, or has lost its mask.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._follow()
        with undoing() as undo:
            self._restore(undo)
            undo.commit()

    def remove(self) -> None:
        """Stops keeping the masks; the weights and the masks stored in the model stay.

        Raises:
            ValueError: a dropped weight is not zero, because something other than the optimizer wrote it.
        """
        if self._handles:
            _remove(self._handles)
            self._check([weight for weight in self._weights if weight.bits is get_mask_bits(weight.module, weight.key)])

    def __enter__(self) -> "MaskKeeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.remove()
        else:
            _remove(self._handles)

    def _hook_grad(self, weight: MaskedWeight) -> None:
        """Masks the parameter's gradient as soon as it is accumulated, unless the parameter is frozen."""
        if not weight.parameter.requires_grad or weight.hooked is weight.parameter:
            return
        # Weak, so that the hook does not keep this object alive after its optimizer is gone.
        keeper = weakref.ref(self)

        @torch.no_grad()
        def mask_grad(parameter: Tensor) -> None:
            if keeper() is not None and weight.bits is get_mask_bits(weight.module, weight.key):
                weight.drop_grad()
                weight.is_grad_masked = True

        self._handles.append(handle := weight.parameter.register_post_accumulate_grad_hook(mask_grad))
        weakref.finalize(self, handle.remove).atexit = False
        weight.hooked = weight.parameter

    @torch.no_grad()
    def _before_step(self) -> None:
        # A step may call the step of its base class or of a wrapped optimizer after it has written weights itself, so
        # only the outer one is checked.
        if not self._stepping and not torch.compiler.is_compiling():
            self._follow()
            self._check(self._weights)
            for weight in self._weights:
                if not weight.is_grad_masked:  # no backward pass has made it, or the mask is newer
                    weight.drop_grad()
                weight.is_grad_masked = False
            self._stepping = True

    def _follow(self) -> None:
        """Looks up the parameters and masks again, which may have been replaced."""
        held = None
        for weight in self._weights:
            if (found := weight.current) is not weight.parameter:
                held = held or trained_parameters(self._optimizers)
                if found is None or found not in held:
                    raise ValueError(
                        f"{weight.name} has another parameter than when keep_masks was called, and the optimizer does "
                        "not hold it: make a new optimizer and call keep_masks again"
                    )
                weight.parameter, weight.bits = found, None
            if weight.update():
                weight.is_grad_masked = False
                self._restore_weight(weight, Undo())
            self._hook_grad(weight)  # the parameter may have been frozen until now

    @torch.no_grad()
    def _after_step(self) -> None:
        self._stepping = False
        for weight in self._weights:
            weight.drop(weight.parameter)

    @torch.no_grad()
    def _check(self, weights: list[MaskedWeight]) -> None:
        """Raises ValueError if a dropped weight is not zero. Does nothing while a CUDA graph is captured.

        Waits for the GPU once.
        """
        device = weights[0].dropped.device if weights else None
        if device is None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        broken = torch.stack([weight.broken().to(device) for weight in weights]).tolist()
        for weight, is_broken in zip(weights, broken, strict=True):
            if is_broken:
                count, total = weight.count()
                raise ValueError(
                    f"{count} of {total} dropped weights of {weight.name} are not zero any more: something else than "
                    "the step of the optimizer given to keep_masks wrote them (a wrapper that moves weights itself, "
                    "another optimizer, an average or a checkpoint copied in); call apply() of what keep_masks "
                    "returned after every such write"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore(self, undo: Undo) -> int:
        """Zeroes the dropped entries of weights and states; returns how many weights were not zero.

        ``undo`` records how to revert it.
        """
        restored = 0
        for weight in self._weights:
            restored += self._restore_weight(weight, undo)
        torch.clear_autocast_cache()
        return restored

    def _restore_weight(self, weight: MaskedWeight, undo: Undo) -> int:
        count, _ = weight.count()
        for tensor in (weight.parameter, *self._states(weight)):
            part = local_part(tensor).detach()  # so that undo can write to it while gradients are on
            lost = part[weight.dropped]
            if lost.any():
                undo.callback(part.masked_scatter_, weight.dropped, lost)
                weight.drop(part)
        return count

    def _states(self, weight: MaskedWeight) -> list[Tensor]:
        """Returns the states of the optimizers that have the weight's shape.

        Quantized states are left out. That does no harm: an entry for a dropped weight changes only this weight, which
        is zeroed after every step.
        """
        states = [state for each in self._optimizers for state in each.state.get(weight.parameter, {}).values()]
        parts = [local_part(state) for state in states if isinstance(state, Tensor)]
        return [part for part in parts if type(part) is Tensor and part.shape == weight.dropped.shape]


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles[-1].remove()
        handles.pop()


def keep_masks(model: nn.Module, optimizer: Any) -> MaskKeeper:
    """Makes an optimizer train only the weights that the stored masks keep.

    Gradients are masked as soon as they are accumulated, so that clipping and logging see the gradients that are used.
    Dropped weights are zeroed after every step, whatever the optimizer does to them. The call itself zeroes them too,
    and their moments in the optimizer, which may be older than the masks: if dropped weights were trained or merged
    without their mask, they lose their values, and a warning is logged. The masks are those that ``prune_`` stored, so
    a kept weight that is zero trains like the others. If a mask is replaced later, the new one is used from then on.
    Call it when the model is on its device::

        with sk.keep_masks(model, optimizer):
            for batch in batches:
                ...

    The model may be wrapped by DDP, ``torch.compile`` or accelerate, or sharded by ``fully_shard`` before the optimizer
    is made. The optimizer may be wrapped too, as by ``Accelerator.prepare``. If anything else writes to dropped
    weights, such as a wrapper that changes weights after the optimizer's step, the next step raises before it begins,
    and so does the end of the ``with``.

    Make an average of weights (``AveragedModel``) after pruning. One that was made before has neither the masks nor
    the zeros, and with ``use_buffers=True`` torch pairs its buffers with the wrong buffers of the model.

    The unpacked masks take one byte per weight that this process holds. Every step takes two more passes over the
    weights, and waits for a GPU once.

    Args:
        model: a model whose layers have stored masks.
        optimizer: any torch optimizer over the model's parameters, new or used, or a wrapper of one. Quantized states
            are left as they are.

    Returns:
        A handle with ``remove()`` and ``apply()``, which is also a context manager.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` is neither a torch optimizer nor a wrapper of one.
        ValueError: no layer has a mask; a layer with a mask is compressed, has changed its shape, has a computed or
            quantized weight, or is on the meta device; the model is flattened by ``FullyShardedDataParallel``; or the
            optimizer holds none of the masked weights: they are frozen, or it holds copies of them, as DeepSpeed's
            does. Nothing is changed in these cases.
    """
    check_model(model)
    held = trained_parameters(stepping_optimizers(optimizer))
    weights = masked_weights(model, held)
    if not weights:
        raise ValueError("no layer of the model has a stored mask: prune_ it, or load a checkpoint that has masks")
    if not any(weight.parameter in held for weight in weights):
        if not any(weight.parameter.requires_grad for weight in weights):
            raise ValueError(
                "the optimizer holds none of the masked weights, which are all frozen (requires_grad is False): they "
                "stay as they are without keep_masks"
            )
        raise ValueError(
            "the optimizer holds none of the masked weights: it was made for other parameters, or holds copies of "
            "them, as DeepSpeed's does"
        )
    return MaskKeeper(weights, optimizer)
