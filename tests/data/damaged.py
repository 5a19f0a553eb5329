"""Image files of which some cannot be read."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

HARM = ("truncated", "empty", "foreign")


def write_photographs(root: Path, count: int, bad: Collection[int] = (), size: tuple[int, int] = (40, 36)) -> Path:
    """JPEGs 000.jpg, 001.jpg, ... of smooth noise; those in `bad` are cut off, empty or text, in turn."""
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = root / f"{index:03}.jpg"
        coarse = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path, quality=95)
    for turn, index in enumerate(sorted(bad)):
        damage(root / f"{index:03}.jpg", HARM[turn % len(HARM)])
    return root


def damage(path: Path, harm: str) -> None:
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "foreign": b"<html>not found</html>"}[harm])
