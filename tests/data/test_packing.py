"""Packing a data set: the same files whatever the workers and the interruptions, and nothing of others touched."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr_scale.data.packing import Packing, Report, pack
from simclr_scale.data.sources import open_source
from simclr_scale.data.sources.opening import open_parts
from simclr_scale.errors import InputError
from tests.data.packing_kills import content
from tests.data.sources.images import write_images

CHECKOUT = Path(__file__).parents[2]


def work(source: Path | str, output: Path, packing: Packing | None = None, **options: Any) -> Report:
    return pack(open_parts(str(source)), str(output), packing or Packing(16, images_per_shard=4), spec="x", **options)


def refusal(source: Path | str, output: Path, packing: Packing | None = None) -> str:
    """The message; nothing may change."""
    before = content(output) if output.is_dir() else {}
    with pytest.raises(InputError) as caught:
        work(source, output, packing)
    assert (content(output) if output.is_dir() else {}) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images to train on, some to be made smaller and two that cannot be read; four to test on."""
    names = [f"{split}/{name}/{i}.png" for split, n in (("train", 5), ("test", 2)) for name in "ab" for i in range(n)]
    folder = write_images(tmp_path / "photos", *names)
    rng = np.random.default_rng(0)
    for name in ("train/a/1.png", "train/b/4.png", "test/a/0.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    (folder / "train/a/2.png").write_bytes(b"")
    (folder / "train/b/0.jpg").write_bytes(b"<html>not here</html>")
    return folder


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_the_number_of_workers_changes_no_byte(photos: Path, tmp_path: Path, workers: int) -> None:
    expected = work(photos, tmp_path / "alone")
    assert expected == Report(13, 2, 4, 0, expected.bytes)
    assert work(photos, tmp_path / "together", num_workers=workers) == expected
    assert content(tmp_path / "together") == content(tmp_path / "alone")


def test_what_could_not_be_read_is_listed_with_the_reason(photos: Path, tmp_path: Path) -> None:
    work(photos, tmp_path / "packed")
    lines = (tmp_path / "packed" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(photos / "train/a/2.png"), str(photos / "train/b/0.jpg")]
    assert all(line.split("\t")[1] == "not a readable image (no known image format)" for line in lines)
    source = open_source(str(tmp_path / "packed"))
    names = [source.file_name(index) for index in range(len(source))]
    assert len(names) == 9
    assert not {"train/a/2.png", "train/b/0.jpg"} & set(names)


def test_progress_counts_every_image(photos: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    work(photos, tmp_path / "packed", progress=lambda *counts: seen.append(counts))
    assert (seen[0], seen[-1]) == ((0, 15, 0), (15, 15, 2))
    assert seen == sorted(seen)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of itself")
def test_a_kill_at_any_moment_loses_nothing(photos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.packing_kills", str(photos), str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Before and after: a plan, two files for each of six shards, images.npz, bad_files.txt and index.json.
    assert int(done.stdout) == 2 * (1 + 2 * 6 + 3)


class Stopped(BaseException):
    pass


def stop_after(count: int) -> Callable[[int, int, int], None]:
    def progress(done: int, total: int, unreadable: int) -> None:
        if done >= count:
            raise Stopped

    return progress


def test_work_goes_on_where_it_stopped(photos: Path, tmp_path: Path) -> None:
    work(photos, tmp_path / "unbroken")
    with pytest.raises(Stopped):
        work(photos, tmp_path / "packed", progress=stop_after(8))
    kept = {name: (tmp_path / "packed" / name).stat().st_mtime_ns for name in os.listdir(tmp_path / "packed")}
    assert "train-000000.tar" in kept
    with pytest.raises(InputError, match="simclr-scale prepare has not finished it"):
        open_source(str(tmp_path / "packed"))
    seen: list[int] = []
    report = work(photos, tmp_path / "packed", progress=lambda done, total, unreadable: seen.append(done))
    assert report.found == len(kept) - 1
    assert seen[0] == 4 * report.found
    for name in set(kept) - {".unfinished"}:
        assert (tmp_path / "packed" / name).stat().st_mtime_ns == kept[name], "sound work is not done again"
    assert content(tmp_path / "packed") == content(tmp_path / "unbroken")


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_there_is_verified(photos: Path, tmp_path: Path, finished: bool) -> None:
    work(photos, tmp_path / "unbroken")
    output = tmp_path / "packed"
    if finished:
        work(photos, output)
    else:
        with pytest.raises(Stopped):
            work(photos, output, progress=stop_after(15))
    first, second = output / "train-000000.tar", output / "train-000001.tar"
    first.write_bytes(first.read_bytes()[:600] + b"~" + first.read_bytes()[601:])
    second.unlink()
    report = work(photos, output)
    assert report.shards - report.found >= 2
    assert content(output) == content(tmp_path / "unbroken")
    assert work(photos, output).found == report.shards
    assert content(output) == content(tmp_path / "unbroken")


def test_a_lost_index_of_images_is_made_again(photos: Path, tmp_path: Path) -> None:
    work(photos, tmp_path / "unbroken")
    work(photos, tmp_path / "packed")
    (tmp_path / "packed" / "images.npz").write_bytes(b"")
    work(photos, tmp_path / "packed")
    assert content(tmp_path / "packed") == content(tmp_path / "unbroken")


def test_a_folder_of_others_is_refused(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert "is not empty, and its files are not those of an earlier prepare" in refusal(photos, output)
    assert "is not empty" in refusal(photos, photos)
    assert "is a file" in refusal(photos, output / "thesis.txt")
    (output / "thesis.txt").rename(output / "index.json")
    assert "is not empty" in refusal(photos, output)


@pytest.mark.parametrize("finished", [True, False])
def test_work_of_another_kind_is_refused_by_the_setting_that_differs(
    photos: Path, tmp_path: Path, finished: bool
) -> None:
    output = tmp_path / "output"
    if finished:
        work(photos, output)
    else:
        with pytest.raises(Stopped):
            work(photos, output, progress=stop_after(8))
    kind = "an output" if finished else "an unfinished output"
    assert f"holds {kind} with --size 16, not 24" in refusal(photos, output, Packing(24, images_per_shard=4))
    assert "with --images_per_shard 4, not 5" in refusal(photos, output, Packing(16, images_per_shard=5))
    write_images(photos, "train/a/new.png")
    assert f"holds {kind} of other images" in refusal(photos, output)


def test_an_empty_folder_will_do(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    assert work(photos, tmp_path / "output").images == 13


def hold(output: str) -> subprocess.Popen[str]:
    """Another process that is packing into the folder, as far as a lock can tell."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.path.join(output, ".unfinished", "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_has_ended_or_died(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(Stopped):
        work(photos, output, progress=stop_after(8))
    with hold(str(output)) as other:
        assert "another prepare is writing into it" in refusal(photos, output)
        other.kill()
        other.wait()
    assert work(photos, output).images == 13


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", "a.png", "b.png")
    for path in folder.iterdir():
        path.write_bytes(b"lost")
    with pytest.raises(InputError, match="none of its 2 images can be read"):
        work(folder, tmp_path / "output")
    with pytest.raises(InputError, match="generated"):
        work("textures", tmp_path / "textures")
    write_images(folder, "a.png")
    work(folder, tmp_path / "output2")
    with pytest.raises(InputError, match="is packed already"):
        work(tmp_path / "output2", tmp_path / "output3")


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"size": 10**6}, {"quality": 0}, {"quality": 100}, {"images_per_shard": 0}]
)
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(settings))} must be from"):
        Packing(**settings)  # type: ignore[arg-type]


def test_a_disk_that_cannot_be_written_is_said(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simclr_scale.data.packing_shard.ShardWriter.add", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        work(photos, tmp_path / "output")


class _Killed:
    """A source with an image that ends the process that reads it, as the system does for want of memory."""

    name, classes, split_description = "killer", (), "all images"
    labels = np.full(20, -1)

    def __len__(self) -> int:
        return 20

    def image(self, index: int) -> Image.Image:
        if index == 17:
            os._exit(9)
        return Image.new("RGB", (4, 4))

    def describe(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return "none"


def test_a_killed_worker_is_said_and_the_rest_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a worker process ended.*smaller --num_workers"):
        pack({"all": _Killed()}, str(tmp_path / "out"), Packing(8, images_per_shard=4), spec="x", num_workers=1)
    assert json.loads((tmp_path / "out" / ".unfinished" / "plan.json").read_text())["splits"]["all"]["images"] == 20
    assert (tmp_path / "out" / "all-000000.tar").exists()


def test_names_that_are_no_text_and_images_of_other_kinds_of_source(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", "a.png", "b.png")
    os.rename(folder / "b.png", os.fsencode(folder) + b"/caf\xe9.png")
    work(folder, tmp_path / "output")
    source = open_source(str(tmp_path / "output"))
    assert [os.fsencode(source.file_name(index)) for index in (0, 1)] == [b"a.png", b"caf\xe9.png"]
