"""Contrastive losses: exact gradients on any number of ranks, in memory linear in the batch."""

from simclr_scale.losses.accuracy import contrastive_accuracy
from simclr_scale.losses.dcl import DCLLoss, DCLWLoss, dcl, dclw
from simclr_scale.losses.nt_xent import NTXentLoss, nt_xent

__all__ = ["DCLLoss", "DCLWLoss", "NTXentLoss", "contrastive_accuracy", "dcl", "dclw", "nt_xent"]
