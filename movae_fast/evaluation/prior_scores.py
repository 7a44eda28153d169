"""Score a fitted prior on a split: bits per code, or the ELBO with the prior in place of N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from movae_fast.choices import ReconsDist
from movae_fast.evaluation.likelihood import log_likelihood
from movae_fast.models import GaussianVAE
from movae_fast.models.likelihoods import bits_per_dimension
from movae_fast.priors.codes import usage_bits
from movae_fast.priors.latents import Latents
from movae_fast.reference import gaussian_log_density


@torch.no_grad()
def code_scores(
    prior: nn.Module, fitted: Latents, scored: Latents, image_shape: tuple[int, int, int], batch_size: int = 512
) -> dict[str, float]:
    """Return bits per code and bits per value of an image, under the prior and under the codes' frequencies as
    baseline.

    The frequencies are those in `fitted`, the latents that the prior was fitted to; `scored` are evaluated. The
    bits are of the codes alone, without log p(x | codes). A prior without a likelihood has only the baseline's
    scores.
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
    """Return the ELBO in nats per image, with the model's own prior and with the fitted one, of the same draws.

    The own prior is N(0, I), or a VampPrior; the scores are named after it.

    Each is E_q[log p(x|z) + log p(z) - log q(z|x)] with one draw per posterior; `rate` is that without log
    p(x|z).
    """
    likelihood, log_prior = model.likelihood_as(dist), model.log_prior()
    own = "standard_normal" if model.pseudo_inputs is None else "vamp"
    generator = torch.Generator().manual_seed(seed)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for x, _ in batches:
        mu, logvar = (v.double() for v in model.encode(x))
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator).to(mu)
        posterior = gaussian_log_density(z, mu, logvar).sum(1)
        log_p = log_likelihood(model.decode(z.to(x)), x, likelihood)
        under = prior.log_prob(z)  # type: ignore[operator]
        parts = (log_p, posterior - log_prior(z), posterior - under.double())
        sums += torch.stack([part.sum() for part in parts]).cpu()
        count += len(x)
    log_p_mean, before, replaced = (sums / count).tolist()
    return {
        "distortion": -log_p_mean,
        f"rate_{own}": before,
        "rate": replaced,
        f"elbo_{own}": log_p_mean - before,
        "elbo": log_p_mean - replaced,
        "elbo_gain": before - replaced,
    }
