"""The Jacobian's rows: a backward through each objective's own part, then one of the shared part a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def shared_rows(
    losses: Sequence[Tensor],  # m scalars
    features: Sequence[Tensor],
    shared: Sequence[nn.Parameter],
    own: Sequence[nn.Parameter],
    rows: Tensor,  # [m, P] written
    retain_graph: bool = False,
) -> None:
    """Gradients of every loss with respect to `shared` into `rows`, of their sum with respect to `own` into
    `.grad`.

    Each loss is differentiated as far as the features and its own parameters; from the features on, each row
    costs one backward of the shared part. A loss that does not reach the features has a row of zeros by
    construction: it is written, not computed.
    """
    n = len(features)
    gradients = [
        torch.autograd.grad(loss, [*features, *own], retain_graph=True, allow_unused=True) for loss in losses
    ]
    for k, parameter in enumerate(own):
        terms = [g[n + k] for g in gradients if g[n + k] is not None]
        parameter.grad = sum(terms[1:], terms[0]) if terms else None
    at_features = [
        [(f, g) for f, g in zip(features, row[:n], strict=True) if g is not None] for row in gradients
    ]
    reached = [i for i, pairs in enumerate(at_features) if pairs]
    rows.zero_()
    for i in reached:
        outputs, upstream = zip(*at_features[i], strict=True)
        keep = retain_graph or i != reached[-1]
        row = torch.autograd.grad(outputs, shared, upstream, retain_graph=keep, allow_unused=True)
        write_row(rows[i], shared, row)


def all_rows(
    losses: Sequence[Tensor],  # m scalars
    parameters: Sequence[nn.Parameter],
    rows: Tensor,  # [m, P] written
    retain_graph: bool = False,
) -> None:
    """Gradients of every loss with respect to every parameter, into `rows`."""
    rows.zero_()
    for i, loss in enumerate(losses):
        keep = retain_graph or i != len(losses) - 1
        row = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
        write_row(rows[i], parameters, row)


def write_row(row: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Lay gradients end to end in `row` [P]; None leaves its stretch as it is."""
    at = 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            row[at : at + parameter.numel()].copy_(gradient.reshape(-1))
        at += parameter.numel()


def set_gradients(parameters: Sequence[nn.Parameter], update: Tensor) -> None:
    """Make each parameter's `.grad` a view of one flat update [P]."""
    at = 0
    for parameter in parameters:
        parameter.grad = update[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def cosines_with_update(
    gramian: Tensor,  # [m, m]
    weights: Tensor | None,  # [m]
    rows: Tensor,  # [m, P]
    update: Tensor | None,  # [P]
) -> tuple[Tensor, Tensor]:  # [m], [m]
    """Cosine of the update with each row, and each row's norm; free from the Gramian where rows are weighted.

    A row of zeros has cosine 0.
    """
    norms = gramian.diagonal().sqrt()
    if weights is not None:
        weights = weights.to(gramian)
        inner, length = gramian @ weights, (weights @ gramian @ weights).clamp_min(0).sqrt()
    else:
        assert update is not None
        inner, length = (rows @ update).to(gramian), update.norm().to(gramian)
    scale = norms * length
    return torch.where(scale > 0, inner / scale, 0.0).float(), norms.float()
