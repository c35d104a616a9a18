"""What `compress_` makes of a layer on this GPU, how fast that is, and whether graphs and torch.compile take it."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit as sk
from bench.shapes import name

from .goals import MODES, NEVER_SLOWER
from .lab import DTYPES, Lab
from .linear import DENSE, check_close
from .log import Log

FOLDED = (1, 1024)  # tokens that graphs and torch.compile are tried with


def measure(lab: Lab, log: Log) -> None:
    """Compresses layers for all token counts at once, then times them at each, graphs them and compiles them."""
    for what, shape in log.each({name(shape): shape for shape in lab.sizes.linear}):
        with log.guard(what):
            plain = dense_layers(lab, shape)
            batches = [lab.randn(tokens, shape[1]) for tokens in lab.sizes.tokens]
            for mode, graphs in MODES.items():
                with log.guard(f"{mode} {what}"):
                    model = dense_layers(lab, shape, like=plain)
                    options = {"keep_dense": True, "graphs": graphs, "budget": lab.sizes.compress_seconds}
                    report = sk.compress_(model, batches, forward=_all, **options)
                    log.write(name=mode, shape=what, report=str(report).splitlines(), layer=repr(model[0]))
                    layer = report.layers[0]
                    for x in batches:
                        with log.guard(f"{mode} {what}, {len(x)} tokens"):
                            decision = layer.names.get(len(x), layer.decision)
                            log.write(**one(lab, plain, model, x, mode) | {"shape": what, "decision": decision})
            for tokens in FOLDED:
                x = lab.randn(tokens, shape[1])
                for key, check in {"CUDA graph": graphed, "torch.compile": compiled}.items():
                    with log.guard(f"{key}, {what}, {tokens} tokens"):
                        log.write(name=key, shape=what, tokens=tokens, works=check(lab, model[0], x))


def dense_layers(lab: Lab, shape: tuple[int, int], like: nn.ModuleList | None = None) -> nn.ModuleList:
    """2:4 layers, as many as exceed the cache."""
    rows, cols = shape
    layers = nn.ModuleList()
    for index in range(lab.clock.sets(2 * rows * cols) if like is None else len(like)):
        layer = nn.Linear(cols, rows, device=lab.device, dtype=DTYPES["bf16"])
        if like is None:
            sk.nm_prune_(layer.weight, 2, 4)
        else:
            layer.load_state_dict(like[index].state_dict())
        layers.append(layer)
    return layers.eval().requires_grad_(False)


def _all(model: nn.Module, x: Tensor) -> object:
    return [layer(x) for layer in model.children()]


def one(lab: Lab, plain: nn.ModuleList, model: nn.ModuleList, x: Tensor, mode: str) -> dict[str, Any]:
    """The row of one token count: the compressed layers against the dense ones."""
    weight, bias = plain[0].weight, plain[0].bias
    check_close(model[0](x), F.linear(x.float(), weight.float(), bias.float()))
    raced = lab.clock.race(
        {DENSE: [partial(layer, x) for layer in plain], mode: [partial(layer, x) for layer in model]}
    )
    compared = raced if MODES[mode] else raced.calls()
    return {
        "op": "linear",
        "dtype": "bf16",
        "tokens": len(x),
        "goal": {mode: NEVER_SLOWER},
        "seconds": raced.seconds(),
        "host": raced.host_seconds(),
        "ratios": {mode: compared.ratios(mode)[DENSE]},
    }


def graphed(lab: Lab, layer: nn.Module, x: Tensor) -> bool:
    """Captures a call, gives it another input and replays it."""
    if lab.device.type != "cuda":
        raise RuntimeError("a graph needs a GPU")
    held, fresh = x.clone(), torch.randn_like(x)
    layer(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(held)
    held.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    check_close(out, layer(fresh).float())  # split-K may add up in any order
    return True


def compiled(lab: Lab, layer: nn.Module, x: Tensor) -> bool:
    """Compiles the layer without a graph break."""
    check_close(torch.compile(layer, fullgraph=True, backend=lab.backend, dynamic=False)(x), layer(x).float())
    return True
