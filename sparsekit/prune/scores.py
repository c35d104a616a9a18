"""The method that prunes by given scores."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._digest import digest
from .._optimizers import is_sharded
from ..masks import Pattern, grouped
from .layers import PrunableLayer
from .methods import Method


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Method):
    """A method that keeps the weights with the largest of the scores that it is given. Needs no batches.

    ::

        scores = sk.taylor_scores(model, loss_fn, batches)
        sk.prune_(model, sk.Scores("2:4", scores))

    In several processes the scores must be the same in all: add them up first. ``prune_`` compares them if it is given
    batches.

    Args:
        pattern: what to keep.
        scores: a tensor in the shape of the weight for each layer, by the layer's name or that of its weight, on any
            device; or one tensor, if the model is a single layer. Names of other layers do no harm. Scores are ranked
            by magnitude, in float32, so that a sign has no meaning, and may be infinite.

    Raises:
        TypeError: ``scores`` is neither a tensor nor a mapping from names to tensors.
        ValueError: ``pattern`` is not a pattern, or a score is NaN or not a real number. From ``prune_``, before
            anything is changed: a layer has no scores, or they are of another shape.
    """

    scores: Mapping[str, Tensor] | Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.scores, Tensor | Mapping):
            raise TypeError(f"scores must be a mapping from layer names to tensors, got {type(self.scores).__name__}")
        for name, each in ({"": self.scores} if isinstance(self.scores, Tensor) else self.scores).items():
            what = f"the scores of {name}" if name else "scores"
            if not isinstance(each, Tensor):
                raise TypeError(f"{what} must be a tensor, got {type(each).__name__}")
            if is_sharded(each) or each.is_complex() or torch.isnan(each.detach()).any():
                raise ValueError(f"{what} must be real numbers without NaN, in a tensor that is not sharded")

    def __repr__(self) -> str:
        count = 1 if isinstance(self.scores, Tensor) else len(self.scores)
        return f"Scores({self.pattern!r}, of {count} {'layer' if count == 1 else 'layers'}, {digest(self.scores)[:8]})"

    def for_layer(self, layer: PrunableLayer) -> Method:
        name = layer.name.removesuffix(f"[{layer.expert}]")
        if isinstance(self.scores, Tensor):
            scores = None if name else self.scores
        else:
            scores = self.scores.get(name, self.scores.get(layer.weight_name))
        if scores is None:
            raise ValueError(f"there are no scores for layer {name!r}: give some, or leave it out by where=...")
        weight = layer.module.get_parameter(layer.parameter)
        if scores.shape != weight.shape:
            raise ValueError(
                f"the scores of layer {name!r} must have the shape of its weight, {tuple(weight.shape)}, "
                f"got {tuple(scores.shape)}"
            )
        if layer.expert is not None:
            scores = scores[layer.expert]
        return Scores(self.pattern, grouped(scores.detach(), layer.axis))

    def prune(self, weight: Tensor, statistic: None) -> tuple[Tensor, Tensor]:
        assert isinstance(self.scores, Tensor)  # for_layer has chosen them
        mask = Pattern.parse(self.pattern).mask(self.scores.to(weight.device, torch.float32))
        return torch.where(mask, weight, 0), mask
