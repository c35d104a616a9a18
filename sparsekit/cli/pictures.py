"""Thumbnails of masks: a corner of an n:m mask entry by entry, tiers block by block, any other as shares kept."""

from html import escape
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..masks import MaskInfo, grouped
from ..tiers import TierMap
from .charts import png, shades
from .patterns import tier_shares
from .stored import read_masks

CORNER, CELLS, MOST = 64, 96, 12  # entries and cells a side; pictures in a report


def mask_pictures(path: Path) -> str:
    """A section with pictures of up to twelve masks, drawn evenly from all layers; nothing without a file of masks."""
    masks = read_masks(path) if path.exists() else {}
    chosen = list(masks)[:: max(-(-len(masks) // MOST), 1)]
    figures = []
    for name in chosen:
        picture, what = thumbnail(*masks[name])
        image = f'<img alt="mask of {escape(name)}" src="{png(picture)}">'
        figures.append(f"<figure>{image}<figcaption>{escape(name)}<br>{escape(what)}</figcaption></figure>")
    return f'<h2>Masks</h2><div class="pictures">{"".join(figures)}</div>' if figures else ""


def thumbnail(mask: Tensor, info: MaskInfo) -> tuple[Tensor, str]:
    """A uint8 ``[height, width, 3]`` of a mask in its weight's shape, and what it shows."""
    pattern = info.pattern
    rows = grouped(mask, info.axis).flatten(1)
    if pattern.tiers and isinstance(pattern.unit, tuple):
        tiers, shares = tier_shares(rows, pattern)
        shape = (rows.shape[0], rows.shape[1])
        return TierMap(
            tiers, shape, pattern.unit, pattern.n
        ).picture(), f"every {pattern.unit[0]}x{pattern.unit[1]} block: {shares}"
    if pattern.m:
        return shades(rows[:CORNER, :CORNER]), f"{pattern}, the first {CORNER} rows and inputs; kept is dark"
    cells = (min(CELLS, rows.shape[0]), min(CELLS, rows.shape[1]))
    return shades(F.adaptive_avg_pool2d(rows.float()[None], cells)[0]), f"{pattern}, shares kept; dark is all"
