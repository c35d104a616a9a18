"""What a layer becomes, by what was measured of the forms that it could take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .._layers import is_transposed
from .._timing import PARITY_RATIO, Timing, Timings
from ..nn import Compressed, Routes
from .candidates import CANDIDATES, Candidate
from .sites import LinearSite

Objective = Literal["speed", "size"]
OBJECTIVES = ("speed", "size")
WITH_DENSE = "dense"  # the name of a dense copy beside a sparse weight
ANY = 1 << 62  # tokens


@dataclass(frozen=True)
class Choice:
    """What a layer becomes and why.

    Args:
        decision: the name of the candidate, or ``"plain"``.
        build: makes the module of a site; None where the layer stays.
        reason: why, with all that was turned down.
        timings: what was measured, by token bucket and name.
        names: which of the timings is the layer's, by token bucket.
        why: the same as ``reason`` in a few words: the runner-up alone.
        undecided: whether it stays only because the machine was too busy to measure on.
    """

    decision: str
    build: Callable[[LinearSite], Compressed] | None
    reason: str
    timings: dict[int, Timings]
    names: dict[int, str] = field(default_factory=dict)
    why: str = ""
    undecided: bool = False


@dataclass(frozen=True)
class _Form:
    """What a layer may become: a candidate, what answers each number of tokens, and what that costs over all calls."""

    candidate: Candidate
    names: dict[int, str]
    nbytes: int
    seconds: float


def accepts(timing: Timing, objective: Objective, *, smaller: bool) -> bool:
    """Whether a form may take the place of the plain layer: if it is faster; for its size, if it is no slower."""
    return timing.faster or (objective == "size" and smaller and timing.ratio >= PARITY_RATIO)


def at_tokens(tokens: int) -> str:
    """``"at 1 token"``, ``"at 16 tokens"``."""
    return f"at {tokens} token" if tokens == 1 else f"at {tokens} tokens"


def turned_down(timing: Timing, tokens: int) -> str:
    """The measurement because of which a form was not taken."""
    text = f"{timing.ratio:.2f}x, {timing.wins:.0%} won {at_tokens(tokens)}"
    return f"undecided, the machine is busy (spread {timing.spread:.1f}): {text}" if timing.undecided else text


def decide(
    site: LinearSite, refusals: Mapping[str, str | None], timings: dict[int, Timings], objective: Objective
) -> Choice:
    """Takes the best form among those that may take the layer's place at every token count.

    For speed that is the fastest over all calls, and of those as fast as it, up to noise, the smallest. For size it is
    the smallest, and of those the fastest.

    Args:
        site: the layer.
        refusals: why a candidate cannot take the layer; None for those that were measured.
        timings: what was measured, by token bucket and name.
        objective: ``"speed"`` or ``"size"``.
    """
    rejected = {name: refusal for name, refusal in refusals.items() if refusal is not None}
    forms: list[_Form] = []
    undecided = False
    for candidate in [candidate for candidate in CANDIDATES if refusals.get(candidate.name, "") is None]:
        found = _forms(site, candidate, timings, objective)
        forms += found
        if not found:
            tokens, rejected[candidate.name] = _veto(candidate, timings, objective, smaller=_smaller(site, candidate))
            timing = timings[tokens][candidate.name]
            undecided |= timing is not None and timing.undecided
    if not forms:
        reason = "; ".join(f"{name}: {text}" for name, text in rejected.items())
        return Choice("plain", None, reason, timings, {}, _closest(rejected, timings), undecided)
    best, verdict = _best(forms, objective)
    name = best.candidate.name
    others = {form.candidate.name: _loss(best, form) for form in forms if form.candidate is not best.candidate}
    measured = {other: text for other, text in rejected.items() if refusals[other] is None}
    rejected |= others
    reason = "; ".join([verdict, *(f"{other}: {text}" for other, text in rejected.items())])
    next_best = [f"next {other}: {text}" for other, text in {**others, **measured}.items()][:1]
    return Choice(name, _builder(best), reason, timings, best.names, "; ".join([verdict, *next_best]))


def _smaller(site: LinearSite, candidate: Candidate) -> bool:
    return candidate.nbytes(site.layer) < site.layer.weight.nbytes


def _forms(site: LinearSite, candidate: Candidate, timings: dict[int, Timings], objective: Objective) -> list[_Form]:
    """The candidate for all calls, and with a dense copy for some, where either may take the layer's place."""
    own, nbytes = candidate.name, candidate.nbytes(site.layer)
    smaller = _smaller(site, candidate)
    accepted = {
        tokens: (timing := measured[own]) is not None and accepts(timing, objective, smaller=smaller)
        for tokens, measured in timings.items()
    }
    ways = [dict.fromkeys(timings, own)] if all(accepted.values()) else []
    if not candidate.dense:
        mixed = {
            tokens: min(fits, key=lambda name: _seconds(measured, name))
            for tokens, measured in timings.items()
            if measured[own] is not None and (fits := _fits(own, measured, accepted[tokens]))
        }
        if len(mixed) == len(timings) and len(set(mixed.values())) == 2:
            ways.append(mixed)
    return [
        _Form(
            candidate,
            names,
            nbytes + (site.layer.weight.nbytes if WITH_DENSE in names.values() else 0),
            sum(site.calls[tokens] * _seconds(timings[tokens], name) for tokens, name in names.items()),
        )
        for names in ways
    ]


def _fits(own: str, measured: Timings, accepted: bool) -> list[str]:
    """What may answer at a number of tokens, the dense copy among it where one was measured."""
    dense = measured.get(WITH_DENSE)
    return [*([own] if accepted else []), *([WITH_DENSE] if dense is not None and dense.ratio >= PARITY_RATIO else [])]


def _veto(candidate: Candidate, timings: dict[int, Timings], objective: Objective, *, smaller: bool) -> tuple[int, str]:
    """The number of tokens at which a candidate is worst, and why it cannot be used there."""
    own = {tokens: measured[candidate.name] for tokens, measured in timings.items()}
    right = {tokens: timing for tokens, timing in own.items() if timing is not None}
    if wrong := [tokens for tokens in own if tokens not in right]:
        return wrong[0], f"a wrong result {at_tokens(wrong[0])}"
    lost = [tokens for tokens, timing in right.items() if not accepts(timing, objective, smaller=smaller)]
    worst = min(lost, key=lambda tokens: (right[tokens].undecided, right[tokens].ratio))
    text = turned_down(right[worst], worst)
    wins = [str(tokens) for tokens in right if tokens not in lost]
    if wins and not candidate.dense and not right[worst].undecided:
        copy = timings[worst].get(WITH_DENSE)
        with_dense = "try keep_dense=True" if copy is None else f"a dense copy has {copy.ratio:.2f}x there"
        text += f", faster at {', '.join(wins)}: {with_dense}"
    return worst, text


def _best(forms: list[_Form], objective: Objective) -> tuple[_Form, str]:
    """The form that is taken, and the word for why."""
    if objective == "size":
        return min(forms, key=lambda form: (form.nbytes, form.seconds)), "smallest, and not slower"
    fastest = min(forms, key=lambda form: form.seconds)
    ties = [form for form in forms if form.seconds * PARITY_RATIO <= fastest.seconds]
    best = min(ties, key=lambda form: (form.nbytes, form.seconds))
    if best.candidate is fastest.candidate:
        return best, "fastest"
    return best, f"as fast as {fastest.candidate.name}, and smaller"


def _loss(best: _Form, other: _Form) -> str:
    return f"faster than plain, but {'slower' if other.seconds > best.seconds else 'larger'}"


def _closest(rejected: Mapping[str, str], timings: dict[int, Timings]) -> str:
    """What was turned down last: of what was measured, the one that is fastest where it is slowest."""
    least: dict[str, float] = {}
    for name in rejected:
        ratios = [timing.ratio for measured in timings.values() if (timing := measured.get(name)) is not None]
        if ratios:
            least[name] = min(ratios)
    name = max(least, key=lambda name: least[name], default=next(reversed(list(rejected)), ""))
    return f"{name}: {rejected[name]}" if name else ""


def _builder(form: _Form) -> Callable[[LinearSite], Compressed]:
    candidate, routes = form.candidate, _routes(form.names)

    def build(site: LinearSite) -> Compressed:
        arguments = site.layer, max(site.calls), is_transposed(site.layer)
        if not any(dense for _, dense in routes):
            return candidate.build(*arguments)
        assert candidate.build_routed is not None
        return candidate.build_routed(*arguments, routes)

    return build


def _routes(names: dict[int, str]) -> Routes:
    routes: list[tuple[int, bool]] = []
    for tokens, name in sorted(names.items()):
        dense = name == WITH_DENSE
        if routes and routes[-1][1] == dense:
            routes.pop()
        routes.append((tokens, dense))
    return (*routes[:-1], (ANY, routes[-1][1]))


def _seconds(measured: Timings, name: str) -> float:
    timing = measured[name]
    assert timing is not None
    return timing.seconds
