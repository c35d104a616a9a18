"""Linear24, and what it has in common with other compressed layers: state, copies, conversions, compilation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_linear_gradients, sparse_linear
from layer_kinds import EACH, EVERY, compiles, make
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask
from sparsekit.nn import Linear24, PrepackedLinear, TieredLinear

BOTH = pytest.mark.parametrize("kind", [Linear24, PrepackedLinear], ids=["linear24", "prepacked"])


def test_linear24_literal():
    linear = nn.Linear(6, 2)
    linear.weight.data = torch.tensor([[1.0, 0, 2, 0, 5, 6], [0, 0, 0, 3, 0, 7]])
    linear.bias.data = torch.tensor([10.0, 20.0])
    layer = Linear24.from_linear(linear)
    assert layer.values.tolist() == [[1, 2, 5, 6], [0, 3, 0, 7]]
    assert layer.bitmask.tolist() == [[0b110101], [0b111100]]
    assert layer(torch.tensor([1.0, 1, 1, 1, 1, 1])).tolist() == [24, 30]
    assert layer.weight.tolist() == linear.weight.tolist()
    assert layer.bias is linear.bias


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cols", [4, 7, 40])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 0), (2, 3)], ids=str)
def test_forward_is_linear(kind, bias, cols, shape):
    linear = sparse_linear(cols, 9, bias)
    x = torch.randn(*shape, cols)
    torch.testing.assert_close(kind.from_linear(linear)(x), linear(x))


@BOTH
def test_strided_inputs(kind):
    linear = sparse_linear()
    layer = kind.from_linear(linear)
    for x in (
        torch.randn(40, 6).t(),
        torch.randn(6, 80)[:, ::2],
        torch.randn(40).expand(6, 40),
        torch.randn(9, 44)[2:7, 3:43],
    ):
        torch.testing.assert_close(layer(x), linear(x))


@BOTH
def test_rejects_inputs_that_do_not_fit(kind):
    layer = kind.from_linear(sparse_linear())
    with pytest.raises(ValueError, match="columns"):
        layer(torch.randn(3, 41))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(3, 40, dtype=torch.float64))


def test_broken_24_names_the_group():
    linear = sparse_linear()
    linear.weight.data[3, 8:12] = 1
    with pytest.raises(ValueError, match=r"row 3, columns 8 to 11"):
        Linear24.from_linear(linear)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2"])
def test_stored_mask_decides_what_is_packed(pattern):
    linear = nn.Linear(16, 8)
    mask = Pattern.parse(pattern).mask(linear.weight.detach())
    linear.weight.data[0, mask[0].nonzero()[0]] = 0.0  # a kept zero stays kept
    linear.weight.data *= mask
    set_mask(linear, mask, MaskInfo(Pattern.parse(pattern), 1))
    layer = Linear24.from_linear(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(get_mask(layer), mask)
    assert get_mask_info(layer) == get_mask_info(linear)
    kept = (
        sk.Packed24(torch.ones_like(layer.values), layer.bitmask, (len(torch.ones_like(layer.values)), 16))
        .to_dense()
        .bool()
    )
    assert (kept & mask).sum() == mask.sum()
    assert (layer.weight_mask is layer.bitmask) == (pattern != "1:4")
    back = layer.to_linear()
    assert torch.equal(get_mask(back), mask)
    assert "weight_mask" not in layer.state_dict()


def test_mask_with_three_of_four_is_rejected():
    linear = sparse_linear()
    set_mask(linear, torch.ones(48, 40, dtype=torch.bool), MaskInfo(Pattern.parse("3:4"), 1))
    with pytest.raises(ValueError, match="row 0, columns 0 to 3"):
        Linear24.from_linear(linear)


@BOTH
@pytest.mark.parametrize("rows", [48, 40])
def test_transposed_stands_for_conv1d(kind, rows):
    linear = sparse_linear(40, rows)
    conv = nn.Module()
    conv.weight, conv.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
    layer = kind.from_linear(conv.eval(), transposed=True)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.equal(layer.weight, conv.weight)
    if kind is PrepackedLinear:
        assert torch.equal(layer.state_dict()["weight"], conv.weight)
        layer.load_state_dict({"weight": conv.weight * 2, "bias": conv.bias})
        torch.testing.assert_close(layer(x), F.linear(x, linear.weight * 2, linear.bias))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_linear_is_exact(kind, dtype):
    linear = sparse_linear(dtype=dtype)
    linear.weight.requires_grad_(False)
    back = kind.from_linear(linear.train()).to_linear()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, linear.weight)
    assert back.bias is linear.bias
    assert back.training and not back.weight.requires_grad
    assert back.weight.data_ptr() != linear.weight.data_ptr()


@BOTH
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(kind, clone):
    layer = kind.from_linear(sparse_linear())
    x = torch.randn(3, 40)
    expected = layer(x)
    twin = clone(layer)
    assert torch.equal(twin(x), expected)
    twin.load_state_dict(
        {key: torch.zeros_like(t) if t.is_floating_point() else t for key, t in twin.state_dict().items()}
    )
    assert twin(x).abs().max() == 0
    assert torch.equal(layer(x), expected)


@BOTH
def test_state_dict_round_trip_through_a_file(kind):
    layer, other = kind.from_linear(sparse_linear()), kind.from_linear(sparse_linear())
    expected = {Linear24: {"values", "bitmask", "bias"}, PrepackedLinear: {"weight", "bias"}}[kind]
    assert set(layer.state_dict()) == expected
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))


@EACH
def test_to_dtype_and_device(kind):
    layer, linear = make(kind)
    integers = {key: part.dtype for key, part in layer.named_buffers() if not part.is_floating_point()}
    layer.to(torch.bfloat16)
    x = torch.randn(3, 80, dtype=torch.bfloat16)
    linear.to(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert integers == {key: layer.get_buffer(key).dtype for key in integers}
    torch.testing.assert_close(layer(x), linear(x), rtol=2e-2, atol=2e-2)
    layer.float()
    assert layer.lossy or torch.equal(layer.weight, linear.float().weight)  # a lossy one keeps its codes
    assert layer(x.float()).dtype == torch.float32
    assert layer.to("meta")(x.float().to("meta")).shape == (3, 96)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_follows_linear(kind, dtype):
    (layer, linear), x = make(kind), torch.randn(3, 80)
    with torch.autocast("cpu", dtype):
        expected, got = linear(x), layer(x)
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_linear24_gradients():
    linear = sparse_linear()
    layer = Linear24.from_linear(linear)
    assert_linear_gradients(layer, linear, torch.randn(2, 3, 40))
    kept = linear.weight.detach() != 0
    torch.testing.assert_close(
        sk.Packed24(layer.values.grad, layer.bitmask, (len(layer.values.grad), 40)).to_dense(),
        linear.weight.grad * kept,
    )


@EACH
@compiles
def test_compiles_whole(kind):
    torch._dynamo.reset()
    model = nn.Sequential(make(kind)[0], nn.ReLU(), nn.Linear(96, 3)).eval()
    x = torch.randn(5, 80)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_new_linear24_is_24_and_trains():
    layer = Linear24(10, 6)
    assert ((layer.weight[:, :8].view(6, 2, 4) != 0).sum(-1) == 2).all()
    x, target = torch.randn(64, 10), torch.randn(64, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert Linear24(10, 6, bias=False, device="meta", dtype=torch.float16).values.shape == (6, 6)


def test_repr_says_what_it_is():
    assert str(Linear24.from_linear(sparse_linear())) == "Linear24(in_features=40, out_features=48, bias=True)"
    assert str(PrepackedLinear.from_linear(sparse_linear())).endswith("bias=True, weight=reordered)")
    assert str(PrepackedLinear(torch.zeros(0, 4))).endswith("bias=False, weight=plain)")


@BOTH
def test_parents_that_read_the_weight(kind):
    encoder, attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.MultiheadAttention(16, 2)
    model, x = nn.Sequential(encoder, nn.ModuleList([attention])).eval(), torch.randn(3, 5, 16)
    for linear in (encoder.linear1, encoder.linear2, attention.out_proj):
        sk.nm_prune_(linear.weight.data, 2, 4)

    def outputs():
        return [encoder(x), attention(x, x, x)[0]]

    with torch.no_grad():  # where nn.TransformerEncoderLayer hands all weights to one fused op
        expected = outputs()
        for parent, name in ((encoder, "linear1"), (encoder, "linear2"), (attention, "out_proj")):
            setattr(parent, name, kind.from_linear(getattr(parent, name)))
        torch.testing.assert_close(outputs(), expected)
    if kind is Linear24:
        sum(y.sum() for y in outputs()).backward()
        assert all(layer.values.grad is not None for layer in model.modules() if type(layer) is Linear24)


@EVERY
def test_a_replica_of_data_parallel_holds_plain_tensors(kind):
    layer, linear = make(kind)
    replica = layer._replicate_for_data_parallel()
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        setattr(replica, name, None if tensor is None else tensor.detach())  # as nn.parallel.replicate does
    x = torch.randn(20, 80)
    torch.testing.assert_close(replica(x), linear(x))
    assert torch.equal(replica.weight, layer.weight)


def test_what_is_stored_may_be_parametrized():
    layer, linear = make(TieredLinear)
    for name in ("dense", "topk"):
        nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())
    x = torch.randn(20, 80)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
