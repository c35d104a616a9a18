"""Compiles every case for one target and writes what the machine code needs: ``worker.py sm_90 out.json``.

Runs where there is no GPU: Triton's driver is replaced by one that only names the target, and launching stops after
compiling. What is compiled is what the launchers would launch, with the same specialization and configuration.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES = sorted(path.stem for path in HERE.glob("cases_*.py"))
compiled = []


class NoDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(run):
    def stop_before_launch(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    return stop_before_launch


def needs(kernel):
    """Registers, memory and the widths of the global loads and stores of a compiled kernel."""
    shared = {"shared": kernel.metadata.shared}
    if "cubin" in kernel.asm:
        return shared | cuda_resources(kernel.asm["cubin"]) | cuda_widths(kernel.asm["ptx"])
    return shared | amd_resources(kernel.asm["amdgcn"]) | amd_widths(kernel.asm["amdgcn"])


def cuda_resources(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


def cuda_widths(ptx):
    widths = {"loads": [], "stores": []}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        widths["loads" if kind == "ld" else "stores"].append(int(vector or 1) * int(bits) // 8)
    widths["loads"] += [int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*\], (0x\w+)", ptx)]
    return widths


def amd_resources(text):
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    spills = field["vgpr_spill_count"] + field["sgpr_spill_count"]
    return {"registers": field["vgpr_count"], "stack": field["private_segment_fixed_size"], "local": spills}


def amd_widths(text):
    size = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    widths = {"loads": [], "stores": []}
    for kind, unit, count in re.findall(
        r"\b(?:global|buffer)_(load|store)_(ubyte|sbyte|byte|ushort|short|dword)(?:_d16\w*)?(?:x(\d))?\b", text
    ):
        widths["loads" if kind == "load" else "stores"].append(size[unit] * int(count or 1))
    return widths


def main(target, out, *names):
    driver.set_active(NoDriver(GPUS[target]))
    JITFunction.run = compile_only(JITFunction.run)
    launch = import_module("sparsekit.triton_kernels._launch")
    launch.architecture = lambda tensor: target
    results = {}
    for family in FAMILIES:
        for case in import_module(f"aot.{family}").CASES:
            if target not in case.targets or (names and f"{family}/{case.name}" not in names):
                continue
            compiled.clear()
            try:
                case.call()
            except Exception as error:  # the test of this case reports it, the others go on
                results[f"{family}/{case.name}"] = f"{type(error).__name__}: {error}"
                continue
            results[f"{family}/{case.name}"] = [{"kernel": name, **needs(kernel)} for name, kernel in compiled]
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
