"""MO-VAE's aggregators, NUPGrad and COMFORT, against TorchJD's UPGrad and MGDA in float64."""

import math

import pytest
import torch
import torchjd.aggregation as jd
from torchjd.linalg import QuadprogProjector

from movae_fast.aggregation import COMFORT, NUPGrad, UPGrad
from movae_fast.aggregation.registry import make_aggregator, set_progress
from tests.host_reads import NoHostRead
from tests.jacobians import conflicting, gradients_by_torchjd

LENGTHS = torch.tensor([1e-4, 3.0, 0.2, 500.0], dtype=torch.float64)


def uneven(m=4):  # rows that conflict, of very different lengths
    J = conflicting(m)
    return J / J.norm(dim=1, keepdim=True) * LENGTHS[:m, None]


@pytest.mark.parametrize("pref", [None, [0.2, 1.0, 0.5, 0.7]])
def test_nupgrads_weights_are_upgrads_of_the_cosines(pref):
    torch.manual_seed(0)
    J, preference = uneven(), None if pref is None else torch.tensor(pref, dtype=torch.float64)
    cosines = torch.tensor([[float(a @ b / (a.norm() * b.norm())) for a in J] for b in J], dtype=torch.float64)
    truth = jd.UPGrad(preference).gramian_weighting(cosines)
    assert float((truth - 0.25).abs().max()) > 0.05  # they conflict
    torch.testing.assert_close(NUPGrad(preference)(J), truth @ J, rtol=1e-9, atol=1e-12)
    directions = J / J.norm(dim=1, keepdim=True) * LENGTHS.min()
    theirs = jd.UPGrad(preference, projector=QuadprogProjector(norm_eps=0.0))(directions)
    ours = NUPGrad(preference, norm_eps=0.0, row_lengths="shortest")(J)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_nupgrad_opposes_a_short_row_unless_all_rows_are_as_short():
    J = torch.tensor([[1.0, 0.0], [-0.5e3, 0.866e3]], dtype=torch.float64)  # 120 degrees, 1 : 1000
    assert float(NUPGrad.strict()(J) @ J[0]) < 0
    aggregator = NUPGrad.strict()
    aggregator.row_lengths = "shortest"
    assert bool((J @ aggregator(J) > -1e-6 * J.norm(dim=1)).all())
    assert "row_lengths='shortest')" in repr(aggregator)
    with pytest.raises(ValueError, match="one of own, shortest; got 'long'"):
        NUPGrad(row_lengths="long")


@pytest.mark.parametrize("row_lengths", ["own", "shortest"])
def test_a_zero_row_a_nan_and_low_precision(row_lengths):
    torch.manual_seed(0)
    J = torch.cat([conflicting(3), torch.zeros(1, 40, dtype=torch.float64)])
    aggregator = NUPGrad.strict()
    aggregator.row_lengths = row_lengths
    # Among four rows a zero row takes its part of the preference and nothing else.
    alone = NUPGrad(torch.full((3,), 0.25, dtype=torch.float64), 0.0, 1e-6, "diagonal", row_lengths=row_lengths)
    torch.testing.assert_close(aggregator(J), alone(J[:3]), rtol=1e-9, atol=1e-12)
    for bad in (torch.nan, torch.inf):
        broken = J.clone()
        broken[1, 3] = bad
        assert bool(aggregator(broken).isnan().all())
    assert torch.equal(aggregator(0 * J), 0 * J[0])
    assert aggregator(J.bfloat16()).dtype == torch.bfloat16


def beta(p, k=1.0, a=1.0, first=0.01, last=1.0):
    return first + (last - first) * (1 - math.exp(-k * p**a)) / (1 - math.exp(-k))


@pytest.mark.parametrize("options", [{}, {"k": 5.0, "a": 0.5}, {"k": 3.0, "a": 2.0, "first": 0.9, "last": 0.1}])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_comfort_is_the_mixture(options, p):
    torch.manual_seed(0)
    J, part = conflicting(), beta(p, **options)
    theirs = (1 - part) * jd.MGDA(1e-5, 250)(J) + part * jd.UPGrad()(J)
    aggregator = COMFORT(**options)
    assert aggregator.progress == 0
    aggregator.progress = p
    torch.testing.assert_close(aggregator(J), theirs, rtol=1e-9, atol=1e-11)
    weights = aggregator.gramian_weighting(J.float() @ J.float().T)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double() @ J, theirs, rtol=1e-3, atol=1e-4)


def test_comforts_schedule_without_steepness_is_a_power():
    gentle, limit = COMFORT(k=1e-6, a=2.0), COMFORT(k=0.0, a=2.0)
    gentle.progress = limit.progress = 0.5
    assert float(limit.gramian_weighting.beta()) == pytest.approx(0.01 + 0.99 * 0.25)
    assert float(gentle.gramian_weighting.beta()) == pytest.approx(
        float(limit.gramian_weighting.beta()), rel=1e-5
    )


def test_comforts_options_are_read_and_set_and_checked():
    aggregator = COMFORT.strict(k=2.0)
    assert (aggregator.k, aggregator.a, aggregator.first, aggregator.last) == (2.0, 1.0, 0.01, 1.0)
    aggregator.first = aggregator.last = 1.0  # then it is UPGrad
    torch.manual_seed(0)
    J = uneven()
    torch.testing.assert_close(aggregator(J), UPGrad.strict()(J), rtol=1e-12, atol=1e-12)
    assert repr(aggregator).startswith(
        "COMFORT(k=2.0, a=1.0, first=1.0, last=1.0, epsilon=1e-05, max_iters=250"
    )
    for name, value, words in (
        ("k", -1.0, "finite and >= 0"),
        ("a", 0.0, "finite and > 0"),
        ("a", math.inf, "finite"),
        ("first", 1.5, "from 0 to 1"),
        ("last", math.nan, "from 0 to 1"),
        ("progress", 1.1, "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {words}"):
            setattr(aggregator, name, value)
    with pytest.raises(ValueError, match="epsilon and max_iters must be > 0"):
        COMFORT(epsilon=0.0)


@pytest.mark.parametrize("optimize", [False, True])
def test_jac_to_grad(optimize):
    aggregator = COMFORT()
    aggregator.progress = 1.0
    for a, b in zip(*(gradients_by_torchjd(x, optimize) for x in (aggregator, jd.UPGrad())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_progress_reaches_a_comfort_inside_another_aggregator_without_a_host_read():
    aggregator = make_aggregator("crmogm", 3, {"weighting": "comfort"})
    inner = next(module for module in aggregator.modules() if hasattr(module, "progress"))
    with NoHostRead():
        set_progress(aggregator, 0.25)
    assert float(inner.progress) == 0.25
    set_progress(None, 0.5)
    set_progress(jd.Mean(), 0.5)
