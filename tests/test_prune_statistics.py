"""What is summed up over the inputs: exact, in memory that their number does not change, and never silently NaN."""

import json
import math

import pytest
import torch
from pruning import stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern
from sparsekit.prune import Gram, InputNorm
from sparsekit.prune import layers as layers_module
from sparsekit.prune.calibration.inputs import InputSample
from sparsekit.prune.layers import find_layers


def layer_of(module, axis="input"):
    return find_layers(module, Pattern.parse("50%"), axis, None)[0][0]


def held_bytes(statistic):
    """Bytes of all tensors that a statistic refers to, also in lists."""
    values = [value if isinstance(value, list) else [value] for value in vars(statistic).values()]
    return sum(each.nbytes for value in values for each in value if isinstance(each, torch.Tensor))


def test_memory_does_not_grow_with_the_number_of_batches():
    gram, x = Gram(layer_of(nn.Linear(8, 2))), torch.randn(1500, 8)
    gram.update(x[:300])
    held = held_bytes(gram)
    for row in x[300:].split(1):
        gram.update(row)
        assert held_bytes(gram) < held + 256 * row.nbytes
    torch.testing.assert_close(gram.matrix, x.t() @ x / 1500)
    assert held_bytes(gram) == held


def test_inputs_may_be_written_to_afterwards():
    gram, x = Gram(layer_of(nn.Linear(8, 2))), torch.randn(5, 8)
    expected = x.t() @ x / 5
    gram.update(x)
    x.zero_()
    torch.testing.assert_close(gram.matrix, expected)


@pytest.mark.parametrize("axis", ["input", "flatten"])
@pytest.mark.parametrize("size", [1, 200, 5000, 2**26], ids=str)
def test_windows_of_any_part_size_add_up_alike(axis, size, monkeypatch):
    monkeypatch.setattr(layers_module, "WINDOW_BYTES", size)
    conv, x = nn.Conv2d(4, 2, 3, padding=1, stride=2), torch.randn(5, 4, 7, 6)
    layer, gram = layer_of(conv, axis), Gram(layer_of(conv, axis))
    gram.update(x)
    gram.update(x[0])
    every = nn.functional.unfold(torch.cat([x, x[:1]]), 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 4, 9)
    rows = (every if axis == "flatten" else every.transpose(1, 2)).flatten(1)
    torch.testing.assert_close(gram.matrix, rows.t() @ rows / len(rows))
    parts = [len(part) for part in layer.rows(x)]
    assert sum(parts) == 5 * 4 * 3
    assert parts == {1: [3] * 20, 200: [3] * 20, 5000: [24, 24, 12], 2**26: [60]}[size]


def test_finite_is_what_isfinite_says():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for value in (math.nan, math.inf, -math.inf, 0.0, torch.finfo(dtype).max):
            for where in (0, 17, 33):
                weight = torch.randn(2, 17).to(dtype)
                weight.view(-1)[where] = value
                assert layers_module._is_finite(weight) == bool(torch.isfinite(weight).all())


def test_empty_batches_count_nothing():
    norm = InputNorm(layer_of(nn.Linear(4, 2)))
    for x in (torch.randn(0, 4), torch.ones(3, 4), torch.randn(2, 0, 4)):
        norm.update(x)
    assert norm.norm.tolist() == [1.0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_an_error(value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = stack(8, 8, 8).to(dtype)
        model[2].weight.data[3, 5] = value
        for method in (sk.Magnitude("2:4"), sk.ADMM("2:4")):
            with pytest.raises(ValueError, match="the weight of 2 contains NaN or Inf; prune_ needs numbers"):
                sk.prune_(model, method, torch.randn(5, 8, dtype=dtype))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_cannot_be_known_is_said(value, tmp_path):
    """Magnitude needs no inputs: those that are not numbers fail no call, and no error is made up from them."""
    model, x = nn.Linear(8, 8), torch.randn(5, 8)
    x[2, 3] = value
    report = sk.prune_(model, sk.Magnitude("2:4"), x)
    assert math.isnan(report.layers[0].error) and math.isnan(report.error)
    assert "nan" in str(report)
    report.save(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["error"] is None and written["layers"][0]["error"] is None


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e30])
def test_the_error_does_not_depend_on_the_size_of_the_inputs(size):
    x, weight = torch.randn(20, 8), torch.randn(4, 8)
    after = torch.where(weight.abs() > 0.5, weight, 0)
    sample = InputSample(layer_of(nn.Linear(8, 4)))
    sample.update(x * size)
    expected = float((x @ (weight - after).t()).norm() / (x @ weight.t()).norm())
    assert sample.relative_error(weight, after) == pytest.approx(expected, rel=1e-4)
    assert sample.relative_error(weight, weight) == 0.0
    dead = InputSample(layer_of(nn.Linear(8, 4)))
    dead.update(torch.zeros(5, 8))
    assert dead.relative_error(weight, after) == 0.0
    assert InputSample(layer_of(nn.Linear(8, 4))).relative_error(weight, after) is None


def test_new_weights_that_the_dtype_cannot_hold_are_refused():
    """What SparseGPT adds to a kept weight can pass float16's largest, 65504."""
    torch.manual_seed(1)
    model = stack(16, 16, 16).half()
    model[2].weight.data = (torch.rand(16, 16) * 5e3 + 6e4).half()
    before = [parameter.clone() for parameter in model.parameters()]
    x = (torch.rand(64, 16) + torch.rand(64, 1)).half()
    with pytest.raises(ValueError, match=r"SparseGPT\(.*gives 2 a weight that is NaN or infinite in torch.float16"):
        sk.prune_(model, sk.SparseGPT("2:4"), x)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    sk.prune_(model.bfloat16(), sk.SparseGPT("2:4"), x.bfloat16())


class Wrong(sk.Magnitude):
    def prune(self, weight, statistic):
        pruned, mask = super().prune(weight, statistic)
        return pruned[:1], mask


class Double(sk.Magnitude):
    def prune(self, weight, statistic):
        pruned, mask = super().prune(weight, statistic)
        return pruned.double(), mask


def test_what_a_method_returns_is_checked():
    layer = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"must return both of the shape \(4, 8\).*got a weight \(1, 8\) and a mask"):
        sk.prune_(layer, Wrong("2:4"))
    sk.prune_(layer, Double("2:4"))
    assert layer.weight.dtype == torch.float32 and (layer.weight == 0).sum() == 16


def test_least_squares_does_not_hide_what_overflows():
    layer = nn.Linear(16, 4, bias=False)
    layer.weight.data.mul_(1e30)
    x = torch.randn(64, 16) * 1e8
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        sk.prune_(layer, sk.LeastSquares(sk.Magnitude("2:4")), x)
    assert torch.equal(layer.weight, before)
