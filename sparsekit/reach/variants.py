"""Prunes a copy of every layer's weight by each pattern, on the inputs that the dense model gives the layer."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from .._batches import Progress, evaluating
from .._undo import Undo
from ..compress.lossy import Precision
from ..masks import MaskInfo, Pattern, get_mask, remove_mask, set_mask
from ..nn import Compressed
from ..prune.apply_mask import apply_mask
from ..prune.calibration import Calibration, calibrate
from ..prune.calibration.inputs import InputSample, LayerInputs
from ..prune.calibration.ranks import Ranks
from ..prune.calibration.statistics import Gram
from ..prune.full_precision import full_precision
from ..prune.layers import PrunableLayer, check_result
from ..prune.sparsegpt import SparseGPT
from ..tiers.demote import demote, prune_tiers
from ..tiers.tier_map import TierMap

Form = Literal["2:4", "tiers", "int8", "2:4 int8", "2:4 int4"]
DECISIONS = {  # what a layer becomes in a form, as compress_ calls it; of two kinds of 4 bits the better is taken
    "2:4": ("2:4",),
    "tiers": ("tiered",),
    "int8": ("int8",),
    "2:4 int8": ("2:4 int8",),
    "2:4 int4": ("2:4 int4", "2:4 nf4"),
}
MIXTURES = ((0.5, 0.5, 0.0), (0.25, 0.5, 0.25))  # the shares of blocks that are dense, 2:4 and top-k
PATTERN24 = Pattern(n=2, m=4)


@dataclass(frozen=True)
class Variant:
    """A layer as it is, or with a pruned weight.

    Args:
        layer: where it is in the model.
        module: the layer itself, or a copy with the pruned weight and its mask, and the bias of the layer.
        sample: calibration inputs, to measure errors on.
        pattern: of the zeros; None for the layer as it is.
    """

    layer: PrunableLayer
    module: Any
    sample: InputSample
    pattern: Pattern | None = None

    def error(self, module: Compressed) -> float:
        """Returns the relative error of the layer's outputs, without the bias, where a module stands for the layer."""
        dense = self.layer.weight.detach()
        if module.lossy:
            error = self.sample.output_error(module, self.module.bias, dense)
        elif self.pattern is None:
            error = 0.0
        else:
            error = self.sample.relative_error(dense, self.module.weight.detach())
        assert error is not None  # the layer was reached
        return error

    def write(self, undo: Undo) -> None:
        """Writes the pruned weight and its mask into the layer of the model."""
        if self.pattern is not None and (mask := get_mask(self.module)) is not None:
            with full_precision():
                apply_mask(self.layer, self.module.weight.detach(), mask, self.pattern, undo)


def precision_of(forms: Sequence[Form]) -> Precision | None:
    """Returns the ``precision`` of ``compress_`` that allows these forms."""
    return "int4" if "2:4 int4" in forms else "int8" if {"int8", "2:4 int8"} & {*forms} else None


def variants(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    batches: Any,
    forms: Sequence[Form],
    calibration: Calibration,
    progress: Progress,
) -> Iterator[list[Variant]]:
    """Yields the variants of each layer that a batch reaches, first the layer as it is."""
    make = partial(LayerInputs, statistic=Gram, token_mask=calibration.token_mask)
    with evaluating(model):
        ((_, collected),) = calibrate(
            model, layers, make, batches, calibration, Ranks("alone", None), progress=progress
        )
    left = [*collected]
    del collected
    for layer in progress(layers):
        inputs = left.pop(0)  # its statistic is freed when the layer is pruned
        if len(inputs.sample):
            with full_precision():
                pruned = [*_pruned(layer, inputs, forms)]
            yield [Variant(layer, layer.module, inputs.sample), *pruned]


def _pruned(layer: PrunableLayer, inputs: LayerInputs, forms: Sequence[Form]) -> Iterator[Variant]:
    weight, gram = layer.matrix(layer.weight.detach()), inputs.statistic
    assert isinstance(gram, Gram)
    if any(form.startswith("2:4") for form in forms) and weight.shape[1] >= 4:
        yield _variant(layer, inputs, PATTERN24, SparseGPT("2:4").prune(weight, gram))
    if "tiers" in forms:
        tier_map = TierMap.dense(weight)
        for shares in MIXTURES:
            demoted, _ = demote(weight, gram.norm, tier_map, shares)
            pattern = Pattern(n=demoted.k, unit=demoted.block, tiers=True)
            pruned, mask = prune_tiers(weight, gram.norm, demoted)
            yield _variant(layer, inputs, pattern, (pruned, mask))


def _variant(layer: PrunableLayer, inputs: LayerInputs, pattern: Pattern, found: tuple[Tensor, Tensor]) -> Variant:
    pruned, mask = (each.t().contiguous() if layer.axis == 0 else each for each in found)
    check_result(layer, pruned, "reach_")
    module: Any = copy.copy(layer.module)
    weight = nn.Parameter(pruned.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    module._parameters = {**layer.module._parameters, "weight": weight}
    module._buffers, module._non_persistent_buffers_set = {}, set()
    remove_mask(module)
    set_mask(module, mask, MaskInfo(pattern, layer.axis))
    return Variant(layer, module, inputs.sample, pattern)
