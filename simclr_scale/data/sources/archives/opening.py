"""``archive/NAME``: a data set from its unpacked archive, in the layout that its authors gave it."""

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from simclr_scale.data.sources.archives.listing import Listing, to_source
from simclr_scale.data.sources.archives.matlab_lists import cars, flowers102
from simclr_scale.data.sources.archives.text_lists import aircraft, birdsnap, caltech101, dtd, food101, pets, sun397
from simclr_scale.data.sources.archives.voc import voc2007
from simclr_scale.data.sources.base import NotOnDisk, Source
from simclr_scale.data.sources.named_splits import SplitRequest
from simclr_scale.errors import InputError


class Archive(NamedTuple):
    """How to read a data set, and where below the root it may lie."""

    read: Callable[[str, str], Listing]
    """From the folder and the split to what its lists say."""
    marker: str
    """What lies in the folder."""
    folders: tuple[str, ...]
    """The names that it has: that of the archive, those that torchvision gives it, or none: the root itself."""
    splits: tuple[str, ...] = ("train", "test")


ARCHIVES = {
    "food101": Archive(food101, "meta", ("food-101", "")),
    "birdsnap": Archive(birdsnap, "species.txt", ("birdsnap", "")),
    "sun397": Archive(sun397, "ClassName.txt", ("SUN397", "")),
    "cars": Archive(cars, "devkit", ("stanford_cars", "cars", "")),
    "aircraft": Archive(aircraft, "data/variants.txt", ("fgvc-aircraft-2013b", ""), ("train", "val", "test")),
    "voc2007": Archive(voc2007, "ImageSets", ("VOCdevkit/VOC2007", "VOC2007", ""), ("train", "val", "test")),
    "dtd": Archive(dtd, "labels", ("dtd", "dtd/dtd", ""), ("train", "val", "test")),
    "pets": Archive(pets, "annotations", ("oxford-iiit-pet", "pets", "")),
    "caltech101": Archive(
        caltech101,
        "BACKGROUND_Google",
        ("101_ObjectCategories", "caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories", ""),
    ),
    "flowers102": Archive(flowers102, "setid.mat", ("flowers-102", "flowers102", ""), ("train", "val", "test")),
}


def open_archive(spec: str, root: str | None, request: SplitRequest, channels: int = 3) -> tuple[Source, bool]:
    """One split of a data set, and whether it is the whole data set, still to be divided.

    Args:
        spec: what the user typed, archive/NAME.
        root: the folder in which the archive was unpacked.
        request: the split.
        channels: 3 gives RGB images, 1 grey ones.

    Raises:
        InputError: the name is unknown, or the lists of the archive do not say what they should.
        NotOnDisk: the data set, a list or an image is not there.
    """
    name = spec.removeprefix("archive/")
    if name not in ARCHIVES:
        close = get_close_matches(name.lower(), ARCHIVES, n=1)
        hint = f"did you mean archive/{close[0]}?" if close else f"there are {', '.join(ARCHIVES)}"
        raise InputError(f"{spec}: there is no such archive; {hint}")
    archive = ARCHIVES[name]
    folder = _folder(spec, root, archive.marker, archive.folders)
    whole = archive.read is caltech101
    choice = request.choose(("all",) if whole else archive.splits, spec)
    try:
        listing = archive.read(folder, choice.name)
    except NotOnDisk as error:
        raise NotOnDisk(f"{spec}: {error}; is the archive unpacked in full?") from error
    return to_source(spec, folder, listing, choice.name, 1 if channels == 1 else 3), listing.whole


def _folder(spec: str, root: str | None, marker: str, folders: Sequence[str]) -> str:
    start = os.path.abspath(os.path.expanduser(root or ""))
    for folder in folders:
        place = os.path.normpath(os.path.join(start, folder))
        if os.path.exists(os.path.join(place, marker)):
            return place
    raise NotOnDisk(f"{spec}: there is no {os.path.join(folders[0], marker)} below {start}")
