"""Folders of image files, pictures or arrays."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from simclr_scale.data.sources.arrays import ARRAY_EXTENSIONS, TIFF_EXTENSIONS, ArrayReader, ChannelAxis, find_reader
from simclr_scale.data.sources.base import Source, digest, file_size, read_file
from simclr_scale.data.sources.grey import decode
from simclr_scale.data.sources.named_splits import SplitRequest, has_train_and_test, is_train_name
from simclr_scale.data.sources.packed_names import PackedNames
from simclr_scale.errors import InputError

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif",
)  # fmt: skip
EXTENSIONS = IMAGE_EXTENSIONS + ARRAY_EXTENSIONS


class FolderSource:
    """Image files below `root`, in the order of their POSIX relative paths. `open_folder` makes them.

    Args:
        channels: 1 decodes pictures to grey, 3 to RGB.
        arrays: reads the files, which are arrays then and not pictures; `channels` are theirs.
    """

    def __init__(
        self,
        name: str,
        root: str,
        files: Iterable[str],
        labels: np.ndarray,
        classes: tuple[str, ...],
        split_description: str,
        channels: int = 3,
        arrays: ArrayReader | None = None,
    ) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels
        self.split_description = split_description
        self.channels = channels
        self._arrays = arrays
        self._root = root
        self._files = PackedNames(files)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Image.Image | Tensor:
        path = self.describe(index)
        return decode(path, path, self.channels) if self._arrays is None else self._arrays.image(path)

    def fingerprint(self) -> str:
        """Over relative path, size and class of every file; their content is not read."""
        return digest(part for index in range(len(self)) for part in self._identity(index))

    def encoded(self, index: int) -> bytes | None:
        return read_file(self.describe(index)) if self._arrays is None else None

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])

    def file_name(self, index: int) -> str:
        return self._files[index]

    def _identity(self, index: int) -> tuple[bytes, bytes, bytes]:
        label = self.labels[index]
        size = file_size(self.describe(index))
        return os.fsencode(self._files[index]), b"%d" % size, os.fsencode(self.classes[label]) if label >= 0 else b""


def open_folder(
    name: str,
    root: str,
    request: SplitRequest,
    *,
    channels: int = 3,
    arrays: bool = False,
    channel_axis: ChannelAxis | None = None,
    image_key: str | None = None,
) -> tuple[Source, bool]:
    """The images below an existing folder, and whether they are the whole data set, still to be divided.

    A folder with train/ and test/ (or val/: see `SplitRequest.choose`) is split by them, and what lies beside them is
    not looked at; so is one that has no folder but train/. In what remains, the first-level folders that hold an image
    anywhere below are the classes, over all splits and sorted; one class alone tells nothing and counts as no labels.
    Images beside class folders are unlabelled. Names that begin with a dot are ignored. Symbolic links are followed,
    but never to a folder they lie in.

    A folder holds pictures or arrays (.npy and .mat). Where it has both, the pictures are the images, or with `arrays`
    the arrays, among which .tif files then count.

    Args:
        name: what the user typed, for messages.
        root: the folder.
        request: the split.
        channels: 1 decodes pictures to grey, else to RGB. Arrays have those they have.
        arrays: prefers arrays to pictures.
        channel_axis: of arrays with three axes; see `find_reader`.
        image_key: the variable of .mat files that is the image; None finds it.

    Raises:
        InputError: there is no image, or not the split asked for.
    """
    folders = _subfolders(root)
    if request.named or has_train_and_test(folders) or (len(folders) == 1 and is_train_name(folders[0])):
        choice = request.choose(folders, name)
        whole, parts, prefix, description = choice.whole, choice.parts, f"{choice.name}/", f"folder {choice.name}/"
    else:
        whole, parts, prefix, description = True, ("",), "", "all images"
    every = sorted(_walk(os.path.join(root, prefix), EXTENSIONS))
    of_arrays = ARRAY_EXTENSIONS + TIFF_EXTENSIONS if arrays else ARRAY_EXTENSIONS
    are_arrays = [file.lower().endswith(of_arrays) for file in every]
    use_arrays = any(are_arrays) if arrays else bool(every) and all(are_arrays)
    files = [file for file, is_array in zip(every, are_arrays, strict=True) if is_array == use_arrays]
    extensions = of_arrays if use_arrays else tuple(set(EXTENSIONS) - set(of_arrays))
    if image_key is not None and not use_arrays:
        raise InputError(f"{name}: has no columns; image_key names one of hfds/, or a variable of .mat files")
    if not files:
        raise InputError(_why_empty(os.path.join(root, prefix)))
    class_names = {folder for part in parts for folder in _class_folders(os.path.join(root, part), extensions)}
    classes = tuple(sorted(class_names)) if len(class_names) > 1 else ()
    label_of = {folder: label for label, folder in enumerate(classes)}
    labels = np.fromiter((label_of.get(file.partition("/")[0], -1) for file in files), np.int64, len(files))
    files = [prefix + file for file in files]
    if not use_arrays:
        return FolderSource(name, root, files, labels, classes, description, 1 if channels == 1 else 3), whole
    reader = find_reader(name, [os.path.join(root, file) for file in files], channel_axis, image_key)
    return FolderSource(name, root, files, labels, classes, description, reader.channels, reader), whole


def _walk(root: str, extensions: tuple[str, ...], above: tuple[str, ...] = ()) -> Iterator[str]:
    """POSIX paths of the files with these extensions below `root`, relative to it, unsorted and without a stat each.

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
            elif entry.name.lower().endswith(extensions):
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


def _class_folders(root: str, extensions: tuple[str, ...]) -> list[str]:
    above = (os.path.realpath(root),)
    return [name for name in _subfolders(root) if any(True for _ in _walk(os.path.join(root, name), extensions, above))]


def _why_empty(folder: str) -> str:
    others = [entry.name for entry in _visible(folder) if not _is_folder(entry)]
    found = f"holds {min(others)} and the like, but no" if others else "holds no"
    return f"{folder}: {found} image, nor do folders below it; images end in {' '.join(EXTENSIONS)}"
