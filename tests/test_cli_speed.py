"""``sparsekit compress`` and ``sparsekit bench``: what they write, what it computes, and what is refused."""

import json

import pytest
import torch
from commands import call, prune, refusal, results, write_model

import sparsekit as sk
from sparsekit.nn import Linear24

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)

QUICK = ("--budget", 0.01)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    from sparsekit.cli import main

    folder = tmp_path_factory.mktemp("models")
    arguments = prune(write_model(folder / "dense"), folder / "sparse")
    assert main([str(each) for each in arguments]) == 0
    return folder / "sparse"


def test_compress_writes_what_loads_again(pruned, tmp_path, capsys, ratios):
    import transformers

    out = tmp_path / "packed"
    found = results(["compress", pruned, "--out", out, "--tokens", 1, 16], capsys)
    assert found == json.loads((out / "compress.json").read_text()) and found["tokens"] == [1, 16]
    decisions = {layer["name"]: layer["decision"] for layer in found["layers"]}
    assert decisions.pop("lm_head") == "prepacked" and set(decisions.values()) == {"2:4"} and len(decisions) == 14
    assert found["bytes_after"] < found["bytes_before"] and found["machine"]["torch"] == torch.__version__
    names = {path.name for path in out.iterdir()}
    assert {"compressed.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names

    code = (out / "README.md").read_text().split("\n    ")[1:]
    lines = "\n".join(line.splitlines()[0] for line in code).replace("FOLDER", repr(str(out)))
    namespace = {}
    exec(lines, namespace)
    model, tokens = namespace["model"], torch.arange(20)[None]
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear24)
    dense = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
    inspected = results(["inspect", out, "--expect", "2:4", "--only", "proj"], capsys)
    assert inspected["stored_bytes"] == inspected["packed_bytes"] < inspected["dense_bytes"]

    again = results(["compress", out, "--out", tmp_path / "again", "--tokens", 1], capsys)
    assert {layer["decision"] for layer in again["layers"]} == {"2:4", "prepacked"}


def test_compress_adds_to_the_folder_and_bench_times_it(pruned, tmp_path, capsys, ratios):
    for path in pruned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results(["compress", tmp_path, "--tokens", 4], capsys)
    assert "14 of" not in call(["inspect", tmp_path], capsys)[1]
    code, line = refusal(["compress", tmp_path], capsys)
    assert code == 2 and line.endswith(
        "compressed.safetensors is there: name another folder with --out, or --overwrite"
    )
    code, out, _ = call(["compress", tmp_path, "--overwrite", "--tokens", 4], capsys)
    assert code == 0 and "15 of 15 layers swapped" in out and "3.00x" in out

    ratios["compressed"] = 1.5
    found = results(["bench", tmp_path, "--tokens", 4, 8, "--seconds", 0.01], capsys)
    assert list(found["models"]) == ["4", "8"]
    for count, timings in found["models"].items():
        assert set(timings) == {"plain", "prepacked", "compressed"} and timings["plain"]["ratio"] == 1
        for timing in timings.values():
            assert timing["tokens_per_second"] == pytest.approx(int(count) / timing["seconds"])
    kinds = {(layer["kind"], tuple(layer["shape"])): layer for layer in found["layers"]}
    assert set(kinds) == {
        ("Linear24", (32, 32)),
        ("Linear24", (48, 32)),
        ("Linear24", (32, 48)),
        ("PrepackedLinear", (256, 32)),
    }
    assert len(kinds["Linear24", (32, 32)]["layers"]) == 8
    assert kinds["Linear24", (32, 32)]["timings"]["4"]["ratio"] == 1.5
    code, out, err = call(["bench", tmp_path, "--tokens", 4, "--seconds", 0.01], capsys)
    assert (code, err) == (0, []) and "8 of 32x32" in out and "slower" in out


def test_bench_says_where_nothing_wins(pruned, capsys, ratios):
    ratios["2:4"] = ratios["prepacked"] = 0.9
    code, out, err = call(["bench", pruned, "--tokens", 2, "--seconds", 0.01], capsys)
    assert (code, err) == (0, []) and "no layer is compressed: on this machine nothing was faster than dense" in out
    assert not (pruned / "bench.json").exists() and not (pruned / "compressed.safetensors").exists()


def test_really_measured(pruned, tmp_path, capsys):
    found = results(["compress", pruned, "--out", tmp_path / "out", "--tokens", 8, *QUICK], capsys)
    assert all(layer["timings"]["8"]["plain"]["ratio"] == 1 for layer in found["layers"])
    found = results(["bench", tmp_path / "out", "--tokens", 8, "--seconds", 0.01, *QUICK], capsys)
    assert found["models"]["8"]["compressed"]["tokens_per_second"] > 0


def test_an_encoder(tmp_path, capsys, ratios):
    model = write_model(tmp_path / "dense", "Bert", "ForMaskedLM")
    results(prune(model, tmp_path / "sparse"), capsys)
    found = results(["compress", tmp_path / "sparse", "--out", tmp_path / "out", "--tokens", 16], capsys)
    assert sum(layer["decision"] == "2:4" for layer in found["layers"]) == 13
    ratios["compressed"] = 1.5
    assert results(["bench", tmp_path / "out", "--tokens", 16, "--seconds", 0.01], capsys)["layers"]


def test_what_computes_something_else_is_refused(pruned, tmp_path, capsys, ratios):
    from sparsekit.cli import compress

    results(["compress", pruned, "--out", tmp_path / "out", "--tokens", 4], capsys)
    import transformers

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.LlamaForCausalLM(config).eval()
    sk.load(model, tmp_path / "out" / "compressed.safetensors")
    tokens = torch.arange(4)[None]
    expected = model(tokens).logits.detach()
    compress.check_same(model, expected, tokens, "compressed")
    model.model.layers[0].mlp.up_proj.values.data.neg_()
    with pytest.raises(RuntimeError, match=r"the compressed model computes something else: off by "):
        compress.check_same(model, expected, tokens, "compressed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "nowhere"), "there is no folder nowhere"),
        (("bench", "nowhere"), "there is no folder nowhere"),
        (("compress", "PRUNED", "--tokens", "65"), "--tokens must be from 1 to 64, got 65"),
        (("bench", "PRUNED", "--tokens", "0", "1"), "--tokens must be from 1 to 64, got 0 1"),
        (("compress", "PRUNED", "--out", "PRUNED"), "is not empty: name another folder, or --overwrite"),
        (("compress", "PRUNED", "--budget", "-1"), "--budget must be positive, got -1.0"),
        (("bench", "PRUNED", "--seconds", "0"), "--seconds must be positive, got 0.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments(arguments, said, pruned, capsys):
    code, line = refusal([pruned if each == "PRUNED" else each for each in arguments], capsys)
    assert code == 2 and said in line
    assert not (pruned / "compressed.safetensors").exists()
