"""WebDataset shards for tests, written by hand from their members."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from tests.data.sources.images import pixels

Members = Mapping[str, bytes | str] | Sequence[tuple[str, bytes | str]]


def encoded(seed: int = 0, kind: str = "PNG") -> bytes:
    """A small image file; as PNG its pixels are those of `pixels(seed)`."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in pairs:
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_labelled(path: Path, labels: Sequence[int | str], first: int = 0) -> Path:
    """A shard of samples numbered from `first`, whose images are `encoded(number)`."""
    members: list[tuple[str, bytes | str]] = []
    for number, label in enumerate(labels, first):
        members += [(f"{number:04}.png", encoded(number)), (f"{number:04}.cls", str(label))]
    return write_shard(path, members)
