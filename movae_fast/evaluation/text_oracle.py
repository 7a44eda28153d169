"""Compute the true log-likelihood of `lstm_text`'s sequences, by integrating over the network's latent on a
grid.

No model can do better on average: E[log p(x)] under the generating network is the corpus's negative entropy.
The latent is two-dimensional and the integrand is smooth and vanishes at the border, so the trapezoidal rule
converges faster than any power of the spacing. A coarse grid finds the region of a sequence's posterior, a fine
grid integrates over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from movae_fast.data.text.lstm_text import TextNetwork, log_prior

# Spacings of the fine grid, which is halved until log p(x) changes by less than the tolerance, in nats.
WIDEST, NARROWEST, TOLERANCE = 0.1, 0.0125, 2e-5
BORDER = 7.5  # of the grid: 5.5 standard deviations outside the components' centres


@dataclass(frozen=True)
class Integral:
    """Hold, for each sequence x, log p(x) in nats, and the mean and covariance of its posterior."""

    log_likelihood: Tensor  # [N] float64
    mean: Tensor  # [N, 2]
    covariance: Tensor  # [N, 2, 2]


@torch.no_grad()
def true_log_likelihood(
    network: TextNetwork,
    words: Tensor,  # [N, T] int64, words of the network: ids less the four special tokens
    coarse: float = 0.25,
    fine: float | None = None,
    at_once: int = 2048,
) -> Integral:
    """Integrate p(x | z) p(z) over z for each sequence x, in float64, on a grid of the spacing `fine`.

    If `fine` is None, the spacing is halved from 0.1 until log p(x) changes by less than 2e-5 nats. The fine
    grid covers, with a margin, the points of the grid of spacing `coarse` at which the integrand is within
    e^-30 of its maximum. At most `at_once` latents are evaluated at a time.
    """
    values, means, covariances = [], [], []
    rough = _grid(-BORDER, BORDER, -BORDER, BORDER, coarse)
    for x in words:
        density = _log_integrand(network, x, rough, at_once)
        near = rough[density > density.max() - 30]
        low, high = near.amin(0) - coarse, near.amax(0) + coarse
        spacing, before = fine or WIDEST, -math.inf
        while True:
            z = _grid(float(low[0]), float(high[0]), float(low[1]), float(high[1]), spacing)
            density = _log_integrand(network, x, z, at_once)
            value = density.logsumexp(0) + 2 * math.log(spacing)
            if fine is not None or abs(float(value) - before) < TOLERANCE or spacing <= NARROWEST:
                break
            spacing, before = spacing / 2, float(value)
        values.append(value)
        weights = density.softmax(0)
        mean = weights @ z
        means.append(mean)
        covariances.append(((z - mean) * weights[:, None]).T @ (z - mean))
    return Integral(torch.stack(values), torch.stack(means), torch.stack(covariances))


def _log_integrand(network: TextNetwork, x: Tensor, z: Tensor, at_once: int) -> Tensor:
    parts = [network.log_likelihood(x, part) + log_prior(part) for part in z.split(at_once)]
    return torch.cat(parts)


def _grid(left: float, right: float, bottom: float, top: float, spacing: float) -> Tensor:  # [G, 2]
    """Return the points [G, 2] of a square grid over a rectangle, whose sides are rounded outwards to the
    spacing."""

    def axis(low: float, high: float) -> Tensor:
        ends = math.floor(low / spacing), math.ceil(high / spacing)
        return torch.arange(ends[0], ends[1] + 1, dtype=torch.float64) * spacing

    return torch.cartesian_prod(axis(left, right), axis(bottom, top))
