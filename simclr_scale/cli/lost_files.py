"""Files that a run had and then has no more: images that vanish, a disk that is full or read-only."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simclr_scale.errors import InputError, RunFailed

# What a file system does to a program that has done nothing wrong.
_OF_THE_FILE_SYSTEM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO, errno.ESTALE),
)


@contextmanager
def lost_files_explained(source: str, afterwards: str) -> Iterator[None]:
    """Says in one line that files are gone or cannot be written any more.

    Args:
        source: of the data; where it is the path of something that exists now, its absence later is told.
        afterwards: how to go on then.

    Raises:
        RunFailed: in place of an InputError about images, and of an OSError of the file system.
    """
    there = Path(source).expanduser().exists()
    try:
        yield
    except InputError as error:
        if there and not Path(source).expanduser().exists():
            raise RunFailed(f"data.source {source} is gone; once it is back, {afterwards}") from error
        raise
    except OSError as error:
        if error.errno not in _OF_THE_FILE_SYSTEM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise RunFailed(
            f"a file of the run cannot be read or written: {where}{error.strerror}; once that is mended, {afterwards}"
        ) from error
