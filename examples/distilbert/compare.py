"""Compares all models of a pipeline's folder in one report: tables and pictures of accuracy, time and size.

python examples/distilbert/compare.py --out examples/distilbert/out
"""

import copy
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from config import Settings, run_command
from evaluate import LENGTH, measure, test_pieces
from models import in_encoder, load_model, load_tokenizer
from pipeline import ROWS, Pipeline, passed
from show import draw_comparison, draw_report, write_csv, write_markdown
from stages import Stage
from torch import Tensor, nn
from trainer import read_records

import sparsekit as sk
from sparsekit.evaluate import Latency, compare_classifiers, measure_latency

BEST_DENSE = "student, best dense"
PARENTS = {"student-nf4": "student", "pruned-nf4": "pruned", "2-4-nf4": "2-4", "2-4-int8": "2-4"}


def report_stage(settings: Settings, pipeline: Pipeline) -> Stage:
    """Returns the last stage."""
    out = settings.out
    writes = [out / "final_report.json", out / "final_report.png", out / "training_history.json", out / "results"]
    given = settings.given("data", "test_examples", "max_length", "grid", "seconds", "loads", "seed")
    return Stage("report", lambda: report(settings), given, [out / name for name in ROWS], writes)


def report(settings: Settings) -> dict[str, Any]:
    """Measures all models, writes the tables and the pictures, and returns the figures."""
    out = settings.out
    missing = [name for name in ROWS if not (out / name / "config.json").is_file()]
    if missing:
        raise ValueError(f"there is no model {missing[0]} in {out}: run the stages of run.py before this one")
    test = test_pieces(settings, load_tokenizer(out / "student"))
    rows, logits = {}, dict[str, Tensor]()
    for name in ROWS:
        rows[name], logits[name] = measure(out / name, test, settings.loads)
    for name, row in rows.items():
        row["against_student"] = asdict(compare_classifiers(logits["student"], logits[name], test.labels))
        if parent := PARENTS.get(name):
            row["against_parent"] = asdict(compare_classifiers(logits[parent], logits[name], test.labels))
    latency = time_models(out, settings)
    found = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "seed": settings.seed,
        "flops_at": [1, LENGTH],
        "rows": rows,
        "latency": [asdict(each) for each in latency],
        "goals": goals(rows, latency),
    }
    (out / "final_report.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    history = {each.name: read_records(each) for each in sorted((out / "runs").glob("*")) if each.is_dir()}
    (out / "training_history.json").write_text(json.dumps(history) + "\n", "utf-8")
    results = out / "results"
    results.mkdir(exist_ok=True)
    draw_report(found, out / "final_report.png")
    for suffix in ("png", "pdf"):
        draw_comparison(found, results / f"model_comparison.{suffix}")
    write_csv(found, results / "model_comparison.csv")
    write_markdown(found, results / "model_comparison.md")
    return {"rows": rows, "latency": found["latency"], "goals": found["goals"]}


def time_models(out: Path, settings: Settings) -> tuple[Latency, ...]:
    """Times all models in turns, and beside them the student with its dense layers in their fastest form."""
    models: dict[str, nn.Module] = {name: load_model(out / name) for name in ROWS}
    models[BEST_DENSE] = copy.deepcopy(models["student"])
    sk.compress_(models[BEST_DENSE], [passed(*settings.grid[0])], where=in_encoder(models[BEST_DENSE]))
    return measure_latency(models, passed, settings.grid, budget=settings.seconds)


def goals(rows: dict[str, Any], latency: tuple[Latency, ...]) -> dict[str, Any]:
    """Returns what the pipeline is asked for, as it was measured."""
    times = {(each.model, each.batch, each.length): each.p50 for each in latency}
    sizes = sorted({(each.batch, each.length) for each in latency})

    def faster(name: str, than: str) -> dict[str, float]:
        return {f"{b}x{n}": times[than, b, n] / times[name, b, n] for b, n in sizes}

    student, pruned = rows["student"], rows["pruned"]
    low, high = student["interval"]
    return {
        "encoder_weights_removed": 1 - pruned["encoder_weights"] / student["encoder_weights"],
        "pruned_within_the_interval_of_the_student": low <= pruned["accuracy"] <= high,
        "pruned_times_faster": faster("pruned", "student"),
        "2-4_times_faster": faster("2-4", "student"),
        "2-4_times_faster_than_best_dense": faster("2-4", BEST_DENSE),
        "2-4-int8_times_faster": faster("2-4-int8", "student"),
    }


def main(settings: Settings) -> dict[str, Any]:
    """Writes the report and prints its table."""
    found = report(settings)
    print((settings.out / "results" / "model_comparison.md").read_text("utf-8"))
    return found


if __name__ == "__main__":
    run_command(main, Settings, __doc__)
