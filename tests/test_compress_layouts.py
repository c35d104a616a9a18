"""compress_ and the layouts of a 2:4 weight on a CPU: which are measured, which is taken, and what the report says."""

import pytest
import torch
from compressing import Conv1D, assert_same, blocks, decisions, snapshot
from table_clock import up_to_16
from torch import nn

import sparsekit as sk
from sparsekit.compress.candidates import Sparse24
from sparsekit.nn import ArrangedLinear24, Linear24, RoutedLinear24
from sparsekit.ops import arrange24, backends, pack24

COMPILED = pytest.mark.skipif(backends()["linear_row_pairs24"]["cpu"] == "reference", reason="needs the extension")
EVERY = pytest.mark.parametrize("layout", ["input pairs", "row pairs"])


@EVERY
def test_the_fastest_layout_is_taken_and_given_back(ratios, layout):
    ratios[f"2:4 {layout}"] = 4.0
    model, x = blocks(), torch.randn(32, 16)
    before, expected = snapshot(model), model(x)
    report = sk.compress_(model, x)
    assert set(decisions(report).values()) == {"2:4"}
    assert type(model[0].up) is ArrangedLinear24 and model[0].up.layout == layout
    first = report.layers[0]
    assert first.kernels == {32: f"2:4 {layout}"} and first.timing(32).ratio == 4 and first.sparse
    assert first.reason.startswith(f"fastest: 2:4 {layout} at 32 tokens")
    assert f"2 of 32x16  2:4 {layout}" in str(report)
    torch.testing.assert_close(model(x), expected)
    assert report.bytes_after == sum(
        tensor.nbytes
        for block in model
        for layer in (block.up, block.down)
        for tensor in (*layer.resident_tensors(), layer.bias, layer.weight_mask)
        if tensor is not None
    )
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("tokens", "measured"),
    [
        ((1,), ["input pairs"]),
        ((1, 8), ["input pairs"]),
        ((1, 16), ["input pairs", "row pairs"]),
        ((64,), ["input pairs", "row pairs"]),
        ((1, 128), ["row pairs"]),
        ((512,), ["row pairs"]),
    ],
    ids=str,
)
def test_only_layouts_for_the_most_tokens_are_measured(ratios, tokens, measured):
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=tokens))
    for count in tokens:
        names = {"plain", "2:4", "prepacked", *(f"2:4 {layout}" for layout in measured)}
        assert report.layers[0].timings[count].keys() == names


def test_one_layout_answers_all_token_counts(ratios):
    ratios |= {"2:4": 1.1, "2:4 row pairs": up_to_16(0.9, 4.0), "prepacked": 0.5}
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1, 128)))
    assert report.layers[0].kernels == {1: "2:4", 128: "2:4"}  # row pairs lose at 1 token
    ratios |= {"2:4": up_to_16(2.0, 0.9)}
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1, 128)))
    assert report.layers[0].decision == "plain"
    assert "2:4: 0.90x, 0% won at 128 tokens, faster at 1: try keep_dense=True" in report.layers[0].reason
    ratios |= {"2:4": up_to_16(2.0, 0.5)}
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1, 128)))
    assert "2:4: 0.90x, 0% won at 1 token by 2:4 row pairs, faster at 128: try keep" in report.layers[0].reason


def test_as_fast_up_to_noise_it_stays_as_it_is_stored(ratios):
    ratios["2:4 row pairs"] = 3.05
    sk.compress_(model := blocks(1), torch.randn(64, 16))
    assert type(model[0].up) is Linear24
    sk.decompress_(model)
    ratios["2:4 row pairs"] = 9.0
    sk.compress_(model, torch.randn(64, 16), objective="size")
    assert type(model[0].up) is Linear24


def test_a_layer_that_trains_is_never_arranged(ratios):
    ratios["2:4 row pairs"] = 9.0
    report = sk.compress_(model := blocks(1).train(), torch.randn(64, 16))
    assert type(model[0].up) is Linear24 and report.layers[0].timings[64].keys() == {"plain", "2:4"}
    sk.decompress_(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sk.compress_(model, torch.randn(64, 16))
    assert type(model[0].up) is ArrangedLinear24 and not model[0].up.trainable


def test_a_dense_copy_lies_only_beside_the_weight_as_it_is_stored(ratios):
    measure = sk.Measure(tokens=(1, 128))
    ratios |= {"2:4": up_to_16(3.0, 0.5), "2:4 row pairs": up_to_16(2.0, 0.5), "dense": 1.5, "prepacked": 0.5}
    report = sk.compress_(model := blocks(1), measure=measure, keep_dense=True)
    assert type(model[0].up) is RoutedLinear24 and report.layers[0].kernels == {1: "2:4", 128: "dense"}
    ratios["2:4 row pairs"] = 4.0
    report = sk.compress_(model := blocks(1), measure=measure, keep_dense=True)
    assert type(model[0].up) is ArrangedLinear24 and set(report.layers[0].kernels.values()) == {"2:4 row pairs"}


def test_a_wrong_kernel_is_named_beside_a_right_one(ratios):
    ratios |= {"2:4": None, "2:4 row pairs": 3.0}
    report = sk.compress_(model := blocks(1), torch.randn(64, 16))
    assert type(model[0].up) is ArrangedLinear24 and "2:4: a wrong result at 64 tokens" in report.layers[0].reason


@EVERY
def test_a_transposed_layer(ratios, layout):
    ratios[f"2:4 {layout}"] = 4.0
    model, x = nn.Sequential(Conv1D(24, 16)).eval(), torch.randn(32, 16)
    sk.prune_(model, sk.Magnitude("2:4"))
    expected = model(x)
    sk.compress_(model, x)
    assert model[0].layout == layout and model[0].weight.shape == (16, 24)
    torch.testing.assert_close(model(x), expected)


@COMPILED
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_bytes_by_which_forms_are_compared(layout, dtype):
    linear = nn.Linear(768, 512, bias=False, dtype=dtype)
    sk.nm_prune_(linear.weight, 2, 4)
    form = Sparse24()
    expected = form.nbytes(linear) + form.extra_bytes(linear, [f"2:4 {layout}"])
    assert arrange24(pack24(linear.weight.detach()), layout).nbytes == pytest.approx(expected, rel=0.02)
    assert form.extra_bytes(linear, ["2:4", "dense"]) == linear.weight.nbytes and form.extra_bytes(linear, ["2:4"]) == 0
