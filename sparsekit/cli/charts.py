"""Charts as inline SVG, which takes its colors from the page, and pictures as PNG within the page."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

WIDTH, HEIGHT, LEFT, TOP = 1000, 190, 52, 10
KINDS = 8  # colors in the style sheet


def bars(values: Sequence[float | None], names: Sequence[str], label: str, *, percent: bool = False) -> str:
    """Returns a bar chart with one bar per layer, whose color follows from the last part of the layer's name.

    The axis goes from zero to a round maximum. Each bar has a tooltip. A value that is None or not finite has no bar.
    """
    values = [value if value is not None and math.isfinite(value) else None for value in values]
    largest = max((value for value in values if value is not None), default=0.0)
    top = _round_up(largest)
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    step = (WIDTH - LEFT) / max(len(values), 1)
    shown = []
    for share in (0, 0.5, 1):
        y, mark = TOP + HEIGHT * (1 - share), top * share
        text = f"{100 * mark:.3g}%" if percent else f"{mark:.3g}"
        shown.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shown.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for index, (value, name) in enumerate(zip(values, names, strict=True)):
        if value is None:
            continue
        high = HEIGHT * value / top
        text = f"{value:.1%}" if percent else f"{value:.4f}"
        shown.append(
            f'<rect class="k{kinds.index(_kind(name)) % KINDS}" x="{LEFT + index * step:.2f}" '
            f'y="{TOP + HEIGHT - high:.2f}" width="{max(step * 0.86, 0.5):.2f}" height="{high:.2f}">'
            f"<title>{escape(name)}: {text}</title></rect>"
        )
    box = f"0 0 {WIDTH} {HEIGHT + TOP + 8}"
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="{box}">{"".join(shown)}</svg>'


def legend(names: Sequence[str]) -> str:
    """Returns the legend of ``bars``: which color stands for which kind of layer."""
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    items = (f'<span><i class="k{index % KINDS}"></i>{escape(kind)}</span>' for index, kind in enumerate(kinds[:24]))
    return f'<p class="legend">{"".join(items)}</p>'


def speeds(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """Returns a chart of groups of horizontal bars with their values; each group is scaled to its longest bar."""
    shown, y = [], 14
    for title, values in rows:
        shown.append(f'<text class="strong" x="0" y="{y}">{escape(title)}</text>')
        y += 8
        for index, (name, value) in enumerate(values.items()):
            wide = 620 * value / max(*values.values(), 1e-9)
            shown.append(f'<rect class="s{index % 3}" x="130" y="{y}" width="{wide:.1f}" height="18" rx="3"/>')
            shown.append(f'<text x="122" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
            shown.append(f'<text x="{138 + wide:.1f}" y="{y + 14}">{value:,.0f} tokens/s</text>')
            y += 23
        y += 22
    return f'<svg role="img" aria-label="tokens per second" viewBox="0 0 {WIDTH} {y - 20}">{"".join(shown)}</svg>'


def png(picture: Tensor) -> str:
    """Returns a picture, uint8 ``[height, width, 3]``, as the source of an HTML image tag."""
    from PIL import Image

    height, width, _ = picture.shape
    image = Image.frombytes("RGB", (width, height), bytes(picture.flatten().tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shades(share: Tensor) -> Tensor:
    """Draws shares from 0 to 1 as a picture: nothing kept is light, everything kept is dark blue."""
    light, dark = torch.tensor((240.0, 243, 248)), torch.tensor((24.0, 45, 92))
    return (light + (dark - light) * share.float().unsqueeze(-1)).round().to(torch.uint8)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _round_up(value: float) -> float:
    """Rounds up to a multiple of a power of ten: 1, 1.5, 2, 3, 4, 5, 6, 8 or 10 times."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * 0.999999)
