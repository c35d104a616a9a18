"""``prune_``: what it keeps, what it leaves alone, and that it is all or nothing."""

import copy
import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info
from sparsekit.prune import InputNorm, Method


@dataclass(frozen=True)
class Fails(Method):
    """Prunes two layers, then gives up."""

    error: type[BaseException] = RuntimeError
    statistic = InputNorm

    def prune(self, weight, statistic):
        if weight.shape[0] == 7:
            raise self.error("the third layer")
        return torch.zeros_like(weight) - weight, torch.ones_like(weight, dtype=torch.bool)


class Gram:
    """A statistic that no method of the library has: the sum of x x^T."""

    def __init__(self, layer):
        self.layer, self.gram = layer, 0

    def update(self, x):
        rows = self.layer.windows(x).float()
        self.gram = self.gram + rows.t() @ rows


@dataclass(frozen=True)
class LeastSquares(Method):
    """Wanda's mask, then the kept weights that change the output least."""

    statistic = Gram

    def prune(self, weight, statistic):
        mask = Pattern.parse(self.pattern).mask(weight.abs() * statistic.gram.diagonal().sqrt())
        solved = torch.zeros_like(weight)
        for row, kept in enumerate(mask):
            h = statistic.gram[kept]
            solved[row, kept] = torch.linalg.solve(h[:, kept], h @ weight[row])
        return solved, mask


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    return layer


def snapshot(model):
    """Everything a failure must bring back, as bits."""
    bits = {name: tensor.clone().view(torch.int32) for name, tensor in model.state_dict().items()}
    masks = {name: (get_mask(module), get_mask_info(module)) for name, module in model.named_modules()}
    return bits, masks, [module.training for module in model.modules()]


def assert_same(model, before):
    bits, masks, training = snapshot(model)
    assert all(torch.equal(bits[name], tensor) for name, tensor in before[0].items())
    assert masks.keys() == before[1].keys()
    for name, (mask, info) in before[1].items():
        assert masks[name][1] == info and (masks[name][0] is None) == (mask is None)
        assert mask is None or torch.equal(masks[name][0], mask)
    assert training == before[2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def stack(*widths):
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))


# Literal answers


def test_wanda_by_hand():
    layer = linear([[1.0, -2.0, 3.0, -4.0], [4.0, 3.0, 2.0, 1.0]])
    x = torch.tensor([[3.0, 1.0, 1.0, 0.5], [-4.0, 1.0, -1.0, 0.5]])  # rms 3.54, 1, 1, 0.5
    report = sk.prune_(layer, sk.Wanda("2:4"), [x])
    # |w| * norm: 3.54 2 3 2 and 14.1 3 2 0.5
    assert layer.weight.tolist() == [[1.0, 0.0, 3.0, 0.0], [4.0, 3.0, 0.0, 0.0]]
    # Outputs (2, 17.5) and (-11, -14.5) become (6, 15) and (-7, -13).
    assert report.layers[0].error == pytest.approx(math.sqrt((16 + 6.25 + 16 + 2.25) / (4 + 306.25 + 121 + 210.25)))


def golden():
    weight = torch.tensor([[math.sin(1 + 16 * i + j) for j in range(16)] for i in range(4)], dtype=torch.float64)
    x = [
        [(math.cos(0.37 * t * (j + 1)) + 0.5 * math.sin(0.077 * (t + 1) * (j + 2))) * (1 + j % 5) for j in range(16)]
        for t in range(64)
    ]
    return linear(weight.float().tolist()), torch.tensor(x, dtype=torch.float64).float()


@pytest.mark.parametrize(
    ("method", "rows", "error"),
    [(sk.Magnitude("2:4"), "c966 936c 936c 9669", None), (sk.Wanda("2:4"), "59c6 5966 396c 3acc", 0.10763)],
    ids=["magnitude", "wanda"],
)
def test_golden_masks(method, rows, error):
    """The masks that the published implementations give; column 0 is the highest bit."""
    layer, x = golden()
    report = sk.prune_(layer, method, [x[:10], x[10:]])
    got = [int("".join(str(int(bit)) for bit in row), 2) for row in get_mask(layer).tolist()]
    assert " ".join(f"{row:04x}" for row in got) == rows
    if error:
        assert report.layers[0].error ** 2 == pytest.approx(error, abs=5e-6)


def test_percent_prunes_every_output_row():
    layer = linear([[1.0, 5.0, -6.0], [-9.0, 8.0, 7.0]])
    sk.prune_(layer, sk.Magnitude("40%"))  # floor(1.2) = 1 of 3
    assert layer.weight.tolist() == [[0.0, 5.0, -6.0], [-9.0, 8.0, 0.0]]


# Kinds of layers


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": "same"}], ids=str
)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("axis", ["input", "flatten"])
def test_conv2d(axis, mode, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding_mode=mode, bias=False, **options)
    x = torch.randn(10, 6, 8, 9) * torch.rand(6, 1, 1) * 10
    weight = conv.weight.detach().clone()
    padded = F.pad(x, conv._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
    unfolded = F.unfold(padded, (3, 2), dilation=(1, 2), stride=conv.stride)  # [images, in * 6, positions]
    torch.testing.assert_close(weight.flatten(1) @ unfolded, conv(x).flatten(2))
    square = unfolded.double().square().mean((0, 2))
    report = sk.prune_(conv, sk.Wanda("2:4"), [x[:4], x[4], x[5:]], axis=axis)
    if axis == "flatten":
        expected = sk.nm_mask(weight.flatten(1) * square.sqrt().float(), 2, 4).view_as(weight)
    else:
        norm = square.view(6, 6).mean(1).sqrt().float()
        expected = sk.nm_mask(weight.permute(0, 2, 3, 1) * norm, 2, 4).permute(0, 3, 1, 2)
    mask = get_mask(conv)
    assert torch.equal(mask, expected) and torch.equal(conv.weight, weight * mask)
    assert get_mask_info(conv) == MaskInfo(Pattern.parse("2:4"), 1 if axis == "input" else "flatten")
    lost, whole = (((part.flatten(1)) @ unfolded).norm().item() for part in (weight * ~mask, weight))
    assert report.layers[0].error == pytest.approx(lost / whole, rel=0.15)  # from a sample of positions
    assert mask.sum() == 5 * (6 * 4 if axis == "input" else 9 * 2)  # 6 channels: 2 of 4, and a tail of 2


def test_conv2d_percent_counts_the_whole_output():
    conv = nn.Conv2d(8, 3, 3)
    sk.prune_(conv, sk.Wanda("50%"), [torch.randn(2, 8, 5, 5)])
    assert (~get_mask(conv)).flatten(1).sum(1).tolist() == [36] * 3


def test_channels_last_weights():
    conv, x = nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5)
    last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    for axis in ("input", "flatten"):
        for module in (conv, last):
            sk.prune_(module, sk.Wanda("2:4"), [x], axis=axis)
        assert torch.equal(conv.weight, last.weight) and torch.equal(get_mask(conv), get_mask(last))


def test_conv1d_is_a_transposed_linear():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, dense, x = Conv1D(6, 8), nn.Linear(8, 6), torch.randn(5, 3, 8)
    dense.weight.data = conv.weight.detach().t().clone()
    for axis in ("input", "flatten"):
        reports = [sk.prune_(module, sk.Wanda("2:4"), [x], axis=axis) for module in (conv, dense)]
        assert torch.equal(conv.weight.t(), dense.weight) and torch.equal(get_mask(conv).t(), get_mask(dense))
        assert get_mask_info(conv).axis == 0 and get_mask_info(dense).axis == 1
        assert reports[0].error == pytest.approx(reports[1].error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights(dtype):
    layer = nn.Linear(64, 16, dtype=dtype)
    x = (torch.randn(4, 7, 64) * 100).to(dtype)  # squares beyond float16
    weight = layer.weight.detach().clone()
    sk.prune_(layer, sk.Wanda("2:4"), [x])
    norm = x.float().square().mean((0, 1)).sqrt()
    assert torch.equal(get_mask(layer), sk.nm_prune(weight, 2, 4, scale=norm)[1])
    assert layer.weight.dtype == dtype


def test_does_not_import_transformers():
    layer = nn.Linear(8, 8)
    had = "transformers" in sys.modules
    sk.prune_(layer, sk.Magnitude("2:4"))
    assert ("transformers" in sys.modules) == had


# What is left alone


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens)))


def test_tied_weights_are_skipped():
    model = Tied()
    embedding = model.embedding.weight.detach().clone()
    report = sk.prune_(model, sk.Wanda("2:4"), [torch.arange(12)])
    assert [layer.name for layer in report.layers] == ["inner"]
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("head", "its weight is tied to embedding.weight")
    ]
    assert torch.equal(model.head.weight, embedding) and get_mask(model.head) is None


def test_a_module_used_twice_is_not_tied():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh()), "b": nn.Sequential(layer)})
    x = torch.randn(5, 8)
    norm = torch.cat([x, model["a"](x)]).square().mean(0).sqrt()
    weight = layer.weight.detach().clone()
    sk.prune_(model, sk.Wanda("2:4"), [x], forward=lambda model, x: model["b"](model["a"](x)))
    assert torch.equal(get_mask(layer), sk.nm_mask(weight.abs() * norm, 2, 4))


def test_weights_read_by_a_fused_parent_are_skipped():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )
    model = nn.ModuleDict({"encoder": model, "head": nn.Linear(8, 4)})
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert [layer.name for layer in report.layers] == ["head"]
    reasons = {layer.name.removeprefix("encoder.layers.0."): layer.reason for layer in report.skipped}
    assert reasons["self_attn.out_proj"] == "MultiheadAttention reads its weight without calling it"
    assert reasons["linear1"] == reasons["linear2"] == "TransformerEncoderLayer reads its weight without calling it"
    assert len(report.skipped) == 6


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "a convolution of 8 groups"),
        (nn.Conv2d(3, 8, 3), "its 3 inputs do not fill one group of 2:4"),
        (nn.Linear(8, 8, dtype=torch.float64), "float64, not float32"),
        (nn.Linear(8, 8, device="meta"), "meta device"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "not a parameter but computed"),
    ],
    ids=["groups", "small", "float64", "meta", "parametrized"],
)
def test_unfit_layers_are_skipped(module, reason):
    report = sk.prune_(nn.ModuleList([nn.Linear(8, 8), module]), sk.Magnitude("2:4"))
    assert len(report.layers) == 1 and len(report.skipped) == 1
    assert report.skipped[0].name == "1" and reason in report.skipped[0].reason
    with pytest.raises(ValueError, match=f"nothing to prune.*{reason}"):
        sk.prune_(module, sk.Magnitude("2:4"))


def test_where_selects():
    model = stack(8, 8, 8, 8)
    report = sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: name != "2")
    assert [layer.name for layer in report.layers] == ["0", "4"] and report.skipped == ()
    assert (model[2].weight != 0).all()
    with pytest.raises(ValueError, match="nothing to prune: where selects no layer"):
        sk.prune_(model, sk.Magnitude("2:4"), where=lambda *_: False)


def test_a_layer_that_no_batch_reaches_stays_dense():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})

    def forward(model, x):
        model["unused"](x[:0])  # an expert that got no token
        return model["used"](x)

    for sequential in (True, False):
        report = sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], forward=forward, sequential=sequential)
        assert [layer.name for layer in report.layers] == ["used"]
        assert [(layer.name, layer.reason) for layer in report.skipped] == [
            ("unused", "no calibration batch reached it")
        ]
        assert (model["unused"].weight != 0).all() and get_mask(model["unused"]) is None
    report = sk.prune_(model, sk.Magnitude("2:4"), [torch.randn(3, 8)], forward=forward)  # it needs no input
    assert {layer.name: layer.error is None for layer in report.layers} == {"used": False, "unused": True}
    with pytest.raises(ValueError, match="no calibration batch reached any"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], forward=lambda *_: None)


# Calibration


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

    report = sk.prune_(model, sk.Wanda("2:4"), list(x.split(64)), sequential=sequential)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    if sequential:
        assert [layer.name[:8] for layer in report.layers[::2]] == ["blocks.2", "blocks.1", "blocks.0", "head"]
    assert model.runs == [False] * (5 if sequential else 4)  # three blocks' passes end early
    assert [module.training for module in model.blocks] == [True, False, True] and model.training


def test_sequential_differs_from_one_pass():
    torch.manual_seed(0)
    model, x = stack(32, 32, 32, 32), torch.randn(50, 32)
    other = copy.deepcopy(model)
    sk.prune_(model, sk.Wanda("2:4"), [x])
    sk.prune_(other, sk.Wanda("2:4"), [x], sequential=False)
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

    sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], forward=forward)
    assert calls.count(None) == 1 and len(calls) == 4 + 1 + (0 + 1 + 2 + 3)


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
    report = sk.prune_(model, sk.Wanda("2:4"), batches, sequential=sequential)
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
    sk.prune_(layer, sk.Wanda("2:4"), ["all"], forward=lambda model, batch: model(x))
    assert all(torch.equal(mask, get_mask(layer)) for mask in masks)


def test_generators_are_read_once_or_rejected():
    model, x = stack(8, 8, 8), torch.randn(5, 8)
    generator = (x for _ in range(2))
    with pytest.raises(TypeError, match=r"batches must be iterable more than once.*got generator"):
        sk.prune_(model, sk.Wanda("2:4"), generator)
    sk.prune_(model, sk.Wanda("2:4"), generator, sequential=False)  # the rejection read nothing
    before = snapshot(model)
    with pytest.raises(ValueError, match="a generator can be read only once"):
        sk.prune_(model, sk.Wanda("2:4"), generator, sequential=False)
    with pytest.raises(ValueError, match="batches gave no batch"):
        sk.prune_(model, sk.Wanda("2:4"), [])
    assert_same(model, before)


def test_progress_wraps_the_longest_loop():
    model, x = stack(8, 8, 8, 8), [torch.randn(5, 8)] * 2
    lengths = []

    def progress(items):
        lengths.append(len(items))
        return items

    sk.prune_(model, sk.Wanda("2:4"), x, progress=progress)
    sk.prune_(model, sk.Wanda("2:4"), x, progress=progress, sequential=False)
    sk.prune_(model, sk.Magnitude("2:4"), progress=progress)
    assert lengths == [3, 2, 3]


def test_nothing_is_left_in_the_graph():
    layer = nn.Linear(8, 8)
    sk.prune_(layer, sk.Wanda("2:4"), [torch.randn(3, 8, requires_grad=True)])
    assert layer.weight.is_leaf and layer.weight.requires_grad and layer.weight.grad is None
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None


# All or nothing


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("pruned", [False, True], ids=["fresh", "pruned"])
def test_a_failing_method_leaves_no_trace(error, sequential, pruned):
    model = stack(8, 6, 5, 7, 8)
    if pruned:
        sk.prune_(model, sk.Magnitude("1:4"))
    model[0].weight.data[0, 0] = -0.0
    model[2].eval()
    before = snapshot(model)
    with pytest.raises(error, match="the third layer"):
        sk.prune_(model, Fails("2:4", error), [torch.randn(3, 8)], sequential=sequential)
    assert_same(model, before)


def test_a_failing_batch_leaves_no_trace():
    model = stack(8, 6, 5, 7, 8)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8), torch.randn(3, 9)])
    calls = []

    def forward(model, x):
        calls.append(x)
        if len(calls) == 4:
            raise KeyboardInterrupt("late")
        return model(x)

    with pytest.raises(KeyboardInterrupt, match="late"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], forward=forward)
    assert_same(model, before)


def test_nan_weights_are_an_error():
    model = stack(8, 8, 8)
    model[2].weight.data[3, 5] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="the weight of 2 contains NaN"):
        sk.prune_(model, sk.Magnitude("2:4"))
    assert_same(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_numbers_are_an_error(value):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8)), torch.randn(5, 8)
    before = snapshot(model)
    x[2, 3] = value
    with pytest.raises(ValueError, match="a calibration input of 0 is NaN or infinite"):
        sk.prune_(model, sk.Wanda("2:4"), [x])
    assert_same(model, before)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("model", sk.Magnitude("2:4")), TypeError, "model must be an nn.Module, got str"),
        ((nn.Linear(8, 8), "2:4"), TypeError, "method must be a Method such as .* got '2:4'"),
        ((nn.Linear(8, 8), sk.Wanda), TypeError, "method must be a Method such as"),
        ((nn.Linear(8, 8), sk.Wanda("2:4")), ValueError, r"Wanda\(pattern='2:4'\) needs calibration batches, got None"),
        ((nn.Linear(8, 8), sk.Wanda("2:4"), 3), TypeError, "batches must be .* got int"),
    ],
    ids=["model", "string", "class", "no-batches", "batches"],
)
def test_rejects(arguments, error, match):
    with pytest.raises(error, match=match):
        sk.prune_(*arguments)


def test_rejects_an_axis():
    with pytest.raises(ValueError, match='axis must be "input" or "flatten", got 1'):
        sk.prune_(nn.Linear(8, 8), sk.Magnitude("2:4"), axis=1)


@pytest.mark.parametrize("method", [sk.Magnitude, sk.Wanda])
def test_methods_reject_patterns_when_they_are_made(method):
    with pytest.raises(ValueError, match=r"a pattern is .* got '4:2'"):
        method("4:2")


# What is reported


def test_report(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 1), nn.Linear(1, 1))
    report = sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 10)])
    first, second = report.layers
    assert (first.name, first.shape, first.pattern, first.dropped, first.weights) == ("0", (4, 10), "2:4", 16, 40)
    assert first.sparsity == 0.4 and second.sparsity == 0.5  # 10 inputs: two groups, and a tail of 2 that is kept
    assert report.weights == 44 and report.sparsity == 18 / 44
    assert report.error == (first.error + second.error) / 2 and 0 < first.error < 1
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "pattern", "sparsity", "error"]
    assert lines[1].split() == ["0", "4x10", "2:4", "40.00%", f"{first.error:.4f}"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[4].split()[:4] == ["2", "layers", "44", "40.91%"]
    assert lines[5] == "skipped 2: its 1 inputs do not fill one group of 2:4"
    report.save(tmp_path / "report.json")
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["layers"][0]["sparsity"] == 0.4 and saved["sparsity"] == report.sparsity
    assert saved["skipped"] == [{"name": "2", "reason": report.skipped[0].reason}]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(FileNotFoundError, match="missing"):
        report.save(tmp_path / "missing" / "report.json")


def test_report_without_batches_has_no_errors():
    report = sk.prune_(stack(8, 8), sk.Magnitude("2:4"))
    assert report.error is None and report.layers[0].error is None
    assert str(report).splitlines()[1].split()[-1] == "-"


def test_error_of_many_rows_is_sampled_evenly():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(40, 100, 64) * torch.linspace(0.1, 3, 40).view(-1, 1, 1) * torch.rand(64)  # batches differ
    weight = layer.weight.detach().clone()
    report = sk.prune_(layer, sk.Wanda("2:4"), list(x))
    exact = (x @ (weight - layer.weight).t()).norm() / (x @ weight.t()).norm()
    assert report.error == pytest.approx(exact.item(), rel=0.05)


def test_inputs_of_zeros_give_no_error():
    assert sk.prune_(nn.Linear(8, 8), sk.Wanda("2:4"), [torch.zeros(3, 8)]).error == 0.0


# Quality


def test_wanda_ignores_outlier_channels_that_the_weights_cancel():
    """Scaling a channel up and its weights down changes no output: Wanda's mask stays, magnitude's moves."""
    torch.manual_seed(0)
    scale = torch.randn(64).exp()
    x = torch.randn(500, 64)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(scale[:, None]), scaled[0].bias.mul_(scale), scaled[1].weight.div_(scale)
    torch.testing.assert_close(plain(x), scaled(x), rtol=1e-3, atol=1e-4)
    same = {}
    for method in (sk.Wanda("2:4"), sk.Magnitude("2:4")):
        masks = []
        for model in (copy.deepcopy(plain), copy.deepcopy(scaled)):
            sk.prune_(model, method, [x], where=lambda name, _: name == "1")
            masks.append(get_mask(model[1]))
        same[type(method)] = (masks[0] == masks[1]).float().mean().item()
    assert same[sk.Wanda] > 0.999 and same[sk.Magnitude] < 0.9  # not all: the scaled norm is rounded anew


def test_a_method_with_its_own_statistic_plugs_in():
    torch.manual_seed(0)
    model = stack(32, 32, 32)
    x = torch.randn(300, 32) @ torch.randn(32, 32)
    errors = {}
    for method in (sk.Magnitude("2:4"), sk.Wanda("2:4"), LeastSquares("2:4")):
        pruned = copy.deepcopy(model)
        errors[type(method).__name__] = sk.prune_(pruned, method, [x], sequential=False).error
        mask = get_mask(pruned[0])
        assert torch.equal(pruned[0].weight != 0, mask) and (mask.view(32, 8, 4).sum(-1) == 2).all()
    assert errors["LeastSquares"] < errors["Wanda"] < errors["Magnitude"]
    changed = pruned[0].weight[mask] != model[0].weight[mask]
    assert changed.all()  # kept weights were updated


@dataclass(frozen=True)
class Random(Method):
    def prune(self, weight, statistic):
        generator = torch.Generator().manual_seed(weight.numel())
        mask = Pattern.parse(self.pattern).mask(torch.rand(weight.shape, generator=generator))
        return weight * mask, mask


@pytest.fixture(scope="module")
def language_model():
    """A trained Llama of 260 thousand parameters, and calibration batches of its own kind of text."""
    data = os.environ.get("SPARSEKIT_DATA")
    if not data:
        pytest.skip("SPARSEKIT_DATA is unset")
    transformers = pytest.importorskip("transformers")
    folder = Path(data) / "ckpt_stories260K" / "hf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stories = (Path(data) / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[200:260]
    tokens = [torch.tensor(tokenizer(story.strip(), max_length=128, truncation=True)["input_ids"]) for story in stories]
    rows = torch.stack([story for story in tokens if len(story) == 128])[:24]
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, [{"input_ids": batch} for batch in rows.split(12)]


def test_layer_errors_on_a_real_language_model(language_model):
    dense, batches = language_model
    errors = {}
    for method in (Random("2:4"), sk.Magnitude("2:4"), sk.Wanda("2:4")):
        model = copy.deepcopy(dense)
        report = sk.prune_(model, method, batches, sequential=False)
        errors[type(method).__name__] = report.error
        assert len(report.layers) == 35 and report.sparsity == 0.5
        assert [(layer.name, layer.reason) for layer in report.skipped] == [
            ("lm_head", "its weight is tied to model.embed_tokens.weight")
        ]
        for module in model.modules():
            if (mask := get_mask(module)) is not None:
                assert torch.equal(module.weight != 0, mask)
    assert errors["Random"] > 1.5 * errors["Magnitude"]
    assert errors["Magnitude"] > 1.05 * errors["Wanda"]
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)


def test_sequential_pruning_of_a_real_language_model(language_model):
    dense, batches = language_model
    model, hidden = copy.deepcopy(dense), []
    reference = copy.deepcopy(dense)
    report = sk.prune_(model, sk.Wanda("2:4"), batches)
    assert [layer.name.split(".")[2] for layer in report.layers] == [str(block) for block in range(5) for _ in range(7)]
    # Pruning the first block by itself, then the second on what it gives, is what sequential means.
    for block in ("0", "1"):
        sk.prune_(reference, sk.Wanda("2:4"), batches, where=lambda name, _, b=block: f"layers.{b}." in name)
    for block in (0, 1):
        for (name, got), expected in zip(
            model.model.layers[block].named_parameters(), reference.model.layers[block].parameters(), strict=True
        ):
            assert torch.equal(got, expected), name
    with torch.no_grad():
        for llama in (dense, model):
            hidden.append(llama(**batches[0]).logits)
    assert torch.isfinite(hidden[1]).all() and not torch.equal(*hidden)
