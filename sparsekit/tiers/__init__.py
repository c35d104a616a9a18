"""Progressive tiers: every block of a weight is dense, 2:4 or top-k, and is demoted step by step."""

from .demote import Demotion as Demotion
from .demote import demote as demote
from .demote import demote_together as demote_together
from .demote import demotion_costs as demotion_costs
from .demote import prune_tiers as prune_tiers
from .demote import tier_mask as tier_mask
from .fade import Fade as Fade
from .fade import fade as fade
from .files import load_tier_maps as load_tier_maps
from .files import save_tier_maps as save_tier_maps
from .iteration import IterationReport as IterationReport
from .iteration import TierOptions as TierOptions
from .iteration import tier_iteration as tier_iteration
from .progressive import progressive_tiers as progressive_tiers
from .schedule import Step as Step
from .schedule import read_schedule as read_schedule
from .tier_map import Ratios as Ratios
from .tier_map import TierMap as TierMap
