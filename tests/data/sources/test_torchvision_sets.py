import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from simclr_scale.data.sources import open_source
from simclr_scale.errors import InputError
from tests.data.sources.images import write_images


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a data set must never be downloaded")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)


def write_mnist(root: Path) -> None:
    """The idx files of MNIST: 4 train and 2 test images of 28 x 28."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, labels in (("train", [5, 0, 4, 9]), ("t10k", [7, 2])):
        images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 2051, len(labels), 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))


def write_dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    names = {split: [f"banded/{split}.jpg", f"dotted/{split}.jpg"] for split in ("train", "val", "test")}
    (base / "labels").mkdir(parents=True)
    for split, files in names.items():
        write_images(base / "images", *files)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(files) + "\n")


def write_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    write_images(base / "images", "Bengal_1.jpg", "pug_1.jpg", "pug_2.jpg")
    (base / "annotations").mkdir()
    (base / "annotations" / "trainval.txt").write_text("Bengal_1 1 1 1\npug_1 2 2 1\n")
    (base / "annotations" / "test.txt").write_text("pug_2 2 2 1\nBengal_1 1 1 1\n")


@pytest.mark.parametrize("name", ["MNIST", "mnist", "Mnist"])
def test_split_by_a_bool(name: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    train = open_source(f"torch/{name}", root=tmp_path)
    test = open_source(f"torch/{name}", root=tmp_path, split="test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([5, 0, 4, 9], [7, 2])
    assert train.labels.dtype == np.int64
    assert len(train.classes) == 10
    assert train.classes == test.classes
    assert train.name == f"torch/{name}"
    assert (train.split_description, test.split_description) == ("split train", "split test")
    assert test.describe(1) == f"torch/{name}, split test, image 1"
    expected = datasets.MNIST(tmp_path).data[2].numpy()
    assert np.array_equal(np.asarray(train.image(2)), np.repeat(expected[..., None], 3, axis=2))


def test_split_by_name_with_files(tmp_path: Path) -> None:
    write_dtd(tmp_path)
    parts = {split: open_source("torch/dtd", root=str(tmp_path), split=split) for split in ("train", "val", "test")}
    assert {split: part.labels.tolist() for split, part in parts.items()} == {split: [0, 1] for split in parts}
    assert parts["test"].describe(1) == str(tmp_path / "dtd" / "dtd" / "images" / "dotted" / "test.jpg")
    with Image.open(parts["train"].describe(1)) as expected:
        assert np.array_equal(np.asarray(parts["train"].image(1)), np.asarray(expected))
    assert "split val" in open_source("torch/dtd", root=tmp_path, split="test", test_split="val").split_description
    (tmp_path / "dtd" / "dtd" / "images" / "dotted" / "train.jpg").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"dotted/train\.jpg: not a readable image"):
        parts["train"].image(1)


def test_trainval_is_the_train_split_where_there_is_no_other(tmp_path: Path) -> None:
    write_pets(tmp_path)
    train = open_source("torch/OxfordIIITPet", root=tmp_path)
    test = open_source("torch/OxfordIIITPet", root=tmp_path, split="test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1, 0])
    assert train.classes == ("Bengal", "Pug")
    assert train.split_description == "split trainval"
    (tmp_path / "oxford-iiit-pet" / "images" / "pug_1.jpg").write_bytes(b"damaged")
    with pytest.raises(InputError, match="torch/OxfordIIITPet, split trainval, image 1: not a readable image"):
        train.image(1)


def test_val_is_the_test_where_there_is_no_other(tmp_path: Path) -> None:
    base = tmp_path / "imagenette2"
    write_images(base, "train/n01440764/a.JPEG", "train/n02102040/b.JPEG", "val/n02102040/c.JPEG")
    for wnid in (
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    ):
        write_images(base, f"train/{wnid}/a.JPEG", f"val/{wnid}/a.JPEG")
    write_images(base, "val/n01440764/c.JPEG")
    test = open_source("torch/imagenette", root=tmp_path, split="test")
    assert test.split_description == "split val"
    # The first of each class's synonyms.
    assert test.classes[:2] == ("tench", "English springer")
    assert test.labels[:2].tolist() == [0, 1]


def test_labelled_set_without_splits_is_divided(tmp_path: Path) -> None:
    write_images(tmp_path / "eurosat" / "2750", *[f"{name}/{i}.jpg" for name in ("Forest", "River") for i in range(5)])
    train, test = open_source("torch/eurosat", root=tmp_path), open_source("torch/eurosat", root=tmp_path, split="test")
    assert train.classes == ("Forest", "River")
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([4, 4], [1, 1])
    assert train.split_description == "seeded 80/20 class-balanced split, seed 0, train part of all images"
    with pytest.raises(InputError, match="EuroSAT has no splits"):
        open_source("torch/eurosat", root=tmp_path, train_split="train")


def test_targets_that_are_no_class_are_no_labels(tmp_path: Path) -> None:
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    write_images(voc / "JPEGImages", "one.jpg")
    for file, content in (
        ("ImageSets/Main/train.txt", "one\n"),
        ("Annotations/one.xml", "<annotation><a>1</a></annotation>"),
    ):
        (voc / file).parent.mkdir(parents=True)
        (voc / file).write_text(content)
    source = open_source("torch/VOCDetection", root=tmp_path)
    assert (source.classes, source.labels.tolist()) == ((), [-1])


def test_labels_kept_beside_the_file_names(tmp_path: Path) -> None:
    write_images(tmp_path / "gtsrb" / "GTSRB" / "Training", "00000/a.ppm", "00002/b.ppm", "00002/c.ppm")
    source = open_source("torch/GTSRB", root=tmp_path)
    assert source.labels.tolist() == [0, 1, 1]
    assert source.classes == ("0", "1")


def test_labels_are_asked_for_where_no_list_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Omniglot, "_check_integrity", lambda _: True)
    write_images(tmp_path / "omniglot-py" / "images_background", *[f"Greek/character0{i}/a.png" for i in (1, 2, 3)])
    source = open_source("torch/Omniglot", root=tmp_path)
    assert source.labels.tolist() == [0, 1, 2]


def test_fingerprint(tmp_path: Path) -> None:
    write_dtd(tmp_path / "a")
    write_dtd(tmp_path / "b")
    write_mnist(tmp_path)
    first = open_source("torch/DTD", root=tmp_path / "a").fingerprint()
    assert open_source("torch/DTD", root=tmp_path / "b").fingerprint() == first
    with (tmp_path / "b" / "dtd" / "dtd" / "images" / "banded" / "train.jpg").open("ab") as file:
        file.write(b"\0")
    assert open_source("torch/DTD", root=tmp_path / "b").fingerprint() != first
    digits = open_source("torch/mnist", root=tmp_path).fingerprint()
    assert open_source("torch/MNIST", root=tmp_path).fingerprint() == digits
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1] + b"\x07")
    assert open_source("torch/mnist", root=tmp_path).fingerprint() != digits


def message(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_say_where_and_how(tmp_path: Path) -> None:
    text = message("torch/cifar10", root=tmp_path, split="test")
    assert f"not found below {tmp_path}" in text
    assert f"torchvision.datasets.CIFAR10({str(tmp_path)!r}, train=False, download=True)" in text
    assert f"torchvision.datasets.DTD({str(tmp_path)!r}, split='train', download=True)" in message(
        "torch/dtd", root=tmp_path
    )
    assert f"no folder {tmp_path / 'no'} (data.root)" in message("torch/cifar10", root=tmp_path / "no")
    assert "needs data.root" in message("torch/cifar10")
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_splits(tmp_path: Path) -> None:
    write_dtd(tmp_path)
    assert "no 'CIFAR11'; did you mean CIFAR10" in message("torch/CIFAR11", root=tmp_path)
    assert "see the list" in message("torch/qqqqqqqq", root=tmp_path)
    assert "no split 'tset' (test_split); did you mean 'test'? There are train, val, test" in message(
        "torch/dtd", root=tmp_path, test_split="tset"
    )
    write_mnist(tmp_path)
    assert "no validation split" in message("torch/mnist", root=tmp_path, split="val")


@pytest.mark.parametrize("name", ["EMNIST", "CocoDetection", "Kinetics", "VisionDataset", "FakeData"])
def test_what_is_no_set_of_images_by_name_alone(name: str, tmp_path: Path) -> None:
    assert name in message(f"torch/{name}", root=tmp_path)
