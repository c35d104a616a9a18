"""The settings that all commands of this example share, their presets, and how commands report errors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

HERE = Path(__file__).parent
Preset = Literal["auto", "small", "published"]
TEACHER, STUDENT = "textattack/bert-base-uncased-SST-2", "distilbert-base-uncased"

# What a preset gives where nothing else is asked for. Epochs are those of a stage: the published run of 15 epochs is
# 2 of distillation alone, 7 that prune as well, and at most 6 of recovery.
PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        **{"batch_size": 32, "max_length": 128, "train_examples": None, "teacher_epochs": 0, "teacher_lr": 2e-5},
        **{"distill_epochs": 2, "prune_epochs": 7, "recover_epochs": 6, "lr": 5e-5, "recover_lr": 1e-5},
        **{"prune_every": 20, "checks": 1},
    },
    "small": {
        **{"batch_size": 64, "max_length": 64, "train_examples": 20000, "teacher_epochs": 2, "teacher_lr": 2e-4},
        **{"distill_epochs": 2, "prune_epochs": 1, "recover_epochs": 1, "lr": 2e-4, "recover_lr": 1e-4},
        **{"prune_every": 20, "checks": 4},
    },
}
# The models that the small preset trains from nothing; the heads have 64 features, as kernels for 4-bit weights need.
SMALL = {"width": 512, "teacher_layers": 3, "student_layers": 2}
SHORT_SMALL = {"width": 128, "teacher_layers": 2, "student_layers": 2}
SHORT = {
    **{"train_examples": 640, "test_examples": 200, "teacher_epochs": 1, "distill_epochs": 1, "prune_epochs": 1},
    **{"recover_epochs": 1, "checks": 1, "prune_every": 2, "grid": ((1, 32),), "seconds": 0.5, "loads": 1},
}


@dataclass
class Settings:
    """What all commands take; None stands for the value of the preset."""

    out: Path = HERE / "out"
    preset: Preset = "auto"  # auto is published if teacher and student are named or downloaded, else small
    teacher: str | None = None  # a trained classifier: a folder or an id of the hub
    student: str | None = None  # the model that learns from it: a folder or an id of the hub
    data: str = "auto"  # a folder with train.tsv and dev.tsv, "hub", or auto: sst2/ in SPARSEKIT_DATA, else the hub
    train_examples: int | None = None  # training sentences; None takes all where the preset names no number
    test_examples: int | None = None  # sentences that figures are measured on; None takes all
    max_length: int | None = None  # word pieces of a sentence
    batch_size: int | None = None  # sentences in a step of each process
    teacher_epochs: int | None = None
    teacher_lr: float | None = None
    distill_epochs: int | None = None
    prune_epochs: int | None = None
    recover_epochs: int | None = None
    lr: float | None = None
    recover_lr: float | None = None
    temperature: tuple[float, float] = (10.0, 2.0)  # from the first step of the student to the last
    alpha: tuple[float, float] = (0.9, 0.2)  # the weight of the teacher's term, likewise
    sparsity: float = 0.2  # the share of the encoder's weights that is removed
    prune_every: int | None = None  # steps
    criterion: Literal["l2", "taylor", "published"] = "l2"  # published masks rows, which makes nothing faster
    patience: int = 5  # checks in a row without an accuracy that is higher by --min_delta, after which recovery ends
    min_delta: float = 0.001
    checks: int | None = None  # times in an epoch that the accuracy on validation sentences is measured
    grid: tuple[tuple[int, int], ...] = ((1, 32), (1, 128), (8, 128))  # batch and length of the passes that are timed
    loads: int = 3  # processes that load a model, of which the fastest counts
    seconds: float = 12.0  # for which the passes of each size are timed
    precision: Literal["auto", "no", "bf16"] = "auto"  # of training; auto is bf16 where the device multiplies it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    short: bool = False  # little of everything, to try it

    def __post_init__(self) -> None:
        models = self.out / "models"
        if self.teacher is None and (models / "teacher").is_dir():
            self.teacher = str(models / "teacher")
        if self.student is None and (models / "student").is_dir():
            self.student = str(models / "student")
        if (self.teacher is None) != (self.student is None):
            missing = "teacher" if self.teacher is None else "student"
            raise ValueError(f"--{missing} is missing: name both models, or neither to train small ones here")
        if self.preset == "auto":
            self.preset = "small" if self.teacher is None else "published"
        if self.preset == "published" and self.teacher is None:
            raise ValueError(
                "--preset published needs --teacher and --student, or the models that download_model.py fetches into "
                f"{models}"
            )
        for name, value in {**PRESETS[self.preset], **(SHORT if self.short else {})}.items():
            if getattr(self, name) is None or (self.short and name in ("grid", "seconds", "loads")):
                setattr(self, name, value)
        if self.precision == "auto":
            self.precision = "bf16" if multiplies_bf16(self.device) else "no"
        self.check()

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: one is out of range.
        """
        counts = ("batch_size", "max_length", "train_examples", "test_examples", "checks", "patience", "prune_every")
        for name in (*counts, "distill_epochs", "prune_epochs", "recover_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not 0 < self.sparsity < 1:
            raise ValueError(f"--sparsity must be between 0 and 1, got {self.sparsity}")

    def given(self, *names: str) -> dict[str, Any]:
        """Returns settings by name, as JSON has them."""
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the models that are trained from nothing."""
        return SHORT_SMALL if self.short else SMALL


def multiplies_bf16(device: str) -> bool:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


Command = TypeVar("Command")


def run_command(main: Callable[[Command], Any], settings: type[Command], description: str | None) -> None:
    """Runs the function of a command with the settings of the command line; errors of the user become one sentence."""
    try:
        main(tyro.cli(settings, description=description))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def shared(settings: Settings) -> dict[str, Any]:
    """Returns the settings that all commands share, to make those of another command of them."""
    return {each.name: getattr(settings, each.name) for each in dataclasses.fields(Settings)}
