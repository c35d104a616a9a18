"""The linear layers of a model that may be swapped, and what a sample shows of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._batches import Forward, as_batches, evaluating, layer_input, run_batch
from .._layers import Where, borrowed, input_dim, is_transposed
from ..nn import autocast_dtype
from . import clock
from .candidates import unfit

# More are as good as this many for a ratio, and take longer to measure.
MAX_TOKENS, MAX_GPU_TOKENS = 512, 8192

Slots = list[tuple[nn.Module, str]]


@dataclass
class LinearSite:
    """A linear layer: where it hangs, the calls it gets by token bucket, and why it must stay, if it must."""

    name: str
    layer: nn.Linear
    slots: Slots
    reason: str | None
    shape: tuple[int, int]  # (out_features, in_features)
    calls: Counter[int] = field(default_factory=Counter)


def find_sites(model: nn.Module, where: Where | None) -> list[LinearSite]:
    """Every linear layer that ``where`` selects, in the order of ``named_modules``."""
    slots, lent = parent_slots(model), borrowed(model)
    sites = []
    for name, layer in model.named_modules():
        if input_dim(layer) is None or isinstance(layer, nn.Conv2d) or (where is not None and not where(name, layer)):
            continue
        reason = unfit(layer) or lent.get(layer)
        if layer is model:
            reason = "it is the model itself: use from_linear of Linear24, TieredLinear or PrepackedLinear"
        rows, cols = layer.weight.shape
        shape = (cols, rows) if is_transposed(layer) else (rows, cols)
        sites.append(LinearSite(name, layer, slots.get(layer, []), reason, shape))
    return sites


def parent_slots(model: nn.Module) -> dict[nn.Module, Slots]:
    """The slots of every module: one that two parents share has two."""
    found: dict[nn.Module, Slots] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, attribute))
    return found


def watch(model: nn.Module, sites: list[LinearSite], sample: Any, forward: Forward | None) -> None:
    """Runs the sample once and counts the calls of each layer; rules out those that it does not suit.

    Raises:
        ValueError: there is no batch in the sample.
    """
    dtypes: dict[str, set[torch.dtype]] = {site.name: set() for site in sites}
    batches = as_batches(sample)

    def count(site: LinearSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        dtypes[site.name].add(autocast_dtype(x) or x.dtype)
        if tokens := x.shape[:-1].numel():
            site.calls[bucket(tokens, MAX_GPU_TOKENS if clock.is_gpu(site.layer.weight.device) else MAX_TOKENS)] += 1

    handles = []
    runs = 0
    try:
        for site in sites:
            if site.reason is None:
                hook = lambda _, args, kwargs, site=site: count(site, args, kwargs)  # noqa: E731
                handles.append(site.layer.register_forward_pre_hook(hook, with_kwargs=True))
        with evaluating(model):
            for batch in batches:
                run_batch(model, batch, forward)
                runs += 1
    finally:
        for handle in handles:
            handle.remove()
    if runs == 0:
        raise ValueError("sample must hold at least one batch, got none")
    for site in sites:
        if site.reason is None:
            site.reason = _ruled_out(site, dtypes[site.name] - {site.layer.weight.dtype})


def _ruled_out(site: LinearSite, other_dtypes: set[torch.dtype]) -> str | None:
    if other_dtypes:
        return f"it runs in {', '.join(sorted(map(str, other_dtypes)))}, its weight is {site.layer.weight.dtype}"
    return None if site.calls else "the sample does not run it"


def bucket(tokens: int, largest: int) -> int:
    """The power of two that a token count is measured as."""
    return min(1 << (tokens - 1).bit_length(), largest)
