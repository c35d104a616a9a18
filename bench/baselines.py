"""Baselines: a copy, and the dense products of PyTorch."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import mkldnn

from .timing import Calls


def copy_call(like: Tensor) -> tuple[Calls, int]:
    """Returns a ``copy_`` of ``like``, which shows the bandwidth of memory, and the bytes that it moves."""
    target = torch.empty_like(like)
    return {"copy_": lambda: target.copy_(like)}, 2 * like.nbytes


def dense_calls(linear: nn.Linear, x: Tensor) -> Calls:
    """Returns every dense product that PyTorch has for this layer on a CPU; the fastest of a run is the best dense."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    calls: Calls = {"F.linear": lambda: F.linear(x, weight, bias)}
    with suppress(RuntimeError):  # oneDNN refuses a dtype that the CPU does not compute in
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        calls["prepacked"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    with suppress(RuntimeError):
        module, laid_out = mkldnn.to_mkldnn(linear, x.dtype), x.to_mkldnn()
        module(laid_out)
        calls["to_mkldnn"] = lambda: module(laid_out)
    return calls
