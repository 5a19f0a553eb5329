"""Packs a data set into the format of `simclr_scale.data.sources.packed`, and goes on after a kill.

Whatever the number of workers and however often the work was broken off, the files are the same, byte for byte: which
image lies where is settled before the first is read. A shard is written in ``.unfinished/`` and moved into place, and
only then its record is written there, with its checksum; a shard without a record, or of another checksum, is made
again. At the end the records become the index, and ``.unfinished/`` goes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from PIL import Image

from simclr_scale.data.packed_images import encode, pack_image
from simclr_scale.data.packing_folder import Workplace
from simclr_scale.data.packing_shard import Packed, Shard, Unreadable
from simclr_scale.data.sources.base import Source, encoded_image, file_name
from simclr_scale.data.sources.decoding import UNREADABLE, reason_of
from simclr_scale.data.sources.packed import FORMAT, VERSION
from simclr_scale.errors import InputError

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
        with Workplace(folder, plan) as workplace:
            return _pack(parts, workplace, plan, packing, num_workers, progress)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from error


def _pack(
    parts: dict[str, Source],
    workplace: Workplace,
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


def _keep(results: list[tuple[int, Packed | Unreadable]]) -> list[tuple[int, Packed | Unreadable]]:
    """Collates nothing."""
    return results
