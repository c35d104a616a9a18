"""The vendor's 2:4 product at its best: every algorithm that it has, each checked before it is timed."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.shapes import name
from sparsekit.compress.gpu import ALGORITHMS, SPLITS

from .clock import Call
from .lab import Lab
from .linear import DENSE, Layer, check_close, dense, layers
from .log import Log, one_line
from .vendor import Algorithm

QUICK = 4  # buffers of the first timing
KEPT = 4  # algorithms that are raced after all were timed quickly


def measure(lab: Lab, log: Log) -> None:
    """Check 3 with the vendor's best: every algorithm, then splits of the best, each checked before it is timed."""
    for weight, shape in log.each({name(shape): shape for shape in lab.sizes.linear}):
        with log.guard(weight):
            made = layers(lab, shape)
            packed = [lab.vendor.compress(layer.dense) for layer in made]
            for what, tokens in log.each({f"{weight}, {tokens} tokens": tokens for tokens in lab.sizes.tokens}):
                with log.guard(what):
                    log.write(**best(lab, made, packed, shape, tokens))


def best(
    lab: Lab, made: Sequence[Layer], packed: Sequence[Tensor], shape: tuple[int, int], tokens: int
) -> dict[str, Any]:
    """The row of the fastest algorithms for one product."""
    x = lab.randn(tokens, shape[1])
    layer = made[0]
    expected = F.linear(x.float(), layer.dense.float(), layer.bias.float())
    own = lab.vendor.suggest(x, packed[0], layer.bias, layer.rows)
    seconds: dict[Algorithm, float] = {}
    wrong: dict[str, str] = {}

    def calls(algorithm: Algorithm) -> list[Call]:
        return [
            partial(lab.vendor.linear, x, blob, each.bias, each.rows, algorithm)
            for each, blob in zip(made, packed, strict=True)
        ]

    def attempt(algorithms: Sequence[Algorithm]) -> None:
        for algorithm in algorithms:
            try:
                check_close(calls(algorithm)[0](), expected)
                seconds[algorithm] = lab.clock.seconds(calls(algorithm)[:QUICK])
            except Exception as error:
                wrong[str(algorithm)] = one_line(error)
                lab.healthy()

    offered = [Algorithm(id_) for id_ in range(ALGORITHMS)]
    attempt(offered if own is None or own in offered else [*offered, own])
    if not seconds:
        raise ValueError(f"no algorithm is right: {next(iter(wrong.values()), 'none is offered')}")
    fastest = min(seconds, key=lambda each: seconds[each])
    attempt([Algorithm(fastest.id, *split) for split in SPLITS])
    order = sorted(seconds, key=lambda each: seconds[each])[:KEPT]
    named = {f"algorithm {each}": each for each in order}
    raced = lab.clock.race(
        {DENSE: [partial(dense(lab, each), x) for each in made], **{key: calls(each) for key, each in named.items()}}
    )
    timed = raced.seconds()
    winner = min(named, key=lambda key: timed[key])
    return {
        "op": "linear",
        "shape": name(shape),
        "dtype": "bf16",
        "tokens": tokens,
        "seconds": {DENSE: timed[DENSE], "cuSPARSELt": timed[winner]},
        "host": {"cuSPARSELt": raced.host_seconds()[winner]},
        "ratios": {"cuSPARSELt": raced.ratios(winner)[DENSE]},
        "algorithm": winner,
        "numbers": named[winner],
        "picked by the library": own and str(own),
        "next": {str(each): seconds[each] for each in order},
        "tried": len(seconds),
        "wrong": wrong,
    }
