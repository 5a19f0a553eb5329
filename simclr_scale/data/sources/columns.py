"""Which columns of a table hold images and labels, by their types."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from simclr_scale.data.sources.named_splits import listed
from simclr_scale.errors import InputError


def find_image_column(features: Mapping[str, Any], key: str | None, where: str) -> str:
    """The column named `key`; else the one of type Image; else the one of encoded bytes.

    Args:
        features: `datasets.Features`.
        key: the user's choice, or None.
        where: the data set, for messages.

    Raises:
        InputError: there is no such column, or more than one.
    """
    import datasets

    encoded = [name for name, feature in features.items() if _holds_bytes(feature)]
    if key is not None:
        _require(key, features, "image_key", where)
        if key not in encoded:
            raise InputError(f"{where}: column {key!r} (image_key) holds no encoded images; {_offer(encoded)}")
        return key
    typed = [name for name in encoded if isinstance(features[name], datasets.Image)]
    candidates = typed or encoded
    if not candidates:
        raise InputError(f"{where}: no column of images; there are {listed(list(features))}")
    return _single(candidates, "images", "image_key", where)


def find_label_column(features: Mapping[str, Any], key: str | None, where: str) -> str | None:
    """The column named `key`; else the one of type ClassLabel; else the one of integers; else none.

    Args:
        features: `datasets.Features`.
        key: the user's choice; empty for no labels; None to search.
        where: the data set, for messages.

    Raises:
        InputError: the named column does not exist or holds no classes, or more than one column would do.
    """
    import datasets
    import pyarrow as pa

    if key == "":
        return None
    if key is not None:
        _require(key, features, "label_key", where)
        kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
        if not _is_value(features[key], *kinds):
            raise InputError(f"{where}: column {key!r} (label_key) holds {features[key]}, neither integers nor names")
        return key
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    candidates = typed or [name for name, feature in features.items() if _is_value(feature, pa.types.is_integer)]
    return _single(candidates, "labels", "label_key", where) if candidates else None


def read_labels(splits: Sequence[Any], chosen: Any, column: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The labels of one split and the classes of all.

    A ClassLabel column brings its class names. Otherwise the classes are the values that occur in any split, sorted.
    Null and negative numbers mean no label.

    Args:
        splits: all splits in use, `datasets.Dataset` each.
        chosen: the one of them whose labels are read, N rows.
        column: its label column.
        where: the data set, for messages.

    Returns:
        (N,) int64 labels, and the class names.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    values = chosen.data.column(column)
    feature = chosen.features[column]
    if isinstance(feature, datasets.ClassLabel):
        labels = pc.fill_null(values, -1).to_numpy().astype(np.int64)
        if labels.size and labels.max() >= feature.num_classes:
            raise InputError(f"{where}: column {column!r} holds {labels.max()} but names {feature.num_classes} classes")
        return np.maximum(labels, -1), tuple(feature.names)
    occurring = {value for split in splits if column in split.features for value in split.unique(column)}
    names = sorted(value for value in occurring if value is not None and (isinstance(value, str) or value >= 0))
    labels = pc.fill_null(pc.index_in(values, value_set=pa.array(names, values.type)), -1).to_numpy()
    return labels.astype(np.int64), tuple(str(name) for name in names)


def _holds_bytes(feature: Any) -> bool:
    import datasets
    import pyarrow as pa

    if isinstance(feature, Mapping):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return isinstance(feature, datasets.Image) or _is_value(feature, pa.types.is_binary, pa.types.is_large_binary)


def _is_value(feature: Any, *kinds: Callable[[Any], bool]) -> bool:
    """Whether the column is of plain values, of one of the Arrow types."""
    import datasets

    return isinstance(feature, datasets.Value | datasets.ClassLabel) and any(kind(feature()) for kind in kinds)


def _require(key: str, features: Mapping[str, Any], option: str, where: str) -> None:
    if key not in features:
        close = get_close_matches(key, features, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"{where}: no column {key!r} ({option}); {hint}There are {listed(list(features))}")


def _single(candidates: Sequence[str], content: str, option: str, where: str) -> str:
    if len(candidates) > 1:
        raise InputError(f"{where}: the {content} may be in any of {listed(candidates)}: choose by {option}")
    return candidates[0]


def _offer(candidates: Sequence[str]) -> str:
    return f"those that do: {listed(candidates) or 'none'}"
