"""Parses the fields of a layer in the structure of a checkpoint; each raises a ValueError for what no layer has."""

from typing import Any

from ..masks import Axis, MaskInfo, Pattern

MAX_COUNT = 1 << 20  # of tokens, and of images, their height and their width


def parse_mask(where: str, data: Any, shape: tuple[int, ...]) -> MaskInfo:
    """Returns the description of a mask, of a weight of this shape."""
    dims = len(shape)
    axis: Axis | None = data.get("axis") if isinstance(data, dict) else None
    if axis != "flatten" and not (type(axis) is int and -dims <= axis < dims):
        raise ValueError(f"{where} has the axis {axis!r}, for a weight of {dims} dimensions")
    return MaskInfo(Pattern.parse(field(where, data, "pattern", str)), axis, shape)


def parse_tiers(where: str, data: Any) -> tuple[tuple[int, int], int]:
    """Returns the block and the ``k`` of a tiered layer."""
    block = field(where, data, "block", list)
    if len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ValueError(f"{where} has blocks of {block}, not of two positive sides")
    return (block[0], block[1]), field(where, data, "k", int)


def parse_images(where: str, data: Any) -> tuple[int, int, int]:
    """Returns the images that a convolution is laid out for."""
    images = field(where, data, "images", list)
    if len(images) != 3 or not all(type(size) is int and 0 < size <= MAX_COUNT for size in images):
        raise ValueError(f"{where} has images of {images}, not a number, a height and a width")
    return images[0], images[1], images[2]


def field(where: str, data: Any, key: str, kind: type) -> Any:
    """Returns an entry, which must be of this very type."""
    if not isinstance(data, dict) or type(data.get(key)) is not kind:
        raise ValueError(f"{where} has no {key!r} of type {kind.__name__}")
    return data[key]
