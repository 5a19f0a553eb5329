"""A scene of many bands as a data set: the patches around its pixels, train and test far enough apart."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter
from torch import Tensor

from simclr_scale.data.pixels import ValueRange, to_pixels
from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources.arrays import ChannelAxis, as_tensor
from simclr_scale.data.sources.base import digest, label_bytes
from simclr_scale.data.sources.scenes import SCENE_EXTENSIONS, Scene, read_scene
from simclr_scale.errors import InputError

_TEST_FRACTION = 0.25
# Blocks along a side of the scene: many spread the parts over it, large ones lose less at their borders.
_FEWEST_BLOCKS, _MOST_BLOCKS = 2, 8
_PATCHES_A_BLOCK = 3
_CANDIDATES = 1024
_TRIED = 32


class PatchSource:
    """Square patches around pixels of one scene, each with the label of its central pixel. `open_patches` makes them.

    Beyond the border the scene is mirrored, without repeating its outermost pixels, so that every pixel can be a
    centre.

    Args:
        name: what the user typed.
        scene: cube (C, H, W), uint8 or float32, and labels (H, W).
        centres: (N, 2) rows and columns.
        patch_size: side of a patch, odd.
        split_description: for the manifest.
    """

    def __init__(
        self,
        name: str,
        cube: Tensor,
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
        centres: NDArray[np.int64],
        patch_size: int,
        split_description: str,
    ) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels[centres[:, 0], centres[:, 1]]
        self.split_description = split_description
        self.channels = len(cube)
        self.centres = centres
        self.patch_size = patch_size
        self._cube = cube
        self._padded = _mirrored(cube, patch_size // 2)

    def __len__(self) -> int:
        return len(self.centres)

    def image(self, index: int) -> Tensor:
        """(C, patch_size, patch_size) of the cube's values."""
        row, column = self.centres[index]
        return self._padded[:, row : row + self.patch_size, column : column + self.patch_size].clone()

    def windows(self, value_range: ValueRange | None = None) -> "Windows":
        """All patches as pixels in [0, 255], cut from the one scene when they are asked for."""
        return Windows(to_pixels(self._padded, value_range), torch.from_numpy(self.centres), self.patch_size)

    def fingerprint(self) -> str:
        """Over the values of the cube, the labels, and where the patches lie."""
        places = np.concatenate([self.centres.ravel(), [self.patch_size]]).astype("<i8")
        values = self._cube.numpy()
        return digest(
            [label_bytes(self.labels, self.classes), places.tobytes(), str(values.shape).encode(), values.tobytes()]
        )

    def describe(self, index: int) -> str:
        row, column = self.centres[index]
        return f"{self.name}, patch around row {row}, column {column}"


class Windows:
    """Patches of one scene, indexed like the tensor (N, C, size, size) that they would be, without its copies.

    Args:
        padded: (C, H + size - 1, W + size - 1), the scene with its mirrored margins.
        centres: (N, 2) rows and columns in the scene.
    """

    def __init__(self, padded: Tensor, centres: Tensor, size: int) -> None:
        self.shape = torch.Size((len(centres), len(padded), size, size))
        self._centres = centres
        self._padded, self._size = padded, size

    def __getitem__(self, indices: Tensor) -> Tensor:
        """(B, C, size, size) of the patches at (B,) indices."""
        rows, columns = self._centres[indices].T
        windows = self._padded.unfold(1, self._size, 1).unfold(2, self._size, 1)
        return windows[:, rows, columns].transpose(0, 1)


def open_patches(
    name: str,
    path: str,
    split: str,
    *,
    patch_size: int,
    image_key: str | None = None,
    label_key: str | None = None,
    channel_axis: ChannelAxis | None = None,
    seed: int = 0,
) -> PatchSource:
    """The train or test part of a scene, cut by `split_scene`. An unlabelled scene is all train.

    Pixels without a label are train patches, but no test patches.

    Args:
        name: what the user typed, for messages.
        path: the file of the scene; see `read_scene` for it and for the keys and the axis.
        split: "train" or "test".
        patch_size: side of a patch in pixels, odd.
        seed: of the split.

    Raises:
        InputError: the scene cannot be read or is too small for its patches, or there is not the part asked for.
    """
    if patch_size < 1 or patch_size % 2 == 0:
        raise InputError(f"data.patch_size must be an odd number of pixels, got {patch_size}")
    if not os.path.isfile(path) or not path.lower().endswith(SCENE_EXTENSIONS):
        raise InputError(
            f"{name}: no such scene; after patches/ comes a file that ends in {' '.join(SCENE_EXTENSIONS)}"
        )
    scene = read_scene(path, image_key, label_key, channel_axis)
    labels = scene.labels
    if patch_size > min(labels.shape):
        raise InputError(f"{name}: a patch of {patch_size} pixels does not fit in a scene of {_by(labels.shape)}")
    part, description = _part(name, scene, split, patch_size, seed)
    centres = np.argwhere(part)
    return PatchSource(name, as_tensor(scene.cube, path), labels, scene.classes, centres, patch_size, description)


def _part(name: str, scene: Scene, split: str, patch_size: int, seed: int) -> tuple[NDArray[np.bool_], str]:
    """Centres of the patches, (H, W), and what they are in words."""
    patches = f"patches of {_by((patch_size, patch_size))}"
    if split == "val":
        raise InputError(f"{name}: has no validation part; train and test can be had")
    if not (scene.labels >= 0).any():
        if split == "test":
            raise InputError(f"{name}: has no labels, so there is no test part to evaluate on; label_key names them")
        return np.ones(scene.labels.shape, dtype=bool), f"{patches} around all pixels"
    cut = split_scene(scene.labels, patch_size, seed)
    part = cut.train if split == "train" else cut.test & (scene.labels >= 0)
    if not part.any():
        labelled = "" if split == "train" else "labelled "
        raise InputError(
            f"{name}: no {labelled}patch of {_by((patch_size, patch_size))} pixels lies within the {split} part; "
            "lower data.patch_size"
        )
    return part, (
        f"{patches}, {split} part of seeded blocks, seed {seed}: {cut.test_blocks} of {cut.blocks} blocks of "
        f"{_by(cut.block)} pixels are test, and no patch reaches from one part into the other"
    )


@dataclass(frozen=True)
class SceneSplit:
    """Which pixels are centres of train and test patches, (H, W) each, and the blocks they come from."""

    train: NDArray[np.bool_]
    test: NDArray[np.bool_]
    blocks: int
    test_blocks: int
    block: tuple[int, int]


def split_scene(labels: NDArray[np.int64], patch_size: int, seed: int) -> SceneSplit:
    """Cuts a scene into blocks, a quarter of them test, so that no pixel is in patches of both parts.

    A pixel is the centre of a patch only where the whole patch, as far as it lies in the scene, is in blocks of one
    part: along a border between the parts there is a margin of half a patch on either side. Of seeded choices of blocks
    that one is taken in which the test part's share of each class is nearest to a quarter, every class being in both
    parts where that can be had.

    Args:
        labels: (H, W), -1 for none.
        patch_size: side of a patch, odd.
        seed: of the choice.
    """
    height, width = labels.shape
    rows, columns = (_blocks_along(side, patch_size) for side in (height, width))
    block_of = (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width
    blocks = rows * columns
    test_blocks = max(1, round(blocks * _TEST_FRACTION))
    classes = int(labels.max()) + 1
    counts = np.zeros((blocks, classes))
    np.add.at(counts, (block_of[labels >= 0], labels[labels >= 0]), 1)
    # By the raw stream, which NumPy promises to keep.
    raw = generator(Purpose.BLOCKS, seed, 0, 0).bit_generator.random_raw(_CANDIDATES * blocks)
    candidates = np.argsort(raw.reshape(_CANDIDATES, blocks), axis=1, kind="stable")[:, :test_blocks]
    shares = counts[candidates].sum(1) / counts.sum(0).clip(min=1)
    order = np.argsort(np.abs(shares - _TEST_FRACTION).max(1), kind="stable")
    best: tuple[int, SceneSplit] | None = None
    for candidate in order[:_TRIED]:
        is_test = np.isin(block_of, candidates[candidate])
        train, test = (_whole_patches(part, patch_size) for part in (~is_test, is_test))
        in_both = len(np.intersect1d(labels[train & (labels >= 0)], labels[test & (labels >= 0)]))
        if best is None or in_both > best[0]:
            best = in_both, SceneSplit(train, test, blocks, test_blocks, (height // rows, width // columns))
        if in_both == np.count_nonzero(counts.sum(0)):
            break
    assert best is not None
    return best[1]


def _blocks_along(side: int, patch_size: int) -> int:
    return min(max(side // (_PATCHES_A_BLOCK * patch_size), _FEWEST_BLOCKS), _MOST_BLOCKS)


def _whole_patches(part: NDArray[np.bool_], patch_size: int) -> NDArray[np.bool_]:
    """Pixels whose patch, as far as it lies in the scene, is all in the part."""
    return minimum_filter(part.view(np.uint8), size=patch_size, mode="nearest").view(bool)


def _mirrored(cube: Tensor, margin: int) -> Tensor:
    # torch's own padding by reflection is for floating point alone.
    height, width = cube.shape[1:]
    rows, columns = (np.pad(np.arange(side), margin, mode="reflect") for side in (height, width))
    return cube[:, torch.from_numpy(rows)][:, :, torch.from_numpy(columns)]


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
