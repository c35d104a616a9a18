"""compress_ on convolutions: what is measured, what they become, and why one stays."""

import copy
import json

import pytest
import torch
from compressing import assert_same, decisions, reasons, snapshot
from convolutions import Convolved, convolved
from interrupts import assert_all_or_nothing, surroundings
from torch import nn

import sparsekit as sk
from sparsekit.compress import convolutions
from sparsekit.compress.sizes import Images, size_of
from sparsekit.nn import ArrangedConv2d24, Conv2d24, PrepackedConv2d
from sparsekit.ops import backends

X = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))


def test_the_faster_form_is_taken_and_the_report_says_which(ratios, tmp_path):
    model = convolved()
    before, expected = snapshot(model), model(X)
    report = sk.compress_(model, X)
    assert decisions(report) == {"0.up": "2:4", "0.down": "2:4"}
    up = report.layers[0]
    assert up.shape == (12, 8, 3, 3) and up.calls == {"2x5x6": 1} and up.kernels == {"2x5x6": "2:4"}
    assert up.timing("2x5x6").ratio == 3.0 and up.why == "fastest; next prepacked: faster than plain, but slower"
    assert up.bytes_after == 12 * 9 * (4 * 4 + 1) and up.bytes_before == 12 * 9 * 8 * 4
    assert "1 of 12x8x3x3  2:4  3.00x (3.00x) at 2x5x6" in str(report)
    assert ratios["measured"][0] == (("2:4", "2:4 row pairs", "prepacked"), (2, 8, 5, 6), False)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["layers"][0]["calls"] == {"2x5x6": 1}
    assert type(model[0].up) is Conv2d24
    torch.testing.assert_close(model(X), expected)
    assert sk.decompress_(model) == ("0.up", "0.down")
    assert_same(snapshot(model), before)


def test_one_that_loses_stays_dense_with_its_ratio(ratios):
    ratios["2:4"], ratios["prepacked"] = 0.5, 0.9
    model = convolved()
    report = sk.compress_(model, X)
    assert set(decisions(report).values()) == {"plain"} and type(model[0].up) is nn.Conv2d
    assert report.layers[0].reason == "2:4: 0.50x, 0% won at 2x5x6; prepacked: 0.90x, 0% won at 2x5x6"
    ratios["prepacked"] = 1.2
    assert set(decisions(sk.compress_(model, X)).values()) == {"prepacked"}
    assert type(model[0].down) is PrepackedConv2d
    torch.testing.assert_close(model(X), sk.decompress_(model) and model(X))


def test_a_size_at_which_it_loses_is_a_veto_even_with_a_dense_copy(ratios):
    ratios["2:4"], ratios["prepacked"] = (lambda images: 0.5 if images > 2 else 3.0), 1.0
    batches = [X, torch.randn(5, 8, 4, 4), X]
    report = sk.compress_(convolved(), batches, keep_dense=True)
    assert report.layers[0].calls == {"2x5x6": 2, "8x4x4": 1} and report.swapped == ()
    assert report.layers[0].why == "2:4: 0.50x, 0% won at 8x4x4"


def test_what_is_measured_is_what_the_batches_give(ratios):
    conv = nn.Conv2d(8, 4, 1)
    assert size_of(conv, torch.randn(3, 8, 5, 6)) == Images(4, 5, 6)
    assert size_of(conv, torch.randn(8, 5, 6)) == Images(1, 5, 6)
    assert (
        size_of(conv, torch.randn(3, 8, 64, 64)) == Images(1, 64, 64) and size_of(conv, torch.randn(0, 8, 5, 6)) is None
    )
    last = size_of(conv, torch.randn(3, 8, 5, 6).to(memory_format=torch.channels_last))
    assert last == Images(4, 5, 6, True) and str(last) == "4x5x6 channels last"
    report = sk.compress_(convolved(channels_last=True), X.to(memory_format=torch.channels_last))
    assert report.layers[0].calls == {"2x5x6 channels last": 1}


def test_row_pairs_are_taken_where_they_are_faster(ratios):
    ratios["2:4 row pairs"] = 4.0
    model = convolved()
    before, expected = snapshot(model), model(X)
    report = sk.compress_(model, X)
    assert set(decisions(report).values()) == {"2:4"} and type(model[0].up) is ArrangedConv2d24
    assert report.layers[0].kernels == {"2x5x6": "2:4 row pairs"}
    torch.testing.assert_close(model(X), expected)
    sk.decompress_(model)
    assert_same(snapshot(model), before)
    odd = nn.Sequential(nn.Conv2d(10, 4, 1)).eval()  # a rest of two channels is never arranged
    sk.prune_(odd, sk.Magnitude("2:4"))
    report = sk.compress_(odd, torch.randn(1, 10, 5, 5))
    assert type(odd[0]) is Conv2d24 and report.layers[0].timings["1x5x5"].keys() == {"plain", "2:4", "prepacked"}
    report = sk.compress_(model.train(), X)
    assert report.layers[0].timings["2x5x6"].keys() == {"plain", "2:4"}


@pytest.mark.skipif(backends()["arranged_conv2d24"]["cpu"] == "reference", reason="needs the extension")
def test_the_bytes_by_which_forms_are_compared():
    conv = nn.Conv2d(96, 128, 3, bias=False)
    sk.prune_(conv.eval(), sk.Magnitude("2:4"))
    form = convolutions.Convolution24()
    expected = form.nbytes(conv) + form.extra_bytes(conv, ["2:4 row pairs"])
    assert ArrangedConv2d24.from_conv2d(conv).data.nbytes == pytest.approx(expected, rel=0.03)
    assert form.extra_bytes(conv, ["2:4"]) == 0


def odd(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


class Own(nn.Conv2d):
    pass


def hooked():
    conv = odd()
    conv.register_forward_hook(lambda *_: None)
    return conv


SKIPPED = {
    "groups": (lambda: odd(groups=2), "it has 2 groups, and only convolutions of one are swapped"),
    "mode": (lambda: odd(padding_mode="reflect"), "it pads in the mode 'reflect', and only padding with zeros"),
    "subclass": (lambda: Own(8, 8, 3, padding=1), "Own may compute something else than nn.Conv2d"),
    "hook": (hooked, "it has hooks"),
}


@pytest.mark.parametrize(("make", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_a_convolution_that_must_stay(make, reason, ratios):
    model = nn.Sequential(make(), odd()).eval()
    report = sk.compress_(model, X)
    assert report.layers[0].reason.startswith(reason) and report.layers[1].decision == "prepacked"


def test_other_reasons(ratios, monkeypatch):
    model = convolved(1, pruned=False)
    assert set(reasons(sk.compress_(model)).values()) == {"only batches say how large its images are"}
    sizes = [torch.randn(1, 8, 4, width) for width in range(4, 13)]
    found = reasons(sk.compress_(model, sizes))
    assert set(found.values()) == {"its images have 9 sizes, and at most 8 are measured"}
    ratios["prepacked"] = 1.0
    assert reasons(sk.compress_(model, X))["0.up"].startswith("2:4: not 2:4; prepacked: 1.00x")
    ratios["prepacked"] = 2.0
    few = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    assert "2:4: 3 inputs are less than a group of four" in reasons(sk.compress_(few, torch.randn(1, 3, 5, 5)))["0"]
    half = convolved().bfloat16()
    assert "convolutions are swapped in torch.float32 only" in reasons(sk.compress_(half, X.bfloat16()))["0.up"]
    with torch.autocast("cpu", torch.bfloat16):
        assert "it runs in torch.bfloat16" in reasons(sk.compress_(convolved(), X))["0.up"]
    alone = odd()
    assert "use from_conv2d of Conv2d24 or PrepackedConv2d" in sk.compress_(alone, X).layers[0].reason
    monkeypatch.setattr(convolutions, "backends", lambda: {"conv2d24": {"cpu": "reference"}})
    report = sk.compress_(convolved(), X)
    assert "no compiled 2:4 convolution" in report.layers[0].reason and report.layers[0].decision == "prepacked"


def test_training_takes_24_alone(ratios):
    model = convolved().train()
    report = sk.compress_(model, X)
    assert set(decisions(report).values()) == {"2:4"} and "cannot be trained" in report.layers[0].reason
    model(X).square().mean().backward()
    assert model[0].up.values.grad is not None


@pytest.mark.parametrize("pattern", ["2:4", "prepacked"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_in_the_modes_of_a_caller(ratios, mode, pattern):
    model = convolved(pruned=pattern == "2:4", channels_last=True)
    before, expected, strides = snapshot(model), model(X), [each.stride() for each in model.parameters()]
    with mode():
        around = surroundings()
        report = sk.compress_(model, X)
        assert surroundings() == around
    assert set(decisions(report).values()) == {pattern}
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    for x in (X, X.to(memory_format=torch.channels_last), X[0]):
        dense = copy.deepcopy(model)
        sk.decompress_(dense)
        torch.testing.assert_close(copy.deepcopy(model)(x), dense(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(X).float(), expected, rtol=5e-2, atol=5e-2)
    with mode():
        sk.decompress_(model)
    assert_same(snapshot(model), before)
    assert [each.stride() for each in model.parameters()] == strides
    model.train()(X).sum().backward()


@pytest.mark.parametrize("ratio", [1.5, 0.5], ids=["stays", "given back"])
@pytest.mark.parametrize("pruned", [True, False])
def test_interrupted_anywhere_all_or_nothing(ratios, ratio, pruned):
    ratios["whole"] = ratio

    def make():
        torch.manual_seed(0)
        return convolved(pruned=pruned).eval(), X

    assert_all_or_nothing(make, lambda model, x: sk.compress_(model, x), runs=30)
    if ratio > 1:

        def compressed():
            model, x = make()
            sk.compress_(model, x)
            return (model,)

        assert_all_or_nothing(compressed, sk.decompress_, runs=20)


def test_dtypes_are_refused_before_anything_is_converted(ratios):
    model = nn.Sequential(nn.Linear(6, 6), convolved()[0]).eval()
    sk.compress_(model[1:], X)
    sk.compress_(model, forward=lambda model, x: model[1](model[0](x)), batches=X)
    with pytest.raises(TypeError, match=r"layer '1\.up' is compressed and computes in float32, float16 or bfloat16"):
        model.double()
    assert model[0].weight.dtype == torch.float32


@pytest.mark.slow
def test_a_model_of_convolutions_gets_no_slower():
    """Measured for real: a small UNet's block."""
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), Convolved(128)
    )
    sk.prune_(model.eval(), sk.Magnitude("2:4"))
    x = torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        expected = model(x)
        report = sk.compress_(model, x, measure=sk.Measure(budget=0.2))
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    assert len(report.layers) == 4 and all(timing.ratio >= 0.97 for timing in report.passes)
