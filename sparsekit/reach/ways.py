"""The ways to change a layer, as ``compress_`` measures them: what each saves and what error its outputs have."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .._batches import Progress
from ..compress.choose import Choice, choose
from ..compress.compress_model import own_tensors
from ..compress.lossy import LOSSY_CANDIDATES
from ..compress.measure import Measure
from ..compress.sites import LayerSite
from ..compress.trial import Option
from ..nn import Compressed
from ..prune.full_precision import full_precision
from .assign import Offer
from .variants import DECISIONS, Form, Variant, precision_of

LOSSY = {candidate.name for candidates in LOSSY_CANDIDATES.values() for candidate in candidates}


class Way(NamedTuple):
    """A way to change a layer.

    Args:
        variant: the layer as it is or pruned.
        option: the form that it takes; None where it stays plain.
        seconds: the time of all calls in the sample.
        error: the relative error of its outputs.
    """

    variant: Variant
    option: Option | None
    seconds: float
    error: float

    @property
    def form(self) -> str:
        """What the layer becomes, as ``compress_`` calls it."""
        return "plain" if self.option is None else self.option.candidate.name

    def offer(self, plain: float) -> Offer:
        """Returns what it saves of the plain layer's seconds, at the square of its error, which adds up over layers."""
        return Offer(plain - self.seconds, self.error**2)

    def build(self, layer: nn.Module) -> Compressed:
        """Returns the module that takes the place of a layer with this weight."""
        assert self.option is not None
        return self.option.candidate.build(layer, self.option.kernels)


def measure_ways(
    sites: Mapping[str, LayerSite],
    variants: Mapping[str, Sequence[Variant]],
    forms: Sequence[Form],
    measure: Measure,
    evict_cache: Callable[[torch.device], bool],
    progress: Progress,
) -> dict[str, list[Way]]:
    """Returns the ways to change each layer; the first is to leave it plain."""
    candidates = {
        f"{name}/{index}": LayerSite(f"{name}/{index}", variant.module, [], None, each.shape, Counter(each.calls))
        for name, each in sites.items()
        for index, variant in enumerate(variants[name])
    }
    free = [*candidates.values()]
    with own_tensors(free):
        choices = choose(
            free,
            "speed",
            measure,
            keep_dense=False,
            precision=precision_of(forms),
            evict_cache=evict_cache,
            progress=progress,
        )
        return {name: _ways(candidates, choices, name, variants[name], forms) for name in progress([*sites])}


def _ways(
    sites: Mapping[str, LayerSite],
    choices: Mapping[str, Choice],
    name: str,
    variants: Sequence[Variant],
    forms: Sequence[Form],
) -> list[Way]:
    found = [Way(variants[0], None, plain_seconds(sites[f"{name}/0"], choices[f"{name}/0"]), 0.0)]
    for index, variant in enumerate(variants):
        for option in choices[f"{name}/{index}"].ways:
            if allowed(option.candidate.name, variant, forms):
                with full_precision():
                    error = variant.error(option.candidate.build(variant.module, option.kernels))
                if math.isfinite(error):  # a form may overflow, such as in float16
                    found.append(Way(variant, option, option.seconds, error))
    return found


def allowed(decision: str, variant: Variant, forms: Sequence[Form]) -> bool:
    """Returns whether a variant may take a form: as it is, every one that rounds nothing, and those asked for."""
    if variant.pattern is None and decision not in LOSSY:
        return True
    return any(decision in DECISIONS[form] for form in forms)


def plain_seconds(site: LayerSite, choice: Choice) -> float:
    """Returns the time of all calls of the plain layer in the sample."""
    measured = {size: timings.get("plain") for size, timings in choice.timings.items()}
    return sum(site.calls[size] * timing.seconds for size, timing in measured.items() if timing is not None)
