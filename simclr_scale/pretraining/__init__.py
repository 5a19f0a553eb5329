"""Training: the LightningModule and what surrounds a run."""

from simclr_scale.pretraining.simclr import SimCLR

__all__ = ["SimCLR"]
