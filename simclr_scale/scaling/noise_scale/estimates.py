"""From gradients to the noise scale.

Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), section 2.2 and
appendix A.1. With G the true gradient, and E|g_B - G|^2 = S / B the noise of a batch of B images,

    B_simple = S / |G|^2,

the batch at which noise and signal are alike. Both parts are estimated without bias and, where there are several
estimates, averaged apart; their ratio comes last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simclr_scale.errors import InputError

_COLUMNS = 1 << 20


@dataclass(frozen=True)
class NoiseScale:
    """Both parts of a noise scale.

    Attributes:
        signal: |G|^2, an estimate without bias, so that it can be negative where noise is all there is.
        noise: S, of one image: the trace of the covariance of a gradient, times the images behind it.
        error: standard error of the logarithm of B_simple, where it is known.
    """

    signal: float
    noise: float
    error: float | None = None

    @property
    def simple(self) -> float | None:
        """B_simple in images; None where the estimate of |G|^2 is not above 0: more batches are needed."""
        return self.noise / self.signal if self.signal > 0 else None

    def as_json(self) -> dict[str, Any]:
        interval = None
        if self.simple is not None and self.error is not None:
            # 1.96 standard errors to either side, on the scale of logarithms.
            interval = [self.simple * float(np.exp(sign * 1.96 * self.error)) for sign in (-1, 1)]
        return {
            "noise_scale": self.simple,
            "interval": interval,
            "gradient_squared": self.signal,
            "noise_of_one_image": self.noise,
        }


def probe_estimate(gram: NDArray[np.float64], batch: int) -> NoiseScale:
    """From n independent gradients g at the same weights, each of a batch of B images, by their products.

    |G|^2 = (|sum g|^2 - sum |g|^2) / (n (n - 1)),   S = B sum |g - mean g|^2 / (n - 1).

    Nothing is assumed of how a batch makes its gradient, so this holds for contrastive losses too, whose images are
    each other's negatives: the noise scale is then that of batches of this size. The error is by the jackknife over
    batches.

    Args:
        gram: (n, n), <g_i, g_j>.
        batch: B, images of one gradient.

    Raises:
        InputError: fewer than two gradients.
    """
    n = len(gram)
    if n < 2:
        raise InputError(f"a noise scale needs 2 independent batches at least, got {n}")
    total, own = float(gram.sum()), np.diagonal(gram)
    signal, noise = _parts(n, np.array(total), own.sum(), batch)
    error = None
    if n > 2:
        # Without one of them: its row and column fall away.
        error = _jackknife_error(*_parts(n - 1, total - 2 * gram.sum(1) + own, own.sum() - own, batch))
    return NoiseScale(float(signal), float(noise), error)


def _jackknife_error(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float | None:
    """Of the logarithm of the ratio, from its values with one of n left out; None where one of them has no ratio."""
    n = len(signals)
    if n < 3 or (signals <= 0).any() or (noises <= 0).any():
        return None
    logs = np.log(noises / signals)
    return float(np.sqrt((n - 1) / n * np.square(logs - logs.mean()).sum()))


def _parts(
    n: int, totals: NDArray[np.float64], squares: NDArray[np.float64], batch: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """|G|^2 and S from |sum g|^2 and sum |g|^2 of n gradients."""
    return (totals - squares) / (n * (n - 1)), batch * (squares - totals / n) / (n - 1)


def per_rank_estimate(local_squares: Sequence[float], global_square: float, batch: int) -> NoiseScale:
    """From the gradient of each of W ranks and their mean: free of cost, as a step of DDP has both.

    |G|^2 = (B |g_B|^2 - b mean |g_r|^2) / (B - b),   S = (mean |g_r|^2 - |g_B|^2) / (1/b - 1/B).

    It takes gradients of ranks for independent, and the loss for a sum over images. With negatives from all ranks
    neither holds, and the result is far off (a test shows by how much).

    Args:
        local_squares: |g_r|^2 of each rank.
        global_square: |g_B|^2 of the mean.
        batch: B, images over all ranks.

    Raises:
        InputError: there is one rank.
    """
    ranks = len(local_squares)
    if ranks < 2:
        raise InputError("the mode per_rank compares ranks, and there is one: take --mode probe")
    mean, small = float(np.mean(local_squares)), batch / ranks
    signal = (batch * global_square - small * mean) / (batch - small)
    return NoiseScale(signal, (mean - global_square) / (1 / small - 1 / batch))


def jackknife_estimate(whole_square: float, gram: NDArray[np.float64], batch: int) -> NoiseScale:
    """From one batch and K gradients, each of the batch without another K-th of its images.

    The variance of the batch's gradient is (K - 1) / K sum |g_(k) - mean g_(.)|^2 (Efron & Stein 1981: not too small on
    average), S is B times that, and |G|^2 what it leaves of |g_B|^2. With fewer images a view has fewer negatives,
    too, which counts as noise.

    Args:
        whole_square: |g_B|^2 of the whole batch.
        gram: (K, K), products of the gradients with a part left out.
        batch: B, images of the whole batch.

    Raises:
        InputError: fewer than two parts.
    """
    parts = len(gram)
    if parts < 2:
        raise InputError(f"the jackknife leaves out one of 2 parts at least, got {parts}")
    variance = (parts - 1) / parts * (float(np.trace(gram)) - float(gram.sum()) / parts)
    return NoiseScale(whole_square - variance, batch * variance)


def mean_of(estimates: Sequence[NoiseScale]) -> NoiseScale:
    """The two parts averaged apart; the error of their ratio by the jackknife over estimates."""
    signals, noises = (np.array([getattr(e, name) for e in estimates]) for name in ("signal", "noise"))
    error = _jackknife_error(signals.sum() - signals, noises.sum() - noises)
    return NoiseScale(float(signals.mean()), float(noises.mean()), error)


def gram_of(gradients: Sequence[Tensor]) -> NDArray[np.float64]:
    """(n, n) products in float64 of n vectors, some columns at a time."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for start in range(0, len(gradients[0]), _COLUMNS):
        columns = torch.stack([gradient[start : start + _COLUMNS].cpu() for gradient in gradients]).double()
        gram += columns @ columns.T
    return gram.numpy()
