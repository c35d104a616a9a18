"""``sparsekit inspect``: patterns that hold, the first place where one breaks, and files of every kind."""

import copy
import shutil

import pytest
import torch
from commands import call, prune, refusal, results, write_model
from safetensors.torch import load_file, save_file
from torch import nn

import sparsekit as sk
from sparsekit.cli.patterns import first_break, found_pattern, packed_bytes, tier_shares
from sparsekit.masks import MaskInfo, Pattern, set_mask
from sparsekit.nn import Linear24

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder that ``prune`` wrote."""
    from sparsekit.cli import main

    folder = tmp_path_factory.mktemp("models")
    assert main([str(each) for each in prune(write_model(folder / "dense"), folder / "sparse")]) == 0
    return folder / "sparse"


@pytest.fixture
def broken(pruned, tmp_path):
    """The same folder, after somebody fine-tuned without the masks: one weight has come back."""
    for path in pruned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    row = weights[f"{LAYER}.weight"][3]
    row[torch.arange(8, 12)[row[8:12] == 0][0]] = 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def kept(*rows):
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        (("xxxx",), "dense"),
        (("....",), "all zero"),
        (("xx..x..x", ".x.xxx.."), "2:4"),
        (("x......x", ".x...x.."), "1:4"),
        (("xxx..x..", "xxxx...."), "4:8"),
        (("xxxx....xx..", "..xxxxxxx..."), "unstructured"),
        (("xxxx....xxxx", "x.xxxxxxx..."), "33.33%"),
        (("x...x...x...x", ".x..x....x..x"), "1:4"),
        (("....x...........", "x..............."), "1:16"),
    ],
)
def test_found_pattern(rows, pattern):
    assert found_pattern(kept(*rows)) == pattern


@pytest.mark.parametrize(
    ("rows", "pattern", "where"),
    [
        (("xx..x..x", "x.x.x..."), "2:4", None),
        (("xx..x..x", ".xx.xxx.", "xxxxxxxx"), "2:4", "row 1, inputs 4 to 7: 3 of 4 kept"),
        (("xx..xxx",), "2:4", None),
        (("xx",), "2:4", None),
        (("xx..", "xxx."), "50%", "row 1: 1 of 4 weights are zero, 2 are needed"),
        (("x...", "xxx."), "50% layer", None),
        (("x..x", "xxx."), "50% layer", "3 of 8 weights are zero, 4 are needed"),
        (("xx..", "xx.."), "50% 2x2", None),
        (("xx.x", "xx.."), "50% 2x2", "0 of 2 blocks are zero, 1 are needed"),
        (("xxxx",), "tiers 16x16 k=10", None),
    ],
)
def test_first_break(rows, pattern, where):
    assert first_break(kept(*rows), Pattern.parse(pattern)) == where


def test_bytes_are_those_of_the_packed_form():
    weight, _ = sk.nm_prune(torch.randn(12, 18), 2, 4)
    assert packed_bytes(weight, weight != 0, None) == sk.pack24(weight).nbytes
    assert packed_bytes(torch.ones(4, 8), torch.ones(4, 8) > 0, None) is None
    tiers = Pattern.parse("tiers 16x16 k=10")
    few = torch.zeros(32, 16)
    few[:2, :5] = 1
    assert tier_shares(few != 0, tiers)[1] == "0% dense, 0% 2:4, 100% top-10"
    assert packed_bytes(few, few != 0, tiers) < few.nbytes / 4


@pytest.mark.parametrize("pattern", ["tiers 4x8 k=3", "tiers 16x4 k=3", "tiers 16x12 k=3", "tiers 256x16 k=3"])
def test_blocks_of_tiers_that_are_not_packed(pattern, tmp_path, capsys):
    layer = nn.Linear(48, 32, bias=False)
    set_mask(layer, torch.ones(32, 48, dtype=torch.bool), MaskInfo(Pattern.parse(pattern), 1))
    sk.save(nn.Sequential(layer), tmp_path / "tiers.safetensors")
    found = results(["inspect", tmp_path / "tiers.safetensors"], capsys)["layers"][0]
    assert found["pattern"] == "100% dense, 0% 2:4, 0% top-3" and found["packed_bytes"] is None


def test_tiers_of_float64_are_shown_and_not_packed():
    tiers, few = Pattern.parse("tiers 16x16 k=10"), torch.eye(16, dtype=torch.float64)
    assert tier_shares(few != 0, tiers)[1] == "0% dense, 100% 2:4, 0% top-10"
    assert packed_bytes(few, few != 0, tiers) is None


def test_a_pruned_folder(pruned, capsys):
    found = results(["inspect", pruned], capsys)
    assert found["ok"] and found["sparsity"] == pytest.approx(0.4, abs=0.1) and len(found["layers"]) == 15
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers[LAYER]["pattern"] == layers[LAYER]["asked"] == "2:4" and layers[LAYER]["problem"] is None
    assert layers["lm_head"]["pattern"] == "dense (output head)" and layers["lm_head"]["asked"] is None
    code, out, err = call(["inspect", pruned, "--only", "up_proj", "--expect", "2:4"], capsys)
    assert (code, err) == (0, []) and out.count("2:4 holds") == 2 and "15 layers" not in out


def test_the_first_break_is_named(broken, capsys):
    for options in ((), ("--expect", "2:4")):  # the stored mask alone says so too
        code, out, err = call(["inspect", broken, *options], capsys)
        assert code == 1 and len(err) == 1 and "2:4 BROKEN" in out
        assert err[0].startswith(f"sparsekit: {LAYER} breaks 2:4: row 3, input ")
    (broken / "masks.safetensors").unlink()
    assert call(["inspect", broken], capsys)[0] == 0  # nothing is asked of it
    code, _, err = call(["inspect", broken, "--expect", "2:4"], capsys)
    assert code == 1 and err == [f"sparsekit: {LAYER} breaks 2:4: row 3, inputs 8 to 11: 3 of 4 kept"]


def test_another_pattern_is_not_the_one_expected(pruned, capsys):
    code, _, err = call(["inspect", pruned, "--expect", "1:4"], capsys)
    assert code == 1 and "breaks 1:4: row 0, inputs 0 to 3: 2 of 4 kept" in err[0]
    assert call(["inspect", pruned, "--expect", "50%"], capsys)[0] == 0
    assert call(["inspect", pruned, "--expect", "2:5"], capsys)[0] == 1


def test_conv1d_groups_run_down_its_columns(tmp_path, capsys):
    changes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    folder = write_model(tmp_path / "dense", "GPT2", "LMHeadModel", **changes)
    results(prune(folder, tmp_path / "out"), capsys)
    found = results(["inspect", tmp_path / "out", "--expect", "2:4"], capsys)
    assert {layer["asked"] for layer in found["layers"]} == {"2:4"}
    assert found["layers"][0]["name"].startswith("transformer.h.0")


def test_names_that_transformers_changes_on_disk(tmp_path, capsys):
    changes = {"image_size": 8, "patch_size": 4, "vocab_size": None}
    folder = write_model(tmp_path / "dense", "ViT", "Model", **changes)
    command = ["prune", "--model", folder, "--out", tmp_path / "out", "--method", "magnitude", "--calibration", "none"]
    pruned = results(command, capsys)
    assert "3 inputs do not fill one group" in pruned["skipped"][0]["reason"]
    found = results(["inspect", tmp_path / "out", "--expect", "2:4"], capsys)
    asked = [layer["name"] for layer in found["layers"] if layer["asked"]]
    assert asked == [layer["name"] for layer in pruned["layers"]]
    assert [layer["pattern"] for layer in found["layers"] if not layer["asked"]] == ["dense (too few inputs)"]
    code, _, err = call(["inspect", folder, "--expect", "2:4"], capsys)
    assert code == 1 and ".layer." in err[0]  # the names on disk: better asked than overlooked
    code, line = refusal(["bench", folder], capsys)
    assert code == 2 and line.endswith("a model that reads tokens is needed, ViTModel does not")


def test_a_checkpoint_of_the_base_model(pruned, tmp_path, capsys):
    weights = load_file(pruned / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((pruned / "config.json").read_bytes())
    found = results(["inspect", tmp_path, "--expect", "2:4"], capsys)
    assert len(found["layers"]) == 15 and "embed_tokens" not in {layer["name"] for layer in found["layers"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_a_denormal_weight_is_not_zero(dtype, tmp_path, capsys):
    tiny = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float8_e5m2: 2.0**-16}[dtype]
    save_file({"layer.weight": torch.tensor([[tiny, -tiny, 0.0, -0.0]]).to(dtype)}, tmp_path / "one.safetensors")
    torch.set_flush_denormal(True)
    try:
        (layer,) = results(["inspect", tmp_path / "one.safetensors"], capsys)["layers"]
    finally:
        torch.set_flush_denormal(False)
    assert (layer["zeros"], layer["pattern"]) == (2, "2:4")


def test_files_alone(pruned, tmp_path, capsys):
    found = results(["inspect", pruned / "model.safetensors", "--only", "proj", "--expect", "2:4"], capsys)
    assert len(found["layers"]) == 14
    assert call(["inspect", pruned / "model.safetensors", "--expect", "2:4"], capsys)[0] == 1  # the embedding
    code, line = refusal(["inspect", pruned / "masks.safetensors"], capsys)
    assert code == 1 and line.endswith("it holds masks alone, their weights are in the other files of its folder")
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    sk.prune_(model[1:], sk.Magnitude("2:4"))
    sk.save(model, tmp_path / "own.safetensors")
    found = results(["inspect", tmp_path / "own.safetensors", "--expect", "2:4"], capsys)
    assert [(layer["name"], layer["asked"]) for layer in found["layers"]] == [("1", "2:4")]


def test_a_compressed_file(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32))
    sk.prune_(model, sk.Magnitude("2:4"))
    before = copy.deepcopy(model[0].weight)
    model[0] = Linear24.from_linear(model[0])
    sk.save(model, tmp_path / "compressed.safetensors")
    found = results(["inspect", tmp_path / "compressed.safetensors"], capsys)["layers"]
    assert [layer["pattern"] for layer in found] == ["2:4", "2:4"]
    assert found[0]["zeros"] == int((before == 0).sum()) and found[0]["stored_bytes"] == found[0]["packed_bytes"]
    assert found[1]["stored_bytes"] == found[1]["dense_bytes"] == 64 * 32 * 4
    assert results(["inspect", tmp_path], capsys)["layers"] == found


def test_tiers(tmp_path, capsys):
    layer = nn.Linear(32, 32, bias=False)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16, :16], mask[16:, :2] = True, True
    mask[:16, 16:].view(16, 4, 4)[..., :2] = True
    layer.weight.data[~mask] = 0
    set_mask(layer, mask, MaskInfo(Pattern.parse("tiers 16x16 k=10"), 1))
    sk.save(nn.Sequential(layer), tmp_path / "tiers.safetensors")
    found = results(["inspect", tmp_path / "tiers.safetensors"], capsys)["layers"][0]
    assert found["pattern"] == "25% dense, 50% 2:4, 25% top-10" and found["asked"] == "tiers 16x16 k=10"
    code, line = refusal(["inspect", tmp_path / "tiers.safetensors", "--expect", "tiers 16x16 k=10"], capsys)
    assert code == 2 and "blocks of tiers may be dense, so every weight has that pattern" in line


def test_a_convolution_by_channels(tmp_path, capsys):
    model = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False))
    sk.prune_(model, sk.Magnitude("2:4"))
    model[0].weight.data[2, :3, 1, 1] = 1
    sk.save(model, tmp_path / "conv.safetensors")
    code, _, err = call(["inspect", tmp_path / "conv.safetensors"], capsys)
    assert code == 1 and err[0].startswith("sparsekit: 0 breaks 2:4: row 2, input ")


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", 1, "is truncated, or no safetensors file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", 1, "is truncated, or no safetensors file"),
    ],
)
def test_broken_files(content, code, said, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(content)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found, line = refusal(["inspect", path], capsys)
        assert found == code and str(tmp_path / "model.safetensors") in line and said in line


def test_an_altered_file_and_what_is_none(pruned, tmp_path, capsys):
    altered = tmp_path / "altered"
    shutil.copytree(pruned, altered)
    data = bytearray((altered / "masks.safetensors").read_bytes())
    data[-1] ^= 1
    (altered / "masks.safetensors").write_bytes(data)
    for path in (altered, altered / "masks.safetensors"):
        code, line = refusal(["inspect", path], capsys)
        assert code == 1 and f"cannot read {altered / 'masks.safetensors'}: it was altered" in line
    assert refusal(["inspect", tmp_path / "nothing"], capsys) == (
        2,
        f"sparsekit: there is no folder {tmp_path}/nothing",
    )
    (tmp_path / "weights.pt").touch()
    assert (
        "is no .safetensors file, and nothing else is read" in refusal(["inspect", tmp_path / "weights.pt"], capsys)[1]
    )
    assert "has no layer that matches 'x{9}'" in refusal(["inspect", pruned, "--only", "x{9}"], capsys)[1]
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "norm.safetensors")
    assert refusal(["inspect", tmp_path / "norm.safetensors"], capsys)[0] == 1


def test_a_hostile_name_is_text(tmp_path, capsys):
    name = "[red]\x1b[31m<script>"
    save_file({f"{name}.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    code, out, err = call(["inspect", tmp_path / "model.safetensors", "--expect", "2:4"], capsys)
    assert code == 1 and "[red]\N{REPLACEMENT CHARACTER}[31m<script>" in out and "\x1b" not in out + err[0]
