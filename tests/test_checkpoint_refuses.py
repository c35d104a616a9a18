"""Damaged and foreign files are refused by name, and leave the model unchanged."""

import os
import struct

import pytest
import torch
from checkpoints import contents, drop, forge, make, mixed, put, refuse
from safetensors.torch import save_file
from torch import nn

import sparsekit as sk
from sparsekit import _safetensors
from sparsekit.checkpoint import rebuild
from sparsekit.nn import Linear24


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_refuses_a_truncated_file(path):
    sk.save(mixed(make()), path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    model = make(1)
    for length in {0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1, *range(0, len(whole), 97)}:
        path.write_bytes(whole[:length])
        refuse(path, "truncated, or no safetensors file", model)


def test_refuses_a_file_with_any_byte_altered(path):
    sk.save(mixed(make()), path)
    whole = path.read_bytes()
    model = make(1)
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        refuse(path, "truncated, or no safetensors file|was altered|not one that sparsekit.save wrote", model)
    path.write_bytes(whole + b"\0")
    refuse(path, "truncated, or no safetensors file", model)


def test_refuses_what_is_no_checkpoint(path, tmp_path):
    refuse(tmp_path, "it is a directory")
    path.write_bytes(os.urandom(5000))
    refuse(path, "truncated, or no safetensors file")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refuse(path, "truncated, or no safetensors file")
    torch.save({"first.weight": torch.zeros(2)}, path)
    refuse(path, "truncated, or no safetensors file")
    save_file(make(tied=False).state_dict(), path)
    refuse(path, "it is a safetensors file, but not one that sparsekit.save wrote")
    with pytest.raises(FileNotFoundError):
        sk.load(make(), tmp_path / "missing")


def _bit(name, byte=0, bit=1):
    def change(structure, tensors):
        tensors[name][0, byte] ^= bit

    return change


def _drop_key(key):
    def change(structure, tensors):
        del structure[key]

    return change


def _ghost(structure, tensors):
    structure["layers"]["ghost"] = structure["layers"]["first"]


def _tensor(name, tensor):
    def change(structure, tensors):
        tensors[name] = tensor

    return change


LAYER = ("layers", "first")
FORGERIES = {
    "version": (put("version", value=2), "version 2 of the format, this sparsekit reads version 1"),
    "version-type": (put("version", value="1"), "no 'version' of type int"),
    "not-json": (lambda structure, tensors: "{", "its structure is not JSON"),
    "deep": (lambda structure, tensors: "[" * 100_000, "its structure is not JSON"),
    "list": (lambda structure, tensors: "[]", "no 'version' of type int"),
    "no-layers": (_drop_key("layers"), "no 'layers' of type dict"),
    "no-shared": (_drop_key("shared"), "no 'shared' of type dict"),
    "shared-type": (put("shared", value={"head.weight": 3}), "'shared' must map names to names"),
    "shared-with-nothing": (put("shared", value={"head.weight": "x"}), "'head.weight' cannot share the tensor 'x'"),
    "shared-twice": (put("shared", "conv.bias", value="norm.bias"), "'conv.bias' cannot share"),
    "shared-misfit": (put("shared", "head.weight", value="conv.bias"), r"head.weight has shape \(3,\)"),
    "layer-type": (put(*LAYER, value=[]), "layer 'first' has no 'kind' of type str"),
    "kind": (put(*LAYER, "kind", value="linear12"), "layer 'first' is 'linear12', known are"),
    "shape-negative": (put(*LAYER, "shape", value=[-1, 10]), r"layer 'first' has the shape \[-1, 10\]"),
    "shape-absurd": (put(*LAYER, "shape", value=[1 << 60, 1 << 60]), r"the model's has \(12, 10\)"),
    "shape-1d": (put(*LAYER, "shape", value=[12]), r"layer 'first' has the shape \[12\]"),
    "shape-bool": (put(*LAYER, "shape", value=[True, True]), "layer 'first' has the shape"),
    "transposed": (put(*LAYER, "transposed", value=True), "first.values has shape"),
    "transposed-type": (put(*LAYER, "transposed", value=1), "no 'transposed' of type bool"),
    "tokens": (put("layers", "second", "tokens", value=1 << 40), "tokens, 1 to 1048576 are allowed"),
    "tokens-type": (put("layers", "second", "tokens", value=1.5), "no 'tokens' of type int"),
    "mask-type": (put(*LAYER, "mask", value=[]), "mask of layer 'first' has the axis None"),
    "mask-axis": (put(*LAYER, "mask", "axis", value=2), "the axis 2, for a weight of 2 dimensions"),
    "mask-pattern": (put(*LAYER, "mask", "pattern", value="9:4"), "a pattern is .* got '9:4'"),
    "mask-dropped": (put(*LAYER, "mask", value=None), "unexpected first.weight_mask"),
    "no-values": (drop("first.values"), "'first.values' is missing"),
    "no-bias": (drop("first.bias"), "missing first.bias"),
    "unknown-layer": (_ghost, "there is no layer 'ghost' with a weight"),
    "extra-tensor": (_tensor("ghost", torch.zeros(1)), "it does not fit the model: unexpected ghost"),
    "wrong-shape": (_tensor("norm.bias", torch.zeros(4)), r"norm.bias has shape \(4,\), the model's \(3,\)"),
    "values-dtype": (_tensor("first.values", torch.zeros(12, 6, dtype=torch.int32)), "first.values is torch.int32"),
    "weight-dtype": (_tensor("second.weight", torch.zeros(12, 12).int()), "second.weight is torch.int32, not floating"),
    "bias-dtype": (_tensor("conv.bias", torch.zeros(3).bool()), "conv.bias is torch.bool, the model's torch.float32"),
    "counter-dtype": (
        _tensor("norm.num_batches_tracked", torch.zeros(())),
        "is torch.float32, the model's torch.int64",
    ),
    "bits-dtype": (_tensor("first.bitmask", torch.zeros(12, 2)), "first.bitmask is torch.float32, not uint8"),
    "bits-break-24": (_bit("first.bitmask"), "first.bitmask does not keep exactly two of every four columns"),
    "bits-past-the-end": (
        _bit("conv.weight_mask", byte=4, bit=0x80),
        "conv.weight_mask has bits set past its last column",
    ),
    "tail-dropped": (_bit("first.bitmask", byte=1, bit=2), "does not keep exactly two"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_refuses_a_forged_file(path, name):
    change, match = FORGERIES[name]
    sk.save(mixed(make()), path)
    forge(path, change)
    refuse(path, match, make(1))


def test_says_which_layers_do_not_fit(path):
    sk.save(make(), path)
    refuse(path, r"missing 0\.bias, 0\.weight; unexpected conv\.bias, .* and \d+ more", nn.Sequential(nn.Linear(2, 2)))
    sk.save(nn.Sequential(Linear24(8, 8)), path)
    refuse(path, r"layer '0' is 'linear24' in the file and Embedding in the model", nn.Sequential(nn.Embedding(8, 8)))
    refuse(path, r"layer '0' has shape \(8, 8\), the model's has \(9, 8\)", nn.Sequential(nn.Linear(8, 9)))
    refuse(path, r"missing 0\.bias|unexpected 0\.bias", nn.Sequential(nn.Linear(8, 8, bias=False)))
    sk.save(Linear24(8, 8), path)
    refuse(path, "put it in a Sequential", nn.Linear(8, 8))


def interrupt_load(path, model, step, monkeypatch):
    """Loads a file into a model, and interrupts that at a step of ``rebuild``."""

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rebuild, step, fail)
    with pytest.raises(KeyboardInterrupt):
        sk.load(model, path)


def test_a_failure_while_loading_leaves_the_model_whole(path, monkeypatch):
    sk.save(mixed(make()), path)
    model = mixed(make(1))
    before, modules = contents(model), list(model.modules())
    interrupt_load(path, model, "remove_masks", monkeypatch)
    assert contents(model) == before
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("saved", [make, lambda: mixed(make())], ids=["dense", "mixed"])
def test_a_failure_while_loading_leaves_a_compressed_model_whole(ratios, path, monkeypatch, saved):
    sk.save(saved(), path)
    model = make(1)
    sk.compress_(model)
    before, modules = contents(model), list(model.modules())
    interrupt_load(path, model, "guard_saving", monkeypatch)
    assert contents(model) == before and list(model.modules()) == modules
    sk.decompress_(model)
    assert contents(model) == contents(make(1))


@pytest.mark.parametrize("step", ["bytes_of", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(path, monkeypatch, step):
    sk.save(make(), path)
    old = path.read_bytes()
    calls = iter(range(30))

    def fail(*args, **kwargs):
        if step == "bytes_of" and next(calls) < 25:  # the digest, and half of the tensors
            return b""
        raise KeyboardInterrupt

    monkeypatch.setattr(_safetensors if step == "bytes_of" else os, step, fail)
    with pytest.raises(KeyboardInterrupt):
        sk.save(mixed(make(1)), path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
