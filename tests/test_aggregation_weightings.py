"""aggregation.AlignedMTL, CAGrad, IMTLG, MGDA and PCGrad beside TorchJD's own, and their promises."""

import copy

import pytest
import torch
import torchjd.aggregation as jd

from movae_fast.aggregation import IMTLG, MGDA, AlignedMTL, CAGrad, PCGrad
from movae_fast.aggregation.registry import FUSED, make_aggregator
from tests.host_reads import NoHostRead
from tests.jacobians import conflicting, gradients_by_torchjd

PREF = torch.tensor([0.2, 1.0, 0.5, 0.7], dtype=torch.float64)
PAIRS = {
    "aligned_mtl": (AlignedMTL, jd.AlignedMTL, {}),
    "aligned_mtl with a preference": (AlignedMTL, jd.AlignedMTL, {"pref_vector": PREF, "scale_mode": "rmse"}),
    "imtl_g": (IMTLG, jd.IMTLG, {}),
    "mgda": (MGDA, jd.MGDA, {}),
    "mgda with options": (MGDA, jd.MGDA, {"epsilon": 0.01, "max_iters": 20}),
    "cagrad": (CAGrad, jd.CAGrad, {"c": 0.4}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torchjd(name):
    ours, theirs, options = PAIRS[name]
    J = conflicting()
    # CLARABEL stops at a gap of 1e-8 in a problem with the trace 1: some 1e-4 of the longest row.
    error = 1e-3 * float(J.norm()) if name == "cagrad" else 1e-11
    torch.testing.assert_close(ours(**options)(J), theirs(**options)(J), rtol=1e-9, atol=error)
    weights = ours(**options).gramian_weighting(J.float() @ J.float().T)
    assert weights.dtype == torch.float32
    assert ours(**options)(J.to(torch.bfloat16)).dtype == torch.bfloat16


def test_pcgrad_of_two_has_one_order():
    J = conflicting(2)
    torch.testing.assert_close(PCGrad()(J), jd.PCGrad()(J), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimize", [False, True])
def test_jac_to_grad(optimize):
    gradients = [gradients_by_torchjd(aggregator, optimize) for aggregator in (MGDA(), jd.MGDA())]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FUSED)
def test_nothing_is_read_on_the_host(name):
    J = conflicting(dtype=torch.float32)
    aggregator = make_aggregator(name, len(J))
    with NoHostRead():
        aggregator(J)
        aggregator.gramian_weighting(J @ J.T)
    with NoHostRead(), pytest.raises(AssertionError, match="on the host"):
        jd.MGDA()(J)


@pytest.mark.parametrize("name", ["aligned_mtl", "cagrad", "imtl_g", "mgda", "pcgrad"])
def test_in_one_graph(name):
    aggregator = make_aggregator(name, 2)
    J = conflicting(2)
    compiled = torch.compile(lambda rows: aggregator(2 * rows), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(J), aggregator(2 * J))


def test_options_are_read_and_set_and_checked():
    aggregator = MGDA(epsilon=0.5)
    J = conflicting()
    coarse = aggregator(J)
    aggregator.epsilon = 1e-3
    assert aggregator.epsilon == 1e-3
    assert not torch.equal(aggregator(J), coarse)
    torch.testing.assert_close(aggregator(J), MGDA()(J))
    for build, problem in (
        (lambda: setattr(aggregator, "max_iters", 0), "max_iters must be > 0"),
        (lambda: CAGrad(-1.0), "c and norm_eps must be >= 0"),
        (lambda: AlignedMTL(scale_mode="mean"), "min, median or rmse; got 'mean'"),
        (lambda: AlignedMTL(torch.ones(1, 2)), r"pref_vector must be \[m\], got \[1, 2\]"),
        (lambda: AlignedMTL(torch.ones(2))(J), r"pref must be \[m\]"),
    ):
        with pytest.raises(ValueError, match=problem):
            build()


def test_copies_moves_and_keeps_no_state():
    aggregator = AlignedMTL(PREF, scale_mode="median")
    J = conflicting()
    assert torch.equal(copy.deepcopy(aggregator)(J), aggregator(J))
    assert aggregator.to(torch.float32).pref_vector.dtype == torch.float32
    assert aggregator.state_dict() == {}
    assert repr(CAGrad(0.5)) == "CAGrad(c=0.5, norm_eps=0.0001)"
    assert repr(AlignedMTL()) == "AlignedMTL(pref_vector=None, scale_mode='min')"
    assert repr(PCGrad()) == "PCGrad()"
    assert not PCGrad()(J.requires_grad_()).requires_grad


def test_hooks_on_the_gramian_weighting_are_called():
    aggregator, seen = IMTLG(), []
    aggregator.gramian_weighting.register_forward_hook(lambda _m, _i, weights: seen.append(weights))
    aggregator(conflicting(3))
    assert len(seen) == 1
