"""Compute the terms of the total correlation: `movae::tc_terms`, by C++ on a CPU and by Triton elsewhere."""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from movae_fast import reference
from movae_fast.ops import extension
from movae_fast.ops.extension import csrc
from movae_fast.ops.registration import launching_op, refuse_vmap, triton_kernels
from movae_fast.reference import TCEstimator


def tc_terms(
    z: Tensor,  # [B, D] samples of the posteriors
    mu: Tensor,  # [B, D]
    logvar: Tensor,  # [B, D]
    n_data: int,
    estimator: TCEstimator = "mws",
) -> tuple[Tensor, Tensor]:  # [B], [B]
    """Return log q(z_i) and sum_d log q(z_id) of the aggregate posterior q(z) = E_x q(z|x), in nats, [B] each.

    They are estimated from the batch by minibatch-weighted ("mws", biased) or minibatch-stratified ("mss",
    unbiased) sampling from a training set of `n_data` examples: Chen et al. 2018, "Isolating Sources of
    Disentanglement in VAEs", eq. S3-S6. The mean of their difference is the total correlation. Equals
    `movae_fast.reference.tc_terms`, with memory O(B D).

    bfloat16 and float16 are computed in float32 and the terms stay float32; otherwise the result has the
    inputs' common dtype. Differentiable once with respect to z, mu and logvar; vmap is refused.

    Raises ValueError where shapes, devices, estimator or n_data do not fit, TypeError for tensors that hold
    integers.
    """
    _check(z, mu, logvar, n_data, estimator)
    dtype = torch.promote_types(torch.promote_types(z.dtype, mu.dtype), logvar.dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if extension.missing(z):
        return reference.tc_terms(z.to(dtype), mu.to(dtype), logvar.to(dtype), n_data, estimator)
    log_q_z, log_prod_q_z, _, _ = _tc_terms(
        z.to(dtype), mu.to(dtype), logvar.to(dtype), n_data, estimator == "mss"
    )
    return log_q_z, log_prod_q_z


def _check(z: Tensor, mu: Tensor, logvar: Tensor, n_data: int, estimator: str) -> None:
    if z.ndim != 2 or not z.shape == mu.shape == logvar.shape or z.shape[1] == 0:
        raise ValueError(
            "tc_terms: z, mu and logvar must be [B, D] of one shape with D >= 1, "
            f"got {list(z.shape)}, {list(mu.shape)} and {list(logvar.shape)}"
        )
    for t in (z, mu, logvar):
        if not t.is_floating_point():
            raise TypeError(f"tc_terms: floating-point tensors are needed, got {t.dtype}")
        if t.device != z.device:
            raise ValueError(f"tc_terms: z is on {z.device}, mu on {mu.device}, logvar on {logvar.device}")
    if estimator not in ("mws", "mss"):
        raise ValueError(f"tc_terms: estimator must be 'mws' or 'mss', got {estimator!r}")
    if isinstance(n_data, float) or not 1 <= n_data < 1 << 63:
        raise ValueError(f"tc_terms: n_data must be a whole number, at least 1 and below 2^63, got {n_data}")
    if estimator == "mss" and not 2 <= z.shape[0] <= n_data:
        raise ValueError(
            "tc_terms: minibatch-stratified sampling needs a batch of at least 2 and at most n_data, "
            f"got a batch of {z.shape[0]} with n_data = {n_data}"
        )


# --- dispatch -------------------------------------------------------------------------------------------------


@launching_op("movae::tc_terms")
def _tc_terms(
    z: Tensor, mu: Tensor, logvar: Tensor, n_data: int, stratified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if z.device.type == "cpu":
        return _tc_terms_cpu(z, mu, logvar, n_data, stratified)
    launch = triton_kernels("tc_terms").tc_terms
    return launch(z.contiguous(), mu.contiguous(), logvar.contiguous(), n_data, stratified, wrap_triton)


@launching_op("movae::tc_terms_backward")
def _tc_terms_backward(
    grad_log_q_z: Tensor,
    grad_log_prod_q_z: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    top: Tensor,
    total: Tensor,
    n_data: int,
    stratified: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad_log_q_z, grad_log_prod_q_z, z, mu, logvar, top, total)
    if z.device.type == "cpu":
        return _tc_terms_backward_cpu(*tensors, n_data, stratified)
    launch = triton_kernels("tc_terms").tc_terms_backward
    return launch(*(t.contiguous() for t in tensors), n_data, stratified, wrap_triton)


# --- CPU ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("movae::tc_terms_cpu", mutates_args=(), device_types="cpu")
def _tc_terms_cpu(
    z: Tensor, mu: Tensor, logvar: Tensor, n_data: int, stratified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, dims = z.shape
    z, mu, logvar = z.contiguous(), mu.contiguous(), logvar.contiguous()
    outputs = _outputs(z)
    if batch:
        run = csrc.tc_terms_f32 if z.dtype == torch.float32 else csrc.tc_terms_f64
        addresses = [t.data_ptr() for t in (z, mu, logvar, *outputs)]
        run(*addresses, batch, dims, n_data, stratified, torch.get_num_threads())
    return outputs


@torch.library.custom_op("movae::tc_terms_backward_cpu", mutates_args=(), device_types="cpu")
def _tc_terms_backward_cpu(
    grad_log_q_z: Tensor,
    grad_log_prod_q_z: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    top: Tensor,
    total: Tensor,
    n_data: int,
    stratified: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dims = z.shape
    inputs = [t.contiguous() for t in (grad_log_q_z, grad_log_prod_q_z, z, mu, logvar, top, total)]
    grads = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape)
    if batch:
        run = csrc.tc_terms_backward_f32 if z.dtype == torch.float32 else csrc.tc_terms_backward_f64
        addresses = [t.data_ptr() for t in (*inputs, *grads)]
        run(*addresses, batch, dims, n_data, stratified, torch.get_num_threads())
    return grads


# --- fake -----------------------------------------------------------------------------------------------------


@_tc_terms_cpu.register_fake
def _tc_terms_fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(z)


@_tc_terms_backward_cpu.register_fake
def _tc_terms_backward_fake(
    grad_log_q_z: Tensor, grad_log_prod_q_z: Tensor, z: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(z.shape)


def _outputs(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the forward pass's outputs: log_q_z [B] and log_prod_q_z [B], and two tensors [B, D + 1] for the
    backward pass.

    Those hold the largest log density and the sum of exp(log density - largest), for each dimension and, last,
    for the joint density.
    """
    batch, dims = z.shape
    return z.new_empty(batch), z.new_empty(batch), z.new_empty(batch, dims + 1), z.new_empty(batch, dims + 1)


# --- autograd -------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, mu, logvar, ctx.n_data, ctx.stratified = inputs
    _, _, top, total = output
    ctx.save_for_backward(z, mu, logvar, top, total)
    ctx.mark_non_differentiable(top, total)


def _differentiate(ctx: Any, grad_log_q_z: Tensor, grad_log_prod_q_z: Tensor, *_: Tensor) -> tuple[Any, ...]:
    grads = _tc_terms_backward(grad_log_q_z, grad_log_prod_q_z, *ctx.saved_tensors, ctx.n_data, ctx.stratified)
    return (*grads, None, None)


_tc_terms.register_autograd(_differentiate, setup_context=_save)
refuse_vmap("tc_terms", "each mapped batch is an estimate of its own")
refuse_vmap("tc_terms_backward", "compute one gradient at a time")
