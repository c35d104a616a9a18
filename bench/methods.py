"""Cost and quality of every pruning method: `SPARSEKIT_DATA=... python -m bench.methods` writes a result file.

Each method prunes to 2:4 in a process of its own. Quality is of stories260K (a trained Llama of 260 thousand
parameters), calibrated on one part of TinyStories and scored on another; time and memory are also those of a random
stage of a realistic width. It takes about five minutes. ``--method NAME`` measures one method in about half a minute,
and merges its row into the result file of this machine.
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.ops import simd_level

from .report import RESULTS, commit, cpu_name, render, slug, today, write

ROOT = Path(__file__).parents[1]
WANDA = sk.Wanda("2:4")
METHODS: dict[str, sk.prune.Method | None] = {
    "dense": None,
    "Magnitude": sk.Magnitude("2:4"),
    "Wanda": WANDA,
    "RIA": sk.RIA("2:4"),
    "Swaps(Wanda)": sk.Swaps(WANDA),
    "SparseGPT": sk.SparseGPT("2:4"),
    "LeastSquares(Wanda)": sk.LeastSquares(WANDA),
    "LeastSquares(Swaps(Wanda))": sk.LeastSquares(sk.Swaps(WANDA)),
    "ADMM": sk.ADMM("2:4"),
}
SCORED, CALIBRATION, WINDOW = 100, 128, 128  # stories, then windows, of so many tokens
DIM, TOKENS = 768, 2048


def stories() -> tuple[nn.Module, list[Any], list[Tensor]]:
    """Returns stories260K, its calibration batches, and the first stories, to score."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    data = Path(os.environ["SPARSEKIT_DATA"])
    folder = data / "ckpt_stories260K" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (data / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:-1]
    tokens = [torch.tensor(tokenizer(text.strip(), verbose=False)["input_ids"])[:512] for text in texts[: 4 * SCORED]]
    windows = [each[:WINDOW] for each in tokens[SCORED:] if len(each) >= WINDOW][:CALIBRATION]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval(), [{"input_ids": batch} for batch in torch.stack(windows).split(32)], tokens[:SCORED]


class TransformerLayer(nn.Module):
    """The linear layers of one transformer layer, with residuals; attention has no weight to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.qkv(x)[..., :DIM])
        return x + self.down(torch.relu(self.up(x)))


def stage() -> tuple[nn.Module, list[Any], list[Tensor]]:
    torch.manual_seed(0)
    return TransformerLayer(), list(torch.randn(TOKENS, DIM).split(512)), []


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any], list[Tensor]]]] = {"stories260K": stories, "stage": stage}


@torch.no_grad()
def perplexity(model: nn.Module, documents: list[Tensor]) -> float:
    total = sum(model(input_ids=each[None], labels=each[None]).loss * (len(each) - 1) for each in documents)
    return float((total / sum(len(each) - 1 for each in documents)).exp())


def resident(field: str) -> int:
    """Returns VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(model_name: str, method: sk.prune.Method | None) -> dict[str, float]:
    """Returns one row, measured in this process: the memory of the first run, the time of the last."""
    torch.set_num_threads(1)  # many of the products are small, and threads would mostly wait for each other
    model, batches, documents = MODELS[model_name]()
    row: dict[str, float] = {}
    if method is not None:
        with torch.no_grad():
            model(**batches[0]) if isinstance(batches[0], dict) else model(batches[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        pruned = copy.deepcopy(model) if documents else model
        began = time.perf_counter()
        report = sk.prune_(pruned, method, batches)
        row = {"seconds": time.perf_counter() - began, "memory": resident("VmHWM") - before}
        if documents:
            row |= {"seconds": sk.prune_(copy.deepcopy(model), method, batches).seconds, "error": report.error or 0.0}
            model = pruned
    if documents:
        row |= {"perplexity": perplexity(model, documents), "tokens": sum(len(each) - 1 for each in documents)}
    return row


def child(model_name: str, method: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.methods", "--model", model_name, "--method", method]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def settings() -> dict[str, Any]:
    """Returns what all rows of a result file have in common."""
    return {
        "kind": "methods",
        "device": cpu_name(),
        "simd": simd_level(),
        "threads": 1,
        "torch": torch.__version__,
        "calibration": CALIBRATION * WINDOW,
        "stage": {"dim": DIM, "tokens": TOKENS},
    }


def merged(report: dict[str, Any], method: str, row: dict[str, Any]) -> dict[str, Any]:
    """Returns ``report`` with a new row for one method, and with the commits and dates of all rows in its head."""
    head = {key: report[key] for key in ("commit", "date")}
    rows = {name: head | each for name, each in report["rows"].items()}
    rows[method] = {"commit": commit(), "date": today()} | row
    head = {key: " and ".join(dict.fromkeys(each[key] for each in rows.values())) for key in head}
    return report | head | {"rows": {name: rows[name] for name in METHODS if name in rows}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__)
    parser.add_argument("--method", choices=METHODS, help="measure this one alone, and merge its row into the file")
    parser.add_argument("--model", choices=MODELS, help="with --method: print its results on this model, write nothing")
    parsed = parser.parse_args()
    if parsed.model and parsed.method:
        print(json.dumps(measure(parsed.model, METHODS[parsed.method])))
        return
    if parsed.model:
        parser.error("--model needs --method")
    common = settings()
    path, report = RESULTS / f"{slug(common)}.json", {}
    if parsed.method:
        report = json.loads(path.read_text()) if path.exists() else {}
        if any(report.get(key) != value for key, value in common.items()):
            parser.error(f"{path} does not exist, or has other settings than {common}: run without --method")
    rows = {}
    for method in [parsed.method] if parsed.method else METHODS:
        rows[method] = {name: child(name, method) for name in MODELS}
        print(method, rows[method], flush=True)
    if parsed.method:
        report = merged(report, parsed.method, rows[parsed.method])
    else:
        scored = int(rows["dense"]["stories260K"]["tokens"])
        report = common | {"date": today(), "commit": commit(), "scored": scored, "rows": rows}
    write(path, report)
    print(render(report))


if __name__ == "__main__":
    main()
