"""Files that cannot be read are named once, and too many of them end the run on every rank."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from simclr_scale import SimCLRDataModule
from simclr_scale.errors import InputError
from simclr_scale.pretraining.bad_files import BAD_FILES, BadFiles, too_many
from tests.data.damaged import damage, write_photographs
from tests.gloo_pool import GlooPool
from tests.pretraining.runs import QUIET, arguments, pretrain, write_classes

pytestmark = QUIET


def ready(folder: Path | str, max_bad_fraction: float = 0.5) -> SimCLRDataModule:
    data = SimCLRDataModule(
        str(folder), global_batch_size=8, num_workers=0, in_memory=False, max_bad_fraction=max_bad_fraction
    )
    data.setup()
    return data


def trainer_at(data: SimCLRDataModule, step: int, rank: int = 0) -> Any:
    return SimpleNamespace(datamodule=data, global_step=step, is_global_zero=rank == 0, progress_bar_callback=None)


def names(run: Path) -> list[str]:
    return [Path(line.partition("\t")[0]).name for line in (run / BAD_FILES).read_text().splitlines()]


def test_each_is_named_once_with_its_reason(tmp_path: Path) -> None:
    data = ready(write_photographs(tmp_path / "images", 24, (3, 4, 11)))
    callback, dataset = BadFiles(tmp_path), data.train_dataloader().dataset
    for epoch in range(3):
        for step, keys in enumerate(data.train_dataloader().batch_sampler):
            batch = dataset.__getitems__([key._replace(epoch=epoch) for key in keys])
            data.on_after_batch_transfer(batch, 0)
            callback.on_train_batch_end(trainer_at(data, 3 * epoch + step + 1))
    lines = (tmp_path / BAD_FILES).read_text().splitlines()
    assert sorted(names(tmp_path)) == ["003.jpg", "004.jpg", "011.jpg"]
    for line in lines:
        path, reason = line.split("\t")
        assert Path(path).is_file()
        assert reason.startswith("not a readable image (")
    assert set(callback.unreadable) == {3, 4, 11}


def test_a_resumed_run_adds_to_the_file(tmp_path: Path) -> None:
    data = ready(write_photographs(tmp_path / "images", 24, (3, 4)))
    assert data.train_source is not None
    path = [data.train_source.describe(index) for index in range(24)]
    # The run was killed while it wrote the second line.
    (tmp_path / BAD_FILES).write_text(f"{path[3]}\tnot a readable image (gone)\n{path[4][:-2]}")
    data.unreadable = {3: f"{path[3]}: not a readable image (gone)", 4: f"{path[4]}: not a readable image (empty)"}
    callback = BadFiles(tmp_path)
    callback.load_state_dict({"unreadable": {3: data.unreadable[3]}})
    callback.on_train_start(trainer_at(data, 3), None)  # type: ignore[arg-type]
    assert (tmp_path / BAD_FILES).read_text() == (
        f"{path[3]}\tnot a readable image (gone)\n{path[4]}\tnot a readable image (empty)\n"
    )
    assert callback.state_dict() == {"unreadable": data.unreadable}


def test_names_that_would_break_the_lines_are_escaped(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "images", 9)
    odd = folder / "a\nb\tc.jpg"
    odd.write_bytes(b"")
    data = ready(folder)
    assert data.train_source is not None
    where = next(data.train_source.describe(i) for i in range(10) if "\n" in data.train_source.describe(i))
    data.unreadable = {9: f"{where}: not a readable image (empty)"}
    data.train_source.describe = lambda index: where  # type: ignore[method-assign]
    callback = BadFiles(tmp_path)
    callback.on_train_start(trainer_at(data, 0), None)  # type: ignore[arg-type]
    text = (tmp_path / BAD_FILES).read_text()
    assert text.endswith("/a\\nb\\tc.jpg\tnot a readable image (empty)\n")
    assert text.count("\n") == 1


# Which share is too much.


def test_judged_after_a_hundred_images() -> None:
    assert not too_many(50, 99, 1000, 0.01)
    assert too_many(50, 100, 1000, 0.01)


def test_the_share_is_that_of_the_data_set() -> None:
    for seen in (100, 1000, 5000):
        assert not too_many(10, max(seen, 900), 1000, 0.01)
        assert too_many(11, max(seen, 900), 1000, 0.01)
    # Seven of the first hundred may be chance in a large data set that keeps the limit.
    assert not too_many(7, 100, 100_000, 0.01)


def test_one_bad_image_ends_no_run_unless_none_is_allowed() -> None:
    assert not too_many(1, 4000, 42, 0.01)
    assert too_many(2, 4000, 42, 0.01)
    assert too_many(1, 100, 100_000, 0.0)
    assert not too_many(100, 100, 100_000, 1.0)
    assert not too_many(0, 100, 100, 0.0)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("seen", [100, 3000])
def test_an_early_end_is_no_chance(fraction: float, seen: int) -> None:
    counts = np.arange(1, seen + 1)
    ends = np.array([too_many(int(count), seen, 10**9, fraction) for count in counts])
    assert (np.diff(ends.astype(int)) >= 0).all()
    first = int(counts[ends][0])
    assert binom.sf(first - 1, seen, fraction) < 1e-6
    # And not much later than that: the bound is not idle.
    assert binom.sf(first - 1, seen, fraction) > 1e-10


# Ranks.


def share_on_a_rank(rank: int, world_size: int, images: str, run: str, bad: list[list[int]]) -> tuple[list[int], str]:
    data = ready(images, 0.2)
    assert data.train_source is not None
    data.unreadable = {index: f"{data.train_source.describe(index)}: cut off" for index in bad[rank]}
    callback = BadFiles(Path(run))
    callback.on_train_batch_end(trainer_at(data, 19, rank))
    assert callback.unreadable == {}
    try:
        callback.on_train_batch_end(trainer_at(data, 20, rank))
    except InputError as error:
        return sorted(callback.unreadable), str(error)
    return sorted(callback.unreadable), ""


@pytest.mark.parametrize(("bad", "ends"), [([[1, 2], [2, 3]], False), ([[1, 2, 4], [2, 3, 7]], True)])
def test_ranks_share_what_they_met_and_end_together(
    gloo: GlooPool, tmp_path: Path, bad: list[list[int]], ends: bool
) -> None:
    """Of 24 images a fifth is less than five, which neither rank has met alone."""
    images = write_photographs(tmp_path / "images", 24)
    first, second = gloo(2, share_on_a_rank, str(images), str(tmp_path), bad)
    every = sorted({*bad[0], *bad[1]})
    assert first == second
    assert first[0] == every
    assert bool(first[1]) == ends
    assert names(tmp_path) == [f"{index:03}.jpg" for index in every]


# Whole runs.


def test_too_many_end_a_run_in_one_line(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "images")
    for index in range(3):
        damage(images / "train" / "class1" / f"{index}.png", "empty")
    command = arguments(images, tmp_path, "x", "--trainer.max_epochs", "9", "--data.in_memory", "false")
    with pytest.raises(InputError, match=r"3 of the 42 training images .*max_bad_fraction 0\.01 .*bad_files\.txt") as e:
        pretrain([*command, "--data.num_workers", "0"])
    assert "\n" not in str(e.value)
    assert sorted(names(tmp_path / "x")) == ["0.png", "1.png", "2.png"]
    # The limit may be raised for the same run.
    pretrain([*command, "--data.num_workers", "0", "--data.max_bad_fraction", "0.1", "--resume", "auto"])
    assert sorted(names(tmp_path / "x")) == ["0.png", "1.png", "2.png"]
