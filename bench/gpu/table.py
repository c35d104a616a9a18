"""Renders a GPU's results as markdown: what README shows, and the details."""

from collections.abc import Iterable, Iterator

from . import goals
from .rows import Row

NOT_MEASURED, DENSE = "not measured", "F.linear"
SPARSE = ("linear24", "semi-structured", "cuSPARSELt")  # forms that multiply by the 2:4 weight
MERGED = ("ratios", "seconds", "host", "goal")  # of the rows of one product, by form


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unmeasured() -> str:
    """Renders the goals of all ops as not measured."""
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
    """Renders the tables of README: the machine, the ops, the products by tokens, and what misses its goal."""
    copy, product = limits(report)
    facts = next((row for row in rows(report, "machine", "name") if row["name"] == "device"), {})
    versions = [f"{key} {facts[key]}" for key in ("torch", "triton", "cuda", "cusparselt") if key in facts]
    parts = [
        f"{', '.join([report['device'], *versions])}, commit {report['commit']}, {report['date']}; medians on fresh "
        f"buffers larger than the L2 cache. A copy: {_figure(copy, 'GB/s')}; the largest dense bf16 product: "
        f"{_figure(product, 'TFLOP/s')}."
    ]
    if ops := rows(report, "memory", "op"):
        header = ["op", "shape", "dtype", "us", "GB/s", "of the copy", "goal", "over the usual way"]
        parts.append(table([*header, "over the reference"], (_op(row, copy) for row in ops)))
    if cells := products(report):
        parts += [_by_tokens("2:4 product, fastest", cells, None)]
        parts += [_by_tokens(f"`{form}`", cells, form) for form in ("linear24", *goals.MODES)]
        parts.append("Times faster than `F.linear` (cuBLAS) at that many tokens; bold where dense is faster.")
    if missed := list(short(report)):
        parts.append("Short of the goal:\n\n" + "\n".join(f"- {text}" for text in missed))
    return "\n\n".join(parts) + "\n"


def rows(report: Row, section: str, key: str) -> list[Row]:
    """Returns the rows of a section that have a key; none if the section did not run."""
    return [row for row in report["sections"].get(section, {}).get("rows", []) if key in row]


def limits(report: Row) -> tuple[float | None, float | None]:
    """Returns the GB/s of a copy and the TFLOP/s of the largest dense product, as measured."""
    copies = [max(row["GB/s"].values()) for row in rows(report, "machine", "GB/s") if row["name"] == "copy"]
    return max(copies, default=None), max((row["TFLOP/s"] for row in rows(report, "machine", "TFLOP/s")), default=None)


def _figure(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{value:.0f} {unit}"


def _op(row: Row, copy: float | None) -> list[str]:
    seconds, slower = row["seconds"]["own"], dict(row["baselines"])
    rate, defined = row["bytes"] / seconds / 1e9, slower.pop("reference", None)
    cells = [f"`{row['op']}`", row["shape"], row["dtype"], f"{seconds * 1e6:.1f}", f"{rate:.0f}", _share(rate, copy)]
    cells += [f"{row['goal']:g}" if row["goal"] else ""]
    cells += [", ".join(f"{value / seconds:.1f}x ({key})" for key, value in slower.items())]
    return [*cells, "" if defined is None else f"{defined / seconds:.0f}x"]


def _share(value: float, limit: float | None) -> str:
    return "" if limit is None else f"{value / limit:.0%}"


def products(report: Row) -> dict[tuple[str, int], Row]:
    """Merges the measurements of each product, by weight and tokens: ratios, seconds and host seconds of each form.

    ``best`` is the highest ratio of the sparse forms, with the name of that form.
    """
    cells: dict[tuple[str, int], Row] = {}
    for section in ("linear", "search", "compress"):
        for row in rows(report, section, "ratios"):
            cell = cells.setdefault((row["shape"], row["tokens"]), {key: {} for key in ("choice", *MERGED)})
            for key in MERGED:
                cell[key] = row.get(key, {}) | cell[key]
            cell["choice"] |= dict.fromkeys(row["ratios"], row.get("choice"))
    for cell in cells.values():
        found = ((ratio, key) for key, ratio in cell["ratios"].items() if key in SPARSE)
        cell["best"] = max(found, default=(None, ""))
    return cells


def _by_tokens(title: str, cells: dict[tuple[str, int], Row], form: str | None) -> str:
    """Renders the ratios of a form, or of the best one, with a column for each token count."""

    def show(shape: str, tokens: int) -> str:
        cell = cells.get((shape, tokens), {"best": (None, ""), "ratios": {}})
        ratio, name = cell["best"] if form is None else (cell["ratios"].get(form), "")
        if ratio is None:
            return ""
        return f"{ratio:.2f} {name}".strip() if ratio >= 1 else f"**{ratio:.2f}** {name}".strip()

    tokens = sorted({key[1] for key in cells})
    shapes = dict.fromkeys(key[0] for key in cells)
    return table([title, *map(str, tokens)], [[shape, *(show(shape, each) for each in tokens)] for shape in shapes])


def short(report: Row) -> Iterator[str]:
    """Yields a line for each measurement that misses its goal."""
    for row in rows(report, "memory", "op"):
        took = row["seconds"]["own"] * 1e6
        if row["goal"] and took > row["goal"]:
            yield f"`{row['op']}` {row['shape']} {row['dtype']}: {took:.1f} us, goal {row['goal']:g} us"
    for (shape, tokens), cell in products(report).items():
        for key, wanted in cell["goal"].items():
            got = cell["best"][0] if key == "best" else cell["ratios"].get(key)
            what = "the fastest 2:4 product" if key == "best" else f"`{key}`"
            if got is None or got < wanted - (goals.NOISE if key in goals.MODES else 0):
                found = NOT_MEASURED if got is None else f"{got:.2f}x of cuBLAS"
                yield f"{what} {shape}, {tokens} tokens: {found}, goal {wanted}x"


def details(report: Row) -> str:
    """Renders the times of every product, then for each section its lines, how it ended, and its errors."""
    header = ["weight", "tokens", "form", "us", "host us", "TFLOP/s", "of the largest product"]
    header += ["GB/s of weights", "of the copy", "over cuBLAS"]
    lines = [line for key, cell in products(report).items() for line in _product(*key, cell, *limits(report))]
    parts = [table(header, lines)]
    for name, section in report["sections"].items():
        said = [row["said"] for row in section["rows"] if "said" in row] + list(errors(section["rows"]))
        ended = f"{name}: {section['ended']} in {section['seconds']:.0f} s"
        parts.append("\n".join([ended, "", *(f"- {line}" for line in said)]).rstrip())
    return "\n\n".join(parts) + "\n"


def _product(shape: str, tokens: int, cell: Row, copy: float | None, product: float | None) -> Iterator[list[str]]:
    size = int(shape.split("x")[0]) * int(shape.split("x")[1])
    for key, seconds in cell["seconds"].items():
        choice, host, ratio = cell["choice"].get(key), cell["host"].get(key), cell["ratios"].get(key)
        # In bf16: the whole weight, or half of the values with four bits a group.
        nbytes = size * (2 if key.startswith(DENSE) or choice == "plain" else 9 / 8)
        flops, rate = 2 * size * tokens / seconds / 1e12, nbytes / seconds / 1e9
        line = [shape, str(tokens), f"{key} ({choice})" if choice else key, f"{seconds * 1e6:.1f}"]
        line += ["" if host is None else f"{host * 1e6:.1f}", f"{flops:.1f}", _share(flops, product)]
        yield [*line, f"{rate:.0f}", _share(rate, copy), "" if ratio is None else f"{ratio:.2f}"]


def errors(rows: Iterable[Row]) -> list[str]:
    """Lists each error once, with where it occurred first and how often."""
    where: dict[str, list[str]] = {}
    for row in rows:
        at = " ".join(str(row[key]) for key in ("op", "kernel", "shape", "tokens") if key in row)
        found = {f"{at} {key}".strip(): text for key, text in row.get("wrong", {}).items()}
        for place, text in (found | ({row["what"]: row["error"]} if "error" in row else {})).items():
            where.setdefault(text, []).append(place)
    return [f"{at[0]}: {text}" + (f" ({len(at)} times)" if len(at) > 1 else "") for text, at in where.items()]
