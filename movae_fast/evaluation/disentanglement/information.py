"""Compute entropies and mutual information between latents and factors, in nats.

There are two estimators with different results, so each result says which one it is from. `histogram` counts
latents in bins of equal width (Locatello et al. 2019). `sampled` uses the latents' conditional distribution
q(z|v), the mixture of the posteriors of the images with that factor value (Chen et al. 2018).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINS = 20  # equal-width bins per latent, as in the published study


class Information(NamedTuple):
    """Hold the entropies and mutual information of latents and factors, in nats, for the gap metrics."""

    mutual: np.ndarray  # [D, F] I(z_j; v_k)
    factor_entropy: np.ndarray  # [F] H(v_k)
    latent_entropy: np.ndarray  # [D] H(z_j); differential for the sampled estimator
    estimator: str


def entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of the distribution proportional to `counts` (any shape)."""
    p = np.asarray(counts, np.float64).ravel()
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(joint: np.ndarray) -> float:
    """Return the mutual information in nats between the row and the column of a table of counts or
    probabilities [A, B]."""
    p = np.asarray(joint, np.float64)
    p = p / p.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    there = p > 0
    return float((p[there] * np.log(p[there] / independent[there])).sum())


def discretise(latents: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Convert latents [N, D] to bin numbers [N, D]: each latent's range is divided into `bins` equal parts.

    A constant latent falls into one bin.
    """
    latents = np.asarray(latents, np.float64)
    low, high = latents.min(0), latents.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.clip(((latents - low) / width * bins).astype(np.int64), 0, bins - 1)


def joint_counts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the table of how often each pair of values occurs in two columns of integers [N]."""
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    width = int(b.max()) + 1
    return np.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).reshape(-1, width)


def check_codes(latents: np.ndarray, factors: np.ndarray) -> None:
    """Raise ValueError if latents [N, D] and factors [N, F] do not fit together or are not valid."""
    if latents.ndim != 2 or factors.ndim != 2 or len(latents) != len(factors) or not latents.size:
        raise ValueError(
            f"latents must be [N, D] and factors [N, F] for the same N: got {latents.shape} and {factors.shape}"
        )
    if not np.issubdtype(factors.dtype, np.integer):
        raise ValueError(f"factors must be integers: got {factors.dtype}")
    if not np.isfinite(latents).all():
        raise ValueError("latents are not finite: the model diverged, or its inputs are out of range")


def histogram_information(latents: np.ndarray, factors: np.ndarray, bins: int = BINS) -> Information:
    """Compute I(z_j; v_k) from counts, with each of the latents [N, D] in `bins` bins of equal width; factors
    [N, F] are integers."""
    check_codes(latents, factors)
    binned = discretise(latents, bins)
    mutual = [[mutual_information(joint_counts(z, v)) for v in factors.T] for z in binned.T]
    return Information(
        np.array(mutual),
        np.array([entropy(np.unique(v, return_counts=True)[1]) for v in factors.T]),
        np.array([entropy(np.unique(z, return_counts=True)[1]) for z in binned.T]),
        f"histogram, {bins} bins",
    )


@torch.no_grad()
def sampled_information(
    mu: Tensor,  # [N, D]
    logvar: Tensor,  # [N, D]
    factors: Tensor,  # [N, F] int64
    draws: int = 2000,
    seed: int = 0,
) -> Information:
    """Estimate I(z_j; v_k) of the aggregate posterior by Monte Carlo (Chen et al. 2018, appendix C), in
    float64.

    z is drawn from q(z|x) for `draws` of the N images. log q(z_j) and log q(z_j|v_k) are log means of the N
    posterior densities, over all images and over those that share the draw's factor value. No N x N x D buffer
    is made.
    """
    check_codes(mu.cpu().numpy(), factors.cpu().numpy())
    mu, logvar = mu.double(), logvar.double()
    n, d = mu.shape
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(n, generator=generator)[: min(draws, n)].to(mu.device)
    noise = torch.randn(len(rows), d, generator=generator, dtype=torch.float64).to(mu.device)
    z = mu[rows] + (0.5 * logvar[rows]).exp() * noise
    classes = [torch.unique(v, return_inverse=True)[1] for v in factors.T]
    members = [torch.nn.functional.one_hot(c).double() for c in classes]  # [N, V_k]
    entropies = torch.zeros(d, dtype=torch.float64, device=mu.device)
    conditional = torch.zeros(d, len(classes), dtype=torch.float64, device=mu.device)
    for part in torch.arange(len(rows), device=mu.device).split(max(1, 2**22 // n)):
        for j in range(d):
            offset = (z[part, j, None] - mu[None, :, j]).square() * (-logvar[None, :, j]).exp()
            density = -0.5 * (offset + logvar[None, :, j] + np.log(2 * np.pi))  # [part, N]
            top = density.amax(1, keepdim=True)
            density = (density - top).exp_()
            entropies[j] -= (density.sum(1).log() + top[:, 0] - np.log(n)).sum()
            for k, (c, member) in enumerate(zip(classes, members, strict=True)):
                own = c[rows[part]]
                same = (density @ member).gather(1, own[:, None])[:, 0]
                conditional[j, k] -= (same.log() + top[:, 0] - member.sum(0)[own].log()).sum()
    entropies, conditional = entropies / len(rows), conditional / len(rows)
    return Information(
        (entropies[:, None] - conditional).cpu().numpy(),
        np.array([entropy(np.bincount(c.cpu().numpy())) for c in classes]),
        entropies.cpu().numpy(),
        f"sampled, {len(rows)} draws",
    )
