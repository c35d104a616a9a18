"""Learns 2:4 masks of a language model from losses alone, by forward passes; goes on where it was killed.

    python examples/maskpro_llm/train.py --dataset_size 512 --batchsize 32 --epoch 625      # after inference_loss.py
    python examples/maskpro_llm/train.py --parity --lr 50 --logits 10 --epoch 625           # the published rule
    torchrun --nproc_per_node 8 examples/maskpro_llm/train.py ...                           # 8 batches in each step

The folder ``results/lrLR_epochEPOCH_logitsLOGITS_sizeSIZE/`` in ``--out`` gets ``checkpoint/``,
for ``from_pretrained``, the loss of each step in ``loss_training.npy``, how much better that is than the initial masks'
in ``loss_improvements.npy``, with ``--save`` ``learned_mask/NAME.pt``, and what every run has.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from baseline import Batched, check_baseline, read_baseline
from config import load_model, run_command
from losses import CountedLoss
from masks import layer_masks, read_masks, write_masks
from texts import read
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk
from sparsekit._digest import digest
from sparsekit.prune.maskpro import DRAWS
from sparsekit.runs import Run


@dataclass
class Training(Batched):
    """What train.py takes."""

    epoch: int = 2  # passes over the batches, of --draws steps for each
    draws: int | None = None  # steps in a row that draw masks for the same batch; None is 4, with --parity 1
    max_step: int | None = None  # steps in all, if less than the epochs have
    max_passes: int | None = None  # no step begins after so many forward passes; a run that goes on repeats a few
    lr: float | None = None  # how far a step moves the logits at an advantage of 1; None follows from the logits
    logits: float | None = None  # of the weights that the initial masks keep; None is measured by the losses of draws
    parity: bool = False  # the published rule, whose lr is 50 and whose logits are 10
    init: Path | None = None  # the folder of the initial masks; None is initial_mask/ in --out
    save: bool = False  # also writes the masks
    save_every: int = 200  # steps between two stored states

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(draws=1, max_step=1, max_passes=1, save_every=1)

    def steps(self, batches: int, ranks: int) -> int:
        """Returns the number of steps with so many batches and processes."""
        draws = self.draws or (1 if self.parity else DRAWS)
        steps = self.epoch * batches * draws // ranks
        return steps if self.max_step is None else min(steps, self.max_step)

    @property
    def result(self) -> Path:
        """The folder of the run."""
        lr, logits = (50 if self.lr is None else self.lr, 10 if self.logits is None else self.logits)
        names = (f"{lr:g}", f"{logits:g}") if self.parity else (named(self.lr), named(self.logits))
        name = f"lr{names[0]}_epoch{self.epoch}_logits{names[1]}_size{self.dataset_size}"
        return self.out / "results" / (name + "_parity" * self.parity + f"_seed{self.seed}" * (self.seed != 0))

    def of_run(self, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns what the run depends on, the content of the initial masks included."""
        free = ("out", "device", "init", "save", "save_every")
        return {name: value for name, value in asdict(self).items() if name not in free} | {"masks": digest(masks)}


def named(value: float | None) -> str:
    return "auto" if value is None else f"{value:g}"


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Joins the processes that torchrun has started; yields the rank of this one and their number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def main(settings: Training) -> dict[str, Any]:
    """Learns, or reads the result of a run that is finished; returns it."""
    with processes() as (rank, ranks):
        return train(settings, rank, ranks)


def train(settings: Training, rank: int, ranks: int) -> dict[str, Any]:
    model, tokenizer = load_model(settings)
    masks = read_masks(settings.init or settings.masks, model, settings.targets)
    texts = read(settings, tokenizer, settings.dataset_size)
    batches = settings.batches(texts.learn)
    if len(batches) % ranks:
        raise ValueError(f"{ranks} processes need a multiple of {ranks} batches, got {len(batches)}: see --batchsize")
    expected = read_baseline(settings, len(batches))
    steps = settings.steps(len(batches), ranks)
    with open_run(settings, masks, steps) as run:
        if run.result is not None:
            if rank == 0:
                print(f"the run in {settings.result} is finished, and its result is taken: remove that to learn again")
            return run.result
        loss_fn = CountedLoss()
        learner = sk.MaskPro(
            model,
            loss_fn,
            batches=[rows for batch in batches[rank::ranks] for rows in batch.split(settings.texts_in_pass)],
            held_out=list(texts.validation.split(settings.texts_in_pass))[rank::ranks],
            init=masks,
            lr=settings.lr,
            multiplier=settings.logits,
            draws=settings.draws,
            microbatches=settings.batchsize // settings.texts_in_pass,
            seed=settings.seed,
            parity=settings.parity,
        )
        run.restore(learner=learner, passes=loss_fn)
        first, hidden = run.step, True if rank else None  # None hides the bar if there is no terminal
        for step in tqdm(learner.steps(steps), "learn", steps, initial=first, leave=False, disable=hidden):
            if step.step == first + 1:
                start = step.turn * ranks % len(batches)
                check_baseline(settings, expected[start : start + ranks], step.initial_loss)
            run.step = step.step
            run.record(loss=step.loss, initial_loss=step.initial_loss, advantage=step.advantage)
            if run.step % settings.save_every == 0:
                run.save()
            if settings.max_passes is not None and loss_fn.passes >= settings.max_passes:
                break
        result = {"passes": loss_fn.passes}
        report = learner.finish()
        result |= report.to_json()
        if rank == 0:
            write(settings, model, tokenizer, report)
        run.finish(result)
    if rank == 0:
        print(f"{report}\nthe model and the losses are in {settings.result}")
    return result


def open_run(settings: Training, masks: Mapping[str, Tensor], steps: int) -> Run:
    """Opens the folder of the run.

    Raises:
        ValueError: it holds a run of other settings or masks, or another process runs it.
    """
    try:
        return Run.open(settings.result, settings.of_run(masks), steps=steps)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def write(settings: Training, model: nn.Module, tokenizer: Any, report: sk.prune.MaskProReport) -> None:
    """Writes the model, the losses of all steps, and the masks if they are asked for."""
    from model import save

    folder = settings.result
    save(model, tokenizer, folder / "checkpoint")
    if settings.save:
        write_masks(layer_masks(model, report.layers), folder / "learned_mask")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses, initial = (np.array([record[name] for record in records]) for name in ("loss", "initial_loss"))
    np.save(folder / "loss_training.npy", losses)
    np.save(folder / "loss_improvements.npy", initial - losses)


if __name__ == "__main__":
    run_command(main, Training, __doc__)
