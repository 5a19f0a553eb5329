"""Streams of random numbers: Philox's own values, never shared between uses, seeds, epochs or images."""

from itertools import product

import numpy as np
from scipy import stats

from simclr_scale.data.randomness import Purpose, generator

WORD = (1 << 64) - 1


def philox_block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as its paper has it (Salmon et al. 2011, section 3.3), in Python's integers."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            second >> 64 ^ counter[1] ^ key[0],
            second & WORD,
            first >> 64 ^ counter[3] ^ key[1],
            first & WORD,
        ]
        key = [key[0] + 0x9E3779B97F4A7C15 & WORD, key[1] + 0xBB67AE8584CAA73B & WORD]
    return counter


def test_the_numbers_are_philoxs() -> None:
    """So they are the same on every machine and in every release of NumPy."""
    seed, epoch, index = 7, 3, 123_456_789_012
    uniforms = generator(Purpose.TEXTURE, seed, epoch, index).random(12)
    # NumPy counts before it draws, and a double takes the upper 53 bits of a word.
    words = [word for count in (1, 2, 3) for word in philox_block([count, 0, index, 2], [seed, epoch])]
    assert uniforms.tolist() == [(word >> 11) * 2.0**-53 for word in words]


def test_the_numbers_of_the_purposes_are_fixed() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "AUGMENTATION": 0,
        "ORDER": 1,
        "TEXTURE": 2,
        "SUBSET": 3,
        "BLUR_OF_BATCH": 4,
        "VALUES": 5,
        "BLOCKS": 6,
        "REPLACEMENT": 7,
    }


def test_streams_never_overlap() -> None:
    """A word that two streams share would be a chance of 1 in a billion here."""
    places = list(product(Purpose, (0, 1, 2**32 - 1), (0, 1, 2), (0, 1, 2, 1 << 32)))
    streams = [generator(*place).bit_generator.random_raw(1000) for place in places]
    assert len(np.unique(streams)) == len(streams) * 1000


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    forwards = [generator(Purpose.AUGMENTATION, 5, 1, index).random(3) for index in range(10)]
    backwards = [generator(Purpose.AUGMENTATION, 5, 1, index).random(3) for index in reversed(range(10))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_first_numbers_of_neighbouring_images_are_uniform_and_independent() -> None:
    first = np.array([generator(Purpose.AUGMENTATION, 0, 0, index).random() for index in range(20_000)])
    assert stats.kstest(first, "uniform").pvalue > 1e-3
    pairs = np.histogram2d(first[:-1], first[1:], bins=8, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3
