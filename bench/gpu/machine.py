"""Facts and limits of the machine: versions, clocks, the rate of a copy and of the largest dense product."""

import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

import sparsekit
from bench.timing import medians
from sparsekit.ops import simd_level

from .checks import check_same
from .lab import Lab
from .rows import Row, Rows

CLOCKS = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"


def machine(lab: Lab, rows: Rows) -> None:
    """Writes the device with its versions, the bandwidth of a copy and the rate of the largest dense product."""
    tasks = {"device": device, "copy": copy_large, "copies of a weight": copy_weights}
    tasks |= {f"product {size}": partial(product, size=size) for size in lab.sizes.product}
    rows.for_each(tasks | {"clocks": lambda lab: {"name": "clocks after", **clocks()}}, lambda task: task(lab))


def device(lab: Lab) -> Row:
    found = torch.cuda.get_device_properties(lab.device)
    facts = ("major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    row = {"name": "device", "device": found.name, "layout": lab.layout, "CPU kernels": simd_level(), **clocks()}
    row |= {fact: getattr(found, fact) for fact in facts} | {"cuda": torch.version.cuda or torch.version.hip}
    row |= {"cusparselt": str(torch.backends.cusparselt.version()), "python": platform.python_version()}
    triton = import_module("triton").__version__ if find_spec("triton") else "not installed"
    return row | {"torch": torch.__version__, "triton": triton, "sparsekit": sparsekit.__version__}


def clocks() -> dict[str, str]:
    """Returns the present clocks, power and temperature, by the names of nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {"nvidia-smi": "not found"}
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    return dict(zip(CLOCKS.split(","), map(str.strip, said.split(",")), strict=False))


def copy_large(lab: Lab) -> Row:
    """Measures the bandwidth of memory (check 5) by a large copy, counting the bytes read and written."""
    large = torch.randint(-128, 127, (lab.sizes.copy_bytes,), dtype=torch.int8, device=lab.device)
    return copies(lab, "copy", [(torch.empty_like(large), large)])


def copy_weights(lab: Lab) -> Row:
    shape = lab.sizes.memory[0]
    pairs = lab.sets(lambda: (lab.randn(*shape), lab.randn(*shape)), 4 * shape[0] * shape[1])
    return copies(lab, f"copy {shape[0]}x{shape[1]} bf16", pairs)


def copies(lab: Lab, name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Row:
    calls = {"copy_": [partial(to.copy_, of) for to, of in pairs], "clone": [of.clone for _, of in pairs]}
    seconds, (to, of) = medians(lab.clock.time_in_turns(calls, capture=True).device), pairs[0]
    check_same(to, of)
    rates = {key: 2 * of.nbytes / each / 1e9 for key, each in seconds.items()}
    return {"name": name, "bytes": of.nbytes, "seconds": seconds, "GB/s": rates}


def product(lab: Lab, size: int) -> Row:
    """Times a large dense bf16 product, on random data."""
    left, right = lab.randn(size, size), lab.randn(size, size)
    times = lab.clock.time_in_turns({"matmul": [lambda: left @ right] * 2}, 0.5)
    seconds = statistics.median(times.device["matmul"])
    return {"name": "product", "size": size, "seconds": seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}
