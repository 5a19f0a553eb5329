"""The data sets of SimCLR's transfer results, read from miniatures in the layout of their archives."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from torchvision import datasets

from simclr_scale.data.sources import Source, SubsetSource, open_source
from simclr_scale.data.sources.archives import ARCHIVES
from simclr_scale.data.sources.archives.voc import VOC_CLASSES
from simclr_scale.data.sources.base import NotOnDisk, file_name, targets_of
from simclr_scale.data.sources.joined import JoinedSource
from simclr_scale.data.sources.matlab import read_variables
from simclr_scale.errors import InputError
from tests.data.sources import miniatures
from tests.data.sources.miniatures import ONE_LABEL


def found(source: Source) -> dict[str, str]:
    return {file_name(source, i): source.classes[source.labels[i]] for i in range(len(source))}


@pytest.mark.parametrize("name", ONE_LABEL)
def test_every_split_has_its_images_and_their_labels(name: str, tmp_path: Path) -> None:
    expected = ONE_LABEL[name](tmp_path)
    for split, images in expected.items():
        parts = [open_source(f"archive/{name}", root=tmp_path, split=s) for s in ("train", "test")]
        if split == "all":
            assert {**found(parts[0]), **found(parts[1])} == images
            continue
        source = open_source(f"archive/{name}", root=tmp_path, split=split)  # type: ignore[arg-type]
        assert found(source) == images
        assert source.image(0).size == (14, 12)  # type: ignore[union-attr]
        assert source.classes == parts[0].classes
        # The same from a copy elsewhere, and the same where the root is the data set's own folder.
        assert source.fingerprint() == open_source(f"archive/{name}", root=tmp_path, split=split).fingerprint()  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(parts[0])).fingerprint() == parts[0].fingerprint()
    assert parts[0].fingerprint() != parts[1].fingerprint()
    if "val" not in expected:
        with pytest.raises(InputError, match="no validation split"):
            open_source(f"archive/{name}", root=tmp_path, split="val")


@pytest.mark.parametrize(
    ("name", "folder"), [("food101", "food-101"), ("pets", "pets"), ("dtd", "dtd"), ("flowers102", "flowers102")]
)
def test_the_root_may_be_the_data_set_itself(name: str, folder: str, tmp_path: Path) -> None:
    expected = ONE_LABEL[name](tmp_path)
    assert found(open_source(f"archive/{name}", root=tmp_path / folder)) == expected["train"]


TORCHVISION: dict[str, tuple[type, dict[str, Any], str, str]] = {
    "food101": (datasets.Food101, {}, "food-101", "food-101"),
    "cars": (datasets.StanfordCars, {}, "cars", "stanford_cars"),
    "aircraft": (datasets.FGVCAircraft, {}, "fgvc-aircraft-2013b", "fgvc-aircraft-2013b"),
    "dtd": (datasets.DTD, {}, "dtd", "dtd/dtd"),
    "pets": (datasets.OxfordIIITPet, {"train": "trainval"}, "pets", "oxford-iiit-pet"),
    "flowers102": (datasets.Flowers102, {}, "flowers102", "flowers-102"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_reads_the_same_from_its_own_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchvision has the data set and the splits: the same images, the same numbers of the classes."""
    kind, splits, ours, theirs = TORCHVISION[name]
    expected = ONE_LABEL[name](tmp_path)
    base = tmp_path / theirs
    if ours != theirs:
        shutil.copytree(tmp_path / ours, tmp_path / "kept")
        shutil.rmtree(tmp_path / ours)
        shutil.copytree(tmp_path / "kept", base)
    monkeypatch.setattr(datasets.flowers102, "check_integrity", lambda path, md5: os.path.isfile(path))
    for split in expected:
        oracle = kind(tmp_path, split=splits.get(split, split))
        files = [str(path) for path in getattr(oracle, "_image_files", None) or getattr(oracle, "_images", [])]
        labels = getattr(oracle, "_labels", None)
        if not files:
            files, labels = zip(*oracle._samples, strict=True)
        assert labels is not None
        source = open_source(f"archive/{name}", root=tmp_path, split=split)  # type: ignore[arg-type]
        theirs_by_path = {os.path.relpath(f, base): int(label) for f, label in zip(files, labels, strict=True)}
        assert {file_name(source, i): int(source.labels[i]) for i in range(len(source))} == theirs_by_path


@pytest.mark.parametrize("lists", [True, False])
def test_voc_has_several_labels_and_difficult_ones_are_unsaid(lists: bool, tmp_path: Path) -> None:
    """From the lists of classes, and from the objects of the annotations where there are no lists: the same."""
    expected = miniatures.voc2007(tmp_path, lists)
    for split, targets in expected.items():
        source = open_source("archive/voc2007", root=tmp_path, split=split)  # type: ignore[arg-type]
        assert source.classes == VOC_CLASSES
        assert (source.labels == -1).all()
        np.testing.assert_array_equal(targets_of(source), targets)
        assert {-1, 0, 1} == set(np.unique(targets))
        assert file_name(source, 1).endswith("001.jpg")
    part = SubsetSource(source, np.array([4, 2]))
    np.testing.assert_array_equal(targets_of(part), targets[[4, 2]])
    np.testing.assert_array_equal(targets_of(JoinedSource([part, source])), np.concatenate([targets[[4, 2]], targets]))
    before = source.fingerprint()
    source.targets[0, 0] ^= 1  # type: ignore[attr-defined]
    assert source.fingerprint() != before


@pytest.mark.parametrize("place", ["SUN397", "SUN397/Partitions", "Partitions"])
def test_the_lists_of_sun397_lie_in_it_or_beside_it(place: str, tmp_path: Path) -> None:
    expected = miniatures.sun397(tmp_path, place)
    assert found(open_source("archive/sun397", root=tmp_path, split="test")) == expected["test"]


def test_dead_addresses_of_birdsnap_are_left_out_and_counted(tmp_path: Path) -> None:
    miniatures.birdsnap(tmp_path)
    train = open_source("archive/birdsnap", root=tmp_path)
    assert train.split_description == "train split, without 1 of the 15 train images that are not on disk"


def test_an_image_that_is_listed_twice_comes_once_and_that_is_said(tmp_path: Path) -> None:
    expected = miniatures.dtd(tmp_path)["train"]
    path = tmp_path / "dtd/labels/train1.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3], lines[0], lines[3]]))
    train = open_source("archive/dtd", root=tmp_path)
    assert (len(train), found(train)) == (12, expected)
    assert train.split_description == "train split, 3 of its entries being repetitions of an image"
    miniatures.voc2007(tmp_path)
    ids = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/val.txt"
    before = open_source("archive/voc2007", root=tmp_path, split="val")
    ids.write_text(ids.read_text() + ids.read_text().splitlines()[4])
    after = open_source("archive/voc2007", root=tmp_path, split="val")
    np.testing.assert_array_equal(targets_of(before), targets_of(after))


@pytest.mark.parametrize("name", [*ARCHIVES])
def test_what_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotOnDisk, match=rf"archive/{name}: there is no .* below {tmp_path}$"):
        open_source(f"archive/{name}", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("food101", "food-101/meta/test.json", "test.json; is the archive unpacked in full"),
        ("food101", "food-101/images", "9 of the 9 test images are not in"),
        ("sun397", "SUN397/Testing_01.txt", r"there is no Testing_01.txt \(of Partitions.zip\) in"),
        ("cars", "cars/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat; is the archive"),
        ("pets", "pets/annotations/test.txt", "test.txt; is the archive"),
        ("dtd", "dtd/images/banded/banded_20.jpg", "1 of the 12 test images are not in .* is images/banded/banded_20"),
        ("flowers102", "flowers102/imagelabels.mat", "imagelabels.mat"),
    ],
)
def test_a_part_that_is_not_there_is_named(name: str, lost: str, message: str, tmp_path: Path) -> None:
    ONE_LABEL[name](tmp_path)
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(NotOnDisk, match=message):
        open_source(f"archive/{name}", root=tmp_path, split="test")


def test_the_test_images_of_voc_come_in_an_archive_of_their_own(tmp_path: Path) -> None:
    miniatures.voc2007(tmp_path)
    for path in (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main").glob("*test.txt"):
        path.unlink()
    with pytest.raises(NotOnDisk, match=r"no .*Main/test.txt; is the archive unpacked in full\?"):
        open_source("archive/voc2007", root=tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("food101", "food-101/meta/train.json", '{"pizza"', "train.json: cannot be read"),
        ("food101", "food-101/meta/train.json", '{"pizzo": ["a/b"]}', "train.json: there is no class 'pizzo'"),
        ("food101", "food-101/meta/train.json", "{}", "the list of its train images in .* is empty"),
        ("birdsnap", "birdsnap/images.txt", "url\tpath\nx\ty\n", "images.txt: has no column 'species_id'"),
        ("birdsnap", "birdsnap/images.txt", "path\tspecies_id\ny\t8\n", "images.txt: there is no species '8'"),
        ("birdsnap", "birdsnap/images.txt", "path\tspecies_id\ny\n", "images.txt: line 2 has 1 of 2 fields"),
        ("sun397", "SUN397/Training_01.txt", "/c/cave/sun_1.jpg\n", "there is no class 'c/cave'"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", "1\n", "entry 1 has 1 fields, wanted 2"),
        ("pets", "pets/annotations/trainval.txt", "a_1 x 1 1\n", "trainval.txt: 'x', wanted a whole number"),
        ("pets", "pets/annotations/trainval.txt", "a_1 9 1 1\n", "breeds are numbered"),
        (
            "birdsnap",
            "birdsnap/images.txt",
            "path\tspecies_id\nA/1.jpg\t1\nA/1.jpg\t3\n",
            "download/images/A/1.jpg is in the list of its train images with two classes",
        ),
        ("cars", "cars/devkit/cars_train_annos.mat", "no mat", "cars_train_annos.mat: not a readable MATLAB file"),
        ("flowers102", "flowers102/imagelabels.mat", "no mat", "imagelabels.mat: not a readable MATLAB file"),
    ],
)
def test_lists_that_say_nonsense_are_named(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    ONE_LABEL[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        open_source(f"archive/{name}", root=tmp_path)
    assert not isinstance(caught.value, NotOnDisk)


def test_lists_of_voc_that_say_nonsense_are_named(tmp_path: Path) -> None:
    miniatures.voc2007(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2007"
    (base / "ImageSets/Main/cat_train.txt").write_text("000000  2\n")
    with pytest.raises(InputError, match=r"cat_train.txt: 000000 is marked 2, wanted 1, 0 or -1"):
        open_source("archive/voc2007", root=tmp_path)
    (base / "ImageSets/Main/cat_train.txt").write_text("000000  1\n")
    with pytest.raises(InputError, match=r"cat_train.txt: does not say anything of image 000001"):
        open_source("archive/voc2007", root=tmp_path)
    (base / "ImageSets/Main/cat_train.txt").unlink()
    for content, message in (("<annotation>", "cannot be read"), ("<a><object><name>elk</name></object></a>", "'elk'")):
        (base / "Annotations/000000.xml").write_text(content)
        with pytest.raises(InputError, match=rf"000000.xml: .*{message}"):
            open_source("archive/voc2007", root=tmp_path)


def test_an_unknown_archive_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"archive/food: there is no such archive; did you mean archive/food101\?"):
        open_source("archive/food", root=tmp_path)
    with pytest.raises(InputError, match="there are food101, birdsnap, "):
        open_source("archive/zzz", root=tmp_path)


def test_damaged_structures_are_input_errors_and_never_crash(tmp_path: Path) -> None:
    miniatures.cars(tmp_path)
    path = tmp_path / "cars/devkit/cars_train_annos.mat"
    rows = read_variables(str(path), ["annotations"])["annotations"]
    assert [row["fname"] for row in rows] == [f"{i:05d}.jpg" for i in range(1, 16)]
    savemat(path, {"annotations": loadmat(path)["annotations"]})  # not compressed: damage meets the structure itself
    whole, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = whole.copy()
        damaged[rng.integers(len(whole), size=8)] = rng.integers(256, size=8)
        path.write_bytes(damaged[: rng.integers(200, len(whole) + 1)].tobytes())
        try:
            open_source("archive/cars", root=tmp_path)
        except InputError:
            refused += 1
    assert refused > 100
