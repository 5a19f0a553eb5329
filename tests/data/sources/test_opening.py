import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale.data.sources import SubsetSource, open_source
from simclr_scale.data.sources.base import digest
from simclr_scale.errors import InputError
from tests.data.sources.images import pixels, write_images


def test_relative_home_and_root_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "pictures", "a.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_source("pictures").describe(0) == str(tmp_path / "pictures" / "a.png")
    assert open_source("./pictures").name == "./pictures"
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("~/pictures")) == 1
    assert len(open_source("pictures", root="~")) == 1
    assert len(open_source("pictures", root=tmp_path)) == 1
    assert len(open_source("../pictures")) == 1


def test_a_source_goes_on_when_the_working_directory_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "pictures/a.png")
    monkeypatch.chdir(tmp_path)
    source = open_source("pictures")
    monkeypatch.chdir(tmp_path / "pictures")
    assert np.array_equal(np.asarray(source.image(0)), pixels(0))


def test_names_keep_their_case(tmp_path: Path) -> None:
    write_images(tmp_path, "My/Path/A.png")
    assert open_source(str(tmp_path / "My" / "Path")).describe(0).endswith("My/Path/A.png")


def test_textures_come_from_the_generator() -> None:
    test = open_source("textures", split="test", seed=3)
    assert len(test.classes) == 10
    assert test.labels.shape == (len(test),)
    assert test.image(0).mode == "RGB"
    assert "seed 3" in test.split_description
    assert test.fingerprint() != open_source("textures", split="test", seed=4).fingerprint()


def message(spec: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_source(spec, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "pictures/a.png")
    monkeypatch.chdir(tmp_path)
    assert (
        message("pictuers")
        == f"pictuers ({tmp_path / 'pictuers'}): no such folder; did you mean {tmp_path / 'pictures'}?"
    )
    assert "is a file; a source is a folder" in message(str(tmp_path / "pictures" / "a.png"))
    kinds = "torch/NAME, archive/NAME, hfds/PATH_OR_ID, wds/PATTERN, patches/FILE or textures"
    assert kinds in message(str(tmp_path / "nowhere" / "at" / "all"))


@pytest.mark.parametrize(
    ("spec", "meant"),
    [("Torch/CIFAR10", "torch/CIFAR10"), ("hdfs/My/Path", "hfds/My/Path"), ("texture", "textures")],
)
def test_a_mistyped_kind_of_source_is_recognised(
    spec: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {meant}?" in message(spec)


def test_what_does_not_apply_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    assert "must be one of train, val, test" in message(str(tmp_path), split="valid")
    assert "has no columns" in message(str(tmp_path), image_key="img")
    assert "textures: has no split 'all'" in message("textures", train_split="all")


def test_subset_is_a_view(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "test/dog/3.png")
    whole = open_source(str(tmp_path))
    subset = SubsetSource(whole, np.array([2, 0]))
    assert len(subset) == 2
    assert (subset.name, subset.classes) == (whole.name, whole.classes)
    assert subset.labels.tolist() == [1, 0]
    assert subset.describe(0) == whole.describe(2)
    assert np.array_equal(np.asarray(subset.image(1)), np.asarray(whole.image(0)))
    assert subset.split_description == "2 images of folder train/"
    prints = [SubsetSource(whole, np.array(order)).fingerprint() for order in ([2, 0], [0, 2], [2], [0, 1, 2])]
    assert len({*prints, whole.fingerprint()}) == 5
    assert subset.fingerprint() == prints[0]


def test_borders_count_in_a_digest() -> None:
    """A file "ab" of 1 byte is not a file "a" of "b1" bytes."""
    assert digest([b"ab", b"1"]) != digest([b"a", b"b1"])
    assert digest([b"ab", b"1"]) == digest(iter([b"ab", b"1"]))


def test_sources_pickle_for_spawned_workers(tmp_path: Path) -> None:
    write_images(tmp_path, *[f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)])
    source = open_source(str(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    assert np.array_equal(np.asarray(copy.image(3)), np.asarray(source.image(3)))


def test_folders_need_no_heavy_library() -> None:
    """Opening a folder must not cost the import of torch, torchvision or datasets."""
    code = (
        "import sys, simclr_scale.data.sources.opening\n"
        "print(sorted({'torchvision', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout == "[]\n"
