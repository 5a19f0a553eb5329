"""A rank that dies or hangs ends the run on all others: within a time limit, in one line that names it."""

from simclr_scale.pretraining.lost_ranks.callback import RankProgress, report_progress
from simclr_scale.pretraining.lost_ranks.lightning import WatchedRanks
from simclr_scale.pretraining.lost_ranks.limits import DEFAULT_TIMEOUT, Limits

__all__ = ["DEFAULT_TIMEOUT", "Limits", "RankProgress", "WatchedRanks", "report_progress"]
