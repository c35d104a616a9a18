"""``sparsekit prune``: the folder that it writes, its exit codes, and its errors of one line."""

import json
import subprocess
import sys

import pytest
import torch
from commands import TEXT, call, prune, refusal, results, write_model
from safetensors.torch import load_file

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def load(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_folder_that_prune_writes(model, tmp_path, capsys):
    out = tmp_path / "sparse"
    found = results(prune(model, out), capsys)
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "masks.safetensors",
        "report.json",
        "README.md",
    } <= names
    assert names.isdisjoint({"pruned.safetensors", "report.html"})
    assert (out / "masks.safetensors").stat().st_size < (out / "model.safetensors").stat().st_size / 3
    assert "LlamaForCausalLM.from_pretrained(FOLDER)" in (out / "README.md").read_text("utf-8")
    assert found == json.loads((out / "report.json").read_text())
    assert len(found["layers"]) == 14 and found["sparsity"] == 0.5 and found["method"] == "Wanda(pattern='2:4')"
    assert found["skipped"] == [
        {"name": "model.embed_tokens", "reason": "it is an embedding"},
        {"name": "lm_head", "reason": "the output head stays dense without --head"},
    ]
    layer = found["layers"][0]
    assert layer["name"] == "model.layers.0.self_attn.q_proj" and layer["sparsity"] == 0.5
    assert 0 < layer["error"] < 1 and 0 < layer["seconds"] <= found["seconds"]
    assert (layer["dense_bytes"], layer["packed_bytes"]) == (32 * 32 * 4, 32 * 16 * 4 + 32 * 32 // 8)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]

    dense, masked = load(out), load(out)
    assert dense.config.use_cache
    sk.load(masked, out / "masks.safetensors")
    for name, module in masked.named_modules():
        if name.endswith("proj"):
            mask = get_mask(module)
            assert str(get_mask_info(module).pattern) == "2:4" and mask.view(-1, 4).sum(1).eq(2).all()
            assert torch.equal(module.weight, dense.get_submodule(name).weight)
            assert not module.weight[~mask].any()


def test_prune_is_prune_(model, tmp_path, capsys):
    results(prune(model, tmp_path / "out", "--method", "sparsegpt", "--seed", 3), capsys)
    expected = load(model)
    ids = torch.tensor([token for document in TEXT.split("<|endoftext|>") for token in tokens_of(model, document)])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:8]
    sk.prune_(expected, sk.SparseGPT("2:4"), windows[chosen], where=lambda name, _: name != "lm_head")
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected.state_dict()[name])


def tokens_of(model, document):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model)(document).input_ids


def test_what_the_refinements_are_called_with(model, tmp_path, capsys):
    options = ("--method", "magnitude", "--swaps", "--least-squares", "--pattern", "50%", "--only", "down_proj")
    found = results(prune(model, tmp_path / "out", *options), capsys)
    assert found["method"].startswith("LeastSquares(Swaps(Magnitude(pattern='50%')")
    assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]


def test_magnitude_needs_no_text_and_the_head_can_be_pruned(model, tmp_path, capsys):
    command = ["prune", "--model", model, "--out", tmp_path / "out", "--method", "magnitude", "--calibration", "none"]
    found = results([*command, "--head", "--pattern", "1:4"], capsys)
    assert found["error"] is None and found["sparsity"] == 0.75 and found["layers"][-1]["name"] == "lm_head"


def test_perplexity_before_and_after(model, tmp_path, capsys):
    (tmp_path / "held_out.txt").write_text(TEXT[::-1], encoding="utf-8")
    found = results(prune(model, tmp_path / "out", "--eval", tmp_path / "held_out.txt"), capsys)
    assert 100 < found["perplexity"]["dense"] < 600 and found["perplexity"]["dense"] != found["perplexity"]["pruned"]


def test_perplexity_of_a_model_that_knows_nothing(model):
    from sparsekit.cli.text import perplexity

    knows_nothing = load(model)
    torch.nn.init.zeros_(knows_nothing.lm_head.weight)
    assert perplexity(knows_nothing, torch.arange(96).view(3, 32), iter) == pytest.approx(256, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "task", "changes"),
    [
        ("Bert", "ForMaskedLM", {}),
        ("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}),
        ("T5", "ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 16}),
    ],
)
def test_encoders_and_others(kind, task, changes, tmp_path, capsys):
    model = write_model(tmp_path / "model", kind, task, **changes)
    found = results(prune(model, tmp_path / "out"), capsys)
    assert found["architecture"] == kind + task and found["sparsity"] == 0.5
    assert results(["inspect", tmp_path / "out", "--expect", "2:4"], capsys)["ok"]


def test_a_killed_run_goes_on(model, tmp_path, capsys, monkeypatch):
    from sparsekit.cli import prune as command

    def stop(*_, **__):
        raise KeyboardInterrupt

    arguments = prune(model, tmp_path / "out", "--resume", tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(command, "save", stop)
        assert refusal(arguments, capsys) == (130, "sparsekit: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]  # nothing that looks finished, nothing hidden
    found = results(arguments, capsys)
    assert len(found["layers"]) == 14 and len(list((tmp_path / "kept").glob("stage-*"))) == 2
    other = prune(model, tmp_path / "other", "--resume", tmp_path / "kept", "--seed", 7)  # other windows of the text
    code, line = refusal(other, capsys)
    assert code == 1 and line.endswith("run.json belongs to another run: it differs in batches; name another folder")


def test_a_failed_run_leaves_what_was_there(model, tmp_path, capsys, monkeypatch):
    from sparsekit.cli import prune as command

    def full(*_, **__):
        raise OSError("no space left on device")

    out = tmp_path / "out"
    results(prune(model, out), capsys)
    before = (out / "report.json").read_text()
    assert refusal(prune(model, out), capsys) == (
        2,
        f"sparsekit: {out} is not empty: name another folder, or --overwrite",
    )
    with monkeypatch.context() as patch:
        patch.setattr(command, "save", full)
        assert refusal(prune(model, out, "--overwrite", "--seed", 1), capsys) == (
            1,
            "sparsekit: no space left on device",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "report.json").read_text() == before
    assert results(prune(model, out, "--overwrite", "--seed", 1), capsys)["calibration"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_sparsekit_wrote_is_overwritten(model, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "report.json").touch()
    code, line = refusal(prune(model, tmp_path / "home", "--overwrite"), capsys)
    assert code == 2 and line.endswith("was not written by sparsekit, which overwrites nothing else")
    results(prune(model, tmp_path / "out"), capsys)
    (tmp_path / "out" / "letters").mkdir()
    assert refusal(prune(model, tmp_path / "out", "--overwrite"), capsys)[0] == 2
    assert (tmp_path / "home" / "report.json").exists() and (tmp_path / "out" / "letters").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--pattern", "5:4"), 2, 'a pattern is "n:m" with 0 < n <= m <= 32'),
        (("--pattern", "50% 16x16", "--swaps"), 2, "Swaps cannot swap single weights in a pattern of whole blocks"),
        (("--nsamples", "4000"), 2, "windows of 32 tokens, 4000 are needed: give more text, or lower --nsamples or"),
        (("--nsamples", "0"), 2, "--nsamples must be at least 1 and --window 2, got 0 and 32"),
        (("--calibration", "nowhere.txt"), 2, "cannot read the text nowhere.txt: No such file or directory"),
        (("--calibration", "none"), 2, "needs a calibration text, --calibration is none"),
        (("--model", "./nowhere"), 2, "there is no folder ./nowhere"),
        (("--only", "("), 2, "'(' is no regular expression"),
        (("--only", "nothing"), 1, "nothing to prune: where selects no layer that can be pruned"),
        (("--device", "tpu"), 2, "there is no device 'tpu' here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_one_line(options, code, said, model, tmp_path, capsys):
    found, line = refusal(prune(model, tmp_path / "out", *options), capsys)
    assert found == code and line.startswith("sparsekit: ") and said in line
    assert list(tmp_path.iterdir()) == []


def test_held_out_text_is_held_out(model, tmp_path, capsys):
    code, line = refusal(prune(model, tmp_path / "out", "--eval", model / "text.txt"), capsys)
    assert code == 2 and "--eval must be held out" in line
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, line = refusal(prune(model, tmp_path / "out", "--eval", tmp_path / "latin.txt"), capsys)
    assert code == 2 and line.endswith("is not UTF-8: unexpected end of data at byte 3")


def test_what_has_no_next_token_has_no_perplexity(tmp_path, capsys):
    encoder = write_model(tmp_path / "model", "Bert", "ForMaskedLM")
    (tmp_path / "held_out.txt").write_text(TEXT, encoding="utf-8")
    code, line = refusal(prune(encoder, tmp_path / "out", "--eval", tmp_path / "held_out.txt"), capsys)
    assert code == 2 and "perplexity needs a model that predicts the next token, BertForMaskedLM does not" in line


def test_pickles_are_never_read(model, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((model / name).read_bytes())
    assert refusal(prune(tmp_path / "model", tmp_path / "out", "--calibration", "builtin"), capsys)[0] == 2
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for command in (
        prune(tmp_path / "model", tmp_path / "out", "--calibration", "builtin"),
        ["inspect", tmp_path / "model"],
    ):
        code, line = refusal(command, capsys)
        assert code == 2 and "has only pickled weights (pytorch_model.bin), which are never read" in line


def test_weights_that_are_missing_are_not_made_up(model, tmp_path, capsys):
    from safetensors.torch import save_file

    write_model(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    code, line = refusal(prune(tmp_path / "model", tmp_path / "out"), capsys)
    assert code == 1 and "the checkpoint lacks 1 weights, model.layers.1.mlp.up_proj.weight for one" in line


def test_a_configuration_that_names_no_class_is_a_causal_lm(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    assert results(prune(model, tmp_path / "out"), capsys)["architecture"] == "LlamaForCausalLM"
    assert results(["inspect", model], capsys)["sparsity"] == 0


def test_text_needs_a_tokenizer(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    code, line = refusal(prune(model, tmp_path / "out"), capsys)
    assert code == 2 and line.endswith("has no tokenizer that can be loaded, and text needs one")


def test_a_reader_that_has_seen_enough(model):
    command = [sys.executable, "-m", "sparsekit", "inspect", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert (running.stderr.read(), running.wait()) == ("", 1)


def test_debug_shows_where(model, tmp_path, capsys):
    code, _, err = call(prune(model, tmp_path / "out", "--pattern", "x", "--debug"), capsys)
    assert code == 2 and err[0].startswith("Traceback") and err[-1].startswith("sparsekit: a pattern is")


@pytest.mark.slow
def test_a_real_model(data, tmp_path, capsys):
    stories = data / "tinystories" / "tinystories_sample.txt"
    documents = stories.read_text("utf-8").split("<|endoftext|>")
    (tmp_path / "held_out.txt").write_text("<|endoftext|>".join(documents[:20]), encoding="utf-8")
    (tmp_path / "learn.txt").write_text("<|endoftext|>".join(documents[20:300]), encoding="utf-8")
    found = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        text = (
            "--calibration",
            tmp_path / "learn.txt",
            "--eval",
            tmp_path / "held_out.txt",
            "--nsamples",
            16,
            "--window",
            256,
        )
        model = ("--model", data / "ckpt_stories260K" / "hf", "--out", tmp_path / method)
        found[method] = results(["prune", *model, *text, "--method", method], capsys)
    assert found["wanda"]["perplexity"]["dense"] == pytest.approx(3.6, abs=0.4)
    assert found["sparsegpt"]["error"] < found["wanda"]["error"] < found["magnitude"]["error"]
    assert found["sparsegpt"]["perplexity"]["pruned"] < found["wanda"]["perplexity"]["pruned"]
    assert results(["inspect", tmp_path / "wanda", "--expect", "2:4"], capsys)["sparsity"] == 0.5
