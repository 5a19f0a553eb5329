"""Every random choice: a pure function of (seed, epoch, index), with the distributions of the settings."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from simclr_scale.data.augmentation import resolve
from simclr_scale.data.crops import MAX_TRIES, sample_boxes
from simclr_scale.data.draws import BOX, VIEWS, ChannelDraw, Draw, draw_views
from simclr_scale.data.randomness import Purpose, generator

NATURAL = resolve("natural", {})
PHOTOGRAPH = np.array([375, 500])
COUNT = 20_000
FACTORS = [Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION, Draw.HUE, Draw.SIGMA]


@pytest.fixture(scope="module")
def many() -> NDArray[np.float32]:
    """(COUNT, 2, P) of the paper's recipe."""
    return draw_views(NATURAL, seed=0, epoch=0, indices=range(COUNT), sizes=PHOTOGRAPH)


def test_shape_and_type(many: NDArray[np.float32]) -> None:
    assert many.shape == (COUNT, VIEWS, len(Draw))
    assert many.dtype == np.float32
    assert np.isfinite(many).all()


@pytest.mark.parametrize("sampling", ["torchvision", "google"])
def test_draws_of_an_image_do_not_depend_on_its_batch(sampling: str) -> None:
    augmentation = resolve("natural", {"crop_sampling": sampling})
    indices = [5, 0, 17, 3, 1 << 33]
    sizes = np.array([[375, 500], [20, 31], [300, 100], [1, 1], [375, 500]])
    batch = draw_views(augmentation, 1, 2, indices, sizes)
    backwards = draw_views(augmentation, 1, 2, indices[::-1], sizes[::-1])
    np.testing.assert_array_equal(backwards[::-1], batch)
    for row, index in enumerate(indices):
        np.testing.assert_array_equal(draw_views(augmentation, 1, 2, [index], sizes[row])[0], batch[row])


def test_one_size_for_all_is_the_same_as_many_equal_ones() -> None:
    np.testing.assert_array_equal(
        draw_views(NATURAL, 0, 0, range(4), PHOTOGRAPH),
        draw_views(NATURAL, 0, 0, range(4), np.tile(PHOTOGRAPH, (4, 1))),
    )


def test_each_seed_epoch_and_image_has_draws_of_its_own() -> None:
    draws = np.concatenate(
        [draw_views(NATURAL, seed, epoch, range(20), PHOTOGRAPH) for seed in range(4) for epoch in range(4)]
    )
    for factor in FACTORS:
        assert len(np.unique(draws[..., factor])) == 4 * 4 * 20 * 2


def test_no_two_views_share_a_draw(many: NDArray[np.float32]) -> None:
    views = many.reshape(-1, len(Draw))
    assert len(np.unique(views, axis=0)) == 2 * COUNT
    # 40,000 numbers of 24 bits repeat now and then; far more often would be a shared stream.
    assert all(len(np.unique(views[:, factor])) > 0.99 * len(views) for factor in FACTORS)


def test_views_and_columns_are_independent(many: NDArray[np.float32]) -> None:
    """Rank correlations of all pairs of columns of both views; those of a box among themselves hang together."""
    columns = np.concatenate([many[:, 0], many[:, 1]], 1)
    correlation = stats.spearmanr(columns).statistic
    box = np.array([column % len(Draw) <= Draw.WIDTH for column in range(2 * len(Draw))])
    same_view = np.arange(2 * len(Draw))[:, None] // len(Draw) == np.arange(2 * len(Draw)) // len(Draw)
    expected_zero = ~(box[:, None] & box & same_view) & ~np.eye(2 * len(Draw), dtype=bool)
    # Standard deviation 1 / sqrt(20,000) = .007; 4.5 of them for 750 coefficients.
    assert np.abs(correlation[expected_zero]).max() < 0.032


@pytest.mark.parametrize("view", [0, 1])
def test_rates_of_the_flags(many: NDArray[np.float32], view: int) -> None:
    for flag, rate in {Draw.FLIP: 0.5, Draw.JITTER: 0.8, Draw.GREY: 0.2, Draw.BLUR: 0.5}.items():
        values = many[:, view, flag]
        assert set(np.unique(values)) == {0.0, 1.0}
        assert stats.binomtest(int(values.sum()), COUNT, rate).pvalue > 1e-3, flag.name


@pytest.mark.parametrize("view", [0, 1])
def test_factors_are_uniform(many: NDArray[np.float32], view: int) -> None:
    ranges = {
        Draw.BRIGHTNESS: (0.2, 1.8),
        Draw.CONTRAST: (0.2, 1.8),
        Draw.SATURATION: (0.2, 1.8),
        Draw.HUE: (-0.2, 0.2),
        Draw.SIGMA: (0.1, 2.0),
    }
    for factor, (low, high) in ranges.items():
        assert uniform_between(low, high, many[:, view, factor]), factor.name


def uniform_between(low: float, high: float, values: NDArray[np.float32]) -> bool:
    inside = np.float32(low) <= values.min() and values.max() <= np.float32(high)
    return bool(inside and stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3)


@pytest.mark.parametrize("view", [0, 1])
def test_all_24_orders_are_as_likely(many: NDArray[np.float32], view: int) -> None:
    orders, counts = np.unique(many[:, view, Draw.ORDER], return_counts=True)
    assert orders.tolist() == list(range(24))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_strength_scales_the_ranges() -> None:
    draws = draw_views(resolve("small", {}), 0, 0, range(5_000), PHOTOGRAPH)
    for factor in (Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION):
        assert uniform_between(0.6, 1.4, draws[:, 0, factor])
    assert uniform_between(-0.1, 0.1, draws[:, 0, Draw.HUE])
    assert not draws[..., Draw.BLUR].any()


def test_factors_end_at_zero() -> None:
    draws = draw_views(resolve("natural", {"strength": 2.0, "contrast": 0.2}), 0, 0, range(5_000), PHOTOGRAPH)
    assert uniform_between(0.0, 2.6, draws[:, 0, Draw.BRIGHTNESS])
    assert uniform_between(0.6, 1.4, draws[:, 0, Draw.CONTRAST])
    assert uniform_between(-0.4, 0.4, draws[:, 0, Draw.HUE])


@pytest.mark.parametrize(
    ("color_ops", "mode", "low", "high"),
    [
        ("google", "additive", -0.8, 0.8),
        ("google", "multiplicative", 0.2, 1.8),
        ("torchvision", "multiplicative", 0.2, 1.8),
    ],
)
def test_brightness_is_added_in_googles_first_version_alone(color_ops: str, mode: str, low: float, high: float) -> None:
    augmentation = resolve("natural", {"color_ops": color_ops, "brightness_mode": mode})
    draws = draw_views(augmentation, 0, 0, range(5_000), PHOTOGRAPH)
    assert uniform_between(low, high, draws[:, 0, Draw.BRIGHTNESS])
    assert uniform_between(0.2, 1.8, draws[:, 0, Draw.CONTRAST])


def test_probabilities_of_none_and_all() -> None:
    draws = draw_views(resolve("natural", {"flip": 0.0, "jitter": 1.0}), 0, 0, range(1_000), PHOTOGRAPH)
    assert not draws[..., Draw.FLIP].any()
    assert draws[..., Draw.JITTER].all()


@pytest.mark.parametrize("sampling", ["torchvision", "google"])
def test_boxes_are_those_of_the_streams_first_numbers(sampling: str) -> None:
    augmentation = resolve("natural", {"crop_sampling": sampling})
    draws = draw_views(augmentation, 3, 4, [9], PHOTOGRAPH)
    count = 2 * MAX_TRIES + 2 + (Draw.SIGMA - Draw.WIDTH)
    uniforms = generator(Purpose.AUGMENTATION, 3, 4, 9).random((VIEWS, count))
    expected = sample_boxes(uniforms[:, : 2 * MAX_TRIES + 2], PHOTOGRAPH, augmentation)
    np.testing.assert_array_equal(draws[0, :, BOX], expected)


def test_what_is_drawn_does_not_move_other_draws() -> None:
    """Another setting of one operation leaves the draws of the others as they were."""
    changed = dataclasses.replace(NATURAL, blur=0.0, brightness=0.1, crop_sampling="google")
    before, after = (draw_views(a, 0, 0, range(50), PHOTOGRAPH) for a in (NATURAL, changed))
    same = [Draw.FLIP, Draw.JITTER, Draw.CONTRAST, Draw.SATURATION, Draw.HUE, Draw.ORDER, Draw.GREY, Draw.SIGMA]
    np.testing.assert_array_equal(before[..., same], after[..., same])
    assert (before[..., Draw.BRIGHTNESS] != after[..., Draw.BRIGHTNESS]).all()


def test_draws_of_a_published_run_are_pinned() -> None:
    """Another number here changes every run there is."""
    draws = draw_views(NATURAL, 42, 7, [123], PHOTOGRAPH)[0, 1]
    box, color = [9, 44, 365, 373], [1, 1, 1.5803572, 0.991917, 0.7678987, -0.1573737, 5, 0, 1, 0.6910822]
    np.testing.assert_allclose(draws, box + color, rtol=1e-6)


# What the tests above can see.


@pytest.mark.parametrize(
    "wrong",
    [{"strength": 0.95}, {"brightness": 0.82, "contrast": 0.82, "saturation": 0.82, "hue": 0.205}, {"brightness": 1.0}],
)
def test_a_range_that_is_slightly_off_is_noticed(wrong: dict[str, float]) -> None:
    draws = draw_views(resolve("natural", wrong), 0, 0, range(COUNT), PHOTOGRAPH)
    assert not uniform_between(0.2, 1.8, draws[:, 0, Draw.BRIGHTNESS])
    if "strength" in wrong or "hue" in wrong:
        assert not uniform_between(0.2, 1.8, draws[:, 0, Draw.CONTRAST])
        assert not uniform_between(0.2, 1.8, draws[:, 0, Draw.SATURATION])
        assert not uniform_between(-0.2, 0.2, draws[:, 0, Draw.HUE])


def test_a_shape_that_is_slightly_off_is_noticed() -> None:
    """Right ends, wrong between them: the square of a uniform number, and one in twenty at the middle."""
    rng = np.random.default_rng(0)
    uniform = rng.random(COUNT).astype(np.float32)
    assert uniform_between(0, 1, uniform)
    assert not uniform_between(0, 1, uniform**2)
    assert not uniform_between(0, 1, np.where(rng.random(COUNT) < 0.05, np.float32(0.5), uniform))


@pytest.mark.parametrize(("flag", "rate"), [("flip", 0.52), ("jitter", 0.78), ("grey", 0.22), ("blur", 0.48)])
def test_a_probability_that_is_slightly_off_is_noticed(flag: str, rate: float) -> None:
    draws = draw_views(resolve("natural", {flag: rate}), 0, 0, range(COUNT), PHOTOGRAPH)
    flags = int(draws[:, 0, Draw[flag.upper()]].sum())
    assert stats.binomtest(flags, COUNT, getattr(NATURAL, flag)).pvalue < 1e-3
    assert stats.binomtest(flags, COUNT, rate).pvalue > 1e-3


# Channels.

BANDS = resolve("multiband", {})


@pytest.fixture(scope="module")
def bands() -> dict[ChannelDraw, NDArray[np.float32]]:
    """(COUNT, 2, 4) each: four channels."""
    draws = draw_views(BANDS, 0, 0, range(COUNT), PHOTOGRAPH, 4)
    assert draws.shape == (COUNT, VIEWS, len(Draw) + 3 * 4)
    return {kind: draws[..., kind.columns(4)] for kind in ChannelDraw}


@pytest.mark.parametrize("channel", range(4))
def test_each_channel_has_uniform_factors(bands: dict[ChannelDraw, NDArray[np.float32]], channel: int) -> None:
    for kind in (ChannelDraw.BRIGHTNESS, ChannelDraw.CONTRAST):
        for view in (0, 1):
            assert uniform_between(0.6, 1.4, bands[kind][:, view, channel]), kind.name
            assert not uniform_between(0.56, 1.4, bands[kind][:, view, channel])


def test_channels_are_independent(bands: dict[ChannelDraw, NDArray[np.float32]]) -> None:
    columns = np.concatenate([kind.reshape(COUNT, -1) for kind in bands.values()], 1)
    correlation = stats.spearmanr(columns).statistic
    assert np.abs(correlation[~np.eye(len(correlation), dtype=bool)]).max() < 0.032


def test_rate_of_dropped_channels(bands: dict[ChannelDraw, NDArray[np.float32]]) -> None:
    dropped = bands[ChannelDraw.DROP]
    assert set(np.unique(dropped)) == {0.0, 1.0}
    for view, channel in np.ndindex(2, 4):
        assert stats.binomtest(int(dropped[:, view, channel].sum()), COUNT, 0.1).pvalue > 1e-3
        assert stats.binomtest(int(dropped[:, view, channel].sum()), COUNT, 0.115).pvalue < 1e-3


@pytest.mark.parametrize("rate", [0.9, 1.0])
def test_one_channel_is_always_left_and_any_may_be(rate: float) -> None:
    """As often as not all three would go; the one that stays is any of them as likely."""
    draws = draw_views(resolve("multiband", {"channel_drop": rate}), 0, 0, range(3_000), PHOTOGRAPH, 3)
    dropped = draws[:, 0, ChannelDraw.DROP.columns(3)]
    assert dropped.sum(1).max() == 2
    assert stats.chisquare((1 - dropped[dropped.sum(1) == 2]).sum(0)).pvalue > 1e-3
    expected = 3 * (1 - rate) * rate**2 + rate**3
    assert stats.binomtest(int((dropped.sum(1) == 2).sum()), 3_000, expected).pvalue > 1e-3


def test_channels_do_not_move_other_draws() -> None:
    """Neither their number nor that there are any; and only augmentations that draw for channels are given columns."""
    assert draw_views(NATURAL, 1, 2, range(30), PHOTOGRAPH, 9).shape == (30, VIEWS, len(Draw))
    few, many_bands = (draw_views(BANDS, 1, 2, range(30), PHOTOGRAPH, channels) for channels in (2, 200))
    np.testing.assert_array_equal(few[..., : len(Draw)], many_bands[..., : len(Draw)])
    plain = dataclasses.replace(BANDS, per_channel=False, channel_drop=0.0)
    np.testing.assert_array_equal(few[..., : len(Draw)], draw_views(plain, 1, 2, range(30), PHOTOGRAPH))


@pytest.mark.parametrize("augmentation", [{"channel_drop": 0.0}, {"per_channel": False}])
def test_draws_of_channels_come_with_either_setting(augmentation: dict[str, Any]) -> None:
    assert draw_views(resolve("multiband", augmentation), 0, 0, [0], PHOTOGRAPH, 5).shape[2] == len(Draw) + 15


def test_brightness_of_channels_is_added_in_googles_first_version() -> None:
    additive = resolve("multiband", {"color_ops": "google", "brightness_mode": "additive"})
    draws = draw_views(additive, 0, 0, range(COUNT), PHOTOGRAPH, 2)
    assert uniform_between(-0.4, 0.4, draws[:, 0, ChannelDraw.BRIGHTNESS.columns(2)][:, 1])


# One standard deviation of the blur for a whole batch.

BY_BATCH = resolve("natural", {"blur_per": "batch"})


def test_a_batch_shares_its_blur_by_view() -> None:
    draws = draw_views(BY_BATCH, 1, 2, range(40), PHOTOGRAPH, batch=5)
    sigma = draws[..., Draw.SIGMA]
    assert (sigma == sigma[0]).all()
    assert sigma[0, 0] != sigma[0, 1]
    others = draw_views(NATURAL, 1, 2, range(40), PHOTOGRAPH)
    same = [column for column in Draw if column != Draw.SIGMA]
    np.testing.assert_array_equal(draws[..., same], others[..., same])
    assert 0 < draws[:, 0, Draw.BLUR].mean() < 1, "which images are blurred is up to each"


def test_the_blur_of_a_batch_is_that_of_its_number() -> None:
    """Whichever images it holds, and so however many ranks share it."""
    sigmas = {
        (seed, epoch, batch): tuple(draw_views(BY_BATCH, seed, epoch, [9], PHOTOGRAPH, batch=batch)[0, :, Draw.SIGMA])
        for seed in (0, 1)
        for epoch in (0, 1)
        for batch in range(10)
    }
    assert len({value for pair in sigmas.values() for value in pair}) == 80
    other = draw_views(BY_BATCH, 1, 1, [3, 4], PHOTOGRAPH, batch=7)
    assert {tuple(pair) for pair in other[..., Draw.SIGMA]} == {sigmas[1, 1, 7]}


def test_the_blur_of_batches_is_uniform() -> None:
    sigmas = np.concatenate(
        [draw_views(BY_BATCH, 0, 0, [0], PHOTOGRAPH, batch=batch)[..., Draw.SIGMA] for batch in range(COUNT)]
    )
    for view in (0, 1):
        assert uniform_between(0.1, 2.0, sigmas[:, view])
        assert not uniform_between(0.1, 1.95, sigmas[:, view])
    assert abs(stats.spearmanr(sigmas[:, 0], sigmas[:, 1]).statistic) < 0.032


def test_the_blur_of_a_batch_needs_its_number() -> None:
    with pytest.raises(ValueError, match="say which, by batch"):
        draw_views(BY_BATCH, 0, 0, [0], PHOTOGRAPH)
