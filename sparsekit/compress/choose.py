"""Which candidate a layer gets: measured once per kind of layer, decided by one rule."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .._batches import Progress
from .._layers import is_transposed
from ..masks import remove_mask, set_mask
from ..nn import Compressed, RoutedLinear24
from ..ops import nm_prune
from ..ops.layouts import device_name
from . import cache, clock, gpu, tune
from .candidates import CANDIDATES, refuses_routed, refuses_tiered
from .sites import LinearSite
from .tiered import Tiers

REPEATS = 2  # of measuring every kind on a CPU, which other programs disturb for seconds at a time


@dataclass(frozen=True)
class Settings:
    """How the caller of ``compress_`` wants layers measured."""

    evict_cache: Callable[[torch.device], bool]
    budget: float
    graphs: bool
    keep_dense: bool
    progress: Progress


@dataclass(frozen=True)
class Choice:
    """What a layer becomes and why.

    Args:
        decision: the name of the candidate, or ``"plain"``.
        build: makes the module of a site; None where the layer stays.
        reason: why.
        timings: what was measured, by token bucket and name.
        names: which of the timings is the layer's, by token bucket.
    """

    decision: str
    build: Callable[[LinearSite], Compressed] | None
    reason: str
    timings: dict[int, tune.Timings]
    names: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """All that a measurement depends on besides the machine: layers of one kind share it."""

    device_name: str
    shape: tuple[int, int]
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
    timings: dict[str, dict[int, tune.Timings]] = {site.name: {} for site in sites}
    repeats = {kind: 1 if clock.is_gpu(members[0].layer.weight.device) else REPEATS for kind, members in alike.items()}
    for repeat, kind in settings.progress(
        [(repeat, kind) for repeat in range(REPEATS) for kind in alike if repeat < repeats[kind]]
    ):
        members = alike[kind]
        measured = _timings(kind, repeat, members[0].layer, settings.budget / repeats[kind])
        for site in members:
            before = timings[site.name].get(kind.tokens)
            timings[site.name][kind.tokens] = tune.pessimistic(before, measured) if before else measured
    return {site.name: _decide(site, refusals[site.name], timings[site.name]) for site in sites}


def _refusals(site: LinearSite, keep_dense: bool) -> dict[str, str | None]:
    if clock.is_gpu(site.layer.weight.device):
        return {"2:4": refuses_routed(site.layer, keep_dense), "tiered": refuses_tiered(site.layer)}
    return {candidate.name: candidate.refuses(site.layer) for candidate in CANDIDATES}


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
        graphs=settings.graphs and clock.is_gpu(device),
        keep_dense=settings.keep_dense and clock.is_gpu(device),
        tiers=tiers,
    )


def _timings(kind: Kind, repeat: int, layer: nn.Linear, budget: float) -> tune.Timings:
    device, dtype = layer.weight.device, layer.weight.dtype

    def measure() -> tune.Timings:
        offers = [candidate for candidate in CANDIDATES if candidate.name in kind.candidates]
        generator = torch.Generator(device).manual_seed(0)  # the caller's random state is not ours to move
        randn = partial(torch.randn, generator=generator, device=device)
        plain = _stand_in(kind, layer, randn, generator)
        x = randn(kind.tokens, kind.shape[1]).to(dtype)
        timer = clock.clock(device, evict_cache=kind.evict_cache, graphs=kind.graphs)
        calls: dict[str, clock.Call]
        if clock.is_gpu(device) and "2:4" in kind.candidates:
            names, _ = gpu.layouts(dtype, kind.shape[1], device)
            calls, wrong = gpu.offers(plain, x, names, timer, transposed=kind.transposed, keep_dense=kind.keep_dense)
        else:
            calls = {offer.name: offer.build(plain, kind.layout_tokens, kind.transposed) for offer in offers}
            wrong = []
        dense = tuple(candidate.name for candidate in offers if candidate.dense)
        timings = tune.measure(calls, plain, x, dense=dense, clock=timer, budget=budget)
        return timings | dict.fromkeys(wrong)

    return cache.remembered({**asdict(kind), "repeat": repeat}, measure, device)


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


def _decide(site: LinearSite, refusals: dict[str, str | None], timings: dict[int, tune.Timings]) -> Choice:
    if clock.is_gpu(site.layer.weight.device) and refusals["2:4"] is None:
        return _decide_routed(site, timings)
    return _decide_candidate(site, refusals, timings)


def _decide_candidate(site: LinearSite, refusals: dict[str, str | None], timings: dict[int, tune.Timings]) -> Choice:
    """Takes the fastest over all calls of the sample among those that win at every token count."""
    remarks = [f"{name}: {refusal}" for name, refusal in refusals.items() if refusal is not None]
    seconds: dict[str, float] = {}
    for name in [name for name, refusal in refusals.items() if refusal is None]:
        by_tokens = {tokens: measured[name] for tokens, measured in timings.items()}
        if wrong := [tokens for tokens, timing in by_tokens.items() if timing is None]:
            remarks.append(f"{name}: a wrong result at {wrong[0]} tokens")
            continue
        right = {tokens: timing for tokens, timing in by_tokens.items() if timing is not None}
        if lost := [tokens for tokens, timing in right.items() if not timing.faster]:
            worst = min(lost, key=lambda tokens: right[tokens].ratio)
            remarks.append(f"{name}: {right[worst].ratio:.2f}x, {right[worst].wins:.0%} won at {worst} tokens")
            continue
        seconds[name] = sum(site.calls[tokens] * timing.seconds for tokens, timing in right.items())
    if not seconds:
        return Choice("plain", None, "; ".join(remarks), timings)
    fastest = min(seconds, key=lambda name: seconds[name])
    remarks += [f"{name}: faster than plain, but slower" for name in seconds if name != fastest]
    candidate = next(candidate for candidate in CANDIDATES if candidate.name == fastest)

    def build(site: LinearSite) -> Compressed:
        return candidate.build(site.layer, layout_tokens(site), is_transposed(site.layer))

    return Choice(fastest, build, "; ".join(["fastest", *remarks]), timings, dict.fromkeys(timings, fastest))


def _decide_routed(site: LinearSite, timings: dict[int, tune.Timings]) -> Choice:
    weight = site.layer.weight
    names, remark = gpu.layouts(weight.dtype, site.shape[1], weight.device)
    decision = gpu.decide(timings, site.calls, weight.device, weight.dtype, names)
    reason = "; ".join(filter(None, [decision.reason, remark]))
    if (plan := decision.plan) is None:
        return Choice("plain", None, reason, timings)

    def build(site: LinearSite) -> Compressed:
        return RoutedLinear24.from_linear(site.layer, transposed=is_transposed(site.layer)).follow(plan)

    return Choice("2:4", build, reason, timings, decision.names)
