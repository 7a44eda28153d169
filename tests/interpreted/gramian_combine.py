"""The Gramian and the weighted sum against float64."""

import pytest
import torch

from movae_fast import reference
from movae_fast.kernels import combine as combine_kernel
from movae_fast.kernels import gramian as gramian_kernel

SHAPES = [
    *[(1, 1), (2, 1000), (3, 257), (8, 100), (9, 77)],
    *(pytest.param(m, P, marks=pytest.mark.slow) for m, P in [(4, 5000), (20, 300), (64, 33)]),
]


@pytest.mark.parametrize(("m", "P"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gramian_is_float64_accurate(m: int, P: int, dtype: torch.dtype, device: str) -> None:
    rows = torch.randn(m, P, dtype=dtype, device=device) * 10.0 ** torch.arange(m, device=device)[
        :, None
    ].clamp(max=6)
    rows = rows.to(dtype)
    truth, result = reference.gramian(rows), gramian_kernel.gramian(rows)
    scale = truth.diagonal().sqrt()
    # Two orders of summation of P products, each of rounding 2^-53.
    assert ((result - truth).abs() <= 2 * P * 2.0**-53 * scale[:, None] * scale).all()
    assert torch.equal(result, result.T)
    assert torch.equal(result, gramian_kernel.gramian(rows))


def test_gramian_of_strided_rows_and_of_nothing(device: str) -> None:
    wide = torch.randn(3, 70, device=device)
    torch.testing.assert_close(gramian_kernel.gramian(wide[:, 5:60]), reference.gramian(wide[:, 5:60]))
    torch.testing.assert_close(gramian_kernel.gramian(wide.T), reference.gramian(wide.T))
    assert torch.equal(gramian_kernel.gramian(wide[:, :0]).cpu(), torch.zeros(3, 3, dtype=torch.float64))
    assert gramian_kernel.gramian(wide[:0]).shape == (0, 0)


def test_a_nan_reaches_its_row_alone(device: str) -> None:
    rows = torch.randn(3, 50, device=device)
    rows[1, 7] = float("nan")
    result = gramian_kernel.gramian(rows).isnan()
    assert result[1].all()
    assert result[:, 1].all()
    assert result.sum() == 5


@pytest.mark.parametrize(("m", "P"), [*SHAPES, (17, 2049), (2, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_combine(m: int, P: int, dtype: torch.dtype, device: str) -> None:
    rows = torch.randn(m, P, device=device).to(dtype)
    weights = torch.randn(m, dtype=torch.float64, device=device)
    truth = weights @ rows.double()
    out = torch.full((P,), float("nan"), dtype=dtype, device=device)
    result = combine_kernel.combine(rows, weights, out)
    assert result is out
    bound = (m + 2) * max(2.0**-24, torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    assert ((result.double() - truth).abs() <= bound * (weights.abs() @ rows.double().abs())).all()


def test_combine_reads_a_slice_and_makes_its_own_output(device: str) -> None:
    wide = torch.randn(2, 90, device=device)
    weights = torch.tensor([2.0, -0.5], device=device)
    torch.testing.assert_close(
        combine_kernel.combine(wide[:, 3:80], weights), 2 * wide[0, 3:80] - 0.5 * wide[1, 3:80]
    )
