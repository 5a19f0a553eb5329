"""Every kind of source, with labels and without, on one rank and two: no image twice an epoch, none lost unseen."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist

from simclr_scale import SimCLRDataModule
from simclr_scale.data.packing import Packing, pack
from simclr_scale.data.sources.opening import open_parts
from tests.data.sources.images import write_images
from tests.data.sources.shard_files import encoded, write_labelled, write_shard
from tests.data.sources.test_tables import ANNOTATED, cells, write_hub_layout
from tests.data.sources.test_torchvision_sets import write_mnist
from tests.gloo_pool import GlooPool

Options = dict[str, Any]


def packed(source: Path, output: Path) -> Options:
    pack(open_parts(str(source)), str(output), Packing(16, images_per_shard=4), spec="x")
    return {"source": str(output)}


def flat(folder: Path) -> Path:
    return write_images(folder / "flat", *[f"{n}.png" for n in range(11)])


def classes(folder: Path) -> Path:
    return write_images(folder / "classes", *[f"{name}/{n}.png" for name in ("cat", "dog") for n in range(7)])


def splits(folder: Path) -> Path:
    names = [f"{split}/{name}/{n}.png" for split in ("train", "test") for name in ("cat", "dog") for n in range(5)]
    return write_images(folder / "splits", *names)


def table(folder: Path) -> str:
    labels = [n % 2 for n in range(11)]
    columns = {"train": {"img": cells(11), "label": labels}, "test": {"img": cells(3), "label": labels[:3]}}
    return write_hub_layout(folder / "table", columns, ANNOTATED)


def mnist(folder: Path) -> Options:
    write_mnist(folder)
    return {"source": "torch/mnist", "root": str(folder)}


def shards(folder: Path) -> Options:
    for number in range(3):
        write_labelled(folder / f"shards-train-{number}.tar", [0, 1, 1, 0][: 4 - number // 2], 4 * number)
    write_labelled(folder / "shards-test-0.tar", [1, 0], 50)
    return {"source": f"wds/{folder}/shards-{{train,test}}-*.tar"}


def bare_shards(folder: Path) -> Options:
    for number in range(2):
        members = {f"{number}{n}.png": encoded(10 * number + n) for n in range(6 - number)}
        write_shard(folder / f"bare-{number}.tar", members)
    return {"source": f"wds/{folder}/bare-{{0..1}}.tar"}


# What to open, how many training images that has, and whether they are labelled.
SOURCES: dict[str, tuple[Callable[[Path], Options], int, bool]] = {
    "a flat folder": (lambda folder: {"source": str(flat(folder))}, 11, False),
    "a folder of classes": (lambda folder: {"source": str(classes(folder))}, 12, True),
    "a folder of splits": (lambda folder: {"source": str(splits(folder))}, 10, True),
    "a set of torchvision": (mnist, 4, True),
    "a table": (lambda folder: {"source": table(folder)}, 11, True),
    "a table without labels": (lambda folder: {"source": table(folder), "label_key": ""}, 11, False),
    "shards": (shards, 11, True),
    "shards without labels": (bare_shards, 11, False),
    "a packed flat folder": (lambda folder: packed(flat(folder), folder / "packed"), 11, False),
    "a packed folder of classes": (lambda folder: packed(classes(folder), folder / "packed"), 12, True),
    "a packed folder of splits": (lambda folder: packed(splits(folder), folder / "packed"), 10, True),
    "a part of a packed folder": (lambda folder: packed(splits(folder), folder / "packed") | {"subset": 7}, 7, True),
}


def epochs(rank: int, world_size: int, options: Options, workers: int = 0) -> list[list[tuple[int, int, float]]]:
    """Of two epochs, index, label and a checksum of the views of every image that all ranks together were given."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    trainer: Any = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        num_devices=world_size,
        current_epoch=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    data = SimCLRDataModule(**options, global_batch_size=4, image_size=8, num_workers=workers)
    data.trainer = trainer
    data.setup("fit")
    seen = []
    for trainer.current_epoch in (0, 1):
        mine = []
        for batch in data.train_dataloader():
            first, second = data.on_after_batch_transfer(batch, 0)["inputs"].double().unflatten(0, (2, -1))
            sums = (first.sum((1, 2, 3)) + 3 * second.sum((1, 2, 3))).tolist()
            mine += list(zip(batch["index"].tolist(), batch["label"].tolist(), sums, strict=True))
        shares: list[Any] = [None] * world_size
        if world_size > 1:
            dist.all_gather_object(shares, mine)
        else:
            shares = [mine]
        seen.append([image for share in shares for image in share])
    if rank == 0:
        assert data.train_source is not None
        left_out = len(data.train_source) % 4
        notes = [note for note in data.notes() if "left out" in note]
        assert [note.split()[2] for note in notes] == ([str(left_out)] if left_out else [])
    return seen


@pytest.mark.parametrize("kind", SOURCES)
def test_each_image_at_most_once_an_epoch_over_all_ranks(
    kind: str, tmp_path: Path, gloo: GlooPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make, count, labelled = SOURCES[kind]
    options = make(tmp_path)
    alone = epochs(0, 1, options)
    together = gloo(2, epochs, options)
    assert together[0] == together[1]
    for one, two in zip(alone, together[0], strict=True):
        indices = [index for index, *_ in one]
        assert len(indices) == len(set(indices)) == count // 4 * 4
        assert set(indices) <= set(range(count))
        one, two = sorted(one), sorted(two)
        assert [image[:2] for image in two] == [image[:2] for image in one], "the same images and labels, shared out"
        # The blur is products of batches, whose size rounding depends on.
        np.testing.assert_allclose([image[2] for image in two], [image[2] for image in one], rtol=1e-6)
        assert all((label >= 0) == labelled for _, label, _ in one)
    assert [index for index, *_ in alone[0]] != [index for index, *_ in alone[1]]


@pytest.mark.parametrize("kind", ["shards", "a packed folder of splits"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_workers_read_shards_as_one_process_does(kind: str, tmp_path: Path) -> None:
    options = SOURCES[kind][0](tmp_path)
    assert epochs(0, 1, options, workers=2) == epochs(0, 1, options)


def test_real_photos_from_shards_are_those_of_the_folder(real_data: Path, tmp_path: Path) -> None:
    """Photographs of clothes as they are in files, in shards and packed at a size that changes none of them."""
    for split in ("train", "test"):
        for name in ("dress", "hat"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for path in sorted((real_data / "clothing" / split / name).iterdir())[:6]:
                (tmp_path / "photos" / split / name / path.name).symlink_to(path)
    pack(open_parts(str(tmp_path / "photos")), str(tmp_path / "packed"), Packing(4000, images_per_shard=5), spec="x")
    sources = [f"{tmp_path}/photos", f"{tmp_path}/packed", f"wds/{tmp_path}/packed/{{train,test}}-*.tar"]
    runs = [epochs(0, 1, {"source": source}) for source in sources]
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0][0]) == 12
    labels = np.array([label for _, label, _ in runs[0][0]])
    assert np.bincount(labels).tolist() == [6, 6]
