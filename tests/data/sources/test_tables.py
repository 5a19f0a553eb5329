import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.base import sampled_rows
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels, write_images


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_cache")


@pytest.fixture(autouse=True)
def cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache, not the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shared_cache)
    return shared_cache


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": png(seed), "path": None} for seed in range(count)]


def write_hub_layout(folder: Path, splits: dict[str, Any], features: dict[str, Any] | None = None) -> str:
    """One parquet file a split, by the library itself; its type annotations travel in the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return f"hfds/{folder}"


ANNOTATED = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}


@pytest.fixture
def annotated(tmp_path: Path) -> str:
    train = {"img": cells(6), "label": [0, 1, 0, 1, 1, None]}
    test = {"img": cells(2), "label": [1, -1]}
    return write_hub_layout(tmp_path / "My" / "Pets", {"train": train, "test": test}, ANNOTATED)


def test_annotated_columns_are_found(annotated: str) -> None:
    train, test = open_source(annotated), open_source(annotated, split="test")
    assert (len(train), len(test)) == (6, 2)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [0, 1, 0, 1, 1, -1]
    assert test.labels.tolist() == [1, -1]
    assert train.name == annotated
    assert train.split_description == "split train"
    assert train.describe(3) == f"{annotated}, split train, row 3"
    assert np.array_equal(np.asarray(train.image(3)), pixels(3))


def test_the_data_folder_is_left_alone(annotated: str, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(annotated.removeprefix("hfds/"))
    before = sorted(folder.rglob("*"))
    open_source(annotated)
    assert sorted(folder.rglob("*")) == before
    assert list(cache.iterdir())
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_plain_parquet_columns_are_found_by_shape(tmp_path: Path) -> None:
    """Written without the library: a struct of bytes, and integers, whose values in all splits are the classes."""
    for split, labels in (("train", [5, 3, 5, None]), ("test", [3, 8])):
        pictures = pa.array(cells(len(labels)), pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        table = pa.table({"title": ["x"] * len(labels), "picture": pictures, "kind": pa.array(labels, pa.int16())})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    train, test = open_source(f"hfds/{tmp_path}"), open_source(f"hfds/{tmp_path}", split="test")
    assert train.classes == test.classes == ("3", "5", "8")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 1, -1], [0, 2])
    assert np.array_equal(np.asarray(test.image(1)), pixels(1))


def test_bare_bytes_and_named_text_labels(tmp_path: Path) -> None:
    columns = {"jpg": [png(0), png(1), png(2)], "cls": ["dog", "cat", None], "width": [8, 8, 8]}
    spec = write_hub_layout(tmp_path, {"train": columns, "test": columns})
    source = open_source(spec, label_key="cls")
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0, -1])
    assert np.array_equal(np.asarray(source.image(2)), pixels(2))
    assert len(source.fingerprint()) == 64


def test_unlabelled_table(tmp_path: Path) -> None:
    spec = write_hub_layout(tmp_path, {"train": {"image": cells(3)}}, {"image": datasets.Image()})
    source = open_source(spec)
    assert (source.classes, source.labels.tolist()) == ((), [-1, -1, -1])
    with pytest.raises(InputError, match="no labels"):
        open_source(spec, split="test")


def test_labels_can_be_declined(annotated: str) -> None:
    source = open_source(annotated, label_key="")
    assert (source.classes, set(source.labels.tolist())) == ((), {-1})


def test_one_split_is_divided_by_the_seed(tmp_path: Path) -> None:
    columns = {"img": cells(20), "label": [0, 1] * 10}
    spec = write_hub_layout(tmp_path, {"train": columns}, ANNOTATED)
    train, test = open_source(spec), open_source(spec, split="test")
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([8, 8], [2, 2])
    assert test.split_description == "seeded 80/20 class-balanced split, seed 0, test part of split train"


def test_validation_split(tmp_path: Path) -> None:
    columns = {size: {"img": cells(size), "label": [0] * size} for size in (1, 2, 3)}
    both = {"train": columns[3], "validation": columns[2]}
    spec = write_hub_layout(tmp_path / "two", both, ANNOTATED)
    assert len(open_source(spec, split="test")) == 2
    spec = write_hub_layout(tmp_path / "three", {**both, "test": columns[1]}, ANNOTATED)
    assert [len(open_source(spec, split=split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert len(open_source(spec, split="test", test_split="validation")) == 2
    assert len(open_source(spec, train_split="validation")) == 2


def test_pictures_kept_beside_the_table(tmp_path: Path) -> None:
    """The library reads class folders too, and keeps paths in place of bytes."""
    write_images(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/dog/2.png")
    source = open_source(f"hfds/{tmp_path}")
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert np.array_equal(np.asarray(source.image(1)), pixels(1))
    before = source.fingerprint()
    (tmp_path / "train/dog/1.png").unlink()
    for call in (source.fingerprint, lambda: source.image(1)):
        with pytest.raises(InputError, match=r"row 1: .*1\.png cannot be read"):
            call()
    assert len(before) == 64


def test_damaged_and_empty_cells_name_the_row(tmp_path: Path) -> None:
    columns = {"img": [*cells(1), {"bytes": png(1)[:60], "path": None}, None], "label": [0, 1, 0]}
    source = open_source(write_hub_layout(tmp_path, {"train": columns, "test": columns}, ANNOTATED))
    assert source.image(0).mode == "RGB"
    with pytest.raises(InputError, match="split train, row 1: not a readable image"):
        source.image(1)
    with pytest.raises(InputError, match="split train, row 2: the cell 'img' is empty"):
        source.image(2)


def test_fingerprint_follows_content_and_labels(tmp_path: Path) -> None:
    def fingerprint(
        folder: str, pictures: list[Any], labels: list[int], names: tuple[str, ...] = ("cat", "dog")
    ) -> str:
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        columns = {"img": pictures, "label": labels}
        return open_source(
            write_hub_layout(tmp_path / folder, {"train": columns, "test": columns}, features)
        ).fingerprint()

    three = cells(3)
    changed = bytearray(three[2]["bytes"])
    changed[-20] ^= 1
    first = fingerprint("a", three, [0, 1, 0])
    assert fingerprint("elsewhere", three, [0, 1, 0]) == first
    others = [
        fingerprint("b", three, [0, 1, 1]),
        fingerprint("c", cells(4), [0, 1, 0, 0]),
        fingerprint("d", three[::-1], [0, 1, 0]),
        fingerprint("e", three, [0, 1, 0], ("cat", "emu")),
        fingerprint("f", [*three[:2], {"bytes": bytes(changed), "path": None}], [0, 1, 0]),
    ]
    assert len({first, *others}) == 6


def test_fingerprint_sees_every_length_and_a_sample_of_contents_of_large_tables(tmp_path: Path) -> None:
    def fingerprint(folder: str, **changed: bytes) -> str:
        pictures = [changed.get(f"row{row}", b"%04d" % row) for row in range(1500)]
        columns = {"img": pictures, "label": [0] * 1500}
        return open_source(write_hub_layout(tmp_path / folder, {"train": columns, "test": columns})).fingerprint()

    first = fingerprint("a")
    unread = next(row for row in range(1500) if row not in sampled_rows(1500))
    assert fingerprint("b", row0=b"____") != first
    assert fingerprint("c", row1499=b"____") != first
    assert fingerprint("d", **{f"row{unread}": b"longer"}) != first
    assert fingerprint("e", **{f"row{unread}": b"____"}) == first


def message(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_and_columns_that_do_not_exist(annotated: str) -> None:
    assert "no split 'trian' (train_split); did you mean 'train'? There are train, test" in message(
        annotated, train_split="trian"
    )
    assert "no column 'image' (image_key); did you mean 'img'? There are img, label" in message(
        annotated, image_key="image"
    )
    assert "column 'label' (image_key) holds no encoded images; those that do: img" in message(
        annotated, image_key="label"
    )
    assert "column 'img' (label_key) holds" in message(annotated, label_key="img")
    assert "no validation split" in message(annotated, split="val")


def test_ambiguous_columns_are_listed(tmp_path: Path) -> None:
    columns = {"left": cells(2), "right": cells(2), "age": [1, 2], "kind": [0, 1]}
    images = {"left": datasets.Image(), "right": datasets.Image()}
    integers = {"age": datasets.Value("int32"), "kind": datasets.Value("int64")}
    spec = write_hub_layout(tmp_path, {"train": columns, "test": columns}, images | integers)
    assert "images may be in any of left, right: choose by image_key" in message(spec)
    assert "labels may be in any of age, kind: choose by label_key" in message(spec, image_key="left")
    source = open_source(spec, image_key="right", label_key="kind")
    assert source.labels.tolist() == [0, 1]


def test_tables_without_images(tmp_path: Path) -> None:
    spec = write_hub_layout(tmp_path, {"train": {"text": ["a"], "label": [0]}})
    assert "no column of images; there are text, label" in message(spec)


def test_labels_outside_the_named_classes(tmp_path: Path) -> None:
    def with_labels(folder: str, *labels: int) -> str:
        spec = write_hub_layout(tmp_path / folder, {"train": {"img": cells(2), "label": [0, 1]}}, ANNOTATED)
        (file,) = (tmp_path / folder).glob("*.parquet")
        table = pq.read_table(file)
        pq.write_table(table.set_column(1, table.field("label"), pa.array(labels)), file)
        return spec

    assert "column 'label' holds 7 but names 2 classes" in message(with_labels("beyond", 0, 7))
    assert open_source(with_labels("below", -2, -1)).labels.tolist() == [-1, -1]


def test_missing_folders_never_ask_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("must not be reached"))
    for spec in ("hfds/", f"hfds/{tmp_path}/no", "hfds/./no", "hfds/~/no/where", "hfds/data/my/pets"):
        assert "no folder" in message(spec)
    (tmp_path / "train.parquet").write_bytes(b"")
    assert "no folder" in message("hfds/train.parquet")


def test_hub_ids_keep_their_case_and_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def unreachable(location: str) -> None:
        asked.append(location)
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "cannot open 'Somebody/MyPets': Couldn't reach the Hub at all" in message("hfds/Somebody/MyPets")
    assert asked == ["Somebody/MyPets"]


def test_folder_without_tables_and_damaged_tables(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "cannot open" in message(f"hfds/{tmp_path / 'empty'}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot open" in message(f"hfds/{tmp_path / 'damaged'}")


def test_missing_library_names_the_extra(annotated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "simclr_scale[hf]"' in message(annotated)


def test_cifar10(real_data: Path) -> None:
    spec = f"hfds/{real_data / 'cifar10'}"
    train, test = open_source(spec), open_source(spec, split="test")
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.classes[:4] == ("airplane", "automobile", "bird", "cat")
    # The published order of the batches begins with frog, truck, truck, deer, car; cat, ship, ship, plane, frog.
    assert train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert np.bincount(train.labels).tolist() == [5000] * 10
    for index in np.random.default_rng(0).integers(0, 50_000, 200):
        image = train.image(int(index))
        assert (image.mode, image.size) == ("RGB", (32, 32))
    # A spawned worker is sent the name of the mapped file, not 15 MB of images.
    pickled = pickle.dumps(train)
    assert len(pickled) < 2_000_000
    assert np.array_equal(np.asarray(pickle.loads(pickled).image(49_999)), np.asarray(train.image(49_999)))
