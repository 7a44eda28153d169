"""ops.combine: the weighted sum of a Jacobian's rows against float64, on each CPU path."""

import math

import pytest
import torch

from movae_fast import _csrc, ops

ISAS = [name for name in _csrc.nearest_code_isas() if name in ("avx512", "avx2", "portable")]
SHAPES = [(1, 1), (2, 7), (2, 4097), (3, 257), (4, 40000), (7, 3000), (8, 1025), (9, 77), (17, 4100), (64, 33)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("MOVAE_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "P"), SHAPES)
def test_rounded_once(isa, m, P, dtype):
    rows, weights = torch.randn(m, P).to(dtype), torch.randn(m, dtype=torch.float64)
    result = ops.combine(rows, weights)
    assert result.dtype == dtype
    truth, size = weights @ rows.double(), weights.abs() @ rows.double().abs()
    # The weight's rounding, m products and sums in the wide dtype, and one rounding to the rows' own.
    wide = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    own = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 0.0
    smallest = 2.0**-25 if dtype == torch.float16 else 0.0  # half a step of float16's subnormal numbers
    error = (result.double() - truth).abs()
    assert (error <= (m + 2) * wide * size + own * 1.01 * truth.abs() + smallest).all()


@pytest.mark.parametrize("m", [3, 11])
def test_past_the_caches(isa, m):
    """Large results are stored past the caches, and from any alignment not at all."""
    rows, weights = torch.randn(m, 2_100_000), torch.rand(m)
    out = torch.empty(2_100_001)
    for target in (out[:-1], out[1:]):
        assert ops.combine(rows, weights, target) is target
        torch.testing.assert_close(target, weights @ rows, rtol=1e-5, atol=1e-5)


def test_out_strides_and_nothing(isa):
    wide, weights = torch.randn(4, 90), torch.tensor([2.0, -0.5, 0.0, 1.0])
    for view in (wide[:, 3:80], wide[:, ::3], wide[1].expand(4, 90)):
        torch.testing.assert_close(ops.combine(view, weights), weights @ view)
    assert torch.equal(ops.combine(torch.ones(0, 5), torch.ones(0)), torch.zeros(5))
    assert ops.combine(torch.ones(2, 0), torch.ones(2)).shape == (0,)


def test_special_values(isa):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.tensor([[math.nan, math.inf, -math.inf, 6e4, 1e-7], [1.0, 1.0, 1.0, 6e4, 0.0]]).to(dtype)
        result = ops.combine(rows, torch.ones(2))
        truth = rows.float().sum(0).to(dtype)
        torch.testing.assert_close(result, truth, equal_nan=True, rtol=0, atol=0)


def test_errors_show_both_operands():
    with pytest.raises(ValueError, match=r"weights \[3\].*rows \[2, 4\]"):
        ops.combine(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        ops.combine(torch.ones(2, 4), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"out \[3\].*rows \[2, 4\]"):
        ops.combine(torch.ones(2, 4), torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="float64 and float32"):
        ops.combine(torch.ones(2, 4), torch.ones(2), torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="not differentiable"):
        ops.combine(torch.ones(2, 4, requires_grad=True), torch.ones(2), torch.ones(4))
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(ops.combine)(torch.ones(2, 3, 4), torch.ones(2, 3))


def test_opcheck():
    rows, weights = torch.randn(3, 40), torch.randn(3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.movae.combine_cpu, (rows, weights))
    torch.library.opcheck(torch.ops.movae.combine_out, (rows, weights, torch.empty(40)))
    torch.library.opcheck(torch.ops.movae.combine, (rows, weights))
    torch.library.opcheck(
        torch.ops.movae.combine, (rows.clone().requires_grad_(), weights.clone().requires_grad_())
    )
    torch.library.opcheck(torch.ops.movae.combine_backward, (torch.randn(40), rows, weights))


def test_gradient():
    rows = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.combine, (rows, weights))


def test_under_compile():
    def update(rows, weights):
        return ops.combine(rows * 2, weights) + 1

    rows, weights = torch.randn(3, 500), torch.randn(3)
    torch.testing.assert_close(torch.compile(update, fullgraph=True)(rows, weights), update(rows, weights))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("m", "P"), [(2, 1000), (4, 100_000), (20, 3000)])
def test_cuda_equals_cpu(m, P):
    rows, weights = torch.randn(m, P), torch.randn(m, dtype=torch.float64)
    there = ops.combine(rows.cuda(), weights.cuda()).cpu()
    size = weights.abs() @ rows.double().abs()
    assert ((there - ops.combine(rows, weights)).abs() <= 2 * (m + 2) * 2.0**-24 * size).all()
