"""sparse-24-bitmask files: the names, layout and shapes that llm-compressor wrote."""

import pytest
import torch
from checkpoints import Net, contents, make
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info
from sparsekit.nn import Linear24


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def literal():
    return {
        "0.compressed": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "0.bitmask": torch.tensor([[0b1001], [0b0110]], dtype=torch.uint8),
        "0.shape": torch.tensor([[2], [4]]),
        "0.bias": torch.tensor([5.0, 6.0]),
    }


def test_literal(path):
    save_file(literal(), path)
    model = nn.Sequential(nn.Linear(4, 2))
    sk.load(model, path)
    assert type(model[0]) is Linear24
    assert model(torch.tensor([1.0, 10.0, 100.0, 1000.0])).tolist() == [2006, 436]
    sk.save(model, path, format="sparse-24-bitmask")
    written = load_file(path)
    assert written.keys() == literal().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in literal().items())
    sk.decompress_(model)
    assert model[0].weight.tolist() == [[1, 0, 0, 2], [0, 3, 4, 0]]
    assert torch.equal(get_mask(model[0]), model[0].weight != 0) and str(get_mask_info(model[0]).pattern) == "2:4"


def packed(seed):
    model = make(seed)
    sk.nm_prune_(model.third.weight, 2, 4)
    model.third = Linear24.from_linear(model.third)
    return model


@pytest.mark.parametrize("dense", [False, True])
def test_a_whole_model_with_tied_weights(path, dense):
    model = packed(0)
    sk.save(model, path, format="sparse-24-bitmask")
    assert not {"third.weight", "third.values", "head.weight"} & load_file(path).keys()
    loaded = Net().eval()
    sk.load(loaded, path, dense=dense)
    assert loaded.head.weight is loaded.embed.weight
    assert type(loaded.third) is (nn.Linear if dense else Linear24)
    if dense:
        sk.decompress_(model)
    assert contents(loaded)[0] == contents(model)[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"0.compressed": None}, "not one that sparsekit.save wrote"),
        ({"0.bitmask": None}, "the tensor '0.bitmask' is missing"),
        ({"0.shape": None}, "the tensor '0.shape' is missing"),
        ({"0.bias": None}, "missing 0.bias"),
        ({"0.shape": torch.tensor([[2], [8]])}, r"layer '0' has shape \(2, 8\), the model's has \(2, 4\)"),
        ({"0.shape": torch.tensor([2.0, 4.0])}, "layer '0' has the shape"),
        ({"0.bitmask": torch.tensor([[0b1001], [0b0111]], dtype=torch.uint8)}, "exactly two of every four columns"),
        ({"1.weight": torch.zeros(1)}, "unexpected 1.weight"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(path, change, match):
    save_file({name: tensor for name, tensor in (literal() | change).items() if tensor is not None}, path)
    model = nn.Sequential(nn.Linear(4, 2))
    layer, before = model[0], contents(model)
    with pytest.raises(ValueError, match=match) as caught:
        sk.load(model, path)
    assert str(path) in str(caught.value)
    assert model[0] is layer and contents(model) == before


def test_refuses_to_write_what_has_no_place(path):
    with pytest.raises(ValueError, match="layer '0' is of 6 inputs; sparse-24-bitmask needs"):
        sk.save(nn.Sequential(Linear24(6, 2)), path, format="sparse-24-bitmask")
    with pytest.raises(ValueError, match="layer '0' is transposed; sparse-24-bitmask needs"):
        sk.save(nn.Sequential(Linear24(8, 2, transposed=True)), path, format="sparse-24-bitmask")
    with pytest.raises(ValueError, match="the model has no Linear24, which is what sparse-24-bitmask packs"):
        sk.save(nn.Sequential(nn.Linear(8, 2)), path, format="sparse-24-bitmask")
    assert not path.exists()
