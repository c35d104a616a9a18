"""The tiered product against the dense one, at the shares that the three-tier pruner ends with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import name
from sparsekit.ops.tiered import TieredWeight, pack_tiered

from .lab import Lab
from .linear import DENSE, dense, one
from .log import Log

SHARES = (0.35, 0.45, 0.2)  # dense, 2:4 and top-k, of blocks of 16 x 16
KEPT = 10  # of a block of top-k
TOKENS = (1, 16, 1024)


@dataclass(frozen=True)
class Layer:
    """A linear layer, dense and packed."""

    dense: Tensor
    bias: Tensor
    packed: TieredWeight


def layers(lab: Lab, shape: tuple[int, int]) -> Sequence[Layer]:
    """Layers with random weights and tiers, as many as exceed the cache."""

    def make() -> Layer:
        blocks = [-(-side // 16) for side in shape]
        order = torch.randperm(blocks[0] * blocks[1], device=lab.device) / (blocks[0] * blocks[1])
        tiers = (order >= SHARES[0]).to(torch.uint8) + (order >= SHARES[0] + SHARES[1]).to(torch.uint8)
        weight = lab.op("tier_prune")(lab.randn(*shape) / shape[1] ** 0.5, tiers.view(blocks), KEPT, 16, 16, None, None)
        return Layer(weight[0], lab.randn(shape[0]), pack_tiered(weight[0], k=KEPT))

    return lab.sets(make, 2 * shape[0] * shape[1])


def product(lab: Lab, layer: Layer) -> Callable[[Tensor], Tensor]:
    op = lab.op("linear_tiered")
    return lambda x: op(x, *layer.packed, layer.bias, len(layer.dense))


def measure(lab: Lab, log: Log) -> None:
    """The most important shape; with many tokens, the weight is unpacked and cuBLAS multiplies."""
    shape = lab.sizes.linear[0]
    made = layers(lab, shape)
    forms = {DENSE: [dense(lab, layer) for layer in made], "linear_tiered": [product(lab, layer) for layer in made]}
    for what, tokens in log.each({f"{name(shape)}, {tokens} tokens": tokens for tokens in TOKENS}):
        with log.guard(what):
            row = one(lab, forms, {}, made[0], shape, tokens)
            log.write(**row | {"op": "linear_tiered", "goal": {}, "bytes": made[0].packed.nbytes})
