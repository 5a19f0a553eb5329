"""Pascal VOC 2007, classification: several labels an image."""

import os
import xml.etree.ElementTree as ElementTree

import numpy as np

from simclr_scale.data.sources.archives.listing import Listing, fields_of, lines_of, number_of
from simclr_scale.data.sources.base import NotOnDisk
from simclr_scale.errors import InputError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc2007(folder: str, split: str) -> Listing:
    """VOC2007 (Everingham et al. 2010): VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, VOCdevkit/VOC2007/.

    By the lists ImageSets/Main/CLASS_SPLIT.txt, in which an image is 1 (has the class), -1 (has not) or 0 (its objects
    of the class are all marked difficult); where there are none, by the objects in Annotations/, which say the same.
    """
    ids = lines_of(folder, f"ImageSets/Main/{split}.txt")
    lists = [f"ImageSets/Main/{name}_{split}.txt" for name in VOC_CLASSES]
    if all(os.path.isfile(os.path.join(folder, file)) for file in lists):
        columns = [_by_list(folder, file, ids) for file in lists]
        targets = np.array(columns, dtype=np.int8).T
    else:
        targets = np.array([_by_objects(folder, image) for image in ids], dtype=np.int8)
    return Listing([(f"JPEGImages/{image}.jpg", -1) for image in ids], VOC_CLASSES, targets)


def _by_list(folder: str, file: str, ids: list[str]) -> list[int]:
    meaning = {1: 1, -1: 0, 0: -1}
    found = {}
    for image, mark in fields_of(folder, file, 2):
        value = number_of(mark, folder, file)
        if value not in meaning:
            raise InputError(f"{os.path.join(folder, file)}: {image} is marked {mark}, wanted 1, 0 or -1")
        found[image] = meaning[value]
    missing = next((image for image in ids if image not in found), None)
    if missing is not None:
        raise InputError(f"{os.path.join(folder, file)}: does not say anything of image {missing}")
    return [found[image] for image in ids]


def _by_objects(folder: str, image: str) -> list[int]:
    path = os.path.join(folder, "Annotations", f"{image}.xml")
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except FileNotFoundError as error:
        raise NotOnDisk(f"there is no {path}") from error
    except (OSError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    row = [0] * len(VOC_CLASSES)
    for found in objects:
        name = (found.findtext("name") or "").strip()
        if name not in VOC_CLASSES:
            raise InputError(f"{path}: there is no class {name!r}")
        column = VOC_CLASSES.index(name)
        difficult = (found.findtext("difficult") or "0").strip() == "1"
        row[column] = 1 if row[column] == 1 or not difficult else -1
    return row
