"""Slimming: removes neurons, attention heads and stages, so that a model really becomes smaller."""

from .._packages import name_functions as _name_functions
from .gates import gate_scores
from .learn import UnitLearner, UnitReport, UnitStep
from .masking import mask_units_
from .plan import Branch, SlimPlan, Stages
from .published import mask_rows_
from .schedule import CubicSchedule
from .scores import choose_units, unit_scores
from .surgery import SlimReport, slim_, slim_plan, unslim_
from .units import Units, find_units

__all__ = [
    "Branch",
    "CubicSchedule",
    "SlimPlan",
    "SlimReport",
    "Stages",
    "UnitLearner",
    "UnitReport",
    "UnitStep",
    "Units",
    "choose_units",
    "find_units",
    "gate_scores",
    "mask_rows_",
    "mask_units_",
    "slim_",
    "slim_plan",
    "unit_scores",
    "unslim_",
]

_name_functions(__name__, "sk.slim_(model, plan, batches)")
