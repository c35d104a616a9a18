"""Installs by pip, outside of the checkout: the wheel, the source distribution, and both without a compiler."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import sparsekit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PROBE = """
import json, pathlib, sparsekit, sparsekit.triton_kernels, torch
from sparsekit.ops import backends, nm_mask
assert nm_mask(torch.tensor([1.0, -4.0, 3.0, 2.0]), 2, 4).tolist() == [False, True, True, False]
print(json.dumps([str(pathlib.Path(sparsekit.__file__).parent), [backends()["nm_mask"]["cpu"]]]))
"""


@pytest.fixture
def copying(tmp_path):
    """A fake compiler that only links to the extension of this environment, which ``make`` has built."""
    built = next(iter(Path(sparsekit.__file__).parent.glob("_C.*")), None)
    if built is None:
        pytest.skip("no extension is built here")
    path = tmp_path / "copying"
    path.write_text(
        f"""#!/bin/sh
for argument; do
  case $before in -o) out=$argument ;; -MF) depends=$argument ;; esac
  [ "$argument" = -shared ] && shared=1
  before=$argument
done
[ -n "$out" ] || exec {os.environ.get("CXX", "c++")} "$@"
[ -z "$depends" ] || echo "$out:" > "$depends"
if [ -n "$shared" ]; then cp {built} "$out"; else : > "$out"; fi
"""
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources alone, without anything that was built before."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    folder = tmp_path_factory.mktemp("source")
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "sparsekit_command.py",
    ):
        shutil.copy(ROOT / name, folder)
    for name in ("sparsekit", "csrc", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return folder


def build(source, out, kind="--wheel", **environment):
    """Builds without isolation; returns the built file and the output."""
    clean = {key: value for key, value in os.environ.items() if key != "SPARSEKIT_NATIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(source)],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return next(iter(Path(out).glob("*")), None) if done.returncode == 0 else None, done.stdout + done.stderr


def run_installed(wheel, folder, **environment):
    """Installs a wheel in a new environment that borrows only torch from this one; returns what ``PROBE`` prints.

    The borrowed folder is a line of a ``.pth`` file, so it comes last on the path and its own ``.pth`` files, an
    editable sparsekit's among them, are not read: sparsekit can only come from the wheel.
    """
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env/bin/python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel], check=True
    )
    site = next((folder / "env/lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    clean = {key: value for key, value in os.environ.items() if key not in ("SPARSEKIT_NATIVE", "PYTHONPATH")}
    done = subprocess.run(
        [python, "-c", PROBE], cwd=folder, env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    package, kernels = json.loads(done.stdout)
    assert package == str(site / "sparsekit")
    return kernels


@pytest.mark.skipif(os.environ.get("SPARSEKIT_NATIVE") == "0", reason="builds the extension")
def test_native_wheel(source, tmp_path, copying):
    wheel, said = build(source, tmp_path / "dist", SPARSEKIT_NATIVE="1", CXX=copying)
    assert wheel, said
    assert wheel.name.startswith("sparsekit_kernels-0.1.0-cp310-abi3-")
    record = json.loads(zipfile.ZipFile(wheel).read("sparsekit/_build.json"))
    assert record == {"torch": torch.__version__}
    names = zipfile.ZipFile(wheel).namelist()
    assert "sparsekit/_C.abi3.so" in names and "sparsekit/py.typed" in names
    assert "sparsekit/triton_kernels/configs.json" in names
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc", "triton_kernels"))]
    assert "sparsekit_command.py" in names
    kernels = run_installed(wheel, tmp_path, SPARSEKIT_NATIVE="1")
    assert len(kernels) == 1 and kernels != ["reference"]


def test_pure_wheel_from_the_source_distribution(source, tmp_path):
    archive, said = build(source, tmp_path / "sdist", "--sdist", SPARSEKIT_NATIVE="0")
    assert archive, said
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path, filter="data")
    assert {
        "csrc/cpu/kernels.h",
        "csrc/cpu/nm.cpp",
        "triton_kernels/__init__.py",
        "triton_kernels/configs.json",
        "constraints.txt",
        "LICENSE",
    } <= names
    wheel, said = build(next(tmp_path.glob("sparsekit_kernels-*")), tmp_path / "dist", SPARSEKIT_NATIVE="0")
    assert wheel and wheel.name == "sparsekit_kernels-0.1.0+pure-py3-none-any.whl", said  # the version that pip shows
    assert run_installed(wheel, tmp_path, SPARSEKIT_NATIVE="0") == ["reference"]
    reason = json.loads(zipfile.ZipFile(wheel).read("sparsekit/_build.json"))["reason"]
    assert reason == "SPARSEKIT_NATIVE=0 asked for plain PyTorch"


def test_without_a_compiler_the_wheel_is_pure_and_says_so(source, tmp_path):
    wheel, said = build(source, tmp_path / "dist", CC="/bin/false", CXX="/bin/false")
    assert wheel and wheel.name.endswith("-py3-none-any.whl"), said
    assert "sparsekit: installing without compiled kernels" in said and "+pure" in wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name]
    assert "/bin/false compiles no C++20" in zipfile.ZipFile(wheel).read("sparsekit/_build.json").decode()


def test_a_build_that_breaks_off_leaves_a_pure_wheel(source, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken, ignore=shutil.ignore_patterns("build"))
    shutil.rmtree(broken / "csrc/cpu")
    (broken / "csrc/cpu").mkdir()
    (broken / "csrc/cpu/nm.cpp").write_text('#error "a compiler that lacks something"\n')
    wheel, said = build(broken, tmp_path / "dist")
    assert wheel and wheel.name.endswith("-py3-none-any.whl"), said
    assert "sparsekit: installing without compiled kernels" in said


def test_asked_for_and_impossible_is_one_clear_error(source, tmp_path):
    wheel, said = build(source, tmp_path / "dist", SPARSEKIT_NATIVE="1", CC="/bin/false", CXX="/bin/false")
    assert wheel is None
    assert "sparsekit: SPARSEKIT_NATIVE=1, but the extension cannot be built" in said


def test_without_torch_the_build_fails_and_names_both_ways(source, tmp_path):
    (tmp_path / "torch.py").write_text('raise ImportError("as in an isolated build")\n')
    wheel, said = build(source, tmp_path / "dist", PYTHONPATH=str(tmp_path))
    assert wheel is None and "sparsekit: torch is not there while it is built" in said
    wheel, said = build(source, tmp_path / "dist", PYTHONPATH=str(tmp_path), SPARSEKIT_NATIVE="0")
    assert wheel and "+pure" in wheel.name, said


def test_an_unknown_switch_is_an_error(source, tmp_path):
    wheel, said = build(source, tmp_path / "dist", SPARSEKIT_NATIVE="yes")
    assert wheel is None and "SPARSEKIT_NATIVE must be 0, 1 or unset, got 'yes'" in said


def test_asked_for_and_not_installed_is_one_clear_error(source):
    environment = {**os.environ, "SPARSEKIT_NATIVE": "1", "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", "import sparsekit"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert (
        "ImportError: SPARSEKIT_NATIVE=1, but the compiled extension is not built. Rebuild it with `pip" in done.stderr
    )
