"""The whole GPU bench, rehearsed on the CPU: every section, the JSON and the tables."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import vendor

from bench.gpu import __main__ as program
from bench.gpu import memory_ops, products
from bench.gpu.clock import KernelClock
from bench.gpu.goals import MODES
from bench.gpu.lab import Lab, Sizes
from bench.gpu.table import details, render
from bench.shapes import name
from sparsekit.ops import _vendor

LONG = 600  # seconds, on a busy machine too
TINY = Sizes(
    memory=((64, 64), (16, 32)),
    linear=((128, 128),),
    tokens=(1, 96),
    copy_bytes=2**16,
    product=(64,),
    compress_seconds=0.001,
)
PROPERTIES = SimpleNamespace(name="acted", major=9, minor=0, multi_processor_count=1, total_memory=1, L2_cache_size=1)


class ActedKernelClock(KernelClock):
    """Times calls that have ended when they return, in two rounds."""

    cache = 0

    def __init__(self):
        return

    def time_in_turns(self, contenders, budget=0, *, capture=False, least=2):
        return super().time_in_turns(contenders, 0, least=2)

    def warm_up(self, run):
        run()

    def graph(self, calls):
        return None

    def once(self, run, host_seconds, calls):
        begin = time.perf_counter()
        run()
        return ((time.perf_counter() - begin) / calls,) * 2


LAB = Lab(torch.device("cpu"), TINY, "cusparselt_sm90", ActedKernelClock(), backend="eager")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The report of all sections, each in this process."""
    out = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        vendor.install(patch, vendor.Vendor(wrong=(1,)))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
        patch.setattr(_vendor, "suggest", lambda *args: (3, 1, -1))
        patch.setattr(products, "to_sparse_semi_structured", lambda weight: weight)
        patch.setattr(memory_ops, "torch_tile", lambda weight: weight)
        patch.setattr(program, "gpu_lab", lambda tune: replace(LAB, tuned=set()))
        patch.setattr(program, "run", run_here)
        patch.setenv("XDG_CACHE_HOME", str(out / "cache"))
        return out, program.measure_all("acted", program.SECTIONS, out, tune=True)


def run_here(section, path, seconds, tune):
    program.measure(section, path, LONG, tune)
    return program.how_it_ended(program.read(path))


def rows(report, section, key):
    return [row for row in report["sections"][section]["rows"] if key in row]


def test_every_section_runs_to_its_end(rehearsed):
    _, report = rehearsed
    assert {section["ended"] for section in report["sections"].values()} == {"done"}
    everything = [row for section in report["sections"].values() for row in section["rows"]]
    assert [row for row in everything if "error" in row] == []
    refused = {text.split(":")[0] for row in everything for text in row.get("wrong", {}).values()}
    assert refused == {"RuntimeError", "ValueError"}  # an algorithm that is not there, and one that is wrong


def test_every_op_is_checked_and_timed(rehearsed):
    _, report = rehearsed
    measured = {(row["op"], row["shape"], row["dtype"]): row for row in rows(report, "memory", "op")}
    whole, small = map(name, TINY.memory)
    wanted = {(op, whole, "bf16") for op in memory_ops.OPS} | {(op, whole, "fp32") for op in memory_ops.ALSO_FP32}
    assert measured.keys() == wanted | {(op, small, "bf16") for op in memory_ops.OPS if "hardware24" not in op}
    for row in measured.values():
        assert row["seconds"]["own"] > 0 and row["seconds"]["copy"] > 0 and row["baselines"]["reference"] > 0
    weight = 64 * 64
    assert measured["nm_mask 2:4", whole, "bf16"]["bytes"] == 3 * weight
    assert measured["nm_mask 2:4", whole, "bf16"]["baselines"].keys() == {"compiled rank", "topk", "reference"}
    assert measured["nm_mask_bits 2:4", whole, "fp32"]["bytes"] == 4 * weight + weight // 8
    assert measured["prune_pack24", whole, "bf16"]["bytes"] == 2 * weight + 9 * weight // 8 + 4 * 64


def test_products_are_compared_with_cublas(rehearsed):
    _, report = rehearsed
    measured = rows(report, "linear", "ratios")
    plain = [row for row in measured if "F.linear compiled" not in row["ratios"]]
    for row in plain:
        forms = {"F.linear", "semi-structured", *(["linear24"] if row["tokens"] <= 64 else [])}
        assert row["seconds"].keys() == row["host"].keys() == forms
        assert row["ratios"].keys() == forms - {"F.linear"} and not row["wrong"]
    assert len(plain) == len(TINY.linear) * len(TINY.tokens)
    assert [row["tokens"] for row in measured[len(plain) :]] == [1, 16, 1024]
    measured = rows(report, "tiered", "ratios")
    assert [row["tokens"] for row in measured] == [1, 8, 16, 32, 1024]
    assert all(row["ratios"].keys() == {"linear_tiered"} and not row["wrong"] for row in measured)
    assert "- 128x128, 16 tokens: " in details(report)


def test_a_wrong_algorithm_is_refused(rehearsed):
    _, report = rehearsed
    measured = rows(report, "search", "algorithm")
    assert [row["tokens"] for row in measured] == list(TINY.tokens)
    for row in measured:
        assert "wrong" in row["wrong"]["(1, 1, -1)"] and "invalid value" in row["wrong"]["(4, 1, -1)"]
        assert not {f"({right}, 1, -1)" for right in (0, 2, 3)} & row["wrong"].keys()
        assert row["algorithm"][0] in (0, 2, 3) and row["picked by the library"] == [3, 1, -1]
        assert row["ratios"]["cuSPARSELt"] > 0


def test_compressed_layers_are_compared_with_dense_ones(rehearsed):
    _, report = rehearsed
    measured = rows(report, "compress", "ratios")
    assert len(measured) == len(MODES) * len(TINY.linear) * len(TINY.tokens)
    assert all(row["choice"] and not row["wrong"] and row["goal"].keys() == row["ratios"].keys() for row in measured)
    assert [row["said"].partition(" became ")[0] for row in rows(report, "compress", "said")] == [
        f"{mode}: 128x128" for mode in MODES
    ]


def test_the_tables_are_written(rehearsed):
    out, report = rehearsed
    text = (out / "table.md").read_text()
    assert render(report) in text and details(report) in text
    assert "| `nm_mask 2:4` | 64x64 | bf16 |" in text and "| `linear24` | 1 | 16 | 96 | 1024 |" in text
    assert json.loads((out / "acted.json").read_text()) == json.loads(json.dumps(report))


def test_the_best_product_is_profiled_alone(rehearsed, monkeypatch):
    out, report = rehearsed
    acted, events = vendor.install(monkeypatch, vendor.Vendor()), []
    monkeypatch.setattr(products, "gpu_lab", lambda: LAB)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for event in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, event, lambda event=event: events.append((event, len(acted.calls))))
    products.profile(out / "sections", 128, 96)
    assert events == [("start", 1), ("stop", 2)]
    (best,) = [row["algorithm"] for row in rows(report, "search", "algorithm") if row["tokens"] == 96]
    assert acted.calls == [(96, *best)] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys):
    assert program.main([]) == 2
    assert capsys.readouterr().err == "bench.gpu: this needs a GPU that PyTorch can use\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_section_that_fails_or_hangs_ends_alone(tmp_path, monkeypatch):
    path = tmp_path / "sections" / "machine.jsonl"
    assert program.run("machine", path, LONG, False) == "failed with exit code 1"
    (row,) = program.read(path)
    assert row["what"] == "the end" and row["error"]
    assert "Traceback" in path.with_suffix(".log").read_text()
    monkeypatch.setattr(program, "GRACE", -8.9)
    assert program.run("machine", path, 9, True) == "stopped, as it did not end within 0 s"
