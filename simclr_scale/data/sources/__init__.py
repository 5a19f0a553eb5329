"""Sources of images: map-style data sets that a short text names."""

from simclr_scale.data.sources.base import Source, SubsetSource
from simclr_scale.data.sources.opening import Split, open_source

__all__ = ["Source", "Split", "SubsetSource", "open_source"]
