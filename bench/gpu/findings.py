"""What the checks found, and what did not run, as lists for people."""

from collections import Counter
from collections.abc import Iterator

from .goals import MODES
from .log import NOT_MEASURED, Row, named, rows


def findings(report: Row) -> Iterator[str]:
    """One list per subject; a subject of which nothing is known says so."""
    for title, make in {
        "Check 1, the layout of packed weights": _layout,
        "Check 2, the product after pruning both ways": _product,
        "Check 3, the host's time for one token": _host,
        "Check 4, hardware counters": _counters,
        "linear_tiered": _tiered,
        "compress_": _runtime,
        "torch.compile": _compiled,
        "Tests": _tests,
        "Parts": _parts,
        "Errors": _errors,
    }.items():
        lines = list(make(report)) or ["none" if make is _errors else NOT_MEASURED]
        yield f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines)


def _layout(report: Row) -> Iterator[str]:
    for row in named(report, "layout", "probe"):
        shares = ", ".join(f"{key} {value:.1%}" for key, value in row.items() if key.startswith("cusparselt") and value)
        found = f"{row['groups that were found']} of {row['groups']} groups found"
        yield f"{row['shape']}: {found} in {row['nibbles']} nibbles; where a closed form puts them: {shares or 'none'}"
    for row in named(report, "layout", "layout"):
        for key, found in row.items():
            if isinstance(found, dict):
                values, groups = found["values that differ"], found["groups that differ"]
                own, form = found["metadata bytes"]
                first = found["first byte of metadata that differs"]
                equal = f"{values} bytes of values and {groups} groups differ, first at byte {first} of the metadata"
                equal = equal if values or groups else "equal"
                yield f"{row['shape']} {key}: {equal}; {own} bytes of metadata, {form} by the closed form"


def _product(report: Row) -> Iterator[str]:
    for row in report["parts"].get("checks", {}).get("rows", []):
        if "error_norm" in row:
            right = "right" if row["right"] else "WRONG"
            errors = ", ".join(f"{key} {each:.2g}" for key, each in row["error_norm"].items())
            yield f"{row['name']} {row['shape']}: {right}, relative error {errors}"


def _host(report: Row) -> Iterator[str]:
    for row in rows(report, "linear", "host"):
        if row["tokens"] == 1:
            yield f"{row['shape']}: " + ", ".join(f"{key} {each * 1e6:.0f} us" for key, each in row["host"].items())


def _counters(report: Row) -> Iterator[str]:
    for row in named(report, "counters", "ncu"):
        if "counters" not in row:
            yield f"{row['result']}: {row['reason']}"
            continue
        yield f"{row['kernel']}: " + ", ".join(f"{key} {value}" for key, value in row["counters"].items())


def _tiered(report: Row) -> Iterator[str]:
    for row in rows(report, "tiered", "ratios"):
        for key, ratio in row["ratios"].items():
            took = row["seconds"][key]
            yield (
                f"{row['shape']}, {row['tokens']} tokens: {took * 1e6:.1f} us, {ratio:.2f}x of cuBLAS, "
                f"{row['bytes'] / took / 1e9:.0f} GB/s of its {row['bytes'] / 1e6:.1f} MB"
            )


def _runtime(report: Row) -> Iterator[str]:
    for mode in MODES:
        for row in named(report, "runtime", mode):
            yield f"{mode}: {row['shape']} became {row['layer']}"
    for key in ("CUDA graph", "torch.compile"):
        for row in named(report, "runtime", key):
            yield f"{key}, {row['shape']}, {row['tokens']} tokens: {'works' if row['works'] else 'WRONG'}"


def _compiled(report: Row) -> Iterator[str]:
    for row in report["parts"].get("compiled", {}).get("rows", []):
        if "ratios" in row:
            what = (
                f"{row['name']} over the compiled rank"
                if "name" in row
                else f"F.linear compiled, {row['tokens']} tokens"
            )
            yield f"{what}, {row['shape']}: " + ", ".join(f"{key} {value:.2f}x" for key, value in row["ratios"].items())


def _tests(report: Row) -> Iterator[str]:
    for row in named(report, "suite", "tests"):
        yield ", ".join(f"{count} {outcome}" for outcome, count in row.items() if outcome != "name") or "none ran"


def _parts(report: Row) -> Iterator[str]:
    for name, part in report["parts"].items():
        reason = f" ({part['reason']})" if "reason" in part else ""
        yield f"{name}: {part['status']} in {part['seconds']:.0f} s{reason}"


def _errors(report: Row) -> Iterator[str]:
    """Each kind of error once, with how often it came and where first."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for where, what in _all_errors(report):
        first.setdefault(what, where)
        count[what] += 1
    for what, times in count.items():
        yield f"{first[what]}: {what}" + (f" ({times} times)" if times > 1 else "")


def _all_errors(report: Row) -> Iterator[tuple[str, str]]:
    for name, part in report["parts"].items():
        for row in part["rows"]:
            if "error" in row:
                yield f"{name}, {row['what']}", row["error"]
            found = row.get("wrong", {}) | {
                key: value for key, value in row.get("baselines", {}).items() if isinstance(value, str)
            }
            for key, value in found.items():
                where = [str(row[each]) for each in ("op", "kernel", "shape", "tokens") if each in row]
                yield f"{name}, {' '.join(where)}, {key}", value
