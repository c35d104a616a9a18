"""Every kernel compiles for every target, and the hot ones to the machine code they are meant to be."""

from importlib import import_module
from pathlib import Path

import pytest
from aot.case import TARGETS
from aot.compilers import Compilers

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # each target takes a minute
FOLDER = Path(__file__).parent / "aot"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # bytes a block can have
CASES = {
    f"{path.stem}/{case.name}": case
    for path in sorted(FOLDER.glob("cases_*.py"))
    for case in import_module(f"aot.{path.stem}").CASES
}


def cases():
    """A case for every target."""
    return [(name, target) for name, case in CASES.items() for target in case.targets]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """What the compilers found, by target and case, of the targets and the cases that the chosen tests ask for."""
    items = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    whole = any(item.name == test_every_kernel_is_compiled_for_every_target.__name__ for item in items)
    targets, names = ({each[key] for each in params} for key in ("target", "name"))
    folder = tmp_path_factory.mktemp("compiled")
    compilers = Compilers(folder, TARGETS) if whole else Compilers(folder, sorted(targets), sorted(names))
    yield compilers.found()
    compilers.close()


def test_every_kernel_is_compiled_for_every_target(compiled):
    names = {
        target: {kernel["kernel"] for kernels in found.values() if not isinstance(kernels, str) for kernel in kernels}
        for target, found in compiled.items()
    }
    assert all(each == names["sm_90"] for each in names.values()) and len(names) == 4


@pytest.mark.parametrize("name, target", cases())
def test_compiles_to_what_it_is_meant_to_be(compiled, name, target):
    case, kernels = CASES[name], compiled[target][name]
    assert not isinstance(kernels, str), kernels
    assert kernels, "the launcher launched nothing"
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[target], kernel
        if case.hot:
            assert (kernel["stack"], kernel["local"]) == (0, 0), kernel
    for kind, least in (("loads", case.loads), ("stores", case.stores)):
        widths = [width for kernel in kernels for width in kernel[kind]]
        wide = sum(width for width in widths if width >= least)
        assert not least or (widths and wide >= 0.75 * sum(widths)), f"{kind} of {widths} bytes, {least} wanted"
