"""Images: sources, their order, every random draw, and the augmentation.

``SimCLRDataModule`` is in ``simclr_scale.data.datamodule``, apart from the rest because it needs Lightning.
"""

from simclr_scale.data import forking as forking  # from here on, forked at rest
from simclr_scale.data.sources import Source, open_source

__all__ = ["Source", "open_source"]
