"""Compute log q(z) and sum_d log q(z_d) of the aggregate posterior: _tc_terms_kernel, its two backward kernels
and their launchers.

A program handles a few samples (or, for the gradients of mu and logvar, a few posteriors) and goes through all
of the other kind. Tiles are [samples, posteriors, dimensions]; every lane of a tile keeps its own running sum,
so that each element costs one exponential and one reduction over dimensions; lanes are reduced once, at the
end.
"""

import torch
import triton
import triton.language as tl

from .devices import on_device  # noqa: TID251 (the same package, under its one name)


@triton.jit
def _weight(i, j, batch, n_data, STRATIFIED: tl.constexpr, DTYPE: tl.constexpr):
    """Return the importance weights W_ij [I, J], divided by the value that most pairs have."""
    b = tl.full([], batch, DTYPE)
    n = tl.full([], n_data, DTYPE)
    one = tl.full([], 1, DTYPE)
    if STRATIFIED:
        other = tl.where(j[None, :] == ((i + 1) % batch)[:, None], (n - b + 1) / n, one)
        return tl.where(j[None, :] == i[:, None], (b - 1) / n, other)
    return tl.zeros([i.shape[0], j.shape[0]], DTYPE) + 1


@triton.jit
def _log_common_weight(batch, n_data, STRATIFIED: tl.constexpr, DTYPE: tl.constexpr):
    if STRATIFIED:
        return -tl.log(tl.full([], batch, tl.float64) - 1).to(DTYPE)
    return -(tl.log(tl.full([], batch, tl.float64)) + tl.log(tl.full([], n_data, tl.float64))).to(DTYPE)


@triton.jit
def _load(pointer, rows, d, batch, dims):
    """Load the given rows and columns d of a contiguous matrix [batch, dims]; zeros outside it."""
    inside = (rows[:, None] < batch) & (d[None, :] < dims)
    return tl.load(pointer + rows[:, None].to(tl.int64) * dims + d[None, :], mask=inside, other=0.0)


@triton.jit
def _density(z, mu, logvar, j, d, batch, dims):
    """Return z - mu, 1 / variance and the log density of each sample i under each posterior j, [I, J, D].

    Dimensions in the padding have log density 0 and so add nothing to a sum over dimensions; posteriors in the
    padding have -inf.
    """
    diff = z[:, None, :] - mu[None, :, :]
    precision = tl.exp(-logvar)[None, :, :]
    log_q = -0.5 * (1.8378770664093453 + logvar[None, :, :] + diff * diff * precision)
    log_q = tl.where((d < dims)[None, None, :], log_q, 0.0)
    log_q = tl.where((j < batch)[None, :, None], log_q, float("-inf"))
    return diff, precision, log_q


@triton.jit
def _accumulate(top, total, x, weight):
    """Add exp(x) * weight to the running log-sum-exp (`top`, `total`) of every lane.

    One of exp(x - top) and exp(top - x) is always 1, so one exponential is enough.
    """
    e = tl.exp(-tl.abs(x - top))
    rises = x > top
    total = tl.where(rises, total * e + weight, total + e * weight)
    return tl.where(rises, x, top), total


@triton.jit
def _finish(top, total, axis: tl.constexpr):
    """Merge the log-sum-exp of all lanes of an axis; return its maximum and its sum relative to the maximum.

    `top` is finite, since lanes start at the lowest finite number, not at -inf.
    """
    highest = tl.max(top, axis)
    shifted = tl.exp(top - tl.expand_dims(highest, axis))
    return highest, tl.sum(total * shifted, axis)


@triton.jit(do_not_specialize=["n_data"])
def _tc_terms_kernel(
    z_ptr,  # [B, D]
    mu_ptr,  # [B, D]
    logvar_ptr,  # [B, D]
    log_q_z_ptr,  # [B]
    log_prod_q_z_ptr,  # [B]
    top_ptr,  # [B, D + 1]: for the backward, largest log density of each dimension and, last, of the joint,
    total_ptr,  # [B, D + 1]: and the sum of exp(log density - largest)
    batch,
    dims,
    n_data,
    LOWEST: tl.constexpr,
    STRATIFIED: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    D: tl.constexpr,
):
    i = tl.program_id(0) * I + tl.arange(0, I)
    d = tl.arange(0, D)
    z = _load(z_ptr, i, d, batch, dims)
    dtype: tl.constexpr = z.dtype
    top = tl.full([I, J, D], LOWEST, dtype)
    total = tl.zeros([I, J, D], dtype)
    joint_top = tl.full([I, J], LOWEST, dtype)
    joint_total = tl.zeros([I, J], dtype)
    for j0 in range(0, batch, J):
        j = j0 + tl.arange(0, J)
        mu = _load(mu_ptr, j, d, batch, dims)
        logvar = _load(logvar_ptr, j, d, batch, dims)
        _, _, log_q = _density(z, mu, logvar, j, d, batch, dims)
        weight = _weight(i, j, batch, n_data, STRATIFIED, dtype)
        top, total = _accumulate(top, total, log_q, weight[:, :, None])
        joint_top, joint_total = _accumulate(joint_top, joint_total, tl.sum(log_q, 2), weight)
    log_w = _log_common_weight(batch, n_data, STRATIFIED, dtype)
    top, total = _finish(top, total, 1)
    joint_top, joint_total = _finish(joint_top, joint_total, 1)
    lse = tl.where((d < dims)[None, :], top + tl.log(total) + log_w, 0.0)
    tl.store(log_q_z_ptr + i, joint_top + tl.log(joint_total) + log_w, mask=i < batch)
    tl.store(log_prod_q_z_ptr + i, tl.sum(lse, 1), mask=i < batch)
    inside = (i[:, None] < batch) & (d[None, :] < dims)
    row = i.to(tl.int64) * (dims + 1)
    tl.store(top_ptr + row[:, None] + d[None, :], top, mask=inside)
    tl.store(total_ptr + row[:, None] + d[None, :], total, mask=inside)
    tl.store(top_ptr + row + dims, joint_top, mask=i < batch)
    tl.store(total_ptr + row + dims, joint_total, mask=i < batch)


@triton.jit
def _load_samples(z_ptr, top_ptr, total_ptr, grad_q_ptr, grad_prod_ptr, i, d, batch, dims):
    """Load for the backward pass: z [I, D], the largest log densities per dimension [I, D] and of the joint
    [I], and the upstream gradients divided by the sums of both softmaxes, [I, D] and [I].

    Samples in the padding, and those with density 0 under every posterior, have zero gradients.
    """
    z = _load(z_ptr, i, d, batch, dims)
    row = i.to(tl.int64) * (dims + 1)
    inside = (i[:, None] < batch) & (d[None, :] < dims)
    top = tl.load(top_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
    total = tl.load(total_ptr + row[:, None] + d[None, :], mask=inside, other=0.0)
    joint_top = tl.load(top_ptr + row + dims, mask=i < batch, other=0.0)
    joint_total = tl.load(total_ptr + row + dims, mask=i < batch, other=0.0)
    grad_q = tl.load(grad_q_ptr + i, mask=i < batch, other=0.0)
    grad_prod = tl.load(grad_prod_ptr + i, mask=i < batch, other=0.0)
    grad_dim = tl.where(total == 0, 0.0, grad_prod[:, None] / tl.where(total == 0, 1.0, total))
    grad_joint = tl.where(joint_total == 0, 0.0, grad_q / tl.where(joint_total == 0, 1.0, joint_total))
    return z, top, joint_top, grad_dim, grad_joint


@triton.jit
def _responsibility(log_q, weight, top, joint_top, grad_dim, grad_joint, d, dims):
    """Return d loss / d log q(z_id | x_j), [I, J, D]: the weights of both softmaxes times the gradients of
    their outputs.

    The maxima come from the forward pass, where log q is computed by the same operations, so that their
    difference is exact where it matters. Using log q(z) instead, which is rounded at its own magnitude, would
    make the error several times larger.
    """
    p = grad_joint[:, None] * tl.exp(tl.sum(log_q, 2) - joint_top[:, None]) * weight
    q = grad_dim[:, None, :] * tl.exp(log_q - top[:, None, :]) * weight[:, :, None]
    return tl.where((d < dims)[None, None, :], p[:, :, None] + q, 0.0)


@triton.jit(do_not_specialize=["n_data"])
def _tc_terms_grad_z_kernel(
    z_ptr,
    mu_ptr,
    logvar_ptr,
    top_ptr,
    total_ptr,
    grad_q_ptr,  # [B]
    grad_prod_ptr,  # [B]
    grad_z_ptr,  # [B, D]
    batch,
    dims,
    n_data,
    STRATIFIED: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    D: tl.constexpr,
):
    i = tl.program_id(0) * I + tl.arange(0, I)
    d = tl.arange(0, D)
    z, top, joint_top, grad_dim, grad_joint = _load_samples(
        z_ptr, top_ptr, total_ptr, grad_q_ptr, grad_prod_ptr, i, d, batch, dims
    )
    dtype: tl.constexpr = z.dtype
    grad_z = tl.zeros([I, J, D], dtype)
    for j0 in range(0, batch, J):
        j = j0 + tl.arange(0, J)
        mu = _load(mu_ptr, j, d, batch, dims)
        logvar = _load(logvar_ptr, j, d, batch, dims)
        diff, precision, log_q = _density(z, mu, logvar, j, d, batch, dims)
        weight = _weight(i, j, batch, n_data, STRATIFIED, dtype)
        r = _responsibility(log_q, weight, top, joint_top, grad_dim, grad_joint, d, dims)
        grad_z -= r * diff * precision
    inside = (i[:, None] < batch) & (d[None, :] < dims)
    tl.store(grad_z_ptr + i[:, None].to(tl.int64) * dims + d[None, :], tl.sum(grad_z, 1), mask=inside)


@triton.jit(do_not_specialize=["n_data"])
def _tc_terms_grad_posterior_kernel(
    z_ptr,
    mu_ptr,
    logvar_ptr,
    top_ptr,
    total_ptr,
    grad_q_ptr,  # [B]
    grad_prod_ptr,  # [B]
    grad_mu_ptr,  # [B, D]
    grad_logvar_ptr,  # [B, D]
    batch,
    dims,
    n_data,
    STRATIFIED: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    D: tl.constexpr,
):
    j = tl.program_id(0) * J + tl.arange(0, J)
    d = tl.arange(0, D)
    mu = _load(mu_ptr, j, d, batch, dims)
    logvar = _load(logvar_ptr, j, d, batch, dims)
    dtype: tl.constexpr = mu.dtype
    grad_mu = tl.zeros([I, J, D], dtype)
    grad_logvar = tl.zeros([I, J, D], dtype)
    for i0 in range(0, batch, I):
        i = i0 + tl.arange(0, I)
        z, top, joint_top, grad_dim, grad_joint = _load_samples(
            z_ptr, top_ptr, total_ptr, grad_q_ptr, grad_prod_ptr, i, d, batch, dims
        )
        diff, precision, log_q = _density(z, mu, logvar, j, d, batch, dims)
        weight = _weight(i, j, batch, n_data, STRATIFIED, dtype)
        r = _responsibility(log_q, weight, top, joint_top, grad_dim, grad_joint, d, dims)
        # A sample outside has gradient 0, but its exponential may be inf.
        r = tl.where((i < batch)[:, None, None], r, 0.0)
        grad_mu += r * diff * precision
        grad_logvar += 0.5 * r * (diff * diff * precision - 1)
    inside = (j[:, None] < batch) & (d[None, :] < dims)
    to = j[:, None].to(tl.int64) * dims + d[None, :]
    tl.store(grad_mu_ptr + to, tl.sum(grad_mu, 0), mask=inside)
    tl.store(grad_logvar_ptr + to, tl.sum(grad_logvar, 0), mask=inside)


def tile(dims: int, itemsize: int = 4) -> dict[str, int]:
    """Return the sides of a nearly cubic tile [I, J, D] of about 2048 float32 elements, of which three fit the
    registers of 128 threads."""
    D = triton.next_power_of_2(max(dims, 1))
    side = 1
    while 4 * side * side * D * itemsize <= 8192:
        side *= 2
    return {"I": side, "J": side, "D": D}


def tc_terms(
    z: torch.Tensor,  # [B, D] float32 or float64, contiguous, as are the others
    mu: torch.Tensor,  # [B, D]
    logvar: torch.Tensor,  # [B, D]
    n_data: int,
    stratified: bool,
    wrap=lambda kernel: kernel,
) -> tuple[torch.Tensor, ...]:  # log_q_z [B], log_prod_q_z [B], top [B, D + 1], total [B, D + 1]
    """Launch the forward kernel. `wrap` is torch.library.wrap_triton where a compiler has to see the launch.

    Returns log q(z) and sum_d log q(z_d), and, for the backward pass, the largest log densities and the sums of
    exp(log density - largest).
    """
    batch, dims = z.shape
    log_q_z, log_prod_q_z = z.new_empty(batch), z.new_empty(batch)
    top, total = z.new_empty(batch, dims + 1), z.new_empty(batch, dims + 1)
    if batch:
        shape = tile(dims, z.element_size())
        with on_device(z):
            wrap(_tc_terms_kernel)[(triton.cdiv(batch, shape["I"]),)](
                z, mu, logvar, log_q_z, log_prod_q_z, top, total, batch, dims, n_data,
                LOWEST=torch.finfo(z.dtype).min, STRATIFIED=stratified, **shape, num_warps=4,
            )  # fmt: skip
    return log_q_z, log_prod_q_z, top, total


def tc_terms_backward(
    grad_log_q_z: torch.Tensor,  # [B]
    grad_log_prod_q_z: torch.Tensor,  # [B]
    z: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    top: torch.Tensor,
    total: torch.Tensor,
    n_data: int,
    stratified: bool,
    wrap=lambda kernel: kernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # gradients of z, mu, logvar
    """Launch the backward kernels and return the gradients of z, mu and logvar.

    One kernel sums over posteriors, the other over samples; without atomics, so the result is reproducible.
    """
    batch, dims = z.shape
    grad_z, grad_mu, grad_logvar = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
    if batch:
        shape = tile(dims, z.element_size())
        saved = (z, mu, logvar, top, total, grad_log_q_z, grad_log_prod_q_z)
        grid = (triton.cdiv(batch, shape["I"]),)
        with on_device(z):
            wrap(_tc_terms_grad_z_kernel)[grid](
                *saved, grad_z, batch, dims, n_data, STRATIFIED=stratified, **shape, num_warps=4
            )
            wrap(_tc_terms_grad_posterior_kernel)[grid](
                *saved, grad_mu, grad_logvar, batch, dims, n_data, STRATIFIED=stratified, **shape, num_warps=4
            )
    return grad_z, grad_mu, grad_logvar
