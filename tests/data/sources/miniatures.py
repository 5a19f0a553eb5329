"""The twelve data sets of SimCLR's transfer results in small: in the layout of their archives, with tiny images.

Each function writes below `root`, and returns the images that each split must have, by path, with their labels.
"""

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Expected = dict[str, dict[str, str]]


def jpeg(path: Path, color: int, rng: np.random.Generator) -> None:
    """A tiny image of noise around a colour of its own for each class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(1000 + color).integers(30, 225, 3)
    pixels = (base + rng.normal(0, 10, (12, 14, 3))).clip(0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def write(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def food101(root: Path) -> Expected:
    base, rng, classes = root / "food-101", np.random.default_rng(0), ["apple_pie", "pizza", "sushi"]
    write(base / "meta" / "classes.txt", classes)
    expected: Expected = {}
    for split, count in (("train", 6), ("test", 3)):
        listed = {name: [f"{name}/{100 * i + len(split)}" for i in range(count)] for name in reversed(classes)}
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
        expected[split] = {f"images/{file}.jpg": name for name, files in listed.items() for file in files}
        for file, name in expected[split].items():
            jpeg(base / file, classes.index(name), rng)
    return expected


def birdsnap(root: Path) -> Expected:
    """Eight images a species, three of them test; one of each split has died."""
    base, rng = root / "birdsnap", np.random.default_rng(1)
    species = [("1", "Acadian Flycatcher", "Acadian_Flycatcher"), ("3", "Brant", "Brant"), ("7", "Sora", "Sora")]
    write(base / "species.txt", ["id\tcommon\tscientific\tdir", *(f"{i}\t{n}\tLatin name\t{d}" for i, n, d in species)])
    rows, test = [], []
    expected: Expected = {"train": {}, "test": {}}
    for number, (identifier, name, folder) in enumerate(species):
        for index in range(8):
            path = f"{folder}/{number}{index}.jpg"
            rows.append(f"http://example.org/{index}\tabc\t{path}\t{identifier}\t1\t2\t3\t4")
            split = "test" if index < 3 else "train"
            test += [path] if split == "test" else []
            if (number, index) not in ((1, 0), (1, 7)):
                jpeg(base / "download" / "images" / path, number, rng)
                expected[split][f"download/images/{path}"] = name
    write(base / "images.txt", ["url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1\tbb_x2\tbb_y2", *rows])
    write(base / "test_images.txt", ["path", *test])
    return expected


def sun397(root: Path, lists: str = "SUN397") -> Expected:
    base, rng = root / "SUN397", np.random.default_rng(2)
    classes = ["a/abbey", "a/apartment_building/outdoor", "b/barn"]
    write(base / "ClassName.txt", [f"/{name}" for name in classes])
    expected: Expected = {"train": {}, "test": {}}
    for number, name in enumerate(classes):
        for index in range(9):
            file = f"{name}/sun_{number}{index}.jpg"
            jpeg(base / file, number, rng)
            if index < 8:  # most images are in neither list
                expected["train" if index % 2 else "test"][file] = name
    for split, file in (("train", "Training"), ("test", "Testing")):
        write(root / lists / f"{file}_01.txt", [f"/{path}" for path in expected[split]])
        write(root / lists / f"{file}_02.txt", ["/of/another/split.jpg"])
    return expected


def cars(root: Path) -> Expected:
    base, rng, names = root / "cars", np.random.default_rng(3), ["AM General Hummer 2000", "Audi S6 2011", "BMW M3"]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)}, do_compression=True)
    expected: Expected = {}
    for split, count in (("train", 5), ("test", 2)):
        kind = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        rows = np.zeros((1, 3 * count), dtype=kind)
        expected[split] = {}
        for index in range(3 * count):
            file = f"{index + 1:05d}.jpg"
            rows[0, index] = (1, 2, 3, 4, np.uint8(index % 3 + 1), file)
            jpeg(base / f"cars_{split}" / file, index % 3, rng)
            expected[split][f"cars_{split}/{file}"] = names[index % 3]
        file = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(base / file, {"annotations": rows}, do_compression=True)
    return expected


def aircraft(root: Path) -> Expected:
    base, rng, names = (
        root / "fgvc-aircraft-2013b" / "data",
        np.random.default_rng(4),
        ["707-320", "A340 (wide)", "C-47"],
    )
    write(base / "variants.txt", names)
    expected: Expected = {}
    for split, count in (("train", 4), ("val", 3), ("test", 3)):
        ids = {f"{len(split)}{len(split) * 10 + i:06d}": names[i % 3] for i in range(3 * count)}
        write(base / f"images_variant_{split}.txt", [f"{image} {name}" for image, name in ids.items()])
        expected[split] = {f"data/images/{image}.jpg": name for image, name in ids.items()}
        for file, name in expected[split].items():
            jpeg(base.parent / file, names.index(name), rng)
    return expected


def dtd(root: Path) -> Expected:
    base, rng, names = root / "dtd", np.random.default_rng(5), ["banded", "blotchy", "woven"]
    expected: Expected = {}
    for number, split in enumerate(("train", "val", "test")):
        expected[split] = {f"images/{name}/{name}_{number}{i}.jpg": name for name in names for i in range(4)}
        write(base / "labels" / f"{split}1.txt", [file.removeprefix("images/") for file in expected[split]])
        write(base / "labels" / f"{split}2.txt", ["woven/of_another_split.jpg"])
        for file, name in expected[split].items():
            jpeg(base / file, names.index(name), rng)
    return expected


def pets(root: Path) -> Expected:
    base, rng, names = root / "pets", np.random.default_rng(6), ["Abyssinian", "american_bulldog", "Bengal"]
    expected: Expected = {}
    for split, count in (("train", 5), ("test", 3)):
        ids = [(f"{name}_{len(split)}{i}", number) for number, name in enumerate(names) for i in range(count)]
        lines = [f"{image} {number + 1} 1 {number + 1}" for image, number in ids]
        write(base / "annotations" / ("trainval.txt" if split == "train" else "test.txt"), lines)
        expected[split] = {f"images/{image}.jpg": names[number] for image, number in ids}
        for image, number in ids:
            jpeg(base / "images" / f"{image}.jpg", number, rng)
    return expected


def caltech101(root: Path) -> Expected:
    """33 images of one class and 32 of the others, without splits."""
    base, rng = root / "101_ObjectCategories", np.random.default_rng(7)
    expected: Expected = {"all": {}}
    for number, name in enumerate(("BACKGROUND_Google", "Faces", "accordion")):
        for index in range(33 if name == "Faces" else 32):
            file = f"{name}/image_{index + 1:04d}.jpg"
            jpeg(base / file, number, rng)
            expected["all"][file] = name
    (base / "BACKGROUND_Google" / "tmp").write_text("a file of the archive that is no image")
    return expected


def flowers102(root: Path) -> Expected:
    base, rng = root / "flowers102", np.random.default_rng(8)
    labels = np.arange(30) % 3 + 1
    ids = np.random.default_rng(9).permutation(30) + 1
    parts = {"train": ids[:9], "val": ids[9:18], "test": ids[18:]}
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": labels.astype(np.uint8)[None]})
    savemat(
        base / "setid.mat", {"trnid": parts["train"][None], "valid": parts["val"][None], "tstid": parts["test"][None]}
    )
    for number, label in enumerate(labels, 1):
        jpeg(base / "jpg" / f"image_{number:05d}.jpg", int(label), rng)
    return {split: {f"jpg/image_{i:05d}.jpg": str(labels[i - 1]) for i in part} for split, part in parts.items()}


VOC_MARKS = {"train": 24, "val": 20, "test": 30}


def voc2007(root: Path, lists: bool = True) -> dict[str, np.ndarray]:
    """Images of one or two classes, some objects difficult: targets (N, 20), in the order of the names of the files."""
    from simclr_scale.data.sources.archives.voc import VOC_CLASSES

    base, rng = root / "VOCdevkit" / "VOC2007", np.random.default_rng(10)
    expected = {}
    for start, (split, count) in enumerate(VOC_MARKS.items()):
        rows = np.zeros((count, 20), dtype=int)
        ids = [f"{1000 * start + i:06d}" for i in range(count)]
        for i, image in enumerate(ids):
            objects = [(i % 20, False)]
            if i % 3 == 0:
                objects.append(((i + 5) % 20, i % 2 == 0))
            if i % 4 == 0:
                objects.append((i % 20, True))  # a difficult object beside one that is not: the image has the class
            for column, difficult in objects:
                rows[i, column] = 1 if rows[i, column] == 1 or not difficult else -1
            jpeg(base / "JPEGImages" / f"{image}.jpg", i % 20, rng)
            body = "".join(
                f"<object><name>{VOC_CLASSES[c]}</name><difficult>{int(d)}</difficult></object>" for c, d in objects
            )
            write(base / "Annotations" / f"{image}.xml", [f"<annotation><filename>x</filename>{body}</annotation>"])
        write(base / "ImageSets" / "Main" / f"{split}.txt", ids)
        if lists:
            for column, name in enumerate(VOC_CLASSES):
                marks = {1: " 1", 0: "-1", -1: " 0"}
                lines = [f"{image} {marks[rows[i, column]]}" for i, image in enumerate(ids)]
                write(base / "ImageSets" / "Main" / f"{name}_{split}.txt", lines)
        expected[split] = rows
    return expected


def cifar(root: Path, classes: int) -> Expected:
    """Pickled batches: `torch/CIFAR10` or `torch/CIFAR100`, which however know the md5 sums of the real files."""
    rng = np.random.default_rng(classes)
    folder = root / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    folder.mkdir(parents=True)
    colors = rng.integers(0, 256, (classes, 3))
    names = [f"class {number:02d}" for number in range(classes)]
    key = {10: "labels", 100: "fine_labels"}[classes]
    batches = {10: [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"], 100: ["train", "test"]}[classes]
    expected: Expected = {"train": {}, "test": {}}
    for batch in batches:
        labels = np.arange(classes * (1 if batch.startswith("data") else 3)) % classes
        pixels = (colors[labels][:, :, None] + rng.normal(0, 6, (len(labels), 3, 1024))).clip(0, 255)
        with open(folder / batch, "wb") as file:
            pickle.dump({"data": pixels.astype(np.uint8), key: labels.tolist()}, file)
        split = "test" if batch.startswith("test") else "train"
        expected[split] |= {f"{batch} {index}": names[label] for index, label in enumerate(labels)}
    meta = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}[classes]
    with open(folder / meta[0], "wb") as file:
        pickle.dump({meta[1]: names}, file)
    return expected


ONE_LABEL: dict[str, Callable[[Path], Expected]] = {
    "food101": food101,
    "birdsnap": birdsnap,
    "sun397": sun397,
    "cars": cars,
    "aircraft": aircraft,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "flowers102": flowers102,
}


def write_twelve(root: Path) -> None:
    for make in ONE_LABEL.values():
        make(root)
    voc2007(root)
    cifar(root, 10)
    cifar(root, 100)
