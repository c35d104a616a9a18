import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, opcheck, poison, sparse24
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse import _semi_structured_conversions as conversions

import sparsekit as sk
from sparsekit.ops.sparse24 import pack24_reference, unpack24_reference

OPS = torch.ops.sparsekit
NAN, INF = float("nan"), float("inf")
COLS = [0, 1, 3, 4, 6, 8, 13, 32, 63, 64, 130, 260]
ROWS = [0, 1, 5, 33]
LEGAL = [[int(bits) >> i & 1 for i in range(4)] for bits in range(16) if bin(bits).count("1") <= 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "weight, values, bitmask",
    [
        ([0, 1, 2, 0, 3, 0, 0, 4], [1, 2, 3, 4], [0b1001_0110]),
        ([0, 1, 2, 0, 0, 5], [1, 2, 0, 5], [0b11_0110]),
        ([0, 0, 0, 0, 0, 7, 0, 0, 9], [0, 0, 7, 0, 9], [0b0110_1100, 1]),
        ([-0.0, 1, INF, 0], [1, INF], [0b0110]),
        ([1, 0], [1, 0], [0b11]),
    ],
    ids=["two-groups", "tail", "completed", "zeros", "only-tail"],
)
def test_pack_literal(simd, dtype, weight, values, bitmask):
    weight = torch.tensor([weight], dtype=dtype)
    packed = sk.pack24(weight)
    assert packed[0].tolist() == [values] and packed[1].tolist() == [bitmask]
    assert packed[0].dtype == dtype and packed[1].dtype == torch.uint8
    assert torch.equal(packed.to_dense(), weight) and packed.shape == weight.shape
    assert packed.nbytes == packed.values.nbytes + packed.bitmask.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pack_literal_with_mask(simd, dtype):
    weight = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=dtype)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    packed = sk.pack24(weight, mask)
    values, bitmask, _ = packed
    assert values.tolist() == [[1, 4, 5, 6]] and bitmask.tolist() == [[0b11_1001]]  # a tail is kept whole
    assert packed.to_dense().tolist() == [[1, 0, 0, 4, 5, 6]]


def test_a_packed_weight_moves_as_a_whole():
    packed = sk.pack24(sparse24(6, 22)[0])
    moved = packed.to("meta")
    assert moved.values.is_meta and moved.bitmask.is_meta and moved.shape == packed.shape
    assert moved.to_dense().shape == (6, 22) and packed.to("cpu").values is packed.values


@pytest.mark.parametrize("group", LEGAL, ids=lambda group: "".join(map(str, group)))
def test_completes_as_torch_does(simd, group):
    weight = torch.tensor(group, dtype=torch.float16).repeat(32, 16)
    _, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    offsets = conversions._calculate_meta_reordering_scatter_offsets(*reordered.shape, reordered.dtype, "cpu")
    nibble = int(reordered.flatten()[offsets][0]) & 15  # two 2-bit indices
    bitmask = sk.pack24(weight).bitmask
    assert bitmask[0, 0].item() & 15 == 1 << (nibble & 3) | 1 << (nibble >> 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", COLS)
def test_every_level_equals_reference(simd, dtype, rows, cols):
    pruned, mask = sparse24(rows, cols, dtype)
    pruned[torch.rand(pruned.shape) < 0.2] = 0  # groups to complete
    expected = pack24_reference(pruned, None, True)
    poison(*expected, *expected)
    for got, want in zip(sk.pack24(pruned)[:2], expected, strict=True):
        assert_same(got, want)
    poison(pruned, pruned)
    assert_same(sk.Packed24(*expected, (rows, cols)).to_dense(), unpack24_reference(*expected, cols))
    dirty = hostile(rows, cols, dtype=dtype)
    for got, want in zip(sk.pack24(dirty, mask)[:2], pack24_reference(dirty, mask, True), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_any_strides(simd, layout, dtype):
    pruned, mask = sparse24(7, 70, dtype)
    values, bitmask = pack24_reference(pruned, mask, True)
    for packed in (sk.pack24(LAYOUTS[layout](pruned)), sk.pack24(LAYOUTS[layout](pruned), LAYOUTS[layout](mask))):
        assert_same(packed[0], values)
        assert_same(packed[1], bitmask)
    strided = LAYOUTS[layout](values), LAYOUTS[layout](bitmask)
    assert_same(sk.Packed24(*strided, (7, 70)).to_dense(), pruned)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("group", [0, 1, 16])
def test_names_the_first_bad_group(simd, row, group):
    weight, mask = sparse24(4, 68)
    weight[row, 4 * group : 4 * group + 3] = 1
    weight[row, 4 * group + 3] = 0
    weight[3, 64:] = 1
    where = f"row {row}, columns {4 * group} to {4 * group + 3} have 3"
    with pytest.raises(ValueError, match=rf"pack24: {where} non-zeros; 2:4 needs at most 2"):
        sk.pack24(weight)
    mask[row, 4 * group : 4 * group + 4] = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=rf"pack24: {where[:-1]}1 set mask entries; 2:4 needs exactly 2"):
        sk.pack24(weight, mask)


def test_names_the_first_bad_group_across_threads(simd, threads):
    weight, _ = sparse24(3000, 512)
    weight[[700, 1400, 2999], 8:12] = 1
    for count in (1, 2):
        threads(count)
        with pytest.raises(ValueError, match=r"pack24: row 700, columns 8 to 11 have 4 non-zeros"):
            sk.pack24(weight)


def test_nan_is_kept_and_counted(simd):
    assert sk.pack24(torch.tensor([[0, NAN, 0, NAN]]))[1].item() == 0b1010
    with pytest.raises(ValueError, match=r"row 0, columns 0 to 3 have 3 non-zeros"):
        sk.pack24(torch.tensor([[1, NAN, 0, NAN]]))


@given(rows=st.integers(0, 4), cols=st.integers(0, 70), data=st.data())
def test_round_trip(simd, rows, cols, data):
    entries = st.lists(st.floats(width=32, allow_nan=False), min_size=rows * cols, max_size=rows * cols)
    pruned, mask = sk.nm_prune(torch.tensor(data.draw(entries)).view(rows, cols), 2, 4)
    packed = sk.pack24(pruned)
    assert torch.equal(packed.to_dense(), pruned)
    assert_same(sk.pack24(pruned, mask).to_dense(), pruned)
    full = packed._replace(values=torch.ones_like(packed.values)).to_dense()[:, : cols // 4 * 4]
    assert full.unflatten(1, (cols // 4, 4)).sum(-1).eq(2).all()


def test_large_and_threads(simd, threads):
    weight, mask = sparse24(1030, 516)
    expected = pack24_reference(weight, mask, True)
    for count in (1, 2):
        threads(count)
        for got, want in zip(sk.pack24(weight)[:2], expected, strict=True):
            assert_same(got, want)
        assert_same(sk.Packed24(*expected, (1030, 516)).to_dense(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_of_pack_and_unpack(dtype):
    weight, mask = sparse24(5, 22, dtype)
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    values, bitmask, shape = sk.pack24(mine, mask)
    assert not bitmask.requires_grad
    grad = torch.randn_like(values)
    values.backward(grad)
    pack24_reference(theirs, mask, True)[0].backward(grad)
    assert torch.equal(mine.grad, theirs.grad)
    mine, theirs = values.detach().requires_grad_(), values.detach().requires_grad_()
    grad = torch.randn_like(weight)
    sk.Packed24(mine, bitmask, shape).to_dense().backward(grad)
    unpack24_reference(theirs, bitmask, 22).backward(grad)
    assert torch.equal(mine.grad, theirs.grad)


def test_reference_gradcheck():
    weight, mask = sparse24(3, 10)
    values, bitmask = pack24_reference(weight.double(), mask, True)
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda weight: pack24_reference(weight, mask, True)[0], weight.double().requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda values: unpack24_reference(values, bitmask, 10), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 18)])
def test_opcheck(dtype, rows, cols):
    weight, mask = sparse24(rows, cols, dtype)
    values, bitmask, _ = sk.pack24(weight, mask)
    opcheck(OPS.pack24.default, (weight.clone().requires_grad_(), None, True))
    opcheck(OPS.pack24.default, (weight, mask, False))
    opcheck(OPS.unpack24.default, (values.clone().requires_grad_(), bitmask, cols))


def test_compile_fullgraph():
    def run(weight, mask):
        packed = sk.pack24(weight + 0)
        again = sk.pack24(weight, mask)
        return packed.values * 2, again.values, packed.bitmask, packed.to_dense() * 2

    arguments = sparse24(6, 22)
    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    for got, expected in zip(outputs, run(*arguments), strict=True):
        assert torch.equal(got, expected)


V, B = torch.ones(3, 4), torch.full((3, 1), 0x33, dtype=torch.uint8)
P = sk.Packed24(V, B, (3, 8))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.pack24(torch.ones(4, 4).int()), TypeError, r"weight must be float32, .* got torch\.int32"),
        (lambda: sk.pack24(torch.ones(8)), ValueError, r"weight must have 2 dimensions, got shape \(8,\)"),
        (lambda: sk.pack24(V, torch.ones(3, 4)), TypeError, r"mask must be torch\.bool, got torch\.float32"),
        (lambda: sk.pack24(V, V.t() > 0), ValueError, r"mask must have shape \(3, 4\), got \(4, 3\)"),
        (lambda: sk.pack24(V, (V > 0).to("meta")), ValueError, r"mask must be on cpu, got meta"),
        (lambda: sk.pack24(V, [[True]]), TypeError, r"mask must be a tensor, got list"),
        (lambda: P._replace(bitmask=None).to_dense(), TypeError, r"bitmask must be a tensor, got NoneType"),
        (lambda: P._replace(values=V.double()).to_dense(), TypeError, r"values must be float32, .* got torch\.float64"),
        (lambda: P._replace(values=V[0]).to_dense(), ValueError, r"values must have 2 dimensions, got shape \(4,\)"),
        (
            lambda: P._replace(shape=(3, 8, 1)).to_dense(),
            ValueError,
            r"shape must be rows and columns, got \(3, 8, 1\)",
        ),
        (lambda: P._replace(shape=(3, 7)).to_dense(), ValueError, r"values must have shape \(3, 5\), got \(3, 4\)"),
        (lambda: P._replace(shape=(4, 8)).to_dense(), ValueError, r"values must have shape \(4, 4\), got \(3, 4\)"),
        (lambda: P._replace(shape=(3, -8)).to_dense(), ValueError, r"values must have shape \(3, -4\), got \(3, 4\)"),
        (lambda: P._replace(bitmask=B.int()).to_dense(), TypeError, r"bitmask must be torch\.uint8, got torch\.int32"),
        (lambda: P._replace(bitmask=B[:2]).to_dense(), ValueError, r"bitmask must have shape \(3, 1\), got \(2, 1\)"),
        (lambda: P._replace(bitmask=B.to("meta")).to_dense(), ValueError, r"bitmask must be on cpu, got meta"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
