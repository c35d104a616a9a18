"""What comes with a model, and may be anything: its code, which never runs, its tokenizer, its warnings."""

import builtins
import json
import shutil
import warnings

import pytest
from commands import call, prune, refusal, results, write_model

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("command", ["prune", "compress", "bench"])
def test_code_of_a_model_is_refused_and_nobody_is_asked(command, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    folder = write_model(tmp_path / "model")
    (folder / "mine.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = prune(folder, tmp_path / "out") if command == "prune" else [command, folder]
    code, line = refusal(arguments, capsys)
    assert code == 1 and "contains custom code" in line and not asked


@pytest.mark.parametrize(
    "error", [ImportError("sentencepiece is missing"), KeyError("added_tokens"), ValueError("bad")]
)
def test_a_tokenizer_that_cannot_be_loaded(error, model, tmp_path, capsys, monkeypatch):
    import transformers

    def fails(*_, **options):
        assert options == {"trust_remote_code": False}
        raise error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    code, line = refusal(prune(model, tmp_path / "out"), capsys)
    assert code == 2 and line.endswith("has no tokenizer that can be loaded, and text needs one")
    command = ["prune", "--model", model, "--out", tmp_path / "out", "--method", "magnitude", "--calibration", "none"]
    assert call(command, capsys)[0] == 0  # which needs none, and copies none


@pytest.mark.filterwarnings("default")
def test_a_hostile_warning_is_one_line_of_text(model, tmp_path, capsys, monkeypatch):
    from sparsekit.cli import prune as command

    def warns(*_, **__):
        warnings.warn("\x1b[31mred\n  and long", stacklevel=1)
        raise ValueError("over")

    monkeypatch.setattr(command, "load_dense", warns)
    code, out, err = call(prune(model, tmp_path / "out"), capsys)
    assert (code, out) == (1, "")
    assert err == ["warning: \N{REPLACEMENT CHARACTER}[31mred and long", "sparsekit: over"]


def test_a_name_that_is_no_folder_and_not_on_the_hub(tmp_path, capsys, monkeypatch):
    import transformers

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    command = [
        "prune",
        "--model",
        "spares",
        "--out",
        tmp_path / "out",
        "--method",
        "magnitude",
        "--calibration",
        "none",
    ]
    line = (
        "sparsekit: there is no folder spares, and the hub gives no model of that name: We couldn't connect to the hub."
    )
    assert refusal(command, capsys) == (1, line)


def test_a_table_of_positions_that_counts_from_its_padding_on(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "Roberta", "ForMaskedLM", max_position_embeddings=66, pad_token_id=1)
    arguments = prune(folder, tmp_path / "out", "--window", 512, "--overwrite")
    assert results(arguments, capsys)["calibration"]["window"] == 64
    code, line = refusal(["compress", folder, "--tokens", 65], capsys)
    assert code == 2 and "--tokens must be from 1 to 64" in line


def test_the_tokenizer_says_what_can_be_read(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 24}))
    assert results(prune(folder, tmp_path / "out"), capsys)["calibration"]["window"] == 24


def test_a_tokenizer_that_is_not_the_models_own(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    code, line = refusal(prune(folder, tmp_path / "out"), capsys)
    assert code == 2 and not (tmp_path / "out").exists()
    assert "no tokenizer that can be loaded" in line or "it is not the model's own" in line
    command = ["prune", "--model", folder, "--out", tmp_path / "out", "--method", "magnitude", "--calibration", "none"]
    assert call(command, capsys)[0] == 0
    assert not list((tmp_path / "out").glob("*token*"))


def test_a_text_that_the_tokenizer_does_not_know(tmp_path, capsys):
    import tokenizers
    import transformers

    folder = write_model(tmp_path / "model")
    words = tokenizers.models.WordLevel({"?": 0, **{f"w{i}": i for i in range(1, 256)}}, unk_token="?")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), unk_token="?").save_pretrained(
        folder
    )
    code, line = refusal(prune(folder, tmp_path / "out"), capsys)
    assert code == 2 and "the tokenizer does not know 100% of the text" in line


def test_a_model_that_reads_no_text(tmp_path, capsys):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    folder = write_model(
        tmp_path / "model", "Whisper", "ForConditionalGeneration", **sizes, **heads, **tokens, max_target_positions=64
    )
    code, line = refusal(prune(folder, tmp_path / "out"), capsys)
    assert code == 2 and "WhisperForConditionalGeneration reads input_features, not text" in line
    command = ["prune", "--model", folder, "--out", tmp_path / "out", "--method", "magnitude", "--calibration", "none"]
    assert call(command, capsys)[0] == 0
    code, line = refusal(["compress", tmp_path / "out", "--tokens", 1, 16], capsys)
    assert code == 2 and "input_features" in line
