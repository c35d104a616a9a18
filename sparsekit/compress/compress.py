"""Swaps linear layers for the fastest module that computes the same, never for a slower one."""

import time
from typing import Any

import torch
from torch import nn

from .._batches import Forward, Progress
from .._layers import Where, check_model
from ..nn import PrepackedLinear, RoutedLinear24
from . import clock
from .choose import Choice, Settings, choose
from .report import CompressReport, LayerReport
from .sites import LinearSite, find_sites, watch
from .swap import restore_all, swap_all

TOKENS = (1, 16, 128)  # what is measured without a sample: a decoding step, a small batch, a prompt
GPU_TOKENS = (*TOKENS, 2048)


def compress_(
    model: nn.Module,
    sample: Any = None,
    *,
    where: Where | None = None,
    forward: Forward | None = None,
    budget: float = 0.5,
    graphs: bool = False,
    keep_dense: bool = False,
    progress: Progress | None = None,
) -> CompressReport:
    """Swaps every linear layer that gets faster for the fastest module that computes the same, in place.

    The sample is run once, in eval mode and without gradients, to see how many tokens each layer gets; a layer that it
    does not reach stays. Token counts are rounded up to a power of two, at most 512 on a CPU and 8192 on a GPU. For
    every shape, dtype and count, what the layer admits is timed on this machine on random data, in turns with the plain
    layer and against each other, each after its result was checked. Where the model is larger than the last cache of
    its device, weights are timed from memory.

    *On a CPU* a layer becomes ``nn.Linear24`` where its weight is 2:4 (by its stored mask, else by its zeros),
    ``nn.TieredLinear`` where its blocks in tiers take at most 90 % of the dense bytes, as ``progressive_tiers`` and
    pruning by blocks leave them, or ``nn.PrepackedLinear`` in eval mode. It is one module for all token counts, taken
    only if its median ratio to the plain layer is at least 1.05 and it wins 80 % of the pairs, both at every count
    seen; of several the one that needs the least time over all calls of the sample. Everything is measured twice, all
    shapes and then all again, and has to win both times: a moment in which another program had a core seldom decides.
    Measure on a quiet machine all the same: whatever uses several threads looks slow on a busy one.

    *On a GPU* a layer with a 2:4 weight becomes ``nn.RoutedLinear24``, which takes by the same rule the fastest kernel
    at each count: a decode kernel, cuSPARSELt by its best algorithm and split-K, or CUTLASS. An algorithm that gave a
    wrong result once is refused. A layer stays if at some count nothing is faster; with ``keep_dense`` those counts are
    computed by a dense copy. A call takes as long as the device or the host, whichever needs longer. A layer in tiers
    becomes ``nn.TieredLinear`` where that is faster at every count.

    ``nn.Linear`` and transformers' ``Conv1D`` are swapped; layers with tied weights, hooks, parametrizations or a
    parent that reads their weight stay, and the report says why. ``decompress_`` undoes it: the same module and
    Parameter objects return. Until then the Parameters of the swapped weights are empty, without ``.grad``, and
    ``save_pretrained`` raises, because nobody could load what it would write.

    Args:
        model: any module tree. Layers that are compressed already stay as they are.
        sample: one batch (a tensor; a mapping, called as ``**``; a tuple, called as ``*``), or an iterable of batches.
            None measures at 1, 16 and 128 tokens, on a GPU at 2048 as well.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.
        forward: ``forward(model, batch)``, in place of calling the model on a batch.
        budget: seconds that one shape may be measured at one token count, both times together; 9 rounds are made each
            time however long they take.
        graphs: whether the model will run under CUDA graphs, so that what the host needs for a call does not count.
        keep_dense: whether a layer on a GPU may hold its dense weight as well, 13/8 of the bytes instead of 5/8, so
            that it gains at some token counts and loses at none. Such a layer cannot be trained.
        progress: wraps the loop over the measurements and iterates it, as ``tqdm`` does.

    Returns:
        Per layer the decision, the reason and the measured ratios; the bytes before and after.

    Raises:
        TypeError: ``model`` is not a module, or ``sample`` neither a batch nor an iterable of batches.
        ValueError: ``budget`` is not positive, or ``sample`` holds no batch.

        Whatever is raised, also by the model or by an interrupt, leaves the model as it was.
    """
    check_model(model)
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    begin = time.perf_counter()
    before = _resident_bytes(model)
    sites = find_sites(model, where)
    if sample is not None:
        watch(model, sites, sample, forward)
    free = [site for site in sites if site.reason is None]
    if sample is None:
        for site in free:
            site.calls.update(GPU_TOKENS if clock.is_gpu(site.layer.weight.device) else TOKENS)

    def evict_cache(device: torch.device) -> bool:
        return before > clock.cache_bytes(device)

    choices = choose(free, Settings(evict_cache, budget, graphs, keep_dense, progress or iter))
    tuned = time.perf_counter()
    chosen = [(site, choices[site.name].build) for site in free]
    swap_all(model, [(site, build) for site, build in chosen if build is not None])
    converted = time.perf_counter()
    layers = tuple(_layer_report(site, choices.get(site.name)) for site in sites)
    return CompressReport(layers, before, _resident_bytes(model), tuned - begin, converted - tuned)


def decompress_(model: nn.Module) -> tuple[str, ...]:
    """Undoes ``compress_``: every swapped layer is again the module object it was, with the same Parameter objects.

    Weights come back bit for bit (a -0.0 that 2:4 did not store as 0.0), with what happened since: training, loading,
    ``to(dtype)``. Masks, flags and the keys of the state dict are what they were. What ``load`` compressed
    is undone as well. A compressed layer of ``sparsekit.nn`` put there by hand becomes a new ``nn.Linear``.

    Returns:
        The names of the layers that were restored.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer put there by hand stands for one of another class than ``nn.Linear``.
    """
    check_model(model)
    return restore_all(model)


def _layer_report(site: LinearSite, choice: Choice | None) -> LayerReport:
    calls = dict(sorted(site.calls.items()))
    if choice is None:
        return LayerReport(site.name, site.shape, "plain", site.reason or "", calls)
    return LayerReport(site.name, site.shape, choice.decision, choice.reason, calls, choice.timings, choice.names)


def _resident_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, PrepackedLinear):
            tensors[id(module.packed)] = module.packed
        elif isinstance(module, RoutedLinear24):
            if module.packed is not None:
                tensors[id(module.values)] = module.packed  # which begins with them
            if module.dense is not None:
                tensors[id(module.dense)] = module.dense
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
