"""The stages: what each of them does, depends on and writes."""

from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from config import Settings
from data import Parts, Pieces, load
from models import (
    encoder_weights,
    in_encoder,
    load_model,
    load_teacher,
    load_tokenizer,
    save_model,
    small_model,
    small_tokenizer,
)
from quantize import Form, quantize
from safetensors.torch import load_file, save_file
from stages import Stage
from torch import Tensor
from trainer import Data, Phase, Pruning, accuracy, teach, train

import sparsekit as sk
from sparsekit._digest import digest
from sparsekit.evaluate import predict_logits
from sparsekit.slim import Units, choose_units, find_units, slim_, unit_scores

BRANCHES: dict[str, Pruning] = {"student": "none", "pruned": "units", "2-4": "2:4"}  # the student is trained as long
QUANTIZED: dict[str, tuple[str, Form]] = {  # the folder of each quantized model, of what it is made, and its form
    "student-nf4": ("student", "nf4"),
    "pruned-nf4": ("pruned", "nf4"),
    "2-4-nf4": ("recovered/2-4", "2:4 nf4"),
    "2-4-int8": ("recovered/2-4", "2:4 int8"),
}
ROWS = ("teacher", "student", "student-nf4", "pruned", "pruned-nf4", "2-4", "2-4-nf4", "2-4-int8")
DATA = ("data", "train_examples", "max_length", "seed")
TRAINING = ("batch_size", "temperature", "alpha", "patience", "min_delta", "checks", "precision")


class Pipeline:
    """The stages before the report, with what they share: the data, the tokenizer and the processes."""

    def __init__(self, settings: Settings, accelerator: Accelerator | None = None) -> None:
        self.settings, self.out = settings, settings.out
        self.accelerator = accelerator or Accelerator(cpu=settings.device == "cpu")

    @cached_property
    def parts(self) -> Parts:
        return load(self.settings)

    @cached_property
    def tokenizer(self) -> Any:
        named = self.settings.student
        return small_tokenizer(self.parts.train.texts) if named is None else load_tokenizer(named)

    @cached_property
    def train_pieces(self) -> Pieces:
        return self.pieces("train")

    def pieces(self, part: str) -> Pieces:
        return Pieces(getattr(self.parts, part), self.tokenizer, self.settings.max_length or 128)

    def data(self, taught: Tensor | None = None) -> Data:
        return Data(self.train_pieces, self.pieces("validation"), taught)

    def stages(self) -> dict[str, Stage]:
        """Returns the stages before the report in their order."""
        given, out = self.settings.given, self.out
        logits = out / "teacher_logits.safetensors"
        models = ("preset", "teacher", "student", "short", "teacher_epochs", "teacher_lr", "distill_epochs", "lr")
        masked, recovered = ([out / folder / name for name in BRANCHES] for folder in ("masked", "recovered"))
        pruning = ("prune_epochs", "prune_every", "recover_epochs", "distill_epochs", "lr", "sparsity", "criterion")
        recovery = ("recover_epochs", "recover_lr", "prune_epochs", "distill_epochs")
        slimmed = [out / name for name in BRANCHES]
        quantized = [out / name for name in QUANTIZED]
        stages = [
            Stage(
                "distill",
                self.distill,
                given(*DATA, *TRAINING, *models, "prune_epochs", "recover_epochs"),
                (),
                (out / "teacher", logits, out / "distilled"),
            ),
            Stage("prune", self.prune, given(*DATA, *TRAINING, *pruning), (out / "distilled", logits), masked),
            Stage("recover", self.recover, given(*DATA, *TRAINING, *recovery), (*masked, logits), recovered),
            Stage("slim", self.slim, given(*DATA, "sparsity", "criterion"), recovered, slimmed),
            Stage("quantize", self.quantize, {}, [out / source for source, _ in QUANTIZED.values()], quantized),
        ]
        return {stage.name: stage for stage in stages}

    def span(self, stage: str) -> tuple[float, float]:
        """Returns where a stage begins and ends in the whole training of the student."""
        settings = self.settings
        epochs = {each: getattr(settings, f"{each}_epochs") for each in ("distill", "prune", "recover")}
        names = [*epochs]
        before = sum(epochs[name] for name in names[: names.index(stage)])
        return before / sum(epochs.values()), min(1.0, (before + epochs[stage]) / sum(epochs.values()))

    def fit(self, model: Any, data: Data, phase: Phase, name: str, stage: str) -> dict[str, Any]:
        """Trains a model in a run whose folder is named by all that it depends on; returns the accuracies."""
        inputs = {"name": name, "phase": vars(phase), **self.stages()[stage].inputs()}
        folder = self.out / "runs" / f"{stage}-{name}-{digest(inputs)[:8]}"
        records = train(model, data, phase, folder, self.settings, self.accelerator, inputs)
        checks = [record["accuracy"] for record in records if "accuracy" in record]
        return {"run": folder.name, "steps": records[-1]["step"], "validation": accuracy(model, data), "checks": checks}

    def distill(self) -> dict[str, Any]:
        """Trains the teacher where it is not trained, then the student on its logits."""
        settings, named = self.settings, self.settings.teacher
        teacher = small_model(settings, "teacher", self.tokenizer) if named is None else None
        result: dict[str, Any] = {}
        if settings.teacher_epochs:
            teacher = load_model(named) if teacher is None else teacher
            phase = Phase(settings.teacher_epochs, settings.teacher_lr or settings.lr or 0.0)
            result["teacher"] = self.fit(teacher, self.data(), phase, "teacher", "distill")
        teacher = load_teacher(named) if teacher is None else teacher
        self.save(teacher, "teacher")
        taught = teach(teacher, self.train_pieces, self.accelerator.device)
        if self.accelerator.is_main_process:
            save_file({"logits": taught}, self.out / "teacher_logits.safetensors")
        del teacher
        student = load_model(settings.student) if settings.student else small_model(settings, "student", self.tokenizer)
        phase = Phase(settings.distill_epochs or 1, settings.lr or 0.0, self.span("distill"))
        result["student"] = self.fit(student, self.data(taught), phase, "student", "distill")
        self.save(student, "distilled")
        return result

    def prune(self) -> dict[str, Any]:
        """Prunes two students while they learn: units by a schedule, and weights to 2:4; a third one learns alone."""
        phase = {"epochs": self.settings.prune_epochs or 1, "lr": self.settings.lr or 0.0, "best": False}
        return self.each("prune", "distilled", "masked", phase)

    def recover(self) -> dict[str, Any]:
        """Trains all three with their masks kept, until their accuracy rises no more."""
        phase = {"epochs": self.settings.recover_epochs or 1, "lr": self.settings.recover_lr or 0.0}
        return self.each("recover", "masked", "recovered", phase)

    def each(self, stage: str, source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
        """Trains the model of each branch from one folder to another."""
        data, result = self.data(self.taught()), {}
        for name, pruning in BRANCHES.items():
            model = load_model(self.out / source if stage == "prune" else self.out / source / name)
            phase = Phase(span=self.span(stage), pruning=pruning if stage == "prune" else "none", **options)
            result[name] = self.fit(model, data, phase, name, stage)
            self.save(model, f"{target}/{name}")
        return result

    def slim(self) -> dict[str, Any]:
        """Removes the masked units, and packs the 2:4 weights in the fastest form for one sentence."""
        batch, result = self.pieces("validation").batch(range(8)), {}
        student = load_model(self.out / "recovered" / "student")
        self.save(student, "student")
        pruned = load_model(self.out / "recovered" / "pruned")
        if self.settings.criterion != "published":  # whose rows cannot be removed
            before, weights = predict_logits(pruned, [batch]), encoder_weights(pruned)
            units = find_units(student, batch)  # of the student, as masked units show no gradient
            result["pruned"] = slim_masked(pruned, units, self.settings.sparsity)
            result["pruned"] |= {
                "largest_change_of_a_logit": float((predict_logits(pruned, [batch]) - before).abs().max()),
                "removed": 1 - encoder_weights(pruned) / weights,
            }
        self.save(pruned, "pruned")
        sparse = load_model(self.out / "recovered" / "2-4")
        report = sk.compress_(sparse, [passed(1, 32)], where=in_encoder(sparse))
        forms = [layer.decision for layer in report.layers]
        result["2-4"] = {"forms": {form: forms.count(form) for form in sorted(set(forms))}}
        self.save(sparse, "2-4")
        return result

    def quantize(self) -> dict[str, Any]:
        """Quantizes the layers of the encoder to 4 and 8 bits."""
        result = {}
        for name, (source, form) in QUANTIZED.items():
            report = quantize(self.out / source, self.out / name, form)
            errors = [layer.error for layer in report.layers]
            result[name] = {"layers": len(errors), "largest_error": max(errors)}
        return result

    def taught(self) -> Tensor:
        return load_file(self.out / "teacher_logits.safetensors")["logits"]

    def save(self, model: Any, name: str) -> None:
        if self.accelerator.is_main_process:
            save_model(model.cpu(), self.tokenizer, self.out / name)


def slim_masked(model: Any, units: Units, sparsity: float) -> dict[str, Any]:
    """Removes the units of a model that are masked: those have the score 0, and are chosen first."""
    plan = choose_units(model, units, unit_scores(model, units), sparsity)
    report = slim_(model, plan)
    return {"plan": str(plan).splitlines(), "weights": report.weights, "weights_before": report.weights_before}


def passed(batch: int, length: int) -> dict[str, Tensor]:
    """Returns a batch of a size, whose tokens are of no matter."""
    ids = torch.full((batch, length), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
