from sparsekit.triton_kernels import hardware24_both

from .case import Case, meta


def _both(config: str, layout: str) -> object:
    with hardware24_both.BOTH.force(config):
        return hardware24_both.prune_both_to_hardware24(meta(4096, 4096), layout)


SM90 = "cusparselt_sm90"
CASES = [
    # Four rows at a time: a wavefront of 64 lanes has half as much to load.
    Case("64x128", lambda: _both("64x128", SM90), loads=8, stores=4),
    Case("64x64", lambda: _both("64x64", SM90), loads=8, stores=4, variant=True),
    Case("32x256", lambda: _both("32x256", "cusparselt_sm80"), loads=8, stores=4),
]
