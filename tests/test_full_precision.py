"""Statistics and methods compute the same in every mode, default dtype, default device and precision of products."""

import copy
import threading

import pytest
import torch
from interrupts import surroundings
from pruning import stack
from surroundings import default_dtype, deterministic, setting
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune import Gram
from sparsekit.prune.full_precision import full_precision
from sparsekit.prune.layers import find_layers
from sparsekit.tiers import Ratios, Step, tier_iteration

WANDA = sk.Wanda("2:4")
METHODS = [
    sk.Magnitude("2:4"),
    WANDA,
    sk.RIA("50%"),
    sk.SparseGPT("2:4"),
    sk.SparseGPT("50%"),
    sk.ADMM("50%"),
    sk.LeastSquares(sk.Swaps(WANDA)),
]


def inputs():
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(3)) @ torch.randn(32, 32).abs()
    return [x[:100], x[100:]]


def precision(value):
    return setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, value)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "grad": torch.enable_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_in_every_surrounding(method, name):
    torch.manual_seed(0)
    model, x = stack(32, 32, 8), inputs()
    other = copy.deepcopy(model)
    report = sk.prune_(model, method, x)
    with SURROUNDINGS[name]():
        around = surroundings()
        found = sk.prune_(other, method, x)
        assert surroundings() == around
    assert [layer.error for layer in found.layers] == [layer.error for layer in report.layers]
    for index in (0, 2):
        assert torch.equal(model[index].weight, other[index].weight)
        assert torch.equal(get_mask(model[index]), get_mask(other[index]))
    assert not any(tensor.is_inference() for tensor in (*other.parameters(), *other.buffers()))
    other(x[0]).sum().backward()
    with sk.keep_masks(other, torch.optim.SGD(other.parameters(), lr=0.1)):
        pass


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_tiers_in_every_surrounding(name):
    model, x = stack(32, 32, 32), inputs()
    other, step = copy.deepcopy(model), Step(1, Ratios(0.25, 0.5, 0.25), 0.75, 0.25, 0.0)
    maps, report = tier_iteration(
        model, step, x, options=sk.tiers.TierOptions(reconstruct=True, goal=Ratios(0.0, 0.0, 1.0))
    )
    with SURROUNDINGS[name]():
        found, other_report = tier_iteration(
            other, step, x, options=sk.tiers.TierOptions(reconstruct=True, goal=Ratios(0.0, 0.0, 1.0))
        )
        assert found["0"].sparsity == maps["0"].sparsity
    assert other_report == report
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert not any(buffer.is_inference() for buffer in other.buffers())


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_autocast_sees_pruned_weights(method, sequential):
    """With its cache of casts and without it is the same, and close to what float32 gives."""
    model, x = stack(32, 32, 32, 8), inputs()
    results = []
    for options in ({}, {"cache_enabled": False}, {"enabled": False}):
        each = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, **options):
            each(x[0])  # fills the cache
            report = sk.prune_(each, method, x, calibration=sk.Calibration(sequential=sequential))
            after = each(x[0])
        results.append((each, report, after))
    for one, other in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][1].error == pytest.approx(results[2][1].error, rel=0.1)


def test_autocast_sees_what_a_failure_brings_back():
    model, x = stack(32, 32, 8), inputs()

    def forward(model, batch):
        model(batch)
        raise KeyboardInterrupt

    with torch.autocast("cpu", torch.bfloat16):
        before = model(x[0])
        with pytest.raises(KeyboardInterrupt):
            sk.prune_(model, sk.Magnitude("2:4"), x, calibration=sk.Calibration(sequential=False, forward=forward))
        assert torch.equal(model(x[0]), before)
        sk.prune_(model, sk.Magnitude("2:4"))
        assert not torch.equal(model(x[0]), before)


def gram_of(x):
    gram = Gram(find_layers(nn.Linear(x.shape[1], 1), Pattern.parse("50%"), "input", None)[0][0])
    gram.update(x)
    return gram.matrix


SETTINGS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def test_products_are_in_full_fp32():
    x = torch.randn(512, 256)
    exact, seen = gram_of(x), []

    class Recording(sk.SparseGPT):
        def prune(self, weight, statistic):
            seen.append([each.fp32_precision for each in SETTINGS])
            assert torch.equal(statistic.matrix, exact)
            return super().prune(weight, statistic)

    with precision("medium"):
        before = [each.fp32_precision for each in SETTINGS]
        assert before == ["tf32", "bf16"]
        sk.prune_(nn.Linear(256, 4), Recording("2:4"), [x])
        assert [each.fp32_precision for each in SETTINGS] == before
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
    assert seen == [["ieee", "ieee"]]


def test_a_wider_setting_still_counts_afterwards():
    for each in SETTINGS:
        each.fp32_precision = "none"
    before = torch.backends.mkldnn.fp32_precision
    torch.backends.mkldnn.fp32_precision = "bf16"
    try:
        assert SETTINGS[1].fp32_precision == "bf16"
        with full_precision():
            assert SETTINGS[1].fp32_precision == "ieee"
        assert SETTINGS[1].fp32_precision == "bf16"
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert SETTINGS[1].fp32_precision == "ieee"
    finally:
        torch.backends.mkldnn.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


def test_threads_that_overlap_restore_it_once():
    inside, left = threading.Event(), threading.Event()

    def longer():
        with full_precision():
            inside.set()
            left.wait(10)

    with precision("medium"):
        before = [each.fp32_precision for each in SETTINGS]
        thread = threading.Thread(target=longer)
        with full_precision():
            thread.start()
            assert inside.wait(10)
        assert [each.fp32_precision for each in SETTINGS] == ["ieee", "ieee"]  # the other one is still at it
        left.set()
        thread.join()
        assert [each.fp32_precision for each in SETTINGS] == before
