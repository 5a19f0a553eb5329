"""Archives that list their images in text files."""

import json
import os

from simclr_scale.data.sources.archives.listing import Listing, fields_of, index_of, lines_of, number_of
from simclr_scale.data.sources.base import NotOnDisk
from simclr_scale.errors import InputError


def food101(folder: str, split: str) -> Listing:
    """Food-101 (Bossard et al. 2014): food-101.tar.gz, with meta/classes.txt and meta/train.json or test.json."""
    classes = lines_of(folder, "meta/classes.txt")
    path = os.path.join(folder, "meta", f"{split}.json")
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)
    except FileNotFoundError as error:
        raise NotOnDisk(f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(listed, dict) or not all(isinstance(files, list) for files in listed.values()):
        raise InputError(f"{path}: wanted lists of images by class")
    images = [
        (f"images/{file}.jpg", index_of(name, classes, folder, f"meta/{split}.json"))
        for name, files in listed.items()
        for file in files
    ]
    return Listing(images, classes)


def birdsnap(folder: str, split: str) -> Listing:
    """Birdsnap (Berg et al. 2014): birdsnap.tgz holds lists, and a script that fetches images to download/images/.

    Tables with tabs and a header: species.txt (id, common, scientific, dir), images.txt (url, md5, path, species_id,
    ...) and test_images.txt (path). Images whose address has died are left out.
    """
    species = {row["id"]: row["common"] for row in _table(folder, "species.txt", "id", "common")}
    numbers = {identifier: number for number, identifier in enumerate(species)}
    test = {row["path"] for row in _table(folder, "test_images.txt", "path")}
    images = []
    for row in _table(folder, "images.txt", "path", "species_id"):
        if row["species_id"] not in numbers:
            raise InputError(f"{os.path.join(folder, 'images.txt')}: there is no species {row['species_id']!r}")
        if (row["path"] in test) == (split == "test"):
            images.append((f"download/images/{row['path']}", numbers[row["species_id"]]))
    return Listing(images, list(species.values()), may_lack_images=True)


def sun397(folder: str, split: str) -> Listing:
    """SUN397 (Xiao et al. 2010), split 1 of ten: SUN397.tar.gz, and the lists of Partitions.zip, 50 + 50 a class.

    Training_01.txt and Testing_01.txt may lie in the folder, in Partitions/ within it or beside it.
    """
    places = [folder, os.path.join(folder, "Partitions"), os.path.join(os.path.dirname(folder), "Partitions")]
    file = {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    lists = next((place for place in places if os.path.isfile(os.path.join(place, file))), None)
    if lists is None:
        raise NotOnDisk(f"there is no {file} (of Partitions.zip) in {', '.join(places)}")
    classes = [line.strip("/") for line in lines_of(folder, "ClassName.txt")]
    images = [
        (path.strip("/"), index_of(os.path.dirname(path.strip("/")), classes, lists, file))
        for path in lines_of(lists, file)
    ]
    return Listing(images, classes)


def aircraft(folder: str, split: str) -> Listing:
    """FGVC Aircraft (Maji et al. 2013), the 100 variants: fgvc-aircraft-2013b.tar.gz."""
    classes = lines_of(folder, "data/variants.txt")
    file = f"data/images_variant_{split}.txt"
    rows = fields_of(folder, file, 2)
    return Listing([(f"data/images/{i}.jpg", index_of(name, classes, folder, file)) for i, name in rows], classes)


def dtd(folder: str, split: str) -> Listing:
    """Describable Textures (Cimpoi et al. 2014), split 1 of ten: dtd-r1.0.1.tar.gz."""
    file = f"labels/{split}1.txt"
    lists = {name: lines_of(folder, f"labels/{name}1.txt") for name in ("train", "val", "test")}
    classes = sorted({line.partition("/")[0] for lines in lists.values() for line in lines})
    return Listing(
        [(f"images/{line}", index_of(line.partition("/")[0], classes, folder, file)) for line in lists[split]], classes
    )


def pets(folder: str, split: str) -> Listing:
    """Oxford-IIIT Pets (Parkhi et al. 2012): images.tar.gz and annotations.tar.gz, 37 breeds."""
    lists = {part: fields_of(folder, f"annotations/{part}.txt", 4) for part in ("trainval", "test")}
    names: dict[int, str] = {}
    for part, rows in lists.items():
        for image, breed, *_ in rows:
            names[number_of(breed, folder, f"annotations/{part}.txt")] = image.rpartition("_")[0]
    if sorted(names) != list(range(1, len(names) + 1)):
        raise InputError(
            f"{os.path.join(folder, 'annotations')}: breeds are numbered {sorted(names)}, wanted 1, 2, ..."
        )
    rows = lists["trainval" if split == "train" else split]
    return Listing([(f"images/{row[0]}.jpg", int(row[1]) - 1) for row in rows], [names[n] for n in sorted(names)])


def caltech101(folder: str, split: str) -> Listing:
    """Caltech-101 (Fei-Fei et al. 2004): 101_ObjectCategories.tar.gz, 101 classes and BACKGROUND_Google.

    It has no splits; the paper draws 30 images of every class to train on and tests on the rest. The background counts
    as a class, as in the paper's count of 3,060 training images.
    """
    del split
    if not os.path.isdir(folder):
        raise NotOnDisk(f"there is no {folder}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    images = [
        (f"{name}/{file}", label)
        for label, name in enumerate(classes)
        for file in os.listdir(os.path.join(folder, name))
        if file.endswith(".jpg") and not file.startswith(".")
    ]
    return Listing(images, classes, whole=True)


def _table(folder: str, file: str, *wanted: str) -> list[dict[str, str]]:
    """The rows of a table with tabs and a header, by column. Raises InputError where a column wanted is not there."""
    header, *rows = lines_of(folder, file) or [""]
    columns = header.split("\t")
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise InputError(f"{os.path.join(folder, file)}: has no column {missing[0]!r} in its first line")
    table = [dict(zip(columns, row.split("\t"), strict=False)) for row in rows]
    for number, row in enumerate(table, 2):
        if any(name not in row for name in wanted):
            raise InputError(f"{os.path.join(folder, file)}: line {number} has {len(row)} of {len(columns)} fields")
    return table
