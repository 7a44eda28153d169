"""The projection of an optimizer's step: the closest step to it that worsens no objective, to first order.

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

from collections.abc import Sequence
from typing import Literal

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
    """Return lambda from the Gramian [m + 1, m + 1] of J D^(1/2) with D^(-1/2) s as its last row.

    Zero where it is not finite: an overflow in fp16, whose step the loss scale left out.
    """
    m = len(gramian) - 1
    found, _ = ops.step_multipliers(gramian[:m, :m], gramian[:m, m], reg_eps=REG_EPS)
    return torch.where(found.isfinite(), found, 0.0)


def step_cosines(gramian: Tensor) -> Tensor:  # [m] float64
    """Return the cosine of a step with each row, from the Gramian [m + 1, m + 1] of the rows and the step.

    Zero for a row or a step of norm zero.
    """
    norms = gramian.diagonal().sqrt()
    scale = norms[:-1] * norms[-1]
    return torch.where(scale > 0, gramian[:-1, -1] / scale, 0.0)


def has_metric(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides by the root of second moments, as Adam does (`metric_roots`)."""
    betas = [group.get("betas") for group in optimizer.param_groups]
    return all(b is not None and len(b) >= 2 for b in betas)


def metric_roots(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    out: Sequence[Tensor],  # as parameters
) -> None:
    """Write D^(1/2) of the optimizer's metric, D = 1 / (sqrt(v_hat) + eps), for each parameter into `out`.

    v_hat is the second moment `exp_avg_sq` of Adam and its kin, free of its bias. Ones where there is no moment
    yet: before the first step.
    """
    known = []
    for p, root in zip(parameters, out, strict=True):
        moment = optimizer.state.get(p, {}).get("exp_avg_sq")
        if moment is None:
            root.fill_(1.0)
        else:
            known.append((p, moment, root))
    if not known:
        return
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    roots = [root for _, _, root in known]
    torch._foreach_copy_(roots, [moment for _, moment, _ in known])
    torch._foreach_sqrt_(roots)
    unbiased: dict[int, float | Tensor] = {}  # the steps of a group's parameters are alike
    for p, _, _ in known:
        group = groups[id(p)]
        if id(group) not in unbiased:
            step = optimizer.state[p].get("step", group.get("step"))
            bias = 1 - group["betas"][1] ** step if step is not None else 1.0
            unbiased[id(group)] = bias.rsqrt().float() if isinstance(bias, Tensor) else bias**-0.5
    for key, factor in unbiased.items():
        mine = [root for p, _, root in known if id(groups[id(p)]) == key]
        eps = next(groups[id(p)]["eps"] for p, _, _ in known if id(groups[id(p)]) == key)
        torch._foreach_mul_(mine, factor if not isinstance(factor, Tensor) else factor.to(mine[0].device))
        torch._foreach_add_(mine, eps)
    torch._foreach_rsqrt_(roots)


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
    optimizer: measure the correction in this optimizer's metric (Adam, AdamW and their kin), or in plain length
        (None).

    Returns the multipliers lambda: zero where the step was without conflict. Nothing is read on the host. See
    the module's text for what is guaranteed.

    Raises ValueError for shapes that do not fit, and for an optimizer without second moments.
    """
    parameters = list(parameters)
    sizes = [p.numel() for p in parameters]
    size = sum(sizes)
    if before.shape != (size,) or rows.dim() != 2 or rows.shape[1] != size:
        raise ValueError(
            f"project_step: parameters have {size} values; before must be [{size}] and rows [m, {size}], got "
            f"{list(before.shape)} and {list(rows.shape)}"
        )
    if optimizer is not None and not has_metric(optimizer):
        raise ValueError(
            f"project_step: {type(optimizer).__name__} has no second moments to measure by; "
            "leave out optimizer="
        )
    both = torch.cat([rows, (before - flatten(parameters))[None].to(rows)])
    root = None
    if optimizer is not None:
        root = torch.empty_like(before)
        views = [part.view(p.shape) for part, p in zip(root.split(sizes), parameters, strict=True)]
        metric_roots(optimizer, parameters, views)
        both[:-1] *= root
        both[-1] /= root
    found = multipliers(ops.gramian(both))
    correction = ops.combine(both[:-1], found)
    if root is not None:
        correction *= root
    for p, part in zip(parameters, correction.split(sizes), strict=True):
        p.sub_(part.view(p.shape).to(p))
    return found
