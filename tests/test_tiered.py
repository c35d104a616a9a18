import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, dtype_id

import sparsekit as sk
from sparsekit.ops.tiers import DENSE, SPARSE24, TOPK

OPS = torch.ops.sparsekit
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (8, 24)]


def tiered(rows, cols, block=(16, 16), dtype=torch.float32, k=10):
    """A normal weight, its blocks pruned to tiers drawn at shares of .35, .45 and .20, and its mask."""
    share = torch.rand(-(-rows // block[0]), -(-cols // block[1]))
    tiers = (share > 0.35).to(torch.uint8) + (share > 0.8)
    return sk.tier_prune(torch.randn(rows, cols).to(dtype), tiers, k, block)[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(dtype):
    weight = torch.zeros(17, 40, dtype=dtype)
    weight[:16, :16] = 1  # dense
    weight[:16, 17:32:2] = torch.arange(1, 9).to(dtype)  # two of every four
    weight[3, 38], weight[1, 33] = 5, 7  # top-k
    packed = sk.pack_tiered(weight, k=3)
    assert packed.tiers.tolist() == [[DENSE, SPARSE24, TOPK], [TOPK, TOPK, TOPK]]
    assert packed.starts.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 4]] and packed.block == (16, 16)
    assert packed.dense.tolist() == [[[1] * 16] * 16]
    assert packed.values.tolist() == [[list(range(1, 9))] * 16] and packed.bitmask.tolist() == [
        [[0b1010_1010] * 2] * 16
    ]
    assert packed.topk.tolist() == [[7, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert packed.positions.tolist() == [[17, 54, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert packed.positions.dtype == torch.uint8 and packed.dense.dtype == packed.topk.dtype == dtype
    assert torch.equal(sk.unpack_tiered(packed, 17, 40), weight)
    x = torch.ones(2, 40, dtype=dtype)
    assert sk.linear_tiered(x, packed, out_features=17).tolist() == [[52, 59, 52, 57] + [52] * 12 + [0]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("rows, cols", [(0, 16), (16, 0), (17, 21), (130, 263), (256, 256)])
def test_round_trip(dtype, block, rows, cols):
    weight, mask = tiered(rows, cols, block, dtype)
    packed = sk.pack_tiered(weight, block=block)
    assert torch.equal(sk.unpack_tiered(packed, rows, cols), weight)
    masked = sk.pack_tiered(torch.randn(rows, cols).to(dtype) + 9, mask, block=block)
    assert torch.equal(sk.unpack_tiered(masked, rows, cols) != 0, mask)
    again = sk.TieredWeight.from_parts(*packed[:6])
    assert torch.equal(again.starts, packed.starts)
    x, bias = torch.randn(3, cols).to(dtype), torch.randn(rows).to(dtype)
    expected = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
    torch.testing.assert_close(sk.linear_tiered(x, packed, bias, out_features=rows), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 16), (33, 40)])
def test_opcheck(dtype, rows, cols):
    packed = sk.pack_tiered(tiered(rows, cols, dtype=dtype)[0])
    packed = [part.requires_grad_() if part.dtype == dtype else part for part in packed]
    x, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, cols), (rows,)))
    torch.library.opcheck(OPS.linear_tiered.default, (x, *packed, bias, rows))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradients(leading):
    weight, mask = tiered(33, 40)
    weight[20:, 20:] = 0
    x, bias, grad = torch.randn(*leading, 40), torch.randn(33), torch.randn(*leading, 33)
    gradients = []
    for linear in (
        lambda x, weight, bias: sk.linear_tiered(x, sk.pack_tiered(weight, mask), bias, out_features=33),
        lambda x, weight, bias: F.linear(x, torch.where(mask, weight, 0), bias),
    ):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
        linear(*inputs).backward(grad)
        gradients.append([tensor.grad for tensor in inputs])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compile_fullgraph():
    def run(x, packed, bias):
        return sk.linear_tiered(x * 2, packed, bias, out_features=33) + 1, sk.unpack_tiered(packed, 33, 40)

    arguments = torch.randn(3, 40), sk.pack_tiered(tiered(33, 40)[0]), torch.randn(33)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)
