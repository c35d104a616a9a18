"""Tells the real tokens of a layer's input from padding, which only fills up a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import PrunableLayer

TokenMask = Callable[[Any], Tensor | None]
ENCODER, DECODER = "attention_mask", "decoder_attention_mask"


def real_tokens(x: Tensor, layer: PrunableLayer, batch: Any, token_mask: TokenMask | None = None) -> Tensor:
    """Returns the part of a layer's input that is not padding; ``x`` itself if all of it is real.

    A mask is ``[batch, tokens]``, and 0 marks padding. Of inputs ``[batch, tokens, ...]``, ``[tokens, batch, ...]`` and
    ``[batch * tokens, inputs]``, the result is ``[real tokens, ...]``. Of other inputs, everything counts except
    sentences without any real token. Masks of another shape tell which tokens attend to which, and are not used.

    Args:
        x: the input that the layer was called with.
        layer: the layer. If its name contains ``decoder`` and both masks have the same shape, the decoder's is used.
        batch: the batch that the model was called with. If it is a mapping, its ``attention_mask`` and
            ``decoder_attention_mask`` are the masks.
        token_mask: ``token_mask(batch)`` returns the mask instead.

    Raises:
        TypeError, ValueError: ``token_mask`` returns something else, or a mask has negative entries.
    """
    masks = _masks(batch, token_mask)
    order = (DECODER, ENCODER) if "decoder" in layer.name.split(".") else (ENCODER, DECODER)
    known = [masks[side].to(x.device) for side in order if side in masks]
    for mask in known:
        if not isinstance(layer.module, nn.Conv2d) and (found := _select(x, mask)) is not None:
            return found
    for mask in known:
        if x.dim() > 1 and len(x) == len(mask) and not (sentences := mask.any(1)).all():
            return x[sentences]
    return x


def _select(x: Tensor, mask: Tensor) -> Tensor | None:
    """Returns the rows that a mask keeps; None if the input is not made of its tokens."""
    for kept in (mask, mask.t(), mask.flatten()):
        if x.dim() > kept.dim() and x.shape[: kept.dim()] == kept.shape and (x.dim() == 2 or kept.dim() == 2):
            return x if kept.all() else x[kept]
    return None


def _masks(batch: Any, token_mask: TokenMask | None) -> dict[str, Tensor]:
    if token_mask is not None:
        mask = token_mask(batch)
        if mask is None:
            return {}
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"token_mask must return a tensor [batch, tokens] or None, got {got}")
        return {ENCODER: _real("token_mask", mask)}
    if not isinstance(batch, Mapping):
        return {}
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() == 2}
    masks = {side: _real(side, tensors[side]) for side in (ENCODER, DECODER) if side in tensors}
    if DECODER not in batch and "decoder_input_ids" in tensors:
        masks[DECODER] = torch.ones_like(tensors["decoder_input_ids"], dtype=torch.bool)
    return masks


def _real(name: str, mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool and bool((mask < 0).any()):
        raise ValueError(f"{name} has negative entries, and 0 should mark padding: pass token_mask=lambda batch: ...")
    return mask != 0
