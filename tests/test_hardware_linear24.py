"""The linear layer on hardware layouts: the op, the calls to the vendors' libraries, and what a GPU is asked."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import dtype_id, sparse24
from vendor import OWN_ORDER, OWN_VALUES, Vendor, install

import sparsekit as sk
from sparsekit.ops import _vendor, hardware_layouts, hardware_linear24, layouts, pack_hardware24
from sparsekit.ops.hardware24 import MULTIPLES
from sparsekit.ops.hardware_linear24 import padded_shape

HALF = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize("layout", MULTIPLES)
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget():
    layouts._found.clear()
    yield
    layouts._found.clear()


def packed_weight(rows, cols, layout, dtype=torch.float16):
    weight, mask = sparse24(rows, cols, dtype)
    return weight, pack_hardware24(sk.pack24(weight, mask), layout)


@LAYOUTS
def test_literal(layout):
    weight = torch.tensor([[0, 1, 2, 0], [3, 0, 0, -1]], dtype=torch.float16)
    packed = pack_hardware24(sk.pack24(weight), layout)
    x = torch.tensor([[1, 2, 3, 4], [0, 0, 1, 1]], dtype=torch.float16)
    bias = torch.tensor([10, 20], dtype=torch.float16)
    assert hardware_linear24(x, packed, None, 2, layout).tolist() == [[8, -1], [2, -1]]
    assert hardware_linear24(x[0], packed, bias, 2, layout).tolist() == [18, 19]


@LAYOUTS
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("shape", [(128, 128), (1, 4), (100, 70), (129, 132), (7, 65)], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (8,), (2, 3), (0,), (9,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_equals_linear24(monkeypatch, layout, dtype, shape, leading, bias):
    """Here, and as the vendors' libraries are called for it."""
    rows, cols = shape
    weight, packed = packed_weight(rows, cols, layout, dtype)
    x, b = torch.randn(*leading, cols).to(dtype), torch.randn(rows).to(dtype) if bias else None
    expected = F.linear(x.float(), weight.float(), None if b is None else b.float()).to(dtype)
    torch.testing.assert_close(hardware_linear24(x, packed, b, rows, layout), expected)
    install(monkeypatch, Vendor(layout))
    actual = _vendor.hardware_linear24(x, packed, b, rows, layout, 0, 1, -1)
    assert actual.shape == (*leading, rows) and actual.is_contiguous() and actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


@LAYOUTS
def test_the_vendor_gets_aligned_contiguous_tensors(monkeypatch, layout):
    weight, packed = packed_weight(64, 64, layout)
    vendor = install(monkeypatch, Vendor(layout))
    storage = torch.randn(65 * 64 + 1).half()
    for x in (storage[1:513].view(8, 64), storage[:4096].view(64, 64).t(), storage[:4160].view(65, 64)[::5]):
        expected = F.linear(x.float(), weight.float()).half()
        torch.testing.assert_close(_vendor.hardware_linear24(x, packed, None, 64, layout, 0, 1, -1), expected)
    bias = storage[1:65]
    expected = F.linear(x.float(), weight.float(), bias.float()).half()
    torch.testing.assert_close(_vendor.hardware_linear24(x, packed, bias, 64, layout, 0, 1, -1), expected)
    assert [call[0] for call in vendor.calls] == [8, 64, 16, 16]


@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_the_vendor_is_not_asked_for_nothing(monkeypatch, leading):
    vendor = install(monkeypatch, Vendor())
    _, packed = packed_weight(64, 64, "cusparselt_sm90")
    x = torch.randn(*leading, 64).half()
    assert _vendor.hardware_linear24(x, packed, None, 64, "cusparselt_sm90", 0, 1, -1).shape == (*leading, 64)
    x, bias = torch.randn(3, 0).half(), torch.randn(64).half()
    y = _vendor.hardware_linear24(x, packed[:0], bias, 64, "cusparselt_sm90", 0, 1, -1)
    assert torch.equal(y, bias.expand(3, 64)) and not vendor.calls


@pytest.mark.parametrize(
    ("last", "expected"), [("split_k_mode", {"split_k_mode": 1}), ("split_k_one_kernel", {"split_k_one_kernel": True})]
)
def test_schema_drift(monkeypatch, last, expected):
    schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in ("alg_id", "split_k", last)])
    op = SimpleNamespace(default=SimpleNamespace(_schema=schema))
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace(_cslt_sparse_mm=op))
    _vendor._takes_mode.cache_clear()
    try:
        assert _vendor._split_k(4, _vendor.ONE_KERNEL) == {"split_k": 4, **expected}
        assert _vendor._split_k(1, -1)["split_k"] == 1
        if last == "split_k_one_kernel":
            assert _vendor._split_k(4, _vendor.TWO_KERNELS) == {"split_k": 4, "split_k_one_kernel": False}
    finally:
        _vendor._takes_mode.cache_clear()


def test_this_torch_takes_the_arguments():
    names = {argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments}
    assert {"bias", "transpose_result", "alg_id", *_vendor._split_k(2, 1)} <= names


def test_suggestions_of_the_vendor(monkeypatch):
    _, packed = packed_weight(64, 64, "cusparselt_sm90")
    args = (torch.randn(5, 64).half(), packed, None, 64, "cusparselt_sm90")
    monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
    assert _vendor.suggest(*args) is None
    for answer, expected in (
        ((7, 4, 2, 40), (7, 4, 2)),
        ((7, 1, 2, 40), (7, 1, -1)),
        ((7, 4, True, 40), (7, 4, 1)),
        ((7, 4, False, 40), (7, 4, 2)),
    ):
        search = lambda packed, x, *rest, answer=answer: (answer, x.shape == (64, 8))[0]  # noqa: E731
        monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=search), raising=False)
        assert _vendor.suggest(*args) == expected


@LAYOUTS
@pytest.mark.parametrize("shape", [(128, 128), (40, 70)], ids=str)
def test_gradients(layout, shape):
    weight, packed = packed_weight(*shape, layout, torch.bfloat16)
    x = torch.randn(2, 3, shape[1]).bfloat16().requires_grad_()
    bias, upstream = torch.randn(shape[0]).bfloat16().requires_grad_(), torch.randn(2, 3, shape[0]).bfloat16()
    got = torch.autograd.grad(hardware_linear24(x, packed, bias, shape[0], layout), (x, bias), upstream)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), upstream)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@compiles
def test_opcheck_and_compile():
    _, packed = packed_weight(40, 70, "cusparselt_sm90")
    x, bias = torch.randn(3, 70).half(), torch.randn(40).half().requires_grad_()
    args = (x, packed, bias, 40, "cusparselt_sm90", 0, 1, -1)
    torch.library.opcheck(torch.ops.sparsekit.hardware_linear24.default, args)
    torch._dynamo.reset()
    call = torch.compile(lambda x: hardware_linear24(x, packed, bias, 40, "cusparselt_sm90") + 1, fullgraph=True)
    torch.testing.assert_close(call(x), hardware_linear24(x, packed, bias, 40, "cusparselt_sm90") + 1)


def test_rejects():
    _, packed = packed_weight(64, 64, "cusparselt_sm90")
    x = torch.randn(3, 64).half()
    with pytest.raises(TypeError, match=r"x must be float16 or bfloat16, got torch\.float32"):
        hardware_linear24(x.float(), packed, None, 64, "cusparselt_sm90")
    with pytest.raises(TypeError, match=r"packed must be torch\.bfloat16, got torch\.float16"):
        hardware_linear24(x.bfloat16(), packed, None, 64, "cusparselt_sm90")
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'sm90'"):
        hardware_linear24(x, packed, None, 64, "sm90")
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'cusparselt'"):
        hardware_linear24(x, packed.new_empty(128 * 128 // 16 * 9), None, 64, "cusparselt")
    with pytest.raises(ValueError, match=r"packed must have shape \(4608,\), got \(2304,\)"):
        hardware_linear24(x, packed, None, 65, "cusparselt_sm90")
    with pytest.raises(ValueError, match=r"bias must have shape \(64,\), got \(63,\)"):
        hardware_linear24(x, packed, torch.zeros(63).half(), 64, "cusparselt_sm90")
    with pytest.raises(TypeError, match=r"rows must be an int, got 64\.0"):
        hardware_linear24(x, packed, None, 64.0, "cusparselt_sm90")
    packed = sk.pack24(torch.zeros(4, 7).half())
    with pytest.raises(ValueError, match="columns must not end in a group of three, got 7"):
        pack_hardware24(packed, "cusparselt_sm90")
    with pytest.raises(TypeError, match=r"packed must be float16 or bfloat16, got torch\.float32"):
        pack_hardware24(packed._replace(values=packed.values.float()), "cusparselt_sm90")


@LAYOUTS
@pytest.mark.parametrize("shape", [(128, 128), (1, 4), (5, 9), (130, 134)], ids=str)
def test_packed_begins_with_the_values(layout, shape):
    weight, mask = sparse24(*shape, torch.float16)
    weight24 = sk.pack24(weight, mask)
    rows, cols = padded_shape(*shape, layout)
    packed = pack_hardware24(weight24, layout)
    head = packed[: rows * cols // 2].view(rows, cols // 2)
    assert torch.equal(head[: shape[0], : weight24.values.shape[1]], weight24.values)
    assert head.count_nonzero() == weight24.values.count_nonzero()


@pytest.mark.parametrize(
    ("capability", "layout", "names"),
    [
        ((8, 0), "cusparselt_sm80", ("cusparselt_sm80", "cutlass_sm80")),
        ((8, 9), "cusparselt_sm80", ("cusparselt_sm80", "cutlass_sm80")),
        ((9, 0), "cusparselt_sm90", ("cusparselt_sm90",)),
        ((10, 0), "cusparselt_sm90", ("cusparselt_sm90",)),
        ((12, 0), "cusparselt_sm80", ("cusparselt_sm80",)),
        ((9, 0), "cusparselt_sm80", ("cusparselt",)),
        ((8, 0), OWN_ORDER, ("cusparselt", "cutlass_sm80")),
        ((9, 0), OWN_VALUES, ()),
    ],
)
def test_a_gpu_is_asked_for_its_layout(monkeypatch, capability, layout, names):
    install(monkeypatch, Vendor(layout), capability)
    found = hardware_layouts(CPU)
    assert found.names == names
    assert ("its own compressor packs" in found.remark) == ("cusparselt" in names)
    assert ("layout is unknown" in found.remark) == (layout == OWN_VALUES)
    monkeypatch.setattr(torch, "_cslt_compress", None)
    assert hardware_layouts(CPU) is found  # once


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch):
    install(monkeypatch, Vendor("cusparselt_sm90"))
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpu = torch.device("cuda", 0)
    assert hardware_layouts(gpu) == ((), "nothing can be asked of cuSPARSELt while a CUDA graph is captured")
    capturing = False
    monkeypatch.setattr(layouts, "_layouts", lambda device: layouts.Layouts(("cusparselt_sm90",), ""))
    assert hardware_layouts(gpu).names == ("cusparselt_sm90",)
    capturing = True
    assert hardware_layouts(gpu).names == ("cusparselt_sm90",)  # known by now


def test_a_gpu_on_which_it_does_not_multiply_has_no_layout(monkeypatch):
    """As the second one of a process, where torch keeps one handle per thread."""
    install(monkeypatch, Vendor("cusparselt_sm90", algorithms=0), (8, 0))
    found = hardware_layouts(CPU)
    assert found.names == ("cutlass_sm80",) and found.remark.startswith("cuSPARSELt does not work here: CUDA error")


def test_a_compressor_that_needs_more_room_has_no_layout(monkeypatch):
    vendor = install(monkeypatch, Vendor(OWN_ORDER))
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: torch.cat([vendor.compress(dense).flatten(), dense[0]]))
    assert hardware_layouts(CPU) == ((), "cuSPARSELt's layout is unknown on this GPU")


def test_a_gpu_without_cusparselt(monkeypatch):
    assert "no 2:4 tensor cores" in hardware_layouts(CPU).remark
    install(monkeypatch, Vendor(), (8, 6))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert hardware_layouts(CPU).names == ("cutlass_sm80",) and "without cuSPARSELt" in hardware_layouts(CPU).remark

    def refuse(dense):
        raise RuntimeError("CUDA error: architecture mismatch\nmore")

    install(monkeypatch, Vendor(), (7, 5))
    monkeypatch.setattr(torch, "_cslt_compress", refuse)
    assert hardware_layouts(CPU) == ((), "cuSPARSELt does not work here: CUDA error: architecture mismatch")


def test_the_vendors_own_order_keeps_the_place_of_kept_zeros(monkeypatch):
    install(monkeypatch, Vendor(OWN_ORDER))
    weight, mask = sparse24(100, 132, torch.float16)
    weight[:, mask[0].nonzero()[::3]] = 0.0
    weight24 = sk.pack24(weight, mask)
    packed = pack_hardware24(weight24, "cusparselt")
    assert torch.equal(packed[: 128 * 128].view(128, 128)[:100, :66], weight24.values)
    x = torch.randn(5, 132).half()
    y = _vendor.hardware_linear24(x, packed, None, 100, "cusparselt", 0, 1, -1)
    torch.testing.assert_close(y, F.linear(x.float(), weight.float()).half())
