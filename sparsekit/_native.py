"""Finds and loads the compiled extension.

``SPARSEKIT_NATIVE=1`` makes a missing extension an error, ``0`` never loads it, unset loads it if it is there.
"""

import os
from pathlib import Path

import torch


def load() -> str:
    """Loads the extension once; returns ``"loaded"``, or the reason why plain PyTorch answers instead."""
    wanted = os.environ.get("SPARSEKIT_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise ImportError(f"SPARSEKIT_NATIVE must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return "switched off by SPARSEKIT_NATIVE=0"
    built = sorted(Path(__file__).parent.glob("_C.*"))
    if not built:
        reason = "not built"
    else:
        try:
            torch.ops.load_library(str(built[0]))
            return "loaded"
        except OSError as error:
            reason = f"built for another torch than {torch.__version__}: {error}"
    if wanted == "1":
        raise ImportError(
            f"SPARSEKIT_NATIVE=1, but the compiled extension is {reason}. "
            "Rebuild it with `pip install --no-build-isolation -e .`"
        )
    return reason
