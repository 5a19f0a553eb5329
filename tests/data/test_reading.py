"""Images that cannot be read, and those in their place: the same ones for everybody."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader

from simclr_scale.data.augmentation import resolve
from simclr_scale.data.memory import load_pixels
from simclr_scale.data.reading import (
    first_readable,
    read_or_replace,
    read_tensor,
    readable_instead,
    replacements,
)
from simclr_scale.data.sampler import GlobalBatchSampler, Position
from simclr_scale.data.sources import open_source
from simclr_scale.data.views import Batch, ViewsDataset, keep
from simclr_scale.errors import InputError
from tests.data.damaged import write_photographs
from tests.data.generated import GradientSource
from tests.gloo_pool import GlooPool

NATURAL = resolve("natural", {})
BAD = (3, 4, 11)


def dataset(folder: Path | str, in_memory: bool = False) -> ViewsDataset:
    source = open_source(str(folder))
    unreadable: dict[int, str] = {}
    pixels = load_pixels(source, True, unreadable) if in_memory else None
    return ViewsDataset(source, NATURAL, 16, seed=1, pixels=pixels, unreadable=unreadable)


def epoch_of(images: ViewsDataset, workers: int = 0, rank: int = 0, world_size: int = 1) -> list[Batch]:
    sampler = GlobalBatchSampler(
        len(images), 8, seed=1, rank=rank, world_size=world_size, position=lambda: Position(2, 0)
    )
    return list(DataLoader(images, batch_sampler=sampler, num_workers=workers, collate_fn=keep))


@pytest.mark.parametrize("kind", ["jpg", "png", "grey.jpg", "cmyk.jpg"])
def test_a_tensor_is_the_image(tmp_path: Path, kind: str) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    mode = {"grey.jpg": "L", "cmyk.jpg": "CMYK"}.get(kind, "RGB")
    coarse.resize((37, 29), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / f"a.{kind}")
    source = open_source(str(tmp_path))
    tensor = read_tensor(source, 0)
    assert (tensor.shape, tensor.dtype) == ((3, 29, 37), torch.uint8)
    difference = tensor.permute(1, 2, 0).numpy().astype(int) - np.asarray(source.image(0))
    assert np.abs(difference).max() <= 2


def test_a_source_without_files_gives_its_pixels() -> None:
    source = GradientSource(2, (20, 30))
    np.testing.assert_array_equal(read_tensor(source, 1).permute(1, 2, 0), np.asarray(source.image(1)))


def test_replacements_are_a_uniform_choice_of_others() -> None:
    firsts = [next(replacements(0, epoch, 2, 5)) for epoch in range(4000)]
    assert set(firsts) == {0, 1, 3, 4}
    counts = np.bincount(firsts, minlength=5)[[0, 1, 3, 4]]
    assert (((counts - 1000) ** 2) / 1000).sum() < 16.3  # chi-square of 3 degrees, p = .001
    assert list(replacements(0, 1, 2, 5)) == list(replacements(0, 1, 2, 5))
    assert list(replacements(1, 1, 2, 5)) != list(replacements(0, 1, 2, 5))
    assert set(replacements(0, 0, 0, 2)) == {1}
    assert list(replacements(0, 0, 0, 1)) == []


def test_a_replacement_may_be_bad_too(tmp_path: Path) -> None:
    chain = replacements(1, 2, 5, 12)
    others = list(dict.fromkeys(chain))
    bad = (5, *others[:2])
    source = open_source(str(write_photographs(tmp_path, 12, bad)))
    image, shown, unreadable = read_or_replace(source, 1, 2, 5)
    assert shown == others[2]
    assert torch.equal(image, read_tensor(source, shown))
    assert [index for index, _ in unreadable if index not in bad] == []
    assert {index for index, _ in unreadable} == set(bad)
    assert all(reason.startswith(source.describe(index)) for index, reason in unreadable)
    assert readable_instead(bad, 1, 2, 5, 12) == shown


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    source = open_source(str(write_photographs(tmp_path, 6, range(6))))
    with pytest.raises(InputError, match=r"none of 101 images can be read; the first: .*003\.jpg"):
        read_or_replace(source, 0, 0, 3)
    with pytest.raises(InputError, match=r"none of the first images can be read; .*000\.jpg"):
        first_readable(source)
    with pytest.raises(InputError, match="hardly any of the 6 images"):
        readable_instead(range(6), 0, 0, 3, 6)


def test_the_first_image_may_be_bad(tmp_path: Path) -> None:
    source = open_source(str(write_photographs(tmp_path, 3, (0,))))
    assert torch.equal(first_readable(source), read_tensor(source, 1))


def test_a_batch_with_bad_files(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path, 24, BAD)
    source = open_source(str(folder))
    source.labels = np.arange(24)
    images = ViewsDataset(source, NATURAL, 16, seed=1)
    whole = ViewsDataset(open_source(str(write_photographs(tmp_path / "whole", 24))), NATURAL, 16, seed=1)
    met: set[int] = set()
    for batch, unharmed in zip(epoch_of(images), epoch_of(whole), strict=True):
        assert torch.equal(batch["index"], unharmed["index"])
        assert torch.equal(batch["draws"], unharmed["draws"])
        for row, index in enumerate(batch["index"].tolist()):
            if index in BAD:
                shown = readable_instead(BAD, 1, 2, index, 24)
                assert batch["label"][row] == shown
                assert not torch.equal(batch["views"][row], unharmed["views"][row])
            else:
                assert batch["label"][row] == index
                assert torch.equal(batch["views"][row], unharmed["views"][row])
        met |= {index for index, _ in batch.get("unreadable", ())}
        assert "unreadable" not in unharmed
    assert met == set(BAD)


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_and_memory_replace_alike(tmp_path: Path, in_memory: bool) -> None:
    images = dataset(write_photographs(tmp_path, 24, BAD), in_memory)
    alone, in_two = epoch_of(images), epoch_of(images, workers=2)
    assert images.unreadable == (set(BAD) if in_memory else set())
    on_disk = epoch_of(dataset(tmp_path))
    for one, two, disk in zip(alone, in_two, on_disk, strict=True):
        for name, value in one.items():
            assert two[name] == value if name == "unreadable" else torch.equal(two[name], value), name
        for name in ("label", "index", "draws"):
            assert torch.equal(one[name], disk[name])


def share_of_a_rank(rank: int, world_size: int, folder: str) -> list[Batch]:
    return epoch_of(dataset(folder), rank=dist.get_rank(), world_size=dist.get_world_size())


def test_ranks_replace_alike(gloo: GlooPool, tmp_path: Path) -> None:
    folder = str(write_photographs(tmp_path, 24, BAD))
    shares = gloo(2, share_of_a_rank, folder)
    for batch, *parts in zip(epoch_of(dataset(folder)), *shares, strict=True):
        for name in ("views", "draws", "label", "index"):
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name]), name
        met = [bad for part in parts for bad in part.get("unreadable", [])]
        assert sorted(batch.get("unreadable", [])) == sorted(met)


def test_memory_names_bad_files_or_stops(tmp_path: Path) -> None:
    source = open_source(str(write_photographs(tmp_path, 6, (2,))))
    with pytest.raises(InputError, match=r"002\.jpg: not a readable image"):
        load_pixels(source)
    unreadable: dict[int, str] = {}
    pixels = load_pixels(source, unreadable=unreadable)
    assert pixels is not None
    assert list(unreadable) == [2]
    assert pixels[2].eq(0).all()
