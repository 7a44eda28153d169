"""Compute a VQ layer's forward pass after the search, and the distance to given codes: _quantize_kernel,
_code_sum_kernel, _code_error_kernel and their launchers.

The search (nearest_code.py) decides some rows only in its second launch, so everything that depends on the
index is a pass of its own; reading z once more is the small part. Counts and sums are added by atomics, in
whatever order programs finish, or, on request, over rows sorted by code, one program per code, in a fixed
order.
"""

import torch
import triton
import triton.language as tl

from .devices import on_device  # noqa: TID251 (the same package, under its one name)
from .nearest_code import _offsets, layout, nearest_code  # noqa: TID251


@triton.jit
def _quantize_kernel(
    z_ptr,
    codebook_ptr,  # [K, D]
    index_ptr,  # [N]
    z_q_ptr,  # as z, with strides of its own
    sq_err_ptr,  # [N]
    count_ptr,  # [K], zero at first
    code_sum_ptr,  # [K, D], zero at first
    N,
    D,
    inner,
    z_row,
    z_position,
    z_d,
    q_row,
    q_position,
    q_d,
    CHANNEL_FIRST: tl.constexpr,
    ATOMICS: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    valid = row < N
    index = tl.load(index_ptr + row, mask=valid, other=0)
    z_at = _offsets(row, z_row, z_position, inner, CHANNEL_FIRST)
    q_at = _offsets(row, q_row, q_position, inner, CHANNEL_FIRST)
    dtype: tl.constexpr = sq_err_ptr.dtype.element_ty
    sq_err = tl.zeros([BN], dtype)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inside = valid[:, None] & (d[None, :] < D)
        code_at = index[:, None] * D + d[None, :]
        z = tl.load(z_ptr + z_at[:, None] + d[None, :].to(tl.int64) * z_d, mask=inside, other=0.0)
        code = tl.load(codebook_ptr + code_at, mask=inside, other=0.0)
        tl.store(z_q_ptr + q_at[:, None] + d[None, :].to(tl.int64) * q_d, code, mask=inside)
        difference = z.to(dtype) - code.to(dtype)
        sq_err += tl.sum(difference * difference, 1)
        if ATOMICS:
            tl.atomic_add(code_sum_ptr + code_at, z.to(dtype), mask=inside, sem="relaxed")
    tl.store(sq_err_ptr + row, sq_err, mask=valid)
    if ATOMICS:
        tl.atomic_add(count_ptr + index, tl.full([BN], 1, tl.int32), mask=valid, sem="relaxed")


@triton.jit
def _code_sum_kernel(
    z_ptr,
    order_ptr,  # [N] rows, sorted by code and then by row
    begin_ptr,  # [K + 1] where each code's rows begin in it
    count_ptr,  # [K]
    code_sum_ptr,  # [K, D]
    D,
    inner,
    z_row,
    z_position,
    z_d,
    CHANNEL_FIRST: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin, end = tl.load(begin_ptr + k), tl.load(begin_ptr + k + 1)
    dtype: tl.constexpr = code_sum_ptr.dtype.element_ty
    total = tl.zeros([BN, BD], dtype)
    for first in range(begin, end, BN):
        at = first + tl.arange(0, BN)
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        z_at = _offsets(row, z_row, z_position, inner, CHANNEL_FIRST)
        inside = (at < end)[:, None] & (d[None, :] < D)
        z = tl.load(z_ptr + z_at[:, None] + d[None, :].to(tl.int64) * z_d, mask=inside, other=0.0)
        total += z.to(dtype)
    tl.store(code_sum_ptr + k * D + d, tl.sum(total, 0), mask=d < D)
    tl.store(count_ptr + k, (end - begin).to(tl.int32), mask=tl.program_id(1) == 0)


@triton.jit
def _code_error_kernel(
    z_ptr,
    codebook_ptr,  # [K, D]
    index_ptr,  # [N]
    sq_err_ptr,  # [N]
    N,
    K,
    D,
    inner,
    z_row,
    z_position,
    z_d,
    CHANNEL_FIRST: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    valid = row < N
    index = tl.load(index_ptr + row, mask=valid, other=0)
    # A given index may lie outside the codebook. Then nothing is read and the error is NaN, which shows in the
    # loss: a kernel cannot raise an exception.
    known = (index >= 0) & (index < K)
    z_at = _offsets(row, z_row, z_position, inner, CHANNEL_FIRST)
    dtype: tl.constexpr = sq_err_ptr.dtype.element_ty
    sq_err = tl.zeros([BN], dtype)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        inside = valid[:, None] & (d[None, :] < D)
        z = tl.load(z_ptr + z_at[:, None] + d[None, :].to(tl.int64) * z_d, mask=inside, other=0.0)
        readable = inside & known[:, None]
        code = tl.load(codebook_ptr + index[:, None] * D + d[None, :], mask=readable, other=0.0)
        difference = z.to(dtype) - code.to(dtype)
        sq_err += tl.sum(difference * difference, 1)
    tl.store(sq_err_ptr + row, tl.where(known, sq_err, float("nan")), mask=valid)


def accumulation_dtype(z: torch.Tensor) -> torch.dtype:
    """Return the dtype of squared errors and sums: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def walkable(z: torch.Tensor) -> torch.Tensor:
    """Return z itself if its positions lie at one constant stride in memory, as the kernels require, else a
    contiguous copy."""
    return z if layout(z)[0].data_ptr() == z.data_ptr() else z.contiguous()


def quantize(
    z: torch.Tensor,  # [N, D] or channel-first [B, D, *spatial]
    codebook: torch.Tensor,  # [K, D], of z's dtype
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return z_q shaped as z, index and sq_err [N] or [B, *spatial], count [K], and code_sum [K, D], as
    `ops.quantize` describes them.

    sq_err, count and code_sum are float32, or float64 if z is. A vector that holds a NaN is counted for code 0.
    """
    # Give z_q the strides that torch.empty_like gives, as the op's fake implementation promises.
    z_q = torch.empty_like(z)
    z, codebook = walkable(z), codebook.contiguous()
    written = z_q if walkable(z_q) is z_q else torch.empty_like(z_q, memory_format=torch.contiguous_format)
    K, D = codebook.shape
    shape = (z.shape[0], *z.shape[2:])
    dtype = accumulation_dtype(z)
    index = nearest_code(z, codebook)
    z, N, inner, *z_strides = layout(z)
    q_strides = layout(written)[3:]
    sq_err = torch.empty(shape, dtype=dtype, device=z.device)
    # Counted in integers: float32 stops at 2^24.
    count = torch.zeros(K, dtype=torch.int32, device=z.device)
    code_sum = torch.zeros(K, D, dtype=dtype, device=z.device)
    depth = min(triton.next_power_of_2(D), 32)
    if N == 0:
        return z_q, index, sq_err, count.to(dtype), code_sum
    with on_device(z):
        _quantize_kernel[(triton.cdiv(N, 32),)](
            z, codebook, index, written, sq_err, count, code_sum, N, D, inner, *z_strides, *q_strides,
            CHANNEL_FIRST=z.ndim == 3, ATOMICS=not deterministic, BN=32, BD=depth,
        )  # fmt: skip
        if deterministic:
            by_code, order = torch.sort(index.flatten(), stable=True)
            begin = torch.searchsorted(by_code, torch.arange(K + 1, device=z.device))
            _code_sum_kernel[(K, triton.cdiv(D, depth))](
                z, order, begin, count, code_sum, D, inner, *z_strides,
                CHANNEL_FIRST=z.ndim == 3, BN=32, BD=depth,
            )  # fmt: skip
    if written is not z_q:
        z_q.copy_(written)
    return z_q, index, sq_err, count.to(dtype), code_sum


def code_error(
    z: torch.Tensor,  # [N, D] or channel-first [B, D, *spatial]
    codebook: torch.Tensor,  # [K, D], of z's dtype
    index: torch.Tensor,  # [N] or [B, *spatial] int64; the error is NaN where it is not within [0, K)
) -> torch.Tensor:  # as index, float32, float64 where z is
    """Return ||z - codebook[index]||^2 of every vector, without a buffer of the chosen codes."""
    z, codebook, index = walkable(z), codebook.contiguous(), index.contiguous()
    sq_err = torch.empty(index.shape, dtype=accumulation_dtype(z), device=z.device)
    z, N, inner, *strides = layout(z)
    if N:
        with on_device(z):
            _code_error_kernel[(triton.cdiv(N, 32),)](
                z, codebook, index, sq_err, N, *codebook.shape, inner, *strides,
                CHANNEL_FIRST=z.ndim == 3, BN=32, BD=min(triton.next_power_of_2(codebook.shape[1]), 32),
            )  # fmt: skip
    return sq_err
