"""The projection of weights onto the dual cone of a Jacobian's rows: `movae::project_weights`, exact.

UPGrad (Quinton & Rey 2024, "Jacobian Descent for Multi-Objective Optimization", section 3) projects each
objective's weight alone and adds up; DualProj projects the preference as a whole. Both are quadratic programs
over the m x m Gramian: min v' A v subject to v >= u. csrc/solver.h solves them on a CPU and on CUDA.
"""

from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

from movae_fast.ops import extension
from movae_fast.ops import rows as shared
from movae_fast.ops.extension import csrc
from movae_fast.ops.registration import library, refuse_vmap

Mode = Literal["upgrad", "dualproj"]

# What the tableaus of CUDA's solver are laid out for.
MOST_ON_CUDA = 64


def project_weights(
    gramian: Tensor,  # [m, m]
    pref: Tensor | None = None,  # [m]
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    mode: Mode = "upgrad",
) -> tuple[Tensor, Tensor]:  # [m] float64, [] int32
    """Weights w of the update w' J that conflicts with no row of the Jacobian J, and a status.

    gramian: G = J J', symmetric positive semi-definite; float64 as `ops.gramian` makes it, or any floating
        dtype (it is solved in float64). Only its upper triangle is read on a CPU.
    pref: the preference u, any floating dtype; None is 1/m each. In mode "upgrad" an objective with a
        preference of zero or less adds nothing.
    norm_eps, reg_eps: A = G / tr G + reg_eps I, or reg_eps I alone where tr G < norm_eps (or is 0). TorchJD's
        defaults; with them a row a hundred times shorter than the longest is hardly protected. With a
        float64 Gramian, norm_eps = 0 and reg_eps = 1e-6 are safe.
    mode: "upgrad" solves min v' A v subject to v >= u_i e_i for every i and adds up the m solutions;
        "dualproj" solves one problem with v >= u.

    Returns the weights and, on the same device, a status: 0 when all is solved, -1 for a Gramian with a NaN or
    an infinity, whose weights are NaN, else the number of problems that did not reach their solution (seen
    only with reg_eps below 1e-8 on rows that all but coincide). Nothing is read on the host. Not
    differentiable; vmap is refused. m is at most 64 on CUDA.

    Raises ValueError (shapes, m = 0, a negative epsilon, mode) or TypeError (dtype).
    """
    m = _check(gramian)
    check_options(norm_eps, reg_eps, mode)
    if pref is not None and (pref.dim() != 1 or pref.shape[0] != m or pref.device != gramian.device):
        refuse(f"pref must be [m]; got {list(pref.shape)} on {pref.device}", gramian)
    return torch.ops.movae.project_weights(gramian, pref, norm_eps, reg_eps, mode == "upgrad")


def project_rows(
    u: Tensor,  # [..., m]
    gramian: Tensor,  # [m, m]
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:  # as u, float64; [] int32
    """min v' A v subject to v >= u for each vector u, what a TorchJD `DualConeProjector` computes.

    Arguments, status and errors as `project_weights`.
    """
    m = _check(gramian)
    check_options(norm_eps, reg_eps, "dualproj")
    if u.dim() == 0 or u.shape[-1] != m or u.device != gramian.device:
        refuse(f"u must be [..., m]; got {list(u.shape)} on {u.device}", gramian)
    return torch.ops.movae.project_weights(gramian, u, norm_eps, reg_eps, False)


def _check(gramian: Tensor) -> int:
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise ValueError(f"project_weights: the Gramian must be [m, m] with m >= 1, got {list(gramian.shape)}")
    if not gramian.is_floating_point():
        raise TypeError(f"project_weights: the Gramian must be floating point, got {str(gramian.dtype)[6:]}")
    if gramian.shape[0] > MOST_ON_CUDA and gramian.is_cuda:
        raise ValueError(f"project_weights: m is at most {MOST_ON_CUDA} on CUDA, got {list(gramian.shape)}")
    return gramian.shape[0]


def check_options(norm_eps: float, reg_eps: float, mode: str) -> None:
    if norm_eps < 0 or reg_eps < 0:
        raise ValueError(f"project_weights: norm_eps and reg_eps must be >= 0; got {norm_eps}, {reg_eps}")
    if mode not in get_args(Mode):
        raise ValueError(f"project_weights: mode must be one of {get_args(Mode)}; got {mode!r}")


def refuse(problem: str, operand: Tensor) -> NoReturn:
    raise ValueError(
        f"project_weights: {problem}; the other operand is {list(operand.shape)} on {operand.device}"
    )


library.define(
    "project_weights(Tensor gramian, Tensor? u, float norm_eps, float reg_eps, bool sum) -> (Tensor, Tensor)"
)


@torch.library.impl(library, "project_weights", "CPU")
def _project_weights(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool
) -> tuple[Tensor, Tensor]:
    m = gramian.shape[0]
    gramian = gramian.double().contiguous()
    u = None if u is None else u.double().contiguous()
    out = torch.empty(m, dtype=torch.float64) if u is None else torch.empty_like(u)
    status = torch.empty((), dtype=torch.int32)
    if extension.missing(gramian):
        return extension.project_weights(gramian, u, norm_eps, reg_eps, total)
    csrc.project_weights(
        gramian.data_ptr(),
        m,
        0 if u is None else u.data_ptr(),  # the mean: to make it would cost as much as a small projection
        out.numel() // m,
        total,
        norm_eps,
        reg_eps,
        out.data_ptr(),
        status.data_ptr(),
        shared.isa,
        torch.get_num_threads(),
    )
    return out, status


@torch.library.impl(library, "project_weights", "CUDA")
def _project_weights_cuda(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool
) -> tuple[Tensor, Tensor]:
    m = gramian.shape[0]
    if u is None:
        u = torch.full((m,), 1 / m, dtype=torch.float64, device=gramian.device)
    gramian, u = gramian.double().contiguous(), u.double().contiguous()
    out, status = torch.empty_like(u), torch.empty((), dtype=torch.int32, device=u.device)
    if not hasattr(csrc, "project_weights_cuda"):
        raise RuntimeError("project_weights: built without its CUDA part; set CUDA_HOME and build again")
    scratch = torch.empty(csrc.project_scratch_cuda(m, u.numel() // m), dtype=torch.float64, device=u.device)
    with torch.cuda.device(u.device):
        csrc.project_weights_cuda(
            gramian.data_ptr(),
            m,
            u.data_ptr(),
            u.numel() // m,
            total,
            norm_eps,
            reg_eps,
            out.data_ptr(),
            status.data_ptr(),
            scratch.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    return out, status


@torch.library.register_fake("movae::project_weights")
def _project_weights_fake(
    gramian: Tensor, u: Tensor | None, norm_eps: float, reg_eps: float, total: bool
) -> tuple[Tensor, Tensor]:
    shape = gramian.shape[:1] if u is None else u.shape
    return gramian.new_empty(shape, dtype=torch.float64), gramian.new_empty((), dtype=torch.int32)


refuse_vmap("project_weights", "project_rows takes many vectors of one Gramian")
