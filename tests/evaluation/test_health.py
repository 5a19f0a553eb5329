"""Health of features against naive float64 formulas, and where the answer is known."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.health import (
    alignment,
    alpha_req,
    collapse_warnings,
    constant_features,
    rankme,
    spectrum,
    spread,
    uniformity,
)

SHAPES = [(2, 1), (7, 5), (5, 7), (1300, 3), (37, 64)]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive_rankme(features: np.ndarray) -> float:
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    entropy = 0.0
    for value in values:
        share = value / values.sum()
        entropy -= share * math.log(share) if share > 0 else 0.0
    return math.exp(entropy)


def naive_uniformity(features: np.ndarray, t: float) -> float:
    unit = [row / np.linalg.norm(row) for row in features.astype(np.float64)]
    terms = [math.exp(-t * float(np.sum((a - b) ** 2))) for a, b in itertools.combinations(unit, 2)]
    return math.log(math.fsum(terms) / len(terms))


def naive_alignment(first: np.ndarray, second: np.ndarray, power: float) -> float:
    distances = [
        np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** power
        for a, b in zip(first.astype(np.float64), second.astype(np.float64), strict=True)
    ]
    return float(np.mean(distances))


def naive_alpha(features: np.ndarray, first: int, last: int) -> float:
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(features.astype(np.float64), rowvar=False)))[::-1]
    ranks = np.arange(1, len(eigenvalues) + 1, dtype=np.float64)[first - 1 : last]
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[first - 1 : last]), 1, w=ranks**-0.5)
    return -float(slope)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_rankme_is_the_formula(shape: tuple[int, int], offset: float) -> None:
    features = normal(*shape) + np.float32(offset)
    exact = features.astype(np.float64)
    assert rankme(features) == pytest.approx(naive_rankme(features), rel=1e-9)
    found = spectrum(torch.from_numpy(features))
    assert len(found.raw) == len(found.centered) == min(shape)
    np.testing.assert_allclose(found.raw, np.linalg.svd(exact, compute_uv=False), rtol=1e-9)
    centered = np.linalg.svd(exact - exact.mean(0), compute_uv=False)
    np.testing.assert_allclose(found.centered, centered, rtol=1e-9, atol=1e-9 * found.raw[0].item())


def test_rankme_of_many_blocks_of_rows() -> None:
    features = normal(5000, 40) * np.geomspace(1, 1e-6, 40, dtype=np.float32)
    assert rankme(features) == pytest.approx(naive_rankme(features), rel=1e-9)
    # Where a Gram matrix in float64 has lost the small ones.
    np.testing.assert_allclose(
        spectrum(features).raw, np.linalg.svd(features.astype(np.float64), compute_uv=False), rtol=1e-8
    )


def test_the_epsilon_of_the_paper() -> None:
    features = normal(90, 12)
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / values.sum() + 1e-3
    assert rankme(features, epsilon=1e-3) == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-9)


@pytest.mark.parametrize("width", [4, 32, 200])
def test_isotropic_gaussians_have_the_rank_of_their_dimension(width: int) -> None:
    assert rankme(normal(100 * width, width)) == pytest.approx(width, rel=0.01)
    # In a subspace, turned into more dimensions.
    turned = normal(100 * width, width) @ normal(width, 2 * width, seed=1)
    whitened = np.linalg.qr(normal(2 * width, width, seed=2))[0]
    assert rankme(normal(100 * width, width) @ whitened.T) == pytest.approx(width, rel=0.01)
    assert rankme(turned) < width


def test_rank_one_has_rank_one_and_zeros_none() -> None:
    line = np.outer(np.arange(1, 301), np.arange(-20, 44)).astype(np.float32)
    assert rankme(line) == pytest.approx(1, abs=1e-9)
    assert rankme(np.outer(normal(300), normal(64, seed=1))) == pytest.approx(1, abs=1e-5)
    assert rankme(np.zeros((9, 4))) == 0
    # A large mean is one direction too; what remains without it has the rank of the noise.
    shifted = normal(4000, 16) + 1000
    assert rankme(shifted) == pytest.approx(1, abs=0.1)
    assert rankme(shifted, centered=True) == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize(("shape", "ranks"), [((500, 30), (4, 100)), ((500, 130), (4, 100)), ((300, 20), (1, 9))])
def test_alpha_is_the_weighted_fit(shape: tuple[int, int], ranks: tuple[int, int]) -> None:
    features = normal(*shape) * np.arange(1, shape[1] + 1, dtype=np.float32) ** -0.7 + 5
    assert alpha_req(features, ranks=ranks) == pytest.approx(naive_alpha(features, *ranks), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
def test_alpha_of_a_power_law_is_its_exponent(alpha: float) -> None:
    basis = np.linalg.qr(normal(400, 61) - normal(400, 61).mean(0))[0][:, 1:]
    basis -= basis.mean(0)
    basis = np.linalg.qr(basis)[0]
    features = basis * np.arange(1, 61) ** (-alpha / 2)
    assert alpha_req(features) == pytest.approx(alpha, abs=1e-4)
    assert alpha_req(features * 1e3 + 7) == pytest.approx(alpha, abs=1e-2)


@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (130, 4)])
@pytest.mark.parametrize("t", [0.5, 2.0, 9.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1024])
def test_uniformity_is_the_mean_over_pairs(shape: tuple[int, int], t: float, chunk_size: int) -> None:
    features = normal(*shape) * 7
    assert uniformity(features, t=t, chunk_size=chunk_size) == pytest.approx(naive_uniformity(features, t), rel=1e-9)


def test_uniformity_where_it_is_known() -> None:
    assert uniformity(np.tile(normal(1, 9), (50, 1))) == pytest.approx(0, abs=1e-12)
    assert uniformity([[1.0, 0.0], [-3.0, 0.0]], t=3) == pytest.approx(-12)
    # Far beyond what exp holds in float64.
    assert uniformity([[1.0, 0.0], [-3.0, 0.0]], t=1e4) == pytest.approx(-4e4)
    # E exp(t' u) for the cosine u of two uniform directions: Gaussian of variance 1 / D for large D.
    assert uniformity(normal(3000, 256)) == pytest.approx(-4 + 16 / 2 / 256, abs=2e-3)
    assert uniformity([[0.0, 0.0], [5.0, 0.0]]) == pytest.approx(-2)


def test_uniformity_takes_memory_of_a_chunk() -> None:
    features = torch.from_numpy(normal(6000, 8))
    sizes: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        uniformity(features, chunk_size=256)
    assert max(sizes) <= features.numel() + 2 * 256 * 256
    assert max(sizes) >= 256 * 256


@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (2050, 4)])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_alignment_is_the_mean_distance(shape: tuple[int, int], power: float) -> None:
    first, second = normal(*shape) * 5, normal(*shape, seed=1)
    assert alignment(first, second, power=power) == pytest.approx(naive_alignment(first, second, power), rel=1e-9)


def test_alignment_where_it_is_known() -> None:
    views = normal(40, 6)
    assert alignment(views, views) == 0
    assert alignment(views, 4 * views) == pytest.approx(0, abs=1e-12)
    assert alignment(views, -views) == pytest.approx(4)
    assert alignment([[1.0, 0.0]], [[0.0, 2.0]]) == pytest.approx(2)
    assert alignment([[0.0, 0.0]], [[0.0, 2.0]]) == pytest.approx(1)


def test_spread_is_half_the_mean_squared_distance() -> None:
    features = normal(40, 6) + 1
    unit = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    squares = [np.sum((a - b) ** 2) for a in unit for b in unit]
    assert spread(features) == pytest.approx(np.mean(squares) / 2, rel=1e-9)
    assert spread(np.tile(normal(1, 9), (50, 1))) == pytest.approx(0, abs=1e-12)


def test_collapse_is_told_and_health_is_not() -> None:
    healthy = normal(2000, 100)
    assert collapse_warnings(healthy) == ()
    [complete] = collapse_warnings(1 + 1e-3 * healthy)
    assert complete.startswith("complete collapse: the features of all 2,000 images")
    [dimensional] = collapse_warnings(normal(2000, 3) @ normal(3, 100, seed=1) + 0.01 * healthy)
    assert dimensional.startswith("dimensional collapse")
    assert dimensional.endswith("of 100")
    # Behind a ReLU the mean hides it from neither.
    assert collapse_warnings(np.maximum(healthy, 0)) == ()
    dead = healthy * (np.arange(100) % 10 > 0)
    assert constant_features(dead) == 10
    assert collapse_warnings(dead) == ("10 of 100 features are the same for every image",)
    [few] = collapse_warnings(healthy[:150])
    assert few.startswith("150 images are few for 100 features")
    assert collapse_warnings(np.zeros((400, 8)))[0].startswith("complete collapse")


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: rankme(np.zeros(3)), "wanted (images, features)"),
    (lambda: rankme([[1.0, math.nan]]), "row 0 holds NaN"),
    (lambda: uniformity(np.ones((1, 3))), "about pairs"),
    (lambda: uniformity(np.ones((3, 3)), t=0), "wanted above 0"),
    (lambda: uniformity(np.ones((3, 3)), chunk_size=0), "wanted above 0"),
    (lambda: alignment(np.ones((3, 3)), np.ones((3, 4))), "first has (3, 3)"),
    (lambda: alignment(np.ones((3, 3)), np.ones((3, 3)), power=0), "wanted above 0"),
    (lambda: alpha_req(normal(50, 5)), "2 eigenvalues"),
    (lambda: alpha_req(normal(50, 9), ranks=(0, 9)), "1 <= first <= last"),
    (lambda: collapse_warnings(np.ones((1, 3))), "collapse is about several"),
]


@pytest.mark.parametrize(("call", "says"), BAD)
def test_mistakes_are_named(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert says in str(raised.value)
