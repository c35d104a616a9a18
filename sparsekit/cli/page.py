"""The HTML report of a folder: one file that needs no other, made of the files that the commands wrote there."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .._files import replacing
from ..compress.sizes import at_size
from .charts import bars, legend, speeds
from .folders import BENCH_REPORT, COMPRESS_REPORT, MASKS, PAGE, REPORT
from .pictures import mask_pictures
from .style import CSS
from .terminal import size


def write_page(folder: Path) -> None:
    """Writes ``report.html`` from the JSON files and the masks in the folder, whole or not at all."""
    pruned, packed, timed = (_read(folder / name) for name in (REPORT, COMPRESS_REPORT, BENCH_REPORT))
    sections = [_heading(pruned, folder), _tiles(pruned, packed, timed)]
    if pruned:
        sections += [_layer_charts(pruned), mask_pictures(folder / MASKS), _layer_table(pruned)]
    if timed:
        sections.append(_speed(timed))
    if packed:
        sections.append(_packed(packed))
    if machine := (timed or packed or {}).get("machine"):
        sections.append(
            f'<p class="note">Measured on {escape(str(machine["device"]))}, torch {escape(machine["torch"])}.</p>'
        )
    title = escape((pruned or {}).get("model") or folder.name)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: sparsekit</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )
    with replacing(folder / PAGE) as file:
        file.write(page.encode())


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _heading(pruned: dict[str, Any] | None, folder: Path) -> str:
    if pruned is None:
        return f"<h1>{escape(folder.name)}</h1>"
    calibration = pruned["calibration"]
    said = f"{pruned['architecture']}, {pruned['method']}"
    if calibration["text"] != "none":
        said += f", calibrated on {calibration['windows']} windows of {calibration['window']} tokens"
    name = Path(pruned["model"]).name
    path = "" if name == pruned["model"] else f"{escape(pruned['model'])}<br>"
    return f'<h1>{escape(name)}</h1><p class="sub">{path}{escape(said)}</p>'


def _tiles(pruned: dict[str, Any] | None, packed: dict[str, Any] | None, timed: dict[str, Any] | None) -> str:
    tiles: list[tuple[str, str]] = []
    if pruned:
        layers = pruned["layers"]
        dense = sum(layer["dense_bytes"] for layer in layers)
        small = sum(
            layer["dense_bytes"] if layer["packed_bytes"] is None else layer["packed_bytes"] for layer in layers
        )
        tiles += [(pruned["pattern"], "pattern"), (f"{pruned['sparsity']:.2%}", f"zeros in {len(layers)} layers")]
        if pruned["error"] is not None:
            tiles.append((f"{pruned['error']:.4f}", "mean relative output error"))
        if perplexity := pruned["perplexity"]:
            tiles.append((f"{perplexity['dense']:.2f} → {perplexity['pruned']:.2f}", "perplexity, dense → pruned"))
        tiles += [
            (f"{size(dense)} → {size(small)}", "layers, dense → packed"),
            (f"{pruned['seconds']:.1f} s", "to prune"),
        ]
    if packed:
        now = sum(layer["decision"] != "plain" for layer in packed["layers"])
        tiles.append((f"{now} of {len(packed['layers'])}", "layers swapped for a faster one"))
    if timed and timed["layers"]:
        count, best = max(timed["models"].items(), key=lambda item: item[1]["compressed"]["ratio"])
        tiles.append((f"{best['compressed']['ratio']:.2f}x", f"plain dense at best, {at_size(int(count))}"))
    shown = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _layer_charts(pruned: dict[str, Any]) -> str:
    names = [layer["name"] for layer in pruned["layers"]]
    shown = []
    if pruned["error"] is not None:
        errors = bars([layer["error"] for layer in pruned["layers"]], names, "output error by layer")
        shown.append(f'<h2>Output error by layer</h2><div class="card">{errors}{legend(names)}</div>')
    zeros = bars([layer["sparsity"] for layer in pruned["layers"]], names, "sparsity by layer", percent=True)
    shown.append(f'<h2>Sparsity by layer</h2><div class="card">{zeros}{legend(names)}</div>')
    return "\n".join(shown)


def _layer_table(pruned: dict[str, Any]) -> str:
    rows = [
        (
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["pattern"],
            f"{layer['sparsity']:.2%}",
            "-" if layer["error"] is None else f"{layer['error']:.4f}",
            f"{layer['seconds']:.2f}",
            size(layer["dense_bytes"]),
            "-" if layer["packed_bytes"] is None else size(layer["packed_bytes"]),
        )
        for layer in pruned["layers"]
    ]
    shown = html_table(("layer", "shape", "pattern", "sparsity", "error", "seconds", "dense", "packed"), rows)
    left = "".join(f"<li>{escape(each['name'])}: {escape(each['reason'])}</li>" for each in pruned["skipped"])
    return f"<h2>Layers</h2>{shown}" + (f'<p class="note">Left dense:</p><ul class="note">{left}</ul>' if left else "")


def _speed(timed: dict[str, Any]) -> str:
    rates = [
        (
            f"{count} token{'s' * (int(count) != 1)} a pass",
            {name: timing["tokens_per_second"] for name, timing in timings.items()},
        )
        for count, timings in timed["models"].items()
    ]
    rows = [
        (count, *(f"{timings['compressed'][key]:.2f}x" for key in ("ratio", "best_dense")))
        for count, timings in timed["models"].items()
    ]
    compared = html_table(("tokens a pass", "over plain dense", "over the best dense"), rows)
    layers = [
        (
            f"{len(layer['layers'])} of {'x'.join(map(str, layer['shape']))}",
            layer["kind"],
            *(f"{timing['ratio']:.2f}x ({timing['best_dense']:.2f}x)" for timing in layer["timings"].values()),
        )
        for layer in timed["layers"]
    ]
    head = ("layers", "now", *(f"{count} token{'s' * (int(count) != 1)}" for count in timed["models"]))
    each = (
        html_table(head, layers, left=(1,))
        if layers
        else '<p class="note">No layer is compressed: nothing was faster than dense.</p>'
    )
    note = '<p class="note">Times the plain layer (times the best dense one).</p>' if layers else ""
    return f'<h2>Speed</h2><div class="card">{speeds(rates)}</div><h2>Speed against dense</h2>{compared}{each}{note}'


def _packed(packed: dict[str, Any]) -> str:
    alike: dict[tuple[str, str, str], int] = {}
    for layer in packed["layers"]:
        kind = "x".join(map(str, layer["shape"])), layer["decision"], layer.get("why") or layer["reason"]
        alike[kind] = alike.get(kind, 0) + 1
    rows = [(f"{count} of {shape}", decision, reason) for (shape, decision, reason), count in alike.items()]
    sizes = f"{size(packed['bytes_before'])} → {size(packed['bytes_after'])} in memory"
    counts = ", ".join(map(str, packed["tokens"]))
    shown = html_table(("layers", "now", "why"), rows, left=(1, 2))
    return f'<h2>Compressed</h2>{shown}<p class="note">For passes of {escape(counts)} tokens; {escape(sizes)}.</p>'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Returns an HTML table of plain text.

    The first column and those at the indices ``left`` are aligned to the left, and the latter break long lines.
    """
    style = [' class="left"' if index in left else "" for index in range(len(head))]
    top = "".join(f"<th{style[index]}>{escape(cell)}</th>" for index, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{style[index]}>{escape(cell)}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
