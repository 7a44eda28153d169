"""One training step's gradient: the vector of losses becomes `.grad` on every parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.aggregation.registry import aggregate
from movae_fast.models import VAE
from movae_fast.objectives import LossVector
from movae_fast.training.jacobian import all_rows, cosines_with_update, set_gradients, shared_rows


class StepRecord(NamedTuple):
    """What a step leaves for the log, on the device: [m] each over all objectives, NaN where not computed."""

    losses: Tensor  # unweighted
    weights: Tensor  # the aggregator's
    cosines: Tensor  # of the aggregated update with each objective's gradient
    norms: Tensor  # of each objective's gradient


class GradientStep:
    """Forward, rows, Gramian, aggregation: everything of a step but the optimizer.

    `aggregator` None is the ordinary backward of the weighted sum; then the rows are computed on steps that
    `diagnose` only, for the log, and do not touch the update. `jacobian` "shared" aggregates the gradients of
    the part before the features (what MO-VAE does), "all" those of every parameter.
    """

    def __init__(self, model: VAE, losses: LossVector, aggregator: nn.Module | None, jacobian: str) -> None:
        self.model, self.losses, self.aggregator = model, losses, aggregator
        self.own = [p for params in model.own_parameters().values() for p in params]
        self.shared = model.shared_parameters()
        if jacobian == "all":
            self.shared, self.own = [*self.shared, *self.own], []
        self.features_cut = jacobian == "shared"
        size = sum(p.numel() for p in self.shared)
        self.active = torch.tensor(losses.active, device=model.device)
        self.rows = self.shared[0].new_zeros(len(losses.active), size)

    def __call__(self, x: Tensor, step: int, diagnose: bool = False) -> tuple[StepRecord, Any]:
        """Set every parameter's gradient for the batch x [B, C, S, S]; the record, and the model's output."""
        features = self.model.encode(x)
        out = self.model.forward_features(features)
        losses = self.losses(out, x)
        weights = self.losses.weights_at(step)
        weighted = [losses[i] * weights[i] for i in self.losses.active]
        record = (
            self.sum(weighted, features, diagnose)
            if self.aggregator is None
            else self.aggregated(weighted, features)
        )
        return StepRecord(torch.stack(losses).detach(), *(self.scatter(v) for v in record)), out

    def aggregated(self, weighted: list[Tensor], features: tuple[Tensor, ...]) -> list[Tensor | None]:
        self.jacobian(weighted, features)
        gramian = ops.gramian(self.rows)
        update, weights = aggregate(self.aggregator, self.rows, gramian)
        set_gradients(self.shared, update)
        return [weights, *cosines_with_update(gramian, weights, self.rows, update)]

    def sum(self, weighted: list[Tensor], features: tuple[Tensor, ...], diagnose: bool) -> list[Tensor | None]:
        record: list[Tensor | None] = [None, None, None]
        if diagnose:
            self.jacobian(weighted, features, retain_graph=True)
            ones = torch.ones(len(weighted), device=self.rows.device)
            record = [ones, *cosines_with_update(ops.gramian(self.rows), ones, self.rows, None)]
        for p in (*self.shared, *self.own):
            p.grad = None
        torch.stack(weighted).sum().backward()
        return record

    def jacobian(
        self, weighted: list[Tensor], features: tuple[Tensor, ...], retain_graph: bool = False
    ) -> None:
        if self.features_cut:
            shared_rows(weighted, features, self.shared, self.own, self.rows, retain_graph)
        else:
            all_rows(weighted, self.shared, self.rows, retain_graph)

    def scatter(self, values: Tensor | None) -> Tensor:
        """Values of the active objectives [a] at their places among all m; NaN elsewhere."""
        full = torch.full((len(self.losses.names),), torch.nan, device=self.rows.device)
        if values is not None:
            full.index_copy_(0, self.active, values.detach().to(full))
        return full
