"""Renders a GPU's results as markdown: what README shows, and the details."""

from collections.abc import Iterable, Iterator
from typing import Any

from . import goals
from .findings import findings
from .log import NOT_MEASURED, Row, named, rows

DENSE = "F.linear"
MERGED = ("ratios", "seconds", "host", "goal")  # of the rows of one product, by provider


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unmeasured() -> str:
    """The goals, where no GPU was at hand."""
    lines = [
        [f"`{op}`", f"{goal:g} us", f"{roofline:g} us", NOT_MEASURED] for op, (goal, roofline) in goals.OPS.items()
    ]
    lines += [
        [f"`linear24`, 1 to {goals.DECODE} tokens", f"{goals.DECODE_RATIO}x cuBLAS", "1.78x", NOT_MEASURED],
        [f"2:4 product, {goals.MANY} tokens and more", f"{goals.MANY_RATIO}x cuBLAS", "1.8x", NOT_MEASURED],
        ["`compress_`, any number of tokens", f"{goals.NEVER_SLOWER}x cuBLAS or more", "", NOT_MEASURED],
    ]
    return table([f"{goals.SHAPE} {goals.DTYPE} on an H200", "goal", "limit", "measured"], lines) + "\n"


def render(report: Row) -> str:
    """The tables of README: the machine, the ops, the products by tokens, and what falls short of its goal."""
    parts = [machine(report)]
    if ops := rows(report, "masks", "op"):
        header = [
            "op",
            "shape",
            "dtype",
            "us",
            "GB/s",
            "of the copy",
            "goal",
            "over the usual way",
            "over the reference",
        ]
        parts.append(table(header, (_op(row, limits(report)[0]) for row in ops)))
    if cells := products(report):
        parts += [_pivot("2:4 product, fastest", cells, _fastest), _pivot("`linear24`", cells, _ratio("linear24"))]
        parts += [_pivot(f"`{mode}`", cells, _ratio(mode)) for mode in goals.MODES]
        parts.append("Times faster than `F.linear` (cuBLAS) at that many tokens; bold where dense is faster.")
    if missed := list(short(report)):
        parts.append("Short of the goal:\n\n" + "\n".join(f"- {text}" for text in missed))
    return "\n\n".join(parts) + "\n"


def limits(report: Row) -> tuple[float | None, float | None]:
    """GB/s of a copy and TFLOP/s of the largest dense product, as measured."""
    copies, products_ = named(report, "machine", "copy"), named(report, "machine", "product")
    copy = max((max(row["GB/s"].values()) for row in copies), default=None)
    return copy, max((row["TFLOP/s"] for row in products_), default=None)


def machine(report: Row) -> str:
    facts = (named(report, "machine", "device") or [{}])[0]
    versions = [f"{key} {facts[key]}" for key in ("torch", "triton", "cuda", "cusparselt") if key in facts]
    copy, product = limits(report)
    moved = NOT_MEASURED if copy is None else f"{copy:.0f} GB/s"
    rate = NOT_MEASURED if product is None else f"{product:.0f} TFLOP/s"
    return (
        f"{', '.join([report['device'], *versions])}, commit {report['commit']}, {report['date']}; medians on fresh "
        f"buffers larger than the L2 cache. A copy: {moved}; the largest dense bf16 product: {rate}."
    )


def _op(row: Row, copy: float | None) -> list[str]:
    seconds = row["seconds"]["own"]
    rate = row["bytes"] / seconds / 1e9
    usual = {key: value for key, value in row["baselines"].items() if key != "reference" and not isinstance(value, str)}
    return [
        f"`{row['op']}`",
        row["shape"],
        row["dtype"],
        f"{seconds * 1e6:.1f}",
        f"{rate:.0f}",
        "" if copy is None else f"{rate / copy:.0%}",
        f"{row['goal']:g}" if row["goal"] else "",
        ", ".join(f"{value / seconds:.1f}x ({key})" for key, value in usual.items()),
        "" if isinstance(row["baselines"]["reference"], str) else f"{row['baselines']['reference'] / seconds:.0f}x",
    ]


def products(report: Row) -> dict[tuple[str, int], Row]:
    """Everything measured of a product, by weight and tokens: ratios, seconds and host seconds by provider."""
    cells: dict[tuple[str, int], Row] = {}
    for part in ("linear", "search", "runtime"):
        for row in rows(report, part, "tokens"):
            if "ratios" not in row:
                continue
            cell = cells.setdefault((row["shape"], row["tokens"]), {key: {} for key in ("choice", *MERGED)})
            for key in MERGED:
                cell[key] = row.get(key, {}) | cell[key]
            for key in row["ratios"]:
                cell["choice"][key] = row.get("decision") or row.get("algorithm")
    return cells


def _pivot(title: str, cells: dict[tuple[str, int], Row], show: Any) -> str:
    tokens = sorted({key[1] for key in cells})
    shapes = dict.fromkeys(key[0] for key in cells)
    lines = [[shape, *(show(cells.get((shape, count), {"ratios": {}})) for count in tokens)] for shape in shapes]
    return table([title, *map(str, tokens)], lines)


def fastest(cell: Row) -> tuple[str, float] | None:
    """The fastest way to multiply by the 2:4 weight, and its ratio over dense."""
    found = {key: ratio for key, ratio in cell["ratios"].items() if key not in goals.MODES}
    best = max(found, key=lambda key: found[key], default=None)
    return None if best is None else (best, found[best])


def _fastest(cell: Row) -> str:
    best = fastest(cell)
    return "" if best is None else f"{_number(best[1])} {best[0]}"


def _ratio(key: str) -> Any:
    return lambda cell: _number(cell["ratios"][key]) if key in cell["ratios"] else ""


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def short(report: Row) -> Iterator[str]:
    """What was measured and misses its goal."""
    for row in rows(report, "masks", "op"):
        took = row["seconds"]["own"] * 1e6
        if row["goal"] and took > row["goal"]:
            yield f"`{row['op']}` {row['shape']} {row['dtype']}: {took:.1f} us, goal {row['goal']:g} us"
    for (shape, tokens), cell in products(report).items():
        for key, wanted in cell["goal"].items():
            best = fastest(cell)
            got = (best and best[1]) if key == "best" else cell["ratios"].get(key)
            what = "the fastest 2:4 product" if key == "best" else f"`{key}`"
            noise = goals.NOISE if key in goals.MODES else 0
            if got is None:
                yield f"{what} {shape}, {tokens} tokens: {NOT_MEASURED}, goal {wanted}x"
            elif got < wanted - noise:
                yield f"{what} {shape}, {tokens} tokens: {got:.2f}x of cuBLAS, goal {wanted}x"


def details(report: Row) -> str:
    """Every product with its times, the checks, and how the parts ended."""
    header = ["weight", "tokens", "provider", "us", "host us", "TFLOP/s", "of the largest product"]
    header += ["GB/s of weights", "of the copy", "over cuBLAS"]
    lines = [line for key, cell in products(report).items() for line in _product(*key, cell, *limits(report))]
    return "\n\n".join([table(header, lines), *findings(report)]) + "\n"


def _product(shape: str, tokens: int, cell: Row, copy: float | None, product: float | None) -> Iterator[list[str]]:
    rows_, cols = map(int, shape.split("x"))
    for key, seconds in cell["seconds"].items():
        remark = cell["choice"].get(key)
        flops = 2 * rows_ * cols * tokens / seconds / 1e12
        dense = key == DENSE or remark == "plain"
        moved = rows_ * cols * (2 if dense else 9 / 8) / seconds / 1e9  # bf16: whole, or half with four bits a group
        yield [
            shape,
            str(tokens),
            f"{key} ({remark})" if remark else key,
            f"{seconds * 1e6:.1f}",
            f"{cell['host'][key] * 1e6:.1f}" if key in cell["host"] else "",
            f"{flops:.1f}",
            "" if product is None else f"{flops / product:.0%}",
            f"{moved:.0f}",
            "" if copy is None else f"{moved / copy:.0%}",
            f"{cell['ratios'][key]:.2f}" if key in cell["ratios"] else "",
        ]
