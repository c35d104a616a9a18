"""Docstrings read alike: a function's says what it does, a class's what it is, and a sentence ends with a period."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sparsekit", "triton_kernels", "bench", "examples")
# Words in "s" that are no verbs where they begin a docstring. What is a noun and a verb, such as "Counts", is not here.
NOT_VERBS = frozenset(
    """
    across always arguments bars batches bits blocks bytes codes columns eights entries errors indices its keys kernels
    layers less lines matrices methods names numbers options pairs parts passes perhaps ratios results rows
    seconds settings sometimes shares statistics steps tensors this tiers tokens totals towards values weights windows
    words
    """.split()
)


def is_verb(word):
    """Returns whether a word reads as a verb of the third person, as in "Packs"."""
    return re.fullmatch("[A-Z][a-z]*[a-rt-z]s", word) is not None and word.lower() not in NOT_VERBS


def is_property(node):
    return any(re.search(r"property$|\.getter$", ast.unparse(decorator)) for decorator in node.decorator_list)


def fault(node):
    """Returns what is wrong with a docstring, or None; a property may read as a function or as what it is."""
    text = ast.get_docstring(node)
    if not text:
        return None
    verb = is_verb(text.split()[0].rstrip(",:"))
    if isinstance(node, ast.ClassDef) and verb:
        return "a class's docstring says what it is: begin with a noun"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not verb and not is_property(node):
        return 'a function\'s docstring begins with what it does, as in "Returns"'
    if not re.search(r"\.(?=[\s)]|$)|::$", text.split("\n\n")[0]):
        return "the first sentence ends with a period"
    return None


def faults(path):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (found := fault(node)):
            line = getattr(node, "lineno", 1)
            yield f"{path.relative_to(ROOT)}:{line}: {found}: {ast.get_docstring(node).splitlines()[0]}"


def first_fault(source):
    return fault(ast.parse(source).body[0])


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    "Returns one."',
        'def f():\n    "Warns, once, of that.\\n\\n    More"',
        'class A:\n    "A block of it."',
        'class A:\n    "Rows of it."',
        'class A:\n    "Loss of it."',
        'def f():\n    "Groups layers, as in::\\n\\n    f()"',
        "def f(): pass",
        '@property\ndef f():\n    "The share of it."',
        '@functools.cached_property\ndef f():\n    "The share of it."',
    ],
)
def test_good_prose_passes(source):
    assert first_fault(source) is None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('def f():\n    "Return one."', "begins with what it does"),
        ('def f():\n    "The sum of it."', "begins with what it does"),
        ('def f():\n    "Rows of it."', "begins with what it does"),
        ('def f():\n    "``x`` is returned."', "begins with what it does"),
        ('async def f():\n    "Whether it is."', "begins with what it does"),
        ('class A:\n    "Holds a block."', "begin with a noun"),
        ('def f():\n    "Returns one"', "period"),
        ('def f():\n    "Returns one\\n\\n    Or two."', "period"),
    ],
)
def test_a_fault_is_found(source, found):
    assert found in first_fault(source)


def test_docstrings_read_alike():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {ROOT / "sparsekit" / "ops" / "nm.py", ROOT / "triton_kernels" / "nm.py"} <= {*paths}
    assert not [text for path in paths for text in faults(path)]
