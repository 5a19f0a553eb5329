"""WebDataset shards, read map-style: any image by its number, so that an order is global and a resume exact."""

import glob
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from simclr_scale.data.sources.base import Source, digest, label_bytes
from simclr_scale.data.sources.grey import decode
from simclr_scale.data.sources.named_splits import SplitRequest, has_train_and_test, is_split_name, is_train_name
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.data.sources.shard_reader import ShardReader
from simclr_scale.data.sources.tar_index import Keys, ShardTable, index_shard
from simclr_scale.errors import InputError

_MOST_SHARDS = 1 << 20


class ShardSource:
    """Images in tar shards. `open_shards` makes them.

    Args:
        name: what the user typed.
        paths: of the shards.
        shards: (N,) int32, in which of them each image lies.
        offsets: (N,) int64, where its bytes begin.
        sizes: (N,) int64, how many they are.
        names: the N names of the images within the data set.
        labels: (N,) int64, -1 for none.
        classes: their names.
        split_description: for the manifest.
        channels: 3 decodes images to RGB, 1 to grey.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        shards: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        names: PackedNames,
        labels: np.ndarray,
        classes: tuple[str, ...],
        split_description: str,
        channels: int = 3,
    ) -> None:
        self.name = name
        self.labels = labels
        self.classes = classes
        self.split_description = split_description
        self.channels = channels
        self._reader = ShardReader(paths)
        self._shards = shards.astype(np.int32)
        self._offsets, self._sizes = offsets.astype(np.int64), sizes.astype(np.int64)
        self._names = names

    def __len__(self) -> int:
        return self._offsets.size

    def image(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self.encoded(index)), self.describe(index), self.channels)

    def encoded(self, index: int) -> bytes:
        return self._reader.read(int(self._shards[index]), int(self._offsets[index]), int(self._sizes[index]))

    def fingerprint(self) -> str:
        """Over the name, size and class of every image; their content is not read."""
        text, ends = self._names.to_arrays()
        names = text.tobytes() + ends.astype("<i8").tobytes()
        return digest([label_bytes(self.labels, self.classes), names, self._sizes.astype("<i8").tobytes()])

    def describe(self, index: int) -> str:
        return f"{self._reader.paths[self._shards[index]]}, member {self.file_name(index)}"

    def file_name(self, index: int) -> str:
        return self._names[index]


def open_shards(
    name: str,
    pattern: str,
    root: str,
    request: SplitRequest,
    image_key: str | None,
    label_key: str | None,
    channels: int = 3,
) -> tuple[Source, bool]:
    """One split of WebDataset shards, and whether it is the whole data set, still to be divided.

    A shard belongs to the split that a folder of it or a part of its name says (``train/000.tar``,
    ``imagenet1k-validation-07.tar``), else to one called as its folder or as its name without the number. A set with a
    train and a test (or validation) split is read by them; any other is one.

    Args:
        name: what the user typed, for messages.
        pattern: a folder, or paths with braces (``{000..127}``, ``{train,val}``) and wildcards, also several, joined
            by ``::``.
        root: what relative paths begin at.
        request: the split.
        image_key: extension of the image members; by default those of image files.
        label_key: extension of the label members, or field of the JSON members; by default ``cls``, ``label``, a field
            ``label``, ``cls``, ``class`` or ``class_id`` of ``json``, or a number in ``txt``. Empty for no labels.
        channels: 1 decodes images to grey, else to RGB.

    Raises:
        InputError: a stream, no shards, a damaged shard, no images, or not the split asked for.
    """
    shards = find_shards(name, pattern, root)
    by_split: dict[str, list[str]] = {}
    for path, relative in shards:
        by_split.setdefault(split_of(relative), []).append(path)
    splits = sorted(by_split)
    if request.named or has_train_and_test(splits) or (len(splits) == 1 and is_train_name(splits[0])):
        choice = request.choose(splits, name)
        whole, parts, chosen, description = choice.whole, choice.parts, [choice.name], f"shards {choice.name}"
    else:
        whole, parts, chosen, description = True, tuple(splits), splits, "all shards"
    keys = Keys(image_key, label_key)
    tables = {path: index_shard(path, keys) for part in parts for path in by_split[part]}
    paths = [path for part in chosen for path in by_split[part]]
    used = [tables[path] for path in paths]
    count = sum(table.offsets.size for table in used)
    if not count:
        raise InputError(f"{name}: {len(paths)} shards, but no image in them ({paths[0]} and the like)")
    labels, classes = _classes(used, tables.values())
    source = ShardSource(
        name,
        paths,
        np.repeat(np.arange(len(used)), [table.offsets.size for table in used]),
        np.concatenate([table.offsets for table in used]),
        np.concatenate([table.sizes for table in used]),
        PackedNames(itertools.chain.from_iterable(table.names for table in used)),
        labels,
        classes,
        description,
        1 if channels == 1 else 3,
    )
    return source, whole


def find_shards(name: str, pattern: str, root: str) -> list[tuple[str, str]]:
    """Absolute paths of the shards, and the parts of them that may tell the split, in the order of the pattern.

    Raises:
        InputError: the pattern is a stream, or names a file that does not exist, or nothing.
    """
    found: dict[str, str] = {}
    for part in pattern.split("::"):
        refuse_stream(name, part)
        for piece in expand_braces(part, name):
            path = os.path.join(root, os.path.expanduser(piece))
            for shard, relative in _matches(name, path):
                found.setdefault(shard, relative)
    if not found:
        raise InputError(f"{name}: no .tar file there; after wds/ comes a folder of shards or a pattern of their paths")
    return list(found.items())


def _matches(name: str, path: str) -> Iterator[tuple[str, str]]:
    path = os.path.abspath(path)
    if os.path.isdir(path):
        for shard in sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.tar"), recursive=True)):
            yield shard, os.path.relpath(shard, path).replace(os.sep, "/")
        return
    if glob.has_magic(path) and not os.path.exists(path):
        fixed = path.split("*")[0].split("?")[0].split("[")[0].rpartition(os.sep)[0]
        for shard in sorted(glob.glob(path, recursive=True)):
            if os.path.isfile(shard):
                yield shard, os.path.relpath(shard, fixed).replace(os.sep, "/")
        return
    if not os.path.isfile(path):
        raise InputError(f"{name}: no shard {path}")
    # The folder may be one of several that braces name.
    yield path, "/".join(path.split(os.sep)[-2:])


def split_of(relative: str) -> str:
    """The split that the path of a shard tells."""
    *folders, base = relative.split("/")
    stem = base.removesuffix(".tar")
    for folder in folders:
        if is_split_name(folder):
            return folder
    for token in re.split(r"[-_.]", stem):
        if is_split_name(token.rstrip("0123456789")):
            return token.rstrip("0123456789")
    return re.sub(r"[-_.]*\d+$", "", stem)


def refuse_stream(name: str, pattern: str) -> None:
    """Raises InputError for a command or an address."""
    scheme = re.match(r"\s*(pipe:|[a-z][a-z0-9+.-]*://|-$)", pattern, flags=re.IGNORECASE)
    if scheme is None:
        return
    kind = "runs a command" if scheme[1].lower() == "pipe:" else "is a stream"
    raise InputError(
        f"{name}: {pattern.strip()!r} {kind}; shards are read from local files only, as a shuffle of the whole set and "
        "an exact resume need an index, which a stream has not; copy the shards to a disk"
    )


def expand_braces(pattern: str, name: str) -> Iterator[str]:
    """As bash does: ``{a,b}`` and ``{000..127}``, also several of them. A brace of neither kind stays as it is.

    Raises:
        InputError: more than a million shards.
    """
    pieces: list[list[str]] = []
    position, number = 0, 1
    for match in re.finditer(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern):
        pieces.append([pattern[position : match.start()]])
        if match[3] is not None:
            options = match[3].split(",")
        else:
            first, last = int(match[1]), int(match[2])
            width = len(match[1]) if match[1].startswith("0") or match[2].startswith("0") else 0
            if abs(last - first) >= _MOST_SHARDS:
                raise InputError(f"{name}: {match[0]} names more than {_MOST_SHARDS} shards")
            step = 1 if last >= first else -1
            options = [f"{value:0{width}}" for value in range(first, last + step, step)]
        number *= len(options)
        if number > _MOST_SHARDS:
            raise InputError(f"{name}: names more than {_MOST_SHARDS} shards")
        pieces.append(options)
        position = match.end()
    pieces.append([pattern[position:]])
    return map("".join, itertools.product(*pieces))


def _classes(used: Sequence[ShardTable], tables: Iterable[ShardTable]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) int64 labels of the used tables, and the classes that occur in any; numbers in their order, else names."""
    occurring = {text for table in tables for text in table.labels if not _says_nothing(text)}
    as_numbers = all(_is_number(text) for text in occurring)
    names = sorted(occurring, key=(lambda text: (int(text), text)) if as_numbers else None)
    # 007 and 7 are one class.
    values = {text: str(int(text)) if as_numbers else text for text in names}
    classes = tuple(dict.fromkeys(values.values()))
    position = {value: index for index, value in enumerate(classes)}
    number = {text: position[value] for text, value in values.items()}
    labels = [number.get(text, -1) for table in used for text in table.labels]
    return np.array(labels, dtype=np.int64), classes


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", text, flags=re.ASCII) is not None


def _says_nothing(text: str) -> bool:
    """No label, or the number below 0 that stands for none."""
    return not text or (_is_number(text) and int(text) < 0)
