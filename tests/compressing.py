"""Models to compress, and what must not change."""

import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask_info


class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Conv1D(nn.Module):
    """A layer as transformers has it: the weight is ``[inputs, outputs]``."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


def blocks(count=2, pruned=True):
    model = nn.Sequential(*[Block() for _ in range(count)]).eval()
    if pruned:
        sk.prune_(model, sk.Magnitude("2:4"))
    return model


def snapshot(model):
    """Everything that compress_ must not change: objects, tensors and flags."""
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype, p.detach().clone()) for name, p in model.named_parameters()],
        [(name, buffer.clone()) for name, buffer in model.named_buffers()],
        list(model.state_dict()),
        [get_mask_info(module) for module in model.modules()],
        "save_pretrained" in vars(model),
    )


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        elif isinstance(left, tuple | list):
            assert_same(left, right)
        else:
            assert left == right


def decisions(report):
    return {layer.name: layer.decision for layer in report.layers}


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers}
