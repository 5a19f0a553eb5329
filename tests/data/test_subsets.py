"""Parts of the training images."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale import SimCLRDataModule
from simclr_scale.data.sources import SubsetSource, open_source
from simclr_scale.data.subsets import balanced_order, check_subset, take_subset
from simclr_scale.errors import InputError
from tests.data.generated import GradientSource
from tests.data.sources.images import write_images


def uneven() -> np.ndarray:
    labels = np.repeat([-1, 0, 1, 2, 3], [40, 1, 9, 50, 400])
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_beginning_of_the_order_has_each_class_in_proportion(seed: int) -> None:
    labels = uneven()
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(500))
    sizes = np.bincount(labels + 1)
    for count in (5, 10, 50, 77, 250, 499, 500):
        taken = np.bincount(labels[order[:count]] + 1, minlength=5)
        assert (taken >= 1).all()
        # Where the k-th image of every class lies at k / n: of each class the part below one point, rounded up.
        places = [np.arange(taken[c]) / sizes[c] for c in range(5)]
        following = [taken[c] / sizes[c] for c in range(5) if taken[c] < sizes[c]]
        assert max(place[-1] for place in places) <= min(following, default=1)
        assert (np.abs(taken - count * sizes / 500) <= 5).all()


def test_the_seed_decides() -> None:
    labels = uneven()
    assert np.array_equal(balanced_order(labels, 3), balanced_order(labels, 3))
    first, second = (set(balanced_order(labels, seed)[:100]) for seed in (3, 4))
    assert len(first & second) < 60
    # Which class comes first when there are fewer images than classes is drawn too.
    assert len({int(labels[balanced_order(labels, seed)[0]]) for seed in range(20)}) > 2


def test_the_order_is_always_the_same() -> None:
    """Numbers that a run of a year ago has used too."""
    assert balanced_order(np.array([0, 1] * 6), 0).tolist() == [2, 3, 1, 10, 7, 0, 8, 5, 6, 11, 9, 4]


class Unlabelled(GradientSource):
    classes = ()

    def __init__(self, count: int) -> None:
        super().__init__(count, (8, 8))
        self.labels = np.full(count, -1)


def test_fractions_and_counts_are_nested_and_in_the_order_of_the_source() -> None:
    source = GradientSource(200, (8, 8))
    parts = [take_subset(source, subset, 5) for subset in (1, 0.02, 10, 0.1, 0.33, 199, 1.0)]
    assert [len(part) for part in parts] == [1, 4, 10, 20, 66, 199, 200]
    for smaller, larger in pairwise(parts):
        assert isinstance(smaller, SubsetSource)
        assert isinstance(larger, SubsetSource)
        assert set(smaller.indices) < set(larger.indices)
        assert (np.diff(larger.indices) > 0).all()
    assert np.bincount(parts[3].labels).tolist() == [10, 10]
    assert parts[3].split_description == "subset 0.1 (20 images, class-balanced, seed 5) of all images"
    assert len({part.fingerprint() for part in parts}) == len(parts)
    assert take_subset(source, None, 5) is source


def test_without_labels_the_choice_is_seeded_alone() -> None:
    source = Unlabelled(100)
    part = take_subset(source, 0.25, 1)
    assert part.split_description == "subset 0.25 (25 images, seed 1) of all images"
    assert take_subset(source, 25, 1).fingerprint() == part.fingerprint()
    assert take_subset(source, 25, 2).fingerprint() != part.fingerprint()


@pytest.mark.parametrize("subset", [0, -1, 0.0, 1.5, 500.0, float("nan"), True, "nowhere.txt"])
def test_what_is_no_subset_is_refused_before_the_data_are_opened(subset: Any) -> None:
    with pytest.raises(InputError, match=r"data\.subset"):
        check_subset(subset)
    with pytest.raises(InputError, match=r"data\.subset"):
        SimCLRDataModule("nowhere at all", subset=subset)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.subset 21: gradients has 20 training images"):
        take_subset(GradientSource(20, (8, 8)), 21, 0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    names = [f"train/{name}/{name}_{i}.png" for name in ("cat", "dog") for i in range(4)]
    return write_images(tmp_path / "photos", *names, "train/cat/same.png", "train/dog/same.png", "test/cat/t.png")


def listed(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "list.txt")


def test_a_list_of_names_and_numbers(photos: Path, tmp_path: Path) -> None:
    source = open_source(str(photos))
    part = take_subset(source, listed(tmp_path, "dog_1.png", "", "train/cat/same.png", "  0", "cat_2.png\r"), 0)
    assert [part.describe(index).rpartition("photos/")[2] for index in range(4)] == [
        "train/cat/cat_0.png",
        "train/cat/cat_2.png",
        "train/cat/same.png",
        "train/dog/dog_1.png",
    ]
    assert part.split_description.startswith("subset of 4 images listed in list.txt (sha256 ")
    assert part.split_description.endswith("...) of folder train/")
    assert (
        take_subset(source, listed(tmp_path, "0", "cat_2.png", "dog_1.png", "4"), 1).fingerprint() == part.fingerprint()
    )


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["cat_0.png", "cat_9.png", "cat_8.png"], "line 2: no training image 'cat_9.png' in .*; one is called "),
        (["t.png"], "line 1: no training image 't.png'"),
        (["same.png"], "line 1: 'same.png' is the name of several images"),
        (["0", "10"], "line 2: no image 10; the training images of .* are 0 to 9"),
        (["cat_0.png", "1", "0"], "line 3: '0' is the image of line 1 again"),
        (["-1"], "line 1: no training image '-1'"),
        (["²"], "line 1: no training image"),
        (["../photos/train/cat/cat_0.png"], "line 1: no training image"),
        ([""], "lists no image"),
    ],
)
def test_a_wrong_list_is_refused_by_its_first_wrong_line(
    photos: Path, tmp_path: Path, lines: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        take_subset(open_source(str(photos)), listed(tmp_path, *lines), 0)


def test_a_list_that_is_no_text_and_images_without_names(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(os.urandom(64) + b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as a list"):
        take_subset(open_source(str(photos)), str(tmp_path / "binary"), 0)
    with pytest.raises(InputError, match=r"'a\.png' is a name, but images of gradients have none; list their numbers"):
        take_subset(GradientSource(4, (8, 8)), listed(tmp_path, "a.png"), 0)


def test_training_takes_the_part_and_the_test_stays_whole(photos: Path) -> None:
    data = SimCLRDataModule(str(photos), subset=4, global_batch_size=2, image_size=8, num_workers=0)
    data.setup("fit")
    assert data.train_source is not None
    assert data.test_source is not None
    assert (len(data.train_source), len(data.test_source)) == (4, 1)
    assert np.bincount(data.train_source.labels).tolist() == [2, 2]
    assert sorted(int(index) for batch in data.train_dataloader() for index in batch["index"]) == [0, 1, 2, 3]


def test_few_images_and_a_dropped_tail_are_said(photos: Path) -> None:
    data = SimCLRDataModule(str(photos), global_batch_size=4, image_size=8, num_workers=0)
    data.setup("fit")
    few, tail = data.notes()
    assert few.startswith("warning: 10 training images are few: ")
    assert "--model.init_from timm:" in few
    assert tail.startswith("the last 2 of 10 images of each epoch's order")
    data = SimCLRDataModule("textures", subset=1024, global_batch_size=256, image_size=8, num_workers=0)
    data.setup("fit")
    assert data.notes() == []
