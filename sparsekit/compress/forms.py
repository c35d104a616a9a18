"""One form for all layers of a model, tried in place of what was chosen for each layer by its own time."""

from collections.abc import Callable, Mapping

from .._batches import observing
from .._timing import PARITY_RATIO, Timing
from ..nn import Compressed
from .choose import Choice
from .swap import Swap
from .trial import Option
from .whole import TRIES, Passes, Verdict, compare_passes, total_ratio, untimed_reason, wins_over_plain

PROMISING = 1.5  # times the time of what was chosen, layer by layer; a form that takes longer is not tried
MOST = 2  # forms; each takes up to three measurements

Build = Callable[[Mapping[str, Choice]], dict[str, Compressed]]


def try_forms(swap: Swap, verdict: Verdict, passes: Passes, build: Build) -> Verdict:
    """Tries the few most promising forms for all layers at once, and takes one with which a pass is clearly faster.

    Alone, a layer is timed with its weight in memory if the model is larger than the last cache, but a smaller form may
    leave half of the model in that cache: with 60 MB of 2:4 weights and a cache of 32 MB, 2:4 took 0.65 of the time of
    prepacked layers alone, and 0.53 in the model. A layer that stays plain because a form was slower alone is not tried
    in it; one for which it was faster, if not by 5 %, or for which the machine was too busy to tell, is.

    Args:
        swap: the model.
        verdict: what stands for each layer, and the time of the whole.
        passes: what the model is timed on.
        build: makes the modules of choices.
    """
    forms = _promising(verdict.choices)
    if not forms or verdict.remark or untimed_reason(swap.model, passes):
        return verdict
    if verdict.modules and len(verdict.timings) < len(passes.batches):
        return verdict  # passes take so long that not all batches were timed
    with observing(swap.model):
        for form, ways in forms:
            choices = {name: verdict.choices[name].taking(way) for name, way in ways.items()}
            modules = verdict.modules | build(choices)
            if timings := _compare(swap, modules, verdict.modules, passes):
                verdict = verdict.with_form(form, timings)
            if not timings or not _is_faster(timings, verdict.modules):
                continue
            over_plain, loss = wins_over_plain(swap, modules, passes)
            if loss is None:
                taken = {name: choice.because_of_whole(total_ratio(timings)) for name, choice in choices.items()}
                verdict = verdict.with_modules(modules, verdict.choices | taken, over_plain)
    return verdict


def _promising(choices: Mapping[str, Choice]) -> list[tuple[str, dict[str, Option]]]:
    """Returns the forms that differ from what was chosen, the most promising first, and how layers would take them."""
    forms = dict.fromkeys(way.candidate.name for choice in choices.values() for way in choice.ways)
    found: list[tuple[float, str, dict[str, Option]]] = []
    for form in forms:
        ways = {name: way for name, choice in choices.items() if (way := _way(choice, form)) is not None}
        now, then = sum(choices[name].seconds for name in ways), sum(way.seconds for way in ways.values())
        if ways and then <= PROMISING * now:
            found.append((then / now, form, ways))
    return [(form, ways) for _, form, ways in sorted(found, key=lambda each: each[0])[:MOST]]


def _way(choice: Choice, form: str) -> Option | None:
    """Returns how a layer would take a form instead of what was chosen; None if it would not, or has it."""
    settled = choice.candidate is None and not choice.undecided
    for way in choice.ways:
        if way.candidate.name == form != choice.decision and not (settled and way.seconds >= choice.seconds):
            return way
    return None


def _compare(
    swap: Swap, modules: Mapping[str, Compressed], over: Mapping[str, Compressed], passes: Passes
) -> tuple[Timing, ...]:
    """Returns the less favorable of two measurements on all batches; none where a pass fails or takes too long."""
    worst: tuple[Timing, ...] = ()
    for _ in range(TRIES):
        try:
            timings = compare_passes(swap, modules, over, passes)
        except Exception:  # what was chosen works
            return ()
        if len(timings) < len(passes.batches):
            return ()
        worst = min(worst or timings, timings, key=total_ratio)
        if not _is_faster(worst, over):
            break
    return worst


def _is_faster(timings: tuple[Timing, ...], over: Mapping[str, Compressed]) -> bool:
    """Returns whether a form is worth taking: clearly faster than plain layers, or faster than those chosen."""
    if not over:
        return all(timing.faster for timing in timings)
    return all(timing.ratio >= PARITY_RATIO for timing in timings) and total_ratio(timings) >= 1 / PARITY_RATIO
