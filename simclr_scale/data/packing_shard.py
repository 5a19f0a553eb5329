"""One shard while a data set is packed: which images it holds, and its samples and record as they are written."""

import io
import tarfile
from typing import Any, NamedTuple

from simclr_scale.data.sources.tar_index import BLOCK


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


class ShardWriter:
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
