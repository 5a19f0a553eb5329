"""Losses of two views: exact gradients on any number of ranks, in memory linear in the batch."""

from simclr_scale.losses.accuracy import contrastive_accuracy
from simclr_scale.losses.barlow_twins import BarlowTwinsLoss, barlow_twins
from simclr_scale.losses.dcl import DCLLoss, DCLWLoss, dcl, dclw
from simclr_scale.losses.grouped import GroupedNegatives, couples_ranks
from simclr_scale.losses.nt_xent import NTXentLoss, nt_xent
from simclr_scale.losses.sigmoid import SigmoidLoss, sigmoid_pairs
from simclr_scale.losses.spectral import SpectralContrastiveLoss, spectral_contrastive
from simclr_scale.losses.vicreg import VICRegLoss, vicreg

__all__ = [
    "BarlowTwinsLoss",
    "DCLLoss",
    "DCLWLoss",
    "GroupedNegatives",
    "NTXentLoss",
    "SigmoidLoss",
    "SpectralContrastiveLoss",
    "VICRegLoss",
    "barlow_twins",
    "contrastive_accuracy",
    "couples_ranks",
    "dcl",
    "dclw",
    "nt_xent",
    "sigmoid_pairs",
    "spectral_contrastive",
    "vicreg",
]
