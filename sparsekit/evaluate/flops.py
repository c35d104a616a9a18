"""``count_flops``: what a pass of a model computes, if all were dense, if zeros were free, and as it is executed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._batches import Forward, hooking, observing, run_batch
from .._layers import check_model, input_dim
from .._trees import copied
from ..nn import Compressed, Conv2d24, Linear24, QuantizedLinear24, TieredLinear
from ..ops.sparse24 import values_per_row

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class FlopCount:
    """The floating-point operations of one pass, two for each multiply-add.

    Matrix products and convolutions count, those of attention too; norms, activations and embeddings do not.

    Args:
        dense: as if every layer multiplied by all entries of its weight.
        effective: as if every layer multiplied by the non-zero entries of its weight alone: what sparsity could save.
        executed: what is computed: a plain layer multiplies by its zeros, a 2:4 layer by half of its weight.
    """

    dense: int
    effective: int
    executed: int

    @property
    def macs(self) -> int:
        """The multiply-adds that are executed, half of the operations."""
        return self.executed // 2


@dataclass
class _Calls:
    """The output positions of a layer over all its calls, and what the counter saw in them."""

    positions: int = 0
    seen: int = 0


def count_flops(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> FlopCount:
    """Counts the operations of one pass, with torch's counter and what compressed layers say of themselves.

    Attention is computed by plain products meanwhile, because the counter does not see the fused kernel of a CPU:
    DistilBERT at 1 x 128 takes 11,174,808,576.

    Args:
        model: any model, also with layers of ``compress_``, which is run in evaluation mode. On the meta device, where
            nothing is computed, all weights count as non-zero.
        batch: one batch; the count is for its size.
        forward: ``forward(model, batch)`` replaces how the model is called.

    Raises:
        TypeError: ``model`` is not a module.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton, which nothing else here needs

    check_model(model)
    layers = [each for each in model.modules() if isinstance(each, Compressed) or input_dim(each) is not None]
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), observing(model), _watching(layers, counter) as calls:
        with sdpa_kernel(SDPBackend.MATH), counter:
            run_batch(model, copied(batch), forward)
        dense = effective = executed = counter.get_total_flops()
        for layer, found in calls.items():
            whole, shape = 2 * found.positions, _shape(layer)
            if isinstance(layer, Compressed):
                dense += whole * math.prod(shape) - found.seen
                executed += whole * _multiplied(layer) - found.seen
                effective -= found.seen
            else:
                effective -= whole * math.prod(shape)
            effective += whole * _nonzero(layer)
    return FlopCount(dense, effective, executed)


@contextmanager
def _watching(layers: list[nn.Module], counter: "FlopCounterMode") -> Iterator[dict[nn.Module, _Calls]]:
    """Records the calls of layers, until the end."""
    calls: dict[nn.Module, _Calls] = {}

    def before(layer: nn.Module, args: Any) -> None:
        calls.setdefault(layer, _Calls()).seen -= counter.get_total_flops()

    def after(layer: nn.Module, args: Any, output: Tensor) -> None:
        calls[layer].seen += counter.get_total_flops()
        calls[layer].positions += output.numel() // _outputs(layer)

    with hooking() as hooks:
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_hook(after))
        yield calls


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _nonzero(layer: nn.Module) -> int:
    weight = _weight(layer)
    return weight.numel() if weight.is_meta else int(weight.count_nonzero())


def _shape(layer: nn.Module) -> tuple[int, ...]:
    return tuple(_weight(layer).shape)


def _outputs(layer: nn.Module) -> int:
    """Returns the number of outputs of a layer at one position."""
    transposed = layer.transposed if isinstance(layer, Compressed) else input_dim(layer) == 0
    return _shape(layer)[1 if transposed else 0]


def _multiplied(layer: Compressed) -> int:
    """Returns how many entries of its weight a layer multiplies by at one position."""
    if isinstance(layer, TieredLinear):
        packed = layer.packed
        return packed.dense.numel() + packed.values.numel() + packed.topk.numel()
    shape = _shape(layer)
    if isinstance(layer, Linear24 | QuantizedLinear24):
        outputs = _outputs(layer)
        return outputs * values_per_row(math.prod(shape) // outputs)
    if isinstance(layer, Conv2d24):
        outputs, inputs, *kernel = shape
        return outputs * math.prod(kernel) * values_per_row(inputs)
    return math.prod(shape)
