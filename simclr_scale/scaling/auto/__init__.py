"""A recipe for images that nobody has a recipe for, from a look at them and at the machine."""

from simclr_scale.scaling.auto.choosing import Choice, Hardware, Wishes, choose
from simclr_scale.scaling.auto.looking import Look, look_at

__all__ = ["Choice", "Hardware", "Look", "Wishes", "choose", "look_at"]
