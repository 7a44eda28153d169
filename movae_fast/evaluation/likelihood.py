"""Measure the rate, the distortion and bounds on log p(x) of a trained model.

All in nats per image, in evaluation mode. Up to a constant the reconstruction objective is -log p(x|z) of a
likelihood (`models.likelihoods`): a Gaussian of variance 1/2 for the squared error, a Laplacian of scale 1, ...
Bits per dimension are given of proper likelihoods alone: of densities of pixels they would compare nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from movae_fast.choices import ReconsDist
from movae_fast.models import GaussianVAE, Likelihood
from movae_fast.objectives import kl_of_latents
from movae_fast.reference import gaussian_log_density

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016: a unit is active if the variance of its mean over data exceeds it


def log_likelihood(
    preactivation: Tensor,  # [B, P, H, W]
    x: Tensor,  # [B, C, H, W]
    likelihood: Likelihood,
) -> Tensor:  # [B] float64
    """Return log p(x|z) in nats per image, its constants included."""
    return -summed_error(preactivation, x, likelihood) - likelihood.constant * x[0].numel()


def summed_error(
    preactivation: Tensor,  # [B, P, H, W]
    x: Tensor,  # [B, C, H, W]
    likelihood: Likelihood,
) -> Tensor:  # [B] float64
    """Return each image's reconstruction objective, summed over its values: -log p(x|z) less the constant."""
    return likelihood.errors(preactivation.double(), x.double()).flatten(1).sum(1)


def bits_per_dimension(nats: float, values: int) -> float:
    """Return nats per image as bits per value."""
    return nats / (math.log(2) * values)


@torch.no_grad()
def elbo(
    model: GaussianVAE, batches: Iterable[tuple[Tensor, Tensor]], dist: ReconsDist, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Return rate, distortion, ELBO and active units over the batches, and the rate of each latent [D].

    Of a proper likelihood also `nats` (the negative ELBO) and `bits_per_dim`, of the same draws.
    """
    likelihood = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)
    distortion, count = 0.0, 0
    rates: Tensor | None = None
    means: list[Tensor] = []
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        noise = torch.randn(mu.shape, generator=generator).to(mu)
        z = mu + torch.exp(0.5 * logvar) * noise
        distortion -= float(log_likelihood(model.decode(z.to(x)), x, likelihood).sum())
        part = kl_of_latents(mu, logvar).sum(0)
        rates = part if rates is None else rates + part
        means.append(mu)
        count += len(x)
    assert rates is not None
    rates = (rates / count).cpu()
    rate, distortion = float(rates.sum()), distortion / count
    spread = torch.cat(means).var(0, unbiased=False)
    metrics = {
        "rate": rate,
        "distortion": distortion,
        "elbo": -rate - distortion,
        "active_units": int((spread > ACTIVE_VARIANCE).sum()),
    }
    if likelihood.proper:
        nats = rate + distortion
        metrics |= {"nats": nats, "bits_per_dim": bits_per_dimension(nats, math.prod(model.image_shape))}
    return metrics, rates


@torch.no_grad()
def importance_weighted_bound(
    model: GaussianVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    draws: int,
    seed: int,
    at_once: int = 1024,
) -> float:
    """Return the mean over images of log 1/K sum_k p(x, z_k) / q(z_k|x) with K `draws` (Burda et al. 2016),
    in nats.

    At most `at_once` latents are decoded at a time. Raises ValueError for gaussian_optimal, whose variance is
    fitted to each image and each z: no likelihood that draws could be weighted by.
    """
    if dist == "gaussian_optimal":
        raise ValueError("the importance-weighted bound is of a likelihood; gaussian_optimal fits its variance")
    own = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    for images, _ in batches:
        for x in images.split(1):
            mu, logvar = (v.double() for v in model.encode(x))
            weights = []
            for at in range(0, draws, at_once):
                k = min(at_once, draws - at)
                noise = torch.randn(k, mu.shape[1], generator=generator, dtype=torch.float64).to(mu)
                z = mu + torch.exp(0.5 * logvar) * noise
                prior = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
                posterior = gaussian_log_density(z, mu.expand_as(z), logvar.expand_as(z)).sum(1)
                decoded = model.decode(z.to(x))
                likelihood = log_likelihood(decoded, x.expand(k, -1, -1, -1), own)
                weights.append(likelihood + prior - posterior)
            total += float(torch.cat(weights).logsumexp(0)) - math.log(draws)
            count += 1
    return total / count
