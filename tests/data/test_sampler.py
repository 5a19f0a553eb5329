"""The order of images: the same global batches on any number of ranks, each image at most once an epoch."""

from itertools import chain

import numpy as np
import pytest
from scipy import stats

from simclr_scale.data.sampler import GlobalBatchSampler, Key, Position, epoch_order
from simclr_scale.errors import InputError

NUM_IMAGES, BATCH = 75, 8
TAIL = NUM_IMAGES % BATCH


def batches(
    epoch: int = 0, first: int = 0, seed: int = 0, rank: int = 0, world_size: int = 1, num_images: int = NUM_IMAGES
) -> list[list[Key]]:
    return list(
        GlobalBatchSampler(
            num_images,
            BATCH,
            seed=seed,
            rank=rank,
            world_size=world_size,
            position=lambda: Position(epoch, first),
        )
    )


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_share_the_same_global_batches(world_size: int) -> None:
    shares = [batches(epoch=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batch) for share in shares for batch in share} == {BATCH // world_size}
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == batches(epoch=3)


def test_each_image_at_most_once_an_epoch_and_the_tail_is_left_out() -> None:
    keys = list(chain(*batches(epoch=2)))
    images = {key.image for key in keys}
    assert len(keys) == len(images) == NUM_IMAGES - TAIL
    assert images < set(range(NUM_IMAGES))
    assert {key.epoch for key in keys} == {2}


def test_every_image_is_left_out_as_often_as_another() -> None:
    """Over many epochs the dropped tail hits all alike: no image is lost for good."""
    seen = np.bincount([key.image for epoch in range(400) for key in chain(*batches(epoch))], minlength=NUM_IMAGES)
    missed = 400 - seen
    assert missed.sum() == 400 * TAIL
    assert stats.chisquare(missed).pvalue > 1e-3


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(epoch_order(NUM_IMAGES, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert all(sorted(order) == list(range(NUM_IMAGES)) for order in orders)
    assert orders[0] == tuple(epoch_order(NUM_IMAGES, 0, 0))
    assert batches(epoch=1) != batches(epoch=0)
    assert batches(seed=1) != batches(seed=0)


def test_every_place_is_as_likely() -> None:
    places = np.array([np.argsort(epoch_order(12, seed=0, epoch=epoch)) for epoch in range(1200)])
    for image in range(12):
        assert stats.chisquare(np.bincount(places[:, image], minlength=12)).pvalue > 1e-4


@pytest.mark.parametrize("first", [1, 5, NUM_IMAGES // BATCH])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_begun_in_its_middle_gives_the_remaining_batches(first: int, world_size: int) -> None:
    rank = world_size - 1
    whole = batches(epoch=4, rank=rank, world_size=world_size)
    assert batches(epoch=4, first=first, rank=rank, world_size=world_size) == whole[first:]


def test_the_position_is_asked_for_at_every_epoch() -> None:
    positions = iter([Position(0, 6), Position(1, 0), Position(2, 0)])
    sampler = GlobalBatchSampler(NUM_IMAGES, BATCH, seed=0, position=lambda: next(positions))
    assert [list(sampler) for _ in range(3)] == [batches(0, first=6), batches(1), batches(2)]


def test_length_is_that_of_a_whole_epoch() -> None:
    sampler = GlobalBatchSampler(NUM_IMAGES, BATCH, seed=0, position=lambda: Position(0, 6))
    assert len(sampler) == 9
    assert len(list(sampler)) == 3
    assert len(GlobalBatchSampler(BATCH, BATCH, seed=0)) == 1


def test_share_of_a_rank() -> None:
    assert GlobalBatchSampler(NUM_IMAGES, BATCH, seed=0, world_size=4).batch_size == 2


@pytest.mark.parametrize("batch", [1, 0, -4])
def test_a_batch_without_negatives_is_refused(batch: int) -> None:
    with pytest.raises(InputError, match=rf"data\.global_batch_size must be at least 2 .*, got {batch}$"):
        GlobalBatchSampler(NUM_IMAGES, batch, seed=0)


@pytest.mark.parametrize(("batch", "world_size", "instead"), [(9, 2, 8), (255, 8, 256), (4, 3, 3), (2, 8, 8)])
def test_an_indivisible_batch_is_refused_with_one_that_divides(batch: int, world_size: int, instead: int) -> None:
    with pytest.raises(InputError, match=rf"{batch} does not divide by the {world_size} ranks; use {instead}$"):
        GlobalBatchSampler(1000, batch, seed=0, world_size=world_size)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="76 is larger than the training set of 75 images"):
        GlobalBatchSampler(NUM_IMAGES, NUM_IMAGES + 1, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_keys_say_which_global_batch_of_the_epoch(world_size: int) -> None:
    """From the start and from the middle, on any rank: what the images of a batch draw together depends on it."""
    for rank in range(world_size):
        for first in (0, 4):
            share = batches(first=first, rank=rank, world_size=world_size)
            assert [{key.batch for key in batch} for batch in share] == [{number} for number in range(first, 9)]
