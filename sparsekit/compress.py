"""Swaps linear layers for the fastest module that computes the same, never for a slower one."""

import time
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from . import tune
from ._batches import Forward
from ._choose import Choice, Progress, choose, layout_tokens
from ._sites import Places, Site, find_sites, places, watch
from .compress_report import CompressReport, LayerReport
from .masks import remove_mask
from .nn import Linear24, PrepackedLinear, carry_mask
from .providers import Provider, is_transposed
from .prune.layers import Where

TOKENS = (1, 16, 128)  # what is measured without a sample: a decoding step, a small batch, a prompt

Replacement = Linear24 | PrepackedLinear


@dataclass(frozen=True)
class Replaced:
    """The layer that a module stands for, emptied; a plain object, so that ``nn.Module`` does not register it."""

    layer: nn.Linear


def compress_(
    model: nn.Module,
    sample: Any = None,
    *,
    where: Where | None = None,
    forward: Forward | None = None,
    budget: float = 0.5,
    progress: Progress | None = None,
) -> CompressReport:
    """Swaps every linear layer that gets faster for the fastest module that computes the same, in place.

    The sample is run once, in eval mode and without gradients, to see how many tokens each layer gets; a layer that it
    does not reach stays. Token counts are rounded up to a power of two, at most 512. For every shape, dtype and count
    the providers that the layer admits are timed on this machine on random data, in turns with the plain layer and
    against each other, each after its result was checked: ``nn.Linear24`` where the weight is 2:4 (by its stored mask,
    else by its zeros), and ``nn.PrepackedLinear`` in eval mode. Where the model is larger than the last-level cache,
    weights are timed from memory.

    A provider is taken only if its median ratio to the plain layer is at least 1.05 and it wins 80 % of the pairs, both
    at every token count seen; of several the one that needs the least time over all calls of the sample. So a layer
    that would gain at one count and lose at another stays. Measure on a quiet machine: where other programs take the
    cores, whatever uses several threads looks slow, and layers stay that need not. ``nn.Linear`` and transformers'
    ``Conv1D`` are swapped; layers with tied weights, hooks, parametrizations or a parent that reads their weight stay,
    and the report says why.

    ``decompress_`` undoes it: the same module and Parameter objects return. Until then the Parameters of the swapped
    weights are empty, without ``.grad``, and ``save_pretrained`` raises, because nobody could load what it would write.

    Args:
        model: any module tree. Layers that are compressed already stay as they are.
        sample: one batch (a tensor; a mapping, called as ``**``; a tuple, called as ``*``), or an iterable of batches.
            None measures at 1, 16 and 128 tokens.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.
        forward: ``forward(model, batch)``, in place of calling the model on a batch.
        budget: seconds that one shape may be measured at one token count; 9 rounds are made however long they take.
        progress: called as ``progress(done, total, what)`` before each measurement and at the end.

    Returns:
        Per layer the decision, the reason and the measured ratios; the bytes before and after.

    Raises:
        TypeError: ``sample`` is neither a batch nor an iterable of batches.
        ValueError: ``budget`` is not positive, or ``sample`` holds no batch.

        Whatever is raised, also by the model or by an interrupt, leaves the model as it was.
    """
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
            site.calls.update(TOKENS)
    choices = choose(free, before > tune.last_level_cache(), budget, progress)
    tuned = time.perf_counter()
    _swap_all(model, [(site, chosen) for site in free if (chosen := choices[site.name].provider) is not None])
    converted = time.perf_counter()
    layers = tuple(_layer_report(site, choices.get(site.name)) for site in sites)
    return CompressReport(layers, before, _resident_bytes(model), tuned - begin, converted - tuned)


def decompress_(model: nn.Module) -> tuple[str, ...]:
    """Undoes ``compress_``: every swapped layer is again the module object it was, with the same Parameter objects.

    Weights come back bit for bit (a -0.0 that 2:4 did not store as 0.0), with what happened since: training, loading,
    ``to(dtype)``. Masks, flags and the keys of the state dict are what they were. A ``Linear24`` or ``PrepackedLinear``
    that came from elsewhere, such as ``load``, becomes a new ``nn.Linear``.

    Returns:
        The names of the layers that were restored.

    Raises:
        ValueError: a layer from elsewhere stands for one of another class than ``nn.Linear``.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Replacement) and name}
    for name, module in found.items():
        if module.transposed and "replaced" not in module.__dict__:
            raise ValueError(f"layer {name!r} stands for a layer of an unknown class: load the model with dense=True")
    hangs = places(model)
    done: list[Replacement] = []
    try:
        for module in found.values():
            done.append(module)
            _restore(module, hangs[module])
    except BaseException:
        for module in done:
            _hang(module, hangs[module])
            if "replaced" in module.__dict__:
                _empty(module.__dict__["replaced"].layer)
        raise
    guard_saving(model)
    return tuple(found)


def guard_saving(model: nn.Module) -> None:
    """Makes ``save_pretrained`` raise wherever the model has it above a compressed layer, and nowhere else."""
    for parent in model.modules():
        if not callable(getattr(parent, "save_pretrained", None)):
            continue
        if any(isinstance(module, Replacement) for module in parent.modules()):
            parent.__dict__["save_pretrained"] = refuse_save_pretrained
        elif parent.__dict__.get("save_pretrained") is refuse_save_pretrained:
            del parent.__dict__["save_pretrained"]


def _layer_report(site: Site, choice: Choice | None) -> LayerReport:
    calls = dict(sorted(site.calls.items()))
    if choice is None:
        return LayerReport(site.name, site.shape, "plain", site.reason or "", calls)
    decision = "plain" if choice.provider is None else choice.provider.name
    return LayerReport(site.name, site.shape, decision, choice.reason, calls, choice.timings)


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for ``save_pretrained`` of a compressed model.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "save_pretrained cannot write a compressed model, because nothing could load it: "
        "use sparsekit.save, or call sparsekit.decompress_ first"
    )


def _swap_all(model: nn.Module, chosen: list[tuple[Site, Provider]]) -> None:
    done: list[tuple[Replacement, Site, torch.Tensor | None]] = []
    try:
        for site, provider in chosen:
            module = provider.build(site.layer, layout_tokens(site), is_transposed(site.layer))
            module.__dict__["replaced"] = Replaced(site.layer)
            done.append((module, site, site.layer.weight.grad))
            _hang(module, site.places)
            _empty(site.layer)
        guard_saving(model)
    except BaseException:
        for module, site, grad in done:
            _restore(module, site.places)
            site.layer.weight.grad = grad
        guard_saving(model)
        raise


def _hang(module: nn.Module, hangs: Places) -> None:
    for parent, attribute in hangs:
        parent._modules[attribute] = module


def _empty(layer: nn.Linear) -> None:
    """Gives the weight's memory back; its Parameter stays, for whoever holds it."""
    layer.weight.grad = None
    layer.weight.data = layer.weight.data.new_empty(0)
    remove_mask(layer)


def _restore(module: Replacement, hangs: Places) -> None:
    layer = dense = module.to_linear()
    if "replaced" in module.__dict__:
        layer = module.__dict__["replaced"].layer
        weight = dense.weight.detach().t().contiguous() if module.transposed else dense.weight.detach()
        if weight.device.type == layer.weight.device.type:
            layer.weight.data = weight
        else:
            layer.weight = nn.Parameter(weight)
        layer.weight.requires_grad_(dense.weight.requires_grad)
        layer.register_parameter("bias", module.bias)
        layer.training = module.training
        carry_mask(module, layer)
    _hang(layer, hangs)


def _resident_bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tensors |= {id(module): module.packed for module in model.modules() if isinstance(module, PrepackedLinear)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
