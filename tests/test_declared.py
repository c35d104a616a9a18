"""Every op is declared once, and its kernels are found by its name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekit.ops import backends
from sparsekit.ops._define import DECLARED

KERNELS = Path(__file__).parents[1] / "triton_kernels"


def launchers():
    """The functions of ``triton_kernels/`` that run on the host and belong to an op, by file stem."""
    for file in sorted(KERNELS.glob("[!_]*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list:
                yield file.stem, node.name


def test_every_launcher_answers_its_op_on_gpus():
    found = {name: stem for stem, name in launchers() if name in DECLARED}
    assert found.keys() == {op for op, answer in backends().items() if answer["cuda"] == "triton"}
    assert found == {op: DECLARED[op].stem for op in found}, "a launcher is in another file than its op's stem says"


@pytest.mark.parametrize("stem", sorted({stem for stem, name in launchers() if name in DECLARED}))
def test_what_has_a_launcher_is_compiled_ahead_of_time(stem):
    assert (KERNELS.parent / "tests" / "aot" / f"cases_{stem}.py").exists(), f"tests/aot/cases_{stem}.py is missing"


def test_finding_the_launchers_imports_no_triton():
    code = "import sys; from sparsekit.ops import backends; print(backends()['nm_mask'], 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("'cuda': 'triton'} False\n"), done.stderr


def test_every_op_has_the_signature_of_its_reference():
    assert {getattr(torch.ops.sparsekit, op).default._opname for op in DECLARED} == DECLARED.keys()
    assert str(torch.ops.sparsekit.nm_prune_.default._schema) == (
        "sparsekit::nm_prune_(Tensor(a0!) weight, int n, int m, Tensor? scale) -> Tensor"
    )
