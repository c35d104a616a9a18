"""Runs batches through a model, and counts the tokens that each linear layer gets."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .. import _timing
from .._batches import Forward, as_batches, layer_input, observing, run_batch
from .._forwards import around_forwards, watch_reads
from .._trees import copied
from ..nn.common import autocast_dtype
from .sites import LinearSite, must_stay_reason, other_dtype_reason

# More are as good as this many for a ratio, and take longer to measure.
MAX_TOKENS, MAX_GPU_TOKENS = 512, 8192
MAX_BATCHES = 4  # that the whole model is timed on


def watch(model: nn.Module, sites: list[LinearSite], batches: Any, forward: Forward | None) -> list[Any]:
    """Runs the batches once and counts the calls of each layer; rules out layers that cannot be swapped.

    Returns:
        At most four batches: those that gave layers token counts that no batch before them did.

    Raises:
        ValueError: there is no batch.
    """
    dtypes: dict[str, set[torch.dtype]] = {site.name: set() for site in sites}
    counts: set[tuple[str, int]] = set()
    kept: list[Any] = []

    def count(site: LinearSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        dtypes[site.name].add(autocast_dtype(x) or x.dtype)
        if tokens := sum(part.shape[:-1].numel() for part in (x.unbind() if x.is_nested else [x])):
            site.calls[found := bucket(tokens, site.layer.weight.device)] += 1
            counts.add((site.name, found))

    runs = 0
    free = [site for site in sites if site.reason is None]
    with observing(model), _watching(free, count), watch_reads(model, [site.layer for site in free]) as reads:
        for batch in as_batches(batches):
            known = len(counts)
            run_batch(model, copied(batch), forward)
            runs += 1
            if len(counts) > known and len(kept) < MAX_BATCHES:
                kept.append(batch)
    if runs == 0:
        raise ValueError("batches must hold at least one batch, got none")
    for site in free:  # a pass may also have changed the layer, by a hook of its own for one
        site.reason = (
            must_stay_reason(site.layer)
            or reads.get(site.layer)
            or other_dtype_reason(site.layer, dtypes[site.name])
            or (None if site.calls else "the batches do not run it")
        )
    return kept


def bucket(tokens: int, device: torch.device) -> int:
    """Returns the power of two that a token count is rounded up to, within the limit of a device."""
    return min(1 << (tokens - 1).bit_length(), MAX_GPU_TOKENS if _timing.is_gpu(device) else MAX_TOKENS)


def _watching(sites: list[LinearSite], count: Callable[..., None]) -> AbstractContextManager[None]:
    """Calls ``count`` with the arguments of every call of these layers."""

    def around(site: LinearSite) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            count(site, args, kwargs)
            return forward(*args, **kwargs)

        return run

    return around_forwards({site.layer: around(site) for site in sites})
