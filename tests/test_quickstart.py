"""The demo runs whole, in miniature, and on a real model; what it reports is what happened."""

import json
import math
import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

for package in ("matplotlib", "tqdm", "tyro"):
    pytest.importorskip(package)

FOLDER = Path(__file__).parent.parent / "examples" / "quickstart"


@pytest.fixture(scope="module")
def run():
    """The module ``run.py``, imported as ``python run.py`` finds its neighbors."""
    sys.path.insert(0, str(FOLDER))
    try:
        import run

        yield run
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("run", "model", "show", "speed"):
            sys.modules.pop(name, None)


def miniature(run, out, **changes):
    sizes = {"layers": 1, "dim": 64, "big_layers": 1, "big_dim": 64, "window": 32, "calibration": 8, "held_out": 20}
    times = {"train_seconds": 1, "finetune_seconds": 0.5, "seconds_per_timing": 0.02, "tune_budget": 0.01}
    return run.Config(out=out, **{**sizes, **times, **changes})


def perplexities(printed):
    """By row of the table of section 2."""
    lines = printed.split("2. Made 2:4 sparse\n")[1].split("  tuned:")[0].splitlines()[1:]
    return {line[2:16].strip(): float(line[16:].split()[0]) for line in lines}


class Uniform(nn.Module):
    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 7)


def test_perplexity_of_a_model_that_knows_nothing(run):
    value, count = run.perplexity(Uniform(), [torch.arange(3), torch.arange(6), torch.arange(3), torch.arange(1)])
    assert math.isclose(value, 7, rel_tol=1e-6)
    assert count == 2 + 5 + 2


def test_perplexity_weighs_tokens_alike(run):
    class Certain(nn.Module):
        """Sure of token 0 (logit log 9 against 0, for two tokens: probability 0.9), whatever came before."""

        def forward(self, tokens):
            return torch.tensor([math.log(9), 0.0]).expand(*tokens.shape, 2)

    value, count = run.perplexity(Certain(), [torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1])])
    assert count == 4
    assert math.isclose(value, (0.9**3 * 0.1) ** (-1 / 4), rel_tol=1e-5)


def test_held_out_text_is_never_learned_from(run, tmp_path):
    config = miniature(run, tmp_path)
    _, held_out, learn = run.own_model_and_text(config)
    assert len(held_out) == 20 and len(learn) > 10_000
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    assert bytes(torch.cat([*held_out, *learn]).tolist()) == text[: 33 * (len(text) // 33)]


def test_the_whole_demo_in_miniature(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", "0")
    run.main(miniature(run, tmp_path))
    printed = capsys.readouterr().out
    values = perplexities(printed)
    assert list(values) == ["dense", "magnitude", "Wanda", "dense, tuned", "Wanda, tuned"]
    assert values["dense"] < 256 and all(map(math.isfinite, values.values()))
    assert "50.0%" in printed and "its logits are identical" in printed and "slower" in printed
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["sparsekit"])["layers"]
    assert len(layers) == 4 and all(layer["mask"]["pattern"] == "2:4" for layer in layers.values())


def test_too_little_text_is_said(run, tmp_path):
    (tmp_path / "short.txt").write_text("to be or not to be", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"the text gives 0 windows of 32 tokens, 28 are needed"):
        run.main(miniature(run, tmp_path, text=tmp_path / "short.txt"))


@pytest.mark.slow
def test_a_real_model(run, tmp_path, capsys, data):
    pytest.importorskip("transformers")
    config = miniature(
        run,
        tmp_path,
        model=data / "ckpt_stories260K" / "hf",
        text=data / "tinystories" / "tinystories_sample.txt",
        held_out=100,
        window=128,
        calibration=32,
        finetune_seconds=3,
    )
    model, stories, _ = run.given_model_and_text(config)
    value, count = run.perplexity(model.eval(), stories)
    assert (len(stories), count) == (100, 37_318)
    assert value == pytest.approx(4.0975, abs=1e-3)

    config.held_out = 8  # enough for the order of the methods
    run.main(config)
    values = perplexities(capsys.readouterr().out)
    assert values["dense"] < values["Wanda, tuned"] < values["Wanda"] < values["magnitude"]
