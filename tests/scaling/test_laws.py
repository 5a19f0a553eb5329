"""The fitted serial fraction against values that are known and against a search over a grid."""

from collections.abc import Callable

import numpy as np
import pytest

from simclr_scale.errors import InputError
from simclr_scale.scaling.laws import amdahl, fit_serial_fraction, gustafson

LAWS = [amdahl, gustafson]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("serial", [0.0, 1e-4, 0.003, 0.05, 0.4, 1.0])
def test_exact_times_give_their_serial_fraction(law: Callable, serial: float) -> None:
    devices = [1, 2, 3, 8, 64, 1024]
    fit = fit_serial_fraction(devices, 7.5 * law(np.array(devices, float), serial), law)
    assert fit.serial_fraction == pytest.approx(serial, rel=1e-5, abs=1e-7)
    assert fit.of_one == pytest.approx(7.5, rel=1e-5)
    assert fit.worst < 1e-6
    assert fit.error is not None
    assert fit.error < 1e-5


def test_the_laws_at_values_worked_out_by_hand() -> None:
    # A tenth serial: 10 devices are 1 / (.1 + .9 / 10) = 5.263 times as fast, and do .1 + .9 * 10 = 9.1 times the work.
    assert 1 / amdahl(np.array([10.0]), 0.1)[0] == pytest.approx(5.26316, rel=1e-5)
    assert gustafson(np.array([10.0]), 0.1)[0] == pytest.approx(9.1)


@pytest.mark.parametrize("law", LAWS)
def test_noisy_times_against_a_search_of_a_grid(law: Callable) -> None:
    rng = np.random.default_rng(0)
    devices = np.array([1, 2, 4, 8, 16, 32])
    values = 0.3 * law(devices.astype(float), 0.06) * np.exp(rng.normal(0, 0.02, 6))
    fit = fit_serial_fraction(devices.tolist(), values.tolist(), law)

    def cost(serial: float) -> float:
        difference = np.log(values) - np.log(law(devices.astype(float), serial))
        return float(((difference - difference.mean()) ** 2).sum())

    grid = np.linspace(0, 0.5, 50_001)
    assert fit.serial_fraction == pytest.approx(grid[np.argmin([cost(s) for s in grid])], abs=2e-5)
    assert fit.error is not None
    assert abs(fit.serial_fraction - 0.06) < 3 * fit.error


@pytest.mark.parametrize("law", LAWS)
def test_the_standard_error_covers_the_truth_as_often_as_it_should(law: Callable) -> None:
    rng, devices, within = np.random.default_rng(1), np.array([1, 2, 4, 8, 16, 32, 64, 128]), 0
    for _ in range(40):
        values = law(devices.astype(float), 0.2) * np.exp(rng.normal(0, 0.01, len(devices)))
        fit = fit_serial_fraction(devices.tolist(), values.tolist(), law)
        assert fit.error is not None
        within += abs(fit.serial_fraction - 0.2) < 2.45 * fit.error  # 95% of Student's t with 6 degrees of freedom
    assert 34 <= within <= 40


def test_more_than_the_devices_is_no_negative_fraction() -> None:
    fit = fit_serial_fraction([1, 2, 4], [1.0, 0.45, 0.2], amdahl)
    assert fit.serial_fraction == pytest.approx(0, abs=1e-9)
    assert fit.worst > 0.05


def test_two_numbers_of_devices_have_no_error_and_one_no_fit() -> None:
    fit = fit_serial_fraction([1, 4], [1.0, 0.4], amdahl)
    assert fit.serial_fraction == pytest.approx(0.2, rel=1e-6)
    assert fit.error is None
    assert fit_serial_fraction([1, 4, 4], [1.0, 0.4, 0.41], amdahl).error is None
    with pytest.raises(InputError, match="two numbers of devices at least, got 1"):
        fit_serial_fraction([2, 2], [1.0, 1.0], amdahl)
    with pytest.raises(InputError, match="above 0"):
        fit_serial_fraction([1, 2], [1.0, 0.0], amdahl)
