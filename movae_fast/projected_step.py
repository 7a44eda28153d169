"""Project an optimizer's step: the closest step to it that worsens no objective, to first order.

An aggregator makes a *gradient* without conflict; the optimizer then rescales it and adds its memory, and what
is applied may conflict again. Here the applied step itself is corrected. With the Jacobian's rows J [m, P], the
step s that the optimizer took (parameters before minus after: momentum, second moments, decay and clipping are
all in it) and a positive diagonal metric D, the corrected step is

    s' = s + D J' lambda,   lambda = argmin over lambda >= 0 of 1/2 lambda' (J D J') lambda + lambda' J s,

the minimiser of (x - s)' D^-1 (x - s) subject to J x >= 0: objective i falls by J_i s' >= 0, to first order.
The guarantee is for the objectives of this batch and for the parameters that J is about; a finite step also has
a second order, which nothing here looks at. A factor on D changes nothing. D = I corrects as little as possible
in plain length; an optimizer's own D (Adam: 1 / (sqrt(v_hat) + eps)) as little as possible in the optimizer's
sense of length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from movae_fast import ops

StepMetric = Literal["identity", "optimizer"]

# Of the projection's Gramian, relative to each row's own: small beside the cosines that it has to keep.
REG_EPS = 1e-9


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors end to end in a new tensor [P]: the parameters before a step, for `project_step`."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def multipliers(gramian: Tensor) -> Tensor:  # [m] float64
    """Return lambda from the Gramian [m + 1, m + 1] of J D^(1/2) with D^(-1/2) s as its last row."""
    m = len(gramian) - 1
    lambdas, _ = ops.step_multipliers(gramian[:m, :m], gramian[:m, m], reg_eps=REG_EPS)
    return lambdas


@dataclass(frozen=True)
class Columns:
    """Hold which columns of a row this process works on, and how the processes combine their results."""

    stretch: Callable[[Tensor], Tensor] = lambda tensor: tensor  # this process's stretch of [..., P]
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor  # the sum over the processes
    gather: Callable[[Tensor], None] = lambda row: None  # fills in the others' stretches of a row [P]

    def gramian(self, rows: Tensor) -> Tensor:  # [m, m] float64
        """Return the Gramian of rows [m, P], each process contributing its stretch of them."""
        return self.total(ops.gramian(self.stretch(rows)))


def correction(
    both: Tensor,  # [m + 1, P] the rows J and, last, the step s; overwritten
    roots: Tensor | None = None,  # [P] D^(1/2); overwritten
    loss_scale: Tensor | None = None,  # [] by which the rows are too long
    columns: Columns = Columns(),
) -> tuple[Tensor, Tensor]:  # [P], [m] float64
    """Return -D J' lambda, what a step's projection adds to the parameters, and lambda.

    Zero where the Gramian is not finite: an overflow in fp16, whose step the loss scale left out; a product
    with lambda = 0 would be NaN.
    """
    mine = columns.stretch(both)
    if roots is not None:
        root = columns.stretch(roots)
        bounded(root, mine[:-1], loss_scale)
        mine[:-1] *= root
        mine[-1] /= root
    products = columns.total(ops.gramian(mine))
    lambdas = multipliers(products)
    change = both[-1]  # the step's place: it has been used
    ops.combine(mine[:-1], lambdas, out=mine[-1])
    if roots is not None:
        mine[-1] *= root
    columns.gather(change)
    usable = products.isfinite().all()
    return torch.where(usable, -change, 0.0), torch.where(usable, lambdas, 0.0)


def step_cosines(gramian: Tensor) -> Tensor:  # [m] float64
    """Return the cosine of a step with each row, from the Gramian [m + 1, m + 1] of the rows and the step.

    Zero for a row of norm zero; NaN for a step of norm zero, and where the Gramian is not finite.
    """
    norms = gramian.diagonal().sqrt()
    cosines = gramian[:-1, -1] / (norms[:-1] * norms[-1])
    return torch.where((norms[:-1] == 0) & (norms[-1] > 0), 0.0, cosines)


def has_metric(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer divides by the root of second moments that `metric_roots` finds, as Adam
    does.

    Asked of its state after a step; before the first, of what such optimizers are told.
    """
    states = [state for state in optimizer.state.values() if state]
    if states:
        return all("exp_avg_sq" in state for state in states)
    betas = [group.get("betas") for group in optimizer.param_groups]
    return all(b is not None and len(b) >= 2 for b in betas)


def metric_roots(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    out: Sequence[Tensor],  # as parameters
) -> None:
    """Write D^(1/2) of the optimizer's metric, D = 1 / (sqrt(v_hat) + eps), for each parameter into `out`.

    v_hat is the second moment of Adam and its kin, free of its bias (with amsgrad the largest so far). Ones
    where there is no moment yet: before the first step.
    """
    group_of = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known: dict[int, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}  # by group
    for p, root in zip(parameters, out, strict=True):
        state = optimizer.state.get(p, {})
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moment is None:
            root.fill_(1.0)
            continue
        known.setdefault(group_of[id(p)], []).append((moment, root, state))
    for number, members in known.items():
        group, roots = optimizer.param_groups[number], [root for _, root, _ in members]
        torch._foreach_copy_(roots, [moment for moment, _, _ in members])
        torch._foreach_sqrt_(roots)
        # The steps of a group's parameters are alike; 0 is a state whose first step overflowed.
        step = members[0][2].get("step", group.get("step"))
        if step is not None:
            step = torch.as_tensor(step, dtype=torch.float32, device=roots[0].device).clamp_min(1)
            torch._foreach_mul_(roots, (1 - group["betas"][1] ** step).rsqrt())
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_rsqrt_(roots)


def bounded(roots: Tensor, rows: Tensor, loss_scale: Tensor | None = None) -> None:
    """Keep D^(1/2) [P] from being larger than the rows [m, P] themselves justify, in place.

    v_hat is of aggregated gradients. Where the objectives' gradients all but cancel it is nearly zero, and D so
    large that the whole correction would move that one coordinate, by hundreds of learning rates. Here v_hat
    counts as at least the largest squared entry of a row. The guarantee holds for every positive D.
    """
    steepest = rows[0].abs()
    for row in rows[1:]:
        torch.maximum(steepest, row.abs(), out=steepest)
    if loss_scale is not None:
        steepest /= loss_scale
    torch.minimum(roots, steepest.clamp_min_(1e-30).rsqrt_(), out=roots)


@torch.no_grad()
def project_step(
    parameters: Sequence[Tensor],
    before: Tensor,  # [P]
    rows: Tensor,  # [m, P]
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tensor:  # [m] float64
    """Correct the step that an optimizer just took, so that it worsens no objective to first order.

    parameters: those that the rows are about, in the rows' order; corrected in place.
    before: `flatten(parameters)` from before `optimizer.step()`.
    rows: each objective's gradient at the parameters, end to end (`jacobian.backward(..., return_rows=True)`).
        With gradients that are accumulated over several batches, the sum of their rows.
    optimizer: measure the correction in this optimizer's metric (Adam, AdamW and their kin), or in plain length
        (None).

    Returns the multipliers lambda: zero where the step was without conflict. Nothing is read on the host. See
    the module's text for what is guaranteed. On several processes that train one model the rows have to be
    those of all of them, as `jacobian.backward(..., group=)` returns them: then all make the same correction.

    Raises ValueError for shapes that do not fit, for a parameter given twice, and for an optimizer without
    second moments.
    """
    parameters = list(parameters)
    if len({id(p) for p in parameters}) < len(parameters):
        raise ValueError("project_step: a parameter is given twice: it would be corrected twice")
    sizes = [p.numel() for p in parameters]
    size = sum(sizes)
    if before.shape != (size,) or rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(
            f"project_step: parameters have {size} values; before must be [{size}] and rows [m, {size}], got "
            f"{list(before.shape)} and {list(rows.shape)}"
        )
    if optimizer is not None and not has_metric(optimizer):
        raise ValueError(
            f"project_step: {type(optimizer).__name__} has no second moments (exp_avg_sq) to measure by; "
            "leave out optimizer="
        )
    roots = None
    if optimizer is not None:
        roots = torch.empty_like(before)
        views = [part.view(p.shape) for part, p in zip(roots.split(sizes), parameters, strict=True)]
        metric_roots(optimizer, parameters, views)
    both = torch.cat([rows, (before - flatten(parameters))[None].to(rows)])
    change, lambdas = correction(both, roots)
    for p, part in zip(parameters, change.split(sizes), strict=True):
        p.add_(part.view(p.shape).to(p))
    return lambdas
