"""Renders result files as markdown: `python -m bench.report [results/<device>.json]` prints them.

Without a file it renders all of them, and writes the pages docs/cpu.md and docs/rivals.md, and the parts of README that
lie between markers.
"""

import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .gpu import table as gpu
from .gpu.table import table as _table
from .rivals import table as rivals

RESULTS = Path(__file__).parent / "results"
README, CPU, RIVALS = (RESULTS.parents[1] / name for name in ("README.md", "docs/cpu.md", "docs/rivals.md"))
PRODUCTS_24 = ("linear24", "linear24 input pairs", "linear24 row pairs")  # forms of one weight, as compress_ knows them


def cpu_name() -> str:
    """Returns the name of the processor with its family and model, because cloud CPUs often share one name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def commit() -> str:
    """Returns the commit of this checkout, as git describes it."""
    with suppress(OSError):
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def today() -> str:
    return datetime.date.today().isoformat()


def write(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def slug(report: dict) -> str:
    """Returns the name of a result file: what it is of, if not of ops, the device, and on a CPU the SIMD level."""
    kind = report["kind"] if report.get("kind") in ("methods", "rivals", "whole") else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {report['device']} {report.get('simd', '')}".lower()).strip("-")


def render(report: dict) -> str:
    """Renders a report as markdown: the machine, the tables, and what falls short of its goal."""
    if report.get("kind") == "gpu":
        return gpu.render(report)
    if report.get("kind") == "methods":
        return _methods(report)
    if report.get("kind") == "rivals":
        return rivals.short(report)
    if report.get("kind") == "whole":
        return _whole(report)
    steps = [row for row in report["rows"] if "step" in row]
    memory = [row for row in report["rows"] if "step" not in row and "tokens" not in row]
    linear = [row for row in report["rows"] if "tokens" in row]
    parts = [_head(report)]
    if memory:
        header = ["op", "dtype", "ms", "GB/s", "of `copy_`", "over the usual torch code"]
        parts.append(_table(header, map(_memory, memory)))
    for op in dict.fromkeys(row["op"] for row in linear):
        parts.append(_linear(op, [row for row in linear if row["op"] == op]))
    if steps:
        parts.append(_table(["pruning step", "shape", "ms", "times faster than"], map(_step, steps)))
    if short := _short(report["rows"]):
        parts.append("Short of the goal:\n\n" + "\n".join(f"- {text}" for text in short))
    return "\n\n".join(parts) + "\n"


def _head(report: dict) -> str:
    return (
        f"{report['device']}, {report['simd']}, {report['threads']} threads, torch {report['torch']}, "
        f"commit {report['commit']}, {report['date']}; "
        + ("one process." if report["processes"] == 1 else f"medians over {report['processes']} processes.")
    )


def _memory(row: dict) -> list[str]:
    seconds, ratios = row["seconds"]["own"], row["ratios"]
    usual = [f"{ratio:.0f}x (`{key}`)" for key, ratio in ratios.items() if key != "copy_"]
    return [
        f"`{row['op']}`",
        row["dtype"],
        f"{seconds * 1e3:.2f}",
        f"{row['bytes'] / seconds / 1e9:.1f}",
        f"{ratios['copy_']:.0%}",
        ", ".join(usual),
    ]


def _step(row: dict) -> list[str]:
    slower = [f"{ratio:.3g}x ({key}, {row['seconds'][key]:.2g} s)" for key, ratio in row["ratios"].items()]
    return [row["step"], row["shape"], f"{row['seconds']['own'] * 1e3:.0f}", ", ".join(slower)]


def _methods(report: dict) -> str:
    """Renders the cost and the quality of every method."""
    head = (
        f"{report['device']}, {report['simd']}, one thread, torch {report['torch']}, "
        f"commit {report['commit']}, {report['date']}; 2:4, calibrated on {report['calibration']} tokens, "
        f"perplexity of {report['scored']} others; the stage has {report['stage']['dim']} inputs and sees "
        f"{report['stage']['tokens']} tokens."
    )
    lines = []
    for method, row in report["rows"].items():
        story, stage = row["stories260K"], row["stage"]
        cells = [method, f"{story['error']:.3f}" if "error" in story else "", f"{story['perplexity']:.1f}"]
        if "seconds" in stage:
            cells += [f"{story['seconds']:.2g}", f"{stage['seconds']:.2g}", f"{stage['memory'] / 2**20:.0f}"]
        lines.append(cells + [""] * (6 - len(cells)))
    header = ["method", "layer error", "perplexity", "seconds", "seconds, stage", "MiB, stage"]
    return head + "\n\n" + _table(header, lines) + "\n"


def _whole(report: dict) -> str:
    """Renders the milliseconds of a whole model, as ``compress_`` leaves it and in every single form."""
    model = report["model"]
    head = (
        f"{report['device']}, {report['simd']}, {report['threads']} threads, torch {report['torch']}; "
        f"{model['blocks']} blocks of {model['dim']} to {model['hidden']} and back, {model['pattern']}; "
        "medians in ms, all forms in turns."
    )
    names = list(next(iter(report["rows"].values()))["ms"])
    lines = []
    for tokens, row in report["rows"].items():
        chosen = ", ".join(dict.fromkeys(row["chosen"].values()))
        ratios = [f"{row['over_plain']:.2f}", f"{row['over_best']:.2f}"]
        lines.append([tokens, *(f"{row['ms'][name]:.2f}" for name in names), chosen, *ratios])
    return f"{head}\n\n{_table(['tokens', *names, 'chosen', 'over plain', 'over the best single form'], lines)}\n"


def _linear(op: str, rows: list[dict]) -> str:
    """Renders how many times faster a product is than the best dense and than plain PyTorch, by weight and tokens."""
    columns = sorted({row["tokens"] for row in rows})
    cells = {(row["shape"], row["dtype"], row["tokens"]): row["ratios"] for row in rows}
    lines = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        found = [cells.get((shape, dtype, tokens)) for tokens in columns]
        lines.append([shape, dtype, *("" if cell is None else _cell(cell) for cell in found)])
    return _table([f"`{op}`", "dtype", *map(str, columns)], lines)


def _cell(ratios: dict) -> str:
    best, plain = f"{ratios['best dense']:.2f}", ratios["F.conv2d" if "F.conv2d" in ratios else "F.linear"]
    return f"{best if ratios['best dense'] >= 1 else f'**{best}**'} ({plain:.1f})"


def _short(rows: list[dict]) -> list[str]:
    """Lists what misses its goal, in one line for each op, baseline and goal."""
    missed: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for key, wanted in row["goal"].items():
            if (got := row["ratios"][key]) < wanted:
                line = missed.setdefault(f"{_what(row)}, goal {_number(wanted, key)} of `{key}`", {})
                at = f" at {row['tokens']}" if "tokens" in row else ""
                line.setdefault(f"{row['shape']} {row.get('dtype', '')}".strip(), []).append(_number(got, key) + at)
    return [
        f"{goal}: " + "; ".join(f"{what} {', '.join(each)}" for what, each in line.items())
        for goal, line in missed.items()
    ]


def _what(row: dict) -> str:
    return row["step"] if "step" in row else f"`{row['op']}`"


def _number(ratio: float, baseline: str) -> str:
    return f"{ratio:.0%}" if baseline == "copy_" else f"{ratio:.3g}x"


def render_gpus(reports: Iterable[dict]) -> str:
    """Renders the tables of every GPU among the reports, or the goals as not measured if there is none."""
    return "\n".join(map(render, (each for each in reports if each.get("kind") == "gpu"))) or gpu.unmeasured()


def products(report: dict) -> str:
    """Renders, for README, how many times faster the fastest form of a 2:4 weight is than the best dense, in fp32."""
    rows = [row for row in report["rows"] if row.get("op") in PRODUCTS_24 and row["dtype"] == "fp32"]
    columns = sorted({row["tokens"] for row in rows})
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = [[row for row in rows if (row["shape"], row["tokens"]) == (shape, tokens)] for tokens in columns]
        fastest = (min(forms, key=lambda row: row["seconds"]["own"]) for forms in found)
        lines.append([shape, *(_cell(row["ratios"]) for row in fastest)])
    return f"{_head(report)}\n\n{_table(['2:4, fp32', *map(str, columns)], lines)}\n"


def cpu_page(reports: Iterable[dict]) -> str:
    """Renders docs/cpu.md: the tables of all ops on every CPU."""
    measured = [each for each in reports if "kind" not in each]
    return "\n".join(
        [CPU_INTRODUCTION, *(f"## {each['device']}, {each['simd']}\n\n{render(each)}" for each in measured)]
    )


def filled(readme: str, reports: list[dict]) -> str:
    """Returns README with its generated parts renewed, each of which lies between two markers."""
    parts = {"products": [products(each) for each in reports if "kind" not in each]}
    for kind in ("whole", "rivals"):
        parts[kind] = [render(each) for each in reports if each.get("kind") == kind]
    for name, tables in parts.items():
        begin, end = f"<!-- {name}: written by python -m bench.report -->\n", f"<!-- end of {name} -->"
        if readme.count(begin) != 1 or readme.count(end) != 1:
            raise ValueError(f"README must have the markers of {name} once each")
        before, _, rest = readme.partition(begin)
        text = "\n".join(tables) or "Not measured yet.\n"
        readme = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return readme


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    for report in reports:
        if report.get("kind") != "gpu":
            print(render(report))
    print(render_gpus(reports), end="")
    if not sys.argv[1:]:
        README.write_text(filled(README.read_text(encoding="utf-8"), reports), encoding="utf-8")
        CPU.write_text(cpu_page(reports), encoding="utf-8")
        RIVALS.write_text(rivals.page([each for each in reports if each.get("kind") == "rivals"]), encoding="utf-8")


CPU_INTRODUCTION = """# Every op on a CPU

Written by `python -m bench.report` from the files in `bench/results/`; `make bench` measures.

The first table of each machine is about masks, scores and packing of 4096x4096 weights. The *usual torch code* is
`topk` with `scatter_` for masks, `reshape` with a sum for block scores, and for transposable masks a `matmul` with all
90 patterns of a tile. The processes keep freed memory. Otherwise, on a virtual machine, the first touch of each page
would hide the kernels: a new result of 64 MiB costs 25 ms in any library (`clone` too, against 5 ms for `copy_`).

The tables of products show, for each number of tokens, how many times faster than the best dense they are, and in
brackets than `F.linear` or `F.conv2d`. *Best dense* is the fastest of PyTorch's products: `F.linear`, oneDNN on
laid-out activations, and oneDNN with a prepacked weight; for the quantized weights it is the fastest dense int8
product, ONNX Runtime's included. Bold is where dense is faster, and there `compress_` keeps dense. The same 2:4 weight
has three forms: `linear24` as it is stored, *input pairs* for few tokens and *row pairs* for many. PyTorch multiplies
bf16 slowly on a CPU without AVX-512, hence the large ratios there.

The *pruning steps* are compared with the loops of the published code: Wanda over groups of columns, SparseGPT over
columns, and one tier iteration over blocks, scores included, from 90/10/0 % of dense, 2:4 and top-k blocks to 80/10/10
%; both of its criteria are compared with the published one. The loops of Wanda and of the tiers do only a twelfth and a
sixteenth of the work, and their times are scaled up.
"""


if __name__ == "__main__":
    main()
