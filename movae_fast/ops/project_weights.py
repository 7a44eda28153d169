"""Project weights onto the dual cone of a Jacobian's rows, exactly: `movae::project_weights`.

UPGrad (Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization", section 3) projects each
objective's weight on its own and adds the results; DualProj projects the preference vector as a whole. Both are
quadratic programs over the m x m Gramian: min v' A v subject to v >= u. Projecting a whole step
(`step_multipliers`) is the same complementarity problem with another right-hand side. They are solved on a CPU
by csrc/projection/solver.h, on CUDA by the Triton kernel in kernels/project_weights.py.
"""

import math
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops import rows as shared
from movae_fast.ops.extension import csrc
from movae_fast.ops.registration import library, refuse_vmap, triton_kernels
from movae_fast.reference import Regularizer

Mode = Literal["upgrad", "dualproj"]

# Largest m that the CUDA solvers have room for.
MOST_ON_CUDA = 64

# As csrc/projection/project_weights.h numbers the kinds of problem, and kernels/project_weights.py names them.
KINDS = ("rows", "sum", "multipliers")


def project_weights(
    gramian: Tensor,  # [m, m]
    pref: Tensor | None = None,  # [m]
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    mode: Mode = "upgrad",
    regularizer: Regularizer = "trace",
) -> tuple[Tensor, Tensor]:  # [m] float64, [] int32
    """Return weights w [m] of an update w' J that conflicts with no row of the Jacobian J, and a status [].

    gramian: G = J J', symmetric positive semi-definite, of any floating dtype; solved in float64. Only its
        upper triangle is read.
    pref: the preference u, any floating dtype; None is 1/m each. In mode "upgrad" an objective with a
        preference of zero or less adds nothing.
    regularizer, norm_eps, reg_eps: the problem is solved for G with a little added to its diagonal. "trace"
        (TorchJD's): A = G / tr G + reg_eps I, or reg_eps I alone where tr G < norm_eps (or is 0). This hardly
        protects a row a hundred times shorter than the longest with reg_eps = 1e-4, nor one a thousand times
        shorter with 1e-6. "diagonal": A = G + reg_eps diag(G), which protects short rows as well as long ones:
        for any positive diagonal S, the weights of S G S and pref are S^-1 times the weights of G and S pref.
        reg_eps = 1e-6 is strict. A row of norm zero keeps its preference and has no effect on others; norm_eps
        is not used.
    mode: "upgrad" solves min v' A v subject to v >= u_i e_i for every i and adds up the m solutions; "dualproj"
        solves one problem with v >= u.

    The status is 0 if everything was solved; -1 for a Gramian with a NaN or an infinity, whose weights are NaN;
    else the number of problems that were not solved (never seen with a reg_eps of 1e-9 or more). It is on the
    same device, and nothing is read on the host. Not differentiable; vmap is refused. m is at most 64 on CUDA.

    Raises ValueError (shapes, m = 0, a negative epsilon, mode, regularizer) or TypeError (dtype).
    """
    m = _check(gramian)
    check_options(norm_eps, reg_eps, mode, regularizer)
    if pref is not None and (pref.dim() != 1 or pref.shape[0] != m or pref.device != gramian.device):
        refuse(f"pref must be [m]; got {list(pref.shape)} on {pref.device}", gramian)
    diagonal = regularizer == "diagonal"
    return torch.ops.movae.project_weights(gramian, pref, norm_eps, reg_eps, mode == "upgrad", diagonal)


def project_rows(
    u: Tensor,  # [..., m]
    gramian: Tensor,  # [m, m]
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    regularizer: Regularizer = "trace",
) -> tuple[Tensor, Tensor]:  # as u, float64; [] int32
    """Solve min v' A v subject to v >= u for each vector u of [..., m], as a TorchJD `DualConeProjector` does.

    Returns the solutions v, shaped as u, and a status. Arguments, status and errors are those of
    `project_weights`.
    """
    m = _check(gramian)
    check_options(norm_eps, reg_eps, "dualproj", regularizer)
    if u.dim() == 0 or u.shape[-1] != m or u.device != gramian.device:
        refuse(f"u must be [..., m]; got {list(u.shape)} on {u.device}", gramian)
    return torch.ops.movae.project_weights(gramian, u, norm_eps, reg_eps, False, regularizer == "diagonal")


def step_multipliers(
    gramian: Tensor,  # [m, m]
    slopes: Tensor,  # [m]
    *,
    reg_eps: float = 1e-9,
) -> tuple[Tensor, Tensor]:  # [m] float64, [] int32
    """Return the multipliers lambda >= 0 [m] for which s + D J' lambda is the step closest to s that worsens no
    objective.

    gramian: J D J' of the Jacobian's rows J in the metric D (D = I: `ops.gramian`), as in `project_weights`.
    slopes: J s, by how much each objective falls along the step s (parameters before minus after), to first
        order; any floating dtype.
    reg_eps: A = J D J' + reg_eps diag(J D J'), independent of the rows' lengths.

    The step is closest in the inverse of D: min (x - s)' D^-1 (x - s) subject to J x >= 0; lambda is the dual
    solution, of min 1/2 lambda' A lambda + lambda' J s. If no slope is negative, it is zero.

    Also returns a status [], as `project_weights` does. A Gramian that is not finite gives NaN and status -1,
    slopes that are not finite give NaN. Nothing is read on the host. Not differentiable; vmap is refused. m is
    at most 64 on CUDA.

    Raises ValueError (shapes, m = 0, a negative epsilon) or TypeError (dtype).
    """
    m = _check(gramian, "step_multipliers")
    if not 0 <= reg_eps < math.inf:
        raise ValueError(f"step_multipliers: reg_eps must be >= 0 and finite; got {reg_eps}")
    if slopes.shape != (m,) or slopes.device != gramian.device:
        refuse(f"slopes must be [m]; got {list(slopes.shape)} on {slopes.device}", gramian, "step_multipliers")
    if not slopes.is_floating_point():
        raise TypeError(f"step_multipliers: slopes must be floating point, got {str(slopes.dtype)[6:]}")
    return torch.ops.movae.step_multipliers(gramian, slopes, reg_eps)


def _check(gramian: Tensor, op: str = "project_weights") -> int:
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise ValueError(f"{op}: the Gramian must be [m, m] with m >= 1, got {list(gramian.shape)}")
    if not gramian.is_floating_point():
        raise TypeError(f"{op}: the Gramian must be floating point, got {str(gramian.dtype)[6:]}")
    if gramian.shape[0] > MOST_ON_CUDA and gramian.is_cuda:
        raise ValueError(f"{op}: m is at most {MOST_ON_CUDA} on CUDA, got {list(gramian.shape)}")
    return gramian.shape[0]


def check_options(norm_eps: float, reg_eps: float, mode: str, regularizer: str = "trace") -> None:
    """Raise ValueError for an unknown mode or regularizer of `project_weights`, or an epsilon that is negative
    or not finite."""
    if not (0 <= norm_eps < math.inf and 0 <= reg_eps < math.inf):
        raise ValueError(
            f"project_weights: norm_eps and reg_eps must be >= 0 and finite; got {norm_eps}, {reg_eps}"
        )
    if mode not in get_args(Mode):
        raise ValueError(f"project_weights: mode must be one of {get_args(Mode)}; got {mode!r}")
    if regularizer not in get_args(Regularizer):
        raise ValueError(
            f"project_weights: regularizer must be one of {get_args(Regularizer)}; got {regularizer!r}"
        )


def refuse(problem: str, operand: Tensor, op: str = "project_weights") -> NoReturn:
    raise ValueError(f"{op}: {problem}; the other operand is {list(operand.shape)} on {operand.device}")


# --- dispatch -------------------------------------------------------------------------------------------------


library.define(
    "project_weights(Tensor gramian, Tensor? u, float norm_eps, float reg_eps, bool sum, bool diagonal=False)"
    " -> (Tensor, Tensor)"
)
library.define("step_multipliers(Tensor gramian, Tensor slopes, float reg_eps) -> (Tensor, Tensor)")


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "project_weights", "CPU")
def _project_weights(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    return _on_cpu(gramian, u, "sum" if total else "rows", diagonal, norm_eps, reg_eps)


@torch.library.impl(library, "step_multipliers", "CPU")
def _step_multipliers(gramian: Tensor, slopes: Tensor, reg_eps: float) -> tuple[Tensor, Tensor]:
    return _on_cpu(gramian, slopes, "multipliers", True, 0.0, reg_eps)


def _on_cpu(
    gramian: Tensor, given: Tensor | None, kind: str, diagonal: bool, norm_eps: float, reg_eps: float
) -> tuple[Tensor, Tensor]:
    m = gramian.shape[0]
    gramian = gramian.double().contiguous()
    given = None if given is None else given.double().contiguous()
    if extension.missing(gramian):
        return project_in_torch(gramian, given, kind, diagonal, norm_eps, reg_eps)
    out = torch.empty(m, dtype=torch.float64) if given is None else torch.empty_like(given)
    status = torch.empty((), dtype=torch.int32)
    csrc.project_weights(
        gramian.data_ptr(),
        m,
        # Null means equal preferences: a tensor of them would cost as much as the projection.
        0 if given is None else given.data_ptr(),
        out.numel() // m,
        KINDS.index(kind),
        diagonal,
        norm_eps,
        reg_eps,
        out.data_ptr(),
        status.data_ptr(),
        torch.get_num_threads(),
    )
    return out, status


def project_in_torch(
    gramian: Tensor, given: Tensor | None, kind: str, diagonal: bool, norm_eps: float, reg_eps: float
) -> tuple[Tensor, Tensor]:
    """Solve the problems by movae_fast.reference, where the extension was not built; inputs that are not finite
    give NaN, as in the extension.

    `given` has the preferences or slopes, `kind` is one of KINDS. Returns the solutions and the status.
    """
    m = len(gramian)
    given = torch.full((m,), 1 / m, dtype=torch.float64) if given is None else given.double()
    if not gramian.isfinite().all():
        return torch.full_like(given, torch.nan), torch.tensor(-1, dtype=torch.int32)
    solved = torch.tensor(0, dtype=torch.int32)
    regularizer: reference.Regularizer = "diagonal" if diagonal else "trace"
    if kind == "sum":
        if given.isnan().any() or (given == torch.inf).any():
            return torch.full_like(given, torch.nan), solved
        return reference.project_weights(gramian, given, norm_eps, reg_eps, regularizer), solved
    rows = given.reshape(-1, m)
    usable = rows.isfinite().all(1)
    solutions = torch.full_like(rows, torch.nan)
    if kind == "multipliers":
        for r in usable.nonzero()[:, 0]:
            solutions[r] = reference.step_multipliers(gramian, rows[r], reg_eps)
    elif bool(usable.any()):
        solutions[usable] = reference.project_rows(rows[usable], gramian, norm_eps, reg_eps, regularizer)
    return solutions.view(given.shape), solved


# --- CUDA -----------------------------------------------------------------------------------------------------


@torch.library.impl(library, "project_weights", "CUDA")
def _project_weights_cuda(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    u = mean_preference(gramian) if u is None else u
    return _on_cuda(gramian, u, "sum" if total else "rows", diagonal, norm_eps, reg_eps)


@torch.library.impl(library, "step_multipliers", "CUDA")
def _step_multipliers_cuda(gramian: Tensor, slopes: Tensor, reg_eps: float) -> tuple[Tensor, Tensor]:
    return _on_cuda(gramian, slopes, "multipliers", True, 0.0, reg_eps)


def mean_preference(like: Tensor) -> Tensor:  # [m] float64
    """Return the default preference, 1/m for each row of `like` [m, ...], on its device."""
    m = like.shape[0]
    return torch.full((m,), 1 / m, dtype=torch.float64, device=like.device)


def _on_cuda(
    gramian: Tensor, given: Tensor, kind: str, diagonal: bool, norm_eps: float, reg_eps: float
) -> tuple[Tensor, Tensor]:
    m = gramian.shape[0]
    gramian, given = gramian.double().contiguous(), given.double().contiguous()
    if not shared.by_cuda_cpp():
        kernels = triton_kernels("project_weights")
        rows = given if kind == "sum" else given.view(-1, m)
        out, status = kernels.project(gramian, rows, norm_eps, reg_eps, kind, diagonal)
        return out.view(given.shape), status
    rows_of_u = given.numel() // m
    problems = m if kind == "sum" else rows_of_u
    out, status = torch.empty_like(given), torch.empty((), dtype=torch.int32, device=given.device)
    with torch.cuda.device(given.device):
        scratch = torch.empty(csrc.project_scratch_cuda(m, problems), dtype=torch.float64, device=given.device)
        csrc.project_weights_cuda(
            gramian.data_ptr(),
            m,
            given.data_ptr(),
            rows_of_u,
            KINDS.index(kind),
            diagonal,
            norm_eps,
            reg_eps,
            out.data_ptr(),
            status.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out, status


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::project_weights")
def _project_weights_fake(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor]:
    shape = gramian.shape[:1] if u is None else u.shape
    return gramian.new_empty(shape, dtype=torch.float64), gramian.new_empty((), dtype=torch.int32)


@torch.library.register_fake("movae::step_multipliers")
def _step_multipliers_fake(gramian: Tensor, slopes: Tensor, reg_eps: float) -> tuple[Tensor, Tensor]:
    return gramian.new_empty(slopes.shape, dtype=torch.float64), gramian.new_empty((), dtype=torch.int32)


# --- autograd -------------------------------------------------------------------------------------------------


refuse_vmap("project_weights", "project_rows takes many vectors of one Gramian")
refuse_vmap("step_multipliers", "call it once per step")
