"""The harness that the speed table rests on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import methods, timing
from bench.report import CPU, README, RESULTS, cpu_page, filled, products, render, slug

ROOT = Path(__file__).parents[1]
REPORT = {
    "device": "AMD EPYC 9005",
    "simd": "avx512_bf16",
    "threads": 2,
    "torch": "2.13.0",
    "date": "2026-01-31",
    "commit": "abc1234",
    "processes": 3,
    "rows": [
        {
            "op": "nm_mask 2:4",
            "shape": "4096x4096",
            "dtype": "fp32",
            "goal": {"copy_": 0.7, "topk": 50},
            "seconds": {"own": 0.002, "copy_": 0.003, "topk": 0.09},
            "ratios": {"copy_": 0.75, "topk": 45.0},
            "bytes": 84e6,
        }
    ],
}


def test_calls_take_turns_and_are_compared_round_by_round(monkeypatch):
    clock, calls = [0.0], []

    def call(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = timing.time_in_turns({"own": call("own", 1.0), "slow": call("slow", 3.0)}, budget=0)
    assert times == {"own": [1.0] * 5, "slow": [3.0] * 5}
    rounds = [tuple(calls[start : start + 2]) for start in range(4, 14, 2)]  # after two of each to warm up and to size
    assert set(rounds) == {("own", "slow"), ("slow", "own")}
    assert timing.ratio(times, "own", "slow") == 3
    assert timing.medians({"own": [1.0, 5.0, 2.0]}) == {"own": 2.0} and timing.spread([1.0, 2.0, 3.0]) == 1


@pytest.mark.slow
def test_every_bench_runs(tmp_path):
    """On tiny weights: every check of a result holds, and every row can be rendered."""
    pytest.importorskip("pytest_benchmark")
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-c", "bench/pytest.ini", "--rootdir", "bench", "-p", "tiny_bench"]
    command += [f"--benchmark-json={rows}", "bench"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of an xdist worker
    environment = own | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    cases = [case["extra_info"] for case in json.loads(rows.read_text())["benchmarks"]]
    assert "| `nm_mask 2:4` | fp32 |" in render(REPORT | {"rows": cases})


def test_report_names_the_machine_and_says_what_is_missed():
    text = render(REPORT)
    assert text.startswith("AMD EPYC 9005, avx512_bf16, 2 threads, torch 2.13.0, commit abc1234")
    assert "| `nm_mask 2:4` | fp32 | 2.00 | 42.0 | 75% | 45x (`topk`) |" in text
    assert text.endswith("Short of the goal:\n\n- `nm_mask 2:4`, goal 50x of `topk`: 4096x4096 fp32 45x\n")


def test_report_pivots_linear_by_tokens():
    row = {"op": "linear24", "shape": "8x4", "dtype": "fp32", "goal": {"best dense": 1.6}, "seconds": {"own": 1.0}}
    ratios = {"best dense": 0.9, "F.linear": 2.0}, {"best dense": 1.5, "F.linear": 3.0}
    rows = [row | {"tokens": tokens, "ratios": ratios[tokens > 1]} for tokens in (1, 16)]
    text = render(REPORT | {"rows": rows})
    assert "| `linear24` | dtype | 1 | 16 |" in text
    assert "| 8x4 | fp32 | **0.90** (2.0) | 1.50 (3.0) |" in text
    assert text.endswith("- `linear24`, goal 1.6x of `best dense`: 8x4 fp32 0.9x at 1, 1.5x at 16\n")


def test_report_of_whole_steps():
    row = {"step": "Wanda 2:4", "shape": "12 stages", "goal": {"group loop": 50, "topk": 15}}
    row |= {"seconds": {"own": 0.04, "topk": 0.8, "group loop": 1.6}, "ratios": {"topk": 20.0, "group loop": 40.0}}
    text = render(REPORT | {"rows": [row]})
    assert "| Wanda 2:4 | 12 stages | 40 | 20x (topk, 0.8 s), 40x (group loop, 1.6 s) |" in text
    assert text.endswith("Short of the goal:\n\n- Wanda 2:4, goal 50x of `group loop`: 12 stages 40x\n")


def test_report_of_the_methods():
    rows = {
        "dense": {"stories260K": {"perplexity": 4.0862, "tokens": 37072}, "stage": {}},
        "Wanda": {
            "stories260K": {"perplexity": 70.42, "tokens": 37072, "error": 0.3074, "seconds": 0.5},
            "stage": {"seconds": 1.234, "memory": 3 * 2**20},
        },
    }
    report = REPORT | {"kind": "methods", "calibration": 16384, "scored": 37072, "rows": rows}
    text = render(report | {"stage": {"dim": 768, "tokens": 2048}})
    assert "2:4, calibrated on 16384 tokens, perplexity of 37072 others" in text
    assert "| dense |  | 4.1 |  |  |  |\n| Wanda | 0.307 | 70.4 | 0.5 | 1.2 | 3 |\n" in text
    assert slug(report) == "methods-amd-epyc-9005-avx512-bf16"


def test_one_method_is_merged_into_the_report_in_its_place(monkeypatch):
    rows = {"dense": {"stage": {}}, "ADMM": {"stage": {"seconds": 2.0}}}
    monkeypatch.setattr(methods, "commit", lambda: "def5678")
    monkeypatch.setattr(methods, "today", lambda: "2026-02-28")
    report = REPORT | {"rows": rows}
    for seconds in (3.0, 1.0):  # the second time, the row is replaced
        report = methods.merged(report, "RIA", {"stage": {"seconds": seconds}})
    assert list(report["rows"]) == ["dense", "RIA", "ADMM"]
    assert report["rows"]["RIA"] == {"commit": "def5678", "date": "2026-02-28", "stage": {"seconds": 1.0}}
    assert report["rows"]["ADMM"] == {"commit": "abc1234", "date": "2026-01-31", "stage": {"seconds": 2.0}}
    assert (report["commit"], report["date"]) == ("abc1234 and def5678", "2026-01-31 and 2026-02-28")
    assert report.keys() == REPORT.keys() and rows.keys() == {"dense", "ADMM"}


def test_every_method_is_measured():
    """On one machine at least: who adds a method cannot measure it on all of them."""
    stored = [list(json.loads(path.read_text())["rows"]) for path in RESULTS.glob("methods-*.json")]
    assert list(methods.METHODS) in stored


def test_report_has_a_table_for_every_linear_op():
    row = {"shape": "8x4", "dtype": "fp32", "tokens": 1, "goal": {}, "seconds": {"own": 1.0}}
    row["ratios"] = {"best dense": 1.25, "F.linear": 2.0}
    text = render(REPORT | {"rows": [row | {"op": "linear24"}, row | {"op": "linear_tiered"}]})
    assert "| `linear24` | dtype | 1 |" in text and "| `linear_tiered` | dtype | 1 |" in text


def test_report_names_the_result_file():
    assert slug(REPORT) == "amd-epyc-9005-avx512-bf16"


def test_products_of_readme_take_the_fastest_form_of_a_weight():
    row = {"shape": "8x4", "dtype": "fp32", "tokens": 1, "goal": {}}
    slow = row | {"op": "linear24", "seconds": {"own": 2.0}, "ratios": {"best dense": 0.5, "F.linear": 1.0}}
    fast = row | {"op": "linear24 row pairs", "seconds": {"own": 1.0}, "ratios": {"best dense": 1.0, "F.linear": 2.0}}
    text = products(REPORT | {"rows": [slow, fast, slow | {"tokens": 4}]})
    assert "| 2:4, fp32 | 1 | 4 |" in text and "| 8x4 | 1.00 (2.0) | **0.50** (1.0) |" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_measured_table_is_shown(path):
    report = json.loads(path.read_text())
    assert path.stem == slug(report)
    assert render(report) in (README if "kind" in report else CPU).read_text()


def test_the_page_and_the_generated_parts_of_readme_are_of_today():
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    assert cpu_page(reports) == CPU.read_text()
    assert filled(README.read_text(), reports) == README.read_text()
