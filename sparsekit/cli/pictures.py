"""Pictures of masks: a corner of an n:m mask entry by entry, the tier of every block, or the shares that are kept."""

from html import escape
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..masks import MaskInfo, grouped
from ..tiers import TierMap
from .charts import png, shades
from .patterns import tier_shares
from .stored import read_masks

CORNER = 64  # entries per side of the corner of an n:m mask
CELLS = 96  # cells per side of a picture of shares
MOST = 12  # pictures in a report


def mask_pictures(path: Path) -> str:
    """Returns the HTML section with pictures of up to twelve masks of evenly spaced layers; empty without the file."""
    masks = read_masks(path) if path.exists() else {}
    chosen = list(masks)[:: max(-(-len(masks) // MOST), 1)]
    figures = []
    for name in chosen:
        picture, what = thumbnail(*masks[name])
        image = f'<img alt="mask of {escape(name)}" src="{png(picture)}">'
        figures.append(f"<figure>{image}<figcaption>{escape(name)}<br>{escape(what)}</figcaption></figure>")
    return f'<h2>Masks</h2><div class="pictures">{"".join(figures)}</div>' if figures else ""


def thumbnail(mask: Tensor, info: MaskInfo) -> tuple[Tensor, str]:
    """Draws a mask, which has its weight's shape: returns a uint8 ``[height, width, 3]`` and a caption."""
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
