"""Packs a data set into the format of `simclr_scale.data.sources.packed`, and goes on after a kill.

Whatever the number of workers and however often the work was broken off, the files are the same, byte for byte: which
image lies where is settled before the first is read. A shard is written in ``.unfinished/`` and moved into place, and
only then its record is written there, with its checksum; a shard without a record, or of another checksum, is made
again. At the end the records become the index, and ``.unfinished/`` goes.
"""

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from simclr_scale.data.packed_images import encode, pack_image
from simclr_scale.data.sources.array_files import replacing, write_arrays
from simclr_scale.data.sources.base import Source, encoded_image, file_name
from simclr_scale.data.sources.decoding import UNREADABLE, reason_of
from simclr_scale.data.sources.packed import (
    BAD_FILES,
    FORMAT,
    IMAGES,
    INDEX,
    UNFINISHED,
    VERSION,
    Index,
    file_sha256,
    is_packed,
    read_index,
)
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.data.sources.tar_index import BLOCK
from simclr_scale.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

_PLAN = "plan.json"
_LOCK = "lock"
_IMAGES_A_REQUEST = 8


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Attributes:
        size: longest that the shorter side of an image may be, in pixels.
        quality: of the JPEGs, 1 to 95.
        lossless: PNGs instead.
        images_per_shard: those that could be read and those that could not.

    Raises:
        InputError: a value is out of range.
    """

    size: int = 256
    quality: int = 90
    lossless: bool = False
    images_per_shard: int = 1000

    def __post_init__(self) -> None:
        limits = {"size": (8, 1 << 14), "quality": (1, 95), "images_per_shard": (1, 1 << 20)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"--{name} must be from {least} to {most}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Report:
    """What a folder holds after packing.

    Attributes:
        images: that are packed.
        unreadable: that could not be.
        shards: their number.
        found: how many of these were there already, whole.
        bytes: of all shards.
    """

    images: int
    unreadable: int
    shards: int
    found: int
    bytes: int


class Shard(NamedTuple):
    """One shard of the plan: the images `start` to `stop` of a split."""

    name: str
    split: str
    start: int
    stop: int


class Unreadable(NamedTuple):
    """An image that could not be packed."""

    place: str
    reason: str


class Packed(NamedTuple):
    """An image as it is packed."""

    content: bytes
    extension: str


def pack(
    parts: dict[str, Source],
    folder: str,
    packing: Packing,
    *,
    spec: str,
    num_workers: int = 0,
    progress: Callable[[int, int, int], None] = lambda done, total, unreadable: None,
) -> Report:
    """Pack the parts of a data set into `folder`.

    Args:
        parts: what `open_parts` gave.
        folder: a new or empty folder, or one that holds a part or all of the same work.
        packing: the settings.
        spec: the data set as the user typed it.
        num_workers: processes that decode and encode.
        progress: is told after every few images how many of how many are done, and how many were unreadable.

    Raises:
        InputError: the folder holds something else or cannot be written, another process is packing into it, the images
            are arrays, no image can be read, or a worker was killed.
    """
    for source in parts.values():
        if not len(source):
            raise InputError(f"{spec}: {source.split_description} holds no image")
        if encoded_image(source, 0) is None and not isinstance(source.image(0), Image.Image):
            raise InputError(f"{spec}: its images are arrays, which need no decoding; train on them as they are")
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "source": spec,
        "settings": asdict(packing),
        "classes": list(next(iter(parts.values())).classes),
        "splits": {
            split: {
                "images": len(source),
                "description": source.split_description,
                "fingerprint": source.fingerprint(),
            }
            for split, source in parts.items()
        },
    }
    try:
        with _Workplace(folder, plan) as workplace:
            return _pack(parts, workplace, plan, packing, num_workers, progress)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error


def _pack(
    parts: dict[str, Source],
    workplace: "_Workplace",
    plan: dict[str, Any],
    packing: Packing,
    num_workers: int,
    progress: Callable[[int, int, int], None],
) -> Report:
    shards = [shard for split, source in parts.items() for shard in _shards(split, len(source), packing)]
    records: dict[str, dict[str, Any] | None] = {shard.name: workplace.record(shard.name) for shard in shards}
    missing = [shard for shard in shards if records[shard.name] is None]
    found = len(shards) - len(missing)
    total = sum(map(len, parts.values()))
    done = total - sum(shard.stop - shard.start for shard in missing)
    unreadable = sum(len(record["unreadable"]) for record in records.values() if record is not None)
    progress(done, total, unreadable)
    for split, source in parts.items():
        of_split = [shard for shard in missing if shard.split == split]
        results = _results(source, packing, of_split, num_workers)
        for shard in of_split:
            with workplace.writing(shard.name) as writer:
                for position, result in islice(results, shard.stop - shard.start):
                    label = int(source.labels[position])
                    if isinstance(result, Unreadable):
                        writer.skip(position, label, file_name(source, position), result)
                        unreadable += 1
                    else:
                        writer.add(position, label, file_name(source, position), result)
                    done += 1
                    if done % _IMAGES_A_REQUEST == 0:
                        progress(done, total, unreadable)
            records[shard.name] = writer.record
    progress(done, total, unreadable)
    if unreadable == total:
        raise InputError(f"{plan['source']}: none of its {total} images can be read")
    complete = [record for record in records.values() if record is not None]
    workplace.finish(plan, shards, complete)
    size = sum(record["bytes"] for record in complete)
    return Report(total - unreadable, unreadable, len(shards), found, size)


def _shards(split: str, length: int, packing: Packing) -> Iterator[Shard]:
    step = packing.images_per_shard
    for number, start in enumerate(range(0, length, step)):
        yield Shard(f"{split}-{number:06}.tar", split, start, min(start + step, length))


class _PackedImages:
    """Packs images of a source where they are asked for: in the workers of a loader, which takes it for a data set."""

    def __init__(self, source: Source, packing: Packing) -> None:
        self._source, self._packing = source, packing

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[int, Packed | Unreadable]]:
        return [(position, self._pack(position)) for position in positions]

    def _pack(self, position: int) -> Packed | Unreadable:
        packing, where = self._packing, self._source.describe(position)
        try:
            content = encoded_image(self._source, position)
            if content is not None:
                return Packed(*pack_image(content, where, packing.size, packing.quality, packing.lossless))
            image = self._source.image(position)
            assert isinstance(image, Image.Image), "pack refuses arrays"
            return Packed(*encode(image, packing.size, packing.quality, packing.lossless))
        except (InputError, *UNREADABLE) as error:
            return Unreadable(where, reason_of(error).removeprefix(f"{where}: "))


def _results(
    source: Source, packing: Packing, shards: Sequence[Shard], num_workers: int
) -> Iterator[tuple[int, Packed | Unreadable]]:
    """The images of the shards, in order."""
    positions = [position for shard in shards for position in range(shard.start, shard.stop)]
    if not positions:
        return
    requests = [positions[start : start + _IMAGES_A_REQUEST] for start in range(0, len(positions), _IMAGES_A_REQUEST)]
    dataset = _PackedImages(source, packing)
    if not num_workers:
        for request in requests:
            yield from dataset.__getitems__(request)
        return
    # Takes long to import, and one process does without.
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(dataset, batch_sampler=requests, num_workers=num_workers, collate_fn=_keep)  # type: ignore
    try:
        for results in loader:
            yield from results
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a worker process ended, most likely killed by the system for want of memory; "
            "run the same command again, which goes on, with a smaller --num_workers"
        ) from error


class _Workplace:
    """The output folder while it is worked on by this process alone."""

    def __init__(self, folder: str, plan: dict[str, Any]) -> None:
        self.folder, self._plan = folder, plan
        self._unfinished = os.path.join(folder, UNFINISHED)

    def __enter__(self) -> "_Workplace":
        self._refuse_foreign()
        os.makedirs(self._unfinished, exist_ok=True)
        self._lock = _Lock(os.path.join(self._unfinished, _LOCK), self.folder)
        try:
            # Once more, as another process may have finished it meanwhile.
            self._refuse_foreign()
            self._adopt()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _refuse_foreign(self) -> None:
        """Raises InputError unless the folder is new, empty, or of the same plan."""
        if not os.path.lexists(self.folder):
            return
        if not os.path.isdir(self.folder):
            raise InputError(f"--output {self.folder}: is a file; name a new folder")
        plan_file = os.path.join(self._unfinished, _PLAN)
        if os.path.isfile(plan_file):
            with open(plan_file, encoding="utf-8") as file:
                self._compare(_parsed(file.read()), "an unfinished output")
        elif os.path.isfile(os.path.join(self.folder, INDEX)) and is_packed(self.folder):
            with open(os.path.join(self.folder, INDEX), encoding="utf-8") as file:
                self._compare(_parsed(file.read()), "an output")
        elif set(os.listdir(self.folder)) - {UNFINISHED} or self._holds_more_than_a_lock():
            raise InputError(f"--output {self.folder}: is not empty, and its files are not those of an earlier prepare")

    def _holds_more_than_a_lock(self) -> bool:
        return os.path.isdir(self._unfinished) and bool(
            {name for name in os.listdir(self._unfinished) if not name.startswith(f".{_PLAN}.")} - {_LOCK}
        )

    def _compare(self, found: dict[str, Any], kind: str) -> None:
        for key in ("version", "source", "settings", "classes", "splits"):
            there, here = found.get(key), self._plan[key]
            if key == "splits" and isinstance(there, dict):
                there = {
                    split: {fact: facts.get(fact) for fact in ("images", "description", "fingerprint")}
                    for split, facts in there.items()
                    if isinstance(facts, dict)
                }
            if there == here:
                continue
            if key in ("classes", "splits"):
                raise InputError(
                    f"--output {self.folder}: holds {kind} of other images: {self._plan['source']} has changed since; "
                    "name another folder"
                )
            if key == "settings" and isinstance(there, dict):
                key, there, here = next(
                    (f"--{name}", there.get(name), value) for name, value in here.items() if there.get(name) != value
                )
            raise InputError(
                f"--output {self.folder}: holds {kind} with {key} {there}, not {here}; name another folder"
            )

    def _adopt(self) -> None:
        """Write the plan; of an output that was finished, turn the index back into records."""
        if not os.path.isfile(os.path.join(self._unfinished, _PLAN)):
            self._write(_PLAN, self._plan)
        if not os.path.isfile(os.path.join(self.folder, INDEX)):
            return
        try:
            index = read_index(self.folder, whole=False)
        except InputError:
            # Nothing tells any more which shards are sound: all are made again.
            return
        for number, entry in enumerate(index.shards):
            self._write(f"{entry['name']}.json", _record_of(index, number))

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a shard that is there and sound; None where it is to be made."""
        record_file, shard = os.path.join(self._unfinished, f"{name}.json"), os.path.join(self.folder, name)
        if not os.path.isfile(record_file) or not os.path.isfile(shard):
            return None
        with open(record_file, encoding="utf-8") as file:
            record = _parsed(file.read())
        return record if record.get("sha256") == file_sha256(shard) else None

    @contextmanager
    def writing(self, name: str) -> Iterator["_ShardWriter"]:
        """A new shard, moved into place and recorded at the end."""
        partial, shard = os.path.join(self._unfinished, name), os.path.join(self.folder, name)
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            writer = _ShardWriter(tar)
            yield writer
        writer.record |= {"bytes": os.path.getsize(partial), "sha256": file_sha256(partial)}
        os.replace(partial, shard)
        self._write(f"{name}.json", writer.record)

    def finish(self, plan: dict[str, Any], shards: Sequence[Shard], records: Sequence[dict[str, Any]]) -> None:
        """Write the index and the list of bad files, and clear away the rest."""
        entries: dict[str, list[Any]] = {key: [] for key in ("names", "labels", "positions", "offsets", "sizes")}
        for record in records:
            for key, values in entries.items():
                values += record[key]
        names, name_ends = PackedNames(entries.pop("names")).to_arrays()
        arrays = {key: np.array(values, dtype=np.int64) for key, values in entries.items()}
        images = os.path.join(self.folder, IMAGES)
        write_arrays(images, {**arrays, "names": names, "name_ends": name_ends}, self._unfinished)
        splits = {split: {**facts, "unreadable": []} for split, facts in plan["splits"].items()}
        listed = []
        for shard, record in zip(shards, records, strict=True):
            splits[shard.split]["unreadable"] += record["unreadable"]
            count = {"split": shard.split, "images": len(record["names"])}
            listed.append({"name": shard.name, **count, "bytes": record["bytes"], "sha256": record["sha256"]})
        bad = [entry for split in splits.values() for entry in split["unreadable"]]
        if bad:
            self._replace(BAD_FILES, "".join(f"{_one_line(e['place'])}\t{_one_line(e['reason'])}\n" for e in bad))
        facts = {**plan, "splits": splits, "shards": listed, "images_sha256": file_sha256(images)}
        self._replace(INDEX, json.dumps(facts, indent=1))
        shutil.rmtree(self._unfinished)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self._replace(os.path.join(UNFINISHED, name), json.dumps(value))

    def _replace(self, name: str, text: str) -> None:
        path = os.path.join(self.folder, name)
        # Names of files need not be UTF-8, and are kept as they are.
        with (
            replacing(path, self._unfinished) as partial,
            open(partial, "w", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write(text)


class _ShardWriter:
    """The samples of one shard, and its record."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        lists: tuple[str, ...] = ("names", "labels", "positions", "offsets", "sizes", "unreadable")
        self.record: dict[str, Any] = {key: [] for key in lists}

    def add(self, position: int, label: int, name: str, image: Packed) -> None:
        values = {
            "names": name,
            "labels": label,
            "positions": position,
            "offsets": self._tar.offset + BLOCK,
            "sizes": len(image.content),
        }
        self._member(f"{position:09}.{image.extension}", image.content)
        if label >= 0:
            self._member(f"{position:09}.cls", b"%d" % label)
        for key, value in values.items():
            self.record[key].append(value)

    def skip(self, position: int, label: int, name: str, why: Unreadable) -> None:
        self.record["unreadable"].append({"position": position, "label": label, "name": name, **why._asdict()})

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # without time and owner, so that the same images make the same file
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))


def _record_of(index: Index, number: int) -> dict[str, Any]:
    """The record of a shard from the index of a finished folder."""
    entry, rows = index.shards[number], index.rows(number)
    names = PackedNames.from_arrays(index.arrays["names"], index.arrays["name_ends"])
    lists = {key: index.arrays[key][rows].tolist() for key in ("labels", "positions", "offsets", "sizes")}
    step = index.facts["settings"]["images_per_shard"]
    start = step * sum(shard["split"] == entry["split"] for shard in index.shards[:number])
    missing = index.facts["splits"][entry["split"]]["unreadable"]
    return {
        "names": [names[row] for row in range(rows.start, rows.stop)],
        **lists,
        "unreadable": [image for image in missing if start <= image["position"] < start + step],
        "bytes": entry["bytes"],
        "sha256": entry["sha256"],
    }


class _Lock:
    """Of the output folder, for this process; it ends with it, however that ends."""

    def __init__(self, path: str, folder: str) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115  open as long as it is held
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            held = False
        if not held:
            self._file.close()
            raise InputError(f"--output {folder}: another prepare is writing into it; wait for it, or stop it")

    def release(self) -> None:
        self._file.close()


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object; an empty one where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _keep(results: list[tuple[int, Packed | Unreadable]]) -> list[tuple[int, Packed | Unreadable]]:
    """Collates nothing."""
    return results


def _one_line(text: str) -> str:
    return " ".join(text.split())
