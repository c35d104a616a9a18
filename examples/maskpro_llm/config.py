"""The settings that all commands of this example share, and the model that they name."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from sparsekit.cli.models import load_dense, load_tokenizer, read_config, transformers
from sparsekit.cli.text import check_causal

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "three_tier"))  # its small Llama, and its clock
LOCAL = Path(os.environ.get("SPARSEKIT_DATA", ""))
STORIES = LOCAL / "ckpt_stories260K" / "hf", LOCAL / "tinystories" / "tinystories_sample.txt"
STORIES_RATE = 0.15, 5.1  # lr and logits that were measured on the first of these; other models need their own
C4 = "c4-en-0000"  # the first shard of C4's English training set
Settings = TypeVar("Settings", bound="Shared")


@dataclass
class Shared:
    """The settings of every command; commands that belong together get the same."""

    model: str = (
        "auto"  # a dense causal LM: a folder or an id of the hub; auto is a small one, trained first if need be
    )
    data: str = "auto"  # c4, builtin (Python's documentation), a UTF-8 file, or an id of a data set with a column text
    out: Path = HERE / "out"
    sqlen: int = 128  # tokens of a text
    windows: Literal["auto", "first", "all"] = "auto"  # texts of a document: its beginning, or all of it; auto by data
    held_out: int = 512  # texts that nothing is calibrated on or learned from
    validation: int = 64  # other texts, on which learned masks must be better than the initial ones to be taken
    updates: int = 400  # of the small model that is trained if no other is at hand
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model == "auto":
            here = all(path.exists() for path in STORIES) and LOCAL != Path()
            self.model = str(STORIES[0]) if here else "builtin"
        if self.data == "auto":
            known = {str(STORIES[0]): str(STORIES[1]), "builtin": "builtin"}
            self.data = known.get(self.model, "c4")
        if self.windows == "auto":
            self.windows = "all" if self.data == "builtin" else "first"
        self.check_counts(sqlen=2, held_out=2, validation=1, updates=1)

    def check_counts(self, **least: int) -> None:
        """Checks that settings, which may be None, are as large as they must be.

        Raises:
            ValueError: names the first that is not.
        """
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"--{name} must be at least {smallest}, got {value}")

    @property
    def data_name(self) -> str:
        """The name of the data in names of files."""
        return (
            C4
            if self.data == "c4"
            else Path(self.data).stem
            if Path(self.data).exists()
            else self.data.replace("/", "-")
        )

    @property
    def masks(self) -> Path:
        """The folder of the initial masks."""
        return self.out / "initial_mask"


def load_model(settings: Shared, source: str | None = None) -> tuple[Any, Any]:
    """Loads the model that is named, or another checkpoint of it, and the tokenizer.

    Raises:
        ValueError: it cannot be loaded, or does not predict the next token.
        OSError: there is no such model.
    """
    transformers()  # silences it
    dense = str(builtin(settings)) if settings.model == "builtin" else settings.model
    config = read_config(dense)
    model = load_dense(source or dense, settings.device, settings.dtype, masks=False)
    check_causal(model)
    model.config.use_cache = False
    return model, load_tokenizer(dense, config)


def builtin(settings: Shared) -> Path:
    """Returns the folder of a small Llama of bytes, which is trained the first time."""
    from model import bytes_tokenizer, save, train_builtin
    from text import Text
    from texts import read

    folder = settings.out / "builtin"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = bytes_tokenizer()
        texts = read(settings, tokenizer)
        save(train_builtin(Text(texts.learn, texts.held_out), settings.updates, 0), tokenizer, folder)
    return folder


def run_command(main: Callable[[Settings], Any], settings: type[Settings], description: str | None) -> None:
    """Runs the function of a command with the settings of the command line; errors of the user become one sentence."""
    try:
        main(tyro.cli(settings, description=description))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except (MemoryError, RuntimeError) as error:  # PyTorch raises a RuntimeError where a CPU has no memory left
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise SystemExit("error: out of memory: lower --microbatch or --sqlen, or try --dtype bfloat16") from error
