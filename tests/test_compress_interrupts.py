"""compress_ and decompress_, interrupted line by line: all or nothing, bit for bit."""

import pytest
import torch
from compressing import blocks
from interrupts import assert_all_or_nothing

import sparsekit as sk
from sparsekit.compress import whole

many = pytest.param(500, marks=pytest.mark.slow)


@pytest.fixture
def real_order(ratios, monkeypatch):
    """As if measured, with the modules hung as they are while the model is timed."""
    compare_passes = whole.compare_passes

    def compare(swap, shown, over, work):
        swap.show(over)
        swap.show(shown)
        return compare_passes(swap, shown, over, work)

    monkeypatch.setattr(whole, "compare_passes", compare)
    return ratios


def make():
    torch.manual_seed(0)
    model = blocks(1).train()
    model[0].down.eval()
    for layer in (model[0].up, model[0].down):
        layer.weight.data[layer.weight == 0] = -0.0  # what 2:4 does not store
    x = torch.randn(3, 16)
    model(x).sum().backward()
    return model, x


@pytest.mark.parametrize("runs", [40, many])
@pytest.mark.parametrize("ratio", [1.5, 0.5], ids=["stays", "given back"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_compress(real_order, runs, ratio, precision):
    real_order |= {"whole": ratio, "int8": 2.0, "2:4 int8": 5.0, "2:4 int8, float inputs": 4.0}
    assert_all_or_nothing(make, lambda model, x: sk.compress_(model, x, precision=precision), runs=runs)


@pytest.mark.parametrize("runs", [40, many])
def test_decompress(real_order, runs):
    def compressed():
        model, x = make()
        sk.compress_(model, x)
        return (model,)

    assert_all_or_nothing(compressed, sk.decompress_, runs=runs)
