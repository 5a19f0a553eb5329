"""One scene of many bands, as remote sensing publishes it: a cube, and perhaps what lies at each of its pixels."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simclr_scale.data.sources.arrays import (
    ARRAY_EXTENSIONS,
    TIFF_EXTENSIONS,
    ChannelAxis,
    find_channel_axis,
    read_array,
)
from simclr_scale.data.sources.matlab import list_variables, read_variables
from simclr_scale.errors import InputError

SCENE_EXTENSIONS = ARRAY_EXTENSIONS + TIFF_EXTENSIONS
# Names under which files keep the size of a scene whose pixels lie in one row.
_ROWS = ("nrow", "nrows", "rows", "lines", "nlines", "height")
_COLUMNS = ("ncol", "ncols", "cols", "columns", "samples", "width")
_LABELS_BESIDE = "_gt"
_MOST_CLASSES = 256
# Of the abundances of a pixel, which are shares of one.
_SUM_TOLERANCE = 0.01

Size = tuple[int, int]
_Labels = tuple[np.ndarray | None, tuple[str, ...]]


@dataclass(frozen=True)
class Scene:
    """A cube (C, H, W) as in the file, and labels (H, W) int64, -1 where there is none."""

    cube: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


def read_scene(
    path: str, image_key: str | None = None, label_key: str | None = None, channel_axis: ChannelAxis | None = None
) -> Scene:
    """The scene in a file, .mat, .npy or .tif.

    In a .mat file the cube is the largest numeric variable, of three axes, or of two: bands and pixels, the pixels
    column by column as MATLAB counts them. Labels are another variable, or the file of the same name ending in `_gt`
    (`Indian_pines_corrected.mat` and `Indian_pines_gt.mat`): whole numbers (H, W) of which 0 means none, or abundances,
    the shares of K materials (K, pixels) or (H, W, K), of which a pixel has the class of its largest. Names of the
    classes are a cell array of as many words.

    Args:
        path: the file.
        image_key: the variable of a .mat file that is the cube; None finds it.
        label_key: the variable of a .mat file that labels it; None finds it, an empty one leaves the scene unlabelled.
        channel_axis: of a cube with three axes, 0 or -1; None finds it by the labels or by the shape.

    Raises:
        InputError: the file cannot be read, a variable is not found or not the only one, or shapes do not fit.
    """
    cube, values = _cube_and_rest(path, image_key, label_key)
    stated = _stated_size(values)
    if label_key == "":
        found: _Labels = None, ()
    else:
        beside = _file_of_labels(path)
        found = _find_labels(path, cube, stated, values | _variables_of(beside), label_key)
    labels, classes = found
    size = stated if labels is None else labels.shape
    cube = _channels_first(path, cube, size, channel_axis)
    if labels is None:
        labels = np.full(cube.shape[1:], -1, dtype=np.int64)
    return Scene(cube, labels, classes)


def _cube_and_rest(path: str, image_key: str | None, label_key: str | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The cube as it lies in the file, and the values of the other variables of a .mat file."""
    if not path.lower().endswith(".mat"):
        if image_key or label_key:
            raise InputError(f"{path}: has no variables; image_key and label_key name those of a .mat file")
        return read_array(path), {}
    variables = list_variables(path)
    if image_key is None:
        numeric = [v for v in variables if v.numeric and len(v.shape) in (2, 3) and min(v.shape) > 1]
        if not numeric:
            raise InputError(f"{path}: holds no cube of numbers")
        image_key = max(numeric, key=lambda variable: np.prod(variable.shape, dtype=np.int64)).name
    return read_array(path, image_key), read_variables(path, [v.name for v in variables if v.name != image_key])


def _stated_size(values: Mapping[str, Any]) -> Size | None:
    """Rows and columns, where the file says them by numbers of the usual names."""
    numbers = {name.lower(): value for name, value in values.items() if getattr(value, "size", 0) == 1}
    rows, columns = (next((numbers[n] for n in names if n in numbers), None) for names in (_ROWS, _COLUMNS))
    if rows is None or columns is None or rows.dtype.kind not in "iuf" or columns.dtype.kind not in "iuf":
        return None
    return int(rows.item()), int(columns.item())


def _file_of_labels(path: str) -> str | None:
    """NAME_gt.mat or .npy beside NAME.mat, or beside NAME_and_more.mat."""
    folder, file = os.path.split(path)
    stem = os.path.splitext(file)[0].lower()
    for other in sorted(os.listdir(folder or ".")):
        name, extension = os.path.splitext(other)
        if extension.lower() in SCENE_EXTENSIONS and name.lower().endswith(_LABELS_BESIDE):
            prefix = name.lower().removesuffix(_LABELS_BESIDE)
            if prefix and (stem == prefix or stem.startswith(prefix + "_")):
                return os.path.join(folder, other)
    return None


def _variables_of(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if path.lower().endswith(".mat"):
        return read_variables(path, [variable.name for variable in list_variables(path)])
    return {os.path.basename(path): np.squeeze(read_array(path))}


def _find_labels(
    path: str, cube: np.ndarray, stated: Size | None, values: Mapping[str, Any], label_key: str | None
) -> _Labels:
    """Labels (H, W) from 0 on, -1 for none, and the names of the classes."""
    sizes = _possible_sizes(cube, stated, values)
    found = {
        name: labels
        for name, value in values.items()
        if label_key in (None, name) and (labels := _as_labels(value, sizes)) is not None
    }
    if label_key is not None and not found:
        raise InputError(f"{path}: has no variable {label_key!r} (label_key) that labels the pixels of its cube")
    if len(found) > 1:
        raise InputError(f"{path}: {' and '.join(sorted(found))} may each label it; name one by label_key")
    if not found:
        return None, ()
    [labels] = found.values()
    count = int(labels.max()) + 1
    return labels, _class_names(values, count) or tuple(str(number) for number in range(1, count + 1))


def _possible_sizes(cube: np.ndarray, stated: Size | None, values: Mapping[str, Any]) -> list[Size]:
    """Heights and widths that the scene may have."""
    if cube.ndim == 3:
        return [(cube.shape[0], cube.shape[1]), (cube.shape[1], cube.shape[2])]
    if stated is not None:
        return [stated]
    planes = [value.shape[:2] for value in values.values() if getattr(value, "ndim", 0) in (2, 3)]
    return [size for size in planes if min(size) > 1 and size[0] * size[1] in cube.shape and size != cube.shape]


def _as_labels(value: Any, sizes: list[Size]) -> np.ndarray | None:
    """(H, W) int64 where the value is a map of classes or of abundances of a scene of one of the sizes."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iufb" or value.size < 2:
        return None
    for height, width in sizes:
        # MATLAB counts pixels column by column.
        if value.shape == (height, width):
            plane = value
        elif value.ndim == 2 and min(value.shape) == 1 and value.size == height * width:
            plane = value.reshape(height, width, order="F")
        else:
            shares = _as_shares(value, height, width)
            if shares is not None:
                return shares.argmax(-1).astype(np.int64)
            continue
        if np.array_equal(plane, np.rint(plane)) and plane.min() >= 0 and 1 <= plane.max() <= _MOST_CLASSES:
            return plane.astype(np.int64) - 1
    return None


def _as_shares(value: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Abundances (H, W, K), where the value is such."""
    if value.ndim == 3 and value.shape[:2] == (height, width):
        shares = value
    elif value.ndim == 2 and value.shape[1] == height * width:
        shares = value.T.reshape(height, width, -1, order="F")
    elif value.ndim == 2 and value.shape[0] == height * width:
        shares = value.reshape(height, width, -1, order="F")
    else:
        return None
    valid = shares.shape[-1] > 1 and (np.abs(shares.sum(-1) - 1) < _SUM_TOLERANCE).all()
    return shares if valid else None


def _class_names(values: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The words of a cell array of `count` words; none where there is no such array, or several."""
    words = [
        tuple(value)
        for value in values.values()
        if isinstance(value, list) and len(value) == count and all(isinstance(cell, str) for cell in value)
    ]
    return words[0] if len(words) == 1 and len(set(words[0])) == count else ()


def _channels_first(path: str, cube: np.ndarray, size: Size | None, channel_axis: ChannelAxis | None) -> np.ndarray:
    """(C, H, W)."""
    if cube.ndim == 2:
        if size is None or size[0] * size[1] not in cube.shape:
            raise InputError(
                f"{path}: a cube of shape {cube.shape} has its pixels in one row, and nothing in the file says how "
                "many rows and columns they are; save it as (H, W, C)"
            )
        if cube.shape[1] == size[0] * size[1]:
            cube = cube.T
        return np.moveaxis(cube.reshape(*size, -1, order="F"), -1, 0)
    if path.lower().endswith(TIFF_EXTENSIONS):
        channel_axis = 0
    elif channel_axis is None and size is not None:
        last, first = cube.shape[:2] == size, cube.shape[1:] == size
        channel_axis = None if last == first else -1 if last else 0
    if channel_axis is None:
        channel_axis = find_channel_axis(path, [cube.shape])
    cube = cube if channel_axis == 0 else np.moveaxis(cube, -1, 0)
    if size is not None and cube.shape[1:] != size:
        raise InputError(f"{path}: the cube has {cube.shape[1:]} pixels, labels or stated size say {size}")
    return cube
