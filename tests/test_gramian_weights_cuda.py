"""The weightings on CUDA: equal to the CPU's; with csrc's CUDA half without a synchronisation, in a graph."""

import pytest
import torch

from movae_fast import ops
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.ops import extension
from movae_fast.ops.gramian_weights import METHODS
from tests.jacobians import conflicting, replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:gramian_weights on CUDA. the weights are computed on the host"),
]
OURS = ["aligned_mtl", "aligned_mtl_median", "cagrad", "imtl_g", "mgda", "pcgrad"]


def large(m: int) -> torch.Tensor:
    return conflicting(m, 3000, torch.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 9, 33, 64])
def test_equals_cpu(m: int, method: str) -> None:
    gramian = ops.gramian(large(m))
    order = torch.rand(m, m).argsort(1) if method == "pcgrad" else None
    expected = ops.gramian_weights(gramian, method, order=order)
    order = order if order is None else order.cuda()
    found = ops.gramian_weights(gramian.cuda(), method, order=order)
    # One source, but for fused products: rounding, through problems of the condition that conflict makes (100).
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_not_finite(method: str) -> None:
    gramian = torch.eye(3, device="cuda")
    gramian[1, 1] = float("nan")
    assert ops.gramian_weights(gramian, method).isnan().all()


@pytest.mark.parametrize("name", OURS)
def test_no_synchronisation_and_captured(name: str) -> None:
    if reason := extension.cuda_missing():
        pytest.skip(f"the host computes the weights: {reason}")
    aggregator = make_aggregator(name, 4).cuda()
    expected, update = replayed(aggregator, large(4).cuda())
    if name != "pcgrad":  # which draws new orders at every replay
        torch.testing.assert_close(update, 2 * expected)
    assert update.isfinite().all()
