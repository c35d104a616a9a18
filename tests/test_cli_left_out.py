"""``inspect --expect`` asks what prune pruned, says what it does not ask, and overlooks nothing else."""

import json

import pytest
import torch
from commands import call, prune, results, write_model

import sparsekit as sk
from sparsekit.masks import get_mask

transformers = pytest.importorskip("transformers")
UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))


@pytest.fixture
def partly(tmp_path):
    """A folder where down_proj is dense, though only up_proj was to be left out; with its masks."""
    folder = write_model(tmp_path / "model", num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name not in (UP, DOWN, "lm_head"))
    model.save_pretrained(folder)
    sk.save(model, folder / "masks.safetensors", format="masks")
    return folder


def test_without_a_report_what_has_no_mask_is_not_asked(partly, capsys):
    code, out, err = call(["inspect", partly, "--expect", "2:4"], capsys)
    assert (code, err) == (0, []) and out.count("2:4 holds") == 5 and out.count("dense (no stored mask)") == 2
    assert "not asked for 2:4: " in out and out.splitlines()[-1].endswith("; why is in brackets above")
    layers = results(["inspect", partly, "--expect", "2:4"], capsys)["layers"]
    found = {layer["name"]: layer["exempt"] for layer in layers}
    assert found[UP] == found[DOWN] == "no stored mask" and found["lm_head"] == "output head"
    (partly / "masks.safetensors").unlink()
    assert call(["inspect", partly, "--expect", "2:4"], capsys)[0] == 1


def test_with_a_report_only_what_it_left_out_is_not_asked(partly, capsys):
    (partly / "report.json").write_text(json.dumps({"skipped": [{"name": UP, "reason": "no calibration batch"}]}))
    code, out, err = call(["inspect", partly, "--expect", "2:4"], capsys)
    assert code == 1 and "dense (left out: no calibration batch)" in out
    assert err[0].startswith(f"sparsekit: {DOWN} breaks 2:4: row 0")
    (partly / "report.json").write_text("[]")  # is none of prune's
    assert call(["inspect", partly, "--expect", "2:4"], capsys)[0] == 0


MIXTRAL = {"num_local_experts": 3, "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 40}


def test_experts_are_pruned_written_inspected_and_loaded(tmp_path, capsys):
    dense, out = write_model(tmp_path / "dense", "Mixtral", **MIXTRAL), tmp_path / "out"
    found = results(prune(dense, out), capsys)
    experts = [layer for layer in found["layers"] if "experts" in layer["name"]]
    assert [layer["shape"] for layer in experts] == [[3, 80, 32], [3, 32, 40]]
    assert all(layer["sparsity"] == 0.5 and layer["error"] > 0 for layer in experts)
    assert found["sparsity"] == 0.5 and 0.2 < found["model_sparsity"] < 0.5
    inspected = {layer["name"]: layer for layer in results(["inspect", out, "--expect", "2:4"], capsys)["layers"]}
    assert all(inspected[layer["name"]]["asked"] == "2:4" for layer in experts)
    model = transformers.MixtralForCausalLM.from_pretrained(out)
    sk.load(model, out / "masks.safetensors")
    for layer in experts:
        name, _, key = layer["name"].rpartition(".")
        module = model.get_submodule(name)
        assert torch.equal(get_mask(module, key), module.get_parameter(key) != 0)
    with torch.no_grad():
        model.get_submodule(name).get_parameter(key)[2, 5, 4:8] = 1.0
    model.save_pretrained(out)
    code, _, err = call(["inspect", out], capsys)
    assert code == 1 and err[0].startswith(f"sparsekit: {layer['name']} breaks 2:4: row 69, input ")


def test_experts_that_are_not_pruned_are_not_overlooked(tmp_path, capsys):
    dense, out = write_model(tmp_path / "dense", "Mixtral", **MIXTRAL), tmp_path / "out"
    results(prune(dense, out, "--only", "attn"), capsys)
    code, _, err = call(["inspect", out, "--expect", "2:4"], capsys)
    assert code == 1 and "experts" in err[0] and "4 of 4 kept" in err[0]


def test_a_file_of_ones_own_with_experts(tmp_path, capsys):
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**MIXTRAL, "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2})
    )
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: "experts" in name)
    sk.save(model, tmp_path / "own.safetensors")
    found = results(["inspect", tmp_path / "own.safetensors", "--expect", "2:4"], capsys)
    assert [(layer["shape"], layer["asked"]) for layer in found["layers"]] == [
        ([3, 80, 32], "2:4"),
        ([3, 32, 40], "2:4"),
    ]
    fresh = transformers.MixtralForCausalLM(model.config)
    sk.load(fresh, tmp_path / "own.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        one, other = (each.model.layers[0].mlp.experts for each in (model, fresh))
        assert torch.equal(get_mask(one, name), get_mask(other, name))
        assert torch.equal(one.get_parameter(name), other.get_parameter(name))
