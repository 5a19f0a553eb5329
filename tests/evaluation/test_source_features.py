"""Features of a source: the same bits on any number of ranks, with a cache and without one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.evaluation import extract_features, image_loader, source_features
from simclr_scale.evaluation.shared_features import _PROBED_IMAGES
from tests.evaluation.counting import CountingEncoder, CountingSource
from tests.evaluation.synthetic import ColorSource, small_encoder, to_tensor
from tests.gloo_pool import GlooPool

IMAGES, BATCH = 23, 3
BATCHES = [3] * 7 + [2]
BAD = (4, 9, 10, 11, 22)  # one of a batch, all of one, one of the last
Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def alone(bad: tuple[int, ...] = (), images: int = IMAGES) -> Features:
    """By the loader that evaluations have always used, in one process."""
    loader = image_loader(CountingSource(images, bad), to_tensor, batch_size=BATCH)
    return extract_features(small_encoder(), loader, unreadable={})


def assert_same(ours: Features, wanted: Features) -> None:
    assert all(torch.equal(part, of_wanted) for part, of_wanted in zip(ours, wanted, strict=True))
    assert [part.dtype for part in ours] == [torch.float32, torch.int64, torch.int64]
    assert not ours[0].is_inference()


def _shared(
    rank: int, world_size: int, images: int, bad: tuple[int, ...], cache: str | None
) -> tuple[Features, list[int], list[int], dict[int, str], list[int]]:
    del rank, world_size
    source, encoder = CountingSource(images, bad), CountingEncoder()
    unreadable: dict[int, str] = {}
    told: list[int] = []
    features = source_features(
        encoder, source, to_tensor, batch_size=BATCH, unreadable=unreadable, cache=cache, progress=told.append
    )
    return features, source.reads, encoder.forwards, unreadable, told


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("images", "bad"), [(IMAGES, ()), (IMAGES, BAD), (2, ())])
def test_ranks_share_the_images_and_change_no_bit(
    gloo: GlooPool, world_size: int, images: int, bad: tuple[int, ...]
) -> None:
    outcomes = gloo(world_size, _shared, images, bad, None)
    for features, _, _, unreadable, told in outcomes:
        assert_same(features, alone(bad, images))
        assert unreadable == {index: f"image {index}: not a readable image (cut off)" for index in bad}
        assert told[-1] == images
    reads = [outcome[1] for outcome in outcomes]
    assert sorted(index for part in reads for index in part) == list(range(images))
    assert max(len(part) for part in reads) <= BATCH * -(-len(range(0, images, BATCH)) // world_size)


@pytest.mark.parametrize("bad", [(), BAD])
def test_ranks_complete_what_rank_0_has_in_its_cache(gloo: GlooPool, tmp_path: Path, bad: tuple[int, ...]) -> None:
    gloo(1, _shared, IMAGES, bad, str(tmp_path))
    journal = next(tmp_path.glob("*/batches.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    # Batches 0, 3 and 4 are gone; of `BAD`, no image of 3 can be read.
    journal.write_bytes(b"".join(lines[1:3] + lines[5:]))
    for missing in (3, 0):
        outcomes = gloo(2, _shared, IMAGES, bad, str(tmp_path))
        for features, _, _, unreadable, told in outcomes:
            assert_same(features, alone(bad))
            assert sorted(unreadable) == list(bad)
            assert told[-1] == IMAGES
        forwards = sum(len(outcome[2]) for outcome in outcomes)
        assert forwards == 1 + missing - bool(bad and missing)
        assert (len(outcomes[1][1]) > 0) == (missing > 0)
        assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(lines)


class _NaNForWhite(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.where(mean > 0.99, torch.nan, mean)[:, None]


class _WhiteAt(ColorSource):
    def __init__(self, white: int) -> None:
        super().__init__([0, 1] * 6, ("a", "b"))
        self.white = white

    def image(self, index: int):  # type: ignore[no-untyped-def]
        image = super().image(index)
        return image.point(lambda _value: 255) if index == self.white else image


def _failing(rank: int, world_size: int, white: int, cache: str | None) -> str:
    del rank, world_size
    with pytest.raises(InputError) as caught:
        source_features(_NaNForWhite(), _WhiteAt(white), to_tensor, batch_size=2, cache=cache)
    return str(caught.value)


@pytest.mark.parametrize("white", [1, 6])  # in a batch of rank 0, of rank 1
def test_features_of_nan_end_every_rank_and_are_not_kept(gloo: GlooPool, tmp_path: Path, white: int) -> None:
    assert gloo(2, _failing, white, str(tmp_path)) == [f"the encoder gives NaN or infinity for image {white}"] * 2
    journals = [file.read_text() for file in tmp_path.glob("*/batches.jsonl")]
    kept = [json.loads(line)["batch"] for text in journals for line in text.splitlines()]
    assert kept == {1: [], 6: [0, 1]}[white]  # those of the rounds before


def test_a_cache_that_cannot_be_made_ends_every_rank_in_one_line(gloo: GlooPool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = gloo(2, _failing, -1, str(tmp_path / "file"))
    assert first == second
    assert "cannot be written (Not a directory); name a folder that can" in first
    assert "\n" not in first


def kept(cache: Path, encoder: nn.Module, source: ColorSource, **settings: object) -> Features:
    return source_features(encoder, source, to_tensor, cache=cache, **({"batch_size": BATCH} | settings))  # type: ignore[arg-type]


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    first = kept(tmp_path, encoder, CountingSource(IMAGES))
    assert encoder.forwards == [_PROBED_IMAGES, *BATCHES]
    encoder.forwards.clear()
    again = kept(tmp_path, encoder, CountingSource(IMAGES))
    assert encoder.forwards == [_PROBED_IMAGES]
    assert_same(first, alone())
    assert_same(again, alone())
    assert encoder.training


def test_what_is_kept_is_mapped_and_cannot_be_changed_by_its_user(tmp_path: Path) -> None:
    features, *_ = kept(tmp_path, small_encoder(), CountingSource(IMAGES))
    file = next(tmp_path.glob("*/features.f32"))
    assert str(file) in Path("/proc/self/maps").read_text()
    before = file.read_bytes()
    features.zero_()
    assert file.read_bytes() == before == alone()[0].numpy().tobytes()


class _Scaled(CountingEncoder):
    """Of the same weights and printed form as any other of its kind."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * self.factor


def test_anything_that_may_change_the_features_is_computed_anew(tmp_path: Path) -> None:
    def computed(
        encoder: CountingEncoder, source: ColorSource, transform: object = to_tensor, **settings: object
    ) -> int:
        encoder.forwards.clear()
        source_features(encoder, source, transform, cache=tmp_path, **({"batch_size": BATCH} | settings))  # type: ignore[arg-type]
        return len(encoder.forwards) - 1

    encoder, source = _Scaled(1.0), CountingSource(IMAGES)
    assert computed(encoder, source) == 8
    assert computed(encoder, source) == 0
    assert computed(_Scaled(2.0), source) == 8
    assert computed(encoder, source, lambda image: to_tensor(image) * 2) == 8
    assert computed(encoder, source, batch_size=4) == 6
    assert computed(encoder, source, indices=range(22)) == 8
    other = CountingSource(IMAGES)
    other.seed = 1
    assert computed(encoder, other) == 8
    encoder.inner[1].running_mean += 0.5  # type: ignore[operator]
    assert computed(encoder, source) == 8
    with torch.autocast("cpu", torch.bfloat16):
        assert computed(encoder, source) == 8
    assert computed(_Scaled(1.0), source) == 0
    assert computed(encoder, source) == 0


def damage(folder: Path, what: str) -> int:
    """Number of batches that are to be computed again."""
    features, journal = folder / "features.f32", folder / "batches.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    if what == "a bit of a feature":
        content = bytearray(features.read_bytes())
        content[4 * 8 * 10 + 5] ^= 1
        features.write_bytes(content)
    elif what == "the end of the features":
        features.write_bytes(features.read_bytes()[:-1])
    elif what == "the end of a line":
        journal.write_bytes(b"".join(lines)[:-9])
    elif what == "a digit of a line":
        lines[2] = lines[2].replace(b'"rows": 3', b'"rows": 2')
        journal.write_bytes(b"".join(lines))
    elif what == "two lines exchanged in number":
        lines[2], lines[3] = (
            lines[2].replace(b'"batch": 2', b'"batch": 3'),
            lines[3].replace(b'"batch": 3', b'"batch": 2'),
        )
        journal.write_bytes(b"".join(lines))
        return 2
    elif what == "no JSON":
        journal.write_bytes(b"".join(lines[:4]) + b"[]\nnull\n\xff\n{}\n" + b"".join(lines[5:]))
    else:
        assert what == "everything"
        features.unlink()
        return 8
    return 1


@pytest.mark.parametrize(
    "what",
    [
        "a bit of a feature",
        "the end of the features",
        "the end of a line",
        "a digit of a line",
        "two lines exchanged in number",
        "no JSON",
        "everything",
    ],
)
def test_only_what_is_damaged_is_computed_again(tmp_path: Path, what: str) -> None:
    encoder = CountingEncoder()
    kept(tmp_path, encoder, CountingSource(IMAGES))
    folder = next(tmp_path.iterdir())
    whole = {name: (folder / name).read_bytes() for name in ("features.f32", "batches.jsonl")}
    again = damage(folder, what)
    encoder.forwards.clear()
    assert_same(kept(tmp_path, encoder, CountingSource(IMAGES)), alone())
    assert len(encoder.forwards) == 1 + again
    assert (folder / "features.f32").read_bytes() == whole["features.f32"]
    lines = (folder / "batches.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(whole["batches.jsonl"].splitlines())


def test_images_that_cannot_be_read_are_tried_again(tmp_path: Path) -> None:
    encoder, source = CountingEncoder(), CountingSource(IMAGES, BAD)
    unreadable: dict[int, str] = {}
    assert_same(kept(tmp_path, encoder, source, unreadable=unreadable), alone(BAD))
    assert list(unreadable) == list(BAD)
    encoder.forwards.clear()
    with pytest.raises(InputError, match=r"^image 4: not a readable image"):
        kept(tmp_path, encoder, source)
    assert_same(kept(tmp_path, encoder, source, unreadable={}), alone(BAD))
    assert set(encoder.forwards) == {_PROBED_IMAGES - 1}  # image 22 is one of those
    source.bad = (4, 22)
    encoder.forwards.clear()
    unreadable.clear()
    assert_same(kept(tmp_path, encoder, source, unreadable=unreadable), alone((4, 22)))
    assert encoder.forwards == [_PROBED_IMAGES - 1, 3]
    assert list(unreadable) == [4, 22]


def test_nothing_to_read_is_an_error_with_a_cache_and_without(tmp_path: Path) -> None:
    for cache in (None, tmp_path, tmp_path):
        with pytest.raises(InputError, match=r"^none of the 3 images can be read; the first: image 0: "):
            source_features(small_encoder(), CountingSource(3, range(3)), to_tensor, unreadable={}, cache=cache)
    with pytest.raises(InputError, match="no images to compute features of"):
        source_features(small_encoder(), CountingSource(3), to_tensor, indices=[])
    with pytest.raises(InputError, match="batch_size: 0, wanted at least 1"):
        source_features(small_encoder(), CountingSource(3), to_tensor, batch_size=0)


def test_results_are_in_order_of_the_index(tmp_path: Path) -> None:
    everything, labels, _ = alone()
    for cache in (None, tmp_path, tmp_path):
        features, of, indices = source_features(
            small_encoder(), CountingSource(IMAGES), to_tensor, indices=np.array([5, 0, 3]), cache=cache
        )
        assert indices.tolist() == [0, 3, 5]
        torch.testing.assert_close(features, everything[[0, 3, 5]])
        assert torch.equal(of, labels[[0, 3, 5]])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kills", "waits"])
def test_processes(tmp_path: Path, what: str) -> None:
    """A kill at any step loses at most the batch it was at; of two processes one waits for the other."""
    command = [sys.executable, "-m", "tests.evaluation.cache_processes", what, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (34 if what == "kills" else 1)
    shutil.rmtree(tmp_path)
