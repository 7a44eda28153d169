"""The entries of the loss vector: each a function of a model's output, in nats or in squared units.

`LossVector` puts a model's objectives in their documented order and weights them; every objective is multiplied
by its weight before aggregation.

A batch may hold images that count for nothing: `share` [B] says how often each image counts, 1 on average over
all processes and parts of a batch, so that their mean is the mean over what counts. None is 1 for every image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from movae_fast import ops
from movae_fast.models import VAE, GaussianOutput, ProVLAE, VQOutput
from movae_fast.models.base import output_image
from movae_fast.names import nearest
from movae_fast.reference import TCEstimator, gaussian_log_density

ReconsDist = Literal["bernoulli", "gaussian", "laplacian"]
ReconsReduction = Literal["mean", "sum", "scaled_sum"]


def reconstruction(
    preactivation: Tensor,  # [B, C, H, W] the decoder's output before its activation
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist = "gaussian",
    reduction: ReconsReduction = "mean",
    share: Tensor | None = None,  # [B]
) -> Tensor:  # []
    """Negative log-likelihood up to constants: BCE (bernoulli), squared error (gaussian), L1 (laplacian).

    "mean" is over values and batch, "sum" over an image's values with the mean over the batch, "scaled_sum"
    (gaussian only) 255 times the sum over everything. The Bernoulli term works on logits, which do not round
    past 1 as probabilities do.
    """
    error = pixel_errors(preactivation, x, activation, dist)
    if share is not None:
        error = error * share.to(error)[:, None, None, None]
    if reduction == "mean":
        return error.mean()
    if reduction == "sum":
        return error.sum() / x.shape[0]
    return 255 * error.sum()


def pixel_errors(
    preactivation: Tensor,  # [B, C, H, W]
    x: Tensor,  # [B, C, H, W]
    activation: str,
    dist: ReconsDist,
) -> Tensor:  # [B, C, H, W]
    """-log p(x|z) of every value without its constant."""
    if dist == "bernoulli":
        return F.binary_cross_entropy_with_logits(preactivation, x, reduction="none")
    image = output_image(preactivation, activation)
    return (image - x).square() if dist == "gaussian" else (image - x).abs()


def kl_standard_normal(
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    share: Tensor | None = None,  # [B]
    beta: Tensor | None = None,  # [B] or [1]
) -> Tensor:  # []
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats: summed over latents, mean over the batch.

    `beta` weights the examples.
    """
    return batch_mean(kl_of_latents(mu, logvar).sum(1), share, beta)


def kl_of_latents(
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
) -> Tensor:  # [B, D]
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each latent in nats."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def batch_mean(values: Tensor, *factors: Tensor | None) -> Tensor:
    """The mean of values [B], each times its factors ([B] or [1]; None is 1)."""
    for factor in factors:
        values = values if factor is None else values * factor.to(values)
    return values.mean()


def rung_kls(
    mu: Tensor,  # [B, L * D]
    logvar: Tensor,  # [B, L * D]
    rungs: int,
    reduction: ReconsReduction = "sum",
    share: Tensor | None = None,  # [B]
    beta: Tensor | None = None,  # [B] or [1]
) -> tuple[Tensor, ...]:  # L scalars
    """KL(N(mu, exp(logvar)) || N(0, I)) of each rung in nats: summed over its latents, mean over the batch.

    With "mean" it is averaged over the latents as well, as the reconstruction is over pixels. `beta` weights
    the examples.
    """
    pairs = zip(mu.chunk(rungs, 1), logvar.chunk(rungs, 1), strict=True)
    divisor = mu.shape[1] // rungs if reduction == "mean" else 1
    return tuple(kl_standard_normal(m, v, share, beta) / divisor for m, v in pairs)


def tc_decomposition(
    z: Tensor,  # [B, D]
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    n_data: int,
    estimator: TCEstimator = "mss",
    share: Tensor | None = None,  # [B]
    beta: Tensor | None = None,  # [B] or [1]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information, total correlation and dimension-wise KL in nats (Chen et al. 2018, eq. 2).

    Their sum is the Monte-Carlo KL, E[log q(z|x) - log p(z)], exactly and whatever the estimator. `share` is
    that of the terms' means; inside them q(z) is estimated from all B posteriors, whatever they count. `beta`
    weights the examples' total correlation.
    """
    log_q_zx = gaussian_log_density(z, mu, logvar).sum(1)
    log_p_z = gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
    log_q_z, log_prod_q_z = ops.tc_terms(z, mu, logvar, n_data, estimator)
    information = batch_mean(log_q_zx - log_q_z, share)
    correlation = batch_mean(log_q_z - log_prod_q_z, share, beta)
    return information, correlation, batch_mean(log_prod_q_z - log_p_z, share)


def mmd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    share: Tensor | None = None,  # [N], where N = M
) -> Tensor:  # []
    """Squared maximum mean discrepancy (biased V-statistic) of InfoVAE (Zhao et al. 2017).

    The kernel of the published MMD-VAE is exp(-mean_d (x_d - y_d)^2 / D) = exp(-||x - y||^2 / D^2): the width
    grows with D once by the mean and once by the division.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # The difference itself: the expanded square cancels where rows are close, on the diagonal above all.
        values = torch.exp(-(a[:, None] - b[None]).square().sum(2) / a.shape[1] ** 2)
        if share is None:
            return values.mean()
        # The statistic of what counts here, times how much that is of the whole batch.
        counts = share.to(values)
        return (values * counts[:, None] * counts).mean() / counts.mean().clamp_min(1e-9)

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


class LossVector:
    """A model's objectives as a vector of m scalars in the order of `model.objectives`.

    An objective of weight 0 stays in the logs and leaves the aggregation (`active`), so that it neither costs
    a backward pass nor takes its share of an aggregator's preference.

    Of a multi-rate model the kl (tc where there is one) is the mean over examples of beta_i times theirs.
    """

    def __init__(
        self,
        model: VAE,
        weights: Sequence[float],
        dist: ReconsDist,
        reduction: ReconsReduction,
        n_data: int,
        tc_estimator: TCEstimator = "mss",
        anneal_steps: int = 0,
        kl_factor: Callable[[int], float] | None = None,
        capacity: tuple[float, int] | None = None,
    ) -> None:
        self.names = model.objectives
        self.weights = torch.tensor(weights, dtype=torch.float32, device=model.device)
        self.active = [i for i, w in enumerate(weights) if w != 0]
        self.activation, self.dist, self.reduction = model.activation, dist, reduction
        self.n_data, self.tc_estimator = n_data, tc_estimator
        # What the dimension-wise KL's weight is multiplied by climbs from 1 / anneal_steps to 1.
        self.annealed = torch.tensor([name == "dwkl" for name in self.names], device=model.device)
        self.anneal_steps = max(anneal_steps, 1)
        self.rungs = model.num_ladders if isinstance(model, ProVLAE) else 0
        self.full = self.weights.clone()  # the weights where every rung is active
        # KLs of active latents: their weight may be annealed, and they may be asked to reach a capacity.
        self.live = torch.tensor([name.startswith("kl") for name in self.names], device=model.device)
        self.kl_factor = kl_factor
        # Capacity in nats (its greatest, and the steps to get there), as it is at the current step.
        self.capacity = capacity
        self.capacity_now = torch.zeros((), device=model.device)

    def set_active_rungs(self, active: Tensor, pre_kl: float) -> None:
        """Give the KL of each rung that is not `active` [L] the weight pre_kl; in place, on the device."""
        self.live[1:].copy_(active)
        self.weights[1:] = torch.where(self.live[1:], self.full[1:], torch.full_like(self.full[1:], pre_kl))

    def __call__(
        self, out: GaussianOutput | VQOutput, x: Tensor, share: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The m objectives of images x, each counted `share` [B] times: unweighted scalars.

        They are not stacked: a stack's backward would send zeros through every other objective's graph.
        """
        rec = reconstruction(out.preactivation, x, self.activation, self.dist, self.reduction, share)
        if isinstance(out, VQOutput):
            return rec, batch_mean(out.embedding, share), batch_mean(out.commitment, share)
        if "tc" in self.names:
            terms = tc_decomposition(out.z, out.mu, out.logvar, self.n_data, self.tc_estimator, share, out.beta)
            return rec, *terms
        if self.rungs:
            kls = rung_kls(out.mu, out.logvar, self.rungs, self.reduction, share, out.beta)
            return rec, *(self.towards_capacity(kl, i + 1, share) for i, kl in enumerate(kls))
        kl = self.towards_capacity(kl_standard_normal(out.mu, out.logvar, share, out.beta), 1, share)
        if "mmd" in self.names:
            assert out.prior is not None
            return rec, kl, mmd(out.prior, out.z, share)
        return rec, kl

    def towards_capacity(self, kl: Tensor, objective: int, share: Tensor | None = None) -> Tensor:
        """|KL - C| with the current capacity C (Burgess et al. 2018), where the objective is live."""
        if self.capacity is None:
            return kl
        part = 1 if share is None else share.mean()  # of the whole batch's mean, which has the whole capacity
        return torch.where(self.live[objective], (kl - part * self.capacity_now).abs(), kl)

    def weights_at(self, step: int) -> Tensor:  # [m]
        """The weights at 0-based `step`, annealing included; the capacity moves to that step too."""
        rate = min((step + 1) / self.anneal_steps, 1.0)
        weights = torch.where(self.annealed, self.weights * rate, self.weights)
        if self.kl_factor is not None:
            weights = torch.where(self.live, weights * self.kl_factor(step), weights)
        if self.capacity is not None:
            most, steps = self.capacity
            self.capacity_now.fill_(min(most, most * step / steps))
        return weights


def resolve_weights(
    model: type[VAE],
    image_shape: tuple[int, int, int],
    given: Sequence[float] | Mapping[str, float] | None,
    beta: float | None = None,
    defaults: Mapping[str, float] | None = None,
) -> list[float]:
    """The objectives' weights in order, from a list, from names, from `beta`, or the model's defaults.

    Raises ValueError that lists the objectives in order for a wrong number, an unknown name, or a weight that
    is negative or not finite.
    """
    defaults = defaults or model.weighted_objectives({}, image_shape)
    names, weights = list(defaults), list(defaults.values())
    order = ", ".join(names)
    if beta is not None and given is not None:
        raise ValueError(f"--beta and --loss_weights both set the weight of {model.beta_objective}; give one")
    if beta is not None:
        for i, name in enumerate(names):
            if name.partition("_")[0] == model.beta_objective:  # kl, or the kl_1, kl_2, … of a ladder
                weights[i] = beta
    if isinstance(given, Mapping):
        for name, value in given.items():
            if name not in names:
                raise ValueError(
                    f"--loss_weights.{name}: no such objective{nearest(name, names)}; in order: {order}"
                )
            weights[names.index(name)] = float(value)
    elif given is not None:
        if len(given) != len(names):
            raise ValueError(
                f"--loss_weights has {len(given)} values; the objectives are {len(names)}, in order: {order}"
            )
        weights = [float(w) for w in given]
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"--loss_weights: {name} is {weight}; a weight is finite and not negative")
    if not any(weights):
        raise ValueError(f"--loss_weights are all zero: nothing to train; in order: {order}")
    return weights
