"""compress_: what is measured, what is swapped, and never slower."""

import json

import pytest
import torch
from compressing import assert_same, blocks, decisions, reasons, snapshot
from torch import nn

import sparsekit as sk
from sparsekit import _timing
from sparsekit.compress import Timing, cache, forms, tune, whole
from sparsekit.nn import Linear24
from sparsekit.ops import backends

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SLOW = 0.9


def test_literal(ratios):
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False)).eval()
    model[0].weight.data = torch.tensor([[1.0, 0.0, 3.0, 0.0]])
    model[1].weight.data = torch.tensor([[2.0]])
    report = sk.compress_(model, torch.ones(1, 4), where=lambda name, module: name == "0")
    assert decisions(report) == {"0": "2:4"}
    assert type(model[0]) is Linear24 and type(model[1]) is nn.Linear
    assert model(torch.ones(1, 4)).tolist() == [[8.0]]
    assert report.bytes_before == (4 + 1) * 4
    assert report.bytes_after == (2 + 1) * 4 + 1
    assert sk.decompress_(model) == ("0",)
    assert model[0].weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]


def test_sample_decides_the_token_counts(ratios):
    model = blocks(1)
    batches = [torch.randn(3, 16), torch.randn(2, 2, 16), torch.randn(16), torch.randn(700, 16), torch.randn(0, 16)]
    report = sk.compress_(model, batches)
    assert [layer.calls for layer in report.layers] == [{1: 1, 4: 2, 512: 1}] * 2
    assert sorted({shape[0] for _, shape, _ in ratios["measured"]}) == [1, 4, 512]


def test_without_a_sample_three_counts_are_measured(ratios):
    report = sk.compress_(blocks(1))
    assert [set(layer.timings) for layer in report.layers] == [{1, 16, 128}] * 2


def test_layers_of_one_kind_are_measured_together_and_twice(ratios):
    sk.compress_(blocks(5), torch.randn(4, 16))
    assert len(ratios["measured"]) == 2 * 2


def test_what_wins_only_once_stays(monkeypatch):
    turns = []

    def remembered(key, measure, device):
        turns.append((key["repeat"], key["shape"]))
        ratio = 3.0 if key["repeat"] == 0 or key["shape"] == (16, 32) else 0.9
        timing = Timing(1.0, ratio, float(ratio > 1), ratio, 0.0)
        return {name: timing for name in ("plain", *key["candidates"])}

    monkeypatch.setattr(cache, "remembered", remembered)
    for module in (whole, forms):
        monkeypatch.setattr(module, "compare_passes", lambda *args: (Timing(1.0, 1.0, 0.5, 1.0, 0.0),))
    report = sk.compress_(blocks(1), torch.randn(4, 16))
    assert turns == [(0, (32, 16)), (0, (16, 32)), (1, (32, 16)), (1, (16, 32))]  # all, and then all again
    assert report.swapped == ("0.down",)
    assert "0.90x, 0% won at 4 tokens" in report.layers[0].reason


@pytest.mark.parametrize(
    ("batches", "forward"),
    [
        (torch.ones(2, 4), None),
        ({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, None),
        ((torch.ones(2, 4), torch.ones(2, 4)), None),
        ([(torch.ones(2, 4),), {"a": torch.ones(2, 4)}, torch.ones(2, 4)], None),
        (iter([torch.ones(2, 4)]), None),
        (["text"], lambda model, batch: model(torch.ones(2, 4))),
    ],
    ids=["tensor", "mapping", "tuple", "list", "iterator", "forward"],
)
def test_batch_conventions(ratios, batches, forward):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a, b=0):
            return self.layer(input=a) + b

    report = sk.compress_(Adds().eval(), batches, forward=forward)
    assert decisions(report) == {"layer": "prepacked"}
    assert set(report.layers[0].calls) == {2}


def test_the_sample_leaves_no_trace(ratios):
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout()).train()
    model[2].eval()
    before, state = snapshot(model), torch.get_rng_state()
    sk.compress_(model, torch.randn(8, 16))
    torch.set_rng_state(state)
    ratios |= {"prepacked": SLOW}
    x = torch.randn(8, 16)
    after = torch.get_rng_state()
    report = sk.compress_(model, x)
    assert torch.equal(torch.get_rng_state(), after)
    assert "call model.eval() first" in reasons(report)["0"]
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("two_four", "prepacked", "decision"),
    [
        (1.05, 0.5, "2:4"),
        (1.04, 1.04, "plain"),
        (1.2, 1.3, "prepacked"),
        (1.3, 1.2, "2:4"),
        (None, 1.3, "prepacked"),
        (None, None, "plain"),
        (lambda tokens: 3.0 if tokens == 1 else 1.0, 0.5, "plain"),
        (lambda tokens: 3.0 if tokens == 1 else 1.1, 1.5, "prepacked"),
        (lambda tokens: 3.0 if tokens == 1 else 0.5, lambda tokens: 1.1, "prepacked"),
    ],
)
def test_the_rule(ratios, two_four, prepacked, decision):
    ratios |= {"2:4": two_four, "prepacked": prepacked}
    report = sk.compress_(blocks(1), [torch.randn(1, 16), torch.randn(64, 16)])
    assert set(decisions(report).values()) == {decision}
    if two_four is None:
        assert "2:4: a wrong result at 1 token" in report.layers[0].reason
    if two_four == 1.04:
        assert "2:4: 1.04x" in report.layers[0].reason


def test_a_fast_median_that_loses_a_quarter_stays(ratios, monkeypatch):
    quick = Timing(0.5, 2.0, 0.75, 2.0, 0.0)
    monkeypatch.setattr(tune, "measure", lambda calls, plain, x, **_: dict.fromkeys(("plain", *calls), quick))
    report = sk.compress_(blocks(1))
    assert set(decisions(report).values()) == {"plain"}
    assert "75% won" in report.layers[0].reason


def test_cold_where_the_model_exceeds_the_cache(ratios, monkeypatch):
    for size, evict_cache in ((2**20, False), (100, True)):
        monkeypatch.setattr(_timing, "cache_bytes", lambda device, size=size: size)
        ratios["measured"].clear()
        sk.compress_(blocks(1))
        assert {asked[2] for asked in ratios["measured"]} == {evict_cache}


def test_rejects():
    model = blocks(1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        sk.compress_({})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        sk.decompress_({})
    with pytest.raises(ValueError, match="budget must be a positive number of seconds, got 0"):
        sk.compress_(model, measure=sk.Measure(budget=0))
    with pytest.raises(ValueError, match="at least one batch, got none"):
        sk.compress_(model, [])
    with pytest.raises(TypeError, match="iterable of batches, got int"):
        sk.compress_(model, 3)


@compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pruned", [True, False], ids=["sparse", "dense"])
def test_compressed_model_compiles_whole(ratios, pruned, backend):
    torch._dynamo.reset()
    model, x = blocks(1, pruned), torch.randn(3, 16)
    sk.compress_(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


def test_report_reads_and_saves(ratios, tmp_path):
    steps = []
    report = sk.compress_(blocks(1), torch.randn(3, 16), progress=lambda items: steps.extend(items) or steps)
    assert len(steps) == 2 * 2  # two shapes at one token count, twice
    lines = str(report).splitlines()
    assert lines[0].split() == ["layers", "now", "4", "tokens", "why"]
    assert lines[1].startswith("1 of 32x16  2:4  3.00x (3.00x)  fastest")
    assert lines[-1].startswith("2 of 2 layers swapped, 0.0 MiB -> 0.0 MiB, measured in")
    assert report.swapped == ("0.up", "0.down")
    path = tmp_path / "report.json"
    report.save(path)
    entry = json.loads(path.read_text())["layers"][0]
    assert entry["name"] == "0.up" and entry["timings"]["4"]["2:4"]["ratio"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.save(tmp_path / "nowhere" / "report.json")


def test_report_shows_what_was_turned_down(ratios):
    ratios |= {"2:4": 0.97, "prepacked": 1.02}
    text = str(sk.compress_(blocks(1), torch.randn(3, 16)))
    assert "0.97x (0.97x)  2:4: 0.97x, 0% won at 4 tokens (0.up)" in text  # a user asks why it is not sparse
    assert text.count("prepacked") == 1 and "with every layer prepacked: 1.00x what was chosen" in text
    reason = sk.compress_(blocks(1), torch.randn(3, 16)).layers[0].reason
    assert "prepacked: 1.02x, 100% won at 4 tokens (1.05x is needed)" in reason


def test_report_names_the_plain_layers_of_a_row(ratios):
    ratios |= {"2:4": 0.9, "prepacked": 0.8}
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name != "5")
    model[4].weight.data.fill_(1)
    lines = str(sk.compress_(model, torch.randn(1, 8))).splitlines()
    assert lines[1].endswith("2:4: 0.90x, 0% won at 1 token (0, 1, 2 and 1 more)")
    assert "its weight is not zero where its mask drops it" in lines[2] + lines[3]
    assert any("2:4: not 2:4; prepacked: 0.80x, 0% won at 1 token (5)" in line for line in lines)


def test_measured_for_real_on_small_layers():
    model, x = blocks(1), torch.randn(3, 16)
    expected = model(x)
    report = sk.compress_(model, x, measure=sk.Measure(budget=0.01))
    compiled = {"2:4", "2:4 input pairs"} if backends()["linear24"]["cpu"] != "reference" else set()
    offered = {"plain", "prepacked"} | compiled
    for layer in report.layers:
        assert layer.timings[4].keys() == offered
        assert None not in layer.timings[4].values()  # every candidate gave the right result
    torch.testing.assert_close(model(x), expected)
