"""Runs batches through a model, and counts the sizes of the inputs that each layer gets."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from .._batches import Forward, as_batches, layer_input, observing, run_batch
from .._forwards import around_forwards, watch_reads
from .._trees import copied
from ..nn.common import autocast_dtype
from .sites import LayerSite, must_stay_reason, other_dtype_reason
from .sizes import Size, size_of

MAX_BATCHES = 4  # that the whole model is timed on
MAX_SIZES = 8  # of the images that a convolution gets; each is measured


def watch(model: nn.Module, sites: list[LayerSite], batches: Any, forward: Forward | None) -> list[Any]:
    """Runs the batches once and counts the calls of each layer; rules out layers that cannot be swapped.

    Returns:
        At most four batches: those that gave layers inputs of sizes that no batch before them did.

    Raises:
        ValueError: there is no batch.
    """
    dtypes: dict[str, set[torch.dtype]] = {site.name: set() for site in sites}
    counts: set[tuple[str, Size]] = set()
    kept: list[Any] = []

    def count(site: LayerSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        dtypes[site.name].add(autocast_dtype(x) or x.dtype)
        if (size := size_of(site.layer, x)) is not None:
            site.calls[size] += 1
            counts.add((site.name, size))

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
            or _many_sizes_reason(site)
        )
    return kept


def _many_sizes_reason(site: LayerSite) -> str | None:
    """Returns why a convolution is not measured: its images have too many sizes; None if they have few."""
    many = isinstance(site.layer, nn.Conv2d) and len(site.calls) > MAX_SIZES
    return f"its images have {len(site.calls)} sizes, and at most {MAX_SIZES} are measured" if many else None


def _watching(sites: list[LayerSite], count: Callable[..., None]) -> AbstractContextManager[None]:
    """Calls ``count`` with the arguments of every call of these layers."""

    def around(site: LayerSite) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            count(site, args, kwargs)
            return forward(*args, **kwargs)

        return run

    return around_forwards({site.layer: around(site) for site in sites})
