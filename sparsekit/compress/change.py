"""Measures what lossy layers change: each layer's outputs on its own inputs, and the outputs of the whole model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .._batches import layer_input, observing, run_batch
from .._forwards import around_forwards
from .._trees import copied, tensors_in
from ..nn import Compressed
from .swap import Swap
from .whole import Passes


@dataclass(frozen=True)
class LayerError:
    """The relative error of a lossy layer.

    Args:
        error: the norm of the change over the norm of what is changed.
        of: ``"outputs"``, without the bias, on the layer's own inputs; or ``"weight"``, where no pass could be run.
    """

    error: float
    of: str


@dataclass(frozen=True)
class OutputChange:
    """The change of the outputs of the whole model on the batches, which all its lossy layers make together.

    Args:
        error: the norm of the change over the norm of the outputs.
        agreement: the share of positions whose largest logit stays the largest; None without ``logits``.
    """

    error: float
    agreement: float | None


def weight_errors(swap: Swap, modules: Mapping[str, Compressed]) -> dict[str, LayerError]:
    """Returns how much the weights of layers change."""
    found = {}
    for name, module in modules.items():
        total = _Ratio()
        total.add(swap.sites[name].layer.weight, module.weight.detach().clone())
        found[name] = LayerError(total.value, "weight")
    return found


def output_errors(swap: Swap, modules: Mapping[str, Compressed], passes: Passes) -> dict[str, LayerError]:
    """Returns how much the outputs of layers change on the inputs that they get in the plain model."""
    ratios = {name: _Ratio() for name in modules}

    def around(name: str) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            y, bias = forward(*args, **kwargs), swap.sites[name].layer.bias
            for part, other in zip(_parts(y), _parts(modules[name](layer_input(args, kwargs))), strict=True):
                zero = 0 if bias is None else bias
                ratios[name].add(part - zero, other - zero)
            return y

        return run

    swap.show({})
    with observing(swap.model), around_forwards({swap.sites[name].layer: around(name) for name in modules}):
        for batch in passes.batches:
            run_batch(swap.model, copied(batch), passes.forward)
    return {name: LayerError(ratio.value, "outputs") for name, ratio in ratios.items()}


def output_change(swap: Swap, modules: Mapping[str, Compressed], passes: Passes) -> OutputChange:
    """Returns how much the outputs of the model change with these layers compressed."""
    change, same, positions = _Ratio(), 0, 0
    with observing(swap.model):
        for batch in passes.batches:
            outputs = []
            for shown in ({}, modules):
                swap.show(shown)
                outputs.append(copied(run_batch(swap.model, copied(batch), passes.forward)))
            plain, other = outputs
            for one, two in zip(tensors_in(plain), tensors_in(other), strict=True):
                if one.is_floating_point():
                    change.add(one, two)
            if (logits := _logits(plain)) is not None:
                equal = logits.argmax(-1) == _logits(other).argmax(-1)  # type: ignore[union-attr]
                same, positions = same + int(equal.sum()), positions + equal.numel()
    return OutputChange(change.value, same / positions if positions else None)


@dataclass
class _Ratio:
    """The norm of a change over the norm of what is changed, over many tensors."""

    changed: float = 0.0
    whole: float = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        one, other = one.detach().double(), other.detach().double()
        self.changed += float((one - other).square().sum())
        self.whole += float(one.square().sum())

    @property
    def value(self) -> float:
        return (self.changed / self.whole) ** 0.5 if self.whole else 0.0


def _parts(y: Tensor) -> list[Tensor]:
    return list(y.unbind()) if y.is_nested else [y]


def _logits(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() > 0 else None
