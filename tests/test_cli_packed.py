"""Commands read a folder that ``save_pretrained`` of a compressed model wrote."""

import json
from pathlib import Path

import pytest
import torch
from commands import call, write_model

import sparsekit as sk
from sparsekit._replace import guard_saving
from sparsekit.cli.bench import Bench
from sparsekit.cli.models import load_dense
from sparsekit.nn import Linear24, Nf4Linear

pytest.importorskip("transformers")
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    path = write_model(tmp_path / "packed")
    model = load_dense(str(path), "cpu")
    sk.prune_(model, sk.Magnitude("2:4"))
    model.set_submodule(NAME, Linear24.from_linear(model.get_submodule(NAME)))
    guard_saving(model)
    sk.quantize_(model, where=lambda name, _: name.endswith("1.mlp.up_proj"))
    model.save_pretrained(path)
    return path


def test_inspect_unpacks_it(folder, capsys):
    code, out, _ = call(["inspect", folder, "--json"], capsys)
    layers = {layer["name"]: layer for layer in json.loads(out)["layers"]}
    assert code == 0 and layers[NAME]["pattern"] == layers[NAME.replace("0", "1")]["pattern"] == "2:4"
    assert layers[NAME]["shape"] == [48, 32] and layers[NAME]["stored_bytes"] == 48 * 16 * 4 + 48 * 4
    code, _, error = call(["inspect", folder, "--expect", "2:4"], capsys)
    assert code == 0, error


def test_it_is_loaded_dense_and_packed(folder):
    dense, models = load_dense(str(folder), "cpu"), Bench(folder=Path(folder), device="cpu", tokens=(4,)).models()
    sparse, tokens = models["compressed"], torch.arange(8)[None]
    assert type(sparse.get_submodule(NAME)) is Linear24
    assert type(sparse.get_submodule(NAME.replace("0", "1"))) is Nf4Linear
    assert all(type(each.get_submodule(NAME)) is torch.nn.Linear for each in (dense, models["plain"]))
    assert sk.masks.get_mask(dense.get_submodule(NAME)) is not None
    with torch.no_grad():
        outputs = [each(tokens).logits for each in (sparse, dense, models["plain"])]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])


def test_a_damaged_one_is_named(folder, capsys):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, error = call(["inspect", folder], capsys)
    assert code != 0 and "model.safetensors: it was altered" in error[0]
