"""compress_: what is asked for, and what is taken: speed or size, token counts, dense copies, and a busy machine."""

import pytest
import torch
from compressing import assert_same, blocks, decisions, reasons, snapshot
from table_clock import up_to_16
from tiering import tiered_linear
from torch import nn

import sparsekit as sk
from sparsekit.compress import Timing, tune
from sparsekit.nn import Plan, Route, RoutedLinear24, RoutedTieredLinear


@pytest.mark.parametrize(
    ("two_four", "prepacked", "speed", "size"),
    [
        (1.04, 0.9, "plain", "2:4"),
        (0.97, 1.5, "prepacked", "2:4"),
        (0.96, 1.5, "prepacked", "prepacked"),
        (0.96, 1.04, "plain", "plain"),
        (1.30, 1.33, "2:4", "2:4"),  # as fast, and smaller
        (1.30, 1.36, "prepacked", "2:4"),
        (None, 0.98, "plain", "plain"),
        (up_to_16(3.0, 0.96), 0.9, "plain", "plain"),
        (up_to_16(3.0, 0.98), 0.9, "plain", "2:4"),
    ],
)
def test_speed_or_size(ratios, two_four, prepacked, speed, size):
    ratios |= {"2:4": two_four, "prepacked": prepacked}
    for objective, expected in (("speed", speed), ("size", size)):
        model = blocks(1)
        report = sk.compress_(model, measure=sk.Measure(tokens=(1, 128)), objective=objective)
        assert set(decisions(report).values()) == {expected}, objective
        weights = [sum(getattr(layer, name) for layer in report.layers) for name in ("bytes_before", "bytes_after")]
        assert (weights[1] < weights[0]) is (expected == "2:4")


def test_bytes_of_a_layer(ratios):
    layer = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1,))).layers[0]
    assert (layer.bytes_before, layer.bytes_after) == (32 * 16 * 4, 32 * 8 * 4 + 32 * 2)
    model = nn.Sequential(tiered_linear(80, 96)).eval()
    layer = sk.compress_(model, measure=sk.Measure(tokens=(1,))).layers[0]
    assert (layer.bytes_before, layer.bytes_after) == (80 * 96 * 4, model[0].packed.nbytes)


def test_tokens_are_measured(ratios):
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1, 100, 100, 9000)))
    assert report.layers[0].calls == {1: 1, 128: 2, 512: 1}


def test_tokens_beside_a_sample(ratios):
    model = nn.ModuleDict({"run": blocks(1), "not": nn.Linear(16, 16)}).eval()
    report = sk.compress_(
        model, torch.randn(4, 16), measure=sk.Measure(tokens=(1,)), forward=lambda model, x: model["run"](x)
    )
    assert [layer.calls for layer in report.layers] == [{1: 1, 4: 1}, {1: 1, 4: 1}, {}]
    assert reasons(report)["not"] == "the batches do not run it"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"tokens": 3}, TypeError, r"tokens must be positive integers such as \(1, 128\), got 3"),
        ({"tokens": "12"}, TypeError, "tokens must be positive integers"),
        ({"tokens": (1, 2.5)}, TypeError, r"got \(1, 2.5\)"),
        ({"tokens": (True,)}, TypeError, "tokens must be positive integers"),
        ({"tokens": ()}, ValueError, r"tokens must be positive integers .* got \(\)"),
        ({"tokens": (1, 0)}, ValueError, r"got \(1, 0\)"),
        ({"objective": "bytes"}, ValueError, "objective must be 'speed' or 'size', got 'bytes'"),
        ({"objective": "size", "keep_dense": True}, ValueError, "keep_dense holds a dense copy"),
        ({"budget": float("nan")}, ValueError, "budget must be a positive number of seconds, got nan"),
        ({"budget": "1"}, TypeError, "budget must be a positive number of seconds, got '1'"),
    ],
    ids=str,
)
def test_rejects(arguments, error, match):
    model = blocks(1)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        measure = {name: value for name, value in arguments.items() if name in ("tokens", "budget")}
        sk.compress_(model, measure=sk.Measure(**measure), **{k: v for k, v in arguments.items() if k not in measure})
    assert_same(snapshot(model), before)


def test_one_losing_count_is_a_veto_that_names_it(ratios):
    ratios |= {"2:4": up_to_16(3.0, 0.5), "prepacked": 0.9}
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1, 16, 128)))
    assert set(decisions(report).values()) == {"plain"}
    lost = "2:4: 0.50x, 0% won at 128 tokens, faster at 1, 16: try keep_dense=True"
    assert lost in report.layers[0].reason


@pytest.mark.parametrize(
    ("objective", "keep_dense", "training", "dense", "said"),
    [
        ("speed", True, True, 1.0, ", faster at 1: with a dense copy it cannot be trained, and it is in training mode"),
        ("speed", False, False, 1.0, ", faster at 1: try keep_dense=True"),
        ("speed", True, False, 0.9, ", faster at 1: a dense copy has 0.90x there (0.97x is needed)"),
        ("speed", True, False, None, ", faster at 1: a dense copy gives a wrong result at 1 token"),
        ("size", False, False, 1.0, "; tiered"),  # which takes no dense copy
    ],
)
def test_the_advice_can_be_followed(ratios, objective, keep_dense, training, dense, said):
    ratios |= {"2:4": up_to_16(3.0, 0.5), "prepacked": 0.9, "dense": dense}
    model, measure = blocks(1).train(training), sk.Measure(tokens=(1, 128))
    report = sk.compress_(model, objective=objective, keep_dense=keep_dense, measure=measure)
    reason = report.layers[0].reason
    assert f"2:4: 0.50x, 0% won at 128 tokens{said}" in reason and reason.count("with a dense copy") == training


@pytest.mark.parametrize(
    ("ratio", "wins", "said"),
    [
        (1.049, 1.0, "1.04x, 100% won at 1 token (1.05x is needed)"),
        (1.2, 0.796, "1.20x, 79% won at 1 token (80% is needed)"),
        (1.02, 0.5, "1.02x, 50% won at 1 token (1.05x and 80% are needed)"),
        (0.996, 0.4, "0.99x, 40% won at 1 token; tiered"),
        (0.57, 0.29, "0.57x, 29% won at 1 token; tiered"),
    ],
)
def test_a_reason_says_what_was_needed(ratios, monkeypatch, ratio, wins, said):
    def measure(calls, plain, x, **_):
        return {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.0), **dict.fromkeys(calls, Timing(1.0, ratio, wins, 1.0, 0.0))}

    monkeypatch.setattr(tune, "measure", measure)
    assert f"2:4: {said}" in sk.compress_(blocks(1), measure=sk.Measure(tokens=(1,))).layers[0].reason


@pytest.mark.parametrize("kind", ["2:4", "tiered"])
def test_a_dense_copy_answers_where_it_is_faster(ratios, kind):
    ratios |= {kind: up_to_16(3.0, 0.5), "prepacked": 0.9, "dense": up_to_16(1.0, 1.2)}
    model = blocks(1) if kind == "2:4" else nn.Sequential(tiered_linear(80, 96)).eval()
    before, width = snapshot(model), 16 if kind == "2:4" else 80
    batches = [torch.randn(tokens, width) for tokens in (1, 16, 128)]
    expected = [model(x) for x in batches]
    report = sk.compress_(model, batches, keep_dense=True)
    assert set(decisions(report).values()) == {kind}
    assert report.layers[0].kernels == {1: kind, 16: kind, 128: "dense"}
    layer = model[0].up if kind == "2:4" else model[0]
    assert type(layer) is (RoutedLinear24 if kind == "2:4" else RoutedTieredLinear)
    assert layer.plan == Plan((Route(16, "sparse"), Route(128, "dense")))
    assert report.layers[0].bytes_after > report.layers[0].bytes_before
    with torch.no_grad():
        for x, y in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(x), y)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("two_four", "dense", "prepacked", "decision", "copy"),
    [
        (up_to_16(3.0, 0.5), 0.96, 0.9, "plain", False),  # the copy costs too much in this module
        (0.5, 1.2, 0.9, "plain", False),  # never sparse
        (2.0, 1.2, 0.9, "2:4", False),  # always sparse
        (up_to_16(3.0, 1.1), 1.105, 0.9, "2:4", False),  # as fast without it, and smaller
        (up_to_16(3.0, 1.1), 1.5, 1.3, "2:4", True),
        (up_to_16(3.0, 1.1), 1.5, 1.5, "prepacked", False),  # as fast, since the larger count takes most of the time
        (up_to_16(1.6, 0.5), 1.5, 2.0, "prepacked", False),
    ],
)
def test_a_dense_copy_has_to_pay(ratios, two_four, dense, prepacked, decision, copy):
    ratios |= {"2:4": two_four, "dense": dense, "prepacked": prepacked}
    report = sk.compress_(model := blocks(1), measure=sk.Measure(tokens=(1, 128)), keep_dense=True)
    assert set(decisions(report).values()) == {decision}
    assert (type(model[0].up) is RoutedLinear24) is copy
    assert ("faster at 1: a dense copy has 0.96x there" in report.layers[0].reason) is (dense == 0.96)


def test_a_dense_copy_needs_eval_mode(ratios):
    ratios |= {"2:4": up_to_16(3.0, 0.5), "dense": 1.5}
    report = sk.compress_(blocks(1).train(), measure=sk.Measure(tokens=(1, 128)), keep_dense=True)
    assert set(decisions(report).values()) == {"plain"} and "dense" not in report.layers[0].timings[1]


@pytest.fixture
def spread(ratios, monkeypatch):
    """The ratio and the spread of 2:4, which the machine gives."""
    told = {"ratio": 1.0, "spread": 0.0}

    def measure(calls, plain, x, **_):
        timing = Timing(1.0, told["ratio"], 0.5, 1.0, told["spread"])
        slow = Timing(2.0, 0.5, 0.0, 0.5, 0.0)
        return {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.0), **dict.fromkeys(calls, slow), "2:4": timing}

    monkeypatch.setattr(tune, "measure", measure)
    return told


@pytest.mark.parametrize(
    ("ratio", "spread_", "undecided"), [(1.0, 0.6, True), (1.0, 0.4, False), (0.3, 0.6, False), (0.7, 0.6, True)]
)
def test_a_busy_machine_is_no_verdict(spread, ratio, spread_, undecided):
    spread |= {"ratio": ratio, "spread": spread_}
    report = sk.compress_(blocks(1), measure=sk.Measure(tokens=(1,)))
    assert report.swapped == () and report.undecided == (("0.up", "0.down") if undecided else ())
    said = "2:4: undecided, the machine is busy (spread 0.6): "
    assert (said in report.layers[0].reason) is undecided
    line = "2 undecided: the machine is busy (spread up to 0.6), run again when it is quiet"
    assert (line in str(report)) is undecided and ("nothing is faster" in str(report)) is not undecided


def test_two_measurements_that_disagree_are_no_verdict_and_are_forgotten(ratios, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path))
    measured = []

    def measure(calls, plain, x, **_):
        measured.append(tuple(calls))
        ratio = 2.0 if len(measured) % 2 else 0.9
        slow = Timing(2.0, 0.5, 0.0, 0.5, 0.0)
        timing = Timing(1 / ratio, ratio, float(ratio > 1), ratio, 0.01)
        return {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.0), **dict.fromkeys(calls, slow), "2:4": timing}

    monkeypatch.setattr(tune, "measure", measure)
    model = nn.Sequential(blocks(1)[0].up).eval()
    report = sk.compress_(model, measure=sk.Measure(tokens=(1,)))
    assert report.undecided == ("0",) and "spread 1.2): 0.90x" in report.layers[0].reason
    assert not list(tmp_path.iterdir())  # or it would stay undecided for ever
    sk.compress_(model, measure=sk.Measure(tokens=(1,)))
    assert len(measured) == 4
