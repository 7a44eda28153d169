"""The descent on CUDA: equal to the CPU's, in two launches, without a synchronisation, in a graph."""

import pytest
import torch

from movae_fast import ops
from movae_fast.aggregation import DualProj, UPGrad
from tests.jacobians import conflicting, replayed
from tests.launches import kernels_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def large(m: int) -> torch.Tensor:
    return conflicting(m, 3000, torch.float32)


@pytest.mark.parametrize("mode", ["upgrad", "dualproj"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64])
def test_equals_cpu(m: int, mode: str) -> None:
    J = large(m)
    weights, gramian, status = ops.upgrad_weights(J, mode=mode)
    on_gpu = ops.upgrad_weights(J.cuda(), mode=mode)
    assert on_gpu[2].item() == status == 0
    # Gramians that differ by the order of summation, through a problem of condition 1 / reg_eps.
    torch.testing.assert_close(on_gpu[1].cpu(), gramian, rtol=1e-12, atol=1e-12 * float(gramian.max()))
    torch.testing.assert_close(on_gpu[0].cpu(), weights, rtol=1e-7, atol=1e-8)
    projected, status = ops.project_weights(gramian.cuda(), mode=mode)
    torch.testing.assert_close(projected.cpu(), weights, rtol=1e-13, atol=1e-13)
    rows, _ = ops.project_rows(torch.eye(m, device="cuda"), gramian.cuda())
    torch.testing.assert_close(rows.cpu(), ops.project_rows(torch.eye(m), gramian)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [2, 7, 12])
def test_dtypes(dtype: torch.dtype, m: int) -> None:
    J = large(m).to(dtype)
    torch.testing.assert_close(ops.upgrad_weights(J.cuda())[1].cpu(), ops.gramian(J), rtol=1e-12, atol=1e-9)


def test_not_finite() -> None:
    for m in (3, 20):
        J = large(m).cuda()
        J[1, 5] = float("nan")
        weights, _, status = ops.upgrad_weights(J)
        assert weights.isnan().all()
        assert status.item() == -1


@pytest.mark.parametrize("aggregator", [UPGrad(), DualProj()], ids=["UPGrad", "DualProj"])
def test_no_synchronisation_and_captured(aggregator: torch.nn.Module) -> None:
    expected, update = replayed(aggregator, large(4).cuda())
    torch.testing.assert_close(update, 2 * expected)


def test_two_launches() -> None:
    J, pref = large(4).cuda(), torch.ones(4, dtype=torch.float64, device="cuda")
    aggregator = UPGrad(pref)
    aggregator(J)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        aggregator(J)
        torch.cuda.synchronize()
    kernels = kernels_of(profile.events())
    assert len(kernels) == 2, kernels
