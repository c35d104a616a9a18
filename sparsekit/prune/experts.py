"""Experts that lie in one parameter: each is a matrix of its own, calibrated on the tokens that are routed to it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Forward, passes, run_batch
from .._forwards import around_forwards
from .._layers import expert_axes, is_stack
from .._trees import copied
from .inputs import Exchange, Inputs
from .layers import ExpertAxes, Layer
from .methods import Magnitude, Method
from .padding import TokenMask, real_tokens
from .products import Product, Products
from .statistics import Reduce, Statistic

Prune = Callable[[Layer, Method, Inputs | None], tuple[Tensor, Tensor]]  # to a new weight and its mask


class ExpertInputs(Inputs):
    """What the experts of one layer were shown, each for itself."""

    def __init__(self, layer: Layer, statistic: type[Statistic] | None, token_mask: TokenMask | None = None) -> None:
        self._layer, self._token_mask = layer, token_mask
        self.experts = [Inputs(each, statistic) for each in layer.experts]
        self.sample: Any = _Samples(self.experts)
        self.statistic = None

    def update(self, x: Any, batch: Any) -> None:
        """Takes in what one expert multiplied: ``x`` is a ``Product``."""
        every = torch.arange(x.of, device=x.x.device)[:, None]
        real = real_tokens(every, self._layer, batch, self._token_mask)
        rows = x.x if real is every else x.x[torch.isin(x.tokens, real[:, 0])]
        self.experts[x.expert].update(rows, None)

    def reduce(self, exchange: Exchange, reduce: Reduce) -> None:
        for each in self.experts:
            each.reduce(exchange, reduce)


class _Samples:
    """The samples of all experts of a layer."""

    def __init__(self, experts: list[Inputs]) -> None:
        self._experts = experts

    def __len__(self) -> int:
        return sum(len(each.sample) for each in self._experts)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """The mean of the experts that any token reached."""
        each = zip(self._experts, before, after, strict=True)
        errors = [error for inputs, *weights in each if (error := inputs.sample.relative_error(*weights)) is not None]
        return sum(errors) / len(errors) if errors else None


def gather_inputs(layer: Layer, statistic: type[Statistic] | None, token_mask: TokenMask | None = None) -> Inputs:
    """Makes what a layer's inputs are summed up in."""
    return (ExpertInputs if layer.experts else Inputs)(layer, statistic, token_mask)


def prune_experts(layer: Layer, method: Method, inputs: Inputs | None, prune: Prune) -> tuple[Tensor, Tensor, str]:
    """Prunes every expert of a layer by ``prune``; one that no token reached by its magnitudes.

    Returns:
        The new weights and the masks, ``[experts, ...]`` both, and a remark on experts that no token reached.
    """
    found, missed = list[tuple[Tensor, Tensor]](), 0
    shown: Iterable[Inputs | None] = inputs.experts if isinstance(inputs, ExpertInputs) else [None] * len(layer.experts)
    for expert, own in zip(layer.experts, shown, strict=True):
        if own is not None and own.statistic is not None and not len(own.sample):
            missed += 1
            found.append(prune(expert, Magnitude(method.pattern), None))
        else:
            found.append(prune(expert, method, own))
    weights, masks = (torch.stack(each) for each in zip(*found, strict=True))
    remark = f"{missed} of {len(found)} experts got no token and are pruned by magnitude" if missed else ""
    return weights, masks, remark


def watch_experts(module: nn.Module, layers: Iterable[Layer], record: Callable[[Layer, Product], None]) -> Products:
    """A mode that calls ``record`` with what the experts of a module multiply, to be on while the module runs."""
    by_key = {layer.parameter: layer for layer in layers}

    def see(product: Product) -> None:
        layer = by_key[product.key]
        if product.along == layer.axis and _is_whole(product, module):
            record(layer, product)

    return Products({key: module.get_parameter(key) for key in by_key}, see)


def find_experts(model: nn.Module, first: Callable[[], list[Any]], forward: Forward | None) -> ExpertAxes:
    """Which parameters of three dimensions a pass multiplies by as stacks of matrices, and along which dimension.

    Only those of which nothing else tells are looked at; where there are none, nothing runs. ``first()`` lists the
    batch that is run.
    """
    found: dict[nn.Module, dict[str, int]] = {}

    def around(module: nn.Module, keys: list[str]) -> Callable[..., Any]:
        def see(product: Product) -> None:
            if _is_whole(product, module):
                found.setdefault(module, {}).setdefault(product.key, product.along)

        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with Products({key: module.get_parameter(key) for key in keys}, see):
                return call(*args, **kwargs)

        return run

    unknown = {module: keys for module in model.modules() if (keys := _unknown_stacks(module))}
    if unknown:
        arounds = {module: around(module, keys) for module, keys in unknown.items()}
        with passes(model), around_forwards(arounds):
            for batch in first():
                run_batch(model, copied(batch), forward)
    return found


def _is_whole(product: Product, module: nn.Module) -> bool:
    """Whether the product is with all inputs of a matrix, not with a part of them."""
    return product.x.shape[-1] == module.get_parameter(product.key).shape[product.along]


def _unknown_stacks(module: nn.Module) -> list[str]:
    if expert_axes(module) or isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return []
    own = module._parameters.items()
    return [key for key, parameter in own if is_stack(parameter) and parameter is not None and len(parameter) > 1]
