"""Quantizes the layers of a model to 4 or 8 bits."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from .._layers import Where, check_model, is_transposed, output_head
from .._table import table_lines
from .._undo import Undo, change
from ..compress.candidates import inference_only_reason, not_24_reason
from ..compress.lossy import not_finite_reason
from ..compress.sites import LayerSite, find_sites
from ..compress.swap import Swap
from ..nn import Compressed, Nf4Linear, QuantizedLinear24
from ..nn.quantized24 import Inputs
from ..ops.nf4 import quantized_rightly

Form = Literal["nf4", "2:4 nf4", "2:4 int4", "2:4 int8"]
FEWEST_ROWS = 32  # a layer with fewer outputs, such as a classifier or a gate, is small and decides much


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer that ``quantize_`` quantized.

    Args:
        name: the name of the layer.
        form: what it became.
        error: the change of its weight relative to the weight, both as Frobenius norms.
        bytes_before: the bytes of its weight.
        bytes_after: the bytes that it stores instead, without the bias.
    """

    name: str
    form: Form
    error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport:
    """The result of ``quantize_``; ``str(report)`` is a table.

    Args:
        layers: the quantized layers, in the order of the model.
        skipped: why each of the others stayed what it is, by name.
    """

    layers: tuple[QuantizedLayer, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [["layer", "error", "smaller", "form"]]
        rows += [
            [each.name, f"{each.error:.2%}", f"{each.bytes_before / each.bytes_after:.2f}x", each.form]
            for each in self.layers
        ]
        rows += [[name, "", "", f"skipped: {reason}"] for name, reason in self.skipped.items()]
        return "\n".join(table_lines(rows, "<>><"))


def quantize_(
    model: nn.Module, form: Form = "nf4", *, where: Where | None = None, inputs: Inputs = "float"
) -> QuantizeReport:
    """Quantizes linear layers in place, each to the nearest values that a form can store, and returns a report.

    ``"nf4"`` makes any layer an ``Nf4Linear``, with the bytes that bitsandbytes stores: an eighth of float32. It saves
    memory and files, and costs time: the weight is rebuilt at every call. The ``"2:4"`` forms are for layers that are
    2:4, as after ``prune_``, and make them a ``QuantizedLinear24``, which the kernels multiply without rebuilding
    anything: with values of 4 bits it is smaller than nf4, and faster than dense. Prune first, then quantize: zeros
    stay exactly zero in every form. ``compress_(precision="int4")`` chooses forms by measuring, and checks the outputs.

    ``decompress_`` turns the layers back into dense ones, with the rounded weights.

    Args:
        model: any module; layers that are tied, computed from others or compressed stay as they are.
        form: ``"nf4"``, or ``"2:4 nf4"``, ``"2:4 int4"`` or ``"2:4 int8"``, the form of the kept values.
        where: ``where(name, module)`` selects the layers. None selects all but the output head of a language model and
            layers with fewer than 32 outputs, such as a classifier.
        inputs: ``"int8"`` makes the 2:4 forms round every token of their inputs to 8 bits as well, which is the fastest
            on a CPU and changes more.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such form or no such ``inputs``, or no layer could be quantized; the model is unchanged.
        RuntimeError: the model is being changed already, here or in another thread.
    """
    check_model(model)
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
    if inputs not in get_args(Inputs):
        raise ValueError(f"inputs must be one of {get_args(Inputs)}, got {inputs!r}")

    @torch.inference_mode(False)
    @torch.no_grad()
    def work(undo: Undo) -> QuantizeReport:
        sites = {site.name: site for site in find_sites(model, where)}
        reasons = {name: _reason(model, site, form, where is None) for name, site in sites.items()}
        chosen = {name: site for name, site in sites.items() if reasons[name] is None}
        if not chosen:
            name = next(iter(reasons), None)
            why = f", for one {name!r}: {reasons[name]}" if name is not None else " is there"
            raise ValueError(f"no layer of the model can be quantized to {form!r}{why}")
        swap = Swap(model, chosen)
        undo.callback(swap.undo)
        modules, layers = dict[str, Compressed](), []
        for name, site in chosen.items():
            modules[name] = _quantized(site.layer, form, inputs)
            layers.append(_report(name, form, site.layer, modules[name]))
        swap.commit(modules)
        return QuantizeReport(tuple(layers), {name: reason for name, reason in reasons.items() if reason is not None})

    return change(model, "quantized", work)


def fits_bitsandbytes(name: str, module: nn.Module) -> bool:
    """Returns whether bitsandbytes computes a layer rightly on every CPU: for ``where`` of ``quantize_``.

    bitsandbytes 0.50.2 refuses a layer whose outputs are no multiple of 32 on a CPU with AVX-512 BF16, and reads blocks
    wrongly on one with AVX-512 where the inputs are a multiple of 16, but not of 64.
    """
    return isinstance(module, nn.Linear) and quantized_rightly(module.out_features, module.in_features)


def _reason(model: nn.Module, site: LayerSite, form: Form, by_default: bool) -> str | None:
    """Returns why a layer is not quantized; None if it is."""
    if site.reason is not None:
        return site.reason
    if not isinstance(site.layer, nn.Linear) and not is_transposed(site.layer):
        return "only linear layers are quantized"
    if by_default and site.layer is output_head(model):
        return "it is the output head: select it by where to quantize it"
    if by_default and site.shape[0] < FEWEST_ROWS:
        return f"it has fewer than {FEWEST_ROWS} outputs: select it by where to quantize it"
    reason = inference_only_reason(site.layer) or not_finite_reason(site.layer)
    return reason or (None if form == "nf4" else not_24_reason(site.layer))


def _quantized(layer: nn.Linear, form: Form, inputs: Inputs) -> Compressed:
    transposed = is_transposed(layer)
    if form == "nf4":
        return Nf4Linear.from_linear(layer, transposed=transposed)
    kind = form.removeprefix("2:4 ")
    return QuantizedLinear24.from_linear(layer, quant_type=kind, inputs=inputs, transposed=transposed)


def _report(name: str, form: Form, layer: nn.Linear, module: Compressed) -> QuantizedLayer:
    weight = layer.weight.detach()
    error = (module.weight.float() - weight.float()).norm() / weight.float().norm().clamp(min=1e-30)
    stored = sum(tensor.nbytes for name, tensor in module.state_dict().items() if name != "bias")
    return QuantizedLayer(name, form, float(error), weight.nbytes, stored)
