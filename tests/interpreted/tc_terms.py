"""Forward and backward against float64 autograd of the reference."""

import pytest
import torch
from torch import Tensor

from movae_fast import reference
from movae_fast.kernels import tc_terms as kernels


def problem(B: int, D: int, device: str) -> list[Tensor]:
    """z, mu, logvar and one upstream gradient for each output; z comes from the posteriors."""
    generator = torch.Generator().manual_seed(B * 1000 + D)
    mu, noise, logvar = torch.randn(3, B, D, generator=generator).unbind()
    logvar = logvar - 2
    upstream = torch.randn(2, B, generator=generator).unbind()
    return [t.to(device) for t in (mu + noise * (logvar / 2).exp(), mu, logvar, *upstream)]


def truth(tensors: list[Tensor], stratified: bool, dtype: torch.dtype) -> list[Tensor]:
    z, mu, logvar, g1, g2 = (t.to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (z, mu, logvar)]
    terms = reference.tc_terms(*leaves, 1000, "mss" if stratified else "mws")
    return [
        *(t.detach() for t in terms),
        *torch.autograd.grad((terms[0] * g1).sum() + (terms[1] * g2).sum(), leaves),
    ]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(("B", "D"), [(2, 1), (5, 3), (17, 10), pytest.param(33, 65, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_float64(B: int, D: int, stratified: bool, dtype: torch.dtype, device: str) -> None:
    tensors = problem(B, D, device)
    z, mu, logvar, g1, g2 = (t.to(dtype) for t in tensors)
    log_q_z, log_prod_q_z, *saved = kernels.tc_terms(z, mu, logvar, 1000, stratified)
    gradients = kernels.tc_terms_backward(g1, g2, z, mu, logvar, *saved, 1000, stratified)
    exact = truth(tensors, stratified, torch.float64)
    eager = truth(tensors, stratified, dtype)
    for ours, theirs, right in zip((log_q_z, log_prod_q_z, *gradients), eager, exact, strict=True):
        assert relative(ours, right) <= 2 * relative(theirs, right) + 8 * torch.finfo(dtype).eps


def test_a_sample_that_no_posterior_reaches(device: str) -> None:
    z, mu, logvar, g1, g2 = problem(6, 4, device)
    z[2] = 1e20
    log_q_z, log_prod_q_z, *saved = kernels.tc_terms(z, mu, logvar, 100, False)
    assert log_q_z[2] == log_prod_q_z[2] == -torch.inf
    assert log_q_z.isfinite().sum() == 5
    grad_z, _, _ = kernels.tc_terms_backward(g1, g2, z, mu, logvar, *saved, 100, False)
    assert torch.equal(grad_z[2], torch.zeros(4, device=device))
