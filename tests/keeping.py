"""Models to fine-tune under keep_masks, and optimizers that write their weights."""

import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask

X = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    sk.prune_(model, sk.Magnitude("2:4"))
    return model


def adamw(model, **arguments):
    return torch.optim.AdamW(model.parameters(), lr=0.1, **arguments)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def kept(model):
    layers = [module for module in model.modules() if get_mask(module) is not None]
    assert len(layers) == 2
    return all(torch.equal(_whole(layer.weight) != 0, get_mask(layer)) for layer in layers)


def _whole(weight):
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


class Slow:
    """A wrapper that moves the weights after the steps of its optimizer, as Lookahead does."""

    def __init__(self, inner, every=2):
        self.inner, self.every, self.count = inner, every, 0
        self.param_groups, self.zero_grad = inner.param_groups, inner.zero_grad
        self.slow = [torch.rand_like(parameter) for group in inner.param_groups for parameter in group["params"]]

    def step(self):
        self.inner.step()
        self.count += 1
        if self.count % self.every == 0:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            for parameter, slow in zip(parameters, self.slow, strict=True):
                parameter.data.lerp_(slow, 0.5)


class SlowOptimizer(Slow, torch.optim.SGD):
    """The same wrapper as an ``Optimizer`` whose step calls hooks."""

    def __init__(self, inner):
        torch.optim.SGD.__init__(self, inner.param_groups, lr=0.1)
        Slow.__init__(self, inner, every=1)
        self.param_groups = inner.param_groups


class Codes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        assert "fill" not in str(function) and "scatter" not in str(function)
        return super().__torch_function__(function, types, arguments, named or {})
