"""A picture of what the augmentation does: images, their views side by side, and the draws that made them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.color import ORDERS
from simclr_scale.data.draws import BOX, ChannelDraw, Draw
from simclr_scale.errors import InputError

_GAP = 10
_LEAST_SIDE, _MOST_SIDE = 160, 320  # of a picture on the sheet
_TEXT_SIZE = 12
_LINE = 15
_CAPTION_LINES = 5
_NAME_LINES = 3
_BACKGROUND, _INK = (255, 255, 255), (40, 40, 40)
_VIEW_COLORS = ((214, 39, 40), (31, 119, 180))
# In the order of color.ORDERS' numbers.
_JITTERS = (
    ("brightness", Draw.BRIGHTNESS),
    ("contrast", Draw.CONTRAST),
    ("saturation", Draw.SATURATION),
    ("hue", Draw.HUE),
)
_BY_CHANNEL = {"brightness": ChannelDraw.BRIGHTNESS, "contrast": ChannelDraw.CONTRAST}


def contact_sheet(
    images: Sequence[Tensor],
    names: Sequence[str],
    views: Tensor,
    draws: NDArray[np.float32],
    augmentation: Augmentation,
    bands: Sequence[int] | None = None,
) -> Image.Image:
    """One row an image: the image with its crops outlined, and its views with the draws below.

    Args:
        images: B images (C, H, W), uint8 or raw values, which are then stretched to what the image spans.
        names: what to write below each image.
        views: (2B, C, S, S) in [0, 1], all first views and then all second views.
        draws: (B, 2, P), see :class:`simclr_scale.data.draws.Draw`.
        bands: which channels to show as red, green and blue, or one as grey; None: all of grey and RGB images, the
            first three of more.

    Raises:
        InputError: there is no such band.
    """
    channels = images[0].shape[0]
    chosen = _checked_bands(bands, channels)
    columns = views.unflatten(0, (2, -1)).transpose(0, 1)
    side = min(max(views.shape[-1], _LEAST_SIDE), _MOST_SIDE)
    font = ImageFont.load_default(_TEXT_SIZE)
    row_height = side + _CAPTION_LINES * _LINE + _GAP
    width = _GAP + (1 + columns.shape[1]) * (side + _GAP)
    sheet = Image.new("RGB", (width, _GAP + len(images) * row_height), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for row, image in enumerate(images):
        top = _GAP + row * row_height
        picture = _outlined(_picture(image[chosen]), draws[row], side)
        sheet.paste(picture, (_GAP + (side - picture.width) // 2, top + (side - picture.height) // 2))
        _write(pen, font, (_GAP, top + side + 2), _end_of_name(names[row], font, side), _INK)
        for view in range(columns.shape[1]):
            left = _GAP + (view + 1) * (side + _GAP)
            scale = side / columns.shape[-1]
            resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
            sheet.paste(_picture(columns[row, view][chosen], 1.0).resize((side, side), resampling), (left, top))
            color = _VIEW_COLORS[view % len(_VIEW_COLORS)]
            text = describe_draws(draws[row, view], (image.shape[-2], image.shape[-1]), augmentation)
            pieces = [f"{phrase}, " for phrase in text[:-1]] + text[-1:]
            _write(pen, font, (left, top + side + 2), _lines(pieces, font, side), color)
    return sheet


def describe_draws(draws: NDArray[np.float32], size: tuple[int, int], augmentation: Augmentation) -> list[str]:
    """What was done to one view, in order, from its draws (P,) and the height and width of its image."""
    height, width = draws[Draw.HEIGHT], draws[Draw.WIDTH]
    channels = (len(draws) - len(Draw)) // len(ChannelDraw)
    text = [f"crop {height * width / (size[0] * size[1]):.0%}, {int(width)} x {int(height)}"]
    if draws[Draw.FLIP]:
        text.append("flip")
    if draws[Draw.JITTER]:
        additive = augmentation.color_ops == "google" and augmentation.brightness_mode == "additive"
        for number in ORDERS[int(draws[Draw.ORDER])]:
            name, column = _JITTERS[number]
            if getattr(augmentation, name) == 0:
                continue
            kind = "+.2f" if name == "hue" or (name == "brightness" and additive) else ".2f"
            if augmentation.per_channel and name in _BY_CHANNEL:
                factors = draws[_BY_CHANNEL[name].columns(channels)]
                text.append(f"{name} {factors.min():{kind}} to {factors.max():{kind}}")
            else:
                text.append(f"{name} {draws[column]:{kind}}")
    if draws[Draw.GREY]:
        text.append("grey")
    if augmentation.channel_drop > 0 and (dropped := int(draws[ChannelDraw.DROP.columns(channels)].sum())):
        text.append(f"{dropped} of {channels} channels dropped")
    if draws[Draw.BLUR]:
        text.append(f"blur {draws[Draw.SIGMA]:.1f} px")
    return text


def _checked_bands(bands: Sequence[int] | None, channels: int) -> list[int]:
    if bands is None:
        return [0, 1, 2] if channels >= 3 else [0]
    if len(bands) not in (1, 3) or not all(0 <= band < channels for band in bands):
        raise InputError(f"bands are one or three of 0 to {channels - 1}, got {list(bands)}")
    return list(bands)


def _picture(pixels: Tensor, white: float = 255.0) -> Image.Image:
    """(1 or 3, H, W) -> picture; raw values that are not bytes are stretched, those of views are not."""
    values = pixels.to(torch.float32)
    if white == 255.0 and pixels.dtype != torch.uint8:
        low, high = values.aminmax()
        values, white = values - low, float((high - low).clamp(min=torch.finfo(torch.float32).tiny))
    array = (values / white * 255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def _outlined(picture: Image.Image, draws: NDArray[np.float32], side: int) -> Image.Image:
    """The picture, as large as fits, with the crop of each view outlined in the view's colour."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    picture = picture.resize(size, resampling)
    pen = ImageDraw.Draw(picture)
    for view, (top, left, height, width) in enumerate(draws[:, BOX] * scale):
        corners = (left, top, max(left, left + width - 1), max(top, top + height - 1))
        pen.rectangle(corners, outline=_VIEW_COLORS[view % len(_VIEW_COLORS)], width=2)
    return picture


def _write(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    corner: tuple[int, int],
    lines: Sequence[str],
    color: tuple[int, int, int],
) -> None:
    for number, line in enumerate(lines[:_CAPTION_LINES]):
        pen.text((corner[0], corner[1] + number * _LINE), line, fill=color, font=font)


def _lines(pieces: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Pieces put one after another on as many lines as they need; one that is wider than a line stands alone."""
    lines = [""]
    for piece in pieces:
        longer = lines[-1] + piece
        if not lines[-1].strip() or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    return [line.strip() for line in lines]


def _end_of_name(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A path or a description on a few lines, its beginning left out where it is too long."""
    lines = _lines(name, font, width)
    return lines if len(lines) <= _NAME_LINES else _end_of_name("…" + name[6:], font, width)
