"""Progressive tiers: every block of a weight is dense, 2:4 or top-k, and is demoted step by step."""

from .demote import Demotion, demote, demote_together, demotion_costs, prune_tiers, tier_mask
from .fade import Fade, fade
from .files import load_tier_maps, save_tier_maps
from .iteration import IterationReport, TierOptions, tier_iteration
from .progressive import progressive_tiers
from .schedule import Step, read_schedule
from .tier_map import Ratios, TierMap

__all__ = [
    "Demotion",
    "Fade",
    "IterationReport",
    "Ratios",
    "Step",
    "TierMap",
    "TierOptions",
    "demote",
    "demote_together",
    "demotion_costs",
    "fade",
    "load_tier_maps",
    "progressive_tiers",
    "prune_tiers",
    "read_schedule",
    "save_tier_maps",
    "tier_iteration",
    "tier_mask",
]
