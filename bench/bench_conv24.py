import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.nn import ArrangedConv2d24, Conv2d24

from .baselines import dense_convolution_calls
from .shapes import CONVOLUTIONS, TOLERANCE

GOAL = {"unet": 1.3, "resnet": 1.2}
FORMS = {"conv2d24": Conv2d24, "conv2d24 row pairs": ArrangedConv2d24}


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("model, images, outputs, inputs, size, kernel", CONVOLUTIONS)
def bench_conv24(record, op, model, images, outputs, inputs, size, kernel):
    padding = kernel // 2
    conv = torch.nn.Conv2d(inputs, outputs, kernel, padding=padding)
    rows, _ = sk.nm_prune(conv.weight.permute(0, 2, 3, 1).flatten(0, 2), 2, 4)
    conv.weight.copy_(rows.view(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2))
    x, layer = torch.randn(images, inputs, size, size), FORMS[op].from_conv2d(conv)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=padding)
    assert (layer(x) - expected).abs().max() <= TOLERANCE["fp32"] * expected.abs().max()
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
    record(row, lambda: layer(x), dense, best=dense)
