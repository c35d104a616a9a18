"""``sparsekit convert``: packed checkpoints become dense ones that transformers loads, and 2:4 models packed ones."""

import json

import pytest
import torch
from commands import call, prune, refusal, results, write_model
from safetensors.torch import load_file, save_file

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)
SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A 2:4 folder as prune writes it."""
    folder = tmp_path_factory.mktemp("convert")
    write_model(folder / "model")
    assert call_quietly(prune(folder / "model", folder / "sparse", "--method", "magnitude")) == 0
    return folder / "sparse"


def call_quietly(arguments):
    from sparsekit.cli import main

    return main([*map(str, arguments), "--json"])


def packed_folder(sparse, folder, change=lambda state: state, names=("{}", "{}"), shards=1, key="quantization_config"):
    """The folder as llm-compressor wrote it, in the names of one of its versions."""
    folder.mkdir()
    state, dense = {}, load_file(sparse / "model.safetensors")
    for name, weight in dense.items():
        layer, part = name.rsplit(".", 1)
        if part == "weight" and layer.endswith("proj"):
            values, bits, _ = sk.pack24(weight)
            base = f"{layer}.weight" if names == "weight" else layer
            parts = {"compressed": values, "bitmask": bits, "shape": torch.tensor(weight.shape).view(2, 1)}
            state |= {f"{base}.{key}": tensor for key, tensor in parts.items()}
        else:
            state[name] = weight
    state = change(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
        places = {name: files[index % shards] for index, name in enumerate(sorted(state))}
        for file in files:
            save_file({name: state[name] for name, place in places.items() if place == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = json.loads((sparse / "config.json").read_text())
    config[key] = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((sparse / name).read_bytes())
    return folder


@pytest.mark.parametrize("names", ["layer", "weight"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_packed_to_dense(names, shards, key, sparse, tmp_path, capsys):
    import transformers

    folder = packed_folder(sparse, tmp_path / "packed", names=names, shards=shards, key=key)
    found = results(["convert", folder, "--out", tmp_path / "dense"], capsys)
    assert found["weights"] == 14 and found["bytes_after"] > found["bytes_before"]
    want, got = load_file(sparse / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[name], tensor) for name, tensor in got.items())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config and "compression_config" not in config
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    sk.load(model, tmp_path / "dense" / "masks.safetensors")
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(get_mask(layer), layer.weight != 0) and str(get_mask_info(layer).pattern) == "2:4"
    inspected = results(["inspect", tmp_path / "dense", "--expect", "2:4"], capsys)
    assert inspected["ok"] and sum(row["asked"] == "2:4" for row in inspected["layers"]) == 14


def test_dense_to_packed_and_back(sparse, tmp_path, capsys):
    found = results(["convert", sparse, "--out", tmp_path / "packed", "--to", "sparse-24-bitmask"], capsys)
    assert found["weights"] == 14 and found["bytes_after"] < found["bytes_before"]
    state = load_file(tmp_path / "packed" / "model.safetensors")
    assert state["model.layers.0.mlp.up_proj.shape"].tolist() == [[48], [32]]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["sparsity_config"]["ignore"] == ["lm_head"]
    assert config["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert results(["convert", tmp_path / "packed", "--out", tmp_path / "dense"], capsys)["weights"] == 14
    want, got = load_file(sparse / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(want[name], tensor) for name, tensor in got.items())
    code, line = refusal(["convert", tmp_path / "packed", "--out", tmp_path / "x", "--to", "sparse-24-bitmask"], capsys)
    assert code == 2 and "is packed already" in line


def test_stored_masks_go_along(sparse, tmp_path, capsys):
    """Of other patterns, too, which no packed weight tells; the README says how to load them."""
    import transformers

    write_model(tmp_path / "model")
    assert call_quietly(prune(tmp_path / "model", tmp_path / "other", "--pattern", "1:4", "--method", "magnitude")) == 0
    masks = (tmp_path / "other" / "masks.safetensors").read_bytes()
    for arguments in (["other", "same"], ["other", "packed", "sparse-24-bitmask"], ["packed", "back"]):
        source, out = (tmp_path / name for name in arguments[:2])
        results(["convert", source, "--out", out, "--to", *(arguments[2:] or ["dense"])], capsys)
        assert (out / "masks.safetensors").read_bytes() == masks
        assert all(row["problem"] is None for row in results(["inspect", out], capsys)["layers"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    sk.load(model, tmp_path / "back" / "masks.safetensors")
    assert str(get_mask_info(model.model.layers[0].mlp.up_proj).pattern) == "1:4"


def test_left_over_metadata_is_taken_out(sparse, tmp_path, capsys):
    folder = packed_folder(sparse, tmp_path / "packed", change=lambda _: load_file(sparse / "model.safetensors"))
    assert results(["convert", folder, "--out", tmp_path / "dense"], capsys)["weights"] == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / "masks.safetensors").exists()


def test_float8_with_scales(sparse, tmp_path, capsys):
    def quantized(state):
        for name in [name for name in state if name.endswith(".compressed")]:
            layer = name.removesuffix(".compressed")
            state[name] = state[name].to(torch.float8_e4m3fn)
            state[f"{layer}.weight_scale"] = torch.full((int(state[f"{layer}.shape"][0]), 1), 2.0)
        return state

    folder = packed_folder(sparse, tmp_path / "packed", change=quantized)
    assert results(["convert", folder, "--out", tmp_path / "dense"], capsys)["weights"] == 14
    want, got = (load_file(path / "model.safetensors") for path in (sparse, tmp_path / "dense"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(got[name], want[name].to(torch.float8_e4m3fn).float() * 2)
    assert not any("scale" in name for name in got)


@pytest.mark.parametrize("command", ["prune", "compress", "bench"])
def test_other_commands_name_it(command, sparse, tmp_path, capsys):
    folder = packed_folder(sparse, tmp_path / "packed")
    (folder / "text.txt").write_text("text " * 500)
    code, line = refusal(prune(folder, tmp_path / "x") if command == "prune" else [command, folder], capsys)
    assert code == 2 and f"sparsekit convert {folder} --out" in line


def bad_bitmask(state):
    return state | {"model.layers.0.mlp.up_proj.bitmask": torch.full((48, 4), 255, dtype=torch.uint8)}


def lost_part(state):
    return {name: tensor for name, tensor in state.items() if name != "model.layers.0.mlp.up_proj.shape"}


@pytest.mark.parametrize(
    ("change", "words"),
    [(bad_bitmask, "does not keep exactly two of every four"), (lost_part, "up_proj.shape' is missing")],
)
def test_malformed_is_refused_and_inspected(change, words, sparse, tmp_path, capsys):
    folder = packed_folder(sparse, tmp_path / "packed", change=change)
    for arguments in (["convert", folder, "--out", tmp_path / "x"], ["inspect", folder], ["inspect", folder, "--json"]):
        code, line = refusal(arguments, capsys)
        assert code == 1 and words in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "gptq"}, "names the format gptq;"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "names the format marlin-24;"),
        ({"config_groups": {"0": {"format": "pack-quantized"}}}, "names the format pack-quantized;"),
    ],
)
def test_other_formats_are_refused(said, words, sparse, tmp_path, capsys):
    folder = packed_folder(sparse, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    code, line = refusal(["convert", folder, "--out", tmp_path / "x"], capsys)
    assert code == 2 and words in line and not (tmp_path / "x").exists()


def test_nothing_to_pack(tmp_path, capsys):
    folder = write_model(tmp_path / "model")
    code, line = refusal(["convert", folder, "--out", tmp_path / "x", "--to", "sparse-24-bitmask"], capsys)
    assert code == 1 and "no linear layer whose weight is 2:4" in line and not (tmp_path / "x").exists()


def test_a_packed_folder_is_inspected(sparse, tmp_path, capsys):
    folder = packed_folder(sparse, tmp_path / "packed", shards=3)
    found = results(["inspect", folder, "--expect", "2:4"], capsys)
    rows = {row["name"]: row for row in found["layers"]}
    assert found["ok"] and rows["model.layers.0.mlp.up_proj"]["pattern"] == "2:4"
    assert rows["model.layers.0.mlp.up_proj"]["stored_bytes"] == 48 * 16 * 4 + 48 * 4 + 16
    code, line = refusal(["inspect", folder / "model-00001-of-00003.safetensors"], capsys)
    assert code == 1 and "is missing" in line  # its other parts are in other files


def test_what_is_not_understood_is_said(sparse, tmp_path, capsys):
    def quantized(state):
        name = "model.layers.0.mlp.up_proj"
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        return state | {f"{name}.weight_packed": torch.zeros(48, 4, dtype=torch.int32)}

    folder = packed_folder(sparse, tmp_path / "packed", change=quantized)
    code, _, lines = call(["inspect", folder], capsys)
    assert code == 0 and "does not know the form of model.layers.0.mlp.up_proj.weight_packed (1 in all)" in lines[0]
    code, _, lines = call(["inspect", folder, "--expect", "2:4"], capsys)
    assert code == 1 and "up_proj.weight_packed" in lines[0]
    found = json.loads(call(["inspect", folder, "--expect", "2:4", "--json"], capsys)[1])
    assert found["not_understood"] == ["model.layers.0.mlp.up_proj.weight_packed"] and not found["ok"]
    float8 = {"a.weight": torch.tensor([[1.0, 0, 2, 0]]).to(torch.float8_e4m3fn)}
    save_file(float8, tmp_path / "float8.safetensors")
    assert results(["inspect", tmp_path / "float8.safetensors"], capsys)["layers"][0]["zeros"] == 2
