"""Data sets as their authors packed them, read from the unpacked archives."""

from simclr_scale.data.sources.archives.opening import ARCHIVES, open_archive

__all__ = ["ARCHIVES", "open_archive"]
