"""Experts whose weights share one parameter: each matrix is calibrated on the tokens that are routed to it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..._batches import Forward, observing, run_batch
from ..._forwards import around_forwards
from ..._layers import expert_axes, is_stack
from ..._trees import copied
from ..layers import ExpertAxes, PrunableLayer
from .expert_products import Product, Products
from .inputs import LayerInputs
from .padding import TokenMask, real_tokens
from .statistics import Exchange, Reduce, Statistic


class ExpertInputs(LayerInputs):
    """The inputs of the experts of one layer, collected separately for each expert."""

    def __init__(
        self, layer: PrunableLayer, statistic: type[Statistic] | None, token_mask: TokenMask | None = None
    ) -> None:
        self._layer, self._token_mask = layer, token_mask
        self.experts = [LayerInputs(each, statistic) for each in layer.experts]
        self.sample: Any = _Samples(self.experts)
        self.statistic = None

    def update(self, x: Any, batch: Any) -> None:
        """Adds the input of one product of one expert: ``x`` is a ``Product``."""
        every = torch.arange(x.of, device=x.x.device)[:, None]
        real = real_tokens(every, self._layer, batch, self._token_mask)
        rows = x.x if real is every else x.x[torch.isin(x.tokens, real[:, 0])]
        self.experts[x.expert].update(rows, None)

    def reduce(self, exchange: Exchange, reduce: Reduce) -> None:
        for each in self.experts:
            each.reduce(exchange, reduce)


class _Samples:
    """The input samples of all experts of a layer."""

    def __init__(self, experts: list[LayerInputs]) -> None:
        self._experts = experts

    def __len__(self) -> int:
        return sum(len(each.sample) for each in self._experts)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """Returns the mean error of the experts that got a token; None if no expert did."""
        each = zip(self._experts, before, after, strict=True)
        errors = [error for inputs, *weights in each if (error := inputs.sample.relative_error(*weights)) is not None]
        return sum(errors) / len(errors) if errors else None


def make_inputs(
    layer: PrunableLayer, statistic: type[Statistic] | None, token_mask: TokenMask | None = None
) -> LayerInputs:
    """Makes the object that collects the inputs of a layer."""
    return (ExpertInputs if layer.experts else LayerInputs)(layer, statistic, token_mask)


def watch_experts(
    module: nn.Module, layers: Iterable[PrunableLayer], record: Callable[[PrunableLayer, Product], None]
) -> Products:
    """Returns a mode that calls ``record`` with every product of the module's experts while the module runs."""
    by_key = {layer.parameter: layer for layer in layers}

    def see(product: Product) -> None:
        layer = by_key[product.key]
        if product.along == layer.axis and _is_whole(product, module):
            record(layer, product)

    return Products({key: module.get_parameter(key) for key in by_key}, see)


def find_experts(model: nn.Module, first: Callable[[], list[Any]], forward: Forward | None) -> ExpertAxes:
    """Finds the parameters of three dimensions whose matrices a pass multiplies by, and the dimension of the inputs.

    It watches only the modules that are not known to have experts. If none of them has such a parameter, nothing runs.
    ``first()`` returns a list with the batch to run.
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
        with observing(model), around_forwards(arounds):
            for batch in first():
                run_batch(model, copied(batch), forward)
    return found


def _is_whole(product: Product, module: nn.Module) -> bool:
    """Returns whether the product uses all inputs of a matrix, not only a part of them."""
    return product.x.shape[-1] == module.get_parameter(product.key).shape[product.along]


def _unknown_stacks(module: nn.Module) -> list[str]:
    if expert_axes(module) or isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return []
    own = module._parameters.items()
    return [key for key, parameter in own if is_stack(parameter) and parameter is not None and len(parameter) > 1]
