"""Where the images of a WebDataset shard lie: its tar headers, read once and kept."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from simclr_scale.data.sources.array_files import ArrayFileError, read_arrays, write_arrays
from simclr_scale.data.sources.folders import IMAGE_EXTENSIONS
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.errors import InputError

BLOCK = tarfile.BLOCKSIZE
_VERSION = 1
_LABEL_EXTENSIONS = ("cls", "label", "json", "txt")
_LABEL_FIELDS = ("label", "cls", "class", "class_id")
_PICKLED = ("pyd", "pkl", "pickle", "pth", "pt")
_LARGEST_LABEL = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Beside tarfile's own errors, what it raises on headers that lie.
_BAD_HEADERS = (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError)


@dataclass(frozen=True)
class Keys:
    """Which members of a sample are its image and its label, where the user says so (an extension each)."""

    image: str | None = None
    label: str | None = None


@dataclass
class ShardTable:
    """The images of one shard, N of them, in the order of the shard.

    Attributes:
        names: of the image members.
        offsets: (N,) int64, where each member's bytes begin in the shard.
        sizes: (N,) int64, how many there are.
        labels: as written in the shard; empty where there is none.
    """

    names: PackedNames
    offsets: np.ndarray
    sizes: np.ndarray
    labels: PackedNames


def index_shard(path: str, keys: Keys) -> ShardTable:
    """The table of a shard, from the file where it was kept before if that still fits, else from its headers.

    It is kept beside the shard in ``.simclr_scale/``, or in the user's cache folder where that cannot be written.

    Raises:
        InputError: the shard cannot be read, is damaged or compressed, or a sample has several images.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    stamp = json.dumps([_VERSION, status.st_size, status.st_mtime_ns, keys.image, keys.label])
    places = [
        os.path.join(os.path.dirname(path), ".simclr_scale", f"{os.path.basename(path)}.npz"),
        os.path.join(_user_cache(), f"{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()}.npz"),
    ]
    for place in places:
        table = _kept(place, stamp, status.st_size)
        if table is not None:
            return table
    table = scan_shard(path, keys)
    for place in places:
        if _keep(place, stamp, table):
            break
    return table


def scan_shard(path: str, keys: Keys = Keys()) -> ShardTable:
    """The table of a shard from its headers; the images are not read."""
    samples: list[_Sample] = []
    current: dict[str, _Sample] = {}
    with open(path, "rb") as file:
        for member in _members(path, file):
            key, extension = split_name(member.name)
            if not key or not extension:
                continue
            sample = current.get(key)
            # A name that comes again begins another sample, as nothing may be lost.
            if sample is None or extension in sample.members:
                sample = current[key] = _Sample({})
                samples.append(sample)
            sample.members[extension] = member
        names, offsets, sizes, labels = [], [], [], []
        for sample in samples:
            image = _image_member(sample, keys, path)
            if image is None:
                continue
            names.append(image.name)
            offsets.append(image.offset_data)
            sizes.append(image.size)
            labels.append(_label(sample, keys, path, file))
    return ShardTable(
        PackedNames(names), np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64), PackedNames(labels)
    )


def split_name(name: str) -> tuple[str, str]:
    """The key of a member, up to the first dot of its base name, and its extension in lower case (WebDataset's rule).

    Both are empty for hidden files, such as those that macOS adds to archives.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else ("", "")


@dataclass
class _Sample:
    members: dict[str, tarfile.TarInfo]


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members that are whole files. Raises InputError unless the archive is sound to its end."""
    start = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise InputError(f"{path}: is compressed ({kind}), which gives no access by an index; unpack it to a .tar")
    length = os.fstat(file.fileno()).st_size
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        last = -1
        while (member := tar.next()) is not None:
            # Headers that point backwards would be read for ever.
            if not last < member.offset < member.offset_data or member.size < 0:
                raise InputError(f"{path}: damaged at byte {member.offset}; no tar header there")
            if member.offset_data + member.size > length:
                raise InputError(
                    f"{path}: truncated in member {member.name!r}: it ends at byte {length} of at least "
                    f"{member.offset_data + member.size}; copy the shard anew"
                )
            last = member.offset
            if member.isreg() and not member.issparse():
                yield member
            elif not member.isdir() and split_name(member.name)[1].rpartition(".")[2] in _image_extensions():
                raise InputError(
                    f"{path}: member {member.name!r} is a link or a sparse file, not a whole one; "
                    "pack it with tar --hard-dereference --dereference"
                )
        end = tar.offset
    except _BAD_HEADERS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable tar file ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    # tarfile takes a damaged header, and a missing one, for the end.
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise InputError(f"{path}: truncated at byte {length}: the mark that ends a tar file is missing")
    if block.strip(b"\0"):
        raise InputError(f"{path}: damaged at byte {end}; no tar header there")


def _image_extensions() -> tuple[str, ...]:
    return tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)


def _image_member(sample: _Sample, keys: Keys, path: str) -> tarfile.TarInfo | None:
    if keys.image is not None:
        return sample.members.get(keys.image.lower().removeprefix("."))
    images = [key for key in sample.members if key.rpartition(".")[2] in _image_extensions()]
    if len(images) > 1:
        name = sample.members[images[0]].name
        raise InputError(
            f"{path}: sample {split_name(name)[0]!r} has the images {', '.join(images)}; name one by data.image_key"
        )
    return sample.members[images[0]] if images else None


def _label(sample: _Sample, keys: Keys, path: str, file: BinaryIO) -> str:
    """What the sample's label member says, empty for nothing."""
    if keys.label == "":
        return ""
    if keys.label is not None:
        wanted = keys.label.lower().removeprefix(".")
        if wanted.rpartition(".")[2] in _PICKLED:
            raise InputError(f"{path}: label_key {keys.label!r} names pickled members, which are never opened")
        if wanted in sample.members:
            text = _text(sample.members[wanted], path, file)
            return _from_json(text, _LABEL_FIELDS) if wanted.rpartition(".")[2] == "json" else text
        return _from_json(_text(sample.members["json"], path, file), (keys.label,)) if "json" in sample.members else ""
    for extension in _LABEL_EXTENSIONS:
        if extension in sample.members:
            text = _text(sample.members[extension], path, file)
            if extension == "json":
                text = _from_json(text, _LABEL_FIELDS)
            # Text is a caption more often than a class.
            if text and (extension != "txt" or text.removeprefix("-").isdecimal()):
                return text
    return ""


def _text(member: tarfile.TarInfo, path: str, file: BinaryIO) -> str:
    if member.size > _LARGEST_LABEL:
        raise InputError(f"{path}: member {member.name!r} is too large for a label ({member.size} bytes)")
    file.seek(member.offset_data)
    try:
        return file.read(member.size).decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: member {member.name!r} is not text, so it holds no label") from error


def _from_json(text: str, fields: tuple[str, ...]) -> str:
    """The first of the fields that holds a number or a name. What is not JSON has none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if isinstance(record, int | str):
        return str(record)
    values = [record.get(field) for field in fields] if isinstance(record, dict) else []
    return next((str(value).strip() for value in values if isinstance(value, int | str)), "")


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "simclr_scale", "shards")


def _keep(place: str, stamp: str, table: ShardTable) -> bool:
    """Whether the table could be written there."""
    names, name_ends = table.names.to_arrays()
    labels, label_ends = table.labels.to_arrays()
    arrays = {
        "stamp": np.frombuffer(stamp.encode(), dtype=np.uint8),
        "names": names,
        "name_ends": name_ends,
        "labels": labels,
        "label_ends": label_ends,
        "offsets": table.offsets,
        "sizes": table.sizes,
    }
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        write_arrays(place, arrays)
    except OSError:
        return False
    return True


def _kept(place: str, stamp: str, length: int) -> ShardTable | None:
    """The table that was written there, if it is of this state of the shard and makes sense."""
    if not os.path.isfile(place):
        return None
    try:
        arrays = read_arrays(place)
        if arrays["stamp"].tobytes() != stamp.encode():
            return None
        table = ShardTable(
            PackedNames.from_arrays(arrays["names"], arrays["name_ends"]),
            arrays["offsets"],
            arrays["sizes"],
            PackedNames.from_arrays(arrays["labels"], arrays["label_ends"]),
        )
        counts = {table.offsets.shape, table.sizes.shape, (len(table.names),), (len(table.labels),)}
        numbers = table.offsets.dtype == table.sizes.dtype == np.int64
        return table if numbers and len(counts) == 1 and images_fit(table.offsets, table.sizes, length) else None
    except (ArrayFileError, InputError, KeyError):
        return None


def images_fit(offsets: np.ndarray, sizes: np.ndarray, length: int) -> bool:
    """Whether images of (N,) `sizes` at `offsets` lie within a shard of `length` bytes."""
    return bool((offsets >= BLOCK).all() and (sizes >= 0).all() and (sizes <= length - offsets).all())
