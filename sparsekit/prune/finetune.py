"""Fine-tuning with the masks kept as they are."""

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..masks import check_masks, get_mask, get_mask_info
from ..nn import Compressed


class MaskKeeper:
    """Keeps dropped weights at zero while an optimizer trains a model, until ``remove()`` or the end of a ``with``.

    Made by ``keep_masks``.
    """

    def __init__(self, dropped: dict[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._dropped = dropped
        self._optimizer = optimizer
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._mask_grad)
            for parameter in dropped
            if parameter.requires_grad
        ]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.apply()))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes what the masks drop in the weights, and in every optimizer state of a weight's shape."""
        for parameter, dropped in self._dropped.items():
            parameter.masked_fill_(dropped, 0)
            for state in self._optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == dropped.shape:
                    state.masked_fill_(dropped, 0)

    def remove(self) -> None:
        """Stops keeping the masks; the weights, and the masks stored in the model, stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "MaskKeeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _mask_grad(self, parameter: Tensor) -> None:
        # Filled, not multiplied: an overflow that a gradient scaler is about to skip would leave NaN in place of 0.
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self._dropped[parameter], 0)  # type: ignore[index]


def keep_masks(model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskKeeper:
    """Makes an optimizer train only what the stored masks keep.

    Gradients are masked as soon as they are accumulated, so that clipping and logging see what is trained; weights
    and optimizer moments are masked after every step, and once now, in case the optimizer is older than the masks.
    The masks are those that ``prune_`` stored: a kept weight that is zero still trains. Unpacked once, they take one
    byte per weight. Call it when the model is on its device::

        with sk.keep_masks(model, optimizer):
            for batch in batches:
                ...

    Args:
        model: has layers with stored masks.
        optimizer: any torch optimizer over the model's parameters, new or used.

    Returns:
        A handle with ``remove()``, which is a context manager too.

    Raises:
        ValueError: no layer has a mask, one that has is compressed or has changed its shape since, or the optimizer
            holds none of the masked weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, Compressed) and get_mask_info(module) is not None:
            raise ValueError(f"layer {name!r} is compressed: call decompress_ first, then make the optimizer")
    check_masks(model)
    dropped = {
        weight: ~mask
        for module in model.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and (mask := get_mask(module)) is not None
    }
    if not dropped:
        raise ValueError("no layer of the model has a stored mask: prune_ it, or load a checkpoint that has masks")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in dropped):
        raise ValueError("the optimizer holds none of the masked weights: it was made for other parameters")
    return MaskKeeper(dropped, optimizer)
