"""Times the layers that `compress_` makes on this GPU against dense ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit as sk
from bench.shapes import by_name, name

from .goals import MODES, NEVER_SLOWER
from .lab import Lab, Shape
from .products import DENSE, compare, rows_at_tokens
from .rows import Row, Rows


def compress(lab: Lab, rows: Rows) -> None:
    """Compresses layers for all token counts at once, then times them at each."""

    def at_shape(shape: Shape) -> None:
        plain = layers(lab, shape)
        batches = [lab.randn(tokens, shape[1]) for tokens in lab.sizes.tokens]
        for mode, graphs in MODES.items():
            with rows.guard(f"{mode} {name(shape)}"):
                model = layers(lab, shape)
                model.load_state_dict(plain.state_dict())
                measure = sk.Measure(budget=lab.sizes.compress_seconds, graphs=graphs)
                report = sk.compress_(model, batches, forward=_call_all, keep_dense=True, measure=measure)
                rows.write(said=f"{mode}: {name(shape)} became {model[0]!r}", report=str(report).splitlines())
                layer = report.layers[0]

                def one(x: Tensor, mode: str = mode, model: nn.ModuleList = model, layer=layer) -> Row:
                    forms = {DENSE: list(plain), mode: list(model)}
                    right = F.linear(x.float(), plain[0].weight.float(), plain[0].bias.float())
                    row = compare(lab, forms, x, right, eager=not MODES[mode])
                    return row | {"goal": {mode: NEVER_SLOWER}, "choice": layer.kernels.get(len(x), layer.decision)}

                rows_at_tokens(lab, rows, shape, lab.sizes.tokens, one)

    rows.for_each(by_name(lab.sizes.linear), at_shape)


def layers(lab: Lab, shape: Shape) -> nn.ModuleList:
    """Makes so many 2:4 layers that they do not fit into the cache."""

    def make() -> nn.Module:
        layer = nn.Linear(shape[1], shape[0], device=lab.device, dtype=torch.bfloat16)
        sk.nm_prune_(layer.weight.detach(), 2, 4)
        return layer.requires_grad_(False)

    return nn.ModuleList(lab.sets(make, 2 * shape[0] * shape[1])).eval()


def _call_all(model: nn.Module, x: Tensor) -> object:
    return [layer(x) for layer in model.children()]
