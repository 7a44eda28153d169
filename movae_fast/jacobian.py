"""Compute the Jacobian of several losses, and run a backward pass that aggregates its rows instead of adding
them.

Features (the latents' parameters, an encoder's output) cut a network into a shared part before them and parts
after them. Each loss is first differentiated as far as the features and the task parameters after them. Then
one backward pass through the shared part is run for each loss that depends on the features; it gives that
loss's row. `backward` does all of this within any training loop:

    from movae_fast import jacobian
    from movae_fast.aggregation import UPGrad

    jacobian.backward([reconstruction, kl], features=[mu, logvar], aggregator=UPGrad.strict())
    optimizer.step()

This makes the gradient free of conflict. The step that the optimizer then takes may still conflict with a row;
`project_step` corrects it.
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
from movae_fast.names import with_former_names
from movae_fast.projected_step import flatten, project_step

__all__ = ["backward", "flatten", "project_step"]

Gradients = Sequence[Tensor | None]


class AtFeatures(NamedTuple):
    """Hold what one backward pass of each loss, stopped at the features, gives.

    `features[i][k]` is the gradient of loss i at feature k, None where the loss does not depend on it;
    `task[k]` is the gradient of the losses' sum at task parameter k, None where no loss depends on it.
    """

    features: list[list[Tensor | None]]  # [m][features]
    task: list[Tensor | None]  # gradients of the summed losses, one per parameter


def at_features(losses: Sequence[Tensor], features: Sequence[Tensor], task: Sequence[Tensor]) -> AtFeatures:
    """Differentiate each loss as far as the features: return its gradients there, and the gradients of the
    losses' sum at the task parameters.

    The autograd graph is kept, since the shared part before the features is differentiated later.
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
    """Return the numbers of the objectives whose loss depends on a feature.

    `gradients[i][k]` is the gradient of objective i at feature k, or None. An objective with None throughout
    has a zero row at the shared parameters.
    """
    return [i for i, row in enumerate(gradients) if any(g is not None for g in row)]


def shared_rows(
    features: Sequence[Tensor],
    gradients: Sequence[Gradients],  # [m][features]
    shared: Sequence[Tensor],
    retain_graph: bool = False,
) -> Iterator[Gradients]:
    """Yield, for each objective in `nonzero_rows(gradients)`, its gradients at the parameters `shared`.

    Each costs one backward pass from the features, which starts from the objective's `gradients` there. An
    entry is None where the objective does not depend on that parameter.
    """
    nonzero = nonzero_rows(gradients)
    for i in nonzero:
        pairs = [(f, g) for f, g in zip(features, gradients[i], strict=True) if g is not None]
        outputs, upstream = [f for f, _ in pairs], [g for _, g in pairs]
        keep = retain_graph or i != nonzero[-1]
        yield torch.autograd.grad(outputs, shared, upstream, retain_graph=keep, allow_unused=True)


def all_rows(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], retain_graph: bool = False
) -> Iterator[Gradients]:
    """Yield, for each loss, its gradients at all `parameters`, by a backward pass from the loss itself.

    Used where no features cut the network, so that nothing of the passes can be saved. An entry is None where
    the loss does not depend on that parameter.
    """
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
    """Return the gradient at `shared` of the losses' sum weighted by `weights`, in one backward pass from the
    features.

    `gradients[i][k]` is the gradient of loss i at feature k, or None.
    """
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


@with_former_names(own="task")
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
    """Differentiate several losses and add the result to the parameters' `.grad`: to shared parameters the
    aggregator's update, to task parameters the gradient of the losses' sum.

    losses: m scalars, or one tensor [m].
    aggregator: one of movae_fast.aggregation or of torchjd.aggregation.
    features: the tensors that cut the network in two. Parameters before them are shared: the losses' gradients
        there are the rows of the Jacobian [m, P] that is aggregated. Parameters after them are task parameters.
        Without features all parameters are shared.
    shared, task: the parameters of either kind. A list that is not given is collected from the autograd graph;
        a parameter that is in a list twice counts once.
    gramian_at: where the Gramian is computed. "shared" is exact. "features", or some of the shared parameters
        (the last before the features), is an approximation that costs one backward pass of the shared part
        instead of m: the weights come from the Gramian of the gradients there, then the weighted sum of the
        losses is differentiated. It needs `features` and an aggregator that weights rows by their Gramian, and
        how much conflict it leaves differs from model to model.
    group: the processes that train one model together, each on its own batch (`torch.distributed.group.WORLD`
        for all); None where there is one process. Rows and task gradients are averaged over the group before
        aggregation, so every process receives the `.grad` that one process would compute on the union of the
        batches, each loss being the mean over the processes, as under DistributedDataParallel. The module may
        be wrapped in DistributedDataParallel, whose hooks are not called. (With `find_unused_parameters` or
        `static_graph` it returns copies of the features, all from one node of the graph: give `shared` and
        `task` then.) If the two lists are not given, the processes compare what they collected, which costs a
        host read. "local" averages nothing: each process keeps its own gradients.
    retain_graph: keep the autograd graph for another backward pass.
    return_rows: return (weights, rows) with the Jacobian's rows [m, P] over the shared parameters, for
        `project_step`; not with an approximation by `gramian_at`, which does not compute them.

    Returns the aggregator's weights [m], or None if the aggregator does not weight rows. The result is that of
    TorchJD's `mtl_backward` (or `backward`) followed by `jac_to_grad`, without vmap, so that custom kernels
    need no batching rule.

    As with `Tensor.backward`, gradients are added to what `.grad` holds. A new `.grad` has its own memory and
    its parameter's dtype; a parameter that no loss depends on receives zeros. Parameters may have several
    dtypes; the rows, and what is computed from them, have the dtype to which torch promotes them all.

    Where losses depend on a shared parameter also by a path around the features (a tied weight, a skip
    connection), its row is still the loss's whole gradient; so is the gradient of a task parameter that also
    lies before the features. Each loss is then differentiated from end to end, which costs m whole backward
    passes.

    Raises ValueError, before anything is differentiated, for losses that are not scalars, that are constant or
    given twice; for features that are given twice or that no loss depends on; for a parameter that does not
    require a gradient, is not a leaf or is sharded (DTensor); for a parameter that is both shared and task; for
    a `gramian_at` that does not apply; and for several processes without a `group`. Raises TypeError for an
    argument that is not a tensor.
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
    """Hold the checked arguments of `backward`: losses, features, shared and task parameters."""

    losses: list[Tensor]
    features: list[Tensor]
    shared: list[Tensor]
    task: list[Tensor]
    whole: bool  # whether losses also bypass the features; each is then differentiated without a stop at them

    def sizes(self) -> tuple[int, int, int]:
        """Return three numbers by which processes compare their parameter lists: the count of shared
        parameters, that of task parameters, and a checksum of all shapes in their order."""
        shapes = [[tuple(p.shape) for p in parameters] for parameters in (self.shared, self.task)]
        return len(self.shared), len(self.task), zlib.crc32(repr(shapes).encode())


def find_parts(
    losses: Tensor | Iterable[Tensor],
    features: Tensor | Iterable[Tensor] | None,
    shared: Tensor | Iterable[Tensor] | None,
    task: Tensor | Iterable[Tensor] | None,
) -> Parts:
    """Check the arguments of `backward`, and collect from the autograd graph the parameter lists that are None.

    Raises ValueError or TypeError, as `backward` does.
    """
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
    """Return one tensor or several as a list without repetitions.

    `name` is the argument's, for the errors. Raises TypeError for an entry that is not a tensor and, with
    `once`, ValueError for a tensor that is given twice.
    """
    tensors = [given] if isinstance(given, Tensor) else list(given)
    for k, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{k}] must be a tensor, got {type(tensor).__name__}")
    unique = list({id(t): t for t in tensors}.values())
    if once and len(unique) < len(tensors):
        raise ValueError(f"{name} holds a tensor twice: its gradient would count twice")
    return unique


def _parameters(name: str, given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters as a list without repetitions; raise ValueError for one that autograd gives no
    `.grad`."""
    parameters = _tensors(name, given, once=False)
    for k, p in enumerate(parameters):
        if not p.requires_grad or not (p.is_leaf or p.retains_grad):
            problem = "does not require a gradient" if not p.requires_grad else "is not a leaf of the graph"
            raise ValueError(f"{name}[{k}] {list(p.shape)} {problem}: leave it out")
    return parameters


def _check_memory(shared: list[Tensor], task: list[Tensor]) -> None:
    """Raise ValueError if there is no shared parameter, or if a parameter is sharded over processes
    (DTensor)."""
    if not shared:
        raise ValueError(
            "there is no shared parameter that requires a gradient, so there is nothing to aggregate"
        )
    if any(hasattr(p, "device_mesh") for p in (*shared, *task)):
        raise ValueError("parameters that are sharded over processes (DTensor) are not supported")


def _rows_and_sums(parts: Parts, retain_graph: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Return the Jacobian's rows [m, P] at the shared parameters, and the gradients of the losses' sum at the
    task parameters (None where no loss depends on one)."""
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
    """Compute the approximation that `backward` offers as `gramian_at`.

    Returns the weights [m] from the Gramian of the gradients at the parameters `at` (at the features, if `at`
    is empty), the gradients at the shared parameters of the losses' sum so weighted, and the gradients at the
    task parameters of the unweighted sum.
    """
    at_cut = at_features(parts.losses, parts.features, parts.task)
    if at and parts.whole:
        whole = [torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True) for loss in parts.losses]
        rows = stack_rows(whole, at)
    else:
        rows = cheap_rows(parts.features, at_cut.features, at)
    if at:
        gramian = ops.gramian(ranks.mean_(rows))
    else:  # the features of the processes' images differ, so the rows of all are concatenated
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
    """Check `gramian_at` and return the shared parameters that it names: an empty sequence for "features", None
    for the exact "shared".

    Raises ValueError if the approximation does not apply to this aggregator or to these arguments.
    """
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
    """Return stand-ins [m, Q] for the Jacobian's rows, whose Gramian approximates that of all shared
    parameters.

    They are the objectives' gradients at the parameters `last`, the shared ones next to the features, where the
    backward pass can stop; if `last` is empty, the gradients at the features themselves. `gradients[i][k]` is
    the gradient of objective i at feature k; an objective that depends on no feature gets a row of zeros. The
    autograd graph is kept.
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
    """Return a matrix [m, Q] whose row i holds the gradients of objective i, flattened and laid end to end.

    `like` has the tensors that they are gradients of: where a gradient is None, zeros of that tensor's shape
    stand.
    """
    return torch.stack([torch.cat([g.reshape(-1) for g in _dense(row, like)]) for row in gradients])


def _dense(gradients: Gradients, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients as dense tensors: sparse ones converted, None replaced by zeros shaped as in
    `like`."""
    filled = (torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True))
    return [g if g.layout == torch.strided else g.to_dense() for g in filled]


def write_row(row: Tensor, gradients: Gradients, parameters: Sequence[Tensor]) -> None:
    """Copy the gradients of one objective into `row` [P], flattened and end to end in the order of
    `parameters`.

    Where a gradient is None, the row keeps the values that it had.
    """
    at = 0
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
            row[at : at + parameter.numel()].copy_(dense.reshape(-1))
        at += parameter.numel()


def _means_of_task(sums: Gradients, task: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the task parameters' gradients averaged over the processes, zeros for None.

    In one process a sparse gradient stays sparse; several processes exchange dense ones.
    """
    if ranks.size > 1:
        return ranks.means(_dense(sums, task))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(sums, task, strict=True)]


def _accumulate_all(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add each gradient to its parameter's `.grad`; a new `.grad` is a copy with memory of its own.

    What autograd returns may share memory with another parameter's gradient (adding two parameters hands the
    same tensor to both) or be an expanded scalar (the gradient of a sum). Clipping such a `.grad` in place
    would scale the same memory more than once.
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
    """Return the leaf tensors that require a gradient and that `tensors` were computed from.

    The search through the autograd graph goes back from `tensors` and does not go beyond the tensors in `stop`.
    """
    return _reach(tensors, stop)[0]


def _reach(tensors: Sequence[Tensor], stop: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """Return the leaf tensors that `leaves` describes, and whether the search met a tensor of `stop`.

    A tensor is identified in the graph by its node and its number among the node's outputs, since two features
    may be outputs of one node.
    """
    closed = {edge(t) for t in stop if t.requires_grad}
    queue = [edge(t) for t in tensors if t.requires_grad]
    return _walk(queue, closed)


def _nested(features: Sequence[Tensor]) -> bool:
    """Return whether one of the features is computed from another one."""
    closed = {edge(t) for t in features}
    behind = [e for node, _ in closed for e in node.next_functions if e[0] is not None]
    return _walk(behind, closed)[1]


def edge(tensor: Tensor) -> tuple[Any, int]:
    """Return a tensor's place in the autograd graph: the node that made it, and its number among the node's
    outputs."""
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
    """Return the cosine of the update with each row [m], and each row's norm [m], for the logs.

    For an aggregator that weights rows the Gramian and the weights suffice; with `weights` None, `rows` and
    `update` are read too. A row of zeros has cosine 0; the results are NaN where the Gramian is not finite.
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
