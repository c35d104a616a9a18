"""To the 2:4 tensors of torch.sparse and back."""

import pytest
import torch
from helpers import dtype_id, sparse24
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from vendor import OWN_ORDER, Vendor, install

import sparsekit as sk
from sparsekit.nn import Linear24
from sparsekit.ops import layouts

# torch calls its tensors a prototype.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")


@pytest.fixture(autouse=True)
def _forget():
    yield
    layouts._found.clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(32, 64), (96, 192)], ids=str)
def test_is_what_torch_makes_for_cutlass(dtype, shape):
    weight, mask = sparse24(*shape, dtype)
    weight24 = sk.pack24(weight, mask)
    tensor = sk.to_sparse_semi_structured(weight24, layout="cutlass_sm80")
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert type(tensor) is SparseSemiStructuredTensorCUTLASS and tensor.shape == weight.shape
    assert torch.equal(tensor.packed, packed) and torch.equal(tensor.meta, meta) and tensor.dtype == dtype
    assert torch.equal(tensor.to_dense(), weight)
    back = sk.from_sparse_semi_structured(tensor)
    assert torch.equal(back.values, weight24.values) and torch.equal(back.bitmask, weight24.bitmask)


def test_cusparselt_of_this_device(monkeypatch):
    install(monkeypatch, vendor := Vendor("cusparselt_sm90"))
    weight, mask = sparse24(128, 64, torch.float16)
    layer = Linear24(64, 128, dtype=torch.float16)
    layer.values.data, layer.bitmask, _ = sk.pack24(weight, mask)
    tensor = sk.to_sparse_semi_structured(layer.packed, alg_id=3)
    assert type(tensor) is SparseSemiStructuredTensorCUSPARSELT and tensor.alg_id_cusparselt == 3
    assert torch.equal(tensor.packed.view(torch.int16), vendor.compress(weight).view(torch.int16))
    assert tensor.meta is None and not tensor.requires_grad
    assert torch.equal(tensor.values(), layer.values)
    back = sk.from_sparse_semi_structured(tensor)
    assert torch.equal(back[0], layer.values) and torch.equal(back[1], layer.bitmask)
    with pytest.raises(ValueError, match="tensor must not be transposed"):
        sk.from_sparse_semi_structured(tensor.t())


def test_reads_what_torch_pruned_itself():
    """As ``prune_dense_static_sort`` leaves it: metadata permuted, or a part of what is packed and shown once more."""
    weight, mask = sparse24(128, 128, torch.float16)
    weight24 = sk.pack24(weight, mask)
    cutlass = sk.to_sparse_semi_structured(weight24, layout="cutlass_sm80")
    cutlass.meta = cutlass.meta.view(4, 128, 2).permute(1, 2, 0)
    cusparselt = sk.to_sparse_semi_structured(weight24, layout="cusparselt_sm80")
    cusparselt.meta = cusparselt.packed.flatten()[128 * 64 :].view(1, 4, 256)
    for tensor, layout in ((cutlass, None), (cusparselt, "cusparselt_sm80")):
        back = sk.from_sparse_semi_structured(tensor, layout=layout)
        assert torch.equal(back.values, weight24.values) and torch.equal(back.bitmask, weight24.bitmask)


def test_rejects(monkeypatch):
    packed = sk.pack24(torch.zeros(64, 64).half())
    with pytest.raises(ValueError, match=r"layout must be given: cpu has no 2:4 tensor cores"):
        sk.to_sparse_semi_structured(packed)
    with pytest.raises(ValueError, match=r"layout must be one of .*got 'sm90'"):
        sk.to_sparse_semi_structured(packed, layout="sm90")
    with pytest.raises(ValueError, match=r"a weight of 64 x 64 must be padded to 128 x 128 for cusparselt_sm80"):
        sk.to_sparse_semi_structured(packed, layout="cusparselt_sm80")
    with pytest.raises(TypeError, match=r"packed must be float16 or bfloat16, got torch\.float32"):
        sk.to_sparse_semi_structured(packed._replace(values=packed.values.float()), layout="cusparselt_sm90")
    tensor = sk.to_sparse_semi_structured(packed, layout="cusparselt_sm90")
    with pytest.raises(ValueError, match="layout must be given: cpu has no 2:4 tensor cores"):
        sk.from_sparse_semi_structured(tensor)
    install(monkeypatch, Vendor(OWN_ORDER))
    with pytest.raises(ValueError, match="layout must be given: cuSPARSELt's order of metadata is unknown"):
        sk.from_sparse_semi_structured(tensor)
