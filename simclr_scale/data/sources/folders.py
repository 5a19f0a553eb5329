"""Folders of image files."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from simclr_scale.data.sources.base import Source, digest, file_size, read_file
from simclr_scale.data.sources.decoding import decode_rgb
from simclr_scale.data.sources.named_splits import SplitRequest, has_train_and_test, is_train_name
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.errors import InputError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif",
)  # fmt: skip


class FolderSource:
    """Image files below `root`, in the order of their POSIX relative paths. `open_folder` makes them."""

    def __init__(
        self,
        name: str,
        root: str,
        files: Iterable[str],
        labels: np.ndarray,
        classes: tuple[str, ...],
        split_description: str,
    ) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels
        self.split_description = split_description
        self._root = root
        self._files = PackedNames(files)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Image.Image:
        path = self.describe(index)
        return decode_rgb(path, path)

    def fingerprint(self) -> str:
        """Over relative path, size and class of every file; their content is not read."""
        return digest(part for index in range(len(self)) for part in self._identity(index))

    def encoded(self, index: int) -> bytes:
        return read_file(self.describe(index))

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])

    def file_name(self, index: int) -> str:
        return self._files[index]

    def _identity(self, index: int) -> tuple[bytes, bytes, bytes]:
        label = self.labels[index]
        size = file_size(self.describe(index))
        return os.fsencode(self._files[index]), b"%d" % size, os.fsencode(self.classes[label]) if label >= 0 else b""


def open_folder(name: str, root: str, request: SplitRequest) -> tuple[Source, bool]:
    """The images below an existing folder, and whether they are the whole data set, still to be divided.

    A folder with train/ and test/ (or val/: see `SplitRequest.choose`) is split by them, and what lies beside them is
    not looked at; so is one that has no folder but train/. In what remains, the first-level folders that hold an image
    anywhere below are the classes, over all splits and sorted; one class alone tells nothing and counts as no labels.
    Images beside class folders are unlabelled. Names that begin with a dot are ignored. Symbolic links are followed,
    but never to a folder they lie in.

    Raises:
        InputError: there is no image, or not the split asked for.
    """
    folders = _subfolders(root)
    if request.named or has_train_and_test(folders) or (len(folders) == 1 and is_train_name(folders[0])):
        choice = request.choose(folders, name)
        whole, parts, prefix, description = choice.whole, choice.parts, f"{choice.name}/", f"folder {choice.name}/"
    else:
        whole, parts, prefix, description = True, ("",), "", "all images"
    files = sorted(_walk(os.path.join(root, prefix)))
    if not files:
        raise InputError(_why_empty(os.path.join(root, prefix)))
    class_names = {folder for part in parts for folder in _class_folders(os.path.join(root, part))}
    classes = tuple(sorted(class_names)) if len(class_names) > 1 else ()
    label_of = {folder: label for label, folder in enumerate(classes)}
    labels = np.fromiter((label_of.get(file.partition("/")[0], -1) for file in files), np.int64, len(files))
    return FolderSource(name, root, (prefix + file for file in files), labels, classes, description), whole


def _walk(root: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """POSIX paths of the images below `root`, relative to it, in the file system's order and without a stat each.

    Nothing is found where `root` is a link to one of the folders `above`.
    """
    start = os.path.realpath(root)
    stack = [(root, "", (*above, start))] if start not in above else []
    while stack:
        folder, prefix, ancestors = stack.pop()
        for entry in _visible(folder):
            if _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(ancestors[-1], entry.name)
                if real not in ancestors:
                    stack.append((entry.path, f"{prefix}{entry.name}/", (*ancestors, real)))
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                yield prefix + entry.name


def _visible(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir raises on a link to itself; os.path.isdir says no.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _subfolders(root: str) -> list[str]:
    return sorted(entry.name for entry in _visible(root) if _is_folder(entry))


def _class_folders(root: str) -> list[str]:
    above = (os.path.realpath(root),)
    return [name for name in _subfolders(root) if any(True for _ in _walk(os.path.join(root, name), above))]


def _why_empty(folder: str) -> str:
    others = [entry.name for entry in _visible(folder) if not _is_folder(entry)]
    found = f"holds {min(others)} and the like, but no" if others else "holds no"
    return f"{folder}: {found} image, nor do folders below it; images end in {' '.join(IMAGE_EXTENSIONS)}"
