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


class Halfway(QuadprogProjector):
    """Somebody's own projector, which nobody can solve for them."""

    def __call__(self, U, G):
        return (super().__call__(U, G) + U) / 2


PROJECTORS = [
    QuadprogProjector(),
    QuadprogProjector(norm_eps=0.0, reg_eps=1e-6),
    FusedProjector(norm_eps=0.0, reg_eps=1e-5),
    Halfway(reg_eps=1e-3),
]


@pytest.mark.parametrize(
    "pref", [None, torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)], ids=["mean", "pref"]
)
@pytest.mark.parametrize("projector", PROJECTORS, ids=repr)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_projector_as_torchjd_takes_it(ours, theirs, projector, pref):
    J = conflicting(3)
    expected = theirs(pref, projector)
    for aggregator in (ours(pref, projector), ours(pref, projector=projector), ours(pref)):
        aggregator.projector = projector
        torch.testing.assert_close(aggregator(J), expected(J), rtol=1e-8, atol=1e-10)
        gramian = J @ J.T
        torch.testing.assert_close(
            aggregator.gramian_weighting(gramian), expected.gramian_weighting(gramian), rtol=1e-8, atol=1e-10
        )
        assert aggregator.projector is projector
    aggregator.projector = None
    torch.testing.assert_close(aggregator(J), theirs(pref)(J), rtol=1e-9, atol=1e-11)


def test_a_projector_that_changes_is_followed():
    projector, J = QuadprogProjector(), conflicting(3)
    aggregator = UPGrad(projector=projector)
    projector.reg_eps = 0.1
    torch.testing.assert_close(aggregator(J), jd.UPGrad(projector=projector)(J), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(aggregator(J), UPGrad()(J), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ours", [UPGrad, DualProj])
def test_weights_of_rows_have_the_rows_dtype(ours, dtype):
    J = conflicting(3).to(dtype)
    aggregator = ours()
    assert aggregator.weighting(J).dtype == dtype
    exact = ours().weighting(J.double())
    torch.testing.assert_close(
        aggregator.weighting(J).double(), exact, rtol=float(torch.finfo(dtype).eps), atol=0
    )
    seen = []
    aggregator.gramian_weighting.register_forward_hook(lambda _m, _i, weights: seen.append(weights.dtype))
    assert aggregator.weighting(J).dtype == dtype
    assert seen == [torch.float64]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_it_was_made_of_can_be_set(ours, theirs):
    J, pref = conflicting(3), torch.tensor([0.123, 1.0, 2.5], dtype=torch.float64)
    aggregator = ours()
    aggregator.pref_vector = pref
    torch.testing.assert_close(aggregator(J), theirs(pref)(J), rtol=1e-9, atol=1e-11)
    assert str(aggregator) == str(theirs(pref))
    assert aggregator.to(torch.float32).pref_vector.dtype == torch.float32
    aggregator.pref_vector = None
    aggregator.norm_eps, aggregator.reg_eps = 0.0, 1e-6
    assert (aggregator.norm_eps, aggregator.reg_eps, aggregator.regularizer) == (0.0, 1e-6, "trace")
    torch.testing.assert_close(aggregator(J), ours(None, 0.0, 1e-6)(J), rtol=0, atol=0)
    aggregator.regularizer = "diagonal"
    torch.testing.assert_close(aggregator(J), ours.strict()(J), rtol=0, atol=0)
    assert repr(aggregator) == repr(ours.strict())
    for name, value, error, problem in (
        ("pref_vector", torch.ones(1, 2), ValueError, r"must be \[m\], got \[1, 2\]"),
        ("pref_vector", [1.0, 2.0], TypeError, "a tensor .* got list"),
        ("pref_vector", torch.tensor([1.0, torch.nan]), ValueError, "finite"),
        ("norm_eps", -1.0, ValueError, ">= 0"),
        ("reg_eps", float("nan"), ValueError, ">= 0 and finite"),
        ("reg_eps", float("inf"), ValueError, ">= 0 and finite"),
        ("regularizer", "rows", ValueError, "regularizer must be one of"),
        ("projector", "quadprog", TypeError, "DualConeProjector, got str"),
    ):
        with pytest.raises(error, match=problem):
            setattr(aggregator, name, value)
    torch.testing.assert_close(aggregator(J), ours.strict()(J), rtol=0, atol=0)  # as before
    with pytest.raises(ValueError, match="give a projector or norm_eps"):
        ours(reg_eps=1e-3, projector=QuadprogProjector())
    aggregator.projector = Halfway()
    with pytest.raises(AttributeError, match="reg_eps: the projector is Halfway"):
        aggregator.reg_eps = 1e-3


def test_strings_are_torchjds():
    for pref in (None, torch.tensor([1.0, 2.0]), torch.tensor([1.23456, 10.0, 0.1])):
        for ours, theirs in PAIRS:
            assert str(ours(pref)) == str(theirs(pref))


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
