"""The ops that are bound by memory: masks, pruning, packing, blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from bench.shapes import DTYPES, name
from bench.timing import medians, spread
from bench.usual import block_sums, block_topk, rank_mask24, topk_prune, topk_scatter
from sparsekit.ops import _vendor
from sparsekit.ops.hardware24 import hardware_multiple

from .checks import check_same, op, reference, total_bytes
from .goals import op_goal
from .lab import Lab, Shape
from .rows import Row, Rows, one_line


def _mask24(weight: Tensor) -> Tensor:
    return reference("nm_mask")(weight, 2, 4)


def _packed(weight: Tensor) -> tuple[Any, ...]:
    return (*reference("pack24")(weight, _mask24(weight), False), weight.shape[1])


def _hardware(lab: Lab, weight: Tensor) -> tuple[Any, ...]:
    return (reference("prune_to_hardware24")(weight, None, lab.layout), *weight.shape, lab.layout)


def _tiers(weight: Tensor) -> Tensor:
    return torch.randint(0, 3, [-(-side // 16) for side in weight.shape], dtype=torch.uint8, device=weight.device)


# The arguments of each op, by what tables call it: its first word is the op's name. The important ones first.
OPS: dict[str, Callable[[Lab, Tensor, Tensor], tuple[Any, ...]]] = {
    "nm_mask 2:4": lambda lab, weight, scale: (weight, 2, 4),
    "nm_mask_bits 2:4": lambda lab, weight, scale: (weight, 2, 4),
    "nm_prune 2:4, scored": lambda lab, weight, scale: (weight, 2, 4, scale),
    "prune_pack24": lambda lab, weight, scale: (weight, scale),
    "prune_to_hardware24": lambda lab, weight, scale: (weight, scale, lab.layout),
    "prune_both_to_hardware24": lambda lab, weight, scale: (weight, lab.layout),
    "block_scores 16x16": lambda lab, weight, scale: (weight, 16, 16, scale, None),
    "block_topk_mask 10 of 256": lambda lab, weight, scale: (weight, 10, 16, 16),
    "transposable_mask24": lambda lab, weight, scale: (weight,),
    "tier_prune": lambda lab, weight, scale: (weight, _tiers(weight), 10, 16, 16, scale, None),
    "tier_scores": lambda lab, weight, scale: (weight, 10, 16, 16, scale, scale, True),
    "pack24": lambda lab, weight, scale: (weight, _mask24(weight), False),
    "unpack24": lambda lab, weight, scale: _packed(weight),
    "to_hardware24": lambda lab, weight, scale: (*_packed(weight), lab.layout),
    "from_hardware24": lambda lab, weight, scale: _hardware(lab, weight),
    "nm_mask 1:4": lambda lab, weight, scale: (weight, 1, 4),
    "nm_mask 4:8": lambda lab, weight, scale: (weight, 4, 8),
}
COMPILED = "compiled rank"
ALSO_FP32 = ("nm_mask 2:4", "nm_mask_bits 2:4", "nm_prune 2:4, scored", "prune_pack24", "block_scores 16x16")
ALSO_FP32 += ("block_topk_mask 10 of 256",)


def torch_tile(weight: Tensor) -> object:
    """Prunes in both directions by torch's pruner for training."""
    return SparseSemiStructuredTensorCUSPARSELT.prune_dense_static_sort(weight, "largest_abs_values_greedy")


def _topk_pack(weight: Tensor, scale: Tensor) -> Tensor:
    return _vendor.compress(topk_prune(weight, 2, 4, scale)[0].to(weight.dtype))


# What a user writes without the op, with its name.
USUAL: dict[str, tuple[str, Callable[[Tensor, Tensor], object]]] = {
    "nm_mask 2:4": ("topk", lambda weight, scale: topk_scatter(weight, 2, 4)),
    "nm_mask_bits 2:4": ("topk", lambda weight, scale: topk_scatter(weight, 2, 4)),
    "nm_mask 1:4": ("topk", lambda weight, scale: topk_scatter(weight, 1, 4)),
    "nm_mask 4:8": ("topk", lambda weight, scale: topk_scatter(weight, 4, 8)),
    "nm_prune 2:4, scored": ("topk", lambda weight, scale: topk_prune(weight, 2, 4, scale)),
    "prune_pack24": ("topk", lambda weight, scale: topk_prune(weight, 2, 4, scale)),
    "prune_to_hardware24": ("topk, vendor's compress", _topk_pack),
    "prune_both_to_hardware24": ("torch's tile", lambda weight, scale: torch_tile(weight)),
    "block_scores 16x16": ("reshape", lambda weight, scale: block_sums(weight, scale)),
    "block_topk_mask 10 of 256": ("topk", lambda weight, scale: block_topk(weight, 10)),
}


def memory(lab: Lab, rows: Rows) -> None:
    """Checks every op against its reference, then times it beside the reference, usual torch code, and a copy."""
    cases = [(key, shape, "bf16") for shape in lab.sizes.memory for key in OPS]
    cases += [(key, lab.sizes.memory[0], "fp32") for key in ALSO_FP32]
    named = {f"{key} {name(shape)} {dtype}": (key, shape, dtype) for key, shape, dtype in cases}
    fit = {what: case for what, case in named.items() if "hardware24" not in what or _has_layout(lab, case[1])}
    rows.for_each(fit, lambda case: one(lab, rows, *case))


def _has_layout(lab: Lab, shape: Shape) -> bool:
    """Returns whether this GPU's layout fits a weight and its transpose, which the registered ops do not check."""
    return lab.layout is not None and not any(side % max(hardware_multiple(lab.layout)) for side in shape)


def one(lab: Lab, rows: Rows, key: str, shape: Shape, dtype: str) -> Row:
    """Returns the row of one op at one shape."""
    kernel, defined = op(key.split()[0]), reference(key.split()[0])
    size = shape[0] * shape[1] * DTYPES[dtype].itemsize
    made = lab.sets(lambda: (lab.randn(*shape, dtype=dtype), torch.rand(shape[1], device=lab.device)), size)
    arguments = [OPS[key](lab, *each) for each in made]
    expected = defined(*arguments[0])
    calls = {"own": [partial(kernel, *each) for each in arguments]}
    check_same(calls["own"][0](), expected)
    lab.tune(rows, calls["own"], lambda got: check_same(got, expected))
    moved = total_bytes(*arguments[0], expected)

    def buffer() -> Tensor:
        return torch.randint(-128, 127, (moved // 2,), dtype=torch.int8, device=lab.device)

    calls["copy"] = [partial(Tensor.copy_, buffer(), buffer()) for _ in made]
    wrong: dict[str, str] = {}  # a baseline that this machine lacks takes no figure from the op
    if key == "nm_mask 2:4":
        compiled = torch.compile(rank_mask24, backend=lab.backend, dynamic=False)
        try:
            check_same(compiled(made[0][0]), expected)
            calls[COMPILED] = [partial(compiled, weight) for weight, _ in made]
        except Exception as error:
            wrong[COMPILED] = one_line(error)
    times = lab.clock.time_in_turns(calls, capture=True)
    seconds = medians(times.device)
    baselines = {COMPILED: seconds[COMPILED]} if COMPILED in calls else {}
    slow = {USUAL[key][0]: partial(USUAL[key][1], *made[0])} if key in USUAL else {}
    for baseline, call in (slow | {"reference": partial(defined, *arguments[0])}).items():
        try:
            baselines[baseline] = lab.clock.seconds([call])
        except Exception as error:
            wrong[baseline] = one_line(error)
    row = {"op": key, "shape": name(shape), "dtype": dtype, "bytes": moved, "seconds": seconds}
    row["goal"] = op_goal(key, name(shape), dtype)
    row |= {"spread": spread(times.device["own"]), "captured": "own" not in times.host}
    return row | {"baselines": baselines, "wrong": wrong}
