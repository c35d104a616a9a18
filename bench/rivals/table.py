"""Renders the results as markdown: a short form for README, and the page docs/rivals.md."""

from collections.abc import Iterable

from ..gpu.table import table

NOT_MEASURED = {"kind": "", "missing": "not measured"}
WRONG = (
    0.05  # relative error of the output from which on a rival does not count: its speed is bought with wrong results
)
OWN = {"sparsekit": ("fp32",), "sparsekit int8": ("fp32", "int8"), "sparsekit int4": ("fp32", "int8", "int4")}


def head(report: dict) -> str:
    return f"{report['device']}, {report['simd']}, torch {report['torch']}, commit {report['commit']}, {report['date']}"


def title(run: dict) -> str:
    return f"{run['model']}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}"


def token_counts(run: dict) -> list[str]:
    found = {tokens for row in run["rows"].values() for tokens in row.get("tokens", {})}
    return sorted(found, key=int)


def best_of_others(run: dict, tokens: str, kinds: tuple[str, ...]) -> tuple[str, float] | None:
    """Returns the fastest rival with right results among those of some kinds, and its median seconds."""
    found = [
        (row["tokens"][tokens]["median"], name)
        for name, row in run["rows"].items()
        if not name.startswith("sparsekit") and row["kind"] in kinds and tokens in row.get("tokens", {})
        if row["tokens"][tokens]["error"] <= WRONG
    ]
    return (min(found)[1], min(found)[0]) if found else None


def short(report: dict) -> str:
    """Renders, for README, how many times faster sparsekit is than the fastest rival that is not less precise."""
    runs = [run for run in report["runs"] if token_counts(run)]
    if not runs:
        return ""
    columns = sorted({tokens for run in runs for tokens in token_counts(run)}, key=int)
    lines = []
    for run in runs:
        for name, kinds in OWN.items():
            row = run["rows"].get(name, NOT_MEASURED)
            cells = [_ratio(run, row, tokens, kinds) for tokens in columns]
            lines.append([title(run), name, *(cells if row.get("tokens") else [row["missing"], *cells[1:]])])
    return f"{head(report)}; medians.\n\n{table(['model', 'form', *columns], lines)}\n"


def _ratio(run: dict, row: dict, tokens: str, kinds: tuple[str, ...]) -> str:
    own, other = row.get("tokens", {}).get(tokens), best_of_others(run, tokens, kinds)
    if own is None or other is None:
        return ""
    ratio = other[1] / own["median"]
    return f"{f'{ratio:.2f}' if ratio >= 1 else f'**{ratio:.2f}**'} ({other[0]})"


def page(reports: Iterable[dict]) -> str:
    """Renders docs/rivals.md: all times, errors, what the conversion took, and what is not there."""
    parts = [INTRODUCTION]
    for report in reports:
        parts.append(f"## {head(report)}\n\n{short(report)}")
        for run in report["runs"]:
            parts.append(_run(run))
    return "\n".join(parts)


def _run(run: dict) -> str:
    columns = token_counts(run)
    lines = []
    for name, row in run["rows"].items():
        if not row.get("tokens"):
            lines.append([name, row["missing"], *[""] * (len(columns) + 3)])
            continue
        cells = [row["tokens"].get(tokens) for tokens in columns]
        present = [cell for cell in cells if cell]
        lines.append(
            [
                f"{name} ({', '.join(f'{package} {version}' for package, version in row['versions'].items())})",
                *("" if cell is None else f"{_ms(cell['best'])} / {_ms(cell['median'])}" for cell in cells),
                _error(max(cell["error"] for cell in present)),
                f"{row['convert']:.1f}",
                "" if row["load"] is None else f"{row['load']:.1f}",
                f"{min(cell['gflops'] for cell in present):.0f} to {max(cell['gflops'] for cell in present):.0f}",
            ]
        )
    header = ["rival", *columns, "error", "convert, s", "load, s", "GFLOP/s"]
    return f"### {title(run)}\n\n{table(header, lines)}\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _error(error: float) -> str:
    return f"{error:.1e}" if error <= WRONG else f"**{error:.1e}**"


INTRODUCTION = """# sparsekit and its rivals on a CPU

Written by `python -m bench.report` from the files in `bench/results/`; `make rivals` measures. Two models with random
weights, every linear layer of which is 2:4 by magnitude; the dense rivals run the same weights:

- *blocks*: 6 blocks of LayerNorm, 768 to 3072, GELU, 3072 to 768, and the input added;
- *encoder*: BERT base without its embeddings: 12 layers of 768, 12 heads, 3072 in the feed-forward part.

Each rival has a process of its own. They take turns for several rounds, so that a slow phase of the machine meets all.
A call follows a pause of 60 ms, so that no thread of another library spins any more, and has real-time priority where
that is allowed. The cells are milliseconds of a forward pass, best / median. *Error* is the largest relative error of
the output, by the norm, against plain PyTorch in fp32; in fp32 a rival above 1e-4 is refused. An error above 0.05 is
bold, and that rival does not count as the fastest one. *Convert* is the time from the dense PyTorch model to the
converted file or module, for one number of tokens where each has its own; torch.compile found its code in Inductor's
cache, without it the blocks took 15 s. *Load* is the time from the file to a session that can run.
*GFLOP/s* is that of a fixed 384x384x384 product in fp32, timed before every turn: the smaller it is, the slower was the
machine.

What runs under each name:

- *torch.compile*: `fullgraph=True, dynamic=False`, compiled for each number of tokens; *frozen* with Inductor's
  `freezing`, which lays the weights out for oneDNN.
- *ONNX Runtime*: the model of `torch.onnx.export`, any number of tokens. *int8* is `quantize_dynamic` as it is, and *7
  bits* is it with `reduce_range=True`. Without VNNI instructions the former adds pairs of products in 16 bits, which
  overflow: its results are wrong there.
- *OpenVINO*: the same file, fp32 arithmetic, for latency. *int8 weights* is `nncf.compress_weights` with one symmetric
  scale a row; whether the activations become int8 is left to OpenVINO. *int8, calibrated* is `nncf.quantize` for
  transformers, with fixed ranges that the very inputs of the measurement calibrate.
  OpenVINO computes the encoder wrongly if its first pass has one token, so the longest input goes first; figures with
  an error of 0.8, or refused for it, are from before that.
- *torch int8*: `torch.ao.quantization.quantize_dynamic` of the linear layers.
- *sparsekit*: `compress_` for each number of tokens, with no precision, "int8" and "int4".
"""
