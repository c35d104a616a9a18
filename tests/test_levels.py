"""Which kernels answer, and how that is chosen."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit import _native
from sparsekit.ops import backends, force_simd, simd_level, simd_levels
from sparsekit.ops._define import DECLARED
from sparsekit.ops._kernels import NATIVE

AVX2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"}  # as Linux names them
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

native = pytest.mark.skipif(NATIVE != "loaded", reason=f"no compiled extension: {NATIVE}")


@pytest.mark.skipif(os.environ.get("SPARSEKIT_NATIVE") != "1", reason="asked for by SPARSEKIT_NATIVE=1")
def test_native_kernels_answer_every_op_that_is_declared_compiled():
    answers = {op: answer["cpu"] for op, answer in backends().items()}
    declared = {op: simd_level() if each.compiled else "reference" for op, each in DECLARED.items()}
    assert answers == declared and list(answers.values()).count(simd_level()) >= 15


@native
def test_best_level_is_the_default():
    assert simd_levels()[0] == "scalar"
    assert simd_level() == simd_levels()[-1]


@native
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux for the CPU's features")
@pytest.mark.parametrize(
    "level, features",
    [
        ("avx2", AVX2),
        ("avx2_vnni", AVX2 | {"avx_vnni"}),
        ("avx512", AVX512),
        ("avx512_vnni", AVX512 | {"avx512_vnni"}),
        ("avx512_bf16", AVX512 | {"avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_vbmi2"}),
    ],
)
def test_level_is_there_where_the_cpu_has_it(level, features):
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    assert (level in simd_levels()) == (features <= set(flags.split()))


@native
def test_neon_is_there_on_every_64_bit_arm():
    assert ("neon" in simd_levels()) == (platform.machine() in ("aarch64", "arm64"))


@native
def test_force_simd_names_the_level_and_restores_it():
    for level in simd_levels():
        with pytest.raises(KeyError, match="inside"), force_simd(level):
            assert simd_level() == level
            assert {answer["cpu"] for answer in backends().values()} == {level, "reference"}
            raise KeyError("inside")
        assert simd_level() == simd_levels()[-1]


def test_force_simd_rejects_a_level_that_is_not_there():
    with pytest.raises(ValueError, match=r"level must be one of \(.*\), got 'sse9'"), force_simd("sse9"):
        pass


def test_backends_names_every_op_and_device():
    assert backends().keys() == DECLARED.keys()
    assert all(set(answer) == {"cpu", "cuda"} for answer in backends().values())


def test_switched_off_the_reference_answers():
    code = "from sparsekit.ops import *; print(simd_levels(), simd_level(), {a['cpu'] for a in backends().values()})"
    environment = {**os.environ, "SPARSEKIT_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "() reference {'reference'}", done.stderr


def test_an_unknown_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_NATIVE", "yes")
    with pytest.raises(ImportError, match="SPARSEKIT_NATIVE must be 0, 1 or unset, got 'yes'"):
        _native.load()
