"""How healthy features are, judged without labels: their rank, the decay of their spectrum, how views and images lie.

Every function takes features (N, D), numpy or torch, and computes in float64 over blocks of rows, so that beside the
features memory holds a few (D, D) matrices, or two blocks of images and their distances.
"""

import math
from typing import NamedTuple

import torch

from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_features

ALPHA_RANKS = (4, 100)
_FEWEST_RANKS = 3
# Relative to the largest singular value; what lies below is the rounding of float32 features.
_ROUNDING = 1e-7
_LEAST_ROWS = 1024

# Judgements, not results of a paper. 1e-3 is a mean cosine of .999 between two images.
COLLAPSED_SPREAD = 1e-3
COLLAPSED_RANK_SHARE = 0.05
_FEW_IMAGES_A_FEATURE = 2


class Spectrum(NamedTuple):
    """Singular values of features (N, D), K = min(N, D) of them, float64, in falling order."""

    raw: torch.Tensor
    """(K,): of the features as they are."""
    centered: torch.Tensor
    """(K,): of the features less their mean. Squared and divided by N - 1, the eigenvalues of the covariance."""


def spectrum(features: Array) -> Spectrum:
    """The singular values that rank and decay are read from, in memory of a few (D, D) matrices beside the features.

    By QR factors of blocks of rows, each stacked on the one before. Unlike the eigenvalues of a Gram matrix they keep
    small singular values: squares would bury all below 1e-8 of the largest.

    Raises:
        InputError: not (N, D), or not finite.
    """
    matrix = as_features(features, "features")
    images, width = matrix.shape
    mean = matrix.mean(dim=0, dtype=torch.float64)
    triangle = mean.new_empty(0, width)
    for block in matrix.split(max(_LEAST_ROWS, 2 * width)):
        triangle = torch.linalg.qr(torch.cat([triangle, block.double() - mean]), mode="r").R
    # The mean is orthogonal to what is left without it, so one more row makes the factor of the features as they are.
    raw = torch.linalg.svdvals(torch.cat([triangle, math.sqrt(images) * mean[None]]))
    count = min(images, width)
    return Spectrum(raw[:count], torch.linalg.svdvals(triangle)[:count])


def effective_rank(singular_values: torch.Tensor, *, epsilon: float = 0.0) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 where all of them are 0."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values / total + epsilon
    return float(torch.special.entr(shares).sum().exp())


def rankme(features: Array, *, centered: bool = False, epsilon: float = 0.0) -> float:
    """RankMe: the effective rank of features, from 1 (all along one direction) to min(N, D).

    Garrido, Balestriero, Najman and LeCun 2023 (arXiv:2210.02885), who take 25,600 images. With few images for each
    feature it is too low.

    Args:
        features: (N, D).
        centered: whether the mean is taken off first, which the paper does not do. Features behind a ReLU have a large
            mean, which hides the rank of the rest.
        epsilon: added to every share; the paper's 1e-7 keeps the logarithm finite, which is not needed here. It would
            make 1.003 of a rank of one in 2,048 features.

    Raises:
        InputError: not (N, D), or not finite.
    """
    found = spectrum(features)
    return effective_rank(found.centered if centered else found.raw, epsilon=epsilon)


def alpha_req(features: Array, *, ranks: tuple[int, int] = ALPHA_RANKS) -> float:
    """alpha-ReQ: the exponent of the power law, eigenvalue i of the covariance ~ i ** -alpha.

    Agrawal, Mondal, Ghosh and Richards 2022, in whose experiments encoders near 1 transferred best. Fitted as in their
    code (powerlaw.py, after Stringer et al. 2019), by least squares of the logarithms with weights 1 / i.

    Args:
        features: (N, D).
        ranks: the first and the last i of the fit; the last may lie beyond the rank of the features.

    Raises:
        InputError: not (N, D), not finite, or fewer than 3 eigenvalues above rounding within `ranks`.
    """
    return power_law_exponent(spectrum(features).centered, ranks)


def power_law_exponent(singular_values: torch.Tensor, ranks: tuple[int, int] = ALPHA_RANKS) -> float:
    """`alpha_req` from the singular values (K,) of centred features, in falling order; the same errors."""
    first, last = ranks
    if not 1 <= first <= last:
        raise InputError(f"ranks {ranks}: wanted the first and the last, 1 <= first <= last")
    values = singular_values[singular_values > _ROUNDING * singular_values[0]][first - 1 : last]
    if len(values) < _FEWEST_RANKS:
        raise InputError(
            f"features: {len(values)} eigenvalues of their covariance are at ranks {first} to {last} and not 0; "
            f"a power law needs {_FEWEST_RANKS}"
        )
    rank = torch.arange(first, first + len(values), dtype=torch.float64)
    weights = (1 / rank) / (1 / rank).sum()
    x, y = rank.log(), 2 * values.log()
    x, y = x - weights @ x, y - weights @ y
    return float(-(weights @ (x * y)) / (weights @ x.square()))


def alignment(first: Array, second: Array, *, power: float = 2.0) -> float:
    """Mean distance between the features of two views of an image, on the unit sphere, to the given power.

    Wang and Isola 2020, section 4.1; smaller is better, 0 where views agree, at most 2 ** power. A row of zeros has
    no direction and stays zero, at distance 1 from every other.

    Args:
        first, second: (N, D) each; row by row the two views of one image. Normalised here.
        power: alpha of the paper.

    Raises:
        InputError: not (N, D), not finite, other shapes than each other, or a power that is not above 0.
    """
    views = as_features(first, "first"), as_features(second, "second")
    if views[0].shape != views[1].shape:
        raise InputError(f"second: shape {tuple(views[1].shape)}, but first has {tuple(views[0].shape)}")
    if not power > 0:
        raise InputError(f"power: {power}, wanted above 0")
    total = 0.0
    for one, other in zip(*(view.split(_LEAST_ROWS) for view in views), strict=True):
        distances = torch.linalg.vector_norm(_directions(one) - _directions(other), dim=1)
        total += float(distances.pow(power).sum())
    return total / len(views[0])


def uniformity(features: Array, *, t: float = 2.0, chunk_size: int = 1024) -> float:
    """Logarithm of the mean of exp(-t * distance ** 2) over all pairs of images, on the unit sphere.

    Wang and Isola 2020, section 4.1; smaller is better, 0 where all images have the same features; uniform on a
    sphere of many dimensions it is near -2 t. A row of zeros stays zero, at distance 1 from every direction.

    Args:
        features: (N, D), N at least 2. Normalised here.
        t: as in the paper.
        chunk_size: C, rows compared at a time; memory is that of C * C distances and of 2 C rows.

    Raises:
        InputError: not (N, D), not finite, fewer than 2 rows, or an argument that is not above 0.
    """
    matrix = as_features(features, "features")
    if len(matrix) < 2:
        raise InputError("features: 1 row, and uniformity is about pairs")
    if not t > 0 or chunk_size < 1:
        raise InputError(f"t {t} and chunk_size {chunk_size}: wanted above 0")
    sums = []
    blocks = matrix.split(chunk_size)
    for number, block in enumerate(blocks):
        rows = _directions(block)
        within = -t * _squared_distances(rows, rows)
        sums.append(within[tuple(torch.triu_indices(len(rows), len(rows), offset=1))].logsumexp(0))
        sums += [
            (-t * _squared_distances(rows, _directions(other))).flatten().logsumexp(0) for other in blocks[number + 1 :]
        ]
    pairs = len(matrix) * (len(matrix) - 1) / 2
    return float(torch.stack(sums).logsumexp(0)) - math.log(pairs)


def spread(features: Array) -> float:
    """1 less the squared length of the mean direction, 0 to 1: half the mean squared distance of images on the sphere.

    0 where all images have the same features (complete collapse), near 1 where they point everywhere.

    Raises:
        InputError: not (N, D), or not finite.
    """
    matrix = as_features(features, "features")
    directions = torch.zeros(matrix.shape[1], dtype=torch.float64)
    squares = 0.0
    for block in matrix.split(_LEAST_ROWS):
        rows = _directions(block)
        directions += rows.sum(dim=0)
        squares += float(rows.square().sum())
    mean = directions / len(matrix)
    return max(0.0, squares / len(matrix) - float(mean @ mean))


def constant_features(features: Array) -> int:
    """How many of the D features are the same for every image.

    Raises:
        InputError: not (N, D), or not finite.
    """
    matrix = as_features(features, "features")
    return int((matrix == matrix[0]).all(dim=0).sum())


def collapse_warnings(features: Array, *, found: Spectrum | None = None) -> tuple[str, ...]:
    """What is wrong with features, in words: complete collapse, or collapse into few dimensions; empty where neither.

    Complete: all images lie in nearly one direction (`spread` below 1e-3). Dimensional (Jing et al. 2022,
    arXiv:2110.09348): the effective rank of the centred features is below 5% of the possible, min(N - 1, D); below 20
    of those nothing is, as no rank is below 1. Both limits are our judgement. An untrained network may well be
    collapsed. Also told: features that are the same for every image, and fewer than 2 D images.

    Args:
        features: (N, D).
        found: their `spectrum`, where it is there already.

    Raises:
        InputError: not (N, D), not finite, or fewer than 2 rows.
    """
    matrix = as_features(features, "features")
    images, width = matrix.shape
    if images < 2:
        raise InputError("features: 1 row, and collapse is about several")
    warnings = []
    apart = spread(matrix)
    rank, possible = effective_rank((found or spectrum(matrix)).centered), min(images - 1, width)
    if apart < COLLAPSED_SPREAD:
        warnings.append(
            f"complete collapse: the features of all {images:,} images point in nearly one direction "
            f"(spread {apart:.1g})"
        )
    elif rank < COLLAPSED_RANK_SHARE * possible:
        warnings.append(
            f"dimensional collapse: the centred features have an effective rank of {rank:.1f} of {possible:,}"
        )
    if same := constant_features(matrix):
        warnings.append(f"{same:,} of {width:,} features are the same for every image")
    if images < _FEW_IMAGES_A_FEATURE * width:
        warnings.append(
            f"{images:,} images are few for {width:,} features: RankMe is then too low; "
            "compare encoders on the same images only"
        )
    return tuple(warnings)


def _directions(rows: torch.Tensor) -> torch.Tensor:
    """Rows of unit length in float64; a row of zeros stays."""
    rows = rows.double()
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.where(lengths > 0, 1.0)


def _squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    lengths = rows.square().sum(1)[:, None] + others.square().sum(1)
    return (lengths - 2 * (rows @ others.T)).clamp_(min=0)
