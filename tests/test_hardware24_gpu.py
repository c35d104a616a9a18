"""cuSPARSELt's packed weights: where it puts every bit, and what it computes from what was packed here.

It is a GPU's library where there is one, and is acted on the CPU.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import vendor
from safetensors.torch import save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

import sparsekit as sk
from bench.shapes import name
from sparsekit.ops import _vendor
from sparsekit.ops.hardware24 import MULTIPLES, _nibble_index
from sparsekit.ops.hardware_linear24 import UNKNOWN

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() and not torch.version.hip else (0, 0)
LAYOUT = {8: "cusparselt_sm80", 9: "cusparselt_sm90"}.get(CAPABILITY[0])
GPU = [pytest.mark.gpu, pytest.mark.skipif(LAYOUT is None, reason="needs a GPU with cuSPARSELt")]
PROBES = [(64, 64), (128, 128), (96, 64), (192, 256)]
COMPARED = [(rows, cols) for rows in (64, 96, 128, 768, 3072) for cols in (64, 768, 3072, 4096)]
MULTIPLIED = [(128, 256), (4096, 4096), (14336, 4096), (768, 3072)]
FIRST, LAST = 0x4, 0xE  # the metadata of a group that keeps its first, its last two entries


def cases(acted, on_gpu):
    """Parametrizes a test by shapes, few where the library is acted."""
    pairs = [("acted", shape) for shape in acted] + [pytest.param("cuda", shape, marks=GPU) for shape in on_gpu]
    return pytest.mark.parametrize("device, shape", pairs, indirect=["device"], ids=str)


@pytest.fixture
def device(request, monkeypatch):
    if request.param == "acted":
        vendor.install(monkeypatch, vendor.PaddingVendor())
    return torch.device("cpu" if request.param == "acted" else "cuda")


@pytest.fixture
def layout(device):
    return LAYOUT if device.type == "cuda" else "cusparselt_sm90"


def randn(device, *shape):
    return torch.randn(shape, device=device).bfloat16()


def in_bytes(tensor):
    return tensor.flatten().view(torch.uint8)


def nibbles(data):
    return torch.stack([data & 15, data >> 4], 1).flatten()


def closed_form(shape, layout, device):
    """Returns the nibble of each group, of which the rows are padded to what the layout needs."""
    padded = shape[0] + -shape[0] % MULTIPLES[layout][0]
    return _nibble_index(padded, shape[1], layout, device)[: shape[0]].flatten()


def find_nibbles(shape, device):
    """Finds the nibble in which cuSPARSELt stores each group, without knowing its layout.

    Group ``i`` keeps its last two entries in the weight of bit ``b`` where ``i`` has that bit, else its first two: the
    nibbles of all those weights, read together, spell the group's number. -1 where a group is not found.
    """
    groups = shape[0] * shape[1] // 4
    number = torch.arange(1, groups + 1, device=device)  # 0 is what padding reads as
    first, last = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], device=device, dtype=torch.bfloat16)
    seen = []
    for bit in range(groups.bit_length()):
        weight = torch.where((number >> bit & 1).bool().unsqueeze(1), last, first).view(shape)
        seen.append(nibbles(in_bytes(_vendor.compress(weight))[4 * groups :]))
    seen = torch.stack(seen, 1)
    group = ((seen == LAST) * (1 << torch.arange(seen.shape[1], device=device))).sum(1)  # by nibble
    legal = ((seen == FIRST) | (seen == LAST)).all(1) & (group > 0) & (group <= groups)
    place = torch.full((groups,), -1, device=device)
    place[group[legal] - 1] = legal.nonzero().flatten()
    return place


@cases(PROBES, PROBES)
def test_every_group_is_where_the_closed_form_puts_it(device, layout, shape):
    place = find_nibbles(shape, device)
    if device.type == "cuda":  # kept, for the day on which no closed form holds
        weight = sk.nm_prune(randn(device, *shape), 2, 4)[0]
        found = {"nibble_of_group": place, "weight": weight, "blob": _vendor.compress(weight)}
        folder = Path("build", "gpu")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"layout-{name(shape)}.safetensors"
        save_file({key: each.cpu().contiguous() for key, each in found.items()}, path)
    assert (place >= 0).all()
    agree = {
        form: (closed_form(shape, form, device) == place).float().mean().item()
        for form in MULTIPLES
        if form.startswith("cusparselt") and shape[1] % MULTIPLES[form][1] == 0
    }
    assert agree[layout] == 1, agree


@cases(COMPARED[:6], COMPARED)
def test_packed_weights_are_the_closed_form_byte_for_byte(device, layout, shape):
    rows, cols = shape
    weight = sk.nm_prune(randn(device, *shape), 2, 4)[0]
    blob = in_bytes(_vendor.compress(weight))
    padded = F.pad(weight, (0, 0, 0, -rows % MULTIPLES[layout][0]))
    own = torch.ops.sparsekit.prune_to_hardware24(padded, None, layout)
    packed = sk.pack24(padded, sk.nm_mask(padded, 2, 4))
    assert torch.equal(in_bytes(torch.ops.sparsekit.to_hardware24(*packed[:2], cols, layout)), in_bytes(own))
    own, values = in_bytes(own), weight.numel()  # bytes of the kept half
    assert torch.equal(blob[:values], own[:values])
    meta, own_meta = nibbles(blob[values:]), nibbles(own[padded.numel() :])
    index = closed_form(shape, layout, device)  # of the rows that are no padding
    assert index.max() < len(meta), f"{len(meta) // 2} bytes of metadata, {len(own_meta) // 2} by the closed form"
    wrong = index[meta[index] != own_meta[index]]
    assert not len(wrong), f"{len(wrong)} groups differ, first at byte {wrong.min() // 2} of the metadata"


def assert_multiplies(packed, dense):
    """The vendor's product from a packed weight is that of the dense weight."""
    x = randn(dense.device, 64, dense.shape[1])
    y = _vendor.hardware_linear24(x, packed, None, len(dense), UNKNOWN, 0, 1, -1)
    expected = x.float() @ dense.float().t()
    assert (y.float() - expected).norm() <= 1e-2 * expected.norm()


@cases(MULTIPLIED[:1], MULTIPLIED)
def test_the_vendor_multiplies_from_what_was_packed(device, layout, shape):
    weight = randn(device, *shape)
    dense = sk.nm_prune(weight, 2, 4)[0]
    assert_multiplies(_vendor.compress(dense), dense)  # where this alone is right, the layout is wrong, not the call
    assert_multiplies(torch.ops.sparsekit.prune_to_hardware24(weight, None, layout), dense)
    packed, packed_t, _ = torch.ops.sparsekit.prune_both_to_hardware24(weight, layout)
    dense = torch.where(sk.transposable_mask24(weight), weight, 0)
    assert_multiplies(packed, dense)
    assert_multiplies(packed_t, dense.t())


@pytest.mark.gpu
@pytest.mark.skipif(LAYOUT is None, reason="needs a GPU with cuSPARSELt")
@pytest.mark.xfail(strict=False, reason="torch's pruner for training may write another layout than cuSPARSELt reads")
@pytest.mark.parametrize("shape", MULTIPLIED, ids=str)
def test_torch_multiplies_from_its_own_pruner(shape):
    weight = randn("cuda", *shape)
    sparse = SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight, "largest_abs_values_greedy")
    dense = torch._sparse_semi_structured_apply_dense(weight, sparse.compressed_swizzled_bitmask)
    x = randn("cuda", 64, shape[1])
    expected = dense.float() @ x.float().t()
    assert (torch.mm(sparse, x.t()).float() - expected).norm() <= 1e-2 * expected.norm()
