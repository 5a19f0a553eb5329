"""A part of the training images, for quick trials."""

import hashlib
import os

import numpy as np

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources.base import Source, SubsetSource, file_name
from simclr_scale.errors import InputError

Subset = int | float | str


def check_subset(subset: Subset | None) -> None:
    """What can be said of `data.subset` before the data set is open.

    Raises:
        InputError: it is no fraction, no count and no file.
    """
    if subset is None:
        return
    if isinstance(subset, bool) or not isinstance(subset, int | float | str):
        raise InputError(f"data.subset must be a fraction, a count or a list file, got {subset!r}")
    if isinstance(subset, int) and subset < 1:
        raise InputError(f"data.subset, a count of images, must be 1 or above, got {subset}")
    if isinstance(subset, float) and not 0 < subset <= 1:
        raise InputError(
            f"data.subset, a fraction of the images, must lie above 0 and be at most 1, got {subset}; "
            "a count is a whole number, such as 500"
        )
    if isinstance(subset, str) and not os.path.isfile(os.path.expanduser(subset)):
        raise InputError(
            f"data.subset: no list file {subset}; else it is a fraction such as 0.1, or a count such as 500"
        )


def take_subset(source: Source, subset: Subset | None, seed: int) -> Source:
    """The chosen part of `source`, in its order; `source` itself for None.

    Args:
        source: N images.
        subset: a fraction of them above 0 and up to 1; a count; or a file that lists one image a line, by its number in
            `source` (from 0) or by its name: the path within the data set, or the last part of it where only one image
            has that.
        seed: of the choice. Of one seed, a smaller choice is contained in a larger. Each class has its share, and at
            least one image where the count reaches; images without label are a class of their own.

    Raises:
        InputError: more images are asked for than there are, or the list names an image twice or one that is not there.
    """
    if subset is None:
        return source
    check_subset(subset)
    if isinstance(subset, str):
        return _listed(source, os.path.expanduser(subset))
    if isinstance(subset, int) and subset > len(source):
        raise InputError(f"data.subset {subset}: {source.name} has {len(source)} training images")
    count = subset if isinstance(subset, int) else max(1, int(subset * len(source) + 0.5))
    chosen = np.sort(balanced_order(source.labels, seed)[:count])
    balanced = "class-balanced, " if (source.labels >= 0).any() else ""
    description = f"subset {subset} ({count} images, {balanced}seed {seed}) of {source.split_description}"
    return SubsetSource(source, chosen, description)


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order of N images whose every beginning has each class in proportion, to less than one image.

    Within a class of n images, the one that a shuffle puts at k = 0, 1, ... comes at k / n of the whole.

    Args:
        labels: (N,) integers; those below 0 are one class.
        seed: 0 or above.

    Returns:
        (N,) int64, a permutation.
    """
    labels = np.maximum(labels, -1)
    place = np.empty(labels.size)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # The raw stream, which NumPy promises to keep; its permutation() may change between releases.
        raw = generator(Purpose.SUBSET, seed, 0, int(label) + 1).bit_generator.random_raw(members.size)
        place[members[np.argsort(raw, kind="stable")]] = np.arange(members.size) / members.size
    # Where classes meet at one place, as all do at 0, none is to be first each time.
    ties = generator(Purpose.SUBSET, seed, 1, 0).bit_generator.random_raw(labels.size)
    return np.lexsort((ties, place))


def listed_images(source: Source, path: str, option: str = "data.subset") -> tuple[np.ndarray, bytes]:
    """The images that a file lists, one a line, by number or name as `take_subset` says, and the file's content.

    Args:
        source: whose images they are.
        path: the file.
        option: what the user calls the list, for messages.

    Returns:
        Indices into `source`, (n,) int64 in the order of the list, and the bytes of the file.

    Raises:
        InputError: the file cannot be read, lists nothing, an image twice or one that is not there.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option}: {path} cannot be read as a list of images ({error})") from error
    by_name = _names(source) if any(line.strip() and not _is_number(line) for line in lines) else {}
    first_line: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        index = int(entry) if _is_number(entry) else by_name.get(entry.replace(os.sep, "/"))
        if index is None or not 0 <= index < len(source):
            raise InputError(f"{path}, line {number}: {_why_unknown(source, entry, by_name)}")
        if index in first_line:
            raise InputError(f"{path}, line {number}: {entry!r} is the image of line {first_line[index]} again")
        first_line[index] = number
    if not first_line:
        raise InputError(f"{option}: {path} lists no image")
    return np.fromiter(first_line, np.int64), content


def _listed(source: Source, path: str) -> Source:
    indices, content = listed_images(source, path)
    checksum = hashlib.sha256(content).hexdigest()[:12]
    description = (
        f"subset of {len(indices)} images listed in {os.path.basename(path)} (sha256 {checksum}...) "
        f"of {source.split_description}"
    )
    return SubsetSource(source, np.sort(indices), description)


def _is_number(entry: str) -> bool:
    return entry.strip().isascii() and entry.strip().isdigit() and len(entry.strip()) < 19


def _names(source: Source) -> dict[str, int]:
    """The image of every path within the data set, and of the last part of it; -1 where several have that."""
    full: dict[str, int] = {}
    last: dict[str, int] = {}
    for index in range(len(source)):
        name = file_name(source, index)
        if name:
            full[name] = -1 if name in full else index
            base = name.rpartition("/")[2]
            last[base] = -1 if base in last else index
    return last | full


def _why_unknown(source: Source, entry: str, by_name: dict[str, int]) -> str:
    if _is_number(entry):
        return f"no image {entry}; the training images of {source.name} are 0 to {len(source) - 1}"
    if entry in by_name:
        return f"{entry!r} is the name of several images of {source.name}; give paths within the data set, or numbers"
    if not by_name:
        return f"{entry!r} is a name, but images of {source.name} have none; list their numbers"
    return f"no training image {entry!r} in {source.name}; one is called {next(iter(by_name))!r}"
