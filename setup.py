"""Builds the optional compiled extension; everything else about the package is in pyproject.toml.

SPARSEKIT_NATIVE: ``1`` the extension must build, ``0`` never build it, unset build it if possible.
"""

import os
from contextlib import suppress
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

NATIVE = os.environ.get("SPARSEKIT_NATIVE", "")
if NATIVE not in ("", "0", "1"):
    raise SystemExit(f"SPARSEKIT_NATIVE must be 0, 1 or unset, got {NATIVE!r}")


def no_native(reason: object) -> None:
    """Ends the build where the extension was asked for; else says that the install goes on without it."""
    if NATIVE == "1":
        raise SystemExit(f"sparsekit: SPARSEKIT_NATIVE=1, but the extension cannot be built: {reason}")
    message = f"sparsekit: installing without compiled kernels ({reason}); plain PyTorch answers instead"
    print(message)
    with suppress(OSError), open("/dev/tty", "w") as terminal:  # pip hides what a build prints
        print(message, file=terminal)


class Wheel(bdist_wheel):
    """One abi3 wheel serves every Python from 3.10 on; without the extension the wheel is pure."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self) -> None:
        self.run_command("build")  # first, since a failed build changes the tag
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def native() -> dict[str, object]:
    """The setup() arguments that build the extension, or none where it is not wanted or not possible."""
    if NATIVE == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        no_native("torch is not installed here: install it first and use --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):
        """torch's ninja path raises RuntimeError, which setuptools' own ``optional=True`` does not catch."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                no_native(error)
                self.distribution.ext_modules = self.extensions = []
                folders = [self.build_lib, "."] if self.editable_mode else [self.build_lib]
                for folder in folders:  # the extension of an earlier build would answer in its place
                    for stale in Path(folder, "sparsekit").glob("_C.*"):
                        stale.unlink()

    extension = CppExtension(
        "sparsekit._C",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        extra_compile_args=[
            "-O3",
            "-g0",  # Python's own flags ask for debug information, 10 of 12 MB
            "-std=c++20",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild, "bdist_wheel": Wheel}}


setup(
    packages=[*find_packages(include=["sparsekit", "sparsekit.*"]), "sparsekit.triton_kernels"],
    package_dir={"sparsekit.triton_kernels": "triton_kernels"},
    package_data={"sparsekit": ["py.typed"], "sparsekit.triton_kernels": ["configs.json"]},
    **native(),
)
