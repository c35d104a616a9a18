"""The command line itself: arguments that cannot be parsed, help, the version, and what it needs installed."""

import re
import subprocess
import sys
from typing import get_args

import pytest
from commands import call, refusal

import sparsekit as sk
from sparsekit import cli
from sparsekit.cli.arguments import unframed
from sparsekit.cli.prune import METHODS, Prune
from sparsekit.prune import Method
from sparsekit.prune.refinements import Refinement

for package in ("tyro", "rich", "PIL", "transformers"):
    pytest.importorskip(package)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "expected one of {prune, inspect, compress, bench, convert, monitor, sweep}. (sparsekit --help)"),
        ("prune", "missing from sparsekit prune: --model STR, --out PATH (sparsekit prune --help)"),
        (
            "prune --modle x --out y",
            "missing from sparsekit prune: --model STR; unrecognized options: --modle, x (sparsekit prune --help)",
        ),
        (
            "melt",
            "unrecognized options: melt; available subcommands: prune, inspect, compress, bench, convert, monitor, "
            "sweep (sparsekit --help)",
        ),
        ("inspect x y", "unrecognized options: y (sparsekit inspect --help)"),
        ("bench x --tokens a", "error parsing --tokens: Could not find valid parse for arguments: ['a']"),
        ("prune --model --out x", "missing value for argument '--model'. Expected 1 values. (sparsekit prune --help)"),
        (
            "prune --method guess",
            "invalid choice 'guess' for argument '--method'. Expected one of ('magnitude', 'wanda'",
        ),
    ],
)
def test_arguments_that_cannot_be_parsed_are_one_line(arguments, said, capsys):
    code, line = refusal(arguments.split(), capsys)
    assert code == 2 and line.startswith(f"sparsekit: {said}")


def test_a_box_of_ascii_is_one_line_too():
    box = " Unrecognized options \n ------- \n  Unrecognized options: melt \n  ------- \n  For full helptext, run it \n"
    assert unframed(box) == "unrecognized options: melt"


def test_help_and_version(capsys):
    for name in ("prune", "inspect", "compress", "bench", "monitor", "sweep"):
        code, out, _ = call([name, "--help"], capsys)
        assert code == 0 and f"sparsekit {name}" in out and "--json" in out
    assert call(["--version"], capsys) == (0, f"sparsekit {sk.__version__}\n", [])


def test_every_method_can_be_named_and_is_explained():
    """The refinements have options of their own, and scores come from a program."""
    classes = {each for each in vars(sk).values() if isinstance(each, type) and issubclass(each, Method)}
    assert set(METHODS.values()) == {each for each in classes if not issubclass(each, Refinement)} - {sk.Scores}
    assert get_args(Prune.__annotations__["method"]) == tuple(METHODS)
    explained = re.search(r" method: (.*?)\.\n", Prune.__doc__, re.DOTALL)[1]
    assert set(METHODS) <= set(re.findall(r"\w+", explained))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("rich", "PIL") else object())
    line = "sparsekit: the command line needs rich, pillow: pip install 'sparsekit-kernels[cli]'"
    assert refusal(["inspect", "x"], capsys) == (1, line)
    line = "sparsekit: the command line needs rich: pip install 'sparsekit-kernels[systems]'"
    assert refusal(["monitor", "x"], capsys) == (1, line)


@pytest.mark.slow
def test_runs_are_watched_without_transformers(tmp_path):
    code = (
        "import sys; sys.modules.update(transformers=None, PIL=None); from sparsekit.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "monitor", tmp_path, "--json"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_python_m_sparsekit(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sparsekit", "inspect", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sparsekit: {tmp_path} has no safetensors file\n"
