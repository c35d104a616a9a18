"""Trains a classifier on labels and on a teacher's logits, while units are pruned or masks are kept, in a run."""

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from config import Settings
from data import Pieces
from models import in_encoder
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import sparsekit as sk
from sparsekit.evaluate import predict_logits
from sparsekit.masks import get_mask
from sparsekit.runs import Run
from sparsekit.slim import CubicSchedule, choose_units, find_units, mask_rows_, mask_units_, unit_scores

Pruning = Literal["none", "units", "2:4"]
SAVE_EVERY = 200  # steps
WARM_UP = 0.1  # the share of the steps in which the learning rate rises
CALIBRATION = 8  # batches


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        epochs: at most so many.
        lr: the highest learning rate.
        span: where it begins and ends in the whole training of the student, for temperature and alpha.
        pruning: what is dropped meanwhile.
        best: whether the weights with the best accuracy on validation sentences are kept, and training ends early.
    """

    epochs: int
    lr: float
    span: tuple[float, float] = (0.0, 1.0)
    pruning: Pruning = "none"
    best: bool = True


class Data:
    """The training and validation sentences, with the logits that a teacher has for the former."""

    def __init__(self, train: Pieces, validation: Pieces, taught: Tensor | None = None) -> None:
        self.train, self.validation, self.taught = train, validation, taught
        self.checked = validation.in_order()


class UnitPruner:
    """The pruner of units, which masks more and more of those with the lowest scores."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings, steps: int) -> None:
        self.model, self.settings, self.data = model, settings, data
        self.schedule = CubicSchedule(settings.sparsity, 0, max(1, steps - 1), settings.prune_every or 1)
        self.units = None
        if settings.criterion != "published":
            self.units = find_units(model, beside(model, data.train.batch(range(2))))
            mask_units_(model, self.units.keep())
        else:
            mask_rows_(model, 0.0, where=in_encoder(model))

    def before(self, step: int) -> None:
        """Masks what the schedule asks for before a step, counted from 0."""
        if self.schedule.prunes_at(step):
            self.mask(self.schedule.at(step))

    def again(self, step: int) -> None:
        """Masks what the steps before this one had masked: their units have only zeros, and are chosen again."""
        if done := [each for each in range(step) if self.schedule.prunes_at(each)]:
            self.mask(self.schedule.at(done[-1]), plain=True)

    def mask(self, share: float, plain: bool = False) -> None:
        if self.units is None:
            mask_rows_(self.model, share, where=in_encoder(self.model))
            return
        weights = None
        if self.settings.criterion == "taylor" and not plain:
            weights = sk.taylor_scores(self.model, label_loss, self.labelled())
        scores = unit_scores(self.model, self.units, weights)
        mask_units_(self.model, choose_units(self.model, self.units, scores, share))

    def labelled(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        device = next(self.model.parameters()).device
        groups = self.data.train.groups(32, self.settings.seed)[:CALIBRATION]
        return [(to(self.data.train.batch(each), device), self.data.train.labels[each].to(device)) for each in groups]


def label_loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(**inputs).logits, labels)


def to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: each.to(device) for name, each in batch.items()}


def beside(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch on the device of a model."""
    return to(batch, next(model.parameters()).device)


def mask_24(model: nn.Module, data: Data) -> None:
    """Prunes the encoder to 2:4 by Wanda."""
    groups = data.train.groups(32, 0)
    chosen = groups[:: max(1, len(groups) // CALIBRATION)][:CALIBRATION]  # of all lengths
    batches = [beside(model, data.train.batch(each)) for each in chosen]
    sk.prune_(model, sk.Wanda("2:4"), batches, where=in_encoder(model))


def train(
    model: nn.Module,
    data: Data,
    phase: Phase,
    folder: Path,
    settings: Settings,
    accelerator: Accelerator,
    inputs: dict[str, Any],
) -> list[dict[str, Any]]:
    """Trains a model in place, in a run that goes on where it was killed, and returns what the run recorded.

    Args:
        model: trained in place; with the weights of the best check afterwards if the phase asks for them.
        folder: of the run.
        inputs: what the run depends on.
    """
    size, ranks = settings.batch_size or 1, accelerator.num_processes
    per_epoch = len(data.train.groups(size)) // ranks
    steps, check = phase.epochs * per_epoch, max(1, per_epoch // (settings.checks or 1))
    model.to(accelerator.device)
    torch.manual_seed(settings.seed + accelerator.process_index)
    with Run.open(folder, inputs, steps=steps) as run, ExitStack() as stack:
        path = folder / "model.safetensors"
        finished = run.result is not None
        pruner = None
        if phase.pruning == "units" and not finished:
            pruner = UnitPruner(model, data, settings, steps)
        if phase.pruning == "2:4" and not finished:
            mask_24(model, data)
        if not finished:
            optimizer = torch.optim.AdamW(model.parameters(), phase.lr, weight_decay=0.01, fused=True)
            rise = max(1, int(WARM_UP * steps))
            schedule = LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise)))
            run.restore(model=model, optimizer=optimizer, schedule=schedule)
            if pruner is not None:
                pruner.again(run.step)
            wrapped, optimizer = accelerator.prepare(model, optimizer)
            if any(get_mask(module) is not None for module in model.modules()):
                stack.enter_context(sk.keep_masks(model, optimizer))
            step = Step(wrapped, optimizer, schedule, data, phase, settings, accelerator)
            stopper = Stopper(run, model, path, settings, accelerator, phase.best)
            batches = run.batches(per_epoch * ranks, ranks, epochs=phase.epochs, seed=settings.seed)
            hidden, epoch, groups = None if accelerator.is_main_process else True, -1, list[list[int]]()
            for chosen in tqdm(batches, folder.name, steps, initial=run.step, leave=False, disable=hidden):
                done = run.step - 1
                if pruner is not None:
                    pruner.before(done)
                if done // per_epoch != epoch:
                    epoch = done // per_epoch
                    groups = data.train.groups(size, settings.seed + 1000 * epoch)
                record = step(groups[chosen[0]], done / steps)
                if run.step % check == 0 or run.step == steps:
                    record["accuracy"] = accuracy(model, data)
                run.record(**record)
                if "accuracy" in record and stopper.check(record["accuracy"]):
                    break
                if run.step % SAVE_EVERY == 0:
                    run.save()
            if not phase.best and accelerator.is_main_process:
                sk.save(model, path)
            accelerator.wait_for_everyone()
            run.finish({"steps": run.step})
    accelerator.free_memory()
    sk.load(model, path)
    return read_records(folder)


class Step:
    """One step of training."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: LambdaLR,
        data: Data,
        phase: Phase,
        settings: Settings,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.data, self.phase, self.accelerator = data, phase, accelerator
        self.teaching = sk.DistillSchedule(settings.temperature, settings.alpha)
        self.bf16 = settings.precision == "bf16"

    def __call__(self, indices: list[int], progress: float) -> dict[str, Any]:
        """Trains on some sentences and returns what is recorded."""
        device = self.accelerator.device
        labels, record = self.data.train.labels[indices].to(device), {}
        self.model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(**to(self.data.train.batch(indices), device)).logits
        if self.data.taught is None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        else:
            begin, end = self.phase.span
            temperature, alpha = self.teaching.at(begin + (end - begin) * progress)
            taught = self.data.taught[indices].to(device)
            loss = sk.distill_loss(logits, taught, labels, temperature=temperature, alpha=alpha)
            record = {"temperature": temperature, "alpha": alpha}
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()}: lower --lr")
        return {"loss": loss.item(), "lr": self.schedule.get_last_lr()[0], **record}


class Stopper:
    """The keeper of the weights of the best check, which says when there was no better one for long."""

    def __init__(
        self, run: Run, model: nn.Module, path: Path, settings: Settings, accelerator: Accelerator, best: bool
    ) -> None:
        self.run, self.model, self.path, self.settings = run, model, path, settings
        self.accelerator, self.keeps = accelerator, best
        self.best, self.waited = -math.inf, 0
        for record in read_records(run.folder):
            if record["step"] <= run.step and "accuracy" in record:
                self._count(record["accuracy"])

    def _count(self, accuracy: float) -> bool:
        better = accuracy > self.best + (self.settings.min_delta if math.isfinite(self.best) else 0.0)
        self.waited = 0 if better else self.waited + 1
        self.best = accuracy if better else self.best
        return better

    def check(self, accuracy: float) -> bool:
        """Returns whether training ends."""
        if not self.keeps:
            return False
        if self._count(accuracy) and self.accelerator.is_main_process:
            sk.save(self.model, self.path)
        self.accelerator.wait_for_everyone()
        return self.waited >= self.settings.patience


def accuracy(model: nn.Module, data: Data) -> float:
    """Returns the share of the validation sentences that are classified correctly."""
    logits = predict_logits(model, [beside(model, each) for each in data.checked])
    return float((logits.argmax(1) == data.validation.labels).double().mean())


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Reads what a run recorded; nothing if it has not begun."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@torch.no_grad()
def teach(model: nn.Module, train: Pieces, device: torch.device, size: int = 128) -> Tensor:
    """Returns a classifier's logits for all training sentences, which are computed once for all stages."""
    found = torch.empty(len(train), 2)
    model.to(device).eval()
    for group in tqdm(train.groups(size), "teacher", leave=False, disable=None):
        found[group] = model(**to(train.batch(group), device)).logits.float().cpu()
    return found
