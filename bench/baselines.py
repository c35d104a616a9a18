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


def dense_convolution_calls(conv: nn.Conv2d, x: Tensor) -> Calls:
    """Returns every dense convolution that PyTorch has for this layer on a CPU, with images in either layout."""
    bias, geometry = conv.bias, (conv.padding, conv.stride, conv.dilation)
    calls: Calls = {}
    for layout, form in {"": torch.contiguous_format, "channels last": torch.channels_last}.items():
        weight, image = (each.detach().contiguous(memory_format=form) for each in (conv.weight, x))
        calls[f"F.conv2d {layout}".strip()] = _dense_convolution(image, weight, bias, *geometry)
        with suppress(RuntimeError):  # oneDNN refuses a dtype that the CPU does not compute in
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, 1, image.shape)
            calls[f"prepacked {layout}".strip()] = _prepacked_convolution(image, packed, bias, *geometry)
    return calls


def _dense_convolution(x, weight, bias, padding, stride, dilation):  # type: ignore[no-untyped-def]
    return lambda: F.conv2d(x, weight, bias, stride, padding, dilation)


def _prepacked_convolution(x, packed, bias, *geometry):  # type: ignore[no-untyped-def]
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, 1, "none", [], "")
