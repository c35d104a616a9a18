"""The ops that are bound by memory: masks, pruning, packing, blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.shapes import name
from bench.usual import block_sums, block_topk, topk_prune, topk_scatter
from sparsekit.ops.hardware24 import hardware_multiple
from sparsekit.ops.nm import nm_mask_reference
from sparsekit.ops.sparse24 import pack24_reference

from .clock import Call
from .goals import op_goal
from .lab import DTYPES, Lab, check_same, reference, total_bytes
from .log import Log, one_line

Make = Callable[[Lab, Tensor, Tensor], tuple[Any, ...]]  # (lab, weight, scale) -> the arguments of an op
Usual = Callable[[Lab, Tensor, Tensor], object]
TIERS = 3


@dataclass(frozen=True)
class Work:
    """An op as it is measured.

    Args:
        name: what tables call it.
        op: its registered name.
        make: its arguments.
        usual: what a user writes without it, by name.
        hardware: whether it needs a layout of this GPU, which exists for 16 bits only.
        dtypes: what it is measured in, at the first shape; at the others in the first of them.
    """

    name: str
    op: str
    make: Make
    usual: dict[str, Usual]
    hardware: bool = False
    dtypes: tuple[str, ...] = ("bf16",)


def _packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    return pack24_reference(weight, nm_mask_reference(weight, 2, 4), False)


def _tiers(lab: Lab, weight: Tensor) -> Tensor:
    rows, cols = (-(-side // 16) for side in weight.shape)
    return torch.randint(0, TIERS, (rows, cols), dtype=torch.uint8, device=lab.device)


def _hardware(lab: Lab, weight: Tensor) -> Tensor:
    return reference("prune_to_hardware24")(weight, None, lab.layout)


def _vendor_pack(lab: Lab, weight: Tensor, scale: Tensor) -> Tensor:
    return lab.vendor.compress(topk_prune(weight, 2, 4, scale)[0].to(weight.dtype))


def _topk(n: int, m: int) -> dict[str, Usual]:
    return {"topk": lambda lab, weight, scale: topk_scatter(weight, n, m)}


BOTH = ("bf16", "fp32")
TOPK_PRUNE: dict[str, Usual] = {"topk": lambda lab, weight, scale: topk_prune(weight, 2, 4, scale)}
WORKS = (
    Work("nm_mask 2:4", "nm_mask", lambda lab, w, s: (w, 2, 4), _topk(2, 4), dtypes=BOTH),
    Work("nm_mask_bits 2:4", "nm_mask_bits", lambda lab, w, s: (w, 2, 4), _topk(2, 4), dtypes=BOTH),
    Work("nm_prune 2:4, scored", "nm_prune", lambda lab, w, s: (w, 2, 4, s), TOPK_PRUNE, dtypes=BOTH),
    Work("prune_pack24", "prune_pack24", lambda lab, w, s: (w, s), TOPK_PRUNE, dtypes=BOTH),
    Work(
        "prune_to_hardware24",
        "prune_to_hardware24",
        lambda lab, w, s: (w, s, lab.layout),
        {"topk, vendor's compress": _vendor_pack},
        hardware=True,
    ),
    Work(
        "prune_both_to_hardware24",
        "prune_both_to_hardware24",
        lambda lab, w, s: (w, lab.layout),
        {"torch's tile": lambda lab, w, s: lab.vendor.tile(w)},
        hardware=True,
    ),
    Work(
        "block_scores 16x16",
        "block_scores",
        lambda lab, w, s: (w, 16, 16, s, None),
        {"reshape": lambda lab, w, s: block_sums(w, s)},
        dtypes=BOTH,
    ),
    Work(
        "block_topk_mask 10 of 256",
        "block_topk_mask",
        lambda lab, w, s: (w, 10, 16, 16),
        {"topk": lambda lab, w, s: block_topk(w, 10)},
        dtypes=BOTH,
    ),
    Work("transposable_mask", "transposable_mask", lambda lab, w, s: (w,), {}),
    Work("tier_prune", "tier_prune", lambda lab, w, s: (w, _tiers(lab, w), 10, 16, 16, s, None), {}),
    Work("tier_scores", "tier_scores", lambda lab, w, s: (w, 10, 16, 16, s, s, True), {}),
    Work("pack24", "pack24", lambda lab, w, s: (w, nm_mask_reference(w, 2, 4), False), {}),
    Work("unpack24", "unpack24", lambda lab, w, s: (*_packed(w), w.shape[1]), {}),
    Work("to_hardware24", "to_hardware24", lambda lab, w, s: (*_packed(w), w.shape[1], lab.layout), {}, hardware=True),
    Work(
        "from_hardware24",
        "from_hardware24",
        lambda lab, w, s: (_hardware(lab, w), *w.shape, lab.layout),
        {},
        hardware=True,
    ),
    Work("nm_mask 1:4", "nm_mask", lambda lab, w, s: (w, 1, 4), _topk(1, 4)),
    Work("nm_mask 4:8", "nm_mask", lambda lab, w, s: (w, 4, 8), _topk(4, 8)),
)


def cases(lab: Lab) -> dict[str, tuple[Work, tuple[int, int], str]]:
    """What is measured, the important first: every op in bf16 at the first shape, then the rest."""
    listed = [(work, shape, work.dtypes[0]) for shape in lab.sizes.masks for work in WORKS]
    listed += [(work, lab.sizes.masks[0], dtype) for work in WORKS for dtype in work.dtypes[1:]]
    return {
        f"{work.name} {name(shape)} {dtype}": (work, shape, dtype)
        for work, shape, dtype in listed
        if not work.hardware or _is_whole(lab, shape)
    }


def _is_whole(lab: Lab, shape: tuple[int, int]) -> bool:
    """Whether a weight and its transpose have the layout of this GPU: the registered ops trust their callers."""
    return lab.layout is not None and not any(side % max(hardware_multiple(lab.layout)) for side in shape)


def measure(lab: Lab, log: Log) -> None:
    """Checks every op against its reference, then times it against it, the usual way and a copy of its bytes."""
    for what, (work, shape, dtype) in log.each(cases(lab)):
        with log.guard(what):
            log.write(**one(lab, work, shape, dtype))


def inputs(lab: Lab, shape: tuple[int, int], dtype: str) -> Sequence[tuple[Tensor, Tensor]]:
    """Weights and scales, as many as exceed the cache."""

    def make() -> tuple[Tensor, Tensor]:
        return lab.randn(*shape, dtype=dtype), torch.rand(shape[1], device=lab.device)

    return lab.sets(make, shape[0] * shape[1] * DTYPES[dtype].itemsize)


def one(lab: Lab, work: Work, shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    """The row of one op at one shape."""
    made = inputs(lab, shape, dtype)
    arguments = [work.make(lab, *each) for each in made]
    op, defined = lab.op(work.op), reference(work.op)
    expected = defined(*arguments[0])
    check_same(op(*arguments[0]), expected)
    moved = total_bytes(*arguments[0], expected)
    own = {
        "own": [partial(op, *each) for each in arguments],
        "copy": [partial(Tensor.copy_, *pair) for pair in _copied(lab, moved // 2, len(made))],
    }
    slow = {key: [partial(call, lab, *made[0])] for key, call in work.usual.items()}
    slow["reference"] = [partial(defined, *arguments[0])]
    raced = lab.clock.race(own, capture=True)
    return {
        "op": work.name,
        "shape": name(shape),
        "dtype": dtype,
        "goal": op_goal(work.name, name(shape), dtype),
        "seconds": raced.seconds(),
        "spread": raced.spread("own"),
        "captured": "own" not in raced.host,
        "bytes": moved,
        "baselines": {key: _seconds_or_error(lab, calls) for key, calls in slow.items()},
    }


def _copied(lab: Lab, nbytes: int, sets: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs to copy, which take the bytes that the op moves."""

    def buffer() -> Tensor:
        return torch.randint(-128, 127, (nbytes,), dtype=torch.int8, device=lab.device)

    return [(buffer(), buffer()) for _ in range(sets)]


def _seconds_or_error(lab: Lab, calls: list[Call]) -> float | str:
    """A baseline that this machine lacks takes no figure from the op."""
    try:
        return lab.clock.seconds(calls)
    except Exception as error:
        return one_line(error)
