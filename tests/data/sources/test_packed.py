"""The packed format: what it keeps of a data set, and how damage to it is found."""

import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale.data.packing import Packing, pack
from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.opening import open_parts
from simclr_scale.data.sources.packed import damaged_shards, read_index
from simclr_scale.errors import InputError
from tests.data.sources.images import write_images

SMALL = Packing(size=64, images_per_shard=4)


def packed(source: Path, output: Path, packing: Packing = SMALL) -> str:
    pack(open_parts(str(source)), str(output), packing, spec=str(source))
    return str(output)


def message(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(source: Any) -> list[str]:
    return [source.file_name(index) for index in range(len(source))]


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    names = [
        f"{split}/{name}/{i}.png" for split in ("train", "val", "test") for name in ("cat", "dog") for i in range(3)
    ]
    return write_images(tmp_path / "photos", *names, "train/loose.png", "test/eel/9.png")


def test_a_packed_data_set_is_its_source(split_folder: Path, tmp_path: Path) -> None:
    output = packed(split_folder, tmp_path / "packed")
    for split in ("train", "val", "test"):
        for spec in (output, f"wds/{output}"):
            ours, theirs = open_source(spec, split=split), open_source(str(split_folder), split=split)  # type: ignore[arg-type]
            assert files(ours) == files(theirs)
            assert ours.classes == theirs.classes == ("cat", "dog", "eel")
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert ours.split_description == f"folder {split}/, packed at 64 px"
            for index in range(len(ours)):
                assert np.array_equal(np.asarray(ours.image(index)), np.asarray(theirs.image(index)))
    train = open_source(output)
    assert train.describe(0) == f"{output}/train-000000.tar, image train/cat/0.png"
    copy = pickle.loads(pickle.dumps(train))
    assert copy.fingerprint() == train.fingerprint()
    assert np.array_equal(np.asarray(copy.image(5)), np.asarray(train.image(5)))


def test_any_reader_of_webdataset_finds_images_and_labels(split_folder: Path, tmp_path: Path) -> None:
    """Without its index too: the names and members of the shards say all but the names of the classes."""
    output = Path(packed(split_folder, tmp_path / "packed"))
    with tarfile.open(output / "train-000001.tar") as tar:
        names = tar.getnames()
    assert names == ["000000004.png", "000000004.cls", "000000005.png", "000000005.cls", "000000006.png"]
    train = open_source(str(output))
    (output / "index.json").unlink()
    bare = open_source(f"wds/{output}")
    assert bare.labels.tolist() == train.labels.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert [bare.encoded(index) for index in range(7)] == [train.encoded(index) for index in range(7)]


def test_another_program_can_read_it_by_the_index(split_folder: Path, tmp_path: Path) -> None:
    """By nothing but the description of the format."""
    output = Path(packed(split_folder, tmp_path / "packed"))
    facts, arrays = json.loads((output / "index.json").read_text()), np.load(output / "images.npz")
    names = arrays["names"].tobytes()
    row = 0
    for shard in facts["shards"]:
        content = (output / shard["name"]).read_bytes()
        for _ in range(shard["images"]):
            name = names[arrays["name_ends"][row - 1] if row else 0 : arrays["name_ends"][row]].decode()
            image = content[arrays["offsets"][row] : arrays["offsets"][row] + arrays["sizes"][row]]
            assert image == (split_folder / name).read_bytes()
            label = arrays["labels"][row]
            assert (facts["classes"][label] if label >= 0 else "loose.png") in name
            row += 1
    assert row == 7 + 6 + 7


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_seeded_split_is_that_of_the_source_although_images_are_missing(tmp_path: Path, part: Any) -> None:
    names = [f"{name}/{i:02}.png" for name in ("cat", "dog") for i in range(20)]
    folder = write_images(tmp_path / "photos", *names)
    for name in ("cat/03.png", "cat/11.png", "dog/00.png"):
        (folder / name).write_bytes(b"not an image")
    output = packed(folder, tmp_path / "packed")
    for seed in (0, 1):
        ours, theirs = open_source(output, split=part, seed=seed), open_source(str(folder), split=part, seed=seed)
        broken = {"cat/03.png", "cat/11.png", "dog/00.png"}
        assert files(ours) == [name for name in files(theirs) if name not in broken]
        assert f"seed {seed}, {part} part of all images, packed at 64 px" in ours.split_description
        assert [ours.classes[label] for label in ours.labels] == [name[:3] for name in files(ours)]
    assert "has no validation split" in message(output, split="val")
    assert "its source had no splits" in message(output, train_split="train")


def test_an_unlabelled_set_is_all_train(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", *[f"{i}.png" for i in range(6)])
    source = open_source(packed(folder, tmp_path / "packed"))
    assert (len(source), source.classes) == (6, ())
    assert "no labels" in message(str(tmp_path / "packed"), split="test")


def test_the_fingerprint_is_that_of_the_content(split_folder: Path, tmp_path: Path) -> None:
    first = open_source(packed(split_folder, tmp_path / "first")).fingerprint()
    assert open_source(packed(split_folder, tmp_path / "again")).fingerprint() == first
    assert open_source(packed(split_folder, tmp_path / "other", Packing(size=8))).fingerprint() != first
    assert open_source(str(tmp_path / "first"), split="test").fingerprint() != first


def test_damage_is_found_and_named(split_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    packed(split_folder, output)
    shard = output / "train-000001.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:-512])
    assert message(str(output)) == f"{shard}: damaged; {len(good) - 512} bytes, index.json says {len(good)}"
    shard.unlink()
    assert message(str(output)) == f"{shard}: missing, although index.json lists it"
    # One byte of an image: too costly to look for at every start, found by a verification.
    shard.write_bytes(good[:700] + b"~" + good[701:])
    assert len(open_source(str(output))) == 7
    assert damaged_shards(read_index(str(output))) == [str(shard)]
    shard.write_bytes(good)
    assert damaged_shards(read_index(str(output))) == []
    images = output / "images.npz"
    images.write_bytes(images.read_bytes()[:-1] + b"~")
    assert f"{images}: damaged" in message(str(output))


@pytest.mark.parametrize(
    ("key", "lie"),
    [
        ("version", 2),
        ("shards", None),
        ("shards", [{"name": "../../outside.tar", "split": "train", "images": 1, "bytes": 10240, "sha256": ""}]),
        ("shards", [{"name": "train-000000.tar", "split": "nowhere", "images": 20, "bytes": 10240, "sha256": ""}]),
        ("shards", [{"name": "train-000000.tar", "split": "train", "images": -1, "bytes": 10240, "sha256": ""}]),
        ("classes", ["cat"]),
        ("classes", 7),
        ("splits", {}),
        ("settings", {}),
    ],
)
def test_an_index_that_lies_is_refused(split_folder: Path, tmp_path: Path, key: str, lie: object) -> None:
    output = tmp_path / "packed"
    packed(split_folder, output)
    index = output / "index.json"
    facts = json.loads(index.read_text())
    index.write_text(json.dumps({**facts, key: lie}))
    assert str(index) in message(str(output))


def test_images_beyond_their_shard_are_refused(split_folder: Path, tmp_path: Path) -> None:
    import hashlib

    output = tmp_path / "packed"
    packed(split_folder, output)
    arrays = dict(np.load(output / "images.npz"))
    for key, values in (
        ("offsets", arrays["offsets"] + 10**6),
        ("sizes", -arrays["sizes"]),
        ("labels", arrays["labels"] + 9),
    ):
        np.savez(output / "images.npz", **{**arrays, key: values})  # type: ignore[arg-type]
        facts = json.loads((output / "index.json").read_text())
        facts["images_sha256"] = hashlib.sha256((output / "images.npz").read_bytes()).hexdigest()
        (output / "index.json").write_text(json.dumps(facts))
        assert "damaged, or not an index of simclr-scale prepare" in message(str(output))


def test_a_folder_of_photos_may_hold_an_index_of_its_own(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "index.json").write_text('{"my": "notes"}')
    assert len(open_source(str(tmp_path))) == 1
