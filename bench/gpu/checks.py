"""Check 2: the vendor's product from torch's training pruner, and from the fused op that replaces it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import name

from .lab import Lab, reference, relative_error
from .linear import TOLERANCE
from .log import Log
from .vendor import Algorithm

TOKENS = 64


def measure(lab: Lab, log: Log) -> None:
    """Multiplies by what each packer made, against the masked dense weight in fp32."""
    for what, shape in log.each({name(shape): shape for shape in lab.sizes.both_ways}):
        weight, x = lab.randn(*shape), lab.randn(TOKENS, shape[1])
        for key, product in CHECKS.items():
            with log.guard(f"{key} {what}"):
                error = product(lab, weight, x)
                log.write(
                    name=key, shape=what, error_norm=error, right=all(each <= TOLERANCE for each in error.values())
                )


def _torch(lab: Lab, weight: Tensor, x: Tensor) -> dict[str, float]:
    sparse, dense = lab.vendor.tile(weight)
    return {"forward": relative_error(torch.mm(sparse, x.t()), dense.float() @ x.float().t())}


def _vendor(lab: Lab, weight: Tensor, x: Tensor) -> dict[str, float]:
    """What the vendor packs itself must be right everywhere: this tells a wrong layout from a wrong call."""
    dense = reference("nm_prune")(weight, 2, 4, None)[0]
    return {"forward": _product_error(lab, lab.vendor.compress(dense), dense, x)}


def _own_one_way(lab: Lab, weight: Tensor, x: Tensor) -> dict[str, float]:
    packed = lab.op("prune_to_hardware24")(weight, None, lab.layout)
    return {"forward": _product_error(lab, packed, reference("nm_prune")(weight, 2, 4, None)[0], x)}


def _own_both_ways(lab: Lab, weight: Tensor, x: Tensor) -> dict[str, float]:
    packed, packed_t, _ = lab.op("prune_both_to_hardware24")(weight, lab.layout)
    dense = torch.where(reference("transposable_mask")(weight), weight, 0)
    backward = lab.randn(x.shape[0], weight.shape[0])
    return {
        "forward": _product_error(lab, packed, dense, x),
        "backward": _product_error(lab, packed_t, dense.t(), backward),
    }


def _product_error(lab: Lab, packed: Tensor, dense: Tensor, x: Tensor) -> float:
    got = lab.vendor.linear(x, packed, None, dense.shape[0], Algorithm())
    return relative_error(got, F.linear(x.float(), dense.float()))


CHECKS = {
    "torch's tile": _torch,
    "vendor's compress": _vendor,
    "own, one way": _own_one_way,
    "own, both ways": _own_both_ways,
}
