"""aggregation.UPGrad, DualProj and FusedProjector beside TorchJD's own, called directly and by jac_to_grad."""

import pytest
import torch
import torchjd.aggregation as jd
from torchjd.linalg import QuadprogProjector

from movae_fast.aggregation import DualProj, FusedProjector, UPGrad
from tests.jacobians import conflicting, gradients_by_torchjd

PAIRS = [(UPGrad, jd.UPGrad), (DualProj, jd.DualProj)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("m", [1, 2, 3, 7, 20])
def test_equals_torchjd_at_its_defaults(ours, theirs, m):
    J = conflicting(m)
    torch.testing.assert_close(ours()(J), theirs()(J), rtol=1e-9, atol=1e-11)
    pref = torch.rand(m, dtype=torch.float64)
    torch.testing.assert_close(ours(pref)(J), theirs(pref)(J), rtol=1e-9, atol=1e-11)
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-6)
    torch.testing.assert_close(ours(None, 0.0, 1e-6)(J), theirs(projector=projector)(J), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("theirs", [jd.UPGrad, jd.DualProj])
def test_projector_for_torchjds_own_classes(theirs):
    J = conflicting(5)
    torch.testing.assert_close(theirs(projector=FusedProjector())(J), theirs()(J), rtol=1e-9, atol=1e-11)
    assert theirs(projector=FusedProjector())(J.float()).dtype == torch.float32


def test_published_example():
    """The example of TorchJD's documentation."""
    J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    torch.testing.assert_close(UPGrad()(J), torch.tensor([0.2929, 1.9004, 1.9004]), rtol=0, atol=1e-4)
    weights = UPGrad().gramian_weighting(J @ J.T)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([1.1109, 0.7894]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_jac_to_grad(ours, theirs, optimize):
    gradients = [gradients_by_torchjd(aggregator, optimize) for aggregator in (ours(), theirs())]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_no_row_is_opposed_and_what_does_not_conflict_is_averaged():
    J = conflicting(4, dtype=torch.float32)
    update = UPGrad(norm_eps=0.0, reg_eps=1e-6)(J)
    cosines = torch.nn.functional.cosine_similarity(J, update[None])
    assert (cosines >= -1e-4).all()
    agreeing = torch.rand(3, 20)
    torch.testing.assert_close(UPGrad()(agreeing), agreeing.mean(0))


def test_half_precision_and_gradients():
    J = conflicting(3).to(torch.bfloat16)
    assert UPGrad()(J).dtype == torch.bfloat16
    J = conflicting(3).requires_grad_()
    assert not UPGrad()(J).requires_grad


def test_hooks_on_the_gramian_weighting_are_called():
    aggregator, seen = UPGrad(), []
    aggregator.gramian_weighting.register_forward_hook(lambda _m, _i, weights: seen.append(weights))
    J = conflicting(3)
    torch.testing.assert_close(aggregator(J), UPGrad()(J))
    assert len(seen) == 1


def test_moves_with_its_module_and_keeps_no_state():
    aggregator = UPGrad(torch.ones(2))
    assert aggregator.to(torch.float64).pref_vector.dtype == torch.float64
    assert aggregator.state_dict() == {}
    assert repr(UPGrad()) == "UPGrad(pref_vector=None, norm_eps=0.0001, reg_eps=0.0001)"
    assert repr(FusedProjector()) == "FusedProjector(norm_eps=0.0001, reg_eps=0.0001)"


def test_errors():
    with pytest.raises(ValueError, match=r"pref_vector must be \[m\], got \[1, 2\]"):
        UPGrad(torch.ones(1, 2))
    with pytest.raises(ValueError, match="must be >= 0"):
        DualProj(reg_eps=-1.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        FusedProjector(norm_eps=-1.0)
    with pytest.raises(ValueError, match="m >= 1"):
        UPGrad()(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"pref must be \[m\]"):
        UPGrad(torch.ones(2))(torch.ones(3, 5))
    with pytest.raises(ValueError, match="dimension 2"):
        UPGrad()(torch.ones(3))
