"""Which inputs a layer is calibrated on, for any tree of modules and any kind of batches."""

import copy

import pytest
import torch
from pruning import assert_restored, snapshot, stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune import InputNorm
from sparsekit.prune.layers import find_layers


class Reversed(nn.Module):
    """Runs its blocks in another order than it holds them, and one layer outside of the list."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(3)])
        self.runs = []

    def forward(self, x):
        for block in reversed(self.blocks):
            x = x + block(x)
        self.runs.append(self.training)
        return self.head(x)


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
def test_blocks_see_pruned_or_dense_inputs(sequential):
    torch.manual_seed(0)
    model = Reversed().train()
    model.blocks[1].eval()
    x = torch.randn(200, 16) * torch.rand(16).exp()
    dense = copy.deepcopy(model)
    expected = copy.deepcopy(model).requires_grad_(False)
    stream = x
    for index in (2, 1, 0):  # by hand; both layers of a block are calibrated with the dense block
        hidden = torch.tanh(dense.blocks[index][0](stream))
        block = expected.blocks[index]
        for layer, inputs in ((block[0], stream), (block[2], hidden)):
            norm = inputs.square().mean(0).sqrt()
            layer.weight.copy_(sk.nm_prune(layer.weight, 2, 4, scale=norm.detach())[0])
        stream = stream + (block if sequential else dense.blocks[index])(stream)
    norm = stream.square().mean(0).sqrt().detach()
    expected.head.weight.copy_(sk.nm_prune(expected.head.weight, 2, 4, scale=norm)[0])

    report = sk.prune_(model, sk.Wanda("2:4"), list(x.split(64)), calibration=sk.Calibration(sequential=sequential))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    if sequential:
        assert [layer.name[:8] for layer in report.layers[::2]] == ["blocks.2", "blocks.1", "blocks.0", "head"]
    assert model.runs == [False] * (4 + 4 if sequential else 4)  # a look at the order, and to the head
    assert [module.training for module in model.blocks] == [True, False, True] and model.training


def test_sequential_differs_from_one_pass():
    torch.manual_seed(0)
    model, x = stack(32, 32, 32, 32), torch.randn(50, 32)
    other = copy.deepcopy(model)
    sk.prune_(model, sk.Wanda("2:4"), [x])
    sk.prune_(other, sk.Wanda("2:4"), [x], calibration=sk.Calibration(sequential=False))
    assert torch.equal(model[0].weight, other[0].weight) and not torch.equal(model[4].weight, other[4].weight)


def test_lists_of_lists_are_looked_through():
    model = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2)])
    calls = []

    def forward(model, x):
        for pair in model:
            for layer in pair:
                x = layer(x)
                calls.append(layer)
        calls.append(None)

    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], calibration=sk.Calibration(forward=forward))
    assert calls.count(None) == 1 and len(calls) == (4 + 1) + (0 + 1 + 2 + 3)  # a look, and passes that end early


class Routed(nn.Module):
    """Batches take different ways; one block is entered twice."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x, first, second):
        return self.experts[first](torch.tanh(self.experts[second](x)))


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
def test_routes_that_differ_between_batches(sequential):
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(3, 6, 8)
    weight = model.experts[2].weight.detach().clone()
    batches = [(x[0], 0, 0), (x[1], 1, 0), (x[2], 1, 2)]
    report = sk.prune_(model, sk.Wanda("2:4"), batches, calibration=sk.Calibration(sequential=sequential))
    assert len(report.layers) == 3
    assert torch.equal(get_mask(model.experts[2]), sk.nm_mask(weight.abs() * x[2].square().mean(0).sqrt(), 2, 4))


def test_batches_of_every_kind_give_the_same_mask():
    torch.manual_seed(0)
    x, dense = torch.randn(6, 8), nn.Linear(8, 8)
    loader = torch.utils.data.DataLoader(x, batch_size=4)
    lists = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)  # one-item lists
    kinds = [
        x,
        [x],
        (x,),
        [(x,)],
        {"input": x},
        [{"input": x[:1]}, {"input": x[1:]}],
        loader,
        lists,
        [x.view(2, 3, 8)],
        [*x],
    ]
    masks = []
    for batches in kinds:
        layer = copy.deepcopy(dense)
        sk.prune_(layer, sk.Wanda("2:4"), batches)
        masks.append(get_mask(layer))
    layer = copy.deepcopy(dense)
    sk.prune_(layer, sk.Wanda("2:4"), ["all"], calibration=sk.Calibration(forward=lambda model, batch: model(x)))
    assert all(torch.equal(mask, get_mask(layer)) for mask in masks)


def test_generators_are_read_once_or_rejected():
    model, x = stack(8, 8, 8), torch.randn(5, 8)
    generator = (x for _ in range(2))
    with pytest.raises(TypeError, match=r"batches must be iterable more than once.*got generator"):
        sk.prune_(model, sk.Wanda("2:4"), generator)
    sk.prune_(
        model, sk.Wanda("2:4"), generator, calibration=sk.Calibration(sequential=False)
    )  # the rejection read nothing
    before = snapshot(model)
    with pytest.raises(ValueError, match="a generator can be read only once"):
        sk.prune_(model, sk.Wanda("2:4"), generator, calibration=sk.Calibration(sequential=False))
    with pytest.raises(ValueError, match="batches gave no batch"):
        sk.prune_(model, sk.Wanda("2:4"), [])
    assert_restored(model, before)


def test_input_norm_is_the_root_mean_square():
    norm = InputNorm(find_layers(nn.Linear(2, 1), Pattern.parse("50%"), "input", None)[0][0])
    norm.update(torch.tensor([[[3.0, 1.0]]]))
    norm.update(torch.tensor([[4.0, 1.0], [0.0, -2.0]]))
    torch.testing.assert_close(norm.norm, torch.tensor([25 / 3, 2.0]).sqrt())


def test_progress_wraps_the_longest_loop():
    model, x = stack(8, 8, 8, 8), [torch.randn(5, 8)] * 2
    lengths = []

    def progress(items):
        lengths.append(len(items))
        return items

    sk.prune_(model, sk.Wanda("2:4"), x, progress=progress)
    sk.prune_(model, sk.Wanda("2:4"), x, progress=progress, calibration=sk.Calibration(sequential=False))
    sk.prune_(model, sk.Magnitude("2:4"), progress=progress)
    assert lengths == [3, 2, 3]


def test_nothing_is_left_in_the_graph():
    layer = nn.Linear(8, 8)
    sk.prune_(layer, sk.Wanda("2:4"), [torch.randn(3, 8, requires_grad=True)])
    assert layer.weight.is_leaf and layer.weight.requires_grad and layer.weight.grad is None
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None
