"""A whole model at several token counts, as ``compress_`` leaves it beside every single choice for all of its layers.

``python -m bench.whole`` measures six blocks of LayerNorm, 768 to 3072, GELU, 3072 to 768 and a residual, whose weights
are 2:4, and writes a result file. All forms of the model are called in turns, in one process; the tune cache is off.
It takes about two minutes. ``--tokens 1 8`` measures these alone, and merges their rows into the result file.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import ArrangedLinear24, Linear24, PrepackedLinear
from sparsekit.ops import simd_level

from .report import RESULTS, commit, cpu_name, render, slug, today, write
from .timing import medians, ratio, time_in_turns

BLOCKS, DIM, HIDDEN = 6, 768, 3072
TOKENS = (1, 8, 16, 128, 512)
THREADS = 2
SINGLE: dict[str, Callable[[nn.Linear, int], nn.Module]] = {
    "every layer Linear24": lambda linear, tokens: Linear24.from_linear(linear),
    "every layer row pairs": lambda linear, tokens: ArrangedLinear24.from_linear(linear, layout="row pairs"),
    "every layer prepacked": lambda linear, tokens: PrepackedLinear.from_linear(linear, tokens=tokens),
}

LOSSY = {"int8": 0.02, "int4": 0.1}  # precisions, and the relative error that each may have


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def sparse_model() -> nn.Sequential:
    """Returns the model in eval mode, with random 2:4 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS))).eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    return model


def measure(tokens: int, budget: float) -> dict[str, Any]:
    """Returns one row: the times of all forms of the model in milliseconds, and what ``compress_`` chose.

    Raises:
        AssertionError: two forms compute different results, or one of lower precision has too large an error.
    """
    plain, x = sparse_model(), torch.randn(tokens, DIM)
    models: dict[str, nn.Module] = {"plain": plain, "compress_": copy.deepcopy(plain)}
    report = sk.compress_(models["compress_"], x)
    for name, make in SINGLE.items():
        model = models[name] = copy.deepcopy(plain)
        for block in model:
            block.up, block.down = make(block.up, tokens), make(block.down, tokens)
    expected = plain(x)
    for model in models.values():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    exact = tuple(models)
    for precision, error in LOSSY.items():
        model = models[f"compress_ {precision}"] = copy.deepcopy(plain)
        sk.compress_(model, x, precision=precision)
        assert (model(x) - expected).norm() <= error * expected.norm()
    times = time_in_turns({name: (lambda model=model: model(x)) for name, model in models.items()}, budget, 15)
    found = medians(times)
    best = min((name for name in exact if name != "compress_"), key=lambda name: found[name])
    return {
        "ms": {name: round(1e3 * seconds, 3) for name, seconds in found.items()},
        "least_ms": {name: round(1e3 * min(each), 3) for name, each in times.items()},
        "chosen": {str(layer.shape): layer.decision for layer in report.layers},
        "forms": {form: [round(each.ratio, 3) for each in timings] for form, timings in report.forms.items()},
        "measured": [round(timing.ratio, 3) for timing in report.passes],
        "seconds": round(report.tune_seconds, 2),
        "undecided": len(report.undecided),
        "best": best,
        "over_plain": round(ratio(times, "compress_", "plain"), 3),
        "over_best": round(ratio(times, "compress_", best), 3),
    }


def settings() -> dict[str, Any]:
    """Returns what all rows of a result file have in common."""
    return {
        "kind": "whole",
        "device": cpu_name(),
        "simd": simd_level(),
        "threads": THREADS,
        "torch": torch.__version__,
        "model": {"blocks": BLOCKS, "dim": DIM, "hidden": HIDDEN, "pattern": "2:4"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.whole", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="only these")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of one comparison of all forms")
    parsed = parser.parse_args()
    os.environ["SPARSEKIT_TUNE_CACHE"] = "0"
    torch.set_num_threads(THREADS)
    common = settings()
    path = RESULTS / f"{slug(common)}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    rows = report["rows"] if all(report.get(key) == value for key, value in common.items()) else {}
    with torch.no_grad():
        for tokens in parsed.tokens:
            rows[str(tokens)] = {"date": today(), "commit": commit(), **measure(tokens, parsed.budget)}
            print(tokens, rows[str(tokens)], flush=True)
    report = common | {"rows": dict(sorted(rows.items(), key=lambda item: int(item[0])))}
    write(path, report)
    print(render(report))


if __name__ == "__main__":
    main()
