"""Data sets of torchvision.datasets, as they lie on disk; nothing is ever downloaded."""

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from simclr_scale.data.sources.base import NotOnDisk, Source, digest, file_size, label_bytes, read_file, sampled_rows
from simclr_scale.data.sources.decoding import UNREADABLE, to_rgb
from simclr_scale.data.sources.grey import decode, to_grey
from simclr_scale.data.sources.named_splits import SplitRequest
from simclr_scale.errors import InputError

# The parameter that names the split: `train` is a bool, the others are strings.
_SPLIT_PARAMETERS = ("train", "split", "image_set", "version")
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class TorchvisionSource:
    """A map-style data set of (image, target) pairs; targets other than one integer each count as no labels.

    Args:
        name: what the user typed.
        dataset: of torchvision; its images may be paths (by a loader that returns its argument).
        root: the folder it was read from.
        split_description: for the manifest.
        channels: 3 gives RGB images, 1 grey ones.
    """

    def __init__(self, name: str, dataset: Any, root: str, split_description: str, channels: int = 3) -> None:
        self.name = name
        self.split_description = split_description
        self.channels = channels
        self._dataset = dataset
        self._root = root
        self._has_paths = isinstance(dataset[0][0], str)
        self.labels = _labels(dataset)
        self.classes = _class_names(dataset, int(self.labels.max(initial=-1)) + 1)

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> Image.Image:
        if self._has_paths:
            path = self._dataset[index][0]
            return decode(path, path, self.channels)
        try:
            return (to_grey if self.channels == 1 else to_rgb)(self._dataset[index][0])
        except UNREADABLE as error:
            raise InputError(f"{self.describe(index)}: not a readable image ({error})") from error

    def fingerprint(self) -> str:
        """Over labels and images (of more than 1,024: evenly spaced): name and size of a file, else pixels."""
        sample = (self._identity(int(index)) for index in sampled_rows(len(self)))
        return digest([label_bytes(self.labels, self.classes), *sample])

    def describe(self, index: int) -> str:
        return self._dataset[index][0] if self._has_paths else f"{self.name}, {self.split_description}, image {index}"

    def encoded(self, index: int) -> bytes | None:
        return read_file(self._dataset[index][0]) if self._has_paths else None

    def file_name(self, index: int) -> str:
        return os.path.relpath(self._dataset[index][0], self._root).replace(os.sep, "/") if self._has_paths else ""

    def _identity(self, index: int) -> bytes:
        if self._has_paths:
            path = self._dataset[index][0]
            return f"{os.path.relpath(path, self._root)} {file_size(path)}".encode()
        return to_rgb(self._dataset[index][0]).tobytes()


def open_torchvision(
    name: str, dataset_name: str, root: str | None, request: SplitRequest, channels: int = 3
) -> tuple[Source, bool]:
    """One split of a data set, and whether it is the whole data set, still to be divided.

    Args:
        name: what the user typed, for messages.
        dataset_name: a class of torchvision.datasets, in any case.
        root: the folder that torchvision calls root.
        request: the split.
        channels: 3 gives RGB images, 1 grey ones.

    Raises:
        InputError: the name is unknown, the data set is not one of single images, its files are missing, or there is
            not the split asked for.
    """
    dataset_class = _dataset_class(name, dataset_name)
    if root is None:
        raise InputError(f"{name}: needs data.root, the folder that holds the files of {dataset_class.__name__}")
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise NotOnDisk(f"{name}: no folder {root} (data.root)")
    parameters = inspect.signature(dataset_class).parameters
    keywords: dict[str, Any] = {"download": False} if "download" in parameters else {}
    if "loader" in parameters or issubclass(dataset_class, datasets.ImageFolder):
        keywords["loader"] = str
    split_key = next((key for key in _SPLIT_PARAMETERS if key in parameters), None)
    if split_key is None:
        if request.named:
            raise InputError(f"{name}: {dataset_class.__name__} has no splits: leave out train_split and test_split")
        dataset = _create(name, dataset_class, root, keywords)
        return TorchvisionSource(name, dataset, root, "all images", channels), True
    values: Mapping[str, str | bool]
    if split_key == "train":
        values = {"train": True, "test": False}
    else:
        values = {value: value for value in _split_names(name, dataset_class, root, keywords, split_key)}
    choice = request.choose(list(values), name)
    dataset = _create(name, dataset_class, root, {split_key: values[choice.name], **keywords})
    return TorchvisionSource(name, dataset, root, f"split {choice.name}", channels), choice.whole


def _dataset_class(name: str, dataset_name: str) -> type:
    known = {
        class_name.lower(): value
        for class_name in datasets.__all__
        if inspect.isclass(value := getattr(datasets, class_name)) and value is not datasets.VisionDataset
    }
    found = known.get(dataset_name.lower())
    if found is None:
        close = [known[match].__name__ for match in get_close_matches(dataset_name.lower(), known)]
        hint = f"did you mean {' or '.join(close)}?" if close else "see the list in torchvision's documentation"
        raise InputError(f"{name}: torchvision.datasets has no {dataset_name!r}; {hint}")
    parameters = inspect.signature(found).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if required != ["root"]:
        raise InputError(
            f"{name}: {found.__name__} cannot be opened by name; it takes {', '.join(required) or 'no root'}"
        )
    return found


def _create(name: str, dataset_class: type, root: str, keywords: dict[str, Any]) -> Any:
    try:
        dataset = dataset_class(root, **keywords)
        dataset[0]
    except (RuntimeError, OSError, ValueError, ImportError, IndexError) as error:
        raise _not_found(name, dataset_class, root, keywords, error) from error
    return dataset


def _split_names(name: str, dataset_class: type, root: str, keywords: dict[str, Any], key: str) -> list[str]:
    """The splits that the data set knows: it lists them when asked for one that cannot be."""
    try:
        dataset_class(root, **{key: "?"}, **keywords)
    except ValueError as error:
        listing = re.search(r"Valid values are \{(.*)\}", str(error))
        if listing is not None:
            return re.findall(r"'([^']+)'", listing.group(1))
        raise _not_found(name, dataset_class, root, keywords, error) from error
    except (RuntimeError, OSError, ImportError) as error:
        raise _not_found(name, dataset_class, root, keywords, error) from error
    raise InputError(f"{name}: {dataset_class.__name__} does not say which values its {key!r} may have")


def _not_found(name: str, dataset_class: type, root: str, keywords: dict[str, Any], error: Exception) -> InputError:
    reason = " ".join(str(error).split()).removesuffix(".")
    advice = ""
    if "download" in keywords:
        arguments = ", ".join(
            f"{key}={value!r}" for key, value in {**keywords, "download": True}.items() if key != "loader"
        )
        call = f"torchvision.datasets.{dataset_class.__name__}({root!r}, {arguments})"
        advice = f"; it is downloaded, if need be, by the Python call {call}"
    return NotOnDisk(f"{name}: not found below {root} ({reason}){advice}")


def _labels(dataset: Any) -> np.ndarray:
    """(N,) int64, from the list that most data sets keep, else by asking for every item."""
    length = len(dataset)
    first = _label(dataset[0])
    if first is None:
        return np.full(length, -1, dtype=np.int64)
    kept = [getattr(dataset, attribute, ()) for attribute in _LABEL_ATTRIBUTES]
    kept.append([sample[1] for sample in getattr(dataset, "_samples", ())])
    for values in map(np.asarray, kept):
        if values.shape == (length,) and values.dtype.kind in "iu" and values[0] == first:
            return np.maximum(values.astype(np.int64), -1)
    labels = (_label(dataset[index]) for index in range(length))
    return np.fromiter((-1 if label is None else max(label, -1) for label in labels), np.int64, length)


def _label(item: Any) -> int | None:
    target = item[1] if isinstance(item, tuple) and len(item) == 2 else None
    return int(target) if isinstance(target, int | np.integer) else None


def _class_names(dataset: Any, minimum: int) -> tuple[str, ...]:
    """The data set's own names of its classes, else their numbers; of synonyms (ImageNet) the first."""
    if minimum == 0:
        return ()
    names: Iterable[Any] = getattr(dataset, "classes", None) or ()
    own = tuple(str(name[0]) if isinstance(name, tuple) else str(name) for name in names)
    return own if len(own) >= minimum else tuple(str(label) for label in range(minimum))
