"""The schedule file: every column is honored, every mistake has a line number."""

import pytest

from sparsekit.tiers import Ratios, Step, read_schedule
from sparsekit.tiers.schedule import parse_schedule

HEADER = "iteration,dense,mid_2_4,topk,dense_to_2_4,mid_2_4_to_topk,epochs"


def parse(*lines, header=HEADER):
    return parse_schedule([header, *lines], "plan.csv")


def test_reads_every_column(tmp_path):
    path = tmp_path / "plan.csv"
    path.write_text(f"{HEADER}\r\n1, .90,.10,.00,.10,.00,2\r\n\r\n2,.80,.10,.10,.10,.10,0.5\r\n")
    assert read_schedule(path) == (
        Step(1, Ratios(0.9, 0.1, 0.0), 0.1, 0.0, 2.0),
        Step(2, Ratios(0.8, 0.1, 0.1), 0.1, 0.1, 0.5),
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,.9,.1,0,.1,0"], "line 2: 7 values are needed, got 6"),
        (["1,.9,.1,zero,.1,0,2"], "line 2: topk must be a number from 0 on, got 'zero'"),
        (["1,.9,.1,-.1,.1,0,2"], "line 2: topk must be a number from 0 on, got '-.1'"),
        (["1,.9,.1,0,.1,0,inf"], "line 2: epochs must be a number from 0 on, got 'inf'"),
        (["1,1.9,.1,0,.1,0,2"], "line 2: dense must be a share from 0 to 1, got 1.9"),
        (["2,.9,.1,0,.1,0,2"], "line 2: iteration must be 1, got 2"),
        (["1,.9,.1,0,.1,0,2", "1.5,.9,.1,0,0,0,2"], "line 3: iteration must be 2, got 1.5"),
        (["1,.9,.2,0,.1,0,2"], "line 2: dense, mid_2_4 and topk must add up to 1, got 1.1"),
        (["1,.9,.1,0,.1,0,2", "", "2,.95,.05,0,0,0,2"], "line 4: blocks are only ever demoted: dense cannot grow"),
        (["1,.8,.1,.1,.2,.1,2", "2,.8,.15,.05,0,0,2"], "line 3: blocks are only ever demoted"),
        (["1,.9,.1,0,.2,0,2"], "line 2: dense_to_2_4 must be 0.1, what the shares move by, got 0.2"),
        (["1,.9,.0,.1,.1,0,2"], "line 2: mid_2_4_to_topk must be 0.1, what the shares move by, got 0"),
        ([], "there is no iteration in it"),
    ],
)
def test_a_bad_row_is_named(lines, message):
    with pytest.raises(ValueError, match=f"plan.csv(, |: ){message}"):
        parse(*lines)


def test_a_bad_header_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"plan.csv, line 1: the columns must be iteration,.*, got iteration,dense"):
        parse("1,.9", header="iteration,dense")
    with pytest.raises(ValueError, match="line 1: the columns must be"):
        parse_schedule([], "plan.csv")
    with pytest.raises(FileNotFoundError):
        read_schedule(tmp_path / "none.csv")
