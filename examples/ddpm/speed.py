"""Times a pass of a UNet: dense, dense in the fastest form, and pruned and compressed."""

import copy
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk


def compress_and_time(
    dense: nn.Module, pruned: nn.Module, inputs: dict[str, Tensor | None], seconds: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Compresses copies of a dense and of a pruned model and times both beside the dense one.

    The best dense model is what ``compress_`` makes of the dense one, so that what sparsity gains can be told from what
    other forms of dense layers do. Models take random turns for the given time.

    Returns:
        The compressed pruned model, or with plain layers again if it was not faster; and the median milliseconds of a
        pass, how many times faster than dense each model is by the median of paired turns, the forms of the layers, and
        the bytes of the weights.
    """
    models = {"dense": dense, "best dense": copy.deepcopy(dense), "pruned": copy.deepcopy(pruned)}
    found: dict[str, Any] = {"images": len(inputs["sample"]), "forms": {}, "bytes": {}}
    for name in ("best dense", "pruned"):
        report = sk.compress_(
            models[name], [inputs], progress=lambda kinds: tqdm(kinds, "measure layers", leave=False, disable=None)
        )
        forms = [layer.decision for layer in report.layers]
        found["forms"][name] = {form: forms.count(form) for form in sorted(set(forms))}
        found["bytes"]["dense"], found["bytes"][name] = report.bytes_before, report.bytes_after
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for model in models.values():
            model(**inputs)  # warms up
        end = time.perf_counter() + seconds
        while len(times["dense"]) < 7 or time.perf_counter() < end:
            for name in random.sample(list(models), len(models)):  # so that none always runs after the same one
                begin = time.perf_counter()
                models[name](**inputs)
                times[name].append(time.perf_counter() - begin)
    found["milliseconds"] = {name: 1000 * statistics.median(each) for name, each in times.items()}
    found["times_faster"] = {
        name: statistics.median(plain / own for plain, own in zip(times["dense"], each, strict=True))
        for name, each in times.items()
    }
    if found["times_faster"]["pruned"] < 1:
        sk.decompress_(models["pruned"])
    return models["pruned"], found | {"given_back": found["times_faster"]["pruned"] < 1}
