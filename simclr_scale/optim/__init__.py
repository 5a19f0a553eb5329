"""Large-batch optimisation: LARS, the parameters it adapts, and the learning rate of a step."""

from simclr_scale.optim.lars import LARS
from simclr_scale.optim.param_groups import param_groups
from simclr_scale.optim.schedules import DEFAULT_BASE_LEARNING_RATE, scaled_learning_rate, warmup_cosine

__all__ = ["DEFAULT_BASE_LEARNING_RATE", "LARS", "param_groups", "scaled_learning_rate", "warmup_cosine"]
