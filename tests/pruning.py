"""Models to prune, and what a failure must bring back."""

from itertools import pairwise

import torch
from torch import nn

from sparsekit.masks import Pattern, get_mask, get_mask_info
from sparsekit.prune import Gram
from sparsekit.prune.layers import find_layers


def stack(*widths):
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return layer


def gram_of(layer, *inputs, axis="input"):
    """Returns the Gram matrix of a layer that is called with these inputs."""
    gram = Gram(find_layers(layer, Pattern.parse("2:4"), axis, None)[0][0])
    for x in inputs:
        gram.update(x)
    return gram


def correlated(tokens, inputs):
    """Returns random inputs whose columns are correlated and differ widely in size."""
    return torch.randn(tokens, inputs) @ torch.randn(inputs, inputs) * torch.randn(inputs).exp()


class Killed(BaseException):
    """Ends a run from inside, as a kill would."""


def snapshot(model):
    """Everything a failure must bring back, as bits."""
    bits = {name: tensor.clone().view(torch.int32) for name, tensor in model.state_dict().items()}
    masks = {name: (get_mask(module), get_mask_info(module)) for name, module in model.named_modules()}
    return bits, masks, [module.training for module in model.modules()]


def assert_restored(model, before):
    """Asserts that the model is, to the bit, what ``snapshot`` saw, and has no hooks left."""
    bits, masks, training = snapshot(model)
    assert all(torch.equal(bits[name], tensor) for name, tensor in before[0].items())
    assert masks.keys() == before[1].keys()
    for name, (mask, info) in before[1].items():
        assert masks[name][1] == info and (masks[name][0] is None) == (mask is None)
        assert mask is None or torch.equal(masks[name][0], mask)
    assert training == before[2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def layer_error(weight, pruned, gram):
    """``||X (W - W')^T||^2 / ||X W^T||^2`` from the Gram matrix of ``X``."""
    lost = weight - pruned
    return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())
