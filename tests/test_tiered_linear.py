"""TieredLinear: state, copies, gradients and training; what it has in common with other layers is in test_nn."""

import copy
import io
import pickle

import pytest
import torch
from helpers import DTYPES, assert_linear_gradients, dtype_id
from tiering import prune_tiers, tiered_linear
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import TieredLinear
from sparsekit.nn.tiered import TRAINED

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TENSORS = {"dense", "values", "topk", "tiers", "bitmask", "positions", "bias"}


def test_literal():
    linear = nn.Linear(16, 8)
    linear.weight.data.zero_()
    linear.weight.data[:, :8] = 1
    linear.weight.data[3, 9], linear.weight.data[5, 15] = 2, 3
    linear.bias.data = torch.arange(8.0)
    layer = TieredLinear.from_linear(linear, k=3, block=(8, 8))
    assert layer.tiers.tolist() == [[0, 2]] and layer.dense.tolist() == [[[1] * 8] * 8] and len(layer.values) == 0
    assert layer.topk.tolist() == [[2, 3, 0]] and layer.positions.tolist() == [[25, 47, 0]]
    assert layer(torch.ones(16)).tolist() == [8, 9, 10, 13, 12, 16, 14, 15]
    assert torch.equal(layer.weight, linear.weight) and layer.bias is linear.bias
    assert set(layer.state_dict()) == TENSORS
    assert str(layer) == (
        "TieredLinear(in_features=16, out_features=8, bias=True, block=8x8, k=3, "
        "blocks=1 dense + 0 2:4 + 1 top-k, bytes=297)"  # 4 * 64, 4 * 3 + 3, 2 of the map, 2 * 3 starts of 4
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cols, rows", [(80, 96), (37, 21), (16, 1), (200, 64)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 3)], ids=str)
def test_forward_is_linear(bias, cols, rows, shape):
    linear = tiered_linear(cols, rows, bias)
    x = torch.randn(*shape, cols)
    torch.testing.assert_close(TieredLinear.from_linear(linear)(x), linear(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_block_and_k_are_those_of_the_pattern(dtype):
    linear = tiered_linear(dtype=dtype, block=(32, 16), k=5)
    layer = TieredLinear.from_linear(linear)
    assert layer.block == (32, 16) and layer.k == 5 and torch.equal(layer.weight, linear.weight)
    assert torch.equal(get_mask(layer), get_mask(linear)) and get_mask_info(layer) == get_mask_info(linear)
    other = TieredLinear.from_linear(linear, block=(16, 32), k=7)
    assert other.block == (16, 32) and other.k == 7 and torch.equal(other.weight, linear.weight)
    plain = TieredLinear.from_linear(nn.Linear(32, 32))
    assert plain.block == (16, 16) and plain.k == 10 and get_mask(plain) is None


def test_what_the_mask_drops_is_not_packed():
    linear = tiered_linear()
    mask = get_mask(linear)
    linear.weight.data.normal_()
    kept_zero = mask.nonzero()[0]
    linear.weight.data[tuple(kept_zero)] = 0
    layer = TieredLinear.from_linear(linear)
    assert torch.equal(layer.weight, linear.weight * mask)
    counts = [len(layer.dense), len(layer.values), len(layer.topk)]
    assert counts == [round(0.35 * 30), round(0.45 * 30), 6]  # a kept zero makes no block smaller


def test_rejects_blocks_that_cannot_be_packed():
    linear = nn.Linear(12, 12)
    set_mask(linear, torch.ones(12, 12, dtype=torch.bool), MaskInfo(Pattern.parse("tiers 4x4 k=2"), 1))
    with pytest.raises(ValueError, match=r"block must have sides of 8 to 128 .*got \(4, 4\)"):
        TieredLinear.from_linear(linear)
    with pytest.raises(TypeError, match="float64"):
        TieredLinear.from_linear(nn.Linear(16, 16, dtype=torch.float64))


def test_rejects_inputs_that_do_not_fit():
    layer = TieredLinear.from_linear(tiered_linear())
    for cols in (65, 79, 97):  # within the padding of the last blocks, and beyond
        with pytest.raises(ValueError, match="x must have 80 columns for a weight of 96 x 80, got shape"):
            layer(torch.randn(3, cols))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(3, 80, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"packed\.dense must be torch\.bfloat16, got torch\.float32"):
        layer(torch.randn(3, 80, dtype=torch.bfloat16))
    bias = layer.bias
    for other, error, match in (
        (torch.zeros(95), ValueError, r"bias must have shape \(96,\), got \(95,\)"),
        (torch.zeros(96, dtype=torch.float16), TypeError, r"bias must be torch\.float32, got torch\.float16"),
    ):
        layer.bias = nn.Parameter(other)
        with pytest.raises(error, match=match):
            layer(torch.randn(3, 80))
    layer.bias, layer.topk = bias, nn.Parameter(layer.topk.half())
    with pytest.raises(TypeError, match=r"topk must be torch\.float32, got torch\.float16"):
        layer(torch.randn(3, 80))


def test_rejects_what_no_kernel_computes():
    layer, x = TieredLinear.from_linear(tiered_linear()), torch.randn(3, 80)
    with pytest.raises(TypeError, match=r"x must be float32, float16 or bfloat16, got torch\.float64"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"packed\.dense must be on cpu, got meta"):
        copy.deepcopy(layer).to("meta")(x)
    with pytest.raises(ValueError, match=r"packed\.dense must be on meta, got cpu"):
        layer(x.to("meta"))
    half_loaded = copy.deepcopy(layer).to("meta")
    half_loaded.load_state_dict({name: layer.state_dict()[name] for name in TRAINED}, strict=False, assign=True)
    half_loaded.bias = layer.bias
    with pytest.raises(ValueError, match="bitmask must be on cpu, got meta"):
        half_loaded(x)
    layer.bias = nn.Parameter(layer.bias.to("meta"))
    with pytest.raises(ValueError, match="bias must be on cpu, got meta"):
        layer(x)


def test_rejects_a_weight_of_another_size():
    packed = sk.pack_tiered(torch.randn(96, 80))
    assert TieredLinear(packed._replace(shape=(96, 79)))(torch.randn(3, 79)).shape == (3, 96)
    with pytest.raises(ValueError, match=r"tiers must have shape \(6, 6\) for a weight of 96 x 81"):
        TieredLinear(packed._replace(shape=(96, 81)))
    with pytest.raises(TypeError, match="packed must be a TieredWeight, got Tensor"):
        TieredLinear(torch.randn(96, 80))


def test_transposed_stands_for_conv1d():
    linear = nn.Linear(80, 96)
    conv = nn.Module()
    conv.weight, conv.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
    prune_tiers(conv.eval(), axis=0)
    linear.weight.data = conv.weight.detach().t()
    layer, x = TieredLinear.from_linear(conv, transposed=True), torch.randn(3, 80)
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.equal(layer.weight, conv.weight) and torch.equal(get_mask(layer), get_mask(conv))
    assert len(layer.topk) == 6  # blocks of the transpose, as they were pruned


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_to_linear_is_exact(dtype):
    linear = tiered_linear(dtype=dtype)
    linear.weight.requires_grad_(False)
    layer = TieredLinear.from_linear(linear.train())
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")
    back = layer.to_linear()
    assert type(back) is nn.Linear and torch.equal(back.weight, linear.weight) and back.bias is linear.bias
    assert back.training and not back.weight.requires_grad and torch.equal(get_mask(back), get_mask(linear))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(clone):
    layer, x = TieredLinear.from_linear(tiered_linear()), torch.randn(3, 80)
    expected, twin = layer(x), clone(layer)
    assert torch.equal(twin(x), expected) and torch.equal(twin.starts, layer.starts)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).abs().max() == 0 and torch.equal(layer(x), expected)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_state_dict_round_trip_through_a_file(assign):
    layer, other = TieredLinear.from_linear(tiered_linear()), TieredLinear.from_linear(tiered_linear())
    assert not torch.equal(layer.starts, other.starts)  # as many blocks, in other places
    file, memory = io.BytesIO(), {part.data_ptr() for part in other.packed.tensors}
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert assign or {part.data_ptr() for part in other.packed.tensors} == memory
    x = torch.randn(3, 80)
    assert torch.equal(other.starts, layer.starts) and torch.equal(other(x), layer(x))
    half = {name: part.half() if part.is_floating_point() else part for name, part in layer.state_dict().items()}
    other.load_state_dict(half)
    assert other.dense.dtype == torch.float32 and torch.equal(other.weight, layer.weight.half().float())
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.starts, layer.starts) and torch.equal(empty(x), layer(x))


def test_a_state_dict_that_does_not_fit_is_refused_whole():
    layer = TieredLinear.from_linear(tiered_linear())
    model = nn.Sequential(layer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = nn.Sequential(TieredLinear.from_linear(tiered_linear(shares=(0.5, 0.4))))
    with pytest.raises(RuntimeError, match=r"layer 0: dense has shape \(15, 16, 16\), the layer's \(10, 16, 16\), and"):
        model.load_state_dict(more.state_dict())
    for name, change, match in (
        (
            "tiers",
            lambda tiers: tiers.clamp(max=1),
            r"tiers names \[10, 20, 0\] blocks .* but \[10, 14, 6\] are stored",
        ),
        ("tiers", lambda tiers: tiers + 1, "tiers must be 0, 1 or 2, got 3"),
        ("values", lambda values: values.half(), "values must be torch.float32, got torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=f"layer 0: {match}"):
            model.load_state_dict(before | {f"0.{name}": change(before[f"0.{name}"])})
    with pytest.raises(RuntimeError, match=r'"0\.topk", expected torch\.Tensor .* received <class .int.>'):
        model.load_state_dict({"0.topk": 3}, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.positions"):
        model.load_state_dict({name: tensor for name, tensor in before.items() if name != "0.positions"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict({"0.bias": before["0.bias"] + 1}, strict=False)
    assert torch.equal(layer.bias, before["0.bias"] + 1)


def test_gradients():
    linear, x = tiered_linear(cols=37, rows=21), torch.randn(2, 3, 37)
    layer = TieredLinear.from_linear(linear)
    assert_linear_gradients(layer, linear, x)
    gradients = layer.packed._replace(dense=layer.dense.grad, values=layer.values.grad, topk=layer.topk.grad)
    torch.testing.assert_close(gradients.to_dense(), linear.weight.grad * get_mask(linear))


def test_gradients_under_activation_checkpointing():
    layer, x = TieredLinear.from_linear(tiered_linear()), torch.randn(3, 80)
    layer(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_trains():
    layer = TieredLinear.from_linear(tiered_linear())
    zeros = layer.weight == 0
    x, target = torch.randn(64, 80), torch.randn(64, 96)
    optimizer, losses = torch.optim.SGD(layer.parameters(), 0.5), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0] and torch.equal(layer.weight == 0, zeros)
