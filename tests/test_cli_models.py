"""What comes with a model, and may be anything: its code, which never runs, its tokenizer, its warnings."""

import builtins
import json
import warnings

import pytest
from commands import call, prune, refusal, write_model

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
