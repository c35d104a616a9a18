"""The comparison with other libraries: a run on tiny models, and its tables."""

import json

from bench.report import RESULTS, RIVALS, slug
from bench.rivals import libraries, table
from bench.rivals.models import Size
from bench.rivals.run import Worker, forget, read, run, summary

BLOCKS = Size(layers=1, dim=16)


def figures(median, error=1e-7):
    return {"error": error, "best": median / 2, "median": median, "gflops": 40.0, "real_time": True}


def row(kind, **tokens):
    tokens = {tokens.removeprefix("at"): cell for tokens, cell in tokens.items()}
    return {"kind": kind, "versions": {"torch": "2.13.0"}, "convert": 1.25, "load": None, "tokens": tokens}


ROWS = {
    "torch": row("fp32", at1=figures(0.008), at16=figures(0.02)),
    "ONNX Runtime": row("fp32", at1=figures(0.006), at16=figures(0.03)),
    "OpenVINO": {"kind": "fp32", "missing": "openvino is not installed"},
    "sparsekit": row("fp32", at1=figures(0.003), at16=figures(0.025)),
    "torch int8": row("int8", at1=figures(0.004, 0.01)),
    "ONNX Runtime int8": row("int8", at1=figures(0.001, 0.07)),
    "sparsekit int8": row("int8", at1=figures(0.002, 0.01)),
    "sparsekit int4": {"kind": "int4", "missing": "compress_ has no precision"},
}
REPORT = {
    "kind": "rivals",
    "device": "AMD EPYC",
    "simd": "avx2",
    "torch": "2.13.0",
    "commit": "abc",
    "date": "2026-01-31",
}
REPORT |= {"runs": [{"model": "blocks", "threads": 1, "rows": ROWS}]}


def test_the_short_table_compares_with_the_fastest_that_is_right():
    assert table.short(REPORT) == (
        "AMD EPYC, avx2, torch 2.13.0, commit abc, 2026-01-31; medians.\n\n"
        "| model | form | 1 | 16 |\n"
        "| --- | --- | --- | --- |\n"
        "| blocks, 1 thread | sparsekit | 2.00 (ONNX Runtime) | **0.80** (torch) |\n"
        "| blocks, 1 thread | sparsekit int8 | 2.00 (torch int8) |  |\n"
        "| blocks, 1 thread | sparsekit int4 | compress_ has no precision |  |\n"
    )


def test_the_page_has_every_figure_and_says_what_is_not_there():
    text = table.page([REPORT])
    assert "### blocks, 1 thread\n\n| rival | 1 | 16 | error | convert, s | load, s | GFLOP/s |\n" in text
    assert "| torch (torch 2.13.0) | 4 / 8 | 10 / 20 | 1.0e-07 | 1.2 |  | 40 to 40 |\n" in text
    assert "| ONNX Runtime int8 (torch 2.13.0) | 0.5 / 1 |  | **7.0e-02** | 1.2 |  | 40 to 40 |\n" in text
    assert "| OpenVINO | openvino is not installed |  |  |  |  |  |\n" in text
    assert slug(REPORT) == "rivals-amd-epyc-avx2"


def test_a_run_measures_what_is_not_measured_yet(monkeypatch, tmp_path):
    """A rival that runs, in a process of its own, and one that is not installed; then what is left: nothing."""
    missing = "OpenVINO"
    monkeypatch.setitem(libraries.RIVALS, missing, libraries.Rival(libraries.openvino, "fp32", ("no-such-package",)))
    path = tmp_path / "blocks-1.jsonl"
    run(path, BLOCKS, (1, 3), 1, ["torch", missing], rounds=1)
    first = read(path)
    rows = summary(first)
    assert rows["torch"]["tokens"].keys() == {"1", "3"} and rows["torch"]["versions"].keys() == {"torch"}
    assert all(cell["error"] == 0 < cell["best"] <= cell["median"] for cell in rows["torch"]["tokens"].values())
    assert rows["sparsekit"] == {"kind": "fp32", "missing": "not measured"}
    assert rows[missing]["missing"] == "no-such-package is not installed"
    run(path, BLOCKS, (1, 3), 1, ["torch"], rounds=1)
    assert read(path) == first  # nothing is left to do, and no process is started
    forget(path, ["torch"])
    assert {line["rival"] for line in read(path)} == {missing}


def test_a_process_that_dies_is_a_rival_that_failed(tmp_path):
    worker = Worker("torch", BLOCKS, (1,), 1, tmp_path)
    worker._process.kill()
    assert worker.ask() == {"missing": "failed: its process ended with status -9"}
    worker.stop()


def test_the_models_are_sparse_and_the_same_in_every_process():
    model, again = BLOCKS.build(), BLOCKS.build()
    for name, weight in model.state_dict().items():
        assert weight.equal(again.state_dict()[name])
    assert (model[0].up.weight.unflatten(1, (-1, 4)) != 0).sum(2).eq(2).all()
    encoder = Size(layers=1, dim=16, heads=2)
    assert encoder.build()(encoder.input(3)).shape == (1, 3, 16)


def test_the_page_shows_the_stored_results():
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("rivals-*.json"))]
    assert table.page(reports) == RIVALS.read_text(encoding="utf-8")
