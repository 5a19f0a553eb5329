"""WebDataset shards as a source."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.shards import expand_braces, split_of
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels
from tests.data.sources.shard_files import encoded, write_labelled, write_shard


def message(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pattern(folder: Path, name: str = "*.tar") -> str:
    return f"wds/{folder / name}"


def numbers(source: Any) -> list[int]:
    return [int(source.file_name(index).removesuffix(".png")) for index in range(len(source))]


@pytest.fixture
def split_shards(tmp_path: Path) -> Path:
    """Three training shards and a test shard; classes 3 and 12."""
    for shard in range(3):
        write_labelled(tmp_path / f"pets-train-{shard:03}.tar", [3, 12, 3, 12], first=4 * shard)
    write_labelled(tmp_path / "pets-test-000.tar", [12, 3], first=100)
    return tmp_path


@pytest.mark.parametrize("name", ["", "*.tar", "pets-{train-{000..002},test-000}.tar", "pets-{test,train}-*.tar"])
def test_every_way_to_name_shards_gives_the_same_splits(split_shards: Path, name: str) -> None:
    if "-{" in name.replace("pets-{", ""):
        name = "pets-train-{000..002}.tar::" + str(split_shards / "pets-test-000.tar")
    train, test = (open_source(pattern(split_shards, name), split=split) for split in ("train", "test"))
    assert numbers(train) == list(range(12))
    assert numbers(test) == [100, 101]
    assert train.classes == test.classes == ("3", "12"), "numbers in their order"
    assert train.labels.tolist() == [0, 1] * 6
    assert test.labels.tolist() == [1, 0]
    assert (train.split_description, test.split_description) == ("shards train", "shards test")


def test_any_image_in_any_order(split_shards: Path) -> None:
    source = open_source(pattern(split_shards))
    for index in (11, 0, 7, 3, 7):
        assert np.array_equal(np.asarray(source.image(index)), pixels(index))
    assert source.encoded(5) == encoded(5)
    assert source.describe(9) == f"{split_shards / 'pets-train-002.tar'}, member 0009.png"


def test_more_shards_than_may_be_open(split_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr_scale.data.sources.shard_reader._OPEN_FILES", 2)
    source = open_source(pattern(split_shards))
    for index in np.random.default_rng(0).integers(0, 12, 40):
        assert source.encoded(int(index)) == encoded(int(index))
    assert len(source._reader._open) == 2  # type: ignore[attr-defined]


def test_a_pickled_source_opens_its_own_files(split_shards: Path) -> None:
    source = open_source(pattern(split_shards))
    source.image(0)
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._reader._open
    assert copy.encoded(8) == encoded(8)
    assert copy.fingerprint() == source.fingerprint()


def test_the_fingerprint_is_that_of_names_sizes_and_classes(tmp_path: Path) -> None:
    prints = [
        open_source(pattern(write_labelled(tmp_path / name / "x.tar", labels, first).parent)).fingerprint()
        for name, labels, first in (
            ("first", [0, 0, 1, 1], 0),
            ("same", [0, 0, 1, 1], 0),
            ("labels", [0, 1, 0, 1], 0),
            ("names", [0, 0, 1, 1], 10),
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_shards_without_splits_are_divided_by_class(tmp_path: Path) -> None:
    write_labelled(tmp_path / "a-0.tar", [0] * 10)
    write_labelled(tmp_path / "a-1.tar", [1] * 10, first=10)
    train, test = (open_source(pattern(tmp_path), split=split, seed=4) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert sorted(numbers(train) + numbers(test)) == list(range(20))
    assert "80/20 class-balanced split, seed 4, train part of all shards" in train.split_description


def test_unlabelled_shards_are_all_train(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {f"{n}.png": encoded(n) for n in range(5)})
    source = open_source(pattern(tmp_path))
    assert (len(source), source.classes, source.labels.tolist()) == (5, (), [-1] * 5)
    assert "no labels" in message(pattern(tmp_path), split="test")


def test_folders_of_splits(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("val", 10), ("test", 20)):
        write_labelled(tmp_path / name / "0.tar", ["cat", "dog"], first)
    for name, first in (("train", 0), ("val", 10), ("test", 20)):
        part = open_source(f"wds/{tmp_path}", split=name)  # type: ignore[arg-type]
        assert numbers(part) == [first, first + 1]
        assert part.classes == ("cat", "dog")
    assert numbers(open_source(f"wds/{tmp_path}/{{test,train}}/0.tar", split="test")) == [20, 21]


def test_splits_of_other_names(tmp_path: Path) -> None:
    write_labelled(tmp_path / "fold1-000.tar", [0, 1])
    write_labelled(tmp_path / "fold2-000.tar", [0, 1], first=10)
    options: dict[str, Any] = {"train_split": "fold2", "test_split": "fold1"}
    assert numbers(open_source(pattern(tmp_path), **options)) == [10, 11]
    assert "There are fold1, fold2" in message(pattern(tmp_path), train_split="third")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-0001.tar", "train"),
        ("train/0001.tar", "train"),
        ("imagenet1k-validation-07.tar", "validation"),
        ("Test_3.tar", "Test"),
        ("train0001.tar", "train"),
        ("latest-0001.tar", "latest"),
        ("0001.tar", ""),
        ("sets/pets-0001.tar", "pets"),
    ],
)
def test_the_split_of_a_shard(path: str, split: str) -> None:
    assert split_of(path) == split


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}", ["a-08", "a-09", "a-10", "a-11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{x}/{..}", ["{x}/{..}"]),
        ("{,s}", ["", "s"]),
    ],
)
def test_braces(text: str, expanded: list[str]) -> None:
    assert list(expand_braces(text, "wds/")) == expanded


@pytest.mark.parametrize("text", ["{0..9999999}", "{0..2000}{0..2000}", "{0..99999999999999999999}"])
def test_braces_that_would_fill_the_memory(text: str) -> None:
    with pytest.raises(InputError, match="more than"):
        list(expand_braces(text, "wds/"))


@pytest.mark.parametrize(
    "spec",
    [
        "wds/pipe:touch hacked",
        "wds/ pipe:touch hacked",
        "wds/PIPE:touch hacked",
        "wds/http://host/a-{000..127}.tar",
        "wds/s3://bucket/a.tar",
        "wds/hf://datasets/a.tar",
        "wds/gs://bucket/a.tar",
        "wds/-",
        "wds/a.tar::pipe:touch hacked",
        "pipe:touch hacked",
        "https://host/a.tar",
    ],
)
def test_streams_are_refused_in_words(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "a.tar", {"0.png": encoded()})
    text = message(spec)
    assert "an exact resume need an index, which a stream has not" in text
    assert not (tmp_path / "hacked").exists()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    write_labelled(tmp_path / "a-000.tar", [0, 1])
    assert message(f"wds/{tmp_path}/a-{{000..003}}.tar").endswith(f"no shard {tmp_path / 'a-001.tar'}")
    assert "no .tar file there" in message(f"wds/{tmp_path}/b-*.tar")
    (tmp_path / "empty").mkdir()
    assert "no .tar file there" in message(f"wds/{tmp_path}/empty")
    write_shard(tmp_path / "texts" / "a.tar", {"0.txt": "nothing"})
    assert "1 shards, but no image in them" in message(f"wds/{tmp_path}/texts")


def test_relative_patterns_lie_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_labelled(tmp_path / "sets" / "a.tar", [0, 1])
    assert len(open_source("wds/sets/*.tar", root=tmp_path)) == 2
    monkeypatch.chdir(tmp_path)
    source = open_source("wds/sets/a.tar")
    monkeypatch.chdir(tmp_path / "sets")
    assert source.encoded(1) == encoded(1)


def test_a_shard_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    shard = write_labelled(tmp_path / "a.tar", [0, 1])
    source = open_source(f"wds/{shard}")
    content = shard.read_bytes()
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(InputError, match=r"a\.tar: no image of \d+ bytes at byte \d+; the shard has changed"):
        source.image(0)
    shard.write_bytes(content[:600])
    with pytest.raises(InputError, match="the shard has changed"):
        source.image(1)


def test_an_empty_and_a_foreign_member_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0.png": b"", "1.jpg": b"GIF nonsense", "2.png": encoded(2)})
    source = open_source(pattern(tmp_path))
    assert len(source) == 3
    for index in (0, 1):
        with pytest.raises(InputError, match=rf"a\.tar, member {index}\.\w+: not a readable image"):
            source.image(index)
    assert np.array_equal(np.asarray(source.image(2)), pixels(2))


def test_names_that_climb_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "deeper"
    names = ["../../escaped.png", "/absolute.png", "C:\\..\\back.png", "a/../../b.png"]
    write_shard(folder / "a.tar", {name: encoded(seed) for seed, name in enumerate(names)})
    source = open_source(f"wds/{folder}")
    assert [source.file_name(index) for index in range(len(source))] == names
    for seed in range(len(names)):
        assert np.array_equal(np.asarray(source.image(seed)), pixels(seed))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"deep/deeper/a.tar", "deep/deeper/.simclr_scale/a.tar.npz"}
