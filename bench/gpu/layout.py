"""Check 1: is the vendor's packed weight what the closed form of its layout says, byte for byte?"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bench.shapes import name
from sparsekit.ops.hardware24 import MULTIPLES, _nibble_index
from sparsekit.ops.nm import nm_mask_reference, nm_prune_reference
from sparsekit.ops.sparse24 import pack24_reference

from .lab import Lab, check_same, reference
from .log import Log

FIRST, LAST = 0x4, 0xE  # the metadata of a group that keeps its first, its last two entries
CUSPARSELT = tuple(layout for layout in MULTIPLES if layout.startswith("cusparselt"))


def measure(lab: Lab, log: Log) -> None:
    """Compares at every shape, and works out from the vendor's own output where it puts each group."""
    for what, shape in log.each({name(shape): shape for shape in lab.sizes.probes}):
        with log.guard(f"probe {what}"):
            log.write(name="probe", shape=what, **probe(lab, shape, log.path.parent))
    shapes = {name((rows, cols)): (rows, cols) for cols in lab.sizes.layout_cols for rows in lab.sizes.layout_rows}
    for what, shape in log.each(shapes):
        with log.guard(f"layout {what}"):
            log.write(name="layout", shape=what, **compare(lab, shape))


def compare(lab: Lab, shape: tuple[int, int]) -> dict[str, Any]:
    """How the vendor's blob differs from each closed form."""
    rows, cols = shape
    weight = nm_prune_reference(lab.randn(*shape), 2, 4, None)[0]
    blob = _bytes(lab.vendor.compress(weight))
    row: dict[str, Any] = {"bytes": blob.numel(), "9/16 of the weight": rows * cols * 2 * 9 // 16}
    for layout in CUSPARSELT:
        row[layout] = "the form has no such columns"
        if cols % MULTIPLES[layout][1] == 0:
            row[layout] = difference(blob, own_bytes(lab, weight, layout), rows, cols, layout)
    return row


def own_bytes(lab: Lab, weight: Tensor, layout: str) -> Tensor:
    """The closed form's blob of the weight, with padded rows. Both ops that make it must agree."""
    weight = F.pad(weight, (0, 0, 0, -weight.shape[0] % MULTIPLES[layout][0]))
    values, bitmask = pack24_reference(weight, nm_mask_reference(weight, 2, 4), False)
    packed = lab.op("to_hardware24")(values, bitmask, weight.shape[1], layout)
    check_same(packed, reference("to_hardware24")(values, bitmask, weight.shape[1], layout))
    check_same(lab.op("prune_to_hardware24")(weight, None, layout), packed)
    return _bytes(packed)


def difference(blob: Tensor, own: Tensor, rows: int, cols: int, layout: str) -> dict[str, Any]:
    """Where the values and the metadata differ; what stands for the rows of the padding is left out."""
    values, padded = rows * cols, own.numel() * 8 // 9  # bytes
    meta, own_meta = _nibbles(blob[values:]), _nibbles(own[padded:])
    index = _places(rows, cols, layout, blob.device)
    held = index[index < meta.numel()]
    wrong = held[meta[held] != own_meta[held]]
    return {
        "values that differ": int((blob[:values] != own[:values]).sum()),
        "groups that differ": wrong.numel() + index.numel() - held.numel(),
        "first byte of metadata that differs": int(wrong.min()) // 2 if wrong.numel() else None,
        "metadata bytes": [meta.numel() // 2, own_meta.numel() // 2],
    }


def probe(lab: Lab, shape: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Finds the nibble in which the vendor stores each group, without knowing its layout, and keeps the map.

    Group ``i`` keeps its last two entries in the weight of bit ``b`` where ``i`` has that bit, else its first two: the
    nibbles of all those weights, read together, spell the group's number.
    """
    rows, cols = shape
    groups = rows * cols // 4
    number = torch.arange(1, groups + 1, device=lab.device)  # 0 is what padding reads as
    first, last = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], device=lab.device, dtype=torch.bfloat16)
    seen = []
    for bit in range(groups.bit_length()):
        weight = torch.where((number >> bit & 1).bool().unsqueeze(1), last, first).view(rows, cols)
        seen.append(_nibbles(_bytes(lab.vendor.compress(weight))[rows * cols :]))
    nibbles = torch.stack(seen, 1)
    weights = 1 << torch.arange(len(seen), device=lab.device)
    group = ((nibbles == LAST) * weights).sum(1)  # by nibble
    legal = ((nibbles == FIRST) | (nibbles == LAST)).all(1) & (group > 0) & (group <= groups)
    place = torch.full((groups,), -1, device=lab.device)
    place[group[legal] - 1] = legal.nonzero().flatten()
    example = nm_prune_reference(lab.randn(*shape), 2, 4, None)[0]
    kept_maps = {"nibble_of_group": place, "weight": example, "blob": lab.vendor.compress(example)}
    path = folder / f"layout-{name(shape)}.safetensors"
    save_file({key: tensor.cpu().contiguous() for key, tensor in kept_maps.items()}, path)
    found: dict[str, Any] = {
        "nibbles": group.numel(),
        "groups": groups,
        "groups that were found": int((place >= 0).sum()),
        "file": path.name,
    }
    for layout in CUSPARSELT:
        found[layout] = _agreement(place, rows, cols, layout)
    return found


def _agreement(place: Tensor, rows: int, cols: int, layout: str) -> float | None:
    """The share of the groups that a closed form puts where the vendor does."""
    if cols % MULTIPLES[layout][1]:
        return None
    return (_places(rows, cols, layout, place.device) == place).float().mean().item()


def _places(rows: int, cols: int, layout: str, device: torch.device) -> Tensor:
    """The nibble of each group by the closed form, whose rows are padded."""
    padded = rows + -rows % MULTIPLES[layout][0]
    return _nibble_index(padded, cols, layout, device)[:rows].flatten()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _nibbles(data: Tensor) -> Tensor:
    return torch.stack([data & 15, data >> 4], 1).flatten()
