"""Compute the inner products of a Jacobian's rows in float64: `movae::gramian`, by C++ on a CPU and by Triton
elsewhere."""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import DTYPES, csrc
from movae_fast.ops.registration import launching_op, library, refuse_vmap, triton_kernels
from movae_fast.ops.rows import check_rows, row_view


def gramian(
    rows: Tensor,  # [m, P]
) -> Tensor:  # [m, m] float64
    """Return the Gramian G = J J' of a Jacobian's rows J, accumulated in float64 whatever the dtype of the
    rows.

    rows: [m, P] float32, float64, bfloat16 or float16; read once, and not copied if each row is contiguous.

    The result is symmetric to the last bit and does not depend on the number of threads. Each entry G_ij is
    within about 1e-15 |J_i| |J_j| of the exact product of the rows as stored. A NaN in row i affects only row
    and column i of G. Differentiable; vmap is refused. m = 0 gives [0, 0], P = 0 gives zeros.

    Raises ValueError (not two-dimensional) or TypeError (dtype).
    """
    check_rows("gramian", rows)
    if rows.is_cpu and not (rows.requires_grad and torch.is_grad_enabled()):
        return torch.ops.movae.gramian_cpu(rows)
    return _gramian(rows)


# --- dispatch -------------------------------------------------------------------------------------------------


library.define("gramian_cpu(Tensor rows) -> Tensor")
library.define("gramian_backward(Tensor grad, Tensor rows) -> Tensor")


@launching_op("movae::gramian")
def _gramian(rows: Tensor) -> Tensor:
    if rows.is_cpu:
        return torch.ops.movae.gramian_cpu(rows)
    return triton_kernels("gramian").gramian(rows, wrap_triton)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "gramian_cpu", "CPU")
def _gramian_cpu(rows: Tensor) -> Tensor:
    if extension.missing(rows):
        return reference.gramian(rows)
    m, columns = rows.shape
    rows, stride = row_view(rows)
    out = torch.empty((m, m), dtype=torch.float64)
    csrc.gramian(
        rows.data_ptr(),
        DTYPES[rows.dtype],
        m,
        columns,
        stride,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::gramian_cpu")
def _gramian_fake(rows: Tensor) -> Tensor:
    m = rows.shape[0]
    return rows.new_empty((m, m), dtype=torch.float64)


@torch.library.register_fake("movae::gramian_backward")
def _gramian_backward_fake(grad: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


# --- autograd -------------------------------------------------------------------------------------------------


@torch.library.impl(library, "gramian_backward", "CompositeExplicitAutograd")
def _gramian_backward(grad: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient at the rows, (dG + dG') J, in the rows' dtype."""
    both = grad + grad.T
    return (both @ rows.double()).to(rows.dtype)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.movae.gramian_backward(grad, *ctx.saved_tensors)


_gramian.register_autograd(_differentiate, setup_context=_save)


for _name in ("gramian", "gramian_cpu", "gramian_backward"):
    refuse_vmap(_name, "call it once per Jacobian")
