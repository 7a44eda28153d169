"""Compute the Gramian of a Jacobian's rows and UPGrad's weights in one launch: `movae::upgrad_weights`."""

import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops import rows as shared
from movae_fast.ops.extension import DTYPES, csrc
from movae_fast.ops.project_weights import (
    KINDS,
    MOST_ON_CUDA,
    Mode,
    check_options,
    mean_preference,
    project_in_torch,
    refuse,
)
from movae_fast.ops.registration import library, refuse_vmap, triton_kernels
from movae_fast.ops.rows import check_rows, row_view
from movae_fast.reference import Regularizer


def upgrad_weights(
    rows: Tensor,  # [m, P]
    pref: Tensor | None = None,  # [m]
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    mode: Mode = "upgrad",
    regularizer: Regularizer = "trace",
) -> tuple[Tensor, Tensor, Tensor]:  # [m] float64, [m, m] float64, [] int32
    """Compute `gramian` and `project_weights` in one op: return the weights, the Gramian and the status.

    On CUDA this is one launch: the last block to finish its part of the Gramian adds up the parts in a fixed
    order and, up to m = 8 (16 in the C++ kernel), solves the projection; for more rows the projection is a
    second launch. `combine` then makes the update. Nothing is read on the host, so that all of it can be
    captured in a CUDA graph. Not differentiable; vmap is refused. Arguments and errors are those of the two
    ops.
    """
    check_rows("upgrad_weights", rows)
    m = rows.shape[0]
    if m == 0:
        raise ValueError(f"upgrad_weights: rows must be [m, P] with m >= 1, got {list(rows.shape)}")
    if m > MOST_ON_CUDA and rows.is_cuda:
        raise ValueError(f"upgrad_weights: m is at most {MOST_ON_CUDA} on CUDA, got rows {list(rows.shape)}")
    check_options(norm_eps, reg_eps, mode, regularizer)
    if pref is not None and (pref.dim() != 1 or pref.shape[0] != m or pref.device != rows.device):
        refuse(f"pref must be [m]; got {list(pref.shape)} on {pref.device}", rows)
    diagonal = regularizer == "diagonal"
    return torch.ops.movae.upgrad_weights(rows, pref, norm_eps, reg_eps, mode == "upgrad", diagonal)


# --- dispatch -------------------------------------------------------------------------------------------------


library.define(
    "upgrad_weights(Tensor rows, Tensor? pref, float norm_eps, float reg_eps, bool sum, bool diagonal=False)"
    " -> (Tensor, Tensor, Tensor)"
)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "upgrad_weights", "CPU")
def _upgrad_weights(
    rows: Tensor, pref: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if extension.missing(rows):
        gramian = reference.gramian(rows)
        kind = "sum" if total else "rows"
        weights, status = project_in_torch(gramian, pref, kind, diagonal, norm_eps, reg_eps)
        return weights, gramian, status
    m, columns = rows.shape
    rows, stride = row_view(rows)
    pref = None if pref is None else pref.double().contiguous()
    weights, gramian = torch.empty(m, dtype=torch.float64), torch.empty((m, m), dtype=torch.float64)
    status = torch.empty((), dtype=torch.int32)
    # Inlined: calls of the two ops' functions made a call for a small Jacobian 10 percent slower.
    threads, address = torch.get_num_threads(), gramian.data_ptr()
    csrc.gramian(rows.data_ptr(), DTYPES[rows.dtype], m, columns, stride, address, threads)
    csrc.project_weights(
        address,
        m,
        0 if pref is None else pref.data_ptr(),
        1,
        KINDS.index("sum" if total else "rows"),
        diagonal,
        norm_eps,
        reg_eps,
        weights.data_ptr(),
        status.data_ptr(),
        threads,
    )
    return weights, gramian, status


# --- CUDA -----------------------------------------------------------------------------------------------------


@torch.library.impl(library, "upgrad_weights", "CUDA")
def _upgrad_weights_cuda(
    rows: Tensor, pref: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    m, columns = rows.shape
    rows, stride = row_view(rows)
    pref = (mean_preference(rows) if pref is None else pref).double().contiguous()
    if not shared.by_cuda_cpp():
        kind = "sum" if total else "rows"
        return triton_kernels("project_weights").upgrad(rows, pref, norm_eps, reg_eps, kind, diagonal)
    weights = torch.empty_like(pref)
    gramian = torch.empty((m, m), dtype=torch.float64, device=rows.device)
    status = torch.empty((), dtype=torch.int32, device=rows.device)
    with torch.cuda.device(rows.device):
        scratch = torch.empty(csrc.upgrad_scratch_cuda(m), dtype=torch.float64, device=rows.device)
        csrc.upgrad_weights_cuda(
            rows.data_ptr(),
            DTYPES[rows.dtype],
            m,
            columns,
            stride,
            pref.data_ptr(),
            total,
            diagonal,
            norm_eps,
            reg_eps,
            weights.data_ptr(),
            gramian.data_ptr(),
            status.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            torch.cuda.current_stream().cuda_stream,
        )
    return weights, gramian, status


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::upgrad_weights")
def _upgrad_weights_fake(
    rows: Tensor, pref: Tensor | None, norm_eps: float, reg_eps: float, total: bool, diagonal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    m = rows.shape[0]
    double = torch.float64
    return (
        rows.new_empty(m, dtype=double),
        rows.new_empty((m, m), dtype=double),
        rows.new_empty((), dtype=torch.int32),
    )


# --- autograd -------------------------------------------------------------------------------------------------


refuse_vmap("upgrad_weights", "call it once per Jacobian")
