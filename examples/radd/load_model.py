"""Models and their tokenizers: of runs of train.py, of folders that save_pretrained wrote, or as published."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from config import HERE
from transformers import AutoTokenizer
from transformers.utils import logging

from sparsekit.models import RADD

logging.set_verbosity_error()
logging.disable_progress_bar()


def load_model(source: str | Path, device: torch.device | str = "cpu") -> tuple[RADD, Any]:
    """Loads a model and its tokenizer.

    Args:
        source: the folder of a run of train.py; a folder that ``save_pretrained`` wrote; or published weights, as a
            file, a folder or an id of the hub such as ``JingyangOu/radd-t-dce``, whose tokenizer is GPT-2's.
        device: where the model is.

    Raises:
        ValueError: the weights are not those of such a model.
        OSError: there are none.
    """
    folder = Path(source)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if (folder / "config.json").is_file() and (folder / "tokenizer_config.json").is_file():
        with redirect_stdout(None):  # huggingface_hub prints where it reads from
            model = RADD.from_pretrained(folder)
        return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
    return RADD.from_published(str(source)).to(device).eval(), load_tokenizer("gpt2")


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of an id or a folder, or for ``"bytes"`` one whose tokens are bytes; it has an end token.

    Raises:
        ValueError: there is none.
    """
    if name == "bytes":
        sys.path.append(str(HERE.parent / "three_tier"))
        from model import bytes_tokenizer

        tokenizer = bytes_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer {name} could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end token, which separates documents")
    return tokenizer
