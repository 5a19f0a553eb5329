"""Small image files for the tests of sources."""

from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int = 0, height: int = 6, width: int = 8) -> np.ndarray:
    """(height, width, 3) uint8, no two rows or columns alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path: Path, seed: int = 0) -> Path:
    """An image file whose format follows its name, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)
    return path


def write_images(root: Path, *names: str) -> Path:
    """One image file a name below `root`."""
    for seed, name in enumerate(names):
        write_image(root / name, seed)
    return root
