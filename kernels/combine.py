"""Sum a Jacobian's rows with weights, straight into the flat gradient: _combine_kernel and its launcher."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .devices import on_device  # noqa: TID251 (the same package, under its one name)


@triton.jit
def _combine_kernel(
    rows_ptr,  # [m, P], columns contiguous
    weights_ptr,  # [m]
    out_ptr,  # [P]
    P,
    stride,
    M: tl.constexpr,
    UNROLL: tl.constexpr,
    B: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = column < P
    wide: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([B], wide)
    if UNROLL:  # all loads of a column are under way before the first sum
        for i in tl.static_range(M):
            x = tl.load(rows_ptr + tl.full([], i, tl.int64) * stride + column, mask=inside, other=0.0)
            total += tl.load(weights_ptr + i).to(wide) * x.to(wide)
    else:
        for i in range(0, M):
            x = tl.load(rows_ptr + tl.full([], i, tl.int64) * stride + column, mask=inside, other=0.0)
            total += tl.load(weights_ptr + i).to(wide) * x.to(wide)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    rows: torch.Tensor,  # [m, P], columns contiguous
    weights: torch.Tensor,  # [m]
    out: torch.Tensor | None = None,  # [P] contiguous
    launch: Callable[[Any], Any] = lambda kernel: kernel,  # or torch.library.wrap_triton
) -> torch.Tensor:  # [P]
    """Return the weighted sum weights @ rows [P] in the rows' dtype; half precision is accumulated in
    float32."""
    m, P = rows.shape
    if out is None:
        out = torch.empty(P, dtype=rows.dtype, device=rows.device)
    if P == 0:
        return out
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    B = 2048 // max(1, rows.element_size() // 4)
    with on_device(rows):
        launch(_combine_kernel)[(triton.cdiv(P, B),)](
            rows, weights.contiguous(), out, P, rows.stride(0), M=m, UNROLL=m <= 16, B=B, num_warps=8
        )
    return out
