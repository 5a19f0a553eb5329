"""Fitting laws to points: curves of known parameters come back, and what cannot be fitted is refused."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from simclr_scale.errors import InputError
from simclr_scale.scaling.error_laws import FORMS, fit_law
from simclr_scale.scaling.error_laws.batched import minimise
from simclr_scale.scaling.error_laws.forms import Frame
from tests.scaling.error_laws.curves import CURVES


@pytest.mark.parametrize("form", CURVES)
def test_a_curve_without_noise_comes_back(form: str) -> None:
    curve = CURVES[form]
    fit = fit_law(curve.sizes, curve.y(curve.sizes), form, resamples=20)
    # The definitions by another way agree with ours, far beyond the points too.
    far = np.geomspace(curve.sizes[0] / 3, 30 * curve.sizes[-1], 7)
    assert [each.value for each in fit.predict(far)] == pytest.approx(curve.y(far), rel=1e-4)
    assert fit.rms < 1e-6
    for name, value in curve.truth.items():
        assert fit.parameters[name].value == pytest.approx(value, rel=1e-2), name


def test_the_ceiling_may_be_known() -> None:
    curve = CURVES["m4"]
    fit = fit_law(curve.sizes, curve.y(curve.sizes), "m4", ceiling=0.9, resamples=20)
    assert fit.parameters["y0"] == (0.9, 0.9, 0.9)
    assert fit.parameters["c"].value == pytest.approx(0.5, rel=1e-3)


def test_order_and_repeats_do_not_matter() -> None:
    curve = CURVES["power"]
    x = np.concatenate([curve.sizes[::-1], curve.sizes])
    y = curve.y(x) * np.tile([0.99, 1.01], 8)
    one, other = (fit_law(x[order], y[order], resamples=20) for order in (np.arange(16), np.arange(16)[::-1]))
    assert one.parameters["alpha"].value == pytest.approx(other.parameters["alpha"].value, rel=1e-6)
    assert one.x == other.x == tuple(sorted(x))


def test_the_same_seed_gives_the_same_intervals() -> None:
    curve = CURVES["power"]
    y = curve.y(curve.sizes) * np.exp(0.02 * np.random.default_rng(1).standard_normal(8))
    one, same, other = (fit_law(curve.sizes, y, resamples=50, seed=seed) for seed in (3, 3, 4))
    assert one.parameters == same.parameters
    assert one.parameters["alpha"].value == other.parameters["alpha"].value
    assert one.parameters["alpha"].low != other.parameters["alpha"].low


@pytest.mark.parametrize("form", CURVES)
def test_many_fits_at_once_are_those_of_scipy(form: str) -> None:
    curve, law = CURVES[form], FORMS[form]
    noise = 0.02 * np.random.default_rng(0).standard_normal((2, len(curve.sizes)))
    y = curve.y(curve.sizes)
    frame = Frame.of(curve.sizes, y, 0.9 if form == "m4" else None)
    logs = np.log(curve.sizes / frame.scale)
    starts = law.starts(logs, y, frame)
    for target in np.log(y) + noise:

        def residuals(unknown: np.ndarray, target: np.ndarray = target) -> np.ndarray:
            return law.log_error(unknown, logs, frame) - target

        found, costs = minimise(
            lambda u: law.log_error(u.T[:, :, None], logs, frame), np.tile(target, (len(starts), 1)), np.array(starts)
        )
        best = costs.argmin()
        assert costs[best] == pytest.approx(0.5 * np.sum(residuals(found[best]) ** 2), rel=1e-9)
        reference = min(least_squares(residuals, start, method="lm").cost for start in starts)
        assert costs[best] < 1.01 * reference


def test_a_line_of_logarithms_is_beaten_where_there_is_a_floor() -> None:
    curve = CURVES["power"]
    foreseen = fit_law(curve.sizes, curve.y(curve.sizes), resamples=20, hold_out=2).extrapolation
    assert foreseen is not None
    assert foreseen.held_out == tuple(curve.sizes[-2:])
    assert foreseen.error < 1e-4
    slope, level = np.polyfit(np.log(curve.sizes[:-2]), np.log(curve.y(curve.sizes[:-2])), 1)
    line = np.exp(level) * curve.sizes[-2:] ** slope
    assert foreseen.line_error == pytest.approx(np.mean(abs(line / curve.y(curve.sizes[-2:]) - 1)))
    assert foreseen.line_error > 0.1


def test_notes_say_what_is_not_determined() -> None:
    x = np.geomspace(1e3, 4e3, 6)
    noisy = 2 * x**-0.1 * np.exp(0.02 * np.random.default_rng(0).standard_normal(6))
    fit = fit_law(x, noisy, resamples=200)
    assert fit.notes[0].startswith("the floor E is not determined")
    none_left = fit_law(x, noisy, resamples=20, hold_out=4)
    assert none_left.extrapolation is None
    assert none_left.notes[-1].startswith("no extrapolation was tried")


X = [1e3, 2e3, 4e3, 8e3, 16e3]
Y = [0.6, 0.5, 0.42, 0.37, 0.33]
REFUSED = [
    (X[:4], Y[:4], {}, "a scaling law needs points of at least 5 sizes, got 4"),
    (X[:4] * 2, Y[:4] * 2, {}, "a scaling law needs points of at least 5 sizes, got 4"),
    (X, Y, {"form": "m4"}, "form m4 has 5 unknowns, so it needs points of 6 sizes, got 5; --ceiling takes one away"),
    (X, Y, {"form": "bnsl"}, "form bnsl has 6 unknowns, so it needs points of 7 sizes, got 5; form power has 3"),
    (X, [0.0, *Y[1:]], {}, "y: a law of powers needs finite values above 0"),
    ([-1.0, *X[1:]], Y, {}, "x: a law of powers needs finite values above 0"),
    (X, Y[:4], {}, "x and y: shapes"),
    (X, Y, {"form": "cubic"}, "form: 'cubic', wanted one of power, m4, bnsl"),
    (X, Y, {"ceiling": 0.5}, "ceiling: 0.5, but an error of 0.6 was measured"),
    (X, Y, {"ceiling": -1.0}, "ceiling: -1.0, wanted above 0"),
    (X, Y, {"hold_out": 0}, "hold_out: 0, wanted at least 1"),
    (X, Y, {"hold_out": 5}, "hold_out: 5, but there are 5 sizes"),
    (X, Y, {"resamples": 5}, "resamples: 5, wanted at least 20"),
    (X, Y, {"level": 95}, "level: 95, wanted between 0 and 1"),
]


@pytest.mark.parametrize(("x", "y", "settings", "line"), REFUSED)
def test_refused(x: list[float], y: list[float], settings: dict, line: str) -> None:
    with pytest.raises(InputError, match="^" + line.replace("(", r"\(")):
        fit_law(x, y, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("form", CURVES)
def test_intervals_hold_the_truth_in_90_of_100_trials(form: str) -> None:
    """Of y within the points, at their end and at four times the largest size; of a power law its parameters too."""
    curve = CURVES[form]
    places = np.array([curve.sizes[len(curve.sizes) // 2], curve.sizes[-1], 4 * curve.sizes[-1]])
    truth = curve.y(places)
    held: dict[str, int] = {}
    for trial in range(100):
        noise = 0.02 * np.random.default_rng(trial).standard_normal(len(curve.sizes))
        fit = fit_law(curve.sizes, curve.y(curve.sizes) * np.exp(noise), form, resamples=120, seed=trial)
        inside = {
            f"y at {x:.3g}": e.low <= y <= e.high for x, y, e in zip(places, truth, fit.predict(places), strict=True)
        }
        if form == "power":
            inside |= {
                name: fit.parameters[name].low <= v <= fit.parameters[name].high for name, v in curve.truth.items()
            }
        for name, yes in inside.items():
            held[name] = held.get(name, 0) + yes
    print(form, held)
    assert all(count >= 90 for count in held.values()), held
