"""Score a fitted prior on a split: what codes cost under it, and the ELBO with it in the place of N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from movae_fast.choices import ReconsDist
from movae_fast.evaluation.likelihood import log_likelihood, log_standard_normal
from movae_fast.models import GaussianVAE
from movae_fast.models.likelihoods import bits_per_dimension
from movae_fast.priors.codes import usage_bits
from movae_fast.priors.latents import Latents
from movae_fast.reference import gaussian_log_density


@torch.no_grad()
def code_scores(
    prior: nn.Module, fitted: Latents, scored: Latents, image_shape: tuple[int, int, int], batch_size: int = 512
) -> dict[str, float]:
    """Return the bits per code of a split, and per value of an image, under the prior and under the usage of
    the codes that it was fitted to.

    Bits per value are those of the codes alone: log p(x | codes) is not part of them. A prior without a
    likelihood has only the usage's.
    """
    codes, label = scored.tensor()[: scored.images], scored.label_tensor()[: scored.images]
    values, length = math.prod(image_shape), codes.shape[1]
    by_usage = usage_bits(scored.values[: scored.images], scored.grids, fitted.values)
    scores = {"bits_per_code_by_usage": by_usage}
    if not prior.exact:
        return scores
    device = next(prior.parameters()).device
    nats = 0.0
    for rows in torch.arange(len(codes)).split(batch_size):
        known = label[rows].to(device) if prior.classes else None
        nats += float(prior.nats(codes[rows].to(device), known).double().sum())  # type: ignore[operator]
    each = nats / len(codes)
    scores["bits_per_code"] = each / length / math.log(2)
    scores["bits_per_code_saved"] = 1 - scores["bits_per_code"] / scores["bits_per_code_by_usage"]
    scores["code_bits_per_dim"] = bits_per_dimension(each, values)
    return scores


@torch.no_grad()
def latent_scores(
    prior: nn.Module,
    model: GaussianVAE,
    batches: Iterable[tuple[Tensor, Tensor]],
    dist: ReconsDist,
    seed: int,
) -> dict[str, float]:
    """Return the ELBO with N(0, I) and with the prior in its place, in nats per image, of the same draws.

    Each is E_q[log p(x|z) + log p(z) - log q(z|x)] by one draw from each posterior, `rate` the part of it
    without log p(x|z).
    """
    likelihood = model.likelihood_as(dist)
    generator = torch.Generator().manual_seed(seed)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator).to(mu)
        posterior = gaussian_log_density(z, mu, logvar).sum(1)
        log_p = log_likelihood(model.decode(z.to(x)), x, likelihood)
        under = prior.log_prob(z)  # type: ignore[operator]
        parts = (log_p, posterior - log_standard_normal(z), posterior - under.double())
        sums += torch.stack([part.sum() for part in parts]).cpu()
        count += len(x)
    log_p_mean, standard, replaced = (sums / count).tolist()
    return {
        "distortion": -log_p_mean,
        "rate_standard_normal": standard,
        "rate": replaced,
        "elbo_standard_normal": log_p_mean - standard,
        "elbo": log_p_mean - replaced,
        "elbo_gain": standard - replaced,
    }
