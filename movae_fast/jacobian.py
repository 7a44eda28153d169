"""The Jacobian's rows, and a backward of many losses that aggregates them.

Features (the latents' parameters, an encoder's output) cut a network in two. Each loss is differentiated as far
as the features and its own parameters after them; from the features on, each loss that reaches them costs one
backward of the shared part. `backward` does all of it for anybody's training loop:

    from movae_fast import jacobian
    from movae_fast.aggregation import UPGrad

    jacobian.backward([reconstruction, kl], features=[mu, logvar], aggregator=UPGrad.strict())
    optimizer.step()

What is without conflict then is the gradient. `project_step` corrects the optimizer's step, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.aggregation.registry import aggregate, is_weighting
from movae_fast.projected_step import flatten, project_step

__all__ = ["backward", "flatten", "project_step"]

Gradients = Sequence[Tensor | None]


class AtFeatures(NamedTuple):
    """One backward of each loss, as far as the features."""

    features: list[list[Tensor | None]]  # [m][features]
    own: list[Tensor | None]  # of the losses' sum, a parameter each


def at_features(losses: Sequence[Tensor], features: Sequence[Tensor], own: Sequence[Tensor]) -> AtFeatures:
    """Gradients of each loss at the features, and of their sum at the parameters after them.

    The graph is kept for the backward from the features on.
    """
    n = len(features)
    found = [
        torch.autograd.grad(loss, [*features, *own], retain_graph=True, allow_unused=True) for loss in losses
    ]
    return AtFeatures([list(g[:n]) for g in found], [_sum([g[n + k] for g in found]) for k in range(len(own))])


def _sum(terms: Gradients) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def reaching(gradients: Sequence[Gradients]) -> list[int]:
    """Objectives whose loss reaches the features; the others' rows are zero by construction."""
    return [i for i, row in enumerate(gradients) if any(g is not None for g in row)]


def shared_rows(
    features: Sequence[Tensor],
    gradients: Sequence[Gradients],  # [m][features]
    shared: Sequence[Tensor],
    retain_graph: bool = False,
) -> Iterator[Gradients]:
    """The gradient at `shared` of each objective that is `reaching` the features, in their order."""
    reached = reaching(gradients)
    for i in reached:
        pairs = [(f, g) for f, g in zip(features, gradients[i], strict=True) if g is not None]
        outputs, upstream = [f for f, _ in pairs], [g for _, g in pairs]
        keep = retain_graph or i != reached[-1]
        yield torch.autograd.grad(outputs, shared, upstream, retain_graph=keep, allow_unused=True)


def all_rows(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], retain_graph: bool = False
) -> Iterator[Gradients]:
    """Each objective's gradient at every parameter, one whole backward each."""
    for i, loss in enumerate(losses):
        keep = retain_graph or i != len(losses) - 1
        yield torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)


def weighted_row(
    features: Sequence[Tensor],
    gradients: Sequence[Gradients],  # [m][features]
    weights: Tensor,  # [m]
    shared: Sequence[Tensor],
    retain_graph: bool = False,
) -> Gradients:
    """The gradient at `shared` of the losses' sum with the given weights: one backward from the features."""
    outputs, upstream = [], []
    for k, feature in enumerate(features):
        at_feature = [(g[k], w) for g, w in zip(gradients, weights, strict=True)]
        terms = [g * w.to(g.dtype) for g, w in at_feature if g is not None]
        total = _sum(terms)
        if total is not None:
            outputs.append(feature)
            upstream.append(total)
    return torch.autograd.grad(outputs, shared, upstream, retain_graph=retain_graph, allow_unused=True)


@overload
def backward(
    losses: Sequence[Tensor],
    *,
    aggregator: nn.Module,
    features: Sequence[Tensor] | None = ...,
    shared: Sequence[Tensor] | None = ...,
    own: Sequence[Tensor] | None = ...,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = ...,
    retain_graph: bool = ...,
    return_rows: Literal[False] = ...,
) -> Tensor | None: ...


@overload
def backward(
    losses: Sequence[Tensor],
    *,
    aggregator: nn.Module,
    features: Sequence[Tensor] | None = ...,
    shared: Sequence[Tensor] | None = ...,
    own: Sequence[Tensor] | None = ...,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = ...,
    retain_graph: bool = ...,
    return_rows: Literal[True],
) -> tuple[Tensor | None, Tensor]: ...


def backward(
    losses: Sequence[Tensor],  # m scalars
    *,
    aggregator: nn.Module,
    features: Sequence[Tensor] | None = None,
    shared: Sequence[Tensor] | None = None,
    own: Sequence[Tensor] | None = None,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = "shared",
    retain_graph: bool = False,
    return_rows: bool = False,
) -> Tensor | tuple[Tensor | None, Tensor] | None:  # [m]; with return_rows [m] and [m, P]
    """Compute the gradient of a vector of losses without conflict: `.grad` of every parameter, shared ones
    aggregated.

    With `features`, parameters before them are shared: the losses' gradients there form the Jacobian [m, P],
    and `.grad` receives its aggregation; parameters after them are `own` and receive the gradient of the sum.
    Without, all parameters are shared. Both lists are found in the graph if they are not given. As with
    `Tensor.backward`, gradients are added to what `.grad` holds. Returns the aggregator's weights [m], or None
    for an aggregator that does not weight rows. The result is that of TorchJD's `mtl_backward` (or `backward`)
    followed by `jac_to_grad`, without vmap, so that custom kernels need no batching rule.

    gramian_at: an approximation that costs one backward of the shared part instead of m. The aggregator's
        weights come from the Gramian of the gradients at the features ("features") or at these shared
        parameters, the last before the features; then the weighted losses are differentiated at once. Needs
        `features` and an aggregator that weights rows by their Gramian. What it does to conflict differs from
        model to model.
    return_rows: return (weights, rows) with the Jacobian's rows [m, P] over the shared parameters, for
        `project_step`; not with an approximation, which does not have them.

    In one process: the gradients are not exchanged, as `DistributedDataParallel`'s hooks are not called (the
    trainer's own step sums rows over processes).

    The aggregator is one of movae_fast.aggregation or of torchjd.aggregation. Raises ValueError for losses that
    are not scalars, for an empty list, for features that no loss reaches, for a parameter that is both
    shared and own, and for a `gramian_at` that does not apply.
    """
    losses = list(losses)
    shared = None if shared is None else list(shared)
    own = None if own is None else list(own)
    if not losses or any(loss.numel() != 1 for loss in losses):
        shapes = ", ".join(str(tuple(loss.shape)) for loss in losses)
        raise ValueError(f"losses must be one or more scalars: got ({shapes})")
    features = list(features or ())
    if shared is None:
        shared = leaves(features or losses)
    if own is None:
        own = leaves(losses, stop=features) if features else []
    if {id(p) for p in shared} & {id(p) for p in own}:
        raise ValueError("a parameter is both before and after the features: give shared= and own=")
    if not shared:
        raise ValueError("no parameter that requires a gradient lies before the features")
    at = _check_gramian_at(gramian_at, aggregator, features, shared, return_rows)
    if features:
        found = at_features(losses, features, own)
        if all(g is None for row in found.features for g in row):
            raise ValueError("no loss reaches the features: are they part of the losses' graph?")
        for p, gradient in zip(own, found.own, strict=True):
            _accumulate(p, gradient)
        if at is not None:
            weights = aggregator.gramian_weighting(ops.gramian(cheap_rows(features, found.features, at)))  # type: ignore[operator]
            row = weighted_row(features, found.features, weights, shared, retain_graph)
            for p, gradient in zip(shared, row, strict=True):
                _accumulate(p, gradient)
            return weights
        reached = reaching(found.features)
        computed = shared_rows(features, found.features, shared, retain_graph)
    else:
        reached = list(range(len(losses)))
        computed = all_rows(losses, shared, retain_graph)
    rows = shared[0].new_zeros(len(losses), sum(p.numel() for p in shared))
    for i, row in zip(reached, computed, strict=True):
        write_row(rows[i], row, shared)
    update, weights = aggregate(aggregator, rows, ops.gramian(rows))
    for p, part in zip(shared, update.split([p.numel() for p in shared]), strict=True):
        _accumulate(p, part.view(p.shape))
    return (weights, rows) if return_rows else weights


def _check_gramian_at(
    gramian_at: str | Sequence[Tensor],
    aggregator: nn.Module,
    features: Sequence[Tensor],
    shared: Sequence[Tensor],
    return_rows: bool,
) -> Sequence[Tensor] | None:
    """Return the parameters that `gramian_at` names: none of them for the features, None for the exact
    Gramian."""
    if isinstance(gramian_at, str):
        if gramian_at not in ("shared", "features"):
            raise ValueError(f"gramian_at must be shared, features or shared parameters; got {gramian_at!r}")
        if gramian_at == "shared":
            return None
        places: list[Tensor] = []
    else:
        places = [gramian_at] if isinstance(gramian_at, Tensor) else list(gramian_at)
        if not places:
            raise ValueError("gramian_at names no parameter; give some, or features")
    if not features:
        raise ValueError("gramian_at needs features=: without them there is nothing before all parameters")
    if not is_weighting(aggregator):
        raise ValueError(
            f"gramian_at: {type(aggregator).__name__} needs the rows themselves; leave gramian_at at shared"
        )
    if return_rows:
        raise ValueError("gramian_at computes no rows of the shared parameters; leave out return_rows")
    known = {id(p) for p in shared}
    if any(id(p) not in known for p in places):
        raise ValueError("gramian_at names a parameter that is not shared")
    return places


def cheap_rows(
    features: Sequence[Tensor],
    gradients: Sequence[Gradients],  # [m][features]
    last: Sequence[Tensor],
) -> Tensor:  # [m, Q]
    """Rows whose Gramian stands for that of the shared parameters: each objective's gradient at a few of them.

    `last` are shared parameters next to the features, at which the backward stops; without any, the gradient at
    the features themselves. The row of an objective that does not reach the features is zero. The graph is
    kept.
    """
    if last:
        reached = reaching(gradients)
        found: dict[int, Gradients] = dict(
            zip(reached, shared_rows(features, gradients, last, retain_graph=True), strict=True)
        )
        like: Sequence[Tensor] = last
        wanted = [found.get(i, [None] * len(last)) for i in range(len(gradients))]
    else:
        like, wanted = features, list(gradients)
    rows = [
        torch.cat(
            [(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(row, like, strict=True)]
        )
        for row in wanted
    ]
    return torch.stack(rows)


def write_row(row: Tensor, gradients: Gradients, parameters: Sequence[Tensor]) -> None:
    """Lay gradients end to end in `row` [P]; None leaves its stretch as it is."""
    at = 0
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            row[at : at + parameter.numel()].copy_(gradient.reshape(-1))
        at += parameter.numel()


def _accumulate(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.clone() if gradient._base is not None else gradient
    else:
        parameter.grad += gradient


def leaves(tensors: Sequence[Tensor], stop: Sequence[Tensor] = ()) -> list[Tensor]:
    """Leaf tensors that require a gradient in the graph behind `tensors`, not looking behind `stop`."""
    closed = {t.grad_fn for t in stop if t.grad_fn is not None}
    found: dict[int, Tensor] = {id(t): t for t in tensors if t.is_leaf and t.requires_grad}
    seen: set[Any] = set(closed)
    queue = [t.grad_fn for t in tensors if t.grad_fn is not None and t.grad_fn not in closed]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.setdefault(id(node.variable), node.variable)
        queue.extend(follower for follower, _ in node.next_functions if follower is not None)
    return list(found.values())


def cosines_with_update(
    gramian: Tensor,  # [m, m]
    weights: Tensor | None,  # [m]
    rows: Tensor,  # [m, P]
    update: Tensor | None,  # [P]
) -> tuple[Tensor, Tensor]:  # [m], [m]
    """Cosine of the update with each row, and each row's norm; free from the Gramian where rows are weighted.

    A row of zeros has cosine 0; NaN where the Gramian is not finite.
    """
    norms = gramian.diagonal().sqrt()
    if weights is not None:
        weights = weights.to(gramian)
        inner, length = gramian @ weights, (weights @ gramian @ weights).clamp_min(0).sqrt()
    else:
        assert update is not None
        inner, length = (rows @ update).to(gramian), update.norm().to(gramian)
    scale = norms * length
    return torch.where(scale == 0, 0.0, inner / scale).float(), norms.float()
