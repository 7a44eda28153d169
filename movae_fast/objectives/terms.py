"""Compute the terms of the loss vector, each a pure function of tensors, in nats or in squared units.

`sample_weight` [B] says how often each image of the batch counts; images with weight 0 do not count. The
weights are 1 on average over all processes and parts of a batch, so that a plain mean over images is the mean
over what counts. None is 1 for every image. `beta` weights the images of a multi-rate model.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from movae_fast import ops
from movae_fast.choices import ReconsReduction
from movae_fast.models import GaussianOutput, HierarchyOutput, Likelihood, VQOutput
from movae_fast.models.vamp import mixture_log_density
from movae_fast.reference import TCEstimator, gaussian_log_density


def reconstruction(
    preactivation: Tensor,  # [B, P, H, W] the decoder's output
    x: Tensor,  # [B, C, H, W]
    likelihood: Likelihood,
    reduction: ReconsReduction = "mean",
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return -log p(x|z) without its constant: BCE (bernoulli), squared error (gaussian), L1 (laplacian), ...

    reduction: "mean" averages over values and batch; "sum" sums over an image's values and averages over the
        batch; "scaled_sum" (gaussian only) is 255 times the sum over everything.

    The Bernoulli term is computed from logits, which do not saturate as probabilities do.
    """
    error = likelihood.errors(preactivation, x)
    if sample_weight is not None:
        error = error * sample_weight.to(error).view(-1, *(1,) * (error.dim() - 1))
    if reduction == "mean":
        return error.mean() if error.numel() == x.numel() else error.sum() / x.numel()
    if reduction == "sum":
        return error.sum() / x.shape[0]
    return 255 * error.sum()


def absolute_error(
    image: Tensor,  # [B, C, H, W] the reconstruction's mean
    x: Tensor,  # [B, C, H, W]
    reduction: ReconsReduction = "mean",
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return the L1 distance of images, over values as `reconstruction` is."""
    error = batch_mean((image - x).abs().flatten(1).sum(1), sample_weight)
    return error / x[0].numel() if reduction == "mean" else error


def edge_strength(images: Tensor) -> Tensor:  # [B, C, H, W] -> the same
    """Return the length of each channel's gradient by Sobel's filters, sqrt(g_x^2 + g_y^2 + 1e-8).

    Outside an image its outermost values go on, so that its frame is not an edge.
    """
    x = torch.cat([images[..., :1], images, images[..., -1:]], -1)
    x = torch.cat([x[..., :1, :], x, x[..., -1:, :]], -2)
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    g_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    g_y = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return (g_x.square() + g_y.square() + 1e-8).sqrt()


def edge_weighted_error(
    image: Tensor,  # [B, C, H, W] the reconstruction's mean
    x: Tensor,  # [B, C, H, W]
    strength: Tensor,  # [B, C, H, W] `edge_strength` of x
    reduction: ReconsReduction = "mean",
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return the squared error of images, each place weighted by its strongest channel's edge over the image's
    strongest edge (MO-VAE's gg_vae); over values as `reconstruction` is.

    The weights are in (0, 1] and of each image alone: MO-VAE divides by the strongest edge of the batch.
    """
    weight = strength.amax(1, keepdim=True)
    weight = weight / weight.amax((2, 3), keepdim=True)
    error = batch_mean((weight * (image - x).square()).flatten(1).sum(1), sample_weight)
    return error / x[0].numel() if reduction == "mean" else error


def edge_matching(
    edges: Tensor,  # [B, C, H, W] `edge_strength` of the reconstruction's mean
    target: Tensor,  # [B, C, H, W] that of the image
    reduction: ReconsReduction = "mean",
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return the smooth L1 distance (with its bend at 1) of two images' edges, over values as `reconstruction`
    is (MO-VAE's gg_vae)."""
    distance = torch.nn.functional.smooth_l1_loss(edges, target, reduction="none")
    error = batch_mean(distance.flatten(1).sum(1), sample_weight)
    return error / target[0].numel() if reduction == "mean" else error


def cycle_distance(
    drawn: Tensor,  # [B, D] from the prior
    returned: Tensor,  # [B, D] the posterior means of the images decoded from them
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return the squared distance of latents from what their images are encoded to, summed over latents and
    averaged over the batch (MO-VAE's cycle_vae)."""
    return batch_mean((drawn - returned).square().sum(1), sample_weight)


def text_reconstruction(
    hidden: Tensor,  # [B, T, H]
    projection: Tensor,  # [V, H]
    target: Tensor,  # [B, T] int64, 0 is padding
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return -log p(x|z) in nats per sentence: summed over a sentence's tokens, averaged over the batch."""
    total, _ = ops.linear_cross_entropy(hidden, projection, target, sample_weight)
    return total / len(target)


def kl_standard_normal(
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    sample_weight: Tensor | None = None,  # [B]
    beta: Tensor | None = None,  # [B] or [1]
    free_bits: float = 0.0,
) -> Tensor:  # []
    """Return KL(N(mu, exp(logvar)) || N(0, I)) in nats, summed over latents and averaged over the batch.

    A latent's KL below `free_bits` nats counts as `free_bits`, without gradient (Kingma et al. 2016).
    """
    kl = kl_of_latents(mu, logvar)
    return batch_mean((kl.clamp_min(free_bits) if free_bits else kl).sum(1), sample_weight, beta)


def kl_of_latents(
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
) -> Tensor:  # [B, D]
    """Return KL(N(mu, exp(logvar)) || N(0, 1)) of each latent in nats."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def rate(out: GaussianOutput | HierarchyOutput | VQOutput) -> Tensor | None:  # [B]
    """Return each image's KL from posterior to prior in nats [B]; None for a codebook, which has no prior.

    To a VampPrior it is the estimate of one draw.
    """
    if isinstance(out, HierarchyOutput):
        return torch.cat(list(out.kl), 1).sum(1)
    if isinstance(out, GaussianOutput) and out.components is not None:
        return rate_of_draws(out.z, out.mu, out.logvar, partial(mixture_log_density, components=out.components))
    return kl_of_latents(out.mu, out.logvar).sum(1) if isinstance(out, GaussianOutput) else None


def rate_of_draws(
    z: Tensor,  # [B, D] a draw from each posterior
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    log_prior: Callable[[Tensor], Tensor],  # from latents [B, D] to nats [B]
) -> Tensor:  # [B]
    """Return log q(z|x) - log p(z) in nats, whose mean over draws is the KL from a posterior to the prior."""
    return gaussian_log_density(z, mu, logvar).sum(1) - log_prior(z)


def batch_mean(values: Tensor, *factors: Tensor | None) -> Tensor:
    """Return the mean over the batch of values [B], multiplied by factors such as sample weights ([B] or [1];
    None is 1)."""
    for factor in factors:
        values = values if factor is None else values * factor.to(values)
    return values.mean()


def of_whole_batch(statistic: Tensor, sample_weight: Tensor | None) -> Tensor:  # []
    """Return a statistic of a batch or of a part of it, scaled by the part's mean sample weight.

    Sums over the parts and processes then are the mean over the whole batch, as with `batch_mean`.
    """
    return statistic if sample_weight is None else statistic * sample_weight.to(statistic).mean()


def rung_kl(
    mu: Tensor,  # [B, D] of one rung
    logvar: Tensor,  # [B, D]
    reduction: ReconsReduction = "sum",
    sample_weight: Tensor | None = None,  # [B]
    beta: Tensor | None = None,  # [B] or [1]
) -> Tensor:  # []
    """Return KL(N(mu, exp(logvar)) || N(0, I)) of a ladder's rung in nats, as `kl_standard_normal`.

    With the reduction "mean" it is averaged over the latents as well, as the reconstruction is over pixels.
    """
    divisor = mu.shape[1] if reduction == "mean" else 1
    return kl_standard_normal(mu, logvar, sample_weight, beta) / divisor


def distance_to_capacity(
    kl: Tensor,  # []
    capacity: Tensor,  # []
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return |KL - C| in nats, the distance of a KL from its capacity (Burgess et al. 2018)."""
    # Of a part of the batch the mean is a part of the whole batch's, which has the whole capacity.
    counted = 1 if sample_weight is None else sample_weight.mean()
    return (kl - counted * capacity).abs()


def balance_factors(
    means: Tensor,  # [G] mean KL of each group over the batch, in nats
    alpha: Tensor,  # [G]
) -> Tensor:  # [G]
    """Return the factors [G] that balance the KLs of a hierarchy's groups (Vahdat & Kautz 2020).

    They are proportional to (KL + 0.01) / alpha and 1 on average: a group with a smaller KL gets a smaller
    factor, so that no group collapses early in training.
    """
    factors = (means.abs() + 0.01) / alpha.to(means)
    return factors / factors.mean()


class LogDensities(NamedTuple):
    """Hold log densities [B] of each image's latents, whose differences are the terms of the decomposed KL."""

    q_given_x: Tensor  # log q(z|x)
    prior: Tensor  # log p(z)
    q: Tensor  # log q(z), estimated from the batch
    q_product: Tensor  # log of the product of q(z_j) over the latents, estimated from the batch


def log_densities(
    z: Tensor,  # [B, D]
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    n_data: int,
    estimator: TCEstimator = "mss",
) -> LogDensities:
    """Return the log densities of latents z drawn from N(mu, exp(logvar)), for a training set of `n_data`
    images.

    q(z) is estimated from all B posteriors, whatever the images' sample weights.
    """
    q_given_x = gaussian_log_density(z, mu, logvar).sum(1)
    prior = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    return LogDensities(q_given_x, prior, *ops.tc_terms(z, mu, logvar, n_data, estimator))


# Chen et al. 2018, eq. 2. The sum of the three is the Monte-Carlo KL, E[log q(z|x) - log p(z)], exactly and
# whatever the estimator.


def mutual_information(d: LogDensities, sample_weight: Tensor | None = None) -> Tensor:
    """Return the mutual information between images and latents in nats, averaged over the batch."""
    return batch_mean(d.q_given_x - d.q, sample_weight)


def total_correlation(
    d: LogDensities, sample_weight: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """Return the total correlation of the latents in nats, averaged over the batch."""
    return batch_mean(d.q - d.q_product, sample_weight, beta)


def dimension_wise_kl(d: LogDensities, sample_weight: Tensor | None = None) -> Tensor:
    """Return the sum over latents of KL(q(z_j) || p(z_j)) in nats, averaged over the batch."""
    return batch_mean(d.q_product - d.prior, sample_weight)


def dip_penalties(
    mu: Tensor,  # [B, D]
    logvar: Tensor | None,  # [B, D] of DIP-VAE-II; None of DIP-VAE-I
    sample_weight: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # [], []
    """Return sum_{i != j} C_ij^2 and sum_i (C_ii - 1)^2 of a covariance C of the latents (Kumar et al. 2018).

    C is the covariance of the means over the batch (I), to which the mean posterior variances are added (II).
    It divides by B, as disentanglement_lib does.
    """
    counts = torch.ones_like(mu[:, 0]) if sample_weight is None else sample_weight.to(mu)
    counts = counts / counts.sum().clamp_min(1e-9)
    centred = mu - counts @ mu
    covariance = centred.T @ (centred * counts[:, None])
    if logvar is not None:
        covariance = covariance + torch.diag(counts @ logvar.exp())
    diagonal = covariance.diagonal()
    return (covariance - torch.diag(diagonal)).square().sum(), (diagonal - 1).square().sum()


class Importance(NamedTuple):
    """Hold the parts of an importance-weighted bound, per image and draw [B, K]."""

    error: Tensor  # -log p(x|z)
    log_ratio: Tensor  # log q(z|x) - log p(z)
    weights: Tensor  # normalised over the draws, without a gradient


def importance(
    error: Tensor,  # [B, K] -log p(x|z_k) in nats
    z: Tensor,  # [B, K, D]
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
) -> Importance:
    """Return the parts of the importance-weighted bound log 1/K sum_k p(x, z_k) / q(z_k|x) (Burda et al. 2016).

    The gradients of the mean of (weights * error).sum(1) and of (weights * log_ratio).sum(1) add up to that of
    the negative bound.
    """
    posterior = gaussian_log_density(z, mu[:, None], logvar[:, None]).sum(2)
    prior = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(2)
    weights = (-error - posterior + prior).detach().softmax(1)
    return Importance(error, posterior - prior, weights)


IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def mmd_imq(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N, D] from the prior
    sample_weight: Tensor | None = None,  # [N] of x
) -> Tensor:  # []
    """Return the squared maximum mean discrepancy by inverse multiquadric kernels (Tolstikhin et al. 2018).

    The kernel is the sum over scales s of C / (C + ||x - y||^2) with C = 2 D s. It is the unbiased statistic,
    which may be negative. Its tails are heavy: a latent far from all draws of the prior still has a gradient.
    """
    n, width = x.shape
    counts = x.new_ones(n) if sample_weight is None else sample_weight.to(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, None] - b[None]).square().sum(2)
        return torch.stack([2 * width * s / (2 * width * s + distance) for s in IMQ_SCALES]).sum(0)

    apart = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    pairs = counts[:, None] * counts * apart
    of_x = (kernel(x, x) * pairs).sum() / pairs.sum().clamp_min(1e-9)
    of_y = (kernel(y, y) * apart).sum() / apart.sum().clamp_min(1e-9)
    between = (kernel(x, y) * counts[:, None]).sum() / (counts.sum() * n).clamp_min(1e-9)
    return of_x + of_y - 2 * between


def density_ratio_tc(
    joint: Tensor,  # [B, 2] a discriminator's outputs for z
    sample_weight: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Return the estimate of the total correlation by a discriminator of q(z) and the product of its marginals:
    the mean of its logit of the joint less that of the product (Kim & Mnih 2018, eq. 3)."""
    return batch_mean(joint[:, 0] - joint[:, 1], sample_weight)


def mmd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    sample_weight: Tensor | None = None,  # [N], where N = M
) -> Tensor:  # []
    """Return the squared maximum mean discrepancy between x and y (biased V-statistic), as in InfoVAE (Zhao et
    al. 2017).

    The kernel of the published MMD-VAE is exp(-mean_d (x_d - y_d)^2 / D) = exp(-||x - y||^2 / D^2), so its
    width grows with D twice: by the mean and by the division.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # The difference itself: the expanded square cancels where rows are close, on the diagonal above all.
        values = torch.exp(-(a[:, None] - b[None]).square().sum(2) / a.shape[1] ** 2)
        if sample_weight is None:
            return values.mean()
        # The statistic of what counts here, times how much that is of the whole batch.
        counts = sample_weight.to(values)
        return (values * counts[:, None] * counts).mean() / counts.mean().clamp_min(1e-9)

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
