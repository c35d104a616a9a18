import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.ops import arrange_conv24, arranged_conv2d24

from .baselines import dense_convolution_calls
from .shapes import CONVOLUTIONS, TOLERANCE

GOAL = {"unet": 1.3, "resnet": 1.2}


@pytest.mark.parametrize("op", ["conv2d24", "conv2d24 row pairs"])
@pytest.mark.parametrize("model, images, outputs, inputs, size, kernel", CONVOLUTIONS)
def bench_conv24(record, op, model, images, outputs, inputs, size, kernel):
    padding = kernel // 2
    conv = torch.nn.Conv2d(inputs, outputs, kernel, padding=padding)
    rows, _ = sk.nm_prune(conv.weight.permute(0, 2, 3, 1).flatten(0, 2), 2, 4)
    conv.weight.copy_(rows.view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2))
    x, packed = torch.randn(images, inputs, size, size), sk.pack_conv24(conv.weight)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=padding)
    arranged = arrange_conv24(packed)
    products = {
        "conv2d24": lambda: sk.conv2d24(x, packed, conv.bias, padding=padding),
        "conv2d24 row pairs": lambda: arranged_conv2d24(x, arranged, conv.bias, padding=padding),
    }
    assert (products[op]() - expected).abs().max() <= TOLERANCE["fp32"] * expected.abs().max()
    row = {
        "op": op,
        "shape": f"{outputs}x{inputs}x{kernel}x{kernel} on {size}x{size}",
        "dtype": "fp32",
        "tokens": images * size * size,
        "goal": {"best dense": GOAL[model]},
        "limit": 2,
        "flops": 2 * expected.numel() * inputs * kernel**2,
    }
    dense = dense_convolution_calls(conv, x)
    record(row, products[op], dense, best=dense)
