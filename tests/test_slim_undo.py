"""``slim_`` and its kin, interrupted anywhere, do all that they do or nothing."""

import pytest
from interrupts import assert_all_or_nothing, model_state
from slimming import plain

import sparsekit as sk
from sparsekit.slim import mask_rows_, mask_units_, slim_, unslim_

MODEL, BATCH = plain()
UNITS = sk.find_units(MODEL, BATCH)
PLAN = UNITS.keep({"2": range(2, 12), "4": [0, 3, 4, 8]})


def slimmed():
    model = plain()[0]
    slim_(model, PLAN)
    return (model,)


CALLS = {
    "find_units": (lambda: (plain()[0],), lambda model: sk.find_units(model, BATCH)),
    "slim_": (lambda: (plain()[0],), lambda model: slim_(model, PLAN, [BATCH])),
    "unslim_": (slimmed, unslim_),
    "mask_units_": (lambda: (plain()[0],), lambda model: mask_units_(model, PLAN)),
    "mask_rows_": (lambda: (plain()[0].float(),), lambda model: mask_rows_(model, 0.4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line(name):
    make, act = CALLS[name]
    assert_all_or_nothing(make, act, runs=40)


def test_finding_units_changes_nothing():
    model = plain()[0].train()
    before = model_state(model)
    sk.find_units(model, BATCH)
    after = model_state(model)
    assert before.keys() == after.keys() and all(str(before[key]) == str(after[key]) for key in before)
