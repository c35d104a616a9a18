"""Chooses what a layer becomes, by one rule for all candidates, on a CPU and on a GPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from .. import _timing
from .._batches import Progress
from .._timing import PARITY_RATIO, Timings
from ..nn import Compressed
from .candidates import CPU_CANDIDATES, Candidate, no_dense_copy_reason
from .convolutions import CONVOLUTION_CANDIDATES
from .gpu import GPU_CANDIDATES
from .kinds import Kind, kinds_of
from .lossy import LOSSY_CANDIDATES, Precision
from .measure import Measure
from .sites import LayerSite
from .sizes import Size
from .table import GIVEN_BACK
from .trial import Objective, Option, Rejection, Trial
from .tune import measure_kinds

OBJECTIVES = ("speed", "size")


class Loss(NamedTuple):
    """What the whole model loses with a compressed layer.

    Args:
        reason: in words.
        undecided: whether the machine was too busy to tell.
    """

    reason: str
    undecided: bool = False


@dataclass(frozen=True)
class Choice:
    """What a layer becomes and why.

    Args:
        candidate: the form that the layer takes; None where it stays plain.
        kernels: the kernel that answers each size of the input.
        reason: why, with all that was turned down.
        why: the same in a few words, with the runner-up alone.
        timings: what was measured, by size of the input and kernel.
        undecided: whether it stays plain only because the machine was too busy to measure on.
        ways: the fastest way to take each form that gave right results, whether or not it is faster than plain.
        seconds: the time of all calls in the batches with this choice.
    """

    candidate: Candidate | None
    kernels: dict[Size, str]
    reason: str
    why: str
    timings: dict[Size, Timings]
    undecided: bool = False
    ways: tuple[Option, ...] = ()
    seconds: float = 0.0

    @property
    def decision(self) -> str:
        """The name of the candidate, or ``"plain"``."""
        return "plain" if self.candidate is None else self.candidate.name

    def build(self, layer: nn.Module) -> Compressed:
        """Returns the module that takes the layer's place."""
        assert self.candidate is not None
        return self.candidate.build(layer, self.kernels)

    def given_back(self, loss: Loss) -> "Choice":
        """Returns the choice to stay plain after all, because of what the whole model loses with this one."""
        why = f"{GIVEN_BACK}: {loss.reason}"
        reason = f"{why}; {self.decision}: {self.reason}"
        plain = replace(self, candidate=None, kernels={}, why=why, reason=reason, seconds=0.0)
        return replace(plain, undecided=loss.undecided, ways=())

    def taking(self, way: Option) -> "Choice":
        """Returns the choice to take another way."""
        return replace(self, candidate=way.candidate, kernels=way.kernels, seconds=way.seconds, undecided=False)

    def because_of_whole(self, ratio: float) -> "Choice":
        """Returns this choice with the reason that the whole model is faster with it."""
        why = f"a pass of the whole model is {ratio:.2f}x as fast with every layer {self.decision}"
        return replace(self, why=why, reason=f"{why}; alone: {self.reason}")


def unsupported_reasons(layer: nn.Module, precision: Precision | None = None) -> dict[Candidate, str | None]:
    """Returns why a layer cannot become each candidate of its device; None for those that are worth measuring."""
    candidates: Sequence[Candidate] = CONVOLUTION_CANDIDATES
    if not isinstance(layer, nn.Conv2d):
        gpu = _timing.is_gpu(layer.get_parameter("weight").device)
        lossy = LOSSY_CANDIDATES[precision] if precision else ()
        candidates = [*(GPU_CANDIDATES if gpu else CPU_CANDIDATES), *lossy]
    return {candidate: candidate.unsupported_reason(layer) for candidate in candidates}


def choose(
    sites: Sequence[LayerSite],
    objective: Objective,
    measure: Measure,
    *,
    keep_dense: bool,
    precision: Precision | None,
    evict_cache: Callable[[torch.device], bool],
    progress: Progress,
) -> dict[str, Choice]:
    """Measures what every layer could become, once for all layers of a kind, and chooses for each.

    Args:
        sites: the layers.
        objective: ``"speed"`` or ``"size"``.
        measure: how to measure.
        keep_dense: whether the caller allows dense copies.
        precision: the lowest precision that the caller allows; None for that of the weights.
        evict_cache: returns whether weights on a device are timed from memory.
        progress: wraps the loop over the measurements and iterates it.

    Returns:
        The choices, by the name of the layer.
    """
    unsupported = {site.name: unsupported_reasons(site.layer, precision) for site in sites}
    kinds: dict[str, list[Kind]] = {}
    members: dict[Kind, tuple[nn.Module, list[Candidate]]] = {}
    for site in sites:
        candidates = [candidate for candidate, reason in unsupported[site.name].items() if reason is None]
        kinds[site.name] = kinds_of(
            site,
            candidates,
            measure,
            evict_cache=evict_cache(site.layer.weight.device),
            keep_dense=keep_dense and no_dense_copy_reason(site.layer) is None,
        )
        for kind in kinds[site.name]:
            members.setdefault(kind, (site.layer, candidates))
    found = measure_kinds(members, measure.budget, progress)
    timings = {name: {kind.size: found[kind] for kind in each} for name, each in kinds.items()}
    return {
        site.name: choose_one(site, unsupported[site.name], timings[site.name], objective, keep_dense=keep_dense)
        for site in sites
    }


def choose_one(
    site: LayerSite,
    unsupported: Mapping[Candidate, str | None],
    timings: dict[Size, Timings],
    objective: Objective,
    *,
    keep_dense: bool,
) -> Choice:
    """Chooses the best candidate among those that are not slower than the plain layer at any size of its input.

    At each size a candidate takes the fastest of its kernels that may replace the plain layer. For speed the
    best candidate is the one that needs the least time over all calls, and of those as fast as it, up to noise, the
    smallest; for size it is the smallest, and of those the fastest.

    Args:
        site: the layer.
        unsupported: why a candidate cannot take the layer's place; None for those that were measured.
        timings: what was measured, by size of the input and kernel; None for a wrong result.
        objective: ``"speed"`` or ``"size"``.
        keep_dense: whether the caller allows a dense copy.
    """
    options: list[Option] = []
    ways: list[Option] = []
    rejected: dict[str, Rejection] = {}
    remarks: list[str] = []
    for candidate, reason in unsupported.items():
        if reason is not None:
            rejected[candidate.name] = Rejection(reason)
            continue
        trial = Trial(site, candidate, timings, objective)
        found = list(trial.options())
        options += found
        ways += filter(None, [trial.any_way()])
        if not found:
            rejected[candidate.name] = trial.rejection()
        remarks += trial.remarks()
        note = no_dense_copy_reason(site.layer) if keep_dense and candidate.allows_copy else None
        if note is not None and (found or note not in rejected[candidate.name].reason):
            remarks.append(note)
    if not options:
        reason = "; ".join([*_lines(rejected), *remarks])
        undecided = any(each.undecided for each in rejected.values())
        short = _short_reason(unsupported, rejected)
        plain = [measured.get("plain") for measured in timings.values()]
        seconds = sum(site.calls[size] * timing.seconds for size, timing in zip(timings, plain, strict=True) if timing)
        return Choice(None, {}, reason, short, timings, undecided, tuple(ways), seconds)
    best, verdict = _best(options, objective)
    others = {
        option.candidate.name: _second(best, option) for option in options if option.candidate is not best.candidate
    }
    tried = {candidate.name for candidate, reason in unsupported.items() if reason is None}
    runners_up = {**others, **{name: each for name, each in rejected.items() if name in tried}}
    why = "; ".join([verdict, *(f"next {line}" for line in _lines(runners_up)[:1])])
    reason = "; ".join([verdict + _kernels_text(best), *remarks, *_lines({**rejected, **others})])
    return Choice(best.candidate, best.kernels, reason, why, timings, False, tuple(ways), best.seconds)


def _best(options: list[Option], objective: Objective) -> tuple[Option, str]:
    """Returns the option that is taken, and why in a word."""
    if objective == "size":
        return min(options, key=lambda option: (option.nbytes, option.seconds)), "smallest, and not slower"
    fastest = min(options, key=lambda option: option.seconds)
    ties = [option for option in options if option.seconds * PARITY_RATIO <= fastest.seconds]
    best = min(ties, key=lambda option: (option.nbytes, option.seconds))
    if best.candidate is fastest.candidate:
        return best, "fastest"
    return best, f"as fast as {fastest.candidate.name}, and smaller"


def _short_reason(unsupported: Mapping[Candidate, str | None], rejected: Mapping[str, Rejection]) -> str:
    """Returns why a layer is not sparse: what the closest sparse candidate was measured at.

    Where none was measured, it is why the first cannot be, and what a dense candidate was measured at.
    """
    sparse = [candidate for candidate in unsupported if not candidate.dense]
    closest = max(sparse, key=lambda each: (unsupported[each] is None, rejected[each.name].ratio))
    dense = [candidate.name for candidate, reason in unsupported.items() if candidate.dense and reason is None]
    names = [closest.name, *(dense if unsupported[closest] is not None else [])]
    return "; ".join(_lines({name: rejected[name] for name in names}))


def _second(best: Option, other: Option) -> Rejection:
    return Rejection(f"faster than plain, but {'slower' if other.seconds > best.seconds else 'larger'}")


def _lines(rejected: Mapping[str, Rejection]) -> list[str]:
    return [f"{name}: {each.reason}" for name, each in rejected.items()]


def _kernels_text(option: Option) -> str:
    """Returns which kernel answers each size, where there is more to say than the candidate's name."""
    if set(option.kernels.values()) == {option.candidate.name}:
        return ""
    text = ", ".join(f"{kernel} at {size}" for size, kernel in sorted(option.kernels.items()))
    return f": {text} {'token' if max(option.kernels) == 1 else 'tokens'}"
