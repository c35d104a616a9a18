"""The machine: what it is, and what it can do at most."""

import platform
import shutil
import subprocess
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import sparsekit
from sparsekit.ops import simd_level

from .checks import check_same
from .clock import Contenders
from .lab import Lab
from .rows import Row, Rows

CLOCKS = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"


def machine(lab: Lab, rows: Rows) -> None:
    """Writes the device with its versions, the bandwidth of a copy and the rate of the largest dense product."""
    tasks = {"device": device, "copy": copy_large, "copies of a weight": copy_weights}
    tasks |= {f"product {size}": partial(product, size=size) for size in lab.sizes.product}
    rows.for_each(tasks | {"clocks": lambda lab: {"name": "clocks after", **clocks()}}, lambda task: task(lab))


def device(lab: Lab) -> Row:
    properties: Any = torch.cuda.get_device_properties(lab.device)
    return {
        "name": "device",
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "layout": lab.layout,
        "torch": torch.__version__,
        "triton": version("triton"),
        "sparsekit": sparsekit.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cusparselt": str(torch.backends.cusparselt.version()),
        "CPU kernels": simd_level(),
        "python": platform.python_version(),
        **clocks(),
    }


def clocks() -> dict[str, str]:
    """Returns clocks, power and temperature at this moment, as nvidia-smi names them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"nvidia-smi": "not found"}
    query = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return dict(zip(CLOCKS.split(","), (field.strip() for field in done.stdout.split(",")), strict=False))


def copy_large(lab: Lab) -> Row:
    """Check 5: what memory allows, by copies that count the bytes read and written."""
    large = torch.randint(-128, 127, (lab.sizes.copy_bytes,), dtype=torch.int8, device=lab.device)
    target = torch.empty_like(large)
    target.copy_(large)
    check_same(target, large)
    return _copied(lab, "copy", large.nbytes, {"copy_": [lambda: target.copy_(large)], "clone": [large.clone]})


def copy_weights(lab: Lab) -> Row:
    shape = lab.sizes.memory[0]
    pairs = lab.sets(lambda: (lab.randn(*shape), lab.randn(*shape)), 4 * shape[0] * shape[1])
    copies = {"copy_": [partial(to.copy_, of) for to, of in pairs], "clone": [of.clone for _, of in pairs]}
    return _copied(lab, f"copy {shape[0]}x{shape[1]} bf16", pairs[0][0].nbytes, copies)


def _copied(lab: Lab, name: str, nbytes: int, calls: Contenders) -> Row:
    seconds = lab.clock.time_interleaved(calls, capture=True).seconds()
    rates = {key: 2 * nbytes / each / 1e9 for key, each in seconds.items()}
    return {"name": name, "bytes": nbytes, "seconds": seconds, "GB/s": rates}


def product(lab: Lab, size: int) -> Row:
    """Times a large dense bf16 product, on random data."""
    left, right = lab.randn(size, size), lab.randn(size, size)
    seconds = lab.clock.time_interleaved({"matmul": [lambda: left @ right] * 2}, 0.5).seconds()["matmul"]
    return {"name": "product", "size": size, "seconds": seconds, "TFLOP/s": 2 * size**3 / seconds / 1e12}
