import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale.data.sources import Source, open_source
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels, write_image, write_images


def files(source: Source, root: Path) -> list[str]:
    return [Path(source.describe(index)).relative_to(root).as_posix() for index in range(len(source))]


def test_classes_are_the_first_level_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "train/dog/b.png", "train/cat/z.png", "train/cat/2020/jan/a.png", "test/cat/t.png")
    source = open_source(str(tmp_path))
    assert files(source, tmp_path) == ["train/cat/2020/jan/a.png", "train/cat/z.png", "train/dog/b.png"]
    assert source.classes == ("cat", "dog")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 1]
    assert source.name == str(tmp_path)
    assert np.array_equal(np.asarray(source.image(2)), pixels(0))


def test_extensions_in_any_case_and_nothing_hidden(tmp_path: Path) -> None:
    write_images(tmp_path, "a.JPG", "b.Png", "c.jpeg", "d.TIFF", "e.webp", ".hidden.png", ".cache/f.png", "sub/.g.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "png").write_bytes(b"no extension")
    assert files(open_source(str(tmp_path)), tmp_path) == ["a.JPG", "b.Png", "c.jpeg", "d.TIFF", "e.webp"]


def test_order_is_that_of_the_posix_path(tmp_path: Path) -> None:
    names = ["b/1.png", "a.b/1.png", "a/2.png", "a/10.png", "ä/1.png", "B/1.png"]
    write_images(tmp_path, *names)
    source = open_source(str(tmp_path))
    assert source.classes == ("B", "a", "a.b", "b", "ä")
    # One image a class goes to the train part; class a has two.
    test = open_source(str(tmp_path), split="test")
    assert sorted(files(source, tmp_path) + files(test, tmp_path)) == sorted(names)
    assert files(source, tmp_path) == sorted(files(source, tmp_path))


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, "b.png", "a.png")
    source = open_source(str(tmp_path))
    assert source.classes == ()
    assert source.labels.tolist() == [-1, -1]
    assert source.split_description == "all images"
    for split in ("test", "val"):
        with pytest.raises(InputError, match=f"no labels, so there is no {split} part"):
            open_source(str(tmp_path), split=split)


def test_a_single_class_folder_counts_as_no_labels(tmp_path: Path) -> None:
    """A classifier over one class is always right: such a test would be worthless."""
    write_images(tmp_path, "images/a.png", "images/b.png")
    source = open_source(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1])


def test_images_beside_class_folders_are_unlabelled_and_train_only(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)], "loose.png", "zoo.png")
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), split="test")
    assert [file for file in files(train, tmp_path) if "/" not in file] == ["loose.png", "zoo.png"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [-1] * 2
    assert test.labels.tolist() == [0, 1]


def test_empty_folders_are_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "ant" / "deeper").mkdir(parents=True)
    assert open_source(str(tmp_path)).classes == ("cat", "dog")


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_images(
        tmp_path, "train/cat/1.png", "train/dog/1.png", "test/dog/2.png", "test/emu/1.png", "other/x.png", "y.png"
    )
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), split="test")
    assert files(train, tmp_path) == ["train/cat/1.png", "train/dog/1.png"]
    assert files(test, tmp_path) == ["test/dog/2.png", "test/emu/1.png"]
    assert train.classes == test.classes == ("cat", "dog", "emu")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [1, 2])
    assert (train.split_description, test.split_description) == ("folder train/", "folder test/")
    with pytest.raises(InputError, match="no validation split"):
        open_source(str(tmp_path), split="val")


def test_val_is_the_test_where_there_is_no_other(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/2.png")
    assert files(open_source(str(tmp_path), split="test"), tmp_path) == ["val/cat/2.png"]
    with pytest.raises(InputError, match="no validation split"):
        open_source(str(tmp_path), split="val")


def test_val_beside_test_selects(tmp_path: Path) -> None:
    write_images(tmp_path, "Train/cat/1.png", "Train/dog/1.png", "VAL/cat/2.png", "VAL/gnu/2.png", "Test/cat/3.png")
    parts = {split: open_source(str(tmp_path), split=split) for split in ("train", "val", "test")}
    assert {split: files(part, tmp_path)[0] for split, part in parts.items()} == {
        "train": "Train/cat/1.png",
        "val": "VAL/cat/2.png",
        "test": "Test/cat/3.png",
    }
    assert {part.classes for part in parts.values()} == {("cat", "dog", "gnu")}


def test_named_split_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "fold1/cat/1.png", "fold1/dog/1.png", "fold2/cat/2.png", "fold3/cat/3.png")
    names: Any = {"train_split": "fold1", "test_split": "fold3"}
    assert files(open_source(str(tmp_path), **names), tmp_path) == ["fold1/cat/1.png", "fold1/dog/1.png"]
    assert files(open_source(str(tmp_path), split="test", **names), tmp_path) == ["fold3/cat/3.png"]
    with pytest.raises(
        InputError, match=r"no split 'fold4' \(test_split\); did you mean 'fold.'\?.*fold1, fold2, fold3"
    ):
        open_source(str(tmp_path), train_split="fold1", test_split="fold4")
    with pytest.raises(InputError, match="both 'fold1'"):
        open_source(str(tmp_path), train_split="fold1", test_split="fold1")


def test_nothing_but_train_is_divided(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(5)])
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), split="test")
    assert train.classes == ("cat", "dog")
    assert (len(train), len(test)) == (8, 2)
    assert train.split_description == "seeded 80/20 class-balanced split, seed 0, train part of folder train/"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_images(tmp_path, "bus/1.png", "train/1.png")
    assert open_source(str(tmp_path)).classes == ("bus", "train")


def test_labelled_folder_without_splits_is_divided_by_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)])
    train, test = open_source(str(tmp_path), seed=1), open_source(str(tmp_path), split="test", seed=1)
    assert sorted(files(train, tmp_path) + files(test, tmp_path)) == sorted(
        f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)
    )
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert test.split_description == "seeded 80/20 class-balanced split, seed 1, test part of all images"
    again = open_source(str(tmp_path), split="test", seed=1)
    other = open_source(str(tmp_path), split="test", seed=2)
    assert files(again, tmp_path) == files(test, tmp_path)
    assert files(other, tmp_path) != files(test, tmp_path)
    assert len({part.fingerprint() for part in (train, test, other)}) == 3
    assert again.fingerprint() == test.fingerprint()
    with pytest.raises(InputError, match="no validation split of its own"):
        open_source(str(tmp_path), split="val")


def test_no_class_with_two_images_cannot_be_tested(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/1.png", "dog/1.png")
    assert len(open_source(str(tmp_path))) == 2
    with pytest.raises(InputError, match="no class has two images"):
        open_source(str(tmp_path), split="test")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_images(elsewhere, "far.png", "deep/1.png")
    root = tmp_path / "root"
    write_images(root, "cat/1.png", "dog/1.png", "dog/2.png")
    (root / "cat" / "link.png").symlink_to(elsewhere / "far.png")
    (root / "emu").symlink_to(elsewhere / "deep")
    (root / "cat" / "up").symlink_to(root)
    (root / "again").symlink_to(root)
    (root / "cat" / "here").symlink_to(root / "cat")
    (root / "itself").symlink_to(root / "itself")
    (root / "dangling").symlink_to(root / "nowhere")
    (elsewhere / "deep" / "back").symlink_to(root / "emu")
    train, test = open_source(str(root)), open_source(str(root), split="test")
    assert train.classes == ("cat", "dog", "emu")
    assert sorted(files(train, root) + files(test, root)) == [
        "cat/1.png",
        "cat/link.png",
        "dog/1.png",
        "dog/2.png",
        "emu/1.png",
    ]


def test_unreadable_image_names_the_file(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
    source = open_source(str(tmp_path))
    assert source.image(0).mode == "RGB"
    for index, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            source.image(index)
    with pytest.raises(InputError, match=r"c\.png: cannot be read"):
        source.fingerprint()


def test_index_out_of_range(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path, "a.png", "b.png")))
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source.image(index)


def test_fingerprint_follows_files_sizes_and_labels_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "one"
    write_images(root, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png")
    seen = [open_source(str(root)).fingerprint()]
    assert len(seen[0]) == 64

    moved = root.rename(tmp_path / "two")
    os.utime(moved / "train/cat/1.png", (0, 0))
    write_image(moved / "test/dog/3.png")
    assert open_source(str(moved)).fingerprint() == seen[0]

    write_image(moved / "train/cat/2.png", seed=9)
    seen.append(open_source(str(moved)).fingerprint())
    (moved / "train/cat/2.png").rename(moved / "train/cat/3.png")
    seen.append(open_source(str(moved)).fingerprint())
    (moved / "train/cat/3.png").rename(moved / "train/dog/3.png")
    seen.append(open_source(str(moved)).fingerprint())
    with (moved / "train/dog/3.png").open("ab") as file:
        file.write(b"\0")
    seen.append(open_source(str(moved)).fingerprint())
    assert len(set(seen)) == len(seen)


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / "plain.png").rename(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.describe(0) == str(tmp_path / name)
    assert source.image(0).size == (8, 6)
    assert source.fingerprint() == open_source(str(tmp_path)).fingerprint()


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no image"):
        open_source(str(tmp_path))
    (tmp_path / "scan.dcm").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds scan\.dcm and the like, but no image.*\.jpg"):
        open_source(str(tmp_path))
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png")
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match=r"test/: holds no image"):
        open_source(str(tmp_path), split="test")


@pytest.mark.usefixtures("real_data")
class TestRealFolders:
    def test_clothing(self, real_data: Path) -> None:
        train = open_source(str(real_data / "clothing"))
        test = open_source(str(real_data / "clothing"), split="test")
        assert (len(train), len(test)) == (1100, 372)
        assert train.classes == test.classes
        assert len(train.classes) == 10
        assert np.bincount(train.labels).tolist() == [110] * 10
        image = test.image(371)
        assert image.mode == "RGB"
        assert min(image.size) >= 400

    def test_chest_xray(self, real_data: Path) -> None:
        train = open_source(str(real_data / "chest_xray"))
        test = open_source(str(real_data / "chest_xray"), split="test")
        assert train.classes == ("Covid-19", "No_findings", "Pneumonia")
        assert np.bincount(train.labels).tolist() == [99, 400, 400]
        assert np.bincount(test.labels).tolist() == [25, 100, 100]
        channels = np.asarray(train.image(0))
        assert channels.shape[2] == 3
        assert (channels == channels[..., :1]).all()
