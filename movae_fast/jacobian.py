"""Compute a Jacobian's rows, and run a backward of many losses that aggregates them.

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

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from movae_fast import ops
from movae_fast.aggregation.registry import aggregate, is_weighting
from movae_fast.exchange import Group, Ranks, ranks_of
from movae_fast.projected_step import flatten, project_step

__all__ = ["backward", "flatten", "project_step"]

Gradients = Sequence[Tensor | None]


class AtFeatures(NamedTuple):
    """Hold the gradients after one backward of each loss, as far as the features."""

    features: list[list[Tensor | None]]  # [m][features]
    task: list[Tensor | None]  # of the losses' sum, a parameter each


def at_features(losses: Sequence[Tensor], features: Sequence[Tensor], task: Sequence[Tensor]) -> AtFeatures:
    """Return the gradients of each loss at the features, and those of the losses' sum at the parameters
    after them.

    The graph is kept for the backward from the features on.
    """
    n = len(features)
    gradients = [
        torch.autograd.grad(loss, [*features, *task], retain_graph=True, allow_unused=True) for loss in losses
    ]
    return AtFeatures(
        [list(g[:n]) for g in gradients], [_sum([g[n + k] for g in gradients]) for k in range(len(task))]
    )


def _sum(terms: Gradients) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def nonzero_rows(gradients: Sequence[Gradients]) -> list[int]:
    """Return the objectives whose loss reaches the features; the rows of the others are zero by
    construction."""
    return [i for i, row in enumerate(gradients) if any(g is not None for g in row)]


def shared_rows(
    features: Sequence[Tensor],
    gradients: Sequence[Gradients],  # [m][features]
    shared: Sequence[Tensor],
    retain_graph: bool = False,
) -> Iterator[Gradients]:
    """Yield the gradient at `shared` of each objective of `nonzero_rows`, in their order."""
    nonzero = nonzero_rows(gradients)
    for i in nonzero:
        pairs = [(f, g) for f, g in zip(features, gradients[i], strict=True) if g is not None]
        outputs, upstream = [f for f, _ in pairs], [g for _, g in pairs]
        keep = retain_graph or i != nonzero[-1]
        yield torch.autograd.grad(outputs, shared, upstream, retain_graph=keep, allow_unused=True)


def all_rows(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], retain_graph: bool = False
) -> Iterator[Gradients]:
    """Yield each objective's gradient at every parameter, by one whole backward each."""
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
    """Return the gradient at `shared` of the weighted sum of the losses: one backward from the features."""
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
    losses: Tensor | Iterable[Tensor],
    *,
    aggregator: nn.Module,
    features: Tensor | Iterable[Tensor] | None = ...,
    shared: Tensor | Iterable[Tensor] | None = ...,
    task: Tensor | Iterable[Tensor] | None = ...,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = ...,
    group: Group = ...,
    retain_graph: bool = ...,
    return_rows: Literal[False] = ...,
) -> Tensor | None: ...


@overload
def backward(
    losses: Tensor | Iterable[Tensor],
    *,
    aggregator: nn.Module,
    features: Tensor | Iterable[Tensor] | None = ...,
    shared: Tensor | Iterable[Tensor] | None = ...,
    task: Tensor | Iterable[Tensor] | None = ...,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = ...,
    group: Group = ...,
    retain_graph: bool = ...,
    return_rows: Literal[True],
) -> tuple[Tensor | None, Tensor]: ...


def backward(
    losses: Tensor | Iterable[Tensor],  # m scalars, or [m]
    *,
    aggregator: nn.Module,
    features: Tensor | Iterable[Tensor] | None = None,
    shared: Tensor | Iterable[Tensor] | None = None,
    task: Tensor | Iterable[Tensor] | None = None,
    gramian_at: Literal["shared", "features"] | Sequence[Tensor] = "shared",
    group: Group = None,
    retain_graph: bool = False,
    return_rows: bool = False,
) -> Tensor | tuple[Tensor | None, Tensor] | None:  # [m]; with return_rows [m] and [m, P]
    """Add to every parameter's `.grad`: to shared ones the aggregator's update of the losses' rows, to task
    ones the gradient of the sum.

    With `features`, parameters before them are shared: the losses' gradients there form the Jacobian [m, P],
    and `.grad` receives its aggregation; parameters after them are `task` and receive the gradient of the sum.
    Without, all parameters are shared. Both lists are found in the graph if they are not given; a parameter
    that is in one twice counts once. As with `Tensor.backward`, gradients are added to what `.grad` holds, and
    each `.grad` has memory and the dtype of its parameter; one that no loss reaches receives zeros. Returns the
    aggregator's weights [m], or None for an aggregator that does not weight rows. The result is that of
    TorchJD's `mtl_backward` (or `backward`) followed by `jac_to_grad`, without vmap, so that custom kernels
    need no batching rule.

    A shared parameter that losses also reach around the features (a tied weight, a skip connection) has both
    in its rows: each row is the loss's whole gradient, as is that of a task parameter before the features. Each
    loss is then differentiated from end to end, which costs m whole backwards.

    Parameters may have several dtypes; rows, and what is computed from them, have the dtype that holds them
    all.

    gramian_at: an approximation that costs one backward of the shared part instead of m. The aggregator's
        weights come from the Gramian of the gradients at the features ("features") or at these shared
        parameters, the last before the features; then the weighted losses are differentiated at once. Needs
        `features` and an aggregator that weights rows by their Gramian. What it does to conflict differs from
        model to model.
    group: the processes that train one model together, each on a batch of its own
        (`torch.distributed.group.WORLD` for all). Rows and task gradients are averaged over them before being
        aggregated, so every process receives the `.grad` that one process would compute on the union of the
        batches, each loss being the mean over the processes, as under DistributedDataParallel. The module may
        be wrapped in it: its hooks are not called. (With `find_unused_parameters` or `static_graph` it returns
        copies of the features, all from one node: give both lists then.) Lists that are not given are compared
        between the processes, which costs a host read. "local" keeps this process's own gradients. None is for
        one process.
    return_rows: return (weights, rows) with the Jacobian's rows [m, P] over the shared parameters, for
        `project_step`; not with an approximation, which does not have them.

    The aggregator is one of movae_fast.aggregation or of torchjd.aggregation. Raises ValueError, before
    anything is differentiated, for losses that are not scalars, that are constant or given twice, for features
    that are given twice or that no loss reaches, for a parameter without a gradient or without memory for one,
    for one that is both shared and task, for a `gramian_at` that does not apply, and for several processes
    without a `group`; TypeError for what is not a tensor.
    """
    ranks = ranks_of(group)
    parts = find_parts(losses, features, shared, task)
    at = _check_gramian_at(gramian_at, aggregator, parts.features, parts.shared, return_rows)
    if (shared is None or (task is None and features is not None)) and not ranks.agree(
        [len(parts.losses), *parts.sizes()], parts.shared[0].device
    ):
        raise ValueError(
            "the processes of the group found other parameters in their graphs: give shared= and task="
        )
    weights: Tensor | None
    if at is not None:
        weights, row, sums = _weighted_at(parts, at, aggregator, ranks, retain_graph)
        _accumulate_all(parts.shared, ranks.means(_dense(row, parts.shared)))
        _accumulate_all(parts.task, _means_of_task(sums, parts.task, ranks))
        return weights
    rows, sums = _rows_and_sums(parts, retain_graph)
    ranks.mean_(rows)
    update, weights = aggregate(aggregator, rows, ops.gramian(rows))
    if ranks.size > 1:  # an aggregator may draw: all processes take what the first one drew
        update = ranks.first_(update) if weights is None else ops.combine(rows, ranks.first_(weights))
    split = update.split([p.numel() for p in parts.shared])
    _accumulate_all(parts.shared, [part.view(p.shape) for part, p in zip(split, parts.shared, strict=True)])
    _accumulate_all(parts.task, _means_of_task(sums, parts.task, ranks))
    return (weights, rows) if return_rows else weights


class Parts(NamedTuple):
    """Hold what `backward` differentiates, checked."""

    losses: list[Tensor]
    features: list[Tensor]
    shared: list[Tensor]
    task: list[Tensor]
    whole: bool  # whether the features do not cut the graph in two, so that each loss is differentiated whole

    def sizes(self) -> tuple[int, int, int]:
        """Return numbers that differ, but for chance, where the parameters do: their shapes, in order."""
        shapes = [[tuple(p.shape) for p in parameters] for parameters in (self.shared, self.task)]
        return len(self.shared), len(self.task), zlib.crc32(repr(shapes).encode())


def find_parts(
    losses: Tensor | Iterable[Tensor],
    features: Tensor | Iterable[Tensor] | None,
    shared: Tensor | Iterable[Tensor] | None,
    task: Tensor | Iterable[Tensor] | None,
) -> Parts:
    """Check the arguments of `backward`, and find parameter lists that were left out in the graph. Raises
    ValueError or TypeError."""
    vector = isinstance(losses, Tensor) and losses.dim() > 0
    losses = _tensors("losses", list(losses) if vector else losses, once=True)
    features = None if features is None else _tensors("features", features, once=True)
    if not losses or any(loss.numel() != 1 for loss in losses):
        shapes = ", ".join(str(tuple(loss.shape)) for loss in losses)
        raise ValueError(f"losses must be one or more scalars: got ({shapes})")
    for name, tensors in (("losses", losses), ("features", features or ())):
        for k, tensor in enumerate(tensors):
            if not tensor.requires_grad:
                raise ValueError(f"{name}[{k}] is a constant, which has no gradient: leave it out")
    if features is None:
        chosen = leaves(losses) if shared is None else _parameters("shared", shared)
        if task is not None and _tensors("task", task, once=False):
            raise ValueError("task= needs features=: without them every parameter is shared")
        _check_memory(chosen, [])
        return Parts(losses, [], chosen, [], True)
    if not features:
        raise ValueError("features is empty: leave it out, and all parameters are shared")
    before, (after, met) = leaves(features), _reach(losses, features)
    if not met:
        raise ValueError("no loss reaches the features: are they part of the losses' graph?")
    chosen = before if shared is None else _parameters("shared", shared)
    is_shared, is_before = {id(p) for p in chosen}, {id(p) for p in before}
    if task is None:
        rest = [p for p in after if id(p) not in is_shared | is_before]
    else:
        rest = _parameters("task", task)
    if any(id(p) in is_shared for p in rest):
        raise ValueError(
            "a parameter is both in shared= and in task= (or before the features): give it in shared= alone, "
            "where its rows hold all its uses"
        )
    _check_memory(chosen, rest)
    around = any(id(p) in is_shared for p in after) or any(id(p) in is_before for p in rest)
    return Parts(losses, features, chosen, rest, around or _nested(features))


def _tensors(name: str, given: Tensor | Iterable[Tensor], once: bool) -> list[Tensor]:
    """Return one tensor, or several, as a list; with `once` raise for one that is there twice, else count it
    once."""
    tensors = [given] if isinstance(given, Tensor) else list(given)
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{k}] must be a tensor, got {type(tensor).__name__}")
    unique = list({id(t): t for t in tensors}.values())
    if once and len(unique) < len(tensors):
        raise ValueError(f"{name} holds a tensor twice: its gradient would count twice")
    return unique


def _parameters(name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters as a list, each once, or raise for one that takes no `.grad`."""
    parameters = _tensors(name, given, once=False)
    for k, p in enumerate(parameters):
        if not p.requires_grad or not (p.is_leaf or p.retains_grad):
            problem = "does not require a gradient" if not p.requires_grad else "is not a leaf of the graph"
            raise ValueError(f"{name}[{k}] {list(p.shape)} {problem}: leave it out")
    return parameters


def _check_memory(shared: list[Tensor], task: list[Tensor]) -> None:
    """Raise where there is nothing to aggregate, and for parameters of which this process has a part."""
    if not shared:
        raise ValueError(
            "there is no shared parameter that requires a gradient, so there is nothing to aggregate"
        )
    if any(hasattr(p, "device_mesh") for p in (*shared, *task)):
        raise ValueError("parameters that are sharded over processes (DTensor) are not supported")


def _rows_and_sums(parts: Parts, retain_graph: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Return the Jacobian's rows [m, P], and the gradient of the losses' sum at the task parameters."""
    losses, shared, n = parts.losses, parts.shared, len(parts.shared)
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in shared))
    rows = shared[0].new_zeros(len(losses), sum(p.numel() for p in shared), dtype=dtype)
    if parts.whole:
        terms: list[Gradients] = []
        for row, gradients in zip(rows, all_rows(losses, [*shared, *parts.task], retain_graph), strict=True):
            write_row(row, gradients[:n], shared)
            terms.append(gradients[n:])
        return rows, [_sum([term[k] for term in terms]) for k in range(len(parts.task))]
    at_cut = at_features(losses, parts.features, parts.task)
    computed = shared_rows(parts.features, at_cut.features, shared, retain_graph)
    for i, gradients in zip(nonzero_rows(at_cut.features), computed, strict=True):
        write_row(rows[i], gradients, shared)
    return rows, at_cut.task


def _weighted_at(
    parts: Parts, at: Sequence[Tensor], aggregator: nn.Module, ranks: Ranks, retain_graph: bool
) -> tuple[Tensor, Gradients, list[Tensor | None]]:
    """Return weights from the Gramian at `at`, the gradient of the losses so weighted at the shared parameters,
    and that of their sum at the task ones."""
    at_cut = at_features(parts.losses, parts.features, parts.task)
    if at and parts.whole:
        whole = [torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True) for loss in parts.losses]
        rows = stack_rows(whole, at)
    else:
        rows = cheap_rows(parts.features, at_cut.features, at)
    if at:
        gramian = ops.gramian(ranks.mean_(rows))
    else:  # each process's images have features of their own: the union's rows stand side by side
        gramian = ranks.mean_(ops.gramian(rows)) / ranks.size
    weights = ranks.first_(aggregator.gramian_weighting(gramian))  # type: ignore[operator]
    if parts.whole:
        terms = [loss * w.to(loss) for loss, w in zip(parts.losses, weights, strict=True)]
        total = _sum([term.reshape(()) for term in terms])
        assert total is not None
        row: Gradients = torch.autograd.grad(total, parts.shared, retain_graph=retain_graph, allow_unused=True)
    else:
        row = weighted_row(parts.features, at_cut.features, weights, parts.shared, retain_graph)
    return weights, row, at_cut.task


def _check_gramian_at(
    gramian_at: str | Sequence[Tensor],
    aggregator: nn.Module,
    features: Sequence[Tensor],
    shared: Sequence[Tensor],
    return_rows: bool,
) -> Sequence[Tensor] | None:
    """Check `gramian_at` and return the shared parameters that it names: an empty sequence for "features",
    None for "shared". Raises ValueError."""
    if isinstance(gramian_at, str):
        if gramian_at not in ("shared", "features"):
            raise ValueError(f"gramian_at must be shared, features or shared parameters; got {gramian_at!r}")
        if gramian_at == "shared":
            return None
        places: list[Tensor] = []
    else:
        places = _tensors("gramian_at", gramian_at, once=False)
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
    """Return rows whose Gramian approximates that of the shared parameters: each objective's gradient at a
    few of them.

    `last` are shared parameters next to the features, at which the backward stops; without any, the gradient at
    the features themselves. The row of an objective that does not reach the features is zero. The graph is
    kept.
    """
    if last:
        nonzero = nonzero_rows(gradients)
        rows: dict[int, Gradients] = dict(
            zip(nonzero, shared_rows(features, gradients, last, retain_graph=True), strict=True)
        )
        like: Sequence[Tensor] = last
        wanted = [rows.get(i, [None] * len(last)) for i in range(len(gradients))]
    else:
        like, wanted = features, list(gradients)
    return stack_rows(wanted, like)


def stack_rows(gradients: Sequence[Gradients], like: Sequence[Tensor]) -> Tensor:  # [m, Q]
    """Return the rows [m, Q], each one objective's gradients end to end; None counts as zeros shaped like
    the tensor in `like`."""
    return torch.stack([torch.cat([g.reshape(-1) for g in _dense(row, like)]) for row in gradients])


def _dense(gradients: Gradients, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients as strided tensors, zeros for None."""
    filled = (torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True))
    return [g if g.layout == torch.strided else g.to_dense() for g in filled]


def write_row(row: Tensor, gradients: Gradients, parameters: Sequence[Tensor]) -> None:
    """Lay gradients end to end in `row` [P]; None leaves its stretch as it is."""
    at = 0
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
            row[at : at + parameter.numel()].copy_(dense.reshape(-1))
        at += parameter.numel()


def _means_of_task(sums: Gradients, task: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the task parameters' gradients averaged over the processes. In one process a sparse gradient
    stays sparse."""
    if ranks.size > 1:
        return ranks.means(_dense(sums, task))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(sums, task, strict=True)]


def _accumulate_all(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add each gradient to its parameter's `.grad`, which gets memory of its own.

    What autograd returns may lie in the memory of another parameter's gradient (the sum of two hands both the
    same tensor) or hold one number many times over (that of a sum): clipping would scale it again and again.
    """
    with torch.no_grad():
        for p, gradient in zip(parameters, gradients, strict=True):
            if p.grad is not None:
                p.grad += gradient.to(p.grad.device, p.grad.dtype)
            elif gradient.layout == torch.strided:
                p.grad = torch.empty_like(p).copy_(gradient)
            else:
                p.grad = gradient.clone().to(p.device, p.dtype)


def leaves(tensors: Sequence[Tensor], stop: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the leaf tensors that require a gradient in the graph behind `tensors`, without looking behind
    `stop`."""
    return _reach(tensors, stop)[0]


def _reach(tensors: Sequence[Tensor], stop: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """Return the leaves as `leaves` does, and whether the search met one of `stop`.

    A place in the graph is a node and which of its outputs: two features may come out of one node.
    """
    closed = {edge(t) for t in stop if t.requires_grad}
    queue = [edge(t) for t in tensors if t.requires_grad]
    return _walk(queue, closed)


def _nested(features: Sequence[Tensor]) -> bool:
    """Return whether a feature is computed from another."""
    closed = {edge(t) for t in features}
    behind = [e for node, _ in closed for e in node.next_functions if e[0] is not None]
    return _walk(behind, closed)[1]


def edge(tensor: Tensor) -> tuple[Any, int]:
    """Return where a tensor comes from: the node of the graph, and which of its outputs."""
    node, number = get_gradient_edge(tensor)[:2]
    return node, number


def _walk(queue: list[tuple[Any, int]], closed: set[tuple[Any, int]]) -> tuple[list[Tensor], bool]:
    leaves_by_id: dict[int, Tensor] = {}
    seen: set[Any] = set()
    met = False
    while queue:
        place = queue.pop()
        if place in closed:
            met = True
            continue
        node = place[0]
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves_by_id.setdefault(id(node.variable), node.variable)
        queue.extend(place for place in node.next_functions if place[0] is not None)
    return list(leaves_by_id.values()), met


def cosines_with_update(
    gramian: Tensor,  # [m, m]
    weights: Tensor | None,  # [m]
    rows: Tensor,  # [m, P]
    update: Tensor | None,  # [P]
) -> tuple[Tensor, Tensor]:  # [m], [m]
    """Return the update's cosine with each row, and each row's norm; from the Gramian alone where rows are
    weighted.

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
