"""What a training will need, before it is launched."""

from simclr_scale.scaling.plan.planning import Plan, Settings, make_plan

__all__ = ["Plan", "Settings", "make_plan"]
