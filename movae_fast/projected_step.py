"""Project an optimizer's step: replace it by the closest step that worsens no objective, to first order.

An aggregator makes a *gradient* without conflict. The optimizer then rescales it and adds its momentum, and the
step that is applied may conflict again. This module corrects the applied step. With the Jacobian's rows J
[m, P], the step s that the optimizer took (parameters before minus after, so that momentum, second moments,
weight decay and clipping are all in it) and a positive diagonal metric D, the corrected step is

    s' = s + D J' lambda,   lambda = argmin over lambda >= 0 of 1/2 lambda' (J D J') lambda + lambda' J s,

the minimiser of (x - s)' D^-1 (x - s) subject to J x >= 0: objective i falls by J_i s' >= 0, to first order.
The guarantee holds for the objectives of this batch, as functions of the parameters whose gradients are the
columns of J; second-order effects of a finite step are not considered. Multiplying D by a number changes
nothing. D = I gives the smallest correction in Euclidean length; an optimizer's own D (Adam: 1 / (sqrt(v_hat) +
eps)) the smallest in the length that the optimizer's scaling defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from movae_fast import ops

# Added to the projection's Gramian, relative to each diagonal entry: small beside the cosines that count.
REG_EPS = 1e-9


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Copy tensors into one new tensor [P], flattened and end to end.

    `project_step` needs the parameters in this form from before the optimizer's step.
    """
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def multipliers(gramian: Tensor) -> Tensor:  # [m] float64
    """Return the multipliers lambda [m] of the projection, in float64.

    `gramian` [m + 1, m + 1] has the inner products of the rows of J D^(1/2), and of D^(-1/2) s as the last row.
    """
    m = len(gramian) - 1
    lambdas, _ = ops.step_multipliers(gramian[:m, :m], gramian[:m, m], reg_eps=REG_EPS)
    return lambdas


@dataclass(frozen=True)
class Columns:
    """Say which columns of the rows this process works on, and how the processes combine what they compute.

    By default one process works on all columns.
    """

    stretch: Callable[[Tensor], Tensor] = lambda tensor: tensor  # returns this process's part of [..., P]
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor  # returns the sum over the processes
    gather: Callable[[Tensor], None] = lambda row: None  # fills in the other processes' parts of a row [P]

    def gramian(self, rows: Tensor) -> Tensor:  # [m, m] float64
        """Return the Gramian of rows [m, P]: the sum over the processes of the Gramians of their stretches."""
        return self.total(ops.gramian(self.stretch(rows)))


def correction(
    both: Tensor,  # [m + 1, P] the rows J and, last, the step s; overwritten
    roots: Tensor | None = None,  # [P] D^(1/2); overwritten
    loss_scale: Tensor | None = None,  # [] factor that fp16 training has put on the rows
    columns: Columns = Columns(),
) -> tuple[Tensor, Tensor]:  # [P], [m] float64
    """Return -D J' lambda [P], which is added to the parameters to project a step, and the multipliers lambda
    [m].

    Both are zero where the Gramian is not finite. That happens when fp16 gradients overflow; the loss scaler
    has then left the step out, and there is nothing to correct.
    """
    mine = columns.stretch(both)
    if roots is not None:
        root = columns.stretch(roots)
        bounded(root, mine[:-1], loss_scale)
        mine[:-1] *= root
        mine[-1] /= root
    products = columns.total(ops.gramian(mine))
    lambdas = multipliers(products)
    change = both[-1]  # overwrites the step, which is not needed any more
    ops.combine(mine[:-1], lambdas, out=mine[-1])
    if roots is not None:
        mine[-1] *= root
    columns.gather(change)
    usable = products.isfinite().all()
    return torch.where(usable, -change, 0.0), torch.where(usable, lambdas, 0.0)


def step_cosines(gramian: Tensor) -> Tensor:  # [m] float64
    """Return the cosine of a step with each row [m], from the Gramian [m + 1, m + 1] of the rows and, last, the
    step.

    A row of zeros has cosine 0. A step of zeros, or a Gramian that is not finite, gives NaN.
    """
    norms = gramian.diagonal().sqrt()
    cosines = gramian[:-1, -1] / (norms[:-1] * norms[-1])
    return torch.where((norms[:-1] == 0) & (norms[-1] > 0), 0.0, cosines)


def has_metric(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer scales its step by second moments as Adam does, so that `metric_roots` can
    read its metric.

    After the first step the optimizer's state is examined; before it, whether every parameter group has at
    least two `betas`.
    """
    states = [state for state in optimizer.state.values() if state]
    if states:
        return all("exp_avg_sq" in state or "exp_inf" in state for state in states)
    betas = [group.get("betas") for group in optimizer.param_groups]
    return all(b is not None and len(b) >= 2 for b in betas)


def metric_roots(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    out: Sequence[Tensor],  # as parameters
) -> None:
    """Write D^(1/2), the root of the optimizer's diagonal metric D = 1 / (sqrt(v_hat) + eps), for each
    parameter into `out`.

    v_hat is the bias-corrected second moment of Adam and its kin (with amsgrad the largest so far). For Adamax,
    D is 1 / u with u its infinity norm. A parameter that has no moment yet, before its first step, gets ones.
    """
    group_of = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    known: dict[int, list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}  # by group
    for p, root in zip(parameters, out, strict=True):
        state = optimizer.state.get(p, {})
        if "exp_inf" in state:
            # The norm is 0 if all steps so far were skipped.
            torch.rsqrt(state["exp_inf"].clamp_min(1e-30), out=root)
            continue
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moment is None:
            root.fill_(1.0)
            continue
        known.setdefault(group_of[id(p)], []).append((moment, root, state))
    for number, members in known.items():
        group, roots = optimizer.param_groups[number], [root for _, root, _ in members]
        torch._foreach_copy_(roots, [moment for moment, _, _ in members])
        torch._foreach_sqrt_(roots)
        # All parameters of a group have the same step count; it is 0 if the first step was skipped for an
        # overflow.
        step = members[0][2].get("step", group.get("step"))
        if step is not None:
            step = torch.as_tensor(step, dtype=torch.float32, device=roots[0].device).clamp_min(1)
            torch._foreach_mul_(roots, (1 - group["betas"][1] ** step).rsqrt())
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_rsqrt_(roots)


def bounded(roots: Tensor, rows: Tensor, loss_scale: Tensor | None = None) -> None:
    """Lower D^(1/2) [P] in place to the value that the rows [m, P] justify.

    v_hat averages squares of aggregated gradients. Where the objectives' gradients nearly cancel, v_hat is
    close to zero and D so large that the whole correction would move that single parameter, by hundreds of
    learning rates. Here v_hat is treated as at least the largest squared entry of a row at that parameter. The
    projection's guarantee holds for every positive D. `loss_scale` is the factor by which fp16 training has
    scaled the rows.
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

    parameters: the parameters of the rows, in the rows' order; corrected in place.
    before: `flatten(parameters)` from before `optimizer.step()`.
    rows: each objective's gradient at the parameters, end to end (`jacobian.backward(..., return_rows=True)`).
        With gradients that are accumulated over several batches, the sum of their rows.
    optimizer: measure the correction's size in this optimizer's metric (Adam, AdamW and their kin); None
        measures it in Euclidean length.

    Returns the multipliers lambda [m], all zero where the step was without conflict. Nothing is read on the
    host. The text of this module says what is guaranteed. If several processes train one model, the rows must
    be averaged over all of them, as `jacobian.backward(..., group=)` returns them: then every process makes the
    same correction.

    Raises ValueError for shapes that do not fit, for a parameter that is given twice, and for an optimizer
    without second moments.
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
