"""What a report says: short, in rows by kind, and what the sparsity itself brought."""

import pytest
import torch
from compressing import blocks
from tiering import tiered_linear
from torch import nn

import sparsekit as sk
from sparsekit.compress import CompressLayerReport, Timing


def test_literal(ratios):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).eval()
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name != "2")
    lines = str(sk.compress_(model, measure=sk.Measure(tokens=(1, 16)))).splitlines()
    assert lines[:-1] == [
        "layers      now        1 token        16 tokens      why",
        "2 of 64x64  2:4        3.00x (3.00x)  3.00x (3.00x)  fastest; next prepacked: faster than plain, but slower",
        "1 of 64x64  prepacked  2.00x (2.00x)  2.00x (2.00x)  fastest",
        "ratios: times the plain layer (times the best dense); of what a layer became, else of what came closest",
        "sparse (2:4 or tiered): 2 layers, 0.0 MiB -> 0.0 MiB; only prepacked, dense: 1 layer, 0.0 MiB -> 0.0 MiB",
        # 3 x 17 seconds; 17 / 3 + 17 / 3 + 17 / 2; 3 x 17 / 2
        "layers alone: 2.57x plain; prepacked, without any sparsity, they would be 2.00x, "
        "so sparsity itself brings 1.29x",
        "whole model: not timed, since there are no batches to run it on",
    ]
    assert lines[-1].startswith("3 of 3 layers swapped, 0.0 MiB -> 0.0 MiB, measured in")


def test_a_gain_without_sparsity_is_called_that(ratios):
    ratios |= {"2:4": 1.2}
    report = sk.compress_(blocks(2), torch.randn(1, 16))
    assert (report.speedup, report.dense_speedup) == (2.0, 2.0)
    text = str(report)
    assert "sparse (2:4 or tiered): 0 layers; only prepacked, dense: 4 layers" in text
    assert "2.00x plain; prepacked, without any sparsity, they would be 2.00x, so sparsity itself brings 1.00x" in text
    assert "whole model: 1.50x plain, on the batches" in text


def test_nothing_faster_is_said(ratios):
    ratios |= {"2:4": 0.9, "prepacked": 0.9}
    report = sk.compress_(blocks(1), torch.randn(1, 16))
    text = str(report)
    assert "nothing is faster than dense on this machine: every layer stays as it is" in text
    assert "sparsity" not in text and "whole model" not in text and report.speedup == report.dense_speedup == 1


def test_where_nothing_was_measured_nothing_is_said_of_speed(ratios):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))).eval()
    text = str(sk.compress_(model, torch.randn(1, 8)))
    assert "no layer was measured: each row says why" in text and "nothing is faster" not in text


def test_a_wrong_sparse_result_is_shown(ratios):
    ratios |= {"tiered": None, "prepacked": 0.9}
    report = sk.compress_(nn.Sequential(tiered_linear(80, 96)).eval(), measure=sk.Measure(tokens=(1,)))
    assert report.layers[0].why == "tiered: a wrong result at 1 token"


def test_where_the_whole_gains_nothing_that_is_said(ratios):
    ratios["whole"] = 0.5
    text = str(sk.compress_(blocks(1), torch.randn(1, 16)))
    assert "what is faster alone does not make a pass of the model faster" in text and "nothing is faster" not in text


def test_of_no_layers(ratios):
    report = sk.compress_(nn.ReLU())
    assert str(report).splitlines()[0].split() == ["layers", "now", "why"]
    assert report.speedup == 1 and report.disturbance == 0 and "0 of 0 layers swapped" in str(report)


@pytest.mark.parametrize("objective", ["speed", "size"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, None])
def test_no_line_is_wider_than_a_terminal(ratios, ratio, objective):
    ratios |= {"2:4": ratio, "tiered": ratio, "prepacked": 1.3}
    model = nn.Sequential(blocks(1)[0].up, *(tiered_linear(80, 96) for _ in range(2)), nn.Linear(8, 8).train())
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    text = str(sk.compress_(model, measure=sk.Measure(tokens=(1, 16, 128)), objective=objective))
    assert max(map(len, text.splitlines())) < 120
    assert "1 tokens" not in text and "its whole weight is 2:4" not in text


def test_repr_is_one_short_line(ratios):
    report = sk.compress_(blocks(4), torch.randn(1, 16))
    assert repr(report) == "<CompressReport: 8 of 8 layers swapped; print it for the table>"


def test_seconds_of_a_layer():
    def timing(seconds):
        return Timing(seconds, 1.0, 1.0, 1.0, 0.0)

    timings = {
        1: {"plain": timing(4.0), "2:4": timing(1.0), "prepacked": timing(2.0)},
        16: {"plain": timing(8.0), "2:4": None, "prepacked": timing(9.0)},
    }
    layer = CompressLayerReport("a", (4, 4), "2:4", "", {1: 10, 16: 1}, timings, {1: "2:4", 16: "prepacked"})
    assert layer.seconds() == 10 * 1 + 9
    assert layer.seconds("plain") == 10 * 4 + 8
    assert layer.seconds("prepacked") == 10 * 2 + 8  # where it loses it would not be taken
    assert layer.seconds("2:4") == 10 * 1 + 8
