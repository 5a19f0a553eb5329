"""Tables of encoded images: parquet folders and hub data sets, read by the `datasets` library."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from simclr_scale.data.sources.base import Source, digest, label_bytes, sampled_rows
from simclr_scale.data.sources.columns import find_image_column, find_label_column, read_labels
from simclr_scale.data.sources.grey import decode
from simclr_scale.data.sources.named_splits import SplitRequest
from simclr_scale.errors import InputError


class TableSource:
    """One split of a Hugging Face data set, its images read from the memory-mapped Arrow table."""

    def __init__(
        self,
        name: str,
        table: Any,
        image_column: str,
        labels: np.ndarray,
        classes: tuple[str, ...],
        split: str,
        channels: int = 3,
    ) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels
        self.split_description = f"split {split}"
        self.channels = channels
        # The library's table, not a column of it: pickled for a spawned worker it is a file name, not the data.
        self._table = table
        self._image_column = image_column

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self.encoded(index)), self.describe(index), self.channels)

    def fingerprint(self) -> str:
        """Over labels, the length of every encoded image, and the bytes of all (of more than 1,024: evenly spaced)."""
        import pyarrow.compute as pc

        column = self._table.column(self._image_column)
        encoded = column if column.type.num_fields == 0 else pc.struct_field(column, "bytes")
        lengths = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype("<i8")
        sample = (self.encoded(index) for index in sampled_rows(len(self)))
        return digest([label_bytes(self.labels, self.classes), lengths.tobytes(), *sample])

    def describe(self, index: int) -> str:
        return f"{self.name}, {self.split_description}, row {index}"

    def encoded(self, index: int) -> bytes:
        cell = self._table.column(self._image_column)[int(index)].as_py()
        if isinstance(cell, dict):
            if cell["bytes"] is None and cell.get("path"):
                return _read(cell["path"], self.describe(index))
            cell = cell["bytes"]
        if cell is None:
            raise InputError(f"{self.describe(index)}: the cell {self._image_column!r} is empty")
        return cell


def open_table(
    name: str,
    location: str,
    request: SplitRequest,
    image_key: str | None,
    label_key: str | None,
    channels: int = 3,
) -> tuple[Source, bool]:
    """One split of a local folder or hub data set, and whether it is the whole data set, still to be divided.

    Local files are converted once into the library's own cache (HF_DATASETS_CACHE), never beside the data.

    Args:
        name: what the user typed, for messages.
        location: an existing folder, or the id of a data set on the hub.
        request: the split.
        image_key: the column of images; by default the one of type Image, else of encoded bytes.
        label_key: the column of labels; by default the one of type ClassLabel, else of integers. Empty: no labels.
        channels: 3 decodes images to RGB, 1 to grey.

    Raises:
        InputError: the library is missing, the data set cannot be opened, or a split or column cannot be found.
    """
    splits = _load(name, location)
    choice = request.choose(list(splits), name)
    chosen = splits[choice.name]
    image_column = find_image_column(chosen.features, image_key, name)
    label_column = find_label_column(chosen.features, label_key, name)
    labels: np.ndarray = np.full(len(chosen), -1, dtype=np.int64)
    classes: tuple[str, ...] = ()
    if label_column is not None:
        labels, classes = read_labels([splits[part] for part in choice.parts], chosen, label_column, name)
    return TableSource(name, chosen.data, image_column, labels, classes, choice.name, channels), choice.whole


def _load(name: str, location: str) -> dict[str, Any]:
    """All splits, as data sets of the library."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(f'{name}: needs the datasets library: pip install "simclr_scale[hf]"') from error
    try:
        with _quiet(datasets):
            return datasets.load_dataset(location)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: the datasets library cannot open {location!r}: {reason}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no messages below an error, as one line for the user is ours to write."""
    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars_were_off:
            datasets.enable_progress_bars()


def _read(path: str, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror})") from error
