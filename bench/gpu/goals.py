"""The goals of the kernels on an H200, on fresh buffers larger than its L2 cache."""

SHAPE, DTYPE = "4096x4096", "bf16"
DECODE, MANY = 16, 1024  # tokens: the decode goals hold up to the first, the goals of a product from the second on
DECODE_RATIO, MANY_RATIO, NEVER_SLOWER = 1.5, 1.2, 1.0  # over cuBLAS
DECODE_SHAPES = ("4096x4096", "14336x4096", "4096x14336")
# Whether `compress_` is told that calls will be replayed as CUDA graphs, so that the host's time does not count.
MODES = {"compress_": False, "compress_, graphs": True}
NOISE = 0.03  # the share by which a layer that stays dense may seem slower than itself

# The goal in microseconds, and the limit: the time that the bytes take at 4.8 TB/s. `nm_prune` also writes a bool mask,
# one byte for each entry, which its limit does not count.
OPS: dict[str, tuple[float, float]] = {
    "nm_mask 2:4": (12.5, 10.5),
    "nm_mask_bits 2:4": (9, 7.4),
    "nm_prune 2:4, scored": (16.5, 14),
    "prune_pack24": (13, 10.9),
    "prune_to_hardware24": (13, 10.9),
    "prune_both_to_hardware24": (18, 15.3),
    "block_scores 16x16": (8.5, 7.0),
    "block_topk_mask 10 of 256": (16, 10.5),
}


def op_goal(name: str, shape: str, dtype: str) -> float | None:
    """Returns the goal of an op in microseconds; None if it has none."""
    return OPS[name][0] if name in OPS and (shape, dtype) == (SHAPE, DTYPE) else None


def linear_goals(shape: str, tokens: int) -> dict[str, float]:
    """Returns the goals of a product: how many times faster than cuBLAS each form must be."""
    if tokens <= DECODE:
        return {"linear24": DECODE_RATIO} if shape in DECODE_SHAPES else {}
    return {"best": MANY_RATIO} if tokens >= MANY and shape in DECODE_SHAPES else {}
