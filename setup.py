"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

SPARSEKIT_NATIVE: ``1`` the extension must build, ``0`` never build it, unset build it where there is a compiler. An
install without it is told apart by its version, 0.1.0+pure, since that is what pip shows of one that succeeded; and
``_build.json`` in the package tells the reason to who runs it.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"sparsekit: building it needs setuptools 77 or later, and {setuptools.__version__} is installed: "
        "pip install -U 'setuptools>=77'"
    )

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

NATIVE = os.environ.get("SPARSEKIT_NATIVE", "")
if NATIVE not in ("", "0", "1"):
    raise SystemExit(f"SPARSEKIT_NATIVE must be 0, 1 or unset, got {NATIVE!r}")
VERSION = runpy.run_path(str(Path(__file__).with_name("sparsekit") / "_version.py"))["VERSION"]
NO_TORCH = "torch is not there while it is built"
FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information, 10 of 12 MB
    "-std=c++20",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def obstacle() -> str:
    """Why the extension is not going to be built; "" where it is."""
    if NATIVE == "0":
        return "SPARSEKIT_NATIVE=0 asked for plain PyTorch"
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return NO_TORCH
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <bit>\nint main() { return std::popcount(0u); }\n", encoding="utf-8")
        compiler = os.environ.get("CXX") or get_cxx_compiler()
        command = f"{compiler} -std=c++20 -c {source} -o {source.with_suffix('.o')}"
        if sys.platform != "win32" and os.system(f"{command} > {os.devnull} 2>&1"):
            return f"{compiler} compiles no C++20"
    return ""


def record(folder: Path, reason: str) -> None:
    """Writes beside the package what it was built with, or why it was built without."""
    built = {"reason": reason} if reason else {"torch": sys.modules["torch"].__version__}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(built), encoding="utf-8")


def no_native(reason: object) -> None:
    """Ends the build where the extension was asked for; else says that the install goes on without it."""
    if NATIVE == "1":
        raise SystemExit(f"sparsekit: SPARSEKIT_NATIVE=1, but the extension cannot be built: {reason}")
    print(f"sparsekit: installing without compiled kernels ({reason}); plain PyTorch answers instead")


def refuse_without_torch() -> None:
    """Ends a build that would leave the slow package where nobody asked for it: pip shows what a failed build says."""
    if OBSTACLE == NO_TORCH:
        raise SystemExit(
            f"sparsekit: {NO_TORCH}; pip builds in isolation unless told otherwise. For the compiled kernels: "
            "`pip install torch 'setuptools>=77' ninja`, then the same pip install with --no-build-isolation. "
            "For plain PyTorch, many times slower: the same pip install with SPARSEKIT_NATIVE=0 in the environment."
        )


class Metadata(dist_info):
    """Refuses before pip has downloaded what the package needs."""

    def run(self) -> None:
        refuse_without_torch()
        super().run()


class Python(build_py):
    """Adds the record; the extension's build corrects it."""

    def run(self) -> None:
        refuse_without_torch()
        if OBSTACLE:
            no_native(OBSTACLE)
        super().run()
        record(package_folder(self), OBSTACLE or "the build of the extension broke off")


class Wheel(bdist_wheel):
    """One abi3 wheel serves every Python from 3.10 on; without the extension the wheel is pure."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        self.run_command("build")  # first, since a failed build changes the tag
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def package_folder(command: Command) -> Path:
    return Path("sparsekit") if command.editable_mode else Path(command.build_lib, "sparsekit")


def native() -> dict[str, object]:
    """The setup() arguments that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        """torch's ninja path raises RuntimeError, which setuptools' own ``optional=True`` does not catch."""

        def run(self) -> None:
            try:
                super().run()
                record(package_folder(self), "")
            except Exception as error:
                no_native(error)
                record(package_folder(self), str(error))
                self.distribution.ext_modules = self.extensions = []
                folders = [self.build_lib, "."] if self.editable_mode else [self.build_lib]
                for folder in folders:  # the extension of an earlier build would answer in its place
                    for stale in Path(folder, "sparsekit").glob("_C.*"):
                        stale.unlink()

    extension = CppExtension(
        "sparsekit._C",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {**COMMANDS, "build_ext": OptionalBuild, "bdist_wheel": Wheel}}


COMMANDS = {"dist_info": Metadata, "build_py": Python}
OBSTACLE = obstacle()
setup(
    version=VERSION + ("+pure" if OBSTACLE and "sdist" not in sys.argv else ""),
    packages=[*find_packages(include=["sparsekit", "sparsekit.*"]), "sparsekit.triton_kernels"],
    py_modules=["sparsekit_command"],
    package_dir={"sparsekit.triton_kernels": "triton_kernels"},
    package_data={"sparsekit": ["py.typed"], "sparsekit.triton_kernels": ["configs.json"]},
    **({"cmdclass": COMMANDS} if OBSTACLE else native()),
)
