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


@pytest.mark.parametrize("name", ["aligned_mtl", "cagrad", "comfort", "imtl_g", "mgda", "nupgrad", "pcgrad"])
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
        (lambda: setattr(aggregator, "epsilon", float("nan")), "epsilon and max_iters must be > 0"),
        (lambda: setattr(CAGrad(1.0), "c", float("inf")), "c and norm_eps must be >= 0 and finite"),
        (lambda: setattr(CAGrad(1.0), "norm_eps", -1.0), "c and norm_eps must be >= 0 and finite"),
        (lambda: setattr(AlignedMTL(), "scale_mode", "mean"), "min, median or rmse; got 'mean'"),
        (lambda: setattr(AlignedMTL(), "pref_vector", torch.ones(1, 2)), r"pref_vector must be \[m\]"),
        (lambda: CAGrad(-1.0), "c and norm_eps must be >= 0"),
        (lambda: AlignedMTL(scale_mode="mean"), "min, median or rmse; got 'mean'"),
        (lambda: AlignedMTL(torch.ones(1, 2)), r"pref_vector must be \[m\], got \[1, 2\]"),
        (lambda: AlignedMTL(torch.ones(2))(J), r"pref must be \[m\]"),
    ):
        with pytest.raises(ValueError, match=problem):
            build()


def test_scale_mode_and_preference_can_be_set():
    J, aggregator = conflicting(), AlignedMTL()
    aggregator.scale_mode, aggregator.pref_vector = "rmse", PREF
    torch.testing.assert_close(aggregator(J), jd.AlignedMTL(PREF, scale_mode="rmse")(J), rtol=1e-9, atol=1e-11)
    assert (aggregator.scale_mode, aggregator.pref_vector) == ("rmse", PREF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_weights_of_rows_have_the_rows_dtype(name, dtype):
    ours, _, options = PAIRS[name]
    J = conflicting().to(dtype)
    weights = ours(**options).weighting(J)
    assert weights.dtype == dtype
    exact = ours(**options).weighting(J.double())
    torch.testing.assert_close(weights.double(), exact, rtol=float(torch.finfo(dtype).eps), atol=1e-300)


def test_strings_are_torchjds():
    for ours, theirs, options in (
        *PAIRS.values(),
        (CAGrad, jd.CAGrad, {"c": 1.0}),
        (CAGrad, jd.CAGrad, {"c": 2}),
        (PCGrad, jd.PCGrad, {}),
        (AlignedMTL, jd.AlignedMTL, {"pref_vector": torch.tensor([1.0, 0.256, 10.0])}),
    ):
        assert str(ours(**options)) == str(theirs(**options))


def test_cagrads_distance_from_torchjds_is_its_solvers():
    """Where they differ, TorchJD's weights are the worse ones of the problem that both solve."""

    def objective(
        J, w
    ):  # what is minimised over the simplex; w from the update's weights 1/m + c |g0| / |gw| w
        mean = J.mean(0)
        return J @ mean @ w + 0.4 * mean.norm() * (w @ J).norm()

    distances = []
    for seed in range(20):
        torch.manual_seed(seed)
        J = conflicting(3)
        J = J / J.norm()
        ours, theirs = CAGrad(0.4)(J), jd.CAGrad(0.4)(J)
        distances.append(float((ours - theirs).norm() / theirs.norm()))
        w = [(aggregator(0.4).weighting(J) - 1 / 3) for aggregator in (CAGrad, jd.CAGrad)]
        best, reached = (float(objective(J, v / v.sum())) for v in w)
        assert best <= reached + 1e-15
    assert 0 < max(distances) < 1e-3


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
