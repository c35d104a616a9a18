"""The whole GPU bench, rehearsed on the CPU: every part, the JSON and the tables."""

import json

import pytest
import torch

from bench.gpu import __main__ as program
from bench.gpu import build, counters, masks, parts, suite
from bench.gpu.goals import MODES
from bench.gpu.rehearsal import TINY
from bench.gpu.table import details, render
from bench.report import slug
from bench.shapes import name

SUITE = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2, "not equal"
"""
LONG = 600  # seconds, on a busy machine too
EXPECTED = ("operation not supported when calling", "wrong: a relative error", "a graph needs a GPU")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The report of all parts, each in this process; pip is only asked its version, and the suite is two tests."""
    out = tmp_path_factory.mktemp("rehearsal")
    tests = out / "test_two.py"
    tests.write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "COMMAND", ["-m", "pip", "--version"])
        patch.setattr(suite, "files", lambda: [str(tests)])
        patch.setattr(counters.shutil, "which", lambda tool: None)
        assert program.main(["--rehearse", "--tune", "--out", str(out)], run=attempt) == 0
    return out, json.loads((out / "rehearsal.json").read_text())


def attempt(part, out, seconds, rehearse):
    parts.measure(part, out, LONG, rehearse)
    return {**parts.finished(parts.read(parts.rows_path(out, part))), "seconds": 0.0}


def all_rows(report, part):
    return report["parts"][part]["rows"]


def errors(report):
    for part in report["parts"].values():
        for row in part["rows"]:
            yield from row.get("wrong", {}).values()
            yield from (each for each in row.get("baselines", {}).values() if isinstance(each, str))
            if "error" in row:
                yield row["error"]


def test_every_part_runs_to_its_end(rehearsed):
    _, report = rehearsed
    assert list(report["parts"]) == ["build", "machine", "tune", *(part.name for part in parts.PARTS[2:])]
    assert {ended["status"] for ended in report["parts"].values()} == {"done"}
    unexpected = [text for text in errors(report) if not any(each in text for each in EXPECTED)]
    assert unexpected == ["assert 1 == 2"] or unexpected == ["AssertionError: not equal"]


def test_every_op_is_checked_and_timed(rehearsed):
    _, report = rehearsed
    rows = {(row["op"], row["shape"], row["dtype"]): row for row in all_rows(report, "masks")}
    whole, small = map(name, TINY.masks)
    wanted = {(work.name, whole, dtype) for work in masks.WORKS for dtype in work.dtypes}
    assert rows.keys() == wanted | {(work.name, small, "bf16") for work in masks.WORKS if not work.hardware}
    for row in rows.values():
        assert row["seconds"]["own"] > 0 and row["seconds"]["copy"] > 0 and row["baselines"]["reference"] > 0
    weight = 64 * 64
    assert rows["nm_mask 2:4", whole, "bf16"]["bytes"] == 3 * weight
    assert rows["nm_mask_bits 2:4", whole, "fp32"]["bytes"] == 4 * weight + weight // 8
    assert rows["prune_pack24", whole, "bf16"]["bytes"] == 2 * weight + 9 * weight // 8 + 4 * 64


def test_products_are_raced_against_cublas(rehearsed):
    _, report = rehearsed
    for row in all_rows(report, "linear"):
        forms = {"F.linear", "semi-structured", *(["linear24"] if row["tokens"] <= 64 else [])}
        assert row["seconds"].keys() == row["host"].keys() == forms
        assert row["ratios"].keys() == forms - {"F.linear"} and not row["wrong"]
    assert len(all_rows(report, "linear")) == len(TINY.linear) * len(TINY.tokens)


def test_tiers_are_raced_against_cublas(rehearsed):
    _, report = rehearsed
    measured = all_rows(report, "tiered")
    assert [row["tokens"] for row in measured] == [1, 16, 1024]
    assert all(row["ratios"].keys() == {"linear_tiered"} and not row["wrong"] for row in measured)
    assert "- 64x32, 16 tokens: " in details(report)


def test_a_wrong_algorithm_is_refused(rehearsed):
    _, report = rehearsed
    for row in all_rows(report, "search"):
        assert (
            "wrong" in row["wrong"]["1"]
            and "not supported" in row["wrong"]["4"]
            and not {"0", "2", "3"} & row["wrong"].keys()
        )
        assert row["numbers"][0] in (0, 2, 3) and row["picked by the library"] == "3"
        assert row["ratios"]["cuSPARSELt"] > 0


def test_the_vendor_layout_is_found_from_its_output(rehearsed):
    out, report = rehearsed
    probes = [row for row in all_rows(report, "layout") if row["name"] == "probe"]
    assert [row["cusparselt_sm90"] for row in probes] == [1.0, 1.0]
    assert probes[1]["groups"] == probes[1]["groups that were found"] == 768 and probes[1]["nibbles"] == 1024
    assert (out / "parts" / probes[0]["file"]).exists()
    compared = [row["cusparselt_sm90"] for row in all_rows(report, "layout") if row["name"] == "layout"]
    assert len(compared) == 4
    assert all(row["values that differ"] == row["groups that differ"] == 0 for row in compared)


def test_checks_and_runtime(rehearsed):
    _, report = rehearsed
    assert [row["right"] for row in all_rows(report, "checks")] == [True] * 4
    runtime = all_rows(report, "runtime")
    assert [row["works"] for row in runtime if row.get("name") == "torch.compile"] == [True] * 2
    assert sum("ratios" in row for row in runtime) == len(MODES) * len(TINY.linear) * len(TINY.tokens)
    assert [row for row in all_rows(report, "suite") if row.get("name") == "tests"] == [
        {"name": "tests", "passed": 1, "failed": 1}
    ]
    assert [row["reason"] for row in all_rows(report, "counters")] == ["ncu is not on the PATH"]


def test_the_tables_are_written(rehearsed):
    out, report = rehearsed
    text = (out / "table.md").read_text()
    assert render(report) in text and details(report) in text
    assert "| `nm_mask 2:4` | 64x64 | bf16 |" in text and "| `linear24` | 1 | 96 |" in text
    assert "- 64x64 cusparselt_sm90: equal; 512 bytes of metadata, 512 by the closed form" in text
    assert slug(report) == "rehearsal"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys):
    assert program.main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench.gpu: this needs a GPU that PyTorch can use") and said.count("\n") == 1


def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    ended = parts.run(parts.PARTS[1], tmp_path, LONG, rehearse=True)
    assert ended["status"] == "done"
    assert {row.get("name") for row in parts.read(parts.rows_path(tmp_path, parts.PARTS[1]))} >= {"device", "copy"}


def test_a_part_that_dies_or_hangs_is_reported(tmp_path, monkeypatch):
    ended = parts.run(parts.Part("unheard", 9), tmp_path, 9, rehearse=True)
    assert ended["status"] == "failed" and "invalid choice: 'unheard'" in ended["reason"]
    monkeypatch.setattr(parts, "GRACE", -8.9)
    ended = parts.run(parts.PARTS[1], tmp_path, 9, rehearse=True)
    assert ended["status"] == "stopped" and ended["reason"] == "it did not end within 0 s"
    assert parts.run(parts.PARTS[1], tmp_path, 1, rehearse=True)["status"] == "skipped"
