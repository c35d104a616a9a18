import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.nn import Int8Linear, QuantizedLinear24

from .rivals.libraries import Missing, onnx_runtime
from .shapes import BERT_DOWN, BERT_UP, SQUARE, UP, name
from .timing import Calls

GOALS = {"int8": 1.3, "int4": 1.7}  # over the fastest dense int8, for 1 to 4 tokens and layers larger than the L2 cache
ERRORS = {"int8": 0.02, "int4": 0.2}
DENSE_ERROR = 0.03
PAUSE = 0.06  # seconds, in which the threads of ONNX Runtime end to spin
CASES = [
    (shape, quant_type, tokens)
    for shape in (SQUARE, UP, BERT_UP, BERT_DOWN)
    for quant_type in GOALS
    for tokens in (1, 2, 4, 8, 16, 128)
]


def dense_int8_calls(linear: nn.Linear, x: Tensor) -> Calls:
    """Returns every dense product with 8-bit weights that there is here: PyTorch's, ours on it, ONNX Runtime's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
    dense = Int8Linear.from_linear(linear)
    calls: Calls = {"torch int8": lambda: dynamic(x), "Int8Linear": lambda: dense(x)}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = nn.Sequential(linear), {len(x): x}
            session = onnx_runtime(model, inputs, torch.get_num_threads(), Path(folder), quantize={}).calls[len(x)]
        calls["ONNX Runtime int8"] = lambda: session(x)
    except (ImportError, Missing):
        pass
    return calls


@pytest.mark.parametrize(
    "shape, quant_type, tokens", CASES, ids=lambda value: name(value) if type(value) is tuple else value
)
def bench_linear24q(record, shape, quant_type, tokens):
    linear = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    sk.nm_prune_(linear.weight, 2, 4)
    x = torch.randn(tokens, shape[1])
    layer = QuantizedLinear24.from_linear(linear, quant_type=quant_type)
    dense, expected = dense_int8_calls(linear, x), F.linear(x, linear.weight, linear.bias)
    for call, bound in ((lambda: layer(x), ERRORS[quant_type]), *((call, DENSE_ERROR) for call in dense.values())):
        assert (call() - expected).norm() <= bound * expected.norm()
    row = {
        "op": f"linear24q {quant_type}",
        "shape": name(shape),
        "dtype": "fp32",
        "tokens": tokens,
        "goal": {"best dense": GOALS[quant_type]} if tokens <= 4 and shape in (SQUARE, UP) else {},
        "flops": 2 * tokens * shape[0] * shape[1],
    }
    moved = sum(tensor.nbytes for tensor in layer.resident_tensors())
    calls: Calls = {"F.linear": lambda: F.linear(x, linear.weight, linear.bias), **dense}
    record(row, lambda: layer(x), calls, bytes_moved=moved, best=dense, pause=PAUSE)
