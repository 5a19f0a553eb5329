"""Archives that list their images in MATLAB files."""

import os
from typing import Any

import numpy as np

from simclr_scale.data.sources.archives.listing import Listing
from simclr_scale.data.sources.base import NotOnDisk
from simclr_scale.data.sources.matlab import list_variables, read_variables
from simclr_scale.errors import InputError


def cars(folder: str, split: str) -> Listing:
    """Stanford Cars (Krause et al. 2013): cars_train.tgz, cars_test.tgz, car_devkit.tgz and the labels of the test.

    Those are cars_test_annos_withlabels.mat, beside the devkit's folder or in it: the devkit's own have no classes.
    """
    names = _variable(os.path.join(folder, "devkit", "cars_meta.mat"), "class_names")
    if split == "test":
        places = [os.path.join(folder, part, "cars_test_annos_withlabels.mat") for part in ("", "devkit")]
        path = next((place for place in places if os.path.isfile(place)), places[0])
    else:
        path = os.path.join(folder, "devkit", "cars_train_annos.mat")
    annotations = _variable(path, "annotations")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{os.path.join(folder, 'devkit', 'cars_meta.mat')}: class_names is no list of words")
    images = []
    for entry in annotations if isinstance(annotations, list) else [None]:
        file, label = (entry.get("fname"), entry.get("class")) if isinstance(entry, dict) else (None, None)
        if not isinstance(file, str) or not isinstance(label, np.ndarray) or label.size != 1:
            raise InputError(f"{path}: wanted annotations with one fname and class each")
        images.append((f"cars_{split}/{file}", int(label.item()) - 1))
    return Listing(images, names)


def flowers102(folder: str, split: str) -> Listing:
    """Oxford 102 Flowers (Nilsback and Zisserman 2008): 102flowers.tgz, imagelabels.mat and setid.mat."""
    labels = _numbers(os.path.join(folder, "imagelabels.mat"), "labels")
    path = os.path.join(folder, "setid.mat")
    chosen = _numbers(path, {"train": "trnid", "val": "valid", "test": "tstid"}[split])
    if chosen.min(initial=1) < 1 or chosen.max(initial=1) > len(labels):
        raise InputError(f"{path}: names image {int(chosen.max())}, and there are labels of {len(labels)}")
    images = [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in chosen.tolist()]
    return Listing(images, [str(number) for number in range(1, int(labels.max()) + 1)])


def _numbers(path: str, name: str) -> np.ndarray:
    values = _variable(path, name)
    if not isinstance(values, np.ndarray) or not values.size or not np.array_equal(values, np.rint(values)):
        raise InputError(f"{path}: {name} is no row of whole numbers")
    return values.ravel().astype(np.int64)


def _variable(path: str, name: str) -> Any:
    if not os.path.isfile(path):
        raise NotOnDisk(f"there is no {path}")
    if name not in [variable.name for variable in list_variables(path)]:
        raise InputError(f"{path}: has no variable {name!r}")
    return read_variables(path, [name])[name]
