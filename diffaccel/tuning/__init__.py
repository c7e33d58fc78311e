"""Plans for a model and a budget: ``diffaccel tune``, and ``pipe.to(accel="auto")``."""

from .auto import Auto
from .plan import Plan, PlanError

__all__ = ["Auto", "Plan", "PlanError"]
