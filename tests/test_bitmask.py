"""Packed weights by name in every form that llm-compressor wrote, and folders of several files."""

import json

import pytest
import torch
from checkpoints import contents
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.checkpoint.bitmask import find_packed, pack_all, unpack_all, unpack_bitmask
from sparsekit.checkpoint.shards import INDEX, Shards, write_shards
from sparsekit.masks import get_mask
from sparsekit.nn import Linear24

DENSE = [[1.0, 0, 0, 2, 0, 0, 3, 4], [0, 5, 6, 0, 7, 8, 0, 0]]
PACKED24 = {
    "compressed": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
    "bitmask": torch.tensor([[0b11001001], [0b00110110]], dtype=torch.uint8),
    "shape": torch.tensor([[2], [8]]),
}
UNEVEN = [[0.0, 0, 0], [1, 2, 3]]
PACKED = {
    "compressed": torch.tensor([1.0, 2, 3]),
    "bitmask": torch.tensor([[0], [0b111]], dtype=torch.uint8),
    "shape": torch.tensor([2, 3]),
    "row_offsets": torch.tensor([0, 0]),
}


def named(base, parts):
    return {f"{base}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("base", ["a.b", "a.b.weight"])
@pytest.mark.parametrize(("parts", "dense"), [(PACKED24, DENSE), (PACKED, UNEVEN)], ids=["2:4", "any"])
def test_literal(base, parts, dense):
    tensors = named(base, parts) | {"a.b.bias": torch.ones(2)}
    assert list(find_packed(tensors)) == ["a.b.weight"]
    unpacked = dict(unpack_all(tensors))
    assert unpacked.keys() == {"a.b.weight", "a.b.bias"} and unpacked["a.b.weight"].tolist() == dense


def test_older_files_pack_biases_and_norms_too():
    parts = {"compressed": torch.tensor([5.0]), "bitmask": torch.tensor([0b10], dtype=torch.uint8)}
    tensors = named("norm.bias", {**parts, "shape": torch.tensor([3]), "row_offsets": torch.tensor(0)})
    assert {name: tensor.tolist() for name, tensor in unpack_all(tensors)} == {"norm.bias": [0, 5, 0]}


def test_packing_is_undone_and_leaves_what_is_not_24():
    weight = torch.tensor(DENSE)
    state = {"a.weight": weight, "b.weight": torch.ones(2, 8), "c.weight": weight[:, :6], "d.weight": weight}
    packed = dict(pack_all(state, lambda layer: layer != "d"))
    assert packed.keys() == {"a.compressed", "a.bitmask", "a.shape", "b.weight", "c.weight", "d.weight"}
    assert all(torch.equal(packed[f"a.{part}"], tensor) for part, tensor in PACKED24.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in unpack_all(packed))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_quantized_weights_are_multiplied_by_their_scales(dtype):
    values = PACKED24["compressed"].to(dtype)
    assert unpack_bitmask("a.weight", {**PACKED24, "compressed": values}).float().tolist() == DENSE
    with torch.device("meta"):  # the default device must not matter
        assert not unpack_bitmask("a.weight", {**PACKED24, "compressed": values}).is_meta
    plain = {"b.weight": torch.ones(2, 2).to(dtype), "b.weight_scale": torch.tensor([[1.0], [3.0]]).bfloat16()}
    tensors = named("a", {**PACKED24, "compressed": values, "weight_scale": torch.tensor([0.5])}) | plain
    found = dict(unpack_all(tensors))
    assert found.keys() == {"a.weight", "b.weight"}
    assert found["a.weight"].tolist() == (torch.tensor(DENSE) / 2).tolist()
    assert found["b.weight"].dtype == torch.bfloat16 and found["b.weight"].tolist() == [[1, 1], [3, 3]]
    for wrong in ({"a.weight_zero_point": torch.tensor([1])}, {"a.weight_scale": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match=r"layer 'a' is quantized .* read are only float8 and int8 with one"):
            dict(unpack_all(tensors | wrong))


@pytest.mark.parametrize(
    ("parts", "change", "match"),
    [
        (PACKED24, {"bitmask": torch.tensor([[255], [0b00110110]]).byte()}, "exactly two of every four columns"),
        (PACKED24, {"compressed": torch.ones(2, 3)}, "exactly two of every four columns"),
        (PACKED24, {"shape": torch.tensor([2, 1 << 50])}, "a bit for each weight"),
        (PACKED24, {"shape": torch.tensor([-2, 8])}, r"has the shape \[-2, 8\]"),
        (PACKED24, {"shape": torch.tensor([2.0, 8.0])}, "which must be of integers"),
        (PACKED24, {"shape": torch.zeros(0).long()}, "which must be of integers"),
        (PACKED24, {"bitmask": torch.zeros(2, 1)}, r"bitmask float32 \[2, 1\]: that must be uint8"),
        (PACKED, {"compressed": torch.ones(4)}, r"has 3 bits set, and values of shape \[4\]"),
        (PACKED, {"bitmask": torch.tensor([[8], [7]]).byte()}, "bits set past its last column"),
    ],
)
def test_malformed_parts_name_their_layer(parts, change, match):
    with pytest.raises(ValueError, match=f"layer 'a.b' .*{match}"):
        dict(unpack_all(named("a.b.weight", parts | change)))


def test_names_that_clash():
    with pytest.raises(ValueError, match=r"the tensor 'a.bitmask' is missing"):
        find_packed({"a.compressed", "a.shape"})
    for other in (named("a.weight", PACKED24), {"a.weight": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"the weight 'a.weight' is there twice"):
            find_packed(named("a", PACKED24) | other)


def test_a_model_is_loaded_from_a_folder_of_shards(tmp_path):
    tensors = named("0.weight", PACKED24) | {"0.bias": torch.ones(2)} | named("1.weight", PACKED)
    parts = list(tensors.items())
    files = write_shards(parts, tmp_path, max_bytes=20)
    assert len(files) > 3 and all(path.stat().st_mode & 0o077 for path in files)
    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(3, 2, bias=False))
    sk.load(model, tmp_path)
    assert type(model[0]) is Linear24 and model[0].weight.tolist() == DENSE
    assert torch.equal(get_mask(model[0]), torch.tensor(DENSE) != 0)
    assert model[1].weight.tolist() == UNEVEN and get_mask(model[1]) is None
    sk.load(model, tmp_path, dense=True)
    assert model[0].weight.tolist() == DENSE


def test_shards_are_written_as_transformers_reads_them(tmp_path):
    shared = torch.arange(8.0)
    tensors = {"a": torch.ones(4, dtype=torch.bfloat16), "b": shared, "c": shared, "d": torch.zeros(0, 3)}
    files = write_shards(tensors.items(), tmp_path, max_bytes=40)
    assert [path.name for path in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 72 and index["weight_map"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    read = Shards(tmp_path)
    assert set(read) == set(tensors) and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="the tensor 'a' comes twice"):
        write_shards([*tensors.items(), ("a", shared)], tmp_path)


def test_one_shard_needs_no_index(tmp_path):
    assert write_shards([("a", torch.ones(2))], tmp_path) == [tmp_path / "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] and list(Shards(tmp_path)) == ["a"]


BROKEN = {
    "outside": {"weight_map": {"a": "../x.safetensors"}},
    "dots": {"weight_map": {"a": ".."}},
    "list": {"weight_map": ["a"]},
    "number": {"weight_map": {"a": 3}},
    "empty": {"weight_map": {}},
    "none": [],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_index_is_refused_by_name(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps(BROKEN[name]))
    with pytest.raises(ValueError, match=f"{INDEX} is no index of safetensors files"):
        Shards(tmp_path)


def test_shards_that_do_not_fit_their_index(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(ValueError, match="names the tensor 'b', which is in none of its files"):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(ValueError, match=r"y.safetensors: the tensor 'a' is in x.safetensors too"):
        Shards(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "z.safetensors"}}))
    with pytest.raises(OSError, match=r"z\.safetensors"):
        Shards(tmp_path)
    (tmp_path / "z.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"z\.safetensors is truncated, or no safetensors file"):
        Shards(tmp_path)
    (tmp_path / INDEX).unlink()
    model = nn.Sequential(nn.Linear(1, 1))
    before = contents(model)
    with pytest.raises(ValueError, match="it is a directory of 3 safetensors files, and has no"):
        sk.load(model, tmp_path)
    assert contents(model) == before
