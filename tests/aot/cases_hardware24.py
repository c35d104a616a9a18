import torch

from sparsekit.triton_kernels import hardware24, hardware24_both

from .case import Case, meta


def _prune(config: str, layout: str) -> object:
    with hardware24.PRUNE.force(config):
        return hardware24.prune_to_hardware24(meta(4096, 4096), None, layout)


def _both(config: str, layout: str) -> object:
    with hardware24_both.BOTH.force(config):
        return hardware24_both.prune_both_to_hardware24(meta(4096, 4096), layout)


def _to(layout: str) -> object:
    return hardware24.to_hardware24(meta(4096, 2048), meta(4096, 512, dtype=torch.uint8), 4096, layout)


def _from(layout: str) -> object:
    return hardware24.from_hardware24(meta(4096 * 4096 // 16 * 9), 4096, 4096, layout)


SM90 = "cusparselt_sm90"
CASES = [
    Case("prune", lambda: _prune("32x256", SM90), loads=16, stores=8),
    Case("prune-narrow", lambda: _prune("32x128", "cutlass_sm80"), loads=16, stores=8),
    Case("prune-tall", lambda: _prune("64x128", "cusparselt_sm80"), loads=16, stores=8),
    Case(
        "prune-scaled",
        lambda: hardware24.prune_to_hardware24(meta(4096, 4096), meta(4096, dtype=torch.float32), SM90),
        loads=16,
        stores=8,
    ),
    Case("to", lambda: _to(SM90), loads=16, stores=16),
    Case("to-sm80", lambda: _to("cusparselt_sm80"), loads=16, stores=16),
    Case("from", lambda: _from(SM90), loads=8, stores=16),
    # Four rows at a time: a wavefront of 64 lanes has half as much to load.
    Case("both", lambda: _both("64x128", SM90), loads=8, stores=4),
    Case("both-square", lambda: _both("64x64", SM90), loads=8, stores=4, variant=True),
    Case("both-wide", lambda: _both("32x256", "cusparselt_sm80"), loads=8, stores=4),
]
