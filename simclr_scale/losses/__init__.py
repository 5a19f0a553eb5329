"""Contrastive losses: exact gradients on any number of ranks."""

from simclr_scale.losses.nt_xent import NTXentLoss, contrastive_accuracy, nt_xent

__all__ = ["NTXentLoss", "contrastive_accuracy", "nt_xent"]
