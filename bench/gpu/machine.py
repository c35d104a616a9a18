"""The machine: what it is, and what it can do at most."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import sparsekit

from .clock import Call
from .lab import Lab, check_same
from .log import Log

CLOCKS = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"


def measure(lab: Lab, log: Log) -> None:
    """Writes the device with its versions, the bandwidth of a copy and the rate of the largest dense product."""
    with log.guard("device"):
        log.write(name="device", **device(lab))
    for name, call in {"copy": copies, "product": products}.items():
        with log.guard(name):
            call(lab, log)
    with log.guard("clocks"):
        log.write(name="clocks after", **clocks())


def device(lab: Lab) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine(), "layout": lab.layout, **clocks()}
    if lab.device.type == "cuda":
        properties = torch.cuda.get_device_properties(lab.device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
        }
    versions = {name: _version(name) for name in ("torch", "triton")}
    cuda = torch.version.cuda or torch.version.hip
    return (
        facts
        | versions
        | {"sparsekit": sparsekit.__version__}
        | {"cuda": cuda, "cusparselt": lab.vendor.version(), "python": platform.python_version()}
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment, as nvidia-smi names them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"nvidia-smi": "not found"}
    query = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return dict(zip(CLOCKS.split(","), (field.strip() for field in done.stdout.split(",")), strict=False))


def copies(lab: Lab, log: Log) -> None:
    """Check 5: what memory allows, by copies that count the bytes read and written."""
    large = torch.randint(-128, 127, (lab.sizes.copy_bytes,), dtype=torch.int8, device=lab.device)
    target = torch.empty_like(large)
    target.copy_(large)
    check_same(target, large)
    _copy_row(lab, log, "copy", large.nbytes, {"copy_": [lambda: target.copy_(large)], "clone": [large.clone]})
    rows, cols = lab.sizes.masks[0]
    small = lab.sets(lambda: (lab.randn(rows, cols), lab.randn(rows, cols)), 2 * rows * cols * 2)
    copied = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in small]
    cloned = [pair[1].clone for pair in small]
    _copy_row(lab, log, f"copy {rows}x{cols} bf16", small[0][0].nbytes, {"copy_": copied, "clone": cloned})


def _copy_row(lab: Lab, log: Log, name: str, nbytes: int, calls: dict[str, Sequence[Call]]) -> None:
    seconds = lab.clock.race(calls, capture=True).seconds()
    rates = {key: 2 * nbytes / each / 1e9 for key, each in seconds.items()}
    log.write(name=name, bytes=nbytes, seconds=seconds, **{"GB/s": rates})


def products(lab: Lab, log: Log) -> None:
    """The largest dense bf16 product that memory and time allow, on random data."""
    for size in lab.sizes.product:
        left, right = lab.randn(size, size), lab.randn(size, size)
        seconds = lab.clock.race({"matmul": [lambda a=left, b=right: a @ b] * 2}, 0.5).seconds()["matmul"]
        log.write(name="product", size=size, seconds=seconds, **{"TFLOP/s": 2 * size**3 / seconds / 1e12})
