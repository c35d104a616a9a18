"""Slimming: removes neurons, attention heads and stages, so that a model really becomes smaller."""

from .._packages import name_functions as _name_functions
from .masking import mask_units_
from .plan import Branch, SlimPlan, Stages
from .surgery import SlimReport, slim_, slim_plan, unslim_
from .units import Units, find_units

__all__ = [
    "Branch",
    "SlimPlan",
    "SlimReport",
    "Stages",
    "Units",
    "find_units",
    "mask_units_",
    "slim_",
    "slim_plan",
    "unslim_",
]

_name_functions(__name__, "sk.slim_(model, plan, batches)")
