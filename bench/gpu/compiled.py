"""What torch.compile makes of plain operations: the other baselines of the mask and of the dense product."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.shapes import name
from bench.usual import rank_mask24
from sparsekit.ops.nm import nm_mask_reference

from .lab import Lab, check_same
from .linear import DENSE, check_close
from .log import Log

TOKENS = (1, 16, 1024)


def measure(lab: Lab, log: Log) -> None:
    """Races the 2:4 mask against a compiled rank by comparisons, and cuBLAS against a tuned compiled product."""
    with log.guard("rank by comparisons"):
        log.write(**mask(lab))
    for what, tokens in log.each({f"F.linear, {tokens} tokens": tokens for tokens in TOKENS}):
        with log.guard(what):
            log.write(**product(lab, tokens))


def mask(lab: Lab) -> dict[str, Any]:
    shape = lab.sizes.masks[0]
    scores = lab.sets(lambda: lab.randn(*shape), 2 * shape[0] * shape[1])
    ranked, own = torch.compile(rank_mask24, backend=lab.backend, dynamic=False), lab.op("nm_mask")
    check_same(ranked(scores[0]), nm_mask_reference(scores[0], 2, 4))
    raced = lab.clock.race(
        {"own": [partial(own, score, 2, 4) for score in scores], "compiled": [partial(ranked, each) for each in scores]}
    )
    return {"name": "nm_mask 2:4", "shape": name(shape), "seconds": raced.seconds(), "ratios": raced.ratios("own")}


def product(lab: Lab, tokens: int) -> dict[str, Any]:
    shape = lab.sizes.linear[0]
    weights = lab.sets(lambda: lab.randn(*shape) / shape[1] ** 0.5, 2 * shape[0] * shape[1])
    x = lab.randn(tokens, shape[1])
    options = {"mode": "max-autotune-no-cudagraphs"} if lab.backend == "inductor" else {}
    tuned = torch.compile(F.linear, backend=lab.backend, dynamic=False, **options)
    check_close(tuned(x, weights[0]), F.linear(x.float(), weights[0].float()))
    raced = lab.clock.race(
        {
            DENSE: [partial(F.linear, x, weight) for weight in weights],
            "compiled": [partial(tuned, x, weight) for weight in weights],
        }
    )
    ratios = {"compiled": raced.ratios("compiled")[DENSE]}
    return {"op": "linear", "shape": name(shape), "dtype": "bf16", "tokens": tokens, "ratios": ratios} | {
        "seconds": raced.seconds(),
        "host": raced.host_seconds(),
    }
