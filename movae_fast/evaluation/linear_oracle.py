"""Compute the optimum of the linear VAE at a given beta in closed form, as a reference for trained curves.

The model has prior p(z) = N(0, I_k), decoder W z + m and encoder N(V (x - m), diag c) with one c for all x; m
is the data's mean and S its covariance (divided by N). The loss is D + beta R in nats per image, with the
distortion D = a E||x - W z - m||^2 + const by one of two conventions:

- "gaussian": -log N(x; W z + m, sigma2 I), that is a = 1 / (2 sigma2) and const = d/2 log(2 pi sigma2); -
"squared_error": the summed squared error itself, a = 1 and const = 0.

With the eigenpairs (lambda_i, u_i) of S in descending order and the water level t = beta / (2 a), latent i <= k
is active if lambda_i > t (Bae et al. 2023, section 3; Lucas et al. 2019 for beta = 1).
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Convention = Literal["gaussian", "squared_error"]


@dataclass(frozen=True)
class LinearOptimum:
    """Hold the smallest loss at one beta, in nats per image, and parameters that attain it."""

    beta: float
    rate: float
    distortion: float
    loss: float  # distortion + beta * rate
    active: int
    w: Tensor  # [d, k]
    v: Tensor  # [k, d]
    c: Tensor  # [k] posterior variances


def scale_and_constant(d: int, convention: Convention, sigma2: float) -> tuple[float, float]:
    """Return (a, const) of the distortion a ||x - x'||^2 + const for data of dimension d.

    Raises ValueError for an unknown convention or an invalid sigma2.
    """
    if not (math.isfinite(sigma2) and sigma2 > 0):
        raise ValueError(f"sigma2 {sigma2} must be positive and finite")
    if convention == "gaussian":
        return 0.5 / sigma2, 0.5 * d * math.log(2 * math.pi * sigma2)
    if convention == "squared_error":
        if sigma2 != 1:
            raise ValueError(f"sigma2 {sigma2}: the summed squared error has no variance; leave it at 1")
        return 1.0, 0.0
    raise ValueError(f"convention {convention!r}: valid: gaussian, squared_error")


def linear_losses(
    covariance: Tensor,  # [d, d]
    w: Tensor,  # [d, k]
    v: Tensor,  # [k, d]
    c: Tensor,  # [k]
    convention: Convention = "gaussian",
    sigma2: float = 1.0,
) -> tuple[Tensor, Tensor]:  # [], []
    """Return (rate, distortion) in nats per image of any linear VAE whose bias is the data's mean;
    differentiable."""
    a, constant = scale_and_constant(len(covariance), convention, sigma2)
    moved = v @ covariance @ v.T  # the posterior means' covariance
    error = covariance.trace() - 2 * (w * (covariance @ v.T)).sum() + ((w.T @ w) * moved).sum()
    error = error + (w.square().sum(0) * c).sum()
    return 0.5 * (moved.diagonal() + c - c.log() - 1).sum(), a * error + constant


class LinearOracle:
    """Compute the optima of linear VAEs with k latents, for one data covariance [d, d] (float64, divided by N),
    at any beta > 0.

    Raises ValueError for a matrix that is not square or not finite, for k < 1, and for a beta that is not
    positive. More latents than dimensions are allowed; those beyond d are unused.
    """

    def __init__(
        self, covariance: Tensor, k: int, convention: Convention = "gaussian", sigma2: float = 1.0
    ) -> None:
        if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
            raise ValueError(f"covariance {list(covariance.shape)} must be a square matrix")
        if not bool(covariance.isfinite().all()):
            raise ValueError("covariance has values that are not finite")
        if k < 1:
            raise ValueError(f"k {k} must be at least 1")
        self.d, self.k = len(covariance), k
        self.a, self.constant = scale_and_constant(self.d, convention, sigma2)
        values, vectors = torch.linalg.eigh(covariance.double())
        # Descending; rounding may leave an eigenvalue of a singular covariance below zero.
        self.values, self.vectors = values.flip(0).clamp_min(0), vectors.flip(1)

    def with_latents(self, k: int) -> LinearOracle:
        """Return an oracle for the same data with another number of latents."""
        other = copy(self)
        other.k = k
        return other

    def level(self, beta: float) -> float:
        """Return the water level at `beta`: a latent is active if its eigenvalue is above it."""
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta {beta} must be positive and finite")
        return beta / (2 * self.a)

    def point(self, beta: float) -> tuple[float, float]:
        """Return the optimal (rate, distortion) at `beta` in nats per image, by reverse water-filling."""
        level = self.level(beta)
        leading = self.values[: self.k]
        active = leading[leading > level]
        rate = 0.5 * float((active / level).log().sum())
        error = level * len(active) + float(self.values.sum() - active.sum())
        return rate, self.a * error + self.constant

    def optimum(self, beta: float) -> LinearOptimum:
        """Return the optimum at `beta` with its parameters: w_i = sqrt(l_i - t) u_i, v_i = w_i / l_i, c_i =
        min(1, t / l_i), for eigenvalues l_i and the water level t."""
        level = self.level(beta)
        rate, distortion = self.point(beta)
        n = min(self.k, self.d)
        leading = self.values[:n]
        on = leading > level
        safe = torch.where(on, leading, torch.ones_like(leading))
        length = torch.where(on, leading - level, torch.zeros_like(leading)).sqrt()
        w = torch.zeros(self.d, self.k, dtype=torch.float64, device=leading.device)
        v, c = w.T.clone(), torch.ones(self.k, dtype=torch.float64, device=leading.device)
        w[:, :n] = self.vectors[:, :n] * length
        v[:n] = (self.vectors[:, :n] * (length / safe)).T
        c[:n] = torch.where(on, level / safe, c[:n])
        return LinearOptimum(beta, rate, distortion, distortion + beta * rate, int(on.sum()), w, v, c)

    def beta_at_rate(self, rate: float) -> float:
        """Return the beta whose optimum has this rate; inf for rate 0.

        It is unique, since the optimal rate falls strictly with beta while a latent is active.
        """
        if not math.isfinite(rate):
            raise ValueError(f"rate {rate} must be finite")
        leading = self.values[: self.k]
        logs = leading[leading > 0].log()
        if rate <= 0 or not len(logs):
            return math.inf
        # With n active latents the logarithm of the level is the mean of theirs less 2 R / n. The n that is
        # right is the last for which the n-th is still above the level.
        counts = torch.arange(1, len(logs) + 1, dtype=torch.float64, device=logs.device)
        levels = (logs.cumsum(0) - 2 * rate) / counts
        n = max(int((levels < logs).sum()), 1)
        return 2 * self.a * math.exp(float(levels[n - 1]))

    def distortion_at_rate(self, rate: float) -> float:
        """Return the smallest distortion of any linear VAE with this rate, in nats per image."""
        beta = self.beta_at_rate(rate)
        if math.isinf(beta):
            return self.a * float(self.values.sum()) + self.constant
        return self.point(beta)[1]

    def compare(self, beta: float, rate: float, distortion: float) -> dict[str, float]:
        """Compare a linear model's rate and distortion at `beta` with the optimum, as metrics.

        `oracle_rate`, `oracle_distortion` and `oracle_loss` are the optimum's. `excess_loss` is the model's
        loss minus `oracle_loss`; `rate_error` and `distortion_error` are the model's values minus the
        optimum's. `frontier_gap` is the model's distortion minus the smallest one at the model's own rate, and
        `frontier_beta` the beta at which the optimum has that rate.
        """
        best_rate, best_distortion = self.point(beta)
        best = best_distortion + beta * best_rate
        return {
            "oracle_rate": best_rate,
            "oracle_distortion": best_distortion,
            "oracle_loss": best,
            "excess_loss": distortion + beta * rate - best,
            "rate_error": rate - best_rate,
            "distortion_error": distortion - best_distortion,
            "frontier_gap": distortion - self.distortion_at_rate(rate),
            "frontier_beta": self.beta_at_rate(rate),
        }


def linear_optimum(
    covariance: Tensor, k: int, beta: float, convention: Convention = "gaussian", sigma2: float = 1.0
) -> LinearOptimum:
    """Return the optimum for one covariance [d, d], number of latents and beta; for many betas use
    `LinearOracle`."""
    return LinearOracle(covariance, k, convention, sigma2).optimum(beta)
