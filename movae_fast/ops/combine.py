"""Sum a Jacobian's rows with weights: `movae::combine`, by C++ on a CPU and by Triton elsewhere."""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import DTYPES, csrc
from movae_fast.ops.registration import launching_op, library, refuse_vmap, triton_kernels
from movae_fast.ops.rows import check_rows, row_view

# Bytes from which on the allocator asks the system for a result's memory at every call.
LARGE = 8 << 20


def combine(
    rows: Tensor,  # [m, P]
    weights: Tensor,  # [m]
    out: Tensor | None = None,  # [P]
) -> Tensor:  # [P]
    """Return the update w' J = sum over i of weights[i] rows[i], in the rows' dtype and in one pass over them.

    rows: [m, P] float32, float64, bfloat16 or float16; not copied if each row is contiguous. weights: [m], any
    floating dtype; float64 as `project_weights` returns them. out: where to write, contiguous [P] of the rows'
    dtype; it is returned. Not differentiable then.

    The sum is accumulated row by row in float32 (float64 for float64 rows) and rounded once. Differentiable in
    rows and weights; vmap is refused. m = 0 gives zeros.

    Raises ValueError (shapes, devices) or TypeError (dtypes), showing both operands.
    """
    check_rows("combine", rows)
    if weights.dim() != 1 or weights.shape[0] != rows.shape[0] or weights.device != rows.device:
        raise ValueError(
            f"combine: weights must be [m] on the rows' device; got weights {list(weights.shape)} on "
            f"{weights.device}, rows {list(rows.shape)} on {rows.device}"
        )
    if not weights.is_floating_point():
        raise TypeError(f"combine: weights must be floating point, got {str(weights.dtype)[6:]}")
    if out is not None:
        return _combine_into(rows, weights, out)
    differentiated = torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad)
    if rows.is_cpu and not differentiated:
        return torch.ops.movae.combine_cpu(rows, weights)
    return _combine(rows, weights)


def _combine_into(rows: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    if out.shape != rows.shape[1:] or out.device != rows.device or not out.is_contiguous():
        raise ValueError(
            f"combine: out must be contiguous [P] on the rows' device; got out {list(out.shape)} on "
            f"{out.device}, rows {list(rows.shape)} on {rows.device}"
        )
    if out.dtype != rows.dtype:
        raise TypeError(
            f"combine: out must have the rows' dtype; got {str(out.dtype)[6:]} and {str(rows.dtype)[6:]}"
        )
    if torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad):
        raise ValueError("combine: with `out` it is not differentiable; detach rows and weights")
    torch.ops.movae.combine_out(rows, weights, out)
    return out


# --- dispatch -------------------------------------------------------------------------------------------------


library.define("combine_cpu(Tensor rows, Tensor weights) -> Tensor")
library.define("combine_out(Tensor rows, Tensor weights, Tensor(a!) out) -> ()")
library.define("combine_backward(Tensor grad, Tensor rows, Tensor weights) -> (Tensor, Tensor)")


@launching_op("movae::combine")
def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    if rows.is_cpu:
        return torch.ops.movae.combine_cpu(rows, weights)
    return triton_kernels("combine").combine(rows, weights, launch=wrap_triton)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.impl(library, "combine_cpu", "CPU")
def _combine_cpu(rows: Tensor, weights: Tensor) -> Tensor:
    out = torch.empty(rows.shape[1], dtype=rows.dtype)
    if out.nbytes >= LARGE and csrc is not None:
        csrc.prefer_huge_pages(out.data_ptr(), out.nbytes)
    _combine_out(rows, weights, out)
    return out


@torch.library.impl(library, "combine_out", "CPU")
def _combine_out(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    if extension.missing(rows):
        wide = torch.promote_types(rows.dtype, torch.float32)
        out.copy_(reference.combine(rows.to(wide), weights))  # rounded once
        return
    m, columns = rows.shape
    rows, stride = row_view(rows)
    weights = weights.double().contiguous()
    csrc.combine(
        rows.data_ptr(),
        DTYPES[rows.dtype],
        m,
        columns,
        stride,
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


# --- CUDA -----------------------------------------------------------------------------------------------------


@torch.library.impl(library, "combine_out", "CUDA")
def _combine_out_cuda(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    triton_kernels("combine").combine(rows, weights, out)


# --- fake -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("movae::combine_cpu")
def _combine_cpu_fake(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1])


@torch.library.register_fake("movae::combine_out")
def _combine_out_fake(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("movae::combine_backward")
def _combine_backward_fake(grad: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


# --- autograd -------------------------------------------------------------------------------------------------


@torch.library.impl(library, "combine_backward", "CompositeExplicitAutograd")
def _combine_backward(grad: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.outer(weights.to(grad.dtype), grad), (rows.double() @ grad.double()).to(weights.dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.movae.combine_backward(grad, *ctx.saved_tensors)


_combine.register_autograd(_differentiate, setup_context=_save)


for _name in ("combine", "combine_cpu", "combine_out", "combine_backward"):
    refuse_vmap(_name, "call it once per Jacobian")
