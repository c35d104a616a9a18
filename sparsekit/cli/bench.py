"""``sparsekit bench``: tokens per second, dense against compressed."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from .. import decompress_
from .._files import try_folder
from .._json import write_json
from .._timing import PARITY_RATIO, Timing, cache_bytes
from ..checkpoint.pretrained import described
from ..compress.cache import machine
from ..nn import Compressed
from . import terminal
from .compress import compressed
from .errors import check_positive
from .folders import BENCH_REPORT, COMPRESSED, check_folder
from .models import device_of, load_dense, load_packed, without_cache
from .page import write_page
from .speed import check_tokens, layer_speeds, model_speeds, prepacked, random_tokens


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a compressed model against dense: whole forward passes, then every kind of compressed layer.

    Times compressed.safetensors where the folder has one (on a CPU), else what compress makes of the model here.
    Results are checked first; models take turns, and medians are compared, also with the best dense there is (on a CPU
    often all layers prepacked by oneDNN).

    Args:
        folder: a transformers folder, or one that prune or compress wrote.
        tokens: tokens in a forward pass.
        seconds: how long whole models are timed at one number of tokens.
        budget: seconds to measure one shape at one number of tokens.
        device: auto is the GPU where there is one.
        report: write report.html into the folder, and what was measured to bench.json.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    tokens: tuple[int, ...] = (1, 16, 128)
    seconds: float = 3.0
    budget: float = 0.5
    device: str = "auto"
    report: bool = False
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        check_positive(seconds=self.seconds, budget=self.budget)
        models = self.models()
        with without_cache(models["plain"]), without_cache(models["compressed"]):
            whole = {}
            for count in terminal.progress("time models")(self.tokens):
                whole[count] = model_speeds(models, random_tokens(models["plain"], count), self.seconds)
            size = sum(weight.nbytes for weight in models["plain"].parameters())
            evict_cache = size > cache_bytes(next(models["plain"].parameters()).device)
            progress = terminal.progress("time layers")
            layers = layer_speeds(
                models["compressed"], self.tokens, evict_cache=evict_cache, budget=self.budget, progress=progress
            )
        found = {
            "machine": machine(device_of(self.device)),
            "models": {count: _with_rates(timings, count) for count, timings in whole.items()},
            "layers": layers,
        }
        if self.report:
            write_json(self.folder / BENCH_REPORT, found)
            write_page(self.folder)
        if self.json:
            terminal.print_json(found)
        else:
            show(found)
        return 0

    def models(self) -> dict[str, Any]:
        """Loads the plain model and the compressed one, and makes one with oneDNN's prepacked layers if any can be."""
        check_folder(self.folder)
        if self.report:
            try_folder(self.folder)
        device = device_of(self.device)
        packed = (self.folder / COMPRESSED).exists() or described(self.folder) is not None
        if packed and device.type == "cpu":
            sparse = load_packed(self.folder)
            plain = copy.deepcopy(sparse)
            decompress_(plain)
            check_tokens(plain, self.tokens)
        else:
            plain = load_dense(str(self.folder), self.device)
            check_tokens(plain, self.tokens)
            sparse = copy.deepcopy(plain)
            with without_cache(sparse):
                compressed(sparse, self.tokens, self.budget)
        dense = prepacked(plain, max(self.tokens))
        if not _forms(sparse):
            sparse = plain  # a model is not timed against one that is the same
        elif dense is not None and _forms(sparse) == _forms(dense):
            dense = sparse
        return {"plain": plain, **({} if dense is None else {"prepacked": dense}), "compressed": sparse}


def _forms(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, Compressed)}


def _with_rates(timings: Mapping[str, Timing], count: int) -> dict[str, dict[str, float]]:
    return {name: {"tokens_per_second": count / timing.seconds, **asdict(timing)} for name, timing in timings.items()}


def show(found: dict[str, Any]) -> None:
    """Prints tables of the models and the layers, and says where the compressed model is slower than dense."""
    whole = found["models"]
    names = list(next(iter(whole.values())))
    rows = [
        (
            str(count),
            *(f"{timings[name]['tokens_per_second']:,.0f}" for name in names),
            f"{timings['compressed']['ratio']:.2f}x",
            f"{timings['compressed']['best_dense']:.2f}x",
        )
        for count, timings in whole.items()
    ]
    terminal.table(("tokens a pass", *(f"{name}, tokens/s" for name in names), "over plain", "over best dense"), rows)
    if not found["layers"]:
        terminal.write("no layer is compressed: on this machine nothing was faster than dense")
        return
    slower = [
        f"{timings['compressed'][ratio]:.2f}x {name} at {count}"
        for count, timings in whole.items()
        for ratio, name in (("ratio", "plain"), ("best_dense", "the best dense"))
        if timings["compressed"][ratio] < PARITY_RATIO
    ]
    terminal.write(f"slower: {', '.join(slower)}" if slower else "slower than dense: nowhere")
    terminal.write("")
    rows = [
        (
            f"{len(layer['layers'])} of {'x'.join(map(str, layer['shape']))}",
            layer["kind"],
            *(f"{timing['ratio']:.2f}x ({timing['best_dense']:.2f}x)" for timing in layer["timings"].values()),
        )
        for layer in found["layers"]
    ]
    terminal.table(
        ("layers", "now", *(f"{count} token{'s' * (int(count) != 1)}" for count in whole)), rows, left=("now",)
    )
    terminal.write("times the plain layer (times the best dense)")
