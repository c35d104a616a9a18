"""``sparsekit compress`` and ``sparsekit bench``: what they write, what it computes, and what is refused."""

import json

import pytest
import torch
from commands import call, prune, refusal, results, write_model
from helpers import sparse_linear

import sparsekit as sk
from sparsekit._timing import Timing
from sparsekit.compress.report import CompressLayerReport
from sparsekit.nn import Linear24, PrepackedLinear, TieredLinear

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
    inspected = results(["inspect", out, "--expect", "2:4"], capsys)
    assert {layer["name"] for layer in inspected["layers"] if layer["asked"] is None} == {"lm_head"}
    assert inspected["stored_bytes"] == inspected["packed_bytes"] < inspected["dense_bytes"]

    again = results(["compress", out, "--out", tmp_path / "again", "--tokens", 1], capsys)
    assert {layer["decision"] for layer in again["layers"]} == {"2:4", "prepacked"}


def test_compress_adds_to_the_folder_and_bench_times_it(pruned, tmp_path, capsys, ratios):
    for path in pruned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    results(["compress", tmp_path, "--tokens", 4], capsys)
    assert "15 layers" in call(["inspect", tmp_path], capsys)[1]
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
    assert (code, err) == (0, []) and "8 of 32x32" in out


def test_bench_says_where_it_is_slower(capsys):
    from sparsekit.cli.bench import show

    def found(**ratios):
        timings = {"tokens_per_second": 8.0, "ratio": 1.0, "best_dense": 1.0}
        models = {count: {"plain": timings, "compressed": {**timings, **ratios}} for count in (4, 16)}
        layers = [{"layers": ["a"], "shape": [2, 4], "kind": "Linear24", "timings": {4: timings, 16: timings}}]
        return {"models": models, "layers": layers}

    show(found(ratio=1.5, best_dense=0.83))
    assert "\nslower: 0.83x the best dense at 4, 0.83x the best dense at 16\n" in capsys.readouterr().out
    show(found(ratio=0.5))
    assert "\nslower: 0.50x plain at 4, 0.50x plain at 16\n" in capsys.readouterr().out
    show(found(ratio=0.98, best_dense=0.98))
    assert "\nslower than dense: nowhere\n" in capsys.readouterr().out


def test_tiered_layers_of_other_shares_are_timed_on_their_own(ratios):
    from sparsekit.cli.speed import layer_speeds

    def layer(dense_blocks):
        linear = torch.nn.Linear(64, 64, bias=False)
        linear.weight.data.view(4, 16, 64)[dense_blocks:] = 0
        return TieredLinear.from_linear(linear)

    ratios["compressed"] = 1.5
    model = torch.nn.Sequential(layer(1), layer(3), layer(1))
    found = layer_speeds(model, [4], evict_cache=False, budget=0.01, progress=lambda kinds: kinds)
    assert [(each["kind"], each["layers"]) for each in found] == [("TieredLinear", ["0", "2"]), ("TieredLinear", ["1"])]


def test_layers_of_other_times_are_other_rows(capsys):
    from sparsekit.cli.compress import show

    layers = [
        CompressLayerReport(
            name, (64, 64), "tiered", "fastest", {4: 1}, {4: {"tiered": Timing(1.0, ratio, 1.0, ratio, 0.0)}}, names
        )
        for name, ratio, names in (("a", 2.0, {4: "tiered"}), ("b", 1.1, {4: "tiered"}), ("c", 2.0, {4: "tiered"}))
    ]
    show(sk.CompressReport(tuple(layers), 8, 4, 0.0, 0.0))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(row) for row in rows[1:3]] == [
        "2 of 64x64 tiered 2.00x (2.00x) fastest",
        "1 of 64x64 tiered 1.10x (1.10x) fastest",
    ]


def test_what_was_not_pruned_is_asked_in_the_packed_file_too(tmp_path, capsys, ratios):
    dense, out = write_model(tmp_path / "dense"), tmp_path / "out"
    results(prune(dense, tmp_path / "sparse", "--only", "up_proj"), capsys)
    ratios["prepacked"] = 0.9
    results(["compress", tmp_path / "sparse", "--out", out, "--tokens", 4], capsys)
    code, shown, err = call(["inspect", out, "--expect", "2:4"], capsys)
    assert code == 1 and "_proj breaks 2:4: row 0, inputs 0 to 3: 4 of 4 kept" in err[0]
    assert "15 layers" in shown and shown.count("2:4 holds") == 2 and shown.count("2:4 BROKEN") == 12
    assert "dense (output head)" in shown and "embed_tokens" not in shown
    assert call(["inspect", out, "--expect", "2:4", "--only", "up_proj"], capsys)[0] == 0


def test_bench_says_where_nothing_wins(pruned, capsys, ratios):
    ratios["2:4"] = ratios["prepacked"] = 0.9
    code, out, err = call(["bench", pruned, "--tokens", 2, "--seconds", 0.01], capsys)
    assert (code, err) == (0, []) and "no layer is compressed: on this machine nothing was faster than dense" in out
    found = results(["bench", pruned, "--tokens", 2, "--seconds", 0.01], capsys)["models"]["2"]
    assert found["compressed"] == found["plain"] and found["plain"]["ratio"] == 1  # it is the same model
    assert not (pruned / "bench.json").exists() and not (pruned / "compressed.safetensors").exists()


def test_bench_does_not_time_the_best_dense_against_itself(tmp_path, capsys, ratios):
    ratios |= {"2:4": 0.9, "compressed": 2.0}
    found = results(["bench", write_model(tmp_path), "--tokens", 2, "--seconds", 0.01], capsys)
    assert {layer["kind"] for layer in found["layers"]} == {"PrepackedLinear"}
    timings = found["models"]["2"]
    assert timings["compressed"] == timings["prepacked"] != timings["plain"]


def test_layers_that_are_the_best_dense_are_compared_with_plain_alone(monkeypatch):
    from sparsekit.cli import speed

    asked = []

    def measure(calls, plain, x, *, dense, clock, budget):
        asked.append((sorted(calls), dense))
        return dict.fromkeys(("plain", *calls), Timing(1.0, 1.0, 1.0, 1.0, 0.0))

    monkeypatch.setattr(speed.tune, "measure", measure)
    layers = [PrepackedLinear.from_linear(torch.nn.Linear(8, 8).eval()), Linear24.from_linear(sparse_linear(8, 8))]
    speed.layer_speeds(torch.nn.Sequential(*layers), [4], evict_cache=False, budget=0.01, progress=lambda kinds: kinds)
    assert asked == [(["compressed"], ("compressed",)), (["compressed", "prepacked"], ("prepacked",))]


def test_for_size(pruned, tmp_path, capsys, ratios):
    ratios |= {"2:4": 0.98, "prepacked": 2.0}
    for objective, decision in (("speed", "prepacked"), ("size", "2:4")):
        out = tmp_path / objective
        found = results(["compress", pruned, "--out", out, "--tokens", 4, "--objective", objective], capsys)
        assert {layer["decision"] for layer in found["layers"] if layer["name"] != "lm_head"} == {decision}


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


@pytest.fixture
def lossy(ratios):
    ratios |= {"int8": 4.0, **{f"2:4 {kind}": 5.0 for kind in ("int8", "int4", "nf4")}, "compressed": 1.5}
    ratios |= {f"2:4 {kind}, float inputs": 1.0 for kind in ("int8", "int4", "nf4")}
    ratios["2:4 nf4"] = ratios["2:4 int4"] = 6.0


@pytest.mark.parametrize(("precision", "kinds"), [("int8", {"2:4 int8"}), ("int4", {"2:4 int4", "2:4 nf4"})])
def test_a_lower_precision(pruned, tmp_path, capsys, lossy, precision, kinds):
    out = tmp_path / "out"
    found = results(["compress", pruned, "--out", out, "--tokens", 4, "--precision", precision], capsys)
    decisions = {layer["name"]: layer["decision"] for layer in found["layers"]}
    assert decisions.pop("lm_head") == "int8" and set(decisions.values()) <= kinds
    assert 0 < found["change"]["error"] < 0.5 and all(layer["error"]["of"] == "outputs" for layer in found["layers"])
    inspected = results(["inspect", out], capsys)
    assert inspected["stored_bytes"] < inspected["dense_bytes"] * (0.5 if precision == "int4" else 0.7)
    timed = results(["bench", out, "--tokens", 4, "--seconds", 0.01], capsys)
    assert {layer["kind"] for layer in timed["layers"]} == {"QuantizedLinear24", "Int8Linear"}
    code, text, _ = call(
        ["compress", pruned, "--out", out, "--overwrite", "--tokens", 4, "--precision", precision], capsys
    )
    assert code == 0 and "15 lossy, of which decompress_ returns the rounded weights" in text


def test_an_unknown_precision_is_refused(pruned, capsys):
    code, line = refusal(["compress", pruned, "--precision", "int3"], capsys)
    assert code == 2 and "int3" in line


def test_a_lossy_layer_that_computes_something_else_is_refused(pruned, tmp_path, capsys, lossy):
    import transformers

    from sparsekit.cli import compress

    results(["compress", pruned, "--out", tmp_path / "out", "--tokens", 4, "--precision", "int8"], capsys)
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / "out")).eval()
    sk.load(model, tmp_path / "out" / "compressed.safetensors")
    tokens, layer = torch.arange(4)[None], model.model.layers[0].mlp.up_proj
    compress.check_same(model, torch.zeros(1), tokens, "compressed")
    right = layer.reference
    layer.reference = lambda x: 1.01 * right(x)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj of the compressed model computes something"
    ):
        compress.check_same(model, torch.zeros(1), tokens, "compressed")
    assert not layer._forward_hooks


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
