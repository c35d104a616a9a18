"""Tables of text: numbers end at one column, text begins at one, and a long last column goes on below itself."""

import pytest

from sparsekit._table import table_lines


def test_numbers_are_right_aligned():
    rows = [("name", "count", "share"), ("first", "7", "1.00"), ("b", "1,024", "0.5")]
    assert table_lines(rows, "<>>") == [
        "name   count  share",
        "first      7   1.00",
        "b      1,024    0.5",
    ]


def test_text_has_no_trailing_spaces():
    assert table_lines([("name", "why"), ("a", ""), ("long name", "too small")], "<<") == [
        "name       why",
        "a",
        "long name  too small",
    ]


def test_a_long_last_column_is_wrapped():
    words = [f"word{number}" for number in range(40)]
    head, first, *more = table_lines([("name", "2", "why"), ("layer", "10", " ".join(words))], "<><")
    assert head == "name    2  why" and first.startswith("layer  10  word0 word1") and len(more) == 2
    assert all(line.startswith(" " * 11 + "word") for line in more)
    assert max(map(len, [first, *more])) <= 118
    assert [*first.split()[2:], *" ".join(more).split()] == words


def test_a_wrapped_column_keeps_some_width():
    lines = table_lines([("n" * 110, "a sentence that is longer than thirty characters")], "<<")
    assert [len(line) for line in lines] == [
        112 + len("a sentence that is longer than"),
        112 + len("thirty characters"),
    ]


@pytest.mark.parametrize("align", ["<", "<>>"])
def test_every_column_has_an_alignment(align):
    with pytest.raises(ValueError, match="zip"):
        table_lines([("name", "why")], align)
