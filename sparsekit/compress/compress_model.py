"""Swaps layers for the fastest module that computes the same, never for a slower one."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import _timing
from .._batches import Forward, Progress
from .._layers import Where, check_model
from .._undo import Undo, change, restoring
from ..nn import Compressed
from ..nn.common import autocast_dtype
from .change import LayerError, OutputChange, output_change, output_errors, weight_errors
from .choose import OBJECTIVES, Choice, choose
from .forms import try_forms
from .lossy import Precision, check_precision
from .measure import Measure
from .memory import resident_bytes
from .report import CompressReport, layer_report
from .sites import LayerSite, find_sites, other_dtype_reason
from .sizes import bucket
from .swap import Swap, restore_all
from .trial import Objective
from .watch import watch
from .whole import Passes, judge

TOKENS = (1, 16, 128)  # measured without batches: a decoding step, a small batch, a prompt
GPU_TOKENS = (*TOKENS, 2048)


def compress_(
    model: nn.Module,
    batches: Any = None,
    *,
    where: Where | None = None,
    forward: Forward | None = None,
    objective: Objective = "speed",
    keep_dense: bool = False,
    precision: Precision | None = None,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Swaps every Linear and Conv2d that gets faster for the fastest module that computes the same, in place.

    **What is measured.** The batches run once, in eval mode and without gradients, to see how many tokens each layer
    gets; a layer that they do not reach stays. Token counts are rounded up to a power of two, at most 512 on a CPU and
    8192 on a GPU. For every shape, dtype and count, each form that the layer could take is timed on this machine on
    random data, in turns with the plain layer, after its result was checked. Where the model is larger than the last
    cache of its device, weights are timed from memory. On a CPU all is measured twice, and has to win both times.

    **On a CPU** a layer becomes ``nn.Linear24`` where its weight is 2:4 (by its stored mask, else by its zeros), or
    in eval mode ``nn.ArrangedLinear24``, the same in the layout that is fastest for its token counts;
    ``nn.TieredLinear`` where its blocks in tiers take at most 90 % of the dense bytes, as ``progressive_tiers`` and
    pruning by blocks leave them, or ``nn.PrepackedLinear`` in eval mode, which is dense. It is taken only if its median
    ratio to the plain layer is at least 1.05 and it wins 80 % of the pairs, both at every count. Of several, the one
    that needs the least time over all calls in the batches is taken; of those as fast, the smallest.

    **A convolution** (``nn.Conv2d`` in float32, on a CPU) becomes by the same rule ``nn.Conv2d24`` where its weight is
    2:4 along the input channels at every tap, or in eval mode ``nn.ArrangedConv2d24``, the same in row pairs, or
    ``nn.PrepackedConv2d``. It is measured on images of the sizes that the batches give it, at most 8, their number
    rounded up to a power of two but to no more than have 4096 positions together, in the memory format that they have:
    ``model.to(memory_format=torch.channels_last)`` may be faster, and is up to the caller. Without batches it stays.

    **On a GPU** a layer with a 2:4 weight becomes ``nn.RoutedLinear24``, which takes by the same rule the fastest
    kernel at each count: a decode kernel, cuSPARSELt by its best algorithm and split-K, or CUTLASS. An algorithm that
    gave a wrong result once is refused. A call takes as long as the device or the host, whichever needs longer. A layer
    in tiers becomes ``nn.TieredLinear`` where that is faster.

    **The whole model** is then timed on up to four of the batches, compressed and plain in turns: what makes a pass
    slower, or fail, is given back. Then one form for all layers is tried in place of what was chosen for each, of the
    two that are most promising by the times of layers, and taken if it makes a pass 3 % faster, twice: a layer alone
    does not show what of the model stays in the cache. Without batches there is no pass to time.

    **A busy machine.** Where two measurements disagree, or one spreads by more than half of itself, and the passes of
    the whole model do not settle it either, the layer stays and the report says "undecided": run again on a quiet
    machine. Steady measurements are remembered for next time in
    ``~/.cache/sparsekit/tune`` (``$XDG_CACHE_HOME/sparsekit/tune``); the environment variable
    ``SPARSEKIT_TUNE_CACHE`` names another folder, or switches that off if it is 0.

    **A lower precision** changes what the model computes, so it is opt-in: with ``precision="int8"`` a layer may also
    become ``nn.QuantizedLinear24`` where its weight is 2:4, or ``nn.Int8Linear``, PyTorch's dense 8-bit product; with
    ``"int4"`` also a ``QuantizedLinear24`` of 4 bits, of the kind (``"int4"`` or ``"nf4"``) that changes the weight
    less. The kernels are checked against what the quantized layer should compute. The report has the error of every
    such layer on its own inputs, and how much the outputs of the whole model change on up to four of the batches. The
    weights as they were are not kept: ``decompress_`` returns the rounded ones.

    ``nn.Linear``, ``nn.Conv2d`` and transformers' ``Conv1D`` are swapped; layers with tied weights, hooks,
    parametrizations or a parent that reads their weight stay, and the report says why. ``decompress_`` undoes it: the
    same module and Parameter objects return. Until then the Parameters of the swapped weights are empty, without
    ``.grad``, and ``save_pretrained`` of transformers and diffusers writes the swapped layers as they are, for
    ``from_pretrained`` where sparsekit is imported. While it works, both forms of the swapped weights are in memory.

    Args:
        model: any module tree. Layers that are compressed already stay as they are.
        batches: one batch (a tensor; a mapping, called as ``**``; a tuple, called as ``*``), or an iterable of batches.
            The model runs on copies of them.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.
        forward: ``forward(model, batch)``, in place of calling the model on a batch.
        objective: ``"speed"`` takes what is fastest. ``"size"`` takes the smallest form that is not slower than the
            plain layer, at a ratio of at least 0.97 at every count.
        keep_dense: whether a sparse layer may hold its dense weight as well, to use it at those token counts at which
            dense is faster: it then gains at some and loses at none, for 13/8 of the bytes instead of 5/8. It is an
            ``nn.RoutedLinear24`` or ``nn.RoutedTieredLinear`` then. Without it
            one token count at which the layer loses is a veto. Such a layer cannot be trained.
        precision: ``"int8"`` allows forms with weights and inputs of 8 bits, ``"int4"`` 2:4 weights of 4 bits too.
            None, the default, allows none that change what a layer computes by more than rounding.
        measure: the token counts, the time for measuring and whether CUDA graphs are used; None for ``Measure()``.
        progress: wraps the loop over the measurements and iterates it, as ``tqdm`` does.

    Returns:
        Per layer the decision, the reason and the measured ratios; the ratios of the whole model; the bytes before
        and after.

    Raises:
        TypeError: ``model`` is not a module, ``batches`` neither a batch nor an iterable of batches, or ``measure`` no
            ``Measure``.
        ValueError: ``batches`` is empty, there is no such ``objective`` or ``precision``, ``keep_dense`` is asked for
            with ``objective="size"``, or the model is, or holds, a ``DistributedDataParallel``.
        RuntimeError: the model is being changed already, here or in another thread.

        Whatever is raised, also by the model or by an interrupt, leaves the model as it was.
    """
    check_model(model)
    measure = Measure() if measure is None else measure
    _check(model, objective, measure, keep_dense=keep_dense)
    check_precision(precision)
    counts = None if measure.tokens is None else tuple(measure.tokens)
    before = resident_bytes(model)

    def work(undo: Undo) -> CompressReport:
        begin = time.perf_counter()
        sites = find_sites(model, where)
        kept = [] if batches is None else watch(model, sites, batches, forward)
        for site in sites:
            if site.reason is None:
                _count(site, counts or (None if batches is None else ()))
        free = [site for site in sites if site.reason is None]
        with own_tensors(free):
            choices = choose(
                free,
                objective,
                measure,
                keep_dense=keep_dense,
                precision=precision,
                evict_cache=lambda device: before > _timing.cache_bytes(device),
                progress=progress or iter,
            )
        chosen = time.perf_counter()
        swap = Swap(model, {site.name: site for site in free})
        undo.callback(swap.undo)

        def build(choices: Mapping[str, Choice]) -> dict[str, Compressed]:
            with own_tensors(free):
                taken = {name: choice for name, choice in choices.items() if choice.candidate is not None}
                return {name: choice.build(swap.sites[name].layer) for name, choice in taken.items()}

        modules = build(choices)
        packed = time.perf_counter()
        passes = Passes(kept, forward, measure.budget, measure.graphs)
        verdict = judge(swap, choices, modules, passes)
        if objective == "speed" and counts is None:
            verdict = try_forms(swap, verdict, passes, build)
        modules = verdict.modules
        errors, effect = _changes(swap, modules, None if verdict.remark else passes)
        judged = time.perf_counter()
        swap.show(modules)
        layers = tuple(
            layer_report(site, verdict.choices.get(site.name), modules.get(site.name), errors.get(site.name))
            for site in sites
        )
        report = CompressReport(
            layers,
            bytes_before=before,
            bytes_after=resident_bytes(model),
            tune_seconds=chosen - begin + judged - packed,
            conversion_seconds=packed - chosen,
            passes=verdict.timings,
            remark=verdict.remark,
            forms=dict(verdict.forms),
            change=effect,
        )
        with own_tensors(free):
            swap.commit(modules)
        return report

    return change(model, "compressed", work)


def decompress_(model: nn.Module) -> tuple[str, ...]:
    """Undoes ``compress_``: every swapped layer is again the module object it was, with the same Parameter objects.

    Weights come back bit for bit (a -0.0 that 2:4 did not store as 0.0), with what happened since: training, loading,
    ``to(dtype)``. Only a lossy layer, which ``precision`` allows, returns the rounded weight that it multiplied by,
    because the one before was not kept: who wants that back keeps a copy or a file of the model. Masks, flags and the
    keys of the state dict are what they were. What ``load`` compressed is undone as well. A compressed layer of
    ``sparsekit.nn`` put there by hand becomes a new ``nn.Linear`` or ``nn.Conv2d``.

    Returns:
        The names of the layers that were restored.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a compressed layer has hooks or a replaced forward, or one put there by hand stands for one of
            another class than ``nn.Linear``.
        RuntimeError: the model is being changed already, here or in another thread.

        Whatever is raised, also by an interrupt, leaves the model compressed.
    """
    check_model(model)

    def work(undo: Undo) -> tuple[str, ...]:
        with own_tensors(()):
            return restore_all(model, undo)

    return change(model, "decompressed", work)


def _check(model: nn.Module, objective: str, measure: Measure, *, keep_dense: bool) -> None:
    """Raises where the arguments of ``compress_`` contradict each other or have no meaning."""
    if not isinstance(measure, Measure):
        raise TypeError(f"measure must be a sparsekit.Measure, got {type(measure).__name__}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be 'speed' or 'size', got {objective!r}")
    if keep_dense and objective == "size":
        raise ValueError(
            "keep_dense holds a dense copy beside the sparse weight, which objective='size' would not want"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which goes on with the parameters that it was made for: "
            "compress the module in it, then wrap it anew"
        )


def _count(site: LayerSite, counts: tuple[int, ...] | None) -> None:
    """Adds one call at each of these token counts, at the usual ones for None."""
    weight = site.layer.weight
    if isinstance(site.layer, nn.Conv2d):
        site.reason = None if site.calls else "only batches say how large its images are"
        return
    if counts is None or counts:
        site.reason = other_dtype_reason(site.layer, filter(None, [autocast_dtype(weight)]))
        usual = GPU_TOKENS if _timing.is_gpu(weight.device) else TOKENS
        site.calls.update(bucket(count, weight.device) for count in (usual if counts is None else counts))


@contextmanager
def own_tensors(sites: Iterable[LayerSite]) -> Iterator[None]:
    """Makes tensors that can be used and trained later, whatever modes the caller is in."""
    with torch.inference_mode(False):
        grad = torch.is_grad_enabled()
        autocast = {kind: torch.is_autocast_enabled(kind) for kind in {site.layer.weight.device.type for site in sites}}

        def restore() -> None:
            torch.set_grad_enabled(grad)
            for kind, enabled in autocast.items():
                torch.set_autocast_enabled(kind, enabled)

        with restoring(restore):
            torch.set_grad_enabled(False)
            for kind in autocast:
                torch.set_autocast_enabled(kind, False)
            yield


def _changes(
    swap: Swap, modules: Mapping[str, Compressed], passes: Passes | None
) -> tuple[dict[str, LayerError], OutputChange | None]:
    """Returns what lossy layers change, each alone and all together; of the weights alone without passes."""
    lossy = {name: module for name, module in modules.items() if module.lossy}
    if not lossy or passes is None:
        return weight_errors(swap, lossy), None
    return output_errors(swap, lossy, passes), output_change(swap, modules, passes)
