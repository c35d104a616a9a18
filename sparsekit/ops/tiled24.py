"""A quantized 2:4 weight as tiles of 8 rows by 64 columns, in the order in which ``linear24q_int8`` reads them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import DTYPES, check_like, define
from .bits import pack_bits, unpack_bits
from .quant24 import (
    ZERO_CODE,
    QuantizedWeight24,
    check_kind,
    check_quantized24,
    pack_codes,
    unpack_codes,
)
from .sparse24 import values_per_row

ROWS, COLS = 8, 64  # of a tile
SCALE_BYTES, INDEX_BYTES = 2 * ROWS, 64
CODE_BYTES = {"int8": 256, "int4": 128, "nf4": 128}
# The kernel adds neighboring lanes of two vectors, which brings rows that are stored in this order into their own.
_ORDER = [0, 1, 4, 5, 2, 3, 6, 7]
# Which two of four entries are kept, by their four bits; groups that keep fewer are padded with entries of value 0.
_KEPT = [[0, 1]] * 16
for _first in range(4):
    for _second in range(_first + 1, 4):
        _KEPT[1 << _first | 1 << _second] = [_first, _second]


class TiledWeight24(NamedTuple):
    """A quantized 2:4 weight in the order in which ``linear24q_int8`` reads it: one tile after the other.

    It holds the codes, scales and positions of the ``QuantizedWeight24`` that it was made of, which ``to_quantized``
    returns again; where ``group`` is a multiple of 64 it takes the same bytes, up to padding at the edges.

    Attributes:
        tiles: uint8 ``[ceil(rows / 8), n, 336]`` for ``"int8"``, else ``[ceil(rows / 8), n, 208]``. A tile is 8 rows by
            64 columns that share a scale: 8 bfloat16 scales, the positions of the kept values, and their codes.
        shape: rows and columns of the dense weight.
        quant_type: ``"int8"``, ``"int4"`` or ``"nf4"``.
        group: how many columns share a scale.
        dtype: that of the weight before it was quantized.
    """

    tiles: Tensor
    shape: tuple[int, int]
    quant_type: str
    group: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the tiles."""
        return self.tiles.nbytes

    def to(self, device: torch.device | str) -> "TiledWeight24":
        """Returns a copy of the weight on a device, or the same tensor if it is there."""
        return self._replace(tiles=self.tiles.to(device))

    def to_quantized(self) -> QuantizedWeight24:
        """Returns the weight in the form that ``quantize24`` gave it.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tiles that do not have the shape that ``shape`` asks for.
        """
        check_tiled24(self)
        rows, cols = self.shape
        codes, index, scales = split_tiles(self.tiles, self.quant_type)
        where = tile_columns(cols, self.group, codes.device).flatten()
        kept = torch.zeros(*index.shape[:-1], 4, dtype=torch.bool, device=codes.device).scatter_(-1, index, True)
        spread = codes.new_zeros(kept.shape).scatter_(-1, index, codes)
        mask = kept.new_zeros(len(kept), cols + 1).index_copy_(1, where, kept.flatten(1))[:rows, :cols]
        dense = codes.new_zeros(len(kept), cols + 1).index_copy_(1, where, spread.flatten(1))[:rows, :cols]
        values = pack_codes(dense[mask].view(rows, values_per_row(cols)), self.quant_type)
        groups = torch.arange(-(-cols // self.group), device=codes.device)
        scales = scales[:rows, groups * -(-self.group // COLS)]
        return QuantizedWeight24(values.contiguous(), scales.contiguous(), pack_bits(mask), *self[1:])

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight, as ``QuantizedWeight24.to_dense`` does."""
        return self.to_quantized().to_dense()


def tile24_reference(values: Tensor, scales: Tensor, bitmask: Tensor, cols: int, quant_type: str, group: int) -> Tensor:
    where = tile_columns(cols, group, values.device)
    mask = F.pad(unpack_bits(bitmask, cols), (0, 1, 0, -len(values) % ROWS))  # a last column, for padding
    kept_codes = unpack_codes(values, values_per_row(cols), quant_type)
    codes = kept_codes.new_full(mask.shape, ZERO_CODE[quant_type]).masked_scatter_(mask, kept_codes)
    bits = pack_bits(mask[:, where].unflatten(-1, (-1, 4)))[..., 0]  # [rows, tiles, 16], of four entries
    index = torch.tensor(_KEPT, device=values.device)[bits.long()]
    kept = codes[:, where].unflatten(-1, (-1, 4)).gather(-1, index)
    tiles = len(where)
    # [rows / 8, tiles, 4 steps of 16 columns, 8 rows, 8 kept values]
    kept, index = (_by_tile(each.view(len(each), tiles, 4, 8)) for each in (kept, index))
    shifts = torch.arange(0, 8, 2, device=values.device)[:, None]
    index = (index.flatten(-2) << shifts).sum(-2).to(torch.uint8)
    kept = kept.flatten(-2)
    kept = kept.view(torch.uint8) if quant_type == "int8" else kept[..., 0::2, :] | kept[..., 1::2, :] << 4
    of_tile = (torch.arange(tiles, device=values.device) // -(-group // COLS)).clamp(max=max(scales.shape[1] - 1, 0))
    scales = F.pad(scales, (0, 0, 0, -len(values) % ROWS))[:, of_tile].unflatten(0, (-1, ROWS))
    return torch.cat([scales.transpose(1, 2).contiguous().view(torch.uint8), index, kept.flatten(-2)], -1)


def _tile_fake(values: Tensor, scales: Tensor, bitmask: Tensor, cols: int, quant_type: str, group: int) -> Tensor:
    return values.new_empty(_tiles_shape(values.shape[0], cols, quant_type, group), dtype=torch.uint8)


_tile24 = define(tile24_reference, _tile_fake)


def tile24(packed: QuantizedWeight24) -> TiledWeight24:
    """Rearranges a quantized 2:4 weight for ``linear24q_int8``; ``to_quantized`` undoes it.

    Args:
        packed: the weight, as ``quantize24`` returns it.

    Returns:
        The same codes, scales and positions as tiles.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes, or two devices.
    """
    check_quantized24(packed)
    values, scales, bitmask, shape, quant_type, group, dtype = packed
    tiles = _tile24(values, scales, bitmask, shape[1], quant_type, group)
    return TiledWeight24(tiles, shape, quant_type, group, dtype)


def _by_tile(entries: Tensor) -> Tensor:
    """Brings ``[rows, tiles, 4, 8]`` into ``[rows / 8, tiles, 4, 8 rows, 8]``, the rows in stored order."""
    return entries.unflatten(0, (-1, ROWS))[:, _ORDER].permute(0, 2, 3, 1, 4)


def _by_row(entries: Tensor) -> Tensor:
    """Undoes ``_by_tile``: ``[rows, tiles, 4, 8]``."""
    inverse = [_ORDER.index(row) for row in range(ROWS)]
    return entries.permute(0, 3, 1, 2, 4)[:, inverse].flatten(0, 1)


def split_tiles(tiles: Tensor, quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parts of tiles, row by row.

    Returns:
        The codes ``[rows, tiles, 16, 2]``, which are int8 or, for 4 bits, uint8; the positions among four columns that
        they belong to, of the same shape; and the scales, bfloat16 ``[rows, tiles]``. Rows are padded to 8.
    """
    scales, index, codes = tiles.split([SCALE_BYTES, INDEX_BYTES, CODE_BYTES[quant_type]], -1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=tiles.device)[:, None]
    index = (index.unsqueeze(-2) >> shifts & 3).long()
    if quant_type == "int8":
        codes = codes.contiguous().view(torch.int8)
    else:
        pairs = codes.unflatten(-1, (2, 64))  # a byte has the codes of two steps
        codes = torch.stack([pairs & 15, pairs >> 4], -2)
    codes, index = (
        _by_row(each.reshape(*tiles.shape[:2], 4, ROWS, 8)).reshape(ROWS * len(tiles), tiles.shape[1], 16, 2)
        for each in (codes, index)
    )
    return codes, index, scales.contiguous().view(torch.bfloat16).transpose(1, 2).flatten(0, 1)


def tile_columns(cols: int, group: int, device: torch.device) -> Tensor:
    """Returns the column that each of a row's places belongs to, ``cols`` for padding: ``[tiles, 64]``.

    A group of columns begins a tile of its own. Of a tail of ``cols % 4`` columns, all of which are kept, two count as
    four columns, and so does the third.
    """
    full, tail = cols // 4 * 4, list(range(cols // 4 * 4, cols))
    places: list[int] = []
    for start in range(0, cols, group):
        places += range(start, min(start + group, full))
        if start + group >= cols:
            for pair in (tail[:2], tail[2:]):
                places += [*pair, *[cols] * (4 - len(pair))] if pair else []
        places += [cols] * (-len(places) % COLS)
    return torch.tensor(places, dtype=torch.long, device=device).view(-1, COLS)


def count_tiles(cols: int, group: int) -> int:
    """Returns how many tiles hold a row of ``cols`` columns."""
    groups = -(-cols // group)
    last = cols - max(groups - 1, 0) * group
    return max(groups - 1, 0) * -(-group // COLS) + -(-(last + (5 if last % 4 == 3 else 3) & ~3) // COLS)


def _tiles_shape(rows: int, cols: int, quant_type: str, group: int) -> tuple[int, int, int]:
    nbytes = SCALE_BYTES + INDEX_BYTES + CODE_BYTES[quant_type]
    return -(-rows // ROWS), count_tiles(cols, group), nbytes


def check_tiled24(packed: TiledWeight24, x: Tensor | None = None) -> None:
    """Rejects anything but a ``TiledWeight24`` whose tiles have the shape that its shape asks for.

    If ``x`` is given, the tiles must be on its device.
    """
    if not isinstance(packed, TiledWeight24):
        raise TypeError(f"packed must be a TiledWeight24, as tile24 returns it, got {type(packed).__name__}")
    tiles, shape, quant_type, group, dtype = packed
    check_kind(quant_type, group)
    if len(shape) != 2:
        raise ValueError(f"packed.shape must be rows and columns, got {tuple(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"packed.dtype must be float32, float16 or bfloat16, got {dtype}")
    like = tiles if x is None else x
    check_like("packed.tiles", tiles, torch.uint8, _tiles_shape(*shape, quant_type, group), like)
