"""ops.gramian: the inner products of a Jacobian's rows against exact sums, on each CPU path."""

import math
from fractions import Fraction

import pytest
import torch

from movae_fast import _csrc, ops, reference

ISAS = [name for name in _csrc.nearest_code_isas() if name in ("avx512", "avx2", "portable")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 1000), (2, 7), (2, 16385), (3, 257), (4, 40000), (5, 63), (6, 64), (7, 3000), (8, 1025)]
SHAPES += [(9, 77), (13, 500), (17, 1), (31, 129), (64, 33), (65, 2)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("MOVAE_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def rows_of(m, P, dtype):
    """Rows of very different lengths, so that an error in a short one is seen."""
    lengths = 10.0 ** (torch.arange(m) % 4 - 2)
    return (torch.randn(m, P, dtype=torch.float64) * lengths[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "P"), SHAPES)
def test_float64_accurate(isa, m, P, dtype):
    rows = rows_of(m, P, dtype)
    result, truth = ops.gramian(rows), reference.gramian(rows)
    assert result.dtype == torch.float64
    length = truth.diagonal().sqrt()
    # Two orders of adding P products, each off by at most P roundings of 2^-53 (Higham 2002, section 3.1).
    assert ((result - truth).abs() <= 2 * P * 2.0**-53 * length[:, None] * length).all()
    assert torch.equal(result, result.T)


def test_relative_error_against_exact_rational_sums():
    """The entries of float32 rows as fractions: their sum is exact, and the result is within 1e-12 of it."""
    rows = torch.randn(2, 3000) + 1
    exact = [
        [sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)) for b in rows]
        for a in rows
    ]
    for i, line in enumerate(ops.gramian(rows).tolist()):
        for j, value in enumerate(line):
            assert abs(Fraction(value) - exact[i][j]) <= Fraction(1, 10**12) * abs(exact[i][j])


def test_the_order_of_summation_does_not_depend_on_threads(isa, two_threads):
    rows = torch.randn(5, 100_003)
    together = ops.gramian(rows)
    torch.set_num_threads(1)
    assert torch.equal(together, ops.gramian(rows))


def test_a_short_last_row_beside_a_huge_one():
    rows = torch.tensor([[1e30, 0.0], [1.0, 1e-30]], dtype=torch.float32)
    rows64 = rows.double()
    torch.testing.assert_close(ops.gramian(rows), rows64 @ rows64.T, rtol=1e-15, atol=0)


def test_strides(isa):
    wide = torch.randn(6, 90)
    for view in (wide[:, 3:80], wide.T, wide[::2], wide[:, ::3], wide[:, 5:6], wide[1].expand(4, 90)):
        torch.testing.assert_close(ops.gramian(view), reference.gramian(view), rtol=1e-12, atol=1e-12)


def test_nan_and_infinity_stay_in_their_row(isa):
    for bad in (math.nan, math.inf):
        rows = torch.randn(5, 1000)
        rows[1, 7] = bad
        finite = ops.gramian(rows).isfinite()
        assert not finite[1].any()
        assert not finite[:, 1].any()
        assert finite.sum() == 16


def test_nothing():
    assert ops.gramian(torch.ones(0, 5)).shape == (0, 0)
    assert torch.equal(ops.gramian(torch.ones(3, 0)), torch.zeros(3, 3, dtype=torch.float64))


def test_errors_show_the_operand():
    with pytest.raises(ValueError, match=r"rows must be \[m, P\], got \[4\]"):
        ops.gramian(torch.ones(4))
    with pytest.raises(TypeError, match="int64"):
        ops.gramian(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(ops.gramian)(torch.ones(2, 3, 4))


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.movae.gramian_cpu, (torch.randn(3, 40).to(dtype),))
    torch.library.opcheck(torch.ops.movae.gramian, (torch.randn(3, 40),))
    torch.library.opcheck(torch.ops.movae.gramian, (torch.randn(3, 40, requires_grad=True),))
    torch.library.opcheck(
        torch.ops.movae.gramian_backward, (torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 5))
    )


def test_gradient():
    rows = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.gramian, rows)


def test_under_compile_and_autocast():
    def loss(rows):
        return ops.gramian(rows * 2).square().sum()

    rows = torch.randn(3, 200, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (eager,) = torch.autograd.grad(loss(rows), rows)
        (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(rows), rows)
    torch.testing.assert_close(compiled, eager)
    assert ops.gramian(rows.detach()).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("m", "P"), [(2, 1000), (4, 100_000), (20, 3000)])
def test_cuda_equals_cpu(m, P):
    rows = rows_of(m, P, torch.float32)
    here, there = ops.gramian(rows), ops.gramian(rows.cuda()).cpu()
    length = here.diagonal().sqrt()
    assert ((here - there).abs() <= 2 * P * 2.0**-53 * length[:, None] * length).all()
