import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from movae_fast import _csrc, ops, reference
from movae_fast.reference import TCEstimator
from tests.test_ops_quantize import relative

ESTIMATORS: list[TCEstimator] = ["mws", "mss"]
SHAPES = [(2, 1), (3, 7), (17, 3), (33, 10), (64, 16), (129, 65), (300, 5), (1030, 2), (20, 300)]


def problem(B: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """z, mu, logvar, z drawn from the posteriors, whose widths differ."""
    generator = torch.Generator().manual_seed(seed)
    mu, noise, logvar = torch.randn(3, B, D, generator=generator, dtype=torch.float64).unbind()
    logvar = 0.7 * logvar - 2
    tensors = (mu + noise * (logvar / 2).exp(), mu, logvar)
    return [t.to(dtype).requires_grad_() for t in tensors]


def with_gradients(
    terms: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], n_data: int, estimator: TCEstimator
) -> list[Tensor]:
    """Both terms and the gradients of z, mu, logvar under one random upstream gradient of unit scale."""
    log_q_z, log_prod_q_z = terms(*tensors, n_data, estimator)
    generator = torch.Generator().manual_seed(1)
    g1, g2 = torch.randn(2, len(tensors[0]), generator=generator, dtype=torch.float64).to(log_q_z.dtype)
    return [
        log_q_z.detach(),
        log_prod_q_z.detach(),
        *torch.autograd.grad((log_q_z * g1).sum() + (log_prod_q_z * g2).sum(), tensors),
    ]


def brute_force(tensors: list[Tensor], n_data: int, estimator: TCEstimator) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return with_gradients(reference.tc_terms, wide, n_data, estimator)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    widths = ["portable", "avx2", "avx512"]
    if widths.index(request.param) > widths.index(_csrc.tc_terms_isa()):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("MOVAE_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_terms_and_gradients_are_those_of_float64(isa: str, dtype: torch.dtype, estimator: TCEstimator) -> None:
    for B, D in SHAPES:
        tensors = problem(B, D, dtype)
        truth = brute_force(tensors, 5000, estimator)
        got = with_gradients(ops.tc_terms, tensors, 5000, estimator)
        eager = with_gradients(reference.tc_terms, tensors, 5000, estimator)
        for mine, theirs, true in zip(got, eager, truth, strict=True):
            assert mine.dtype == dtype
            limit = min(2 * relative(theirs, true) + 8 * torch.finfo(dtype).eps, 1e-5)
            assert relative(mine, true) <= limit, (B, D)
            # The test's own test: a zero and a scaled gradient fail it.
            assert relative(torch.zeros_like(mine), true) > limit
            assert relative(1.0001 * mine, true) > limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_of_one(dtype: torch.dtype) -> None:
    tensors = problem(1, 6, dtype)
    got = with_gradients(ops.tc_terms, tensors, 10, "mws")
    for mine, true in zip(got, brute_force(tensors, 10, "mws"), strict=True):
        assert relative(mine, true) <= 1e-5
    log_q_z, log_prod_q_z = ops.tc_terms(*tensors, 10)
    density = reference.gaussian_log_density(*tensors).sum(1)
    torch.testing.assert_close(log_q_z, density - math.log(10))
    torch.testing.assert_close(log_prod_q_z, density - 6 * math.log(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = problem(40, 9, dtype)
    got = with_gradients(ops.tc_terms, tensors, 5000, "mss")
    truth = brute_force(tensors, 5000, "mss")
    for mine, true in zip(got[:2], truth[:2], strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, true) <= 1e-5
    for mine, true in zip(got[2:], truth[2:], strict=True):
        assert mine.dtype == dtype
        assert relative(mine, true) <= torch.finfo(dtype).eps  # rounded once, at the end


def test_mixed_dtypes_and_autocast() -> None:
    z, mu, logvar = problem(20, 4)
    expected = ops.tc_terms(z.double(), mu, logvar, 100)
    assert expected[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        terms = ops.tc_terms(z, mu, logvar, 100)
    for mine, true in zip(terms, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    B=st.integers(2, 70),
    D=st.integers(1, 40),
    spread=st.floats(-3, 3),
    width=st.floats(-12, 6),
    n_data=st.sampled_from([70, 1000, 10**9]),
)
def test_any_problem(estimator: TCEstimator, B: int, D: int, spread: float, width: float, n_data: int) -> None:
    z, mu, logvar = (t.detach() for t in problem(B, D, seed=B * D))
    noise = (z - mu) * torch.exp(-logvar / 2)
    mu, logvar = mu * 10**spread, logvar + width
    tensors = [t.requires_grad_() for t in (mu + noise * torch.exp(logvar / 2), mu, logvar)]
    got = with_gradients(ops.tc_terms, tensors, n_data, estimator)
    eager = with_gradients(reference.tc_terms, tensors, n_data, estimator)
    for mine, theirs, true in zip(got, eager, brute_force(tensors, n_data, estimator), strict=True):
        assert relative(mine, true) <= 2 * relative(theirs, true) + 16 * torch.finfo(torch.float32).eps


def test_far_samples_and_nans_stay_with_themselves(isa: str) -> None:
    tensors = [t.detach() for t in problem(30, 5)]
    clean = ops.tc_terms(*tensors, 100)
    tensors[0][4] = 1e20  # no posterior reaches it
    tensors[0][9, 2] = float("nan")
    tensors = [t.requires_grad_() for t in tensors]
    log_q_z, log_prod_q_z = ops.tc_terms(*tensors, 100)
    for term, was in ((log_q_z, clean[0]), (log_prod_q_z, clean[1])):
        assert term[4] == -torch.inf
        assert term[9].isnan()
        kept = torch.ones(30, dtype=torch.bool)
        kept[[4, 9]] = False
        assert torch.equal(term[kept], was[kept])
    upstream = torch.ones(30)
    upstream[9] = 0
    grad_z, *_ = torch.autograd.grad(log_q_z, tensors, upstream)
    assert torch.equal(grad_z[4], torch.zeros(5))


def test_layouts_are_read_as_they_lie() -> None:
    tensors = [t.detach() for t in problem(20, 6)]
    expected = ops.tc_terms(*tensors, 100)
    strided = [torch.randn(20, 12)[:, ::2].copy_(t) for t in tensors]
    transposed = [t.T.contiguous().T for t in tensors]
    for other in (strided, transposed):
        assert all(torch.equal(a, b) for a, b in zip(ops.tc_terms(*other, 100), expected, strict=True))


def test_the_number_of_threads_changes_rounding_at_most() -> None:
    tensors = problem(500, 7)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(ops.tc_terms, tensors, 5000, "mss"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative(a, b) <= 4 * torch.finfo(torch.float32).eps


def test_an_empty_batch() -> None:
    tensors = [torch.zeros(0, 5, requires_grad=True) for _ in range(3)]
    log_q_z, log_prod_q_z = ops.tc_terms(*tensors, 100)
    assert log_q_z.shape == log_prod_q_z.shape == (0,)
    (log_q_z.sum() + log_prod_q_z.sum()).backward()
    assert tensors[0].grad is not None


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"mu": torch.zeros(4, 2)}, ValueError, r"\[4, 3\], \[4, 2\] and \[4, 3\]"),
        ({"z": torch.zeros(4, 3, 1)}, ValueError, r"\[4, 3, 1\]"),
        ({name: torch.zeros(4, 0) for name in ("z", "mu", "logvar")}, ValueError, "D >= 1"),
        ({"z": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"logvar": torch.zeros(4, 3, device="meta")}, ValueError, "cpu.*meta"),
        ({"estimator": "mean"}, ValueError, "'mean'"),
        ({"n_data": 0}, ValueError, "at least 1"),
        ({"n_data": 1e5}, ValueError, "a whole number.*got 100000.0"),
        ({"n_data": 1 << 70}, ValueError, "below 2.63"),
        ({"n_data": 3, "estimator": "mss"}, ValueError, "at most n_data.*batch of 4.*n_data = 3"),
    ],
)
def test_bad_arguments_are_shown(change: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments = {name: torch.zeros(4, 3) for name in ("z", "mu", "logvar")} | {"n_data": 10} | change
    with pytest.raises(error, match=says):
        ops.tc_terms(**arguments)


def test_one_example_has_no_stratified_estimate() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ops.tc_terms(*problem(1, 3), 10, "mss")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(estimator: TCEstimator) -> None:
    stratified = estimator == "mss"
    tensors = problem(9, 4)
    torch.library.opcheck(torch.ops.movae.tc_terms.default, (*tensors, 100, stratified))
    *_, top, total = (t.detach() for t in torch.ops.movae.tc_terms(*tensors, 100, stratified))
    saved = (torch.randn(9), torch.randn(9), *(t.detach() for t in tensors), top, total)
    torch.library.opcheck(torch.ops.movae.tc_terms_backward.default, (*saved, 100, stratified))


def test_gradcheck() -> None:
    tensors = problem(6, 3, torch.float64)
    for estimator in ESTIMATORS:
        torch.autograd.gradcheck(lambda *t, e=estimator: ops.tc_terms(*t, 50, e), tensors)


def test_a_model_trains_compiled_whole() -> None:
    torch.manual_seed(0)
    encoder, x, noise = nn.Linear(6, 8), torch.randn(50, 6), torch.randn(50, 4)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.05)

    def loss(x: Tensor) -> Tensor:
        mu, logvar = encoder(x).chunk(2, dim=1)
        log_q_z, log_prod_q_z = ops.tc_terms(mu + noise * (logvar / 2).exp(), mu, logvar, 50)
        return (log_q_z - log_prod_q_z).mean()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(x), list(encoder.parameters()))
    for mine, true in zip(torch.autograd.grad(compiled(x), list(encoder.parameters())), expected, strict=True):
        torch.testing.assert_close(mine, true)
    first = float(loss(x).detach())
    for _step in range(10):
        optimizer.zero_grad()
        compiled(x).backward()
        optimizer.step()
    assert float(loss(x).detach()) < first


def test_vmap_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda z: ops.tc_terms(z, z, z, 10)[0])(torch.randn(3, 4, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cuda_equals_float64(estimator: TCEstimator) -> None:
    for B, D in SHAPES:
        tensors = problem(B, D)
        there = [t.detach().cuda().requires_grad_() for t in tensors]
        for mine, true in zip(
            with_gradients(lambda *a: tuple(t.cpu() for t in ops.tc_terms(*a)), there, 5000, estimator),
            brute_force(tensors, 5000, estimator),
            strict=True,
        ):
            assert relative(mine.cpu(), true) <= 1e-5, (B, D)
