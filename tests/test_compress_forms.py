"""compress_ tries one form for all layers, and takes it where the whole model is faster with it."""

import pytest
import torch
from compressing import assert_same, blocks, decisions, snapshot
from torch import nn

import sparsekit as sk
from sparsekit.compress import Timing, forms, tune, whole
from sparsekit.nn import Linear24, PrepackedLinear

FORM = {name: "2:4" for name in ("0.up", "0.down")}


@pytest.fixture
def close(ratios):
    """2:4 is the fastest for a layer alone, and prepacked not far from it."""
    ratios["prepacked"] = 2.5
    return ratios


def compressed(model, **options):
    return sk.compress_(model, torch.randn(3, 16), **options)


def test_a_form_that_is_faster_in_the_whole_is_taken(close):
    close["forms"] = lambda shown, over: 1.25
    model = blocks(1)
    before = snapshot(model)
    report = compressed(model)
    assert decisions(report) == dict.fromkeys(FORM, "prepacked")
    assert all(type(layer) is PrepackedLinear for layer in (model[0].up, model[0].down))
    assert [timing.ratio for timing in report.forms["prepacked"]] == [1.25]
    for layer in report.layers:
        assert layer.why == "a pass of the whole model is 1.25x as fast with every layer prepacked"
        assert "alone: fastest" in layer.reason and layer.kernels == {4: "prepacked"} and not layer.sparse
        assert layer.bytes_after == layer.bytes_before
    assert "with every layer prepacked: 1.25x what was chosen for each layer alone" in str(report)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("ratios_", [[1.03], [0.5], [1.2, 1.0]], ids=["hardly", "slower", "once"])
def test_what_was_chosen_stays_unless_it_is_clearly_slower_twice(close, ratios_):
    found = iter(ratios_)
    close["forms"] = lambda shown, over: next(found)
    report = compressed(blocks(1))
    assert decisions(report) == FORM and report.forms["prepacked"][0].ratio == ratios_[-1]
    assert list(found) == []


def test_a_form_that_is_slower_on_one_batch_is_not_taken(close, monkeypatch):
    uneven = tuple(Timing(1.0, ratio, 1.0, ratio, 0.0) for ratio in (1.5, 0.9))
    monkeypatch.setattr(forms, "compare_passes", lambda *args: uneven)
    assert decisions(sk.compress_(blocks(1), [torch.randn(3, 16), torch.randn(9, 16)])) == FORM


def test_a_form_with_which_the_model_fails_is_not_taken(close):
    def fails(shown, over):
        raise RuntimeError("injected")

    close["forms"] = fails
    report = compressed(blocks(1))
    assert decisions(report) == FORM and report.forms == {}


@pytest.mark.parametrize(
    ("prepacked", "options"),
    [(1.9, {}), (2.5, {"objective": "size"}), (2.5, {"measure": sk.Measure(tokens=(1,))})],
    ids=["hopeless", "size", "tokens"],
)
def test_when_no_form_is_tried(close, prepacked, options):
    close["prepacked"], close["forms"] = prepacked, 9.0
    report = compressed(blocks(1), **options)
    assert decisions(report) == FORM and report.forms == {}


def busy(monkeypatch, ratio, spread):
    def measure(calls, plain, x, *, dense, clock, budget):
        timings = {name: Timing(1 / ratio, ratio, 0.5, ratio, spread) for name in calls}
        return {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.0), **timings}

    monkeypatch.setattr(tune, "measure", measure)


@pytest.mark.parametrize(("ratio", "taken"), [(1.5, True), (1.02, False)])
def test_the_whole_settles_what_layers_could_not(ratios, monkeypatch, ratio, taken):
    busy(monkeypatch, 1.0, 0.9)
    ratios["forms"] = lambda shown, over: 1.0 if over else ratio
    model = blocks(1)
    report = compressed(model)
    assert (report.undecided == ()) is taken and type(model[0].up) is (Linear24 if taken else nn.Linear)
    assert report.forms["2:4"][0].ratio == ratio


@pytest.mark.parametrize(("ratio", "whole_", "taken"), [(1.04, 1.5, True), (1.04, 1.04, False), (0.99, 1.5, False)])
def test_a_layer_that_hardly_gains_alone_is_settled_by_the_whole(ratios, ratio, whole_, taken):
    ratios["2:4"] = ratios["prepacked"] = ratio
    ratios["forms"] = lambda shown, over: 1.0 if over else whole_
    report = compressed(blocks(1))
    assert bool(report.swapped) is taken and bool(report.forms) is (ratio > 1)


def test_a_whole_that_cannot_be_settled_is_undecided(ratios, monkeypatch):
    timing = Timing(1.0, 0.9, 0.4, 0.9, 0.8)
    monkeypatch.setattr(whole, "compare_passes", lambda swap, shown, over, work: (timing,))
    report = compressed(blocks(1))
    assert report.swapped == () and report.undecided == ("0.up", "0.down")
    said = "given back: undecided, the machine is busy (spread 0.8): with it a pass takes 1.11 times as long"
    assert report.layers[0].why == said and "2 undecided: the machine is busy" in str(report)


def test_a_form_that_could_not_be_settled_is_said_to_be_undecided(close, monkeypatch):
    monkeypatch.setattr(forms, "compare_passes", lambda *args: (Timing(1.0, 1.01, 0.5, 1.01, 0.7),))
    report = compressed(blocks(1))
    assert decisions(report) == FORM
    assert "with every layer prepacked: 1.01x (undecided, the machine is busy: spread 0.7)" in str(report)
