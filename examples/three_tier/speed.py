"""Times the pruned model, compressed, against dense."""

import copy
import random
import statistics
import time

import torch
from torch import nn
from tqdm import tqdm

import sparsekit as sk

COUNTS = (1, 128)  # tokens in a forward pass, as when a model writes a text and when it reads one


@torch.no_grad()
def compress_and_time(model: nn.Module, vocabulary: int, seconds: float) -> tuple[nn.Module, dict[str, float]]:
    """Compresses a copy for each number of tokens, prints what was swapped and why, and times it against dense.

    Returns the model compressed for the last number, and how many times as fast as dense it is at each.
    """
    ratios = {}
    for count in COUNTS:
        tokens = torch.randint(vocabulary, (1, count), device=next(model.parameters()).device)
        compressed = copy.deepcopy(model)
        report = sk.compress_(
            compressed,
            tokens,
            measure=sk.Measure(budget=seconds),
            progress=lambda kinds: tqdm(kinds, "measure layers", leave=False, disable=None),
        )
        taken = _medians({"dense": model, "compressed": compressed}, tokens, seconds)
        ratios[f"{count} tokens"] = taken["dense"] / taken["compressed"]
        print(f"\nat {count} tokens a pass: {_summary(report)}")
        for name, took in taken.items():
            print(f"  {name:10} {count / took:10,.0f} tokens/s")
    return compressed, ratios


def _summary(report: sk.CompressReport) -> str:
    """Says how many layers became what, and if none was swapped, why the first one was not."""
    now = [layer.decision for layer in report.layers]
    parts = [f"{now.count(decision)} {decision}" for decision in dict.fromkeys(now)]
    size = f"{report.bytes_before / 2**20:.2f} MiB, now {report.bytes_after / 2**20:.2f} MiB"
    why = "" if report.swapped else f" ({report.layers[0].reason})"
    return f"{len(now)} linear layers: {', '.join(parts)}{why}; {size}"


def _medians(models: dict[str, nn.Module], tokens: torch.Tensor, seconds: float) -> dict[str, float]:
    """Returns the median seconds of a forward pass of each model; models take random turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + seconds
    while len(times["dense"]) < 7 or time.perf_counter() < end:
        for name in random.sample(list(models), len(models)):
            begin = time.perf_counter()
            logits = models[name](tokens).logits
            logits[0, -1, 0].item()  # waits for a GPU
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}
