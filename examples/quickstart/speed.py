"""Compresses the quickstart's models and times them against dense."""

import copy
import random
import statistics
import time

import torch
from model import logits
from show import Reports, Speeds, show_speed
from torch import nn
from tqdm import tqdm

import sparsekit as sk
from sparsekit.nn import PrepackedLinear


@torch.no_grad()
def tokens_per_second(models: dict[str, nn.Module], count: int, vocabulary: int, seconds: float) -> dict[str, float]:
    """Returns the tokens per second of each model, by the median time of a forward pass; models take random turns."""
    x = torch.randint(vocabulary, (1, count))
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        logits(model, x)  # warms up
    end = time.perf_counter() + seconds
    with tqdm(desc=f"time {count} tokens", leave=False, disable=None, bar_format="{desc}: {n} rounds") as bar:
        while min(map(len, times.values())) < 7 or time.perf_counter() < end:
            for name in random.sample(list(models), len(models)):  # so that no model always runs after the same one
                begin = time.perf_counter()
                logits(models[name], x)
                times[name].append(time.perf_counter() - begin)
            bar.update()
    return {name: count / statistics.median(taken) for name, taken in times.items()}


def prepack_all(model: nn.Module) -> nn.Module:
    """Returns the fastest dense model on a CPU: a copy in which oneDNN has reordered the weights of linear layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PrepackedLinear.from_linear(module))
    return model


def compress_and_time(
    dense: nn.Module, sparse: nn.Module, vocabulary: int, counts: tuple[int, ...], seconds: float, budget: float
) -> tuple[nn.Module, Reports, Speeds]:
    """Compresses a copy of a sparse model for each token count, and times it against dense.

    Returns the model compressed for the last token count, and the reports and speeds by token count.
    """
    models = {"plain dense": dense, "best dense": prepack_all(dense)}
    reports, speeds = {}, {}
    for count in counts:
        models["sparsekit"] = copy.deepcopy(sparse)
        reports[count] = sk.compress_(
            models["sparsekit"],
            torch.randint(vocabulary, (1, count)),
            measure=sk.Measure(budget=budget),
            progress=lambda kinds: tqdm(kinds, "measure layers", leave=False, disable=None),
        )
        speeds[count] = tokens_per_second(models, count, vocabulary, seconds)
        print(f"{reports[count]}\n")
    show_speed(speeds)
    return models["sparsekit"], reports, speeds
