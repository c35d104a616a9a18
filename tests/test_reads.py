"""Layers whose weight a parent reads without a call are found by running the model, and skipped with that reason."""

import pytest
import torch
import torch.nn.functional as F
from pruning import assert_restored, snapshot
from torch import nn

import sparsekit as sk


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.called, self.read, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.how = read

    def forward(self, x):
        x = self.called(x)
        if x.dtype != self.unused.weight.dtype or self.unused.weight.shape[0] != 8 or self.unused.weight.is_sparse:
            raise AssertionError
        return self.how(self.read, x)


READS = {
    "F.linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "transposed": lambda layer, x: x @ layer.weight.T,
    "left": lambda layer, x: (layer.weight @ x.T).T,
    "in parts": lambda layer, x: torch.cat([F.linear(x, part) for part in layer.weight.chunk(2)], -1),
    "computed": lambda layer, x: x @ torch.exp(-layer.weight),
    "data": lambda layer, x: x @ layer.weight.data.t(),
    "a keyword": lambda layer, x: F.linear(input=x, weight=layer.weight),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("sequential", [True, False])
def test_prune_says_who_reads(read, sequential):
    model = nn.Sequential(Reading(read))
    before = model[0].read.weight.detach().clone()
    report = sk.prune_(
        model,
        sk.Wanda("2:4"),
        iter([torch.randn(4, 8)]) if not sequential else torch.randn(4, 8),
        calibration=sk.Calibration(sequential=sequential),
    )
    assert [layer.name for layer in report.layers] == ["0.called"]
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "0.read": "Reading reads its weight without calling it",
        "0.unused": "no calibration batch reached it",
    }
    assert torch.equal(model[0].read.weight, before) and not any(
        "forward" in vars(module) for module in model.modules()
    )


def test_where_nothing_is_called_the_error_says_who_reads():
    model = nn.Sequential(Reading(READS["F.linear"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no calibration batch reached any.*0\.read: Reading reads its weight"):
        sk.prune_(model, sk.Wanda("2:4"), torch.randn(4, 8), where=lambda name, _: name == "0.read")
    assert_restored(model, before)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_compress_with_a_sample_says_who_reads(read, ratios):
    report = sk.compress_(nn.Sequential(Reading(read)).eval(), torch.randn(4, 8))
    found = {layer.name: layer.reason for layer in report.layers}
    assert found["0.read"] == "Reading reads its weight without calling it"
    assert found["0.unused"] == "the batches do not run it" and "reads" not in found["0.called"]


def test_a_layer_that_is_called_and_read_is_pruned_and_stays_dense(ratios):
    model = nn.Sequential(Reading(lambda layer, x: layer(x) + layer.weight.sum())).eval()
    report = sk.prune_(model, sk.Wanda("2:4"), torch.randn(4, 8))
    assert [layer.name for layer in report.layers] == ["0.called", "0.read"]
    found = {layer.name: layer.reason for layer in sk.compress_(model, torch.randn(4, 8)).layers}
    assert found["0.read"] == "Reading reads its weight without calling it"


def test_looking_for_who_reads_draws_none_of_the_callers_random_numbers():
    model = nn.Sequential(Reading(lambda layer, x: F.linear(x + torch.rand(()), layer.weight)))
    state = torch.get_rng_state()
    sk.prune_(model, sk.Wanda("2:4"), torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
