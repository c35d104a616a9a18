"""The tables of the GPU bench, from results that a person can check."""

import json
from pathlib import Path

from bench.gpu import goals
from bench.gpu.lab import Sizes
from bench.gpu.table import details, errors, products, render, short, unmeasured
from bench.report import RESULTS, render_gpus, slug

README = Path(__file__).parents[1] / "README.md"
MACHINE = [
    {"name": "device", "device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"},
    {"name": "copy", "GB/s": {"copy_": 4000.0, "clone": 3900.0}},
    {"name": "product", "TFLOP/s": 800.0},
]
MASK = {
    "op": "nm_mask 2:4",
    "shape": "4096x4096",
    "dtype": "bf16",
    "goal": 12.5,
    "seconds": {"own": 13.1e-6},
    "bytes": 3 * 4096**2,
    "baselines": {"topk": 1.31e-3, "reference": 655e-6},
}
CELL = {"op": "linear", "shape": "4096x4096", "dtype": "bf16", "tokens": 1, "goal": {"linear24": 1.5}}
DENSE = {"seconds": {"F.linear": 8e-6, "linear24": 6.4e-6}, "host": {"F.linear": 9e-6}, "ratios": {"linear24": 1.25}}
BEST = {"seconds": {"cuSPARSELt": 1e-5}, "ratios": {"cuSPARSELt": 0.8}, "choice": "algorithm 3", "goal": {}}
CHOSEN = {
    "seconds": {"compress_": 6.4e-6},
    "ratios": {"compress_": 1.24},
    "choice": "2:4",
    "goal": {"compress_": 1.0},
}


def report(**rows):
    sections = {name: {"ended": "done", "seconds": 1.0, "rows": each} for name, each in rows.items()}
    return {"kind": "gpu", "device": "NVIDIA H200", "date": "2026-11-21", "commit": "abc1234", "sections": sections}


FULL = report(machine=MACHINE, memory=[MASK], linear=[CELL | DENSE], search=[CELL | BEST], compress=[CELL | CHOSEN])


def test_goals_are_those_of_the_large_weights():
    assert goals.op_goal("nm_mask 2:4", "4096x4096", "bf16") == 12.5
    assert goals.op_goal("nm_mask 2:4", "4096x4096", "fp32") is None
    assert goals.linear_goals("4096x14336", 16) == {"linear24": 1.5}
    assert goals.linear_goals("4096x14336", 1024) == {"best": 1.2}
    assert goals.linear_goals("768x768", 1) == goals.linear_goals("4096x4096", 64) == {}
    assert Sizes().memory[0] == (4096, 4096)


def test_report_names_the_machine_its_limits_and_what_is_missed():
    text = render(FULL)
    assert text.startswith("NVIDIA H200, torch 2.11.0, triton 3.6.0, cuda 13.0, commit abc1234, 2026-11-21; medians")
    assert "A copy: 4000 GB/s; the largest dense bf16 product: 800 TFLOP/s." in text
    assert "| `nm_mask 2:4` | 4096x4096 | bf16 | 13.1 | 3842 | 96% | 12.5 | 100.0x (topk) | 50x |" in text
    assert "| 4096x4096 | 1.25 linear24 |" in text and "| 4096x4096 | 1.24 |" in text
    assert list(short(FULL)) == [
        "`nm_mask 2:4` 4096x4096 bf16: 13.1 us, goal 12.5 us",
        "`linear24` 4096x4096, 1 tokens: 1.25x of cuBLAS, goal 1.5x",
    ]
    assert slug(FULL) == "nvidia-h200"
    noisy = CELL | CHOSEN | {"ratios": {"compress_": 0.98}}
    assert not list(short(report(compress=[noisy])))
    assert list(short(report(compress=[noisy | {"ratios": {"compress_": 0.96}}]))) == [
        "`compress_` 4096x4096, 1 tokens: 0.96x of cuBLAS, goal 1.0x"
    ]
    slow = CELL | {"tokens": 2048, "goal": {"best": 1.2}, "seconds": {}, "host": {}, "ratios": {"cuSPARSELt": 0.9}}
    assert "| 4096x4096 | **0.90** cuSPARSELt |" in render(report(search=[slow]))
    assert list(short(report(search=[slow]))) == [
        "the fastest 2:4 product 4096x4096, 2048 tokens: 0.90x of cuBLAS, goal 1.2x"
    ]


def test_details_list_every_product_and_error():
    (cell,) = products(FULL).values()
    assert cell["best"] == (1.25, "linear24")
    text = details(FULL)
    assert "| 4096x4096 | 1 | linear24 | 6.4 |  | 5.2 | 1% | 2949 | 74% | 1.25 |" in text
    assert "| 4096x4096 | 1 | cuSPARSELt (algorithm 3) | 10.0 |  | 3.4 | 0% | 1887 | 47% | 0.80 |" in text
    assert "\n\nmemory: done in 1 s\n" in text
    broken = report(memory=[{"what": "nm_mask", "error": "ValueError: wrong"}] * 2)
    assert "memory: done in 1 s\n\n- nm_mask: ValueError: wrong (2 times)\n" in details(broken)
    assert "medians" in render(broken) and "not measured" in render(broken)
    wrong = {"op": "nm_mask", "shape": "8x8", "wrong": {"topk": "KeyError: 1"}}
    assert errors([wrong]) == ["nm_mask 8x8 topk: KeyError: 1"]


def test_readme_shows_what_was_measured_on_gpus_or_that_nothing_was():
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert render_gpus(reports) in README.read_text()
    assert render_gpus([]) == unmeasured()
    assert unmeasured().count("not measured") == len(goals.OPS) + 3
    assert "| `nm_mask 2:4` | 12.5 us | 10.5 us | not measured |" in unmeasured()
