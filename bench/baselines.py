"""What the kernels are measured against."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import mkldnn

from .race import Calls


def copy_call(like: Tensor) -> tuple[Calls, int]:
    """A ``copy_`` of ``like``, which is what memory allows, and the bytes it moves."""
    target = torch.empty_like(like)
    return {"copy_": lambda: target.copy_(like)}, 2 * like.nbytes


def topk_scatter(score: Tensor, n: int, m: int) -> Tensor:
    """The N:M mask as it is usually written."""
    groups = score.abs().view(-1, m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(n).indices, True).view(score.shape)


def topk_prune(weight: Tensor, n: int, m: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """N:M pruning by a score as it is usually written."""
    mask = topk_scatter(weight.abs() * scale, n, m)
    return weight * mask, mask


def block_topk(score: Tensor, k: int, side: int = 16) -> Tensor:
    """The mask of the k best of every block as it is usually written."""
    rows, cols = score.shape
    blocks = score.abs().view(rows // side, side, cols // side, side).transpose(1, 2).reshape(-1, side * side)
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, blocks.topk(k).indices, True)
    return mask.view(rows // side, cols // side, side, side).transpose(1, 2).reshape(rows, cols)


def dense_calls(linear: nn.Linear, x: Tensor) -> Calls:
    """Every dense product that PyTorch has for this layer on a CPU; the fastest of a run is the best dense."""
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
