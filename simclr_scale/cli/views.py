"""``simclr-scale views``: a contact sheet of what the augmentation makes of some images."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.cli.recipes import find_recipe
from simclr_scale.data.contact_sheet import contact_sheet
from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.reading import read_or_replace
from simclr_scale.data.sampler import Key, epoch_order
from simclr_scale.data.views import finish_views
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file


def main(argv: list[str]) -> None:
    """``simclr-scale views``."""
    parser = OneLineErrors(
        prog="simclr-scale views",
        usage="%(prog)s --data.source SOURCE --output FILE.png [options]",
        description="Draw images and their views as a contact sheet, with the draws that training would use.",
    )
    parser.add_argument("-c", "--config", type=str | None, help="recipe or YAML file whose data settings are used")
    parser.add_argument("--output", type=str, required=True, help="picture to write (.png, .jpg, ...); must not exist")
    parser.add_argument("--n", type=int, default=8, help="images to show: the first that training would see")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and of every draw, as in training")
    parser.add_argument("--epoch", type=int, default=0, help="epoch of training whose views are shown")
    parser.add_argument("--bands", type=list[int] | None, help="bands to show as red, green and blue, or one as grey")
    parser.add_class_arguments(SimCLRDataModule, "data", skip={"seed"})
    parser.set_defaults(_recipe_settings(argv))
    arguments = parser.parse_args(argv)
    for name, least in {"n": 1, "epoch": 0}.items():
        if arguments[name] < least:
            raise InputError(f"--{name} must be at least {least}, got {arguments[name]}")
    output = require_new_file(arguments.output)
    if output.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--output {output}: the name of a picture ends in .png, .jpg and the like")
    data = SimCLRDataModule(**arguments.data.as_dict(), seed=arguments.seed)
    sheet = draw_sheet(data, arguments.n, arguments.epoch, arguments.bands)
    draft = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        sheet.save(draft)
        os.replace(draft, require_new_file(output))
    finally:
        draft.unlink(missing_ok=True)
    print(f"{output}: {sheet.width} x {sheet.height} px")


def draw_sheet(data: SimCLRDataModule, n: int, epoch: int = 0, bands: list[int] | None = None) -> Image.Image:
    """The first ``n`` images of an epoch's order and their views, as the encoder would get them."""
    source = data.open_training_images()
    data.settle(source)
    dataset = data.views_of(source)
    order = epoch_order(len(source), data.seed, epoch)[:n]
    views, draws = [], []
    for number, start in enumerate(range(0, len(order), data.global_batch_size)):
        indices = order[start : start + data.global_batch_size]
        batch = dataset.__getitems__([Key(epoch, int(index), number) for index in indices])
        draws.append(batch["draws"].numpy())
        finished = finish_views(batch, data.augmentation, dataset.image_size)
        views.append(finished["inputs"].unflatten(0, (2, -1)))
    images, names = [], []
    for index in order:
        image, shown, _ = read_or_replace(source, data.seed, epoch, int(index), data.value_range)
        images.append(image)
        instead = "" if shown == index else f" in place of unreadable {source.describe(int(index))}"
        names.append(source.describe(shown) + instead)
    inputs = torch.cat(views, dim=1).flatten(0, 1)
    return contact_sheet(images, names, inputs, np.concatenate(draws), data.augmentation, bands)


def _recipe_settings(argv: list[str]) -> dict[str, Any]:
    """The data settings and the seed of the recipe that ``--config`` names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="?")
    name = parser.parse_known_args(argv)[0].config
    if name is None:
        return {}
    path: Path = find_recipe("pretrain", name)
    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    settings = {f"data.{key}": value for key, value in ((recipe or {}).get("data") or {}).items() if key != "seed"}
    return settings | ({"seed": recipe["seed_everything"]} if "seed_everything" in (recipe or {}) else {})
