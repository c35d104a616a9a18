"""The rivals: each prepares a model, and returns the calls that run it."""

import copy
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekit as sk

Call = Callable[[Tensor], Tensor]
Inputs = dict[int, Tensor]  # by the number of tokens


class Missing(Exception):
    """The reason why a rival cannot run here."""


@dataclass
class Ready:
    """The calls that run a model, by the number of tokens, and what it took to make them."""

    calls: dict[int, Call]
    seconds: float  # to convert the model, for one number of tokens if each has a conversion of its own
    load: float | None = None  # to make a session of the converted file, where there is a file


@dataclass(frozen=True)
class Rival:
    """A way to run a model.

    ``prepare`` takes the model, the inputs, the number of threads, and a folder for converted files. ``kind`` is what
    the weights are stored in, "fp32", "int8" or "int4"; ``packages`` are those that it needs.
    """

    prepare: Callable[[nn.Module, Inputs, int, Path], Ready]
    kind: str
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """Returns the version of each package.

        Raises:
            Missing: a package is not installed.
        """
        try:
            return {name: importlib.metadata.version(name) for name in self.packages}
        except importlib.metadata.PackageNotFoundError as error:
            raise Missing(f"{error.name} is not installed") from None


def plain(model: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Ready:
    return Ready(dict.fromkeys(inputs, model), 0.0)


def compiled(model: nn.Module, inputs: Inputs, threads: int, folder: Path, freeze: bool = False) -> Ready:
    """Compiles for every number of tokens; with ``freeze``, Inductor folds the weights in, laid out for oneDNN."""
    import torch._inductor.config as options

    begin, calls = time.perf_counter(), {}
    with options.patch(freezing=freeze):
        for tokens, x in inputs.items():
            torch._dynamo.reset()
            calls[tokens] = torch.compile(copy.copy(model), fullgraph=True, dynamic=False)
            calls[tokens](x)
    return Ready(calls, (time.perf_counter() - begin) / len(calls))


def dynamic_int8(model: nn.Module, inputs: Inputs, threads: int, folder: Path) -> Ready:
    from torch.ao.quantization import quantize_dynamic

    begin = time.perf_counter()
    model = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return Ready(dict.fromkeys(inputs, model), time.perf_counter() - begin)


def converted(path: Path, convert: Callable[[], None]) -> float:
    """Writes a file unless it is there from an earlier run; returns the seconds that it took then."""
    note = path.with_suffix(".seconds")
    if not note.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        convert()
        note.write_text(str(time.perf_counter() - begin))
    return float(note.read_text())


def exported(model: nn.Module, inputs: Inputs, folder: Path) -> tuple[Path, float]:
    """Writes the model as ONNX, for any number of tokens; returns the file and the seconds that it took."""
    path, x = folder / "model.onnx", inputs[max(inputs)]
    tokens = {x.dim() - 2: torch.export.Dim("tokens", min=1, max=4096)}
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": (tokens,)}
    return path, converted(path, lambda: torch.onnx.export(model, (x,), path, verbose=False, **options))


def onnx_runtime(
    model: nn.Module, inputs: Inputs, threads: int, folder: Path, quantize: dict[str, Any] | None = None
) -> Ready:
    """Runs the exported model, after ``quantize_dynamic`` with those options if there are any."""
    import onnxruntime

    path, seconds = exported(model, inputs, folder)
    if quantize is not None:
        from onnxruntime.quantization import quantize_dynamic

        source, path = path, folder / f"int8{''.join(quantize)}.onnx"
        seconds += converted(path, lambda: quantize_dynamic(source, path, **quantize))
    begin, options = time.perf_counter(), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return Ready(dict.fromkeys(inputs, run), seconds, time.perf_counter() - begin)


def openvino(
    model: nn.Module,
    inputs: Inputs,
    threads: int,
    folder: Path,
    quantize: Callable[[Any, Inputs], Any] = lambda network, inputs: network,
) -> Ready:
    """Runs the exported model, for latency, after ``quantize``."""
    import openvino as ov

    source, seconds = exported(model, inputs, folder)
    path = folder / f"{quantize.__name__.strip('<>')}.xml"
    core = ov.Core()
    seconds += converted(path, lambda: ov.save_model(quantize(core.read_model(source), inputs), path, False))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    begin = time.perf_counter()
    request = core.compile_model(path, "CPU", options).create_infer_request()
    # OpenVINO 2026.4 has a relative error of 0.84 in the encoder at 16 tokens if its first pass had a single token.
    request.infer([inputs[max(inputs)].numpy()])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])

    return Ready(dict.fromkeys(inputs, run), seconds, time.perf_counter() - begin)


def int8_weights(network: Any, inputs: Inputs) -> Any:
    """Stores the weights as int8, one scale per row; OpenVINO may quantize the activations as it runs."""
    import nncf

    return nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM)


def calibrated_int8(network: Any, inputs: Inputs) -> Any:
    """Quantizes weights and activations to int8, with fixed ranges that the inputs themselves calibrate."""
    import nncf

    data = nncf.Dataset([x.numpy() for x in inputs.values()])
    return nncf.quantize(network, data, model_type=nncf.ModelType.TRANSFORMER)


def compressed(model: nn.Module, inputs: Inputs, threads: int, folder: Path, precision: str | None = None) -> Ready:
    """Compresses the model for each number of tokens by itself."""
    begin, calls = time.perf_counter(), {}
    for tokens, x in inputs.items():
        calls[tokens] = copy.deepcopy(model)
        sk.compress_(calls[tokens], [x], precision=precision)
    return Ready(calls, (time.perf_counter() - begin) / len(calls))


_TORCH, _ONNX, _OPENVINO = ("torch",), ("onnxscript", "onnxruntime"), ("onnxscript", "openvino")
RIVALS = {
    "torch": Rival(plain, "fp32", _TORCH),
    "torch.compile": Rival(compiled, "fp32", _TORCH),
    "torch.compile, frozen": Rival(partial(compiled, freeze=True), "fp32", _TORCH),
    "ONNX Runtime": Rival(onnx_runtime, "fp32", _ONNX),
    "OpenVINO": Rival(openvino, "fp32", _OPENVINO),
    "sparsekit": Rival(compressed, "fp32", _TORCH),
    "torch int8": Rival(dynamic_int8, "int8", _TORCH),
    "ONNX Runtime int8": Rival(partial(onnx_runtime, quantize={}), "int8", _ONNX),
    "ONNX Runtime int8, 7 bits": Rival(partial(onnx_runtime, quantize={"reduce_range": True}), "int8", _ONNX),
    "OpenVINO int8 weights": Rival(partial(openvino, quantize=int8_weights), "int8", (*_OPENVINO, "nncf")),
    "OpenVINO int8, calibrated": Rival(partial(openvino, quantize=calibrated_int8), "int8", (*_OPENVINO, "nncf")),
    "sparsekit int8": Rival(partial(compressed, precision="int8"), "int8", _TORCH),
    "sparsekit int4": Rival(partial(compressed, precision="int4"), "int4", _TORCH),
}
