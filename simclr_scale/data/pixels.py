"""From what a source gives to pixels between 0 and 255, whatever the range of the values in the file."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.sources.base import Source
from simclr_scale.errors import InputError

ValueRange = tuple[tuple[float, float], ...]
"""(low, high) of the values that become 0 and 255: one pair for all channels, or one a channel."""

WHITE = 255.0
_LARGEST_16_BIT = 65535.0
# Of a measured range: what lies beyond is clipped, so that single hot or dead pixels do not set the scale.
_PERCENTILES = (0.1, 99.9)
_SAMPLED_IMAGES = 256
_IMAGES_TO_TELL_DEPTH = 16
_SAMPLED_VALUES = 1 << 24
_FEWEST_PIXELS = 64


def to_pixels(image: Image.Image | Tensor, value_range: ValueRange | None = None) -> Tensor:
    """An image of a source as (C, H, W): uint8, or float32 in [0, 255] for values deeper than 8 bits.

    Pictures of 8 bits come as they are. Values of a 16-bit picture (mode ``I;16``) or of an array are mapped linearly,
    ``low`` to 0 and ``high`` to 255, and clipped there. Without a range those of a 16-bit picture are divided by 257,
    and an array must be uint8.

    Args:
        image: a picture of mode RGB, L or I;16, or raw values (C, H, W), uint8 or float32.
        value_range: of the raw values.

    Raises:
        InputError: an array of more than 8 bits without a range, or a range for another number of channels.
    """
    if isinstance(image, Image.Image):
        if not image.mode.startswith("I"):
            return pil_to_tensor(image)
        values = torch.from_numpy(np.asarray(image).astype(np.float32))[None]
        return _stretch(values, value_range or ((0.0, _LARGEST_16_BIT),))
    if value_range is not None:
        return _stretch(image, value_range)
    if image.dtype != torch.uint8:
        raise InputError(
            f"values of type {str(image.dtype).removeprefix('torch.')} need a value range to become pixels"
        )
    return image


def _stretch(values: Tensor, value_range: ValueRange) -> Tensor:
    if len(value_range) not in (1, len(values)):
        raise InputError(f"the value range is of {len(value_range)} channels, the image has {len(values)}")
    low, high = torch.tensor(value_range, dtype=torch.float32).T[:, :, None, None]
    return ((values.to(torch.float32) - low) * (WHITE / (high - low))).clamp_(0, WHITE)


def size_of(image: Image.Image | Tensor) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])


def channels_of(source: Source) -> int:
    """Channels of the images of a source; those that do not say are RGB."""
    return getattr(source, "channels", 3)


def is_deep(image: Image.Image | Tensor) -> bool:
    """Whether its values are of more than 8 bits, so that it takes a range to tell black from white."""
    return image.mode.startswith("I") if isinstance(image, Image.Image) else image.dtype != torch.uint8


def as_value_range(low_and_high: Iterable[float]) -> ValueRange:
    """What the user gave as ``data.value_range``.

    Raises:
        InputError: it is not two finite numbers, the first below the second.
    """
    numbers = tuple(float(value) for value in low_and_high)
    if len(numbers) != 2 or not np.isfinite(numbers).all() or not numbers[0] < numbers[1]:
        raise InputError(f"data.value_range is [low, high], two numbers with low < high, got {list(numbers)}")
    return ((numbers[0], numbers[1]),)


def measure_value_range(source: Source, seed: int = 0) -> ValueRange | None:
    """The percentiles .1 and 99.9 of each channel over a seeded sample of the images, or None where 8 bits hold all.

    Up to 256 images are read, of each as many evenly spaced pixels as keep the sample below 64 MiB. Images that cannot
    be read are passed over. A channel that is one value everywhere gets a range that maps it to black.

    Raises:
        InputError: none of the images can be read.
    """
    samples: list[NDArray[np.float32]] = []
    for number, image in enumerate(_seeded_sample(source, seed)):
        if is_deep(image):
            samples.append(_sample(image))
        if not samples and number == _IMAGES_TO_TELL_DEPTH:
            break
    if not samples:
        return None
    values = np.concatenate(samples, axis=1)
    low, high = np.percentile(values, _PERCENTILES, axis=1, overwrite_input=True)
    return tuple((float(a), float(b) if b > a else float(a) + 1) for a, b in zip(low, high, strict=True))


def takes_value_range(source: Source, seed: int = 0) -> bool:
    """Whether images of the source have values that a range could map: arrays have, pictures of 8 bits have not."""
    image = next(_seeded_sample(source, seed))
    return not isinstance(image, Image.Image) or is_deep(image)


def _seeded_sample(source: Source, seed: int) -> Iterator[Image.Image | Tensor]:
    """Up to 256 images that can be read. Raises InputError where none can."""
    # By the raw stream, which NumPy promises to keep.
    order = np.argsort(generator(Purpose.VALUES, seed, 0, 0).bit_generator.random_raw(len(source)), kind="stable")
    found, problem = 0, None
    for index in order[: 2 * _SAMPLED_IMAGES]:
        try:
            image = source.image(int(index))
        except InputError as error:
            problem = problem or error
            continue
        yield image
        found += 1
        if found == _SAMPLED_IMAGES:
            return
    if not found and problem is not None:
        raise problem


def _sample(image: Image.Image | Tensor) -> NDArray[np.float32]:
    """(C, n) of the image's values, at evenly spaced pixels."""
    values = np.asarray(image)[None] if isinstance(image, Image.Image) else image.numpy()
    values = values.reshape(len(values), -1)
    wanted = max(_FEWEST_PIXELS, _SAMPLED_VALUES // (_SAMPLED_IMAGES * len(values)))
    return values[:, :: -(-values.shape[1] // wanted)].astype(np.float32)
