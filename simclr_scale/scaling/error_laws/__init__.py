"""Scaling laws: the error of an encoder against its parameters, its images or the arithmetic of its training."""

from simclr_scale.scaling.error_laws.fitting import LawFit, fit_law
from simclr_scale.scaling.error_laws.forms import FORMS, Form

__all__ = ["FORMS", "Form", "LawFit", "fit_law"]
