"""Times compressed models and their layers against dense ones, with the clocks of ``compress_``, after a check."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import _timing
from .._batches import Progress, layer_input
from .._layers import input_dim, is_transposed, shared_weight_reasons
from .._timing import Timing, clock
from ..compress import tune
from ..compress.candidates import Prepacked
from ..compress.sites import must_stay_reason
from ..compress.sizes import at_size
from ..nn import Compressed, CompressedLinear, PrepackedLinear, TieredLinear
from .errors import UsageError
from .models import longest, output_of

# Of the largest logit. Many layers round one after the other, so this is looser than what each layer is held to.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_tokens(model: Any, counts: Sequence[int]) -> None:
    """Rejects counts that no pass of the model can have.

    Raises:
        UsageError: the model reads no tokens, or a count is not positive, or more than it reads.
    """
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise UsageError(f"a model that reads tokens is needed, {type(model).__name__} does not")
    most = longest(model)
    if not counts or min(counts) < 1 or (most is not None and max(counts) > most):
        limit = "at least 1" if most is None else f"from 1 to {most}"
        raise UsageError(f"--tokens must be {limit}, got {' '.join(map(str, counts)) or 'none'}")


def random_tokens(model: Any, count: int) -> Tensor:
    """Returns random token ids ``[1, count]``, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(len(model.get_input_embeddings().weight), (1, count), generator=generator).to(model.device)


@torch.no_grad()
def check_same(model: nn.Module, expected: Tensor, tokens: Tensor, what: str) -> None:
    """Rejects a model that computes something else than the dense one.

    With lossy layers it may, so then every compressed layer is held to what it should compute, given the inputs that it
    has in the model.

    Raises:
        RuntimeError: its outputs, or those of a layer, differ by more than rounding.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Compressed)}
    if not any(layer.lossy for layer in layers.values()):
        _check_close(output_of(model, tokens), expected, f"the {what} model")
        return

    def check(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            _check_close(output, layer.reference(layer_input(args, kwargs)), f"{name} of the {what} model")

        return hook

    handles = [layer.register_forward_hook(check(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        output_of(model, tokens)
    finally:
        for handle in handles:
            handle.remove()


def _check_close(actual: Tensor, expected: Tensor, what: str) -> None:
    off = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))
    if not off <= TOLERANCE[actual.dtype]:
        raise RuntimeError(f"{what} computes something else: off by {off:.2g} of the largest output")


def prepacked(model: nn.Module, tokens: int) -> nn.Module | None:
    """Returns a copy with prepacked layers, often the fastest dense model on a CPU; None if no layer can be one."""
    candidate = Prepacked()
    shared = shared_weight_reasons(model)
    layers = [
        name
        for name, layer in model.named_modules()
        if input_dim(layer) is not None
        and not isinstance(layer, nn.Conv2d)
        and (layer, "weight") not in shared
        and not (must_stay_reason(layer) or candidate.unsupported_reason(layer))
    ]
    if not layers:
        return None
    model = copy.deepcopy(model)
    for name in layers:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, PrepackedLinear.from_linear(layer, tokens=tokens, transposed=is_transposed(layer)))
    return model


@torch.no_grad()
def model_speeds(models: Mapping[str, nn.Module], tokens: Tensor, budget: float) -> dict[str, Timing]:
    """Times every model in turns with the one named ``"plain"``, on the same tokens.

    A model that is given under two names is timed once.

    Raises:
        RuntimeError: a model computes something else than the plain one.
    """
    plain = models["plain"]
    expected = output_of(plain, tokens)
    for name, model in models.items():
        check_same(model, expected, tokens, name)

    def run(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: output_of(model, x)

    timer = clock(tokens.device, evict_cache=False)  # a model finds in the cache what its own size leaves there
    first: dict[int, str] = {}
    for name, model in models.items():
        first.setdefault(id(model), name)
    taken = _timing.time_interleaved({name: run(models[name]) for name in first.values()}, tokens, timer, budget)
    times = {name: taken[first[id(model)]] for name, model in models.items()}
    dense = min(times.keys() - {"compressed"}, key=lambda name: statistics.median(times[name]))
    return {name: _timing.paired_timing(taken, times["plain"], times[dense]) for name, taken in times.items()}


def layer_speeds(
    model: nn.Module, counts: Sequence[int], *, evict_cache: bool, budget: float, progress: Progress
) -> list[dict[str, Any]]:
    """Times one layer of every kind of compressed layer against the dense layer that it replaces."""
    kinds: dict[tuple[Any, ...], list[tuple[str, Any]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            kind = type(layer).__name__, layer.out_features, layer.in_features, layer.bias is not None
            kinds.setdefault((*kind, *_tiers(layer)), []).append((name, layer))
    found = []
    for (kind, rows, cols, *_), members in progress(list(kinds.items())):
        layer = members[0][1]
        plain = layer.to_linear().eval()
        calls = {"compressed": layer}
        if not layer.sparse:
            best = "compressed"  # which is what the best dense is
        elif (dense := prepacked(nn.Sequential(plain), max(counts))) is not None:
            best = "prepacked"
            calls["prepacked"] = dense[0]  # type: ignore[index]
        else:
            best = "plain"
        weight, timings = plain.weight, {}
        for count in counts:
            x = torch.randn(count, cols, dtype=torch.float32, device=weight.device).to(weight.dtype)
            timer = clock(weight.device, evict_cache=evict_cache)
            measured = tune.measure(calls, plain, x, dense=(best,), clock=timer, budget=budget)["compressed"]
            if measured is None:
                raise RuntimeError(f"{members[0][0]} computes something else than its dense layer {at_size(count)}")
            timings[count] = asdict(measured)
        found.append({"kind": kind, "shape": [rows, cols], "layers": [name for name, _ in members], "timings": timings})
    return found


def _tiers(layer: nn.Module) -> tuple[Any, ...]:
    """Returns what the time of a tiered layer depends on besides its shape; nothing for another layer.

    Tiered layers are of the same kind if the shares of their tiers agree to a twentieth.
    """
    if not isinstance(layer, TieredLinear):
        return ()
    dense, middle = (len(part) / max(layer.tiers.numel(), 1) for part in (layer.dense, layer.values))
    return layer.block, layer.k, round(20 * dense), round(20 * middle)
