"""Measures what every kind of layer could become, once for all layers of the kind, and chooses."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import _timing
from .._batches import Progress
from .._layers import is_transposed
from ..masks import remove_mask, set_mask
from ..nn import Compressed, RoutedLinear24
from ..ops import nm_prune
from ..ops.layouts import device_name
from . import cache, gpu, tune
from .candidates import CANDIDATES, unsupported_routed, unsupported_tiered, unsupported_with_dense
from .decide import ANY, WITH_DENSE, Choice, Objective, decide
from .measure import Measure
from .sites import LinearSite
from .tiered import Tiers

REPEATS = 2  # of measuring every kind on a CPU, which other programs disturb for seconds at a time


@dataclass(frozen=True)
class Settings:
    """How the caller of ``compress_`` wants layers measured."""

    evict_cache: Callable[[torch.device], bool]
    objective: Objective
    measure: Measure
    keep_dense: bool
    progress: Progress


@dataclass(frozen=True)
class Kind:
    """All that a measurement depends on besides the machine: layers of one kind share it."""

    device_name: str
    shape: tuple[int, ...]
    dtype: str
    bias: bool
    transposed: bool
    candidates: tuple[str, ...]
    layout_tokens: int
    tokens: int
    evict_cache: bool
    graphs: bool
    keep_dense: bool
    tiers: Tiers | None


def choose(sites: list[LinearSite], settings: Settings) -> dict[str, Choice]:
    """One choice per layer, by name."""
    refusals = {site.name: _refusals(site, settings.keep_dense) for site in sites}
    alike: dict[Kind, list[LinearSite]] = {}
    for site in sites:
        offers = tuple(name for name, refusal in refusals[site.name].items() if refusal is None)
        tiers = Tiers.of(site.layer).rounded() if "tiered" in offers else None
        for tokens in sorted(site.calls) if offers else ():
            alike.setdefault(_kind(site, offers, tiers, tokens, settings), []).append(site)
    repeats = {
        kind: 1 if _timing.is_gpu(members[0].layer.weight.device) else REPEATS for kind, members in alike.items()
    }
    found: dict[Kind, _timing.Timings] = {}
    rounds = [(repeat, kind) for repeat in range(REPEATS) for kind in alike if repeat < repeats[kind]]
    for repeat, kind in settings.progress(rounds):
        measured = _timings(kind, repeat, alike[kind][0].layer, settings.measure.budget / repeats[kind])
        found[kind] = _timing.pessimistic(found[kind], measured) if kind in found else measured
    timings: dict[str, dict[int, _timing.Timings]] = {site.name: {} for site in sites}
    for kind, measured in found.items():
        if not cache.is_steady(measured):  # one of the two was disturbed all the time, and nobody knows which
            for repeat in range(repeats[kind]):
                cache.forget(_key(kind, repeat), alike[kind][0].layer.weight.device)
        for site in alike[kind]:
            timings[site.name][kind.tokens] = measured
    return {site.name: _decide(site, refusals[site.name], timings[site.name], settings.objective) for site in sites}


def _refusals(site: LinearSite, keep_dense: bool) -> dict[str, str | None]:
    """Why a layer cannot take a form, by name; None for those to be measured."""
    layer = site.layer
    if _timing.is_gpu(layer.weight.device):
        with_dense = unsupported_with_dense(layer) if keep_dense else None
        return {"2:4": with_dense or unsupported_routed(layer), "tiered": unsupported_tiered(layer)}
    return {candidate.name: candidate.unsupported_reason(layer) for candidate in CANDIDATES}


def layout_tokens(site: LinearSite) -> int:
    """The count that a layout is chosen for: measured, the one for most tokens is as fast as any for fewer."""
    return max(site.calls)


def _kind(site: LinearSite, offers: tuple[str, ...], tiers: Tiers | None, tokens: int, settings: Settings) -> Kind:
    layer, device = site.layer, site.layer.weight.device
    return Kind(
        device_name=device_name(device),
        shape=site.shape,
        dtype=str(layer.weight.dtype),
        bias=layer.bias is not None,
        transposed=is_transposed(layer),
        candidates=offers,
        layout_tokens=layout_tokens(site),
        tokens=tokens,
        evict_cache=settings.evict_cache(device),
        graphs=settings.measure.graphs and _timing.is_gpu(device),
        keep_dense=settings.keep_dense and unsupported_with_dense(layer) is None,
        tiers=tiers,
    )


def _key(kind: Kind, repeat: int) -> dict[str, object]:
    return {**asdict(kind), "repeat": repeat}


def _timings(kind: Kind, repeat: int, layer: nn.Linear, budget: float) -> _timing.Timings:
    device, dtype = layer.weight.device, layer.weight.dtype

    def measure() -> _timing.Timings:
        generator = torch.Generator(device).manual_seed(0)  # the caller's random state is not ours to move
        randn = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)
        plain = _stand_in(kind, layer, randn, generator)
        x = randn(kind.tokens, kind.shape[1]).to(dtype)
        timer = _timing.clock(device, evict_cache=kind.evict_cache, graphs=kind.graphs)
        wrong: list[str] = []
        if _timing.is_gpu(device) and "2:4" in kind.candidates:
            names, _ = gpu.layouts(dtype, kind.shape[1], device)
            calls, wrong = gpu.offers(plain, x, names, timer, transposed=kind.transposed, keep_dense=kind.keep_dense)
        else:
            calls = _calls(kind, plain)
        dense = tuple(candidate.name for candidate in CANDIDATES if candidate.dense and candidate.name in calls)
        timings = tune.measure(calls, plain, x, dense=dense, clock=timer, budget=budget)
        return timings | dict.fromkeys(wrong)

    return cache.remembered(_key(kind, repeat), measure, device)


def _calls(kind: Kind, plain: nn.Linear) -> dict[str, _timing.Call]:
    """The modules to be measured; a dense copy in the module that would hold it, which costs a call some time too."""
    arguments = plain, kind.layout_tokens, kind.transposed
    offers = [candidate for candidate in CANDIDATES if candidate.name in kind.candidates]
    calls: dict[str, _timing.Call] = {candidate.name: candidate.build(*arguments) for candidate in offers}
    routed = [candidate.build_routed for candidate in offers if candidate.build_routed is not None]
    if kind.keep_dense and routed:
        calls[WITH_DENSE] = routed[0](*arguments, ((ANY, True),))
    return calls


def _stand_in(kind: Kind, layer: nn.Linear, randn: Callable[..., Tensor], generator: torch.Generator) -> nn.Linear:
    """A layer of the same class and kind with random tensors, in eval mode."""
    (rows, cols), dtype = kind.shape, layer.weight.dtype
    weight = randn(rows, cols).div_(cols**0.5).to(dtype)
    if kind.tiers is not None:
        weight = kind.tiers.prune(weight, generator)
    elif "2:4" in kind.candidates:
        weight = nm_prune(weight, 2, 4)[0]
    plain = copy.copy(layer)
    tensors = {
        "weight": weight.t().contiguous() if kind.transposed else weight,
        "bias": randn(rows).to(dtype) if kind.bias else None,
    }
    plain._parameters = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }
    plain._buffers, plain._non_persistent_buffers_set = {}, set()
    remove_mask(plain)
    plain.training = False
    if kind.tiers is not None:
        set_mask(plain, plain.weight != 0, kind.tiers.info(0 if kind.transposed else 1))
    return plain


def _decide(
    site: LinearSite, refusals: dict[str, str | None], timings: dict[int, _timing.Timings], objective: Objective
) -> Choice:
    if _timing.is_gpu(site.layer.weight.device) and refusals["2:4"] is None:
        return _decide_routed(site, timings, objective)
    return decide(site, refusals, timings, objective)


def _decide_routed(site: LinearSite, timings: dict[int, _timing.Timings], objective: Objective) -> Choice:
    weight = site.layer.weight
    names, remark = gpu.layouts(weight.dtype, site.shape[1], weight.device)
    decision = gpu.decide(timings, site.calls, weight.device, weight.dtype, names, objective)
    reason = "; ".join(filter(None, [decision.reason, remark]))
    if (plan := decision.plan) is None:
        return Choice("plain", None, reason, timings, why=decision.reason, undecided=decision.undecided)

    def build(site: LinearSite) -> Compressed:
        return RoutedLinear24.from_linear(site.layer, transposed=is_transposed(site.layer)).follow(plan)

    return Choice("2:4", build, reason, timings, decision.names, "fastest" if objective == "speed" else "not slower")
