"""Compute the Gramian of a Jacobian's rows in float64: _gramian_kernel, _gramian_sum_kernel and their launcher.

Products and sums are float64 whatever the dtype of the rows: reading the rows from memory, once, takes longer
than converting them. Each program goes through its part of the columns in order and keeps a sum per lane; a
second, small kernel adds the programs' Gramians in a fixed order. The number of programs depends on the shape
alone, so that the result is the same in every run and on every device.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .devices import on_device  # noqa: TID251 (the same package, under its one name)

PROGRAMS = 1024
SUM = {"Q": 64, "B": 16}  # parts and entries that one program of the sum loads at once


@triton.jit
def _load(rows_ptr, stride, i, column, m, P):
    """Load rows i at the given columns as float64, zeros outside [m, P]; bfloat16 is converted by way of
    float32."""
    inside = (i < m) & (column < P)
    x = tl.load(rows_ptr + i.to(tl.int64) * stride + column, mask=inside, other=0.0)
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(tl.float64)


@triton.jit
def _gramian_kernel(
    rows_ptr,  # [m, P], columns contiguous
    part_ptr,  # [programs, m, m] float64
    m,
    P,
    stride,
    PRODUCT: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
):
    i = tl.arange(0, M)
    first = tl.program_id(0).to(tl.int64) * B
    step = tl.num_programs(0).to(tl.int64) * B
    if PRODUCT:
        total = tl.zeros([M, M], tl.float64)
        for start in range(first, P, step):
            # One column's outer product at a time: tl.dot does not lower in float64 for rows of bfloat16,
            # nor for anything on Blackwell. The 16 columns of a step share the cache lines of their rows.
            for column in range(start, start + B):
                left = _load(rows_ptr, stride, i[:, None], column, m, P)
                right = _load(rows_ptr, stride, i[None, :], column, m, P)
                total += left * right
    else:
        lanes = tl.zeros([M, M, B], tl.float64)
        for start in range(first, P, step):
            column = start + tl.arange(0, B)[None, None, :]
            # The second load of the same entries comes from the first-level cache, in the layout the product
            # needs.
            left = _load(rows_ptr, stride, i[:, None, None], column, m, P)
            right = _load(rows_ptr, stride, i[None, :, None], column, m, P)
            lanes += left * right
        total = tl.sum(lanes, 2)
    at = tl.program_id(0) * m * m + i[:, None] * m + i[None, :]
    tl.store(part_ptr + at, total, mask=(i[:, None] < m) & (i[None, :] < m))


@triton.jit
def _gramian_sum_kernel(part_ptr, out_ptr, entries, programs, Q: tl.constexpr, B: tl.constexpr):
    # Loading one part after the other would wait for memory each time. So Q of them are loaded and added at
    # once, each in its own lane; the lanes are then added in a tree whose order depends on Q alone.
    at = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    part = tl.arange(0, Q)[:, None]
    lanes = tl.zeros([Q, B], tl.float64)
    for start in range(0, programs, Q):
        inside = (start + part < programs) & (at < entries)
        lanes += tl.load(part_ptr + (start + part) * entries + at, mask=inside, other=0.0)
    total = tl.sum(lanes, 0)
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out_ptr + at, total, mask=at < entries)


def tile(m: int) -> dict[str, int | bool]:
    """Return the tile sizes for m rows.

    Up to 8 rows, all products of a block of columns stay in registers; above 8, a program takes 16 columns at a
    time.
    """
    M = triton.next_power_of_2(m)
    if M <= 8:
        return {"PRODUCT": False, "M": M, "B": {1: 1024, 2: 512, 4: 256, 8: 64}[M]}
    return {"PRODUCT": True, "M": M, "B": 16}


def gramian(rows: torch.Tensor, launch: Callable[[Any], Any] = lambda kernel: kernel) -> torch.Tensor:
    """Return the Gramian [m, m] float64 of rows [m, P] of any floating dtype; symmetric to the last bit.

    `launch` is torch.library.wrap_triton where a compiler has to see the kernels.
    """
    m, P = rows.shape
    out = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
    if m == 0 or P == 0:
        return out
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    shape = tile(m)
    programs = min(PROGRAMS, triton.cdiv(P, shape["B"]))
    part = torch.empty(programs, m, m, dtype=torch.float64, device=rows.device)
    with on_device(rows):
        launch(_gramian_kernel)[(programs,)](rows, part, m, P, rows.stride(0), **shape, num_warps=4)
        launch(_gramian_sum_kernel)[(triton.cdiv(m * m, SUM["B"]),)](
            part, out, m * m, programs, **SUM, num_warps=4
        )
    return out
