import torch

from sparsekit.triton_kernels import hardware24

from .case import Case, meta


def _prune(config: str, layout: str) -> object:
    with hardware24.PRUNE.force(config):
        return hardware24.prune_to_hardware24(meta(4096, 4096), None, layout)


def _to(layout: str) -> object:
    return hardware24.to_hardware24(meta(4096, 2048), meta(4096, 512, dtype=torch.uint8), 4096, layout)


def _from(layout: str) -> object:
    return hardware24.from_hardware24(meta(4096 * 4096 // 16 * 9), 4096, 4096, layout)


SM90 = "cusparselt_sm90"
CASES = [
    Case("prune", lambda: _prune("32x256", SM90), loads=16, stores=8),
    Case("prune-narrow", lambda: _prune("32x128", "cutlass_sm80"), loads=16, stores=8),
    Case("prune-64-rows", lambda: _prune("64x128", "cusparselt_sm80"), loads=16, stores=8),
    Case(
        "prune-scaled",
        lambda: hardware24.prune_to_hardware24(meta(4096, 4096), meta(4096, dtype=torch.float32), SM90),
        loads=16,
        stores=8,
    ),
    Case("to", lambda: _to(SM90), loads=16, stores=16),
    Case("to-sm80", lambda: _to("cusparselt_sm80"), loads=16, stores=16),
    Case("from", lambda: _from(SM90), loads=8, stores=16),
]
