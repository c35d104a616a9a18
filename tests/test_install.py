"""What an installation reports: why kernels are missing, what is installed, and which project it is."""

import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import setuptools
import torch

import sparsekit as sk
from sparsekit import _installed, _native
from sparsekit.cli import app
from sparsekit.ops import _kernels
from sparsekit.ops._define import DECLARED
from sparsekit.ops.nm import nm_mask_reference

ROOT = Path(__file__).parents[1]
sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def add_distribution(folder, name, version, summary):
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed distributions that comes first on the path."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "checkout" / "sparsekit"
    package.mkdir(parents=True)
    (package.parent / "csrc").mkdir()
    (package.parent / "setup.py").touch()
    return package


def test_a_checkout_that_was_not_built(checkout, monkeypatch):
    monkeypatch.setattr(_native, "installed", list)
    why, command = _native.remedy(checkout)
    assert why == f"the checkout {checkout.parent} was never built"
    assert command == f"pip install --no-build-isolation -e {checkout.parent}"


def test_a_checkout_that_hides_the_installed_package(checkout, site):
    add_distribution(site, "sparsekit-kernels", "0.1.0", "Kernels for sparse neural networks")
    (site / "sparsekit").mkdir()
    why, _ = _native.remedy(checkout)
    assert "hides the package" not in why  # the hidden package has no extension either
    (site / "sparsekit" / "_C.abi3.so").touch()
    why, _ = _native.remedy(checkout)
    assert why == f"the source checkout {checkout.parent} hides the package installed in {site / 'sparsekit'}"


def test_what_a_build_left_in_the_checkout_hides_no_installed_package(checkout, site, monkeypatch):
    """``pip install .`` leaves metadata in the checkout, which come first on the path if Python starts there."""
    add_distribution(site, "sparsekit-kernels", "0.1.0", "Kernels for sparse neural networks")
    (site / "sparsekit").mkdir()
    (site / "sparsekit" / "_C.abi3.so").touch()
    add_distribution(checkout.parent, "sparsekit-kernels", "0.1.0", "Kernels for sparse neural networks")
    monkeypatch.syspath_prepend(str(checkout.parent))
    assert "hides the package installed in" in _native.remedy(checkout)[0]


def test_an_installation_whose_build_fell_back(tmp_path):
    package = tmp_path / "site-packages" / "sparsekit"
    package.mkdir(parents=True)
    (package / "_build.json").write_text(json.dumps({"reason": "c++ compiles no C++20"}))
    why, command = _native.remedy(package)
    assert why == "its build said: c++ compiles no C++20"
    assert command.startswith("pip install --no-build-isolation --no-deps --force-reinstall ")
    for damaged in ("[]", "{", ""):
        (package / "_build.json").write_text(damaged)
        assert _native.remedy(package)[0] == f"the package in {package} was never built"


def test_what_was_installed_from_a_folder_is_installed_from_there_again(checkout, site):
    """The command works for a package that no index has."""
    add_distribution(site, "sparsekit-kernels", "0.1.0", "Kernels for sparse neural networks")
    record = site / "sparsekit_kernels-0.1.0.dist-info" / "direct_url.json"
    command = "pip install --no-build-isolation --no-deps --force-reinstall "
    record.write_text(json.dumps({"dir_info": {}, "url": checkout.parent.as_uri()}))
    assert _installed.reinstall_command() == f"{command}{checkout.parent}"
    (checkout.parent / "setup.py").unlink()
    assert str(checkout) not in _installed.reinstall_command()  # the folder is gone
    for damaged in ("[]", "{", '{"dir_info": {}}', '{"dir_info": {}, "url": 1}'):
        record.write_text(damaged)
        assert _installed.reinstall_command().startswith(command)


def test_an_extension_for_another_torch(tmp_path, monkeypatch):
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    (tmp_path / "_build.json").write_text(json.dumps({"torch": "1.0"}))
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    monkeypatch.delenv("SPARSEKIT_NATIVE", raising=False)
    monkeypatch.setattr(_native._record, "__defaults__", (tmp_path,))
    assert _native.load().startswith(f"built for torch 1.0, not for {torch.__version__}: ")
    monkeypatch.setenv("SPARSEKIT_NATIVE", "1")
    with pytest.raises(ImportError, match=r"Rebuild it with `pip install .*`: it has to be built anew for this torch"):
        _native.load()


@pytest.fixture
def slow_mask(monkeypatch):
    """Calls ``nm_mask`` as it is when the extension is missing."""
    monkeypatch.setattr(_kernels, "NATIVE", "not built")
    _kernels.warn_slow.cache_clear()
    yield _kernels._slow(nm_mask_reference)
    _kernels.warn_slow.cache_clear()


def test_the_first_op_without_kernels_warns_once_where_it_is_called(slow_mask):
    score = torch.tensor([1.0, -4.0, 3.0, 2.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert slow_mask(score, 2, 4).tolist() == [False, True, True, False]
    (warning,) = caught
    assert warning.category is sk.ops.SlowKernelsWarning and issubclass(warning.category, UserWarning)
    assert warning.filename == __file__
    text = str(warning.message)
    assert "many times slower: the compiled extension is not built" in text
    assert "`pip install --no-build-isolation" in text and "SPARSEKIT_NATIVE=0" in text


@pytest.mark.parametrize("state, warns", [("loaded", False), (_native.SWITCHED_OFF, False), ("not built", True)])
def test_only_a_missing_extension_that_was_wanted_warns(monkeypatch, state, warns):
    registered = []

    class Library:
        def impl(self, *args):
            registered.append(args)

    monkeypatch.setattr(_kernels, "NATIVE", state)
    monkeypatch.setattr(_kernels, "LIBRARY", Library())
    _kernels.register_kernels()
    compiled = [op for op, declared in DECLARED.items() if declared.compiled]
    assert [op for op, _, key in registered if key == "CPU"] == (compiled if warns else [])


def test_show_config_names_versions_kernels_and_what_is_missing(capsys, monkeypatch):
    sk.show_config()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"sparsekit {sk.__version__} in ")
    assert f"torch {torch.__version__}" in lines[1]
    assert any(line.startswith("tune cache: ") for line in lines)
    assert any(line.startswith(f"CPU kernels: {sk.ops.simd_level()}") for line in lines)
    assert {line.split()[0] for line in lines[-len(DECLARED) :]} == set(DECLARED)
    monkeypatch.setattr(_kernels, "NATIVE", "not built")
    monkeypatch.setattr("sparsekit._config._version", lambda name: None)
    sk.show_config()
    said = capsys.readouterr().out
    assert "missing: compiled CPU kernels: not built, " in said and "pip install --no-build-isolation" in said
    assert "missing: triton" in said and "pip install 'sparsekit-kernels[cli]'" in said


def test_the_module_alone_prints_the_config_and_with_arguments_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sparsekit"])
    runpy.run_module("sparsekit", run_name="__main__")
    assert "CPU kernels: " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["sparsekit", "--version"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("sparsekit", run_name="__main__")
    assert exit.value.code == 0 and capsys.readouterr().out == f"sparsekit {sk.__version__}\n"


def test_another_project_of_the_same_name_is_refused(site):
    _installed.refuse_foreign()
    add_distribution(site, "sparsekit", "0.1.5", "Something else that is sparse")
    with pytest.raises(ImportError, match=r"sparsekit 0\.1\.5 in .* is another project.*`pip uninstall sparsekit`"):
        _installed.refuse_foreign()


def test_what_an_uninstall_left_behind_is_not_foreign(site):
    (site / "sparsekit-0.1.5.dist-info").mkdir(parents=True)
    _installed.refuse_foreign()


def test_this_project_under_its_earlier_name_is_not_foreign(site):
    add_distribution(site, "sparsekit", "0.1.0", "Kernels for sparse neural networks: 2:4 and more")
    _installed.refuse_foreign()


def test_another_project_behind_this_one_is_refused(site, tmp_path, monkeypatch):
    add_distribution(site, "sparsekit", "0.1.5", "Something else that is sparse")
    add_distribution(tmp_path / "first", "sparsekit", "0.1.0", "Kernels for sparse neural networks: 2:4 and more")
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    with pytest.raises(ImportError, match=r"sparsekit 0\.1\.5 in"):
        _installed.refuse_foreign()


def test_import_is_light():
    """Beyond torch the import loads no compiler and nothing optional, and takes half a second (more if busy)."""
    code = (
        "import sys, time, torch; start = time.process_time(); import sparsekit;"
        "print(time.process_time() - start, *sys.modules.keys() & {'torch._dynamo', 'triton', 'transformers', 'tyro'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *heavy = done.stdout.split()
    assert float(seconds) < 1 and not heavy


@sources
@pytest.mark.parametrize("argument", ["--version", "--help", "-h"])
def test_the_command_says_what_it_is_before_torch_is_imported(argument):
    code = (
        "import sys, sparsekit_command; code = sparsekit_command.main();"
        "sys.exit(code or bool(sys.modules.keys() & {'torch', 'sparsekit'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if argument == "--version":
        assert done.stdout == f"sparsekit {sk.__version__}\n"
    else:
        words = " ".join(done.stdout.split())
        assert " ".join(app.DESCRIPTION.split()) in words
        for name, command in app.COMMANDS.items():
            assert f"{name} {' '.join((command.__doc__ or '').partition(chr(10) * 2)[0].split())}" in words


@sources
def test_the_command_runs_what_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sparsekit", "inspect", str(tmp_path)])
    assert runpy.run_path(str(ROOT / "sparsekit_command.py"))["main"]() == 2
    assert capsys.readouterr().err == f"sparsekit: {tmp_path} has no safetensors file\n"


def run_setup(monkeypatch, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", *arguments])
    runpy.run_path("setup.py")


@sources
@pytest.mark.parametrize("version", ["65.5.0", "70.1.0", "76.1.0.post1"])
def test_an_old_setuptools_gets_a_sentence(monkeypatch, version):
    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit, match=rf"needs setuptools 77 or later, and {version} is installed: pip install -U"):
        run_setup(monkeypatch, "--version")


@sources
@pytest.mark.parametrize("command", ["dist_info", "build_py"])
def test_a_build_without_torch_fails_in_a_sentence(monkeypatch, command):
    """An isolated build has no torch; it fails unless plain PyTorch is asked for."""
    monkeypatch.delenv("SPARSEKIT_NATIVE", raising=False)
    for name in ("torch", "torch.utils", "torch.utils.cpp_extension"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"torch is not there .*--no-build-isolation.*SPARSEKIT_NATIVE=0"):
        run_setup(monkeypatch, command)
