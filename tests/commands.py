"""Tiny transformers folders, and the command line called in this process."""

import json

import torch

from sparsekit.cli import main

TEXT = "<|endoftext|>".join(
    f"{number} sheep went over the hill, and {number * 7 % 31} came back." for number in range(400)
)
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"vocab_size": 256, "max_position_embeddings": 64, **LLAMA}


def write_model(folder, kind="Llama", task="ForCausalLM", **changes):
    """A random model of a transformers architecture, with a byte-level tokenizer and a text."""
    import tokenizers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{kind}{task}")(config)
    model.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def prune(folder, out, *options):
    """The arguments that prune a tiny model."""
    text = ["--calibration", folder / "text.txt", "--nsamples", 8, "--window", 32]
    return ["prune", "--model", folder, "--out", out, *text, *options]


def call(arguments, capsys):
    """The exit code, what stood on stdout, and the lines on stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def results(arguments, capsys):
    """What a command that succeeds prints with ``--json``."""
    code, out, err = call([*arguments, "--json"], capsys)
    assert (code, err) == (0, [])
    return json.loads(out)


def refusal(arguments, capsys):
    """The exit code and the only line of a command that fails."""
    code, out, err = call(arguments, capsys)
    assert out == "" and len(err) == 1, (out, err)
    return code, err[0]
