"""Differentiate a batch's vector of losses, in one of the ways that a training step chooses from.

Each way is a function of tensors that torch.compile can take as one region. `exact_rows` computes every
objective's gradient, `of_sum` that of the weighted sum, `of_weighted` that of the sum with an aggregator's
weights. Three approximations compute the weights without the exact rows: `cheap_rows_of`, `of_cheaply_weighted`
and `of_subset_weighted`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from movae_fast.jacobian import (
    Gradients,
    all_rows,
    at_features,
    cheap_rows,
    nonzero_rows,
    shared_rows,
    weighted_row,
)
from movae_fast.models import VAE, HierarchyOutput, Noise, VQOutput
from movae_fast.models.buffers import keeping_buffers
from movae_fast.objectives import LossVector
from movae_fast.training.precision import Precision

Weigh = Callable[[Tensor], Tensor]  # rows [m, Q] that stand for the exact ones -> weights [m]


@dataclass(frozen=True)
class Network:
    """Hold the model, its losses and its parameters, as the functions here differentiate them.

    Rows are the gradients at the `shared` parameters; the `task` parameters receive the gradient of the sum.
    `cut`: whether the model's features separate the two; if not, every parameter is shared.
    """

    model: VAE
    losses: LossVector
    precision: Precision
    shared: list[nn.Parameter]
    task: list[nn.Parameter]
    cut: bool


class Batch(NamedTuple):
    """Hold the images of one step, or a part of them that is differentiated on its own."""

    images: Tensor  # [B, C, S, S]
    noise: Noise  # of B images, see `VAE.draw_noise`
    sample_weight: Tensor | None  # [B] how often each image counts

    def split(self, count: int) -> list[Batch]:
        """Return the batch in `count` parts of nearly equal size, for gradient accumulation.

        Raises ValueError if there are fewer images than parts.
        """
        ends = list(itertools.accumulate(len(part) for part in self.images.chunk(count)))
        if len(ends) < count:
            raise ValueError(f"accumulate {count}: a batch of {len(self.images)} images has fewer such parts")
        return [self.of_images(*span) for span in itertools.pairwise([0, *ends])]

    def of_images(self, start: int, stop: int) -> Batch:
        """Return the part of the batch with the images `start` to `stop` (exclusive), their noise and sample
        weights."""
        weights = None if self.sample_weight is None else self.sample_weight[start:stop]
        return Batch(self.images[start:stop], self.noise.of_images(start, stop), weights)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the batch as a flat tuple of tensors, the arguments of `of_tensors`."""
        return self.images, self.sample_weight, *self.noise

    @classmethod
    def of_tensors(cls, images: Tensor, sample_weight: Tensor | None, *noise: Tensor) -> Batch:
        """Build a batch from the tensors that `tensors` returned."""
        return cls(images, Noise(*noise), sample_weight)


class Differentiated(NamedTuple):
    """Hold the losses and gradients of one batch."""

    losses: Tensor  # [m] unweighted
    usage: Tensor  # [K] how often each code was chosen; [0] without a codebook
    rates: Tensor  # [G] mean KL of each group in nats; [0] without a hierarchy
    task: Gradients = ()
    shared: Iterable[Gradients] = ()  # the Jacobian's rows, or the sum's gradient
    nonzero: Sequence[int] = ()  # objectives with a row in `shared`; the rows of all others are zero


class Forward(NamedTuple):
    """Hold the results of a batch's forward pass that differentiation needs."""

    features: tuple[Tensor, ...]
    weighted: list[Tensor]  # the active objectives, as they are differentiated
    losses: Tensor  # [m] unweighted
    usage: Tensor  # [K] or [0]
    rates: Tensor  # [G] or [0]


def forward(network: Network, batch: Batch, scale: Tensor) -> Forward:
    """Run the model on a batch and compute its losses; the active ones are multiplied by `scale` [a], their
    weights."""
    images = batch.images  # [B, C, S, S], or tokens [B, T]
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    network.model.condition(batch.noise)
    with network.precision.autocast():
        features = network.model.encode(images)
        out = network.model.forward_features(features, batch.noise)
    losses = network.losses(out, images, batch.sample_weight)
    weighted = [losses[i] * scale[k].to(losses[i].dtype) for k, i in enumerate(network.losses.active)]
    usage = out.usage if isinstance(out, VQOutput) else images.new_zeros(0)
    rates = group_rates(out) if isinstance(out, HierarchyOutput) else images.new_zeros(0)
    return Forward(features, weighted, torch.stack(losses).detach(), usage, rates)


def group_rates(out: HierarchyOutput) -> Tensor:  # [G]
    """Return the KL of each group of a hierarchy, averaged over the batch, in nats, neither balanced nor
    weighted."""
    return torch.stack([kl.detach().sum(1).mean() for kl in out.kl])


def exact_rows(network: Network, batch: Batch, scale: Tensor) -> Differentiated:
    """Differentiate every active objective on its own: one backward pass each through the shared part."""
    features, weighted, losses, usage, rates = forward(network, batch, scale)
    if network.cut:
        at_cut = at_features(weighted, features, network.task)
        task, nonzero = at_cut.task, nonzero_rows(at_cut.features)
        rows = shared_rows(features, at_cut.features, network.shared)
    else:
        task, nonzero = [], list(range(len(weighted)))
        rows = all_rows(weighted, network.shared)
    # Without compilation a row is computed when it is needed, so only one exists outside the rows' buffer.
    kept = list(rows) if torch.compiler.is_compiling() else rows
    return Differentiated(losses, usage, rates, task, kept, nonzero)


def of_sum(network: Network, batch: Batch, scale: Tensor) -> Differentiated:
    """Differentiate the weighted sum of the losses, in one backward pass."""
    _, weighted, losses, usage, rates = forward(network, batch, scale)
    gradients = _gradient(torch.stack(weighted).sum(), [*network.shared, *network.task])
    n = len(network.shared)
    return Differentiated(losses, usage, rates, gradients[n:], [gradients[:n]])


def of_weighted(network: Network, batch: Batch, scale: Tensor, weights: Tensor) -> Differentiated:
    """Differentiate the losses' sum with an aggregator's weights [a], in one backward pass.

    If the model has features, the weights apply to the shared parameters only; task parameters receive the
    gradient of the unweighted sum.
    """
    features, weighted, losses, usage, rates = forward(network, batch, scale)
    if network.cut:
        at_cut = at_features(weighted, features, network.task)
        row = weighted_row(features, at_cut.features, weights, network.shared)
        return Differentiated(losses, usage, rates, at_cut.task, [row])
    total = torch.stack([loss * w for loss, w in zip(weighted, weights, strict=True)]).sum()
    return Differentiated(losses, usage, rates, [], [_gradient(total, network.shared)])


def cheap_rows_of(network: Network, batch: Batch, scale: Tensor, last: Sequence[Tensor]) -> Tensor:  # [a, Q]
    """Return approximate Jacobian rows [a, Q]: the gradients at the parameters `last`, or at the features if it
    is empty."""
    features, weighted, *_ = forward(network, batch, scale)
    return cheap_rows(features, at_features(weighted, features, []).features, last)


def of_cheaply_weighted(
    network: Network, batch: Batch, scale: Tensor, last: Sequence[Tensor], weigh: Weigh
) -> tuple[Differentiated, Tensor]:
    """Compute aggregation weights from the rows of `cheap_rows_of` and differentiate with them, in one forward
    pass.

    `weigh` turns the rows into weights. Returns the gradients and the weights [a].
    """
    features, weighted, losses, usage, rates = forward(network, batch, scale)
    at_cut = at_features(weighted, features, network.task)
    # Compute the weights only once: an aggregator may draw random numbers or keep state.
    weights = weigh(cheap_rows(features, at_cut.features, last))
    row = weighted_row(features, at_cut.features, weights, network.shared)
    return Differentiated(losses, usage, rates, at_cut.task, [row]), weights


def of_subset_weighted(
    network: Network, batch: Batch, scale: Tensor, count: int, weigh: Weigh
) -> tuple[Differentiated, Tensor]:
    """Compute aggregation weights from the exact rows of the first `count` images, and differentiate the whole
    batch with them.

    The losses of the whole batch are differentiated as far as the features once. The shared part is then run
    forward, and backward once per row, with the first images alone. This is not compiled, since the aggregator
    runs between two backward passes of one graph. Returns the gradients and the weights [a].
    """
    features, weighted, losses, usage, rates = forward(network, batch, scale)
    at_cut = at_features(weighted, features, network.task)
    with keeping_buffers(network.model), network.precision.autocast():
        first = batch.of_images(0, count)
        network.model.condition(first.noise)
        few = network.model.encode(first.images.contiguous(memory_format=torch.channels_last))
    upstream = [[None if g is None else g[:count] for g in row] for row in at_cut.features]
    weights = weigh(cheap_rows(few, upstream, network.shared))
    row = weighted_row(features, at_cut.features, weights, network.shared)
    return Differentiated(losses, usage, rates, at_cut.task, [row]), weights


def of_penalty(model: VAE, penalised: Any, parameters: Sequence[Tensor], weight: Tensor) -> Gradients:
    """Return the gradient at `parameters` of the model's penalty on its weights, times `weight` []."""
    return torch.autograd.grad(weight * model.penalty(penalised), parameters)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def last_parameters(model: VAE, gramian_at: str) -> list[nn.Parameter]:
    """Return the parameters that the setting `gramian_at` names as "last:K", those of the last K shared layers;
    none for "shared" and "features".

    Raises ValueError for another name, for a K that the model's shared part does not have, and for a model
    without features.
    """
    if gramian_at == "shared":
        return []
    if not model.has_features:
        raise ValueError(
            f"gramian_at {gramian_at}: {type(model).__name__} has no features, so all its parameters are "
            "shared; valid: shared"
        )
    if gramian_at == "features":
        return []
    kind, _, count = gramian_at.partition(":")
    if kind != "last" or not count.isdecimal():
        raise ValueError(f"gramian_at {gramian_at}: valid: shared, features, last:1, last:2, …")
    modules = model.shared_layers()
    if not 1 <= int(count) <= len(modules):
        raise ValueError(
            f"gramian_at {gramian_at}: the model has {len(modules)} shared layers; "
            f"give last:1 to last:{len(modules)}"
        )
    return [p for parameters in modules[-int(count) :] for p in parameters]
