"""What ``prune_`` reports."""

import json

import pytest
import torch
from pruning import stack
from torch import nn

import sparsekit as sk


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
    layer.weight.data[:, ::4] *= 10  # kept in any case
    x = torch.randn(40, 100, 64)
    x[:20] *= torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(16)  # so that the first half loses nothing
    weight = layer.weight.detach().clone()
    report = sk.prune_(layer, sk.Wanda("2:4"), list(x))
    exact = (x @ (weight - layer.weight).t()).norm() / (x @ weight.t()).norm()
    assert report.error == pytest.approx(exact.item(), rel=0.1)


def test_inputs_of_zeros_give_no_error():
    assert sk.prune_(nn.Linear(8, 8), sk.Wanda("2:4"), [torch.zeros(3, 8)]).error == 0.0
