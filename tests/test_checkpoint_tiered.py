"""Checkpoints of tiered layers: the stored tensors, the refused files, and a real model from pruning to loading."""

import copy
from functools import partial

import pytest
import torch
from checkpoints import contents, drop, forge, make, put, refuse, tiered
from compressing import decisions
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info
from sparsekit.nn import TieredLinear
from sparsekit.tiers import Ratios, Step, TierMap, progressive_tiers

_put = partial(put, "layers", "0")
PARTS = ("tiers", "dense", "values", "bitmask", "topk", "positions")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def literal():
    """Returns a layer of ten rows and twelve columns in blocks of 8x8: dense, 2:4; top-k, top-k."""
    linear = nn.Linear(12, 10)
    linear.weight.data.zero_()[:8, :8] = 1
    linear.weight.data[:8, 8:10] = 2
    linear.weight.data[9, 1], linear.weight.data[9, 6] = 3, 4
    linear.weight.data[9, 11] = 5
    return nn.Sequential(TieredLinear.from_linear(linear, block=(8, 8), k=3)).eval()


def fresh():
    return nn.Sequential(nn.Linear(12, 10)).eval()


def test_literal(path):
    model = literal()
    sk.save(model, path)
    tensors = load_file(path)
    assert sorted(tensors) == sorted(["0.bias", *(f"0.{part}" for part in PARTS)])
    assert tensors["0.tiers"].tolist() == [[0, 1], [2, 2]]
    assert tensors["0.topk"].tolist() == [[3, 4, 0], [5, 0, 0]]
    assert tensors["0.positions"].tolist() == [[9, 14, 0], [11, 0, 0]]
    loaded, x = fresh(), torch.randn(3, 12)
    linear = loaded[0]
    sk.load(loaded, path)
    assert type(loaded[0]) is TieredLinear and torch.equal(loaded[0].starts, model[0].starts)
    assert contents(loaded) == contents(model) and torch.equal(loaded(x), model(x))
    assert sk.decompress_(loaded) == ("0",) and loaded[0] is linear
    assert torch.equal(linear.weight, model[0].weight)


def test_layers_and_masks_come_back_dense(path):
    model, loaded = tiered(make()), make(1)
    sk.save(model, path)
    sk.load(loaded, path, dense=True)
    assert type(loaded.third) is nn.Linear and torch.equal(loaded.third.weight, model.third.weight)
    assert torch.equal(get_mask(loaded.third), get_mask(model.third))
    assert str(get_mask_info(loaded.third).pattern) == "tiers 8x8 k=3"


def test_in_a_foreign_file_the_weight_is_dense(path):
    """A module that is used twice is one module after loading."""
    layer = literal()[0]
    layer.bias = None
    model = nn.ModuleList([layer, layer, sk.nn.Linear24(8, 8)])
    sk.save(model, path, format="sparse-24-bitmask")
    tensors = load_file(path)
    assert torch.equal(tensors["0.weight"], layer.weight) and "1.weight" not in tensors
    linear = nn.Linear(12, 10, bias=False)
    loaded = nn.ModuleList([linear, linear, nn.Linear(8, 8)])
    sk.load(loaded, path)
    assert loaded[0] is loaded[1] and torch.equal(loaded[0].weight, layer.weight)


def test_other_numbers_of_blocks_take_the_place_of_a_tiered_layer(path):
    sk.save(literal(), path)
    linear = nn.Linear(12, 10)
    model = nn.Sequential(TieredLinear.from_linear(linear, block=(16, 16)))
    sk.load(model, path)
    assert contents(model)[0] == contents(literal_of(path))[0] and model[0].block == (8, 8)


def literal_of(path):
    model = fresh()
    sk.load(model, path)
    return model


def test_a_transposed_layer_keeps_its_orientation(path):
    conv = nn.Module()
    conv.weight, conv.bias = nn.Parameter(literal()[0].weight.t().contiguous()), None
    model = nn.Sequential(TieredLinear.from_linear(conv, block=(8, 8), k=3, transposed=True))
    sk.save(model, path)
    loaded = nn.Sequential(TieredLinear.from_linear(conv, transposed=True))
    sk.load(loaded, path)
    assert loaded[0].transposed and torch.equal(loaded[0].weight, conv.weight) and loaded[0].k == 3


def _set(part, index, value):
    def change(structure, tensors):
        tensors[f"0.{part}"][index] = value

    return change


def _replace(part, make):
    def change(structure, tensors):
        tensors[f"0.{part}"] = make(tensors[f"0.{part}"]).contiguous()

    return change


def _all(*changes):
    def change(structure, tensors):
        for each in changes:
            each(structure, tensors)

    return change


FORGERIES = {
    "block-type": (_put("block", value="8x8"), "layer '0' has no 'block' of type list"),
    "block-sides": (_put("block", value=[8]), r"layer '0' has blocks of \[8\], not of two positive sides"),
    "block-float": (
        _put("block", value=[8, 8.0]),
        r"layer '0' has blocks of \[8, 8.0\], not of two positive sides",
    ),
    "block-zero": (_put("block", value=[0, 8]), r"layer '0' has blocks of \[0, 8\], not of two positive sides"),
    "block": (_put("block", value=[9, 8]), r"blocks of \(8, 8\) and k=3 in a layer of \(9, 8\) and k=3"),
    "k-type": (_put("k", value=True), "layer '0' has no 'k' of type int"),
    "k": (_put("k", value=4), r"blocks of \(8, 8\) and k=3 in a layer of \(8, 8\) and k=4"),
    "k-above-the-block": (
        _all(
            _put("k", value=65),
            *(_replace(part, lambda t: t.new_zeros(2, 65)) for part in ("topk", "positions")),
        ),
        "k=65 in a layer of .* and k=65",
    ),
    "shape": (_put("shape", value=[10, 20]), r"layer '0' has shape \(10, 20\), the model's has \(10, 12\)"),
    "shape-absurd": (
        _all(_put("shape", value=[1 << 59, 0]), _replace("tiers", lambda t: t.new_zeros(1 << 56, 0))),
        r"the model's has \(10, 12\)",
    ),
    "tiers-absurd": (_replace("tiers", lambda t: t.new_zeros(1 << 56, 0)), r"tiers has shape .* needs \(2, 2\)"),
    "grid": (_replace("tiers", lambda t: t.view(1, 4)), r"tiers has shape \(1, 4\), its layer needs \(2, 2\)"),
    "shape-3d": (_put("shape", value=[10, 4, 3]), r"layer '0' has the shape \[10, 4, 3\]"),
    "no-tiers": (drop("0.tiers"), "the tensor '0.tiers' is missing"),
    "no-positions": (drop("0.positions"), "the tensor '0.positions' is missing"),
    "tier-3": (_set("tiers", (1, 1), 3), "tiers must be 0, 1 or 2, got 3"),
    "tiers-dtype": (_replace("tiers", torch.Tensor.long), "tiers must be torch.uint8, got torch.int64"),
    "tiers-1d": (_replace("tiers", torch.flatten), r"tiers has shape \(4,\), its layer needs \(2, 2\)"),
    "tiers-none": (_replace("tiers", lambda t: t[:0]), r"tiers has shape \(0, 2\), its layer needs"),
    "other-counts": (_set("tiers", (0, 0), 2), r"tiers names \[0, 1, 3\] blocks .* but \[1, 1, 2\] are stored"),
    "fewer-dense": (_replace("dense", lambda t: t[:0]), "tiers must be a map of the 3 blocks that are stored"),
    "dense-dtype": (_replace("dense", torch.Tensor.double), "dense must be float32, float16 or bfloat16"),
    "two-dtypes": (_replace("topk", torch.Tensor.half), "topk must be torch.float32, got torch.float16"),
    "dense-2d": (_replace("dense", lambda t: t[0]), r"dense must have 3 dimensions, got shape \(8, 8\)"),
    "block-of-4": (_replace("dense", lambda t: t[:, :4]), r"block must have sides of 8 to 128 .* got \(4, 8\)"),
    "values-shape": (_replace("values", lambda t: t[..., :3]), r"values must have shape \(1, 8, 4\), got \(1, 8, 3\)"),
    "bitmask-dtype": (_replace("bitmask", torch.Tensor.bool), "bitmask must be torch.uint8, got torch.bool"),
    "bits": (_set("bitmask", (0, 3, 0), 0b0111_0011), "bitmask does not keep exactly two of every four columns"),
    "position-beyond": (_set("positions", (0, 1), 64), "positions must be below 64, got 0 to 64"),
    "positions-dtype": (_replace("positions", torch.Tensor.short), "positions must be torch.uint8, got torch.int16"),
    "positions-negative": (_replace("positions", lambda t: t.to(torch.int8)), "positions must be torch.uint8"),
    "positions-fewer": (_replace("positions", lambda t: t[:, :2]), r"positions must have shape \(2, 3\)"),
    "twice": (_set("positions", (0, 1), 9), "positions do not ascend to a padding of zeros"),
    "falling": (_set("positions", (0, 0), 15), "positions do not ascend to a padding of zeros"),
    "after-padding": (_set("positions", (1, 2), 12), "positions do not ascend to a padding of zeros"),
    "padding-with-value": (_set("topk", (1, 2), 1), "positions do not ascend to a padding of zeros"),
    "row-outside": (_set("positions", (0, 1), 16), "entries lie outside of the weight"),
    "column-outside": (
        _all(_set("positions", (1, 0), 12), _set("topk", (1, 0), 0)),
        "entries lie outside of the weight",
    ),
    "value-outside": (_set("values", (0, 0, 2), 1), "entries lie outside of the weight"),
    "extra": (lambda structure, tensors: tensors.update({"0.weight": torch.zeros(10, 12)}), "unexpected 0.weight"),
}


@pytest.mark.parametrize("target", [fresh, literal], ids=["fresh", "tiered"])
@pytest.mark.parametrize("name", FORGERIES)
def test_refuses_a_forged_file(path, name, target):
    change, match = FORGERIES[name]
    sk.save(literal(), path)
    forge(path, change)
    refuse(path, match, target())


def test_a_real_model_from_pruning_to_loading(ratios, data, path):
    """Packed layers give the logits of the masked dense model, before and after a file, and become dense again."""
    transformers = pytest.importorskip("transformers")
    folder = data / "ckpt_stories260K" / "hf"
    model, fresh = (transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    batches = [{"input_ids": torch.randint(3, 500, (4, 32))} for _ in range(2)]
    steps = (Step(1, Ratios(0.65, 0.2, 0.15), 0.35, 0.15, 0), Step(2, Ratios(0.35, 0.45, 0.2), 0.3, 0.05, 0))
    maps, _ = progressive_tiers(model.eval(), steps, batches, lambda model, step: None)
    for name, tier_map in maps.items():
        found = TierMap.of(model.get_submodule(name))
        whole = tuple(side // 16 for side in found.shape)  # blocks at the edge may fit a smaller form
        assert torch.equal(found.tiers[: whole[0], : whole[1]], tier_map.tiers[: whole[0], : whole[1]])
    dense = copy.deepcopy(model)
    report = sk.compress_(model, batches)
    assert [name for name, decision in decisions(report).items() if decision == "tiered"] == list(maps)
    weights = sum(layer.weight.nbytes for layer in map(dense.get_submodule, maps))
    packed = sum(layer.packed.nbytes for layer in map(model.get_submodule, maps))
    assert packed <= 0.63 * weights
    sk.save(model, path)
    sk.load(fresh.eval(), path)
    with torch.no_grad():
        expected = dense(**batches[0]).logits
        for compressed in (model, fresh):
            assert type(compressed.model.layers[0].mlp.up_proj) is TieredLinear
            assert (compressed(**batches[0]).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        for compressed in (model, fresh):
            assert sk.decompress_(compressed) == report.swapped
            assert torch.equal(compressed(**batches[0]).logits, expected)
            for name in maps:
                assert torch.equal(get_mask(compressed.get_submodule(name)), get_mask(dense.get_submodule(name)))
