"""Compute a model's loss vector from its objectives by name.

An objective is a function of an `Outcome`. `OBJECTIVES` lists all by name, and a model's `objectives` are such
names. `LossVector` computes a model's objectives in their documented order; each is multiplied by its loss
weight before aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from movae_fast.choices import ImportanceGradient, MMDKernel, ReconsDist
from movae_fast.models import VAE, GaussianOutput, HierarchyOutput, Likelihood, TextOutput, VQOutput
from movae_fast.names import nearest
from movae_fast.objectives import terms
from movae_fast.objectives.discriminators import LatentDiscriminator, PatchDiscriminator
from movae_fast.objectives.terms import Importance, LogDensities, ReconsReduction
from movae_fast.reference import TCEstimator
from movae_fast.schedules import LossSchedule

MOST_RUNGS = 64  # of a ladder; rows of KLs of a hierarchy


def identity(values: Tensor) -> Tensor:
    """Return the values."""
    return values


@dataclass(frozen=True)
class Balance:
    """Balancing of a hierarchy's KLs (see `terms.balance_factors`)."""

    alpha: Tensor  # [G]
    on: Tensor  # [] bool, at the step of `set_step`
    mean_over_ranks: Callable[[Tensor], Tensor]  # of [G]; the identity where each process balances by its own


@dataclass(frozen=True)
class TermSettings:
    """Hold the settings of the objectives' terms, which are the same for every batch."""

    likelihood: Likelihood
    reduction: ReconsReduction
    n_data: int  # images of the training set
    tc_estimator: TCEstimator
    rungs: int  # of a ladder; 0 without one
    kl_spans: tuple[tuple[int, int], ...] = ()  # of a hierarchy: the first group and the end of each KL
    balance: Balance | None = None
    gather: Callable[[Tensor], Tensor] = identity  # rows of this process to those of all
    mmd_kernel: MMDKernel = "gaussian"
    importance_gradient: ImportanceGradient = "iwae"
    dip_variances: bool = False  # whether the covariance has the posteriors' variances, of DIP-VAE-II
    discriminator: LatentDiscriminator | None = None  # of FactorVAE
    patches: PatchDiscriminator | None = None  # of the hinge GAN
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None  # distances [B] of images in the data's range


class Outcome:
    """Hold a batch after its forward pass, from which the objectives are computed.

    A quantity that several objectives need is computed once, when it is first asked for.
    """

    def __init__(
        self,
        out: Any,  # a GaussianOutput, a HierarchyOutput, a VQOutput or a TextOutput
        images: Tensor,  # [B, C, S, S]
        sample_weight: Tensor | None,  # [B] how often each image counts
        settings: TermSettings,
    ) -> None:
        self.out, self.images, self.sample_weight, self.settings = out, images, sample_weight, settings
        # Not functools.cached_property: its lock, up to Python 3.11, is nothing that torch.compile can trace.
        self._densities: LogDensities | None = None
        self._rungs: list[tuple[Tensor, Tensor]] | None = None
        self._groups: list[Tensor] | None = None
        self._importance: Importance | None = None
        self._dip: tuple[Tensor, Tensor] | None = None
        self._edges: Tensor | None = None

    def densities(self) -> LogDensities:
        """Return the log densities of the batch's latents."""
        if self._densities is None:
            out, s = self.out, self.settings
            self._densities = terms.log_densities(out.z, out.mu, out.logvar, s.n_data, s.tc_estimator)
        return self._densities

    def rungs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the posterior (mu, logvar) [B, D] of each rung of a ladder."""
        if self._rungs is None:
            mu, logvar = (values.chunk(self.settings.rungs, 1) for values in (self.out.mu, self.out.logvar))
            self._rungs = list(zip(mu, logvar, strict=True))
        return self._rungs

    def groups(self) -> list[Tensor]:
        """Return the KL [B] of each group of a hierarchy in nats; in training multiplied by the balancing
        factors, if any."""
        if self._groups is None:
            rates = [kl.sum(1) for kl in self.out.kl]
            balance = self.settings.balance
            if balance is not None and self.out.training:
                means = [terms.batch_mean(kl.detach(), self.sample_weight) for kl in rates]
                sizes = balance.mean_over_ranks(torch.stack(means))
                factors = torch.where(balance.on, terms.balance_factors(sizes, balance.alpha), 1.0)
                rates = [kl * factors[i].to(kl) for i, kl in enumerate(rates)]
            self._groups = rates
        return self._groups

    def importance(self) -> Importance | None:
        """Return the parts of the importance-weighted bound where there are several draws."""
        out = self.out
        if self._importance is None and isinstance(out, GaussianOutput) and len(out.z) != len(out.mu):
            draws = len(out.z) // len(out.mu)
            errors = self.settings.likelihood.errors(out.preactivation, self.images.repeat_interleave(draws, 0))
            twice = self.settings.importance_gradient == "dreg"
            # Of the posterior's density z alone is differentiated (Tucker et al. 2019, eq. 8).
            mu, logvar = (v.detach() if twice else v for v in (out.mu, out.logvar))
            z = out.z.unflatten(0, (-1, draws))
            parts = terms.importance(errors.flatten(1).sum(1).view(-1, draws), z, mu, logvar)
            if twice and out.z.requires_grad:
                factor = parts.weights.reshape(-1, 1)
                out.z.register_hook(lambda gradient: gradient * factor)
            self._importance = parts
        return self._importance

    def dip_penalties(self) -> tuple[Tensor, Tensor]:
        """Return DIP-VAE's off-diagonal and diagonal penalty over the images of all processes."""
        if self._dip is None:
            s = self.settings
            weight = None if self.sample_weight is None else s.gather(self.sample_weight)
            logvar = s.gather(self.out.logvar) if s.dip_variances else None
            off, diagonal = terms.dip_penalties(s.gather(self.out.mu), logvar, weight)
            self._dip = terms.of_whole_batch(off, weight), terms.of_whole_batch(diagonal, weight)
        return self._dip

    def edges(self) -> Tensor:
        """Return the strength of the images' edges [B, C, S, S]."""
        if self._edges is None:
            self._edges = terms.edge_strength(self.images)
        return self._edges

    def kl_of_groups(self, row: int) -> Tensor:
        """Return the mean over images of KL objective number `row` of a hierarchy, the sum of its groups' KLs,
        in nats."""
        first, stop = self.settings.kl_spans[row]
        groups = self.groups()[first:stop]
        return terms.batch_mean(sum(groups[1:], groups[0]), self.sample_weight, self.out.beta)


Objective = Callable[[Outcome], Tensor]  # -> a scalar, unweighted


def _reconstruction(b: Outcome) -> Tensor:
    s = b.settings
    if isinstance(b.out, TextOutput):
        return terms.text_reconstruction(b.out.hidden, b.out.projection, b.out.target, b.sample_weight)
    if (parts := b.importance()) is not None:
        return terms.batch_mean((parts.weights * parts.error).sum(1), b.sample_weight)
    return terms.reconstruction(b.out.preactivation, b.images, s.likelihood, s.reduction, b.sample_weight)


def _kl(b: Outcome) -> Tensor:
    if b.settings.kl_spans:
        return b.kl_of_groups(0)
    if (parts := b.importance()) is not None:
        return terms.batch_mean((parts.weights * parts.log_ratio).sum(1), b.sample_weight)
    if isinstance(b.out, GaussianOutput) and b.out.components is not None:
        rates = terms.rate(b.out)
        assert rates is not None
        return terms.batch_mean(rates, b.sample_weight)
    free = b.out.free_bits if isinstance(b.out, TextOutput) else 0.0
    return terms.kl_standard_normal(b.out.mu, b.out.logvar, b.sample_weight, b.out.beta, free)


def _rung_kl(b: Outcome, rung: int) -> Tensor:
    if b.settings.kl_spans:
        return b.kl_of_groups(rung)
    return terms.rung_kl(*b.rungs()[rung], b.settings.reduction, b.sample_weight, b.out.beta)


def _mi(b: Outcome) -> Tensor:
    return terms.mutual_information(b.densities(), b.sample_weight)


def _tc(b: Outcome) -> Tensor:
    return terms.total_correlation(b.densities(), b.sample_weight, b.out.beta)


def _dwkl(b: Outcome) -> Tensor:
    return terms.dimension_wise_kl(b.densities(), b.sample_weight)


def _mmd(b: Outcome) -> Tensor:
    gather = b.settings.gather
    weight = None if b.sample_weight is None else gather(b.sample_weight)
    prior, z = gather(b.out.prior), gather(b.out.z)
    if b.settings.mmd_kernel == "imq":
        return terms.of_whole_batch(terms.mmd_imq(z, prior, weight), weight)
    return terms.mmd(prior, z, weight)


def _off_diagonal(b: Outcome) -> Tensor:
    return b.dip_penalties()[0]


def _diagonal(b: Outcome) -> Tensor:
    return b.dip_penalties()[1]


def _adversarial_tc(b: Outcome) -> Tensor:
    if b.settings.discriminator is None:  # of a trained model, whose discriminator only training needs
        return b.out.z.new_full((), torch.nan)
    with torch.autocast(b.out.z.device.type, enabled=False):
        return terms.density_ratio_tc(b.settings.discriminator(b.out.z.float()), b.sample_weight)


def _adversarial(b: Outcome) -> Tensor:
    s = b.settings
    if s.patches is None:  # as above
        return b.images.new_full((), torch.nan)
    image = s.likelihood.mean(b.out.preactivation)
    with torch.autocast(image.device.type, enabled=False):
        logits = s.patches(image.float(), b.images.float(), b.sample_weight)
    return -terms.batch_mean(logits, b.sample_weight)


def _lpips(b: Outcome) -> Tensor:
    s = b.settings
    assert s.perceptual is not None
    return terms.batch_mean(s.perceptual(s.likelihood.mean(b.out.preactivation), b.images), b.sample_weight)


def _l1(b: Outcome) -> Tensor:
    s = b.settings
    return terms.absolute_error(s.likelihood.mean(b.out.preactivation), b.images, s.reduction, b.sample_weight)


def _edge_weighted(b: Outcome) -> Tensor:
    s = b.settings
    image = s.likelihood.mean(b.out.preactivation)
    return terms.edge_weighted_error(image, b.images, b.edges(), s.reduction, b.sample_weight)


def _edge_matching(b: Outcome) -> Tensor:
    s = b.settings
    edges = terms.edge_strength(s.likelihood.mean(b.out.preactivation))
    return terms.edge_matching(edges, b.edges(), s.reduction, b.sample_weight)


def _recursive_kl(b: Outcome) -> Tensor:
    mu, logvar = b.out.again
    return terms.kl_standard_normal(mu, logvar, b.sample_weight)


def _cycle(b: Outcome) -> Tensor:
    return terms.cycle_distance(b.out.prior, b.out.returned, b.sample_weight)


def _embedding(b: Outcome) -> Tensor:
    return terms.batch_mean(b.out.embedding, b.sample_weight)


def _commitment(b: Outcome) -> Tensor:
    return terms.batch_mean(b.out.commitment, b.sample_weight)


def _entropy(b: Outcome) -> Tensor:
    return terms.of_whole_batch(b.out.entropy, b.sample_weight)


OBJECTIVES: dict[str, Objective] = {
    "reconstruction": _reconstruction,
    "kl": _kl,
    **{f"kl_{i + 1}": partial(_rung_kl, rung=i) for i in range(MOST_RUNGS)},  # of a ladder or hierarchy
    "mi": _mi,
    "tc": _tc,
    "dwkl": _dwkl,
    "mmd": _mmd,
    "embedding": _embedding,
    "commitment": _commitment,
    "entropy": _entropy,
    "off_diagonal": _off_diagonal,
    "diagonal": _diagonal,
    "adversarial_tc": _adversarial_tc,
    "l1": _l1,
    "lpips": _lpips,
    "adversarial": _adversarial,
    "edge_weighted": _edge_weighted,
    "edge_matching": _edge_matching,
    "recursive_kl": _recursive_kl,
    "cycle": _cycle,
}


class LossVector:
    """Compute a model's objectives as a vector of m scalars, in the order of `model.objectives`.

    An objective of weight 0 is computed for the logs but is not aggregated (it is not in `active`), so that it
    neither costs a backward pass nor counts in an aggregator's preference. In a multi-rate model, the kl (tc if
    there is one) is the mean over examples of each one's value times its beta.

    The base weights change only with a ladder's stages (`set_active_rungs`). Everything else about a step's
    weights follows from the step's number and the `schedule`.

    dist: the name of the likelihood; the model's own, or one with the same output channels. mean_over_ranks:
    averages a tensor over the processes, for balancing a hierarchy's KLs; the default does not.

    Raises ValueError for a model with an objective that is not in `OBJECTIVES`.
    """

    def __init__(
        self,
        model: VAE,
        weights: Sequence[float],
        dist: ReconsDist,
        reduction: ReconsReduction,
        n_data: int,
        tc_estimator: TCEstimator = "mss",
        schedule: LossSchedule | None = None,
        mean_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
        **settings: Any,
    ) -> None:
        self.names = model.objectives
        for name in self.names:
            if name not in OBJECTIVES:
                raise ValueError(
                    f"{type(model).__name__}.objectives: OBJECTIVES has no {name}{nearest(name, OBJECTIVES)}"
                )
        self.terms = [OBJECTIVES[name] for name in self.names]
        rungs = sum(name.startswith("kl_") for name in self.names)
        self.schedule = schedule or LossSchedule()
        balance = None
        if self.schedule.balanced is not None:
            alpha = torch.tensor(model.balance(), device=model.device)
            on = torch.zeros((), dtype=torch.bool, device=model.device)
            balance = Balance(alpha, on, mean_over_ranks)
        self.settings = TermSettings(
            model.likelihood_as(dist),
            reduction,
            n_data,
            tc_estimator,
            rungs,
            model.kl_spans,
            balance,
            **settings,
        )
        self.weights = torch.tensor(weights, dtype=torch.float32, device=model.device)  # at this stage
        self.full = self.weights.clone()  # where every rung is active
        self.active = [i for i, w in enumerate(weights) if w != 0]
        # Of the objectives whose weight has a schedule of its own: where it is in the vector, and its factor.
        factors = self.schedule.factors()
        self.scheduled = [
            (torch.tensor([n == name for n in self.names], device=model.device), factors[name])
            for name in self.names
            if name in factors
        ]
        # The KLs of latents in use: their weight may be annealed, and they may be pulled to the capacity.
        self.is_kl = [name.startswith("kl") for name in self.names]
        self.live = torch.tensor(self.is_kl, device=model.device)
        # Both at the step of `set_step`.
        self.capacity = torch.zeros((), device=model.device)  # nats
        self.penalty_weight = torch.zeros((), device=model.device)

    def set_active_rungs(self, active: Tensor, pre_kl: float) -> None:
        """Set the weight of the KL of each rung that is not active to `pre_kl`, in place; `active` [L] is 1 for
        active rungs."""
        self.live[1:].copy_(active)
        self.weights[1:] = torch.where(self.live[1:], self.full[1:], torch.full_like(self.full[1:], pre_kl))

    def set_step(self, step: int) -> None:
        """Set capacity, balancing and the penalty's weight to their values at the 0-based `step`, in place."""
        schedule = self.schedule
        if schedule.capacity is not None:
            self.capacity.fill_(schedule.capacity(step))
        if schedule.penalty is not None:
            self.penalty_weight.fill_(schedule.penalty(step))
        if schedule.balanced is not None and self.settings.balance is not None:
            self.settings.balance.on.fill_(schedule.balanced(step))

    def weights_at(self, step: int) -> Tensor:  # [m]
        """Return the loss weights [m] at the 0-based `step`, including annealing."""
        weights = self.weights.clone()
        for place, factor in self.scheduled:
            weights = torch.where(place, weights * factor(step), weights)
        if self.schedule.kl_factor is not None:
            weights = torch.where(self.live, weights * self.schedule.kl_factor(step), weights)
        return weights

    def __call__(
        self,
        out: GaussianOutput | HierarchyOutput | VQOutput | TextOutput,
        images: Tensor,  # [B, C, S, S]
        sample_weight: Tensor | None = None,  # [B]
    ) -> tuple[Tensor, ...]:  # m scalars
        """Return the m unweighted objectives of a batch, in which each image counts `sample_weight` times.

        With a capacity, each KL is replaced by its distance from the capacity. The objectives are not stacked,
        since the backward pass of a stack would send zeros through the graphs of all other objectives.
        """
        batch = Outcome(out, images, sample_weight, self.settings)
        values = [term(batch) for term in self.terms]
        if self.schedule.capacity is not None:
            for i, is_kl in enumerate(self.is_kl):
                if is_kl:
                    distance = terms.distance_to_capacity(values[i], self.capacity, sample_weight)
                    values[i] = torch.where(self.live[i], distance, values[i])
        return tuple(values)
