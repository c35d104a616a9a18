"""Models for the tests of checkpoints, and the state that a checkpoint must restore."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiering import prune_tiers
from torch import nn

import sparsekit as sk
from sparsekit import _safetensors
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import Int8Linear, Linear24, PrepackedLinear, QuantizedLinear24, TieredLinear

ROWS, COLS = 12, 10  # the columns end in a tail of two, the mask rows within a byte


class Net(nn.Module):
    """A model with a tied embedding and head, a normalization with buffers, a convolution and three linear layers."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, COLS)
        self.first = nn.Linear(COLS, ROWS)
        self.second = nn.Linear(ROWS, ROWS, bias=False)
        self.third = nn.Linear(ROWS, COLS)
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(COLS, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.third(torch.relu(self.second(torch.relu(self.first(self.embed(tokens))))))
        image = x.flatten()[:64].view(1, 4, 4, 4)
        return self.head(x) + self.norm(self.conv(image)).mean()


TOKENS = torch.arange(7).repeat(2)


def make(seed: int = 0, tied: bool = True) -> Net:
    torch.manual_seed(seed)
    model = Net(tied).eval()
    model.norm.running_mean.normal_()
    return model


def prune(model: Net) -> Net:
    for layer in (model.first, model.second, model.third):
        mask = sk.nm_prune_(layer.weight, 2, 4)
        set_mask(layer, mask, MaskInfo(Pattern.parse("2:4"), 1))
    mask = sk.nm_prune_(model.conv.weight.detach().view(3, -1), 1, 4).view(3, 4, 3, 3)
    set_mask(model.conv, mask, MaskInfo(Pattern.parse("1:4"), "flatten"))
    return model


def mixed(model: Net) -> Net:
    model = prune(model)
    model.first = Linear24.from_linear(model.first)
    model.second = PrepackedLinear.from_linear(model.second, tokens=16)
    return model


def tiered(model: Net) -> Net:
    """Returns a tiered layer in blocks of 8x8, padded at both edges: 2 dense, 2 of 2:4 and 2 of top-3."""
    for layer in (model.second, model.third):
        prune_tiers(layer, block=(8, 8), k=3, shares=(0.25, 0.5))
    model.third = TieredLinear.from_linear(model.third)
    return model


def lossy(model: Net, inputs: str = "int8") -> Net:
    model = prune(model)
    model.first = QuantizedLinear24.from_linear(model.first, inputs=inputs)
    model.second = QuantizedLinear24.from_linear(model.second, quant_type="nf4", group=8, inputs=inputs)
    model.third = Int8Linear.from_linear(model.third)
    return model


MAKERS = {
    "dense": make,
    "pruned": lambda: prune(make()),
    "mixed": lambda: mixed(make()),
    "tiered": lambda: tiered(make()),
    "lossy": lambda: lossy(make()),
}
TARGETS = {
    "fresh": lambda: make(1),
    "pruned": lambda: prune(make(1)),
    "mixed": lambda: mixed(make(1)),
    "tiered": lambda: tiered(make(1)),
    "lossy": lambda: lossy(make(1), "float"),
    "untied": lambda: make(1, tied=False),
}


def contents(model):
    """Returns everything that a checkpoint must restore, as plain comparable values."""
    state = {name: (tensor.dtype, tensor.clone().flatten().tolist()) for name, tensor in model.state_dict().items()}
    masks = {
        name: (get_mask(module).tolist(), get_mask_info(module))
        for name, module in model.named_modules()
        if get_mask_info(module)
    }
    kinds = {name: (type(module), module.training) for name, module in model.named_modules()}
    return state, masks, kinds


def refuse(path, match, model=None):
    """Asserts that the file is refused by name and for this reason, and that the model is unchanged."""
    model = mixed(make(1)) if model is None else model
    before, modules = contents(model), list(model.modules())
    with pytest.raises(ValueError, match=match) as caught:
        sk.load(model, path)
    assert str(path) in str(caught.value)
    assert contents(model) == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def put(*keys, value):
    """A change for ``forge``: the value at these keys of the structure."""

    def change(structure, tensors):
        *parents, last = keys
        for key in parents:
            structure = structure[key]
        structure[last] = value

    return change


def drop(name):
    """A change for ``forge`` that deletes a tensor."""

    def change(structure, tensors):
        del tensors[name]

    return change


def forge(path, change):
    """Rewrites a checkpoint with a changed structure or tensors and a digest that fits, as a hostile writer would."""
    with safe_open(path, "pt") as file:
        structure = json.loads(file.metadata()["sparsekit"])
    tensors = load_file(path)
    structure = change(structure, tensors) or structure
    text = structure if isinstance(structure, str) else json.dumps(structure)
    _safetensors.write_tensors(path, tensors, _safetensors.seal(text, tensors))
