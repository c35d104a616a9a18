"""Which provider a layer gets: measured once per kind of layer, decided by one rule."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .._batches import Progress
from .._layers import is_transposed
from ..ops import nm_prune
from . import tune
from .providers import PROVIDERS, Provider
from .sites import Site

RATIO, WINS = 1.05, 0.8


@dataclass(frozen=True)
class Choice:
    """What a layer becomes (None: it stays), why, and the timings by token bucket and provider."""

    provider: Provider | None
    reason: str
    timings: dict[int, tune.Timings]


@dataclass(frozen=True)
class Kind:
    """All that a measurement depends on besides the machine: layers of one kind share it."""

    shape: tuple[int, int]
    dtype: str
    bias: bool
    transposed: bool
    providers: tuple[str, ...]
    layout_tokens: int
    tokens: int
    cold: bool


def choose(sites: list[Site], cold: bool, budget: float, progress: Progress) -> dict[str, Choice]:
    """One choice per layer, by name."""
    refusals = {site.name: {provider.name: provider.refuses(site.layer) for provider in PROVIDERS} for site in sites}
    alike: dict[Kind, list[Site]] = {}
    for site in sites:
        offers = tuple(name for name, refusal in refusals[site.name].items() if refusal is None)
        for tokens in sorted(site.calls) if offers else ():
            alike.setdefault(_kind(site, offers, tokens, cold), []).append(site)
    timings: dict[str, dict[int, tune.Timings]] = {site.name: {} for site in sites}
    for kind, members in progress(list(alike.items())):
        measured = _timings(kind, members[0].layer, budget)
        for site in members:
            timings[site.name][kind.tokens] = measured
    return {site.name: _decide(site, refusals[site.name], timings[site.name]) for site in sites}


def layout_tokens(site: Site) -> int:
    """The count that a layout is chosen for: measured, the one for most tokens is as fast as any for fewer."""
    return max(site.calls)


def _kind(site: Site, offers: tuple[str, ...], tokens: int, cold: bool) -> Kind:
    layer = site.layer
    return Kind(
        shape=site.shape,
        dtype=str(layer.weight.dtype),
        bias=layer.bias is not None,
        transposed=is_transposed(layer),
        providers=offers,
        layout_tokens=layout_tokens(site),
        tokens=tokens,
        cold=cold,
    )


def _timings(kind: Kind, layer: nn.Linear, budget: float) -> tune.Timings:
    def measure() -> tune.Timings:
        rows, cols = kind.shape
        offers = [provider for provider in PROVIDERS if provider.name in kind.providers]
        generator = torch.Generator().manual_seed(0)  # the caller's random state is not ours to move
        weight = torch.randn(rows, cols, generator=generator).div_(cols**0.5).to(layer.weight.dtype)
        if any(not provider.dense for provider in offers):
            weight = nm_prune(weight, 2, 4)[0]
        bias = torch.randn(rows, generator=generator).to(weight.dtype) if kind.bias else None
        plain = _stand_in(layer, weight.t().contiguous() if kind.transposed else weight, bias)
        modules: dict[str, nn.Module] = {"plain": plain}
        for provider in offers:
            modules[provider.name] = provider.build(plain, kind.layout_tokens, kind.transposed)
        dense = ("plain", *(provider.name for provider in offers if provider.dense))
        x = torch.randn(kind.tokens, cols, generator=generator).to(weight.dtype)
        return tune.measure(modules, x, dense=dense, cold=kind.cold, budget=budget)

    return tune.remembered(asdict(kind), measure)


def _stand_in(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of the same class with other tensors, in eval mode."""
    plain = copy.copy(layer)
    plain._parameters = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in (("weight", weight), ("bias", bias))
    }
    plain._buffers = {}
    plain.__dict__.pop("weight_mask_info", None)
    plain.training = False
    return plain


def _decide(site: Site, refusals: dict[str, str | None], timings: dict[int, tune.Timings]) -> Choice:
    """Takes the fastest over all calls of the sample among those that win at every token count."""
    remarks = [f"{name}: {refusal}" for name, refusal in refusals.items() if refusal is not None]
    seconds: dict[str, float] = {}
    for provider in PROVIDERS:
        name = provider.name
        if refusals[name] is not None:
            continue
        by_tokens = {tokens: measured[name] for tokens, measured in timings.items()}
        if wrong := [tokens for tokens, timing in by_tokens.items() if timing is None]:
            remarks.append(f"{name}: a wrong result at {wrong[0]} tokens")
            continue
        right = {tokens: timing for tokens, timing in by_tokens.items() if timing is not None}
        if lost := [tokens for tokens, timing in right.items() if timing.ratio < RATIO or timing.wins < WINS]:
            worst = min(lost, key=lambda tokens: right[tokens].ratio)
            remarks.append(f"{name}: {right[worst].ratio:.2f}x, {right[worst].wins:.0%} won at {worst} tokens")
            continue
        seconds[name] = sum(site.calls[tokens] * timing.seconds for tokens, timing in right.items())
    if not seconds:
        return Choice(None, "; ".join(remarks), timings)
    fastest = min(seconds, key=lambda name: seconds[name])
    remarks += [f"{name}: faster than plain, but slower" for name in seconds if name != fastest]
    provider = next(provider for provider in PROVIDERS if provider.name == fastest)
    return Choice(provider, "; ".join(["fastest", *remarks]), timings)
