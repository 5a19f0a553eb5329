"""``simclr-scale prepare``: from images anywhere to a folder that trains."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_scale.data.sources import open_source
from tests.cli.commands import CHECKOUT, SHORT, Outcome, files_below, write_images

Command = Callable[..., Outcome]


def prepare(source: object, output: object, *more: object) -> list[object]:
    arguments = ["--data.source", source, "--output", output, "--size", 16, "--images_per_shard", 5]
    return ["prepare", *arguments, "--num_workers", 0, *more]


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in files_below(folder).items()}


def test_from_photos_to_a_score(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", "cat", "dog", "eel", count=8)
    (tmp_path / "photos" / "cat" / "3.png").write_bytes(b"")
    outcome = command(*prepare("photos", "packed"))
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "packing photos into packed: all 24"
    assert lines[-3].startswith("packed 23 images in 5 shards, 0.")
    assert lines[-2:] == [
        "unreadable: 1; packed/bad_files.txt says which and why",
        "use them by --data.source packed",
    ]
    scores = [
        command("knn", "--encoder", "histogram:4", "--data.source", source, "--k", 3, "--data.num_workers", 0)
        for source in ("packed", "wds/packed")
    ]
    assert scores[0].status == scores[1].status == 0, scores
    assert command("prepare", "--verify", "true", "--output", "packed").out == (
        "packed: 5 shards with 23 images are as they were written\n"
    )
    again = command(*prepare("photos", "packed"))
    assert "5 of 5 shards were there already, and are as they were written" in again.out


def test_a_packed_data_set_trains(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", "cat", "dog", count=25)
    assert command(*prepare("photos", "packed")).status == 0
    outcome = command(
        *SHORT, "--data.source", "packed", "--data.subset", "0.9", "--name", "x", "--trainer.max_epochs", 1
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.count("warning: 36 training images are few") == 1
    assert "the last 4 of 36 images of each epoch's order" in outcome.out
    assert "subset: 0.9\n" in Path("runs/x/config.yaml").read_text()
    assert (
        '"split": "subset 0.9 (36 images, class-balanced, seed 0) of seeded 80/20'
        in Path("runs/x/summary.json").read_text()
    )


@pytest.mark.parametrize("subset", ["0.5", "20", "list.txt"])
def test_subsets_by_fraction_count_and_list(
    subset: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "flat", count=40)
    Path("list.txt").write_text("\n".join(f"{n}.png" for n in range(20)))
    outcome = command(
        *SHORT, "--data.source", "flat", "--data.subset", subset, "--name", "x", "--trainer.limit_train_batches", 1
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert "warning: 20 training images are few" in outcome.out


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "simclr_scale", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def many_photos(tmp_path: Path) -> Path:
    """Large enough that they are not packed at once."""
    rng = np.random.default_rng(0)
    for index in range(60):
        folder = tmp_path / "photos" / ("a", "b")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (500, 600, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_the_command_killed_and_started_twice(many_photos: Path, tmp_path: Path, command: Command) -> None:
    """A real kill of the command with its workers; the one that goes on finds the lock free, a third finds it taken."""
    options = ("--images_per_shard", 2, "--num_workers", 2)
    assert command(*prepare(many_photos, tmp_path / "unbroken", "--images_per_shard", 2)).status == 0
    output = tmp_path / "killed"
    with start(*prepare(many_photos, output, *options)) as first:
        while not (output / "all-000004.tar").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        refused = command(*prepare(many_photos, output, *options))
        assert (refused.status, refused.err) == (
            2,
            f"simclr-scale prepare: error: --output {output}: another prepare is writing into it; "
            "wait for it, or stop it\n",
        )
        first.kill()
        first.wait()
    assert not (output / "index.json").exists()
    went_on = command(*prepare(many_photos, output, *options))
    assert (went_on.status, went_on.err) == (0, "")
    assert " of 30 shards were there already" in went_on.out
    assert content(output) == content(tmp_path / "unbroken")


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(many_photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    # By other names too: they must not all be packed before the signal comes.
    for photo in sorted(many_photos.rglob("*.png")):
        for number in range(20):
            photo.with_stem(f"{photo.stem}-{number}").hardlink_to(photo)
    with start(*prepare(many_photos, output, "--images_per_shard", 2, "--num_workers", 0)) as process:
        while not (output / "all-000002.tar").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, "stopped; the same command goes on where this one was\n")
    with pytest.raises(ValueError, match="has not finished it"):
        open_source(str(output))


def test_what_is_wrong_is_said_in_a_line(refusal: Callable[..., str], tmp_path: Path) -> None:
    write_images(tmp_path / "photos", "cat", "dog", count=3)
    assert refusal("prepare", "--output", "x") == "give --data.source, the images to pack"
    assert refusal("prepare", "--data.source", "photos") == "give --output DIR, the folder to write"
    assert "no such folder; did you mean" in refusal(*prepare("photo", "x"))
    assert refusal(*prepare("photos", "x", "--size", 0)) == "--size must be from 8 to 16384, got 0"
    assert refusal(*prepare("photos", "x", "--num_workers", -1)) == "--num_workers must be 0 or above, got -1"
    assert "are generated" in refusal(*prepare("textures", "x"))
    assert "is not empty" in refusal(*prepare("photos", "photos"))
    assert "leave out --data.source" in refusal(*prepare("photos", "photos", "--verify", "true"))
    assert "did you mean size" in refusal(*prepare("photos", "x", "--sise", 8))
    assert "damaged, or not an index" in refusal("prepare", "--verify", "true", "--output", "photos")


def test_a_damaged_shard_is_named_by_verify_and_mended_by_the_same_command(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", "cat", "dog", count=6)
    assert command(*prepare("photos", "packed")).status == 0
    good = content(tmp_path / "packed")
    shard = Path("packed/all-000001.tar")
    data = shard.read_bytes()
    shard.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    outcome = command("prepare", "--verify", "true", "--output", "packed")
    assert (outcome.status, outcome.err) == (
        2,
        "simclr-scale prepare: error: packed/all-000001.tar: damaged; the command that wrote it makes it again\n",
    )
    assert command(*prepare("photos", "packed")).status == 0
    assert content(tmp_path / "packed") == good


@pytest.mark.parametrize("subset", ["0.0", "1.5", "0", "-3", "nowhere.txt"])
def test_a_wrong_subset(subset: str, refusal: Callable[..., str]) -> None:
    assert "data.subset" in refusal("pretrain", "--config", "quickstart", f"--data.subset={subset}")
