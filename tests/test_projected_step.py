"""The projection of an optimizer's step: against quadprog in float64, and in somebody else's loop."""

import warnings

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

from movae_fast import jacobian, ops, reference
from movae_fast.aggregation import UPGrad
from movae_fast.projected_step import flatten, has_metric, metric_roots, multipliers, project_step
from movae_fast.training.optim import Adamax
from movae_fast.training.precision import Precision
from tests.gramians import FAMILIES
from tests.gramians import jacobian as rows_of
from tests.test_step import images
from tests.test_step import step as train_step

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quadprog

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adamax": lambda p: Adamax(p, lr=0.02),
    "adamax, torch's": lambda p: torch.optim.Adamax(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "lamb": lambda p: pytorch_optimizer.Lamb(p, lr=0.02),
}


def closest(rows, step, metric):
    """argmin (x - s)' D^-1 (x - s) subject to J x >= 0, by quadprog over all P coordinates at once."""
    root = np.sqrt(metric)
    scaled = rows * root / np.linalg.norm(rows * root, axis=1, keepdims=True)
    found = quadprog.solve_qp(np.eye(len(step)), step / root, scaled.T, np.zeros(len(rows)))[0]
    return found * root


@pytest.mark.parametrize("metric", ["identity", "positive"])
def test_it_is_the_closest_step_that_worsens_no_objective(metric):
    """The primal problem in P unknowns, which knows nothing of multipliers or Gramians."""
    rng = np.random.default_rng(0)
    corrected = 0
    for t in range(60):
        m = int(rng.integers(1, 7))
        J = rows_of(rng, ("gaussian", "conflicting", "row norms 1e-6 to 1e6")[t % 3], m)
        s, D = rng.standard_normal(J.shape[1]), np.ones(J.shape[1])
        if metric == "positive":
            D = 10.0 ** rng.uniform(-2, 2, J.shape[1])
        both = torch.tensor(np.concatenate([J * np.sqrt(D), (s / np.sqrt(D))[None]]))
        found = multipliers(ops.gramian(both)).numpy()
        ours = s + D * (J.T @ found)
        theirs = closest(J, s, D)
        assert np.linalg.norm((ours - theirs) / np.sqrt(D)) <= 1e-6 * np.linalg.norm(s / np.sqrt(D)), (t, m)
        corrected += np.linalg.norm(ours - s) > 1e-3
    assert corrected > 20


@pytest.mark.parametrize("metric", [False, True], ids=["identity", "optimizer"])
def test_an_overflow_corrects_nothing(metric):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    before, rows = jacobian.flatten(list(layer.parameters())), torch.randn(2, 8)
    optimizer.step()
    stepped = flatten(list(layer.parameters()))
    rows[0, 1] = torch.inf
    found = project_step(list(layer.parameters()), before, rows, optimizer=optimizer if metric else None)
    assert found.tolist() == [0.0, 0.0]
    assert torch.equal(flatten(list(layer.parameters())), stepped)


@pytest.mark.parametrize("metric", ["identity", "optimizer"])
def test_fp16_overflows_leave_the_parameters_finite(metric):
    """The first step overflows (Adam has no state), later ones do, and between them steps are projected."""
    step = train_step("vq_vae", lr=1e-3, step_metric=metric, precision=Precision("fp16", torch.device("cpu")))
    for number, power in enumerate((60, 10, 10, 100, 10)):
        step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
        before = step.flat.data.clone()
        record = step(images(), number, step.model.draw_noise(16), log=True)
        assert step.flat.data.isfinite().all(), number
        assert torch.equal(step.flat.data, before) == (power > 10), number
        # A step that was left out is not a measured step without conflict.
        assert bool(record.step_cosines.isnan().all()) == (power > 10)
        if power == 10:
            assert record.step_cosines.nan_to_num(1).min() > -1e-3


def test_in_adams_metric_no_coordinate_jumps_where_gradients_cancel():
    """v_hat of a sum that cancels is all but zero: unbounded, D moves that coordinate by 274 and 503 rates."""
    for arch in ("betatc_vae", "vq_vae"):
        step = train_step(arch, lr=1e-4, agg="jd_sum", step_metric="optimizer")
        for number in range(5):
            before = step.flat.shared_data.clone()
            step(images(), number, step.model.draw_noise(16))
            assert (before - step.flat.shared_data).abs().max() < 30 * 1e-4, (arch, number)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        self.decoder = nn.Linear(4, 6)

    def losses(self, x):
        z = self.encoder(x)
        # Two that pull z apart, and one a thousand times smaller against both.
        return [z], [(self.decoder(z) - x).square().mean(), z.square().mean(), -1e-3 * z.abs().mean()]


def cosines(rows, step):
    rows, step = rows.double(), step.double()
    return (rows @ step / (rows.norm(dim=1) * step.norm()).clamp_min(1e-300)).tolist()


@pytest.mark.parametrize("metric", [False, True], ids=["identity", "optimizer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_somebody_elses_loop_no_applied_step_conflicts(name, metric):
    if metric and name == "sgd":
        pytest.skip("has no metric")
    worst = {}
    for project in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        shared = list(model.encoder.parameters())
        worst[project] = 1.0
        for _ in range(30):
            optimizer.zero_grad()
            features, losses = model.losses(torch.randn(16, 6))
            _, rows = jacobian.backward(
                losses, features=features, shared=shared, aggregator=UPGrad.strict(), return_rows=True
            )
            before = jacobian.flatten(shared)
            optimizer.step()
            if project:
                jacobian.project_step(shared, before, rows, optimizer=optimizer if metric else None)
            worst[project] = min(worst[project], *cosines(rows, before - flatten(shared)))
    assert worst[True] >= -1e-4  # float32's rounding of parameters beside a step
    assert worst[False] < -0.01


def test_the_metric_is_adams():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-3)
    out = [torch.empty_like(p) for p in layer.parameters()]
    metric_roots(optimizer, list(layer.parameters()), out)
    assert all(bool((root == 1).all()) for root in out)  # before the first step
    for _ in range(3):
        layer(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    metric_roots(optimizer, list(layer.parameters()), out)
    for p, root in zip(layer.parameters(), out, strict=True):
        state = optimizer.state[p]
        unbiased = state["exp_avg_sq"] / (1 - 0.95**3)
        torch.testing.assert_close(root**2, 1 / (unbiased.sqrt() + 1e-3))


@pytest.mark.parametrize("made", [torch.optim.Adamax, Adamax])
def test_the_metric_is_adamaxs(made):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = made(layer.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-3)
    assert has_metric(optimizer)
    out = [torch.empty_like(p) for p in layer.parameters()]
    for _ in range(3):
        layer(torch.randn(4, 5)).square().sum().backward()
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer.step()
    assert has_metric(optimizer)
    metric_roots(optimizer, list(layer.parameters()), out)
    for p, old, root in zip(layer.parameters(), before, out, strict=True):
        step = 0.1 / (1 - 0.9**3) * optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(step * root**2, old - p.detach(), rtol=1e-4, atol=1e-6)


def test_a_factor_on_the_metric_changes_nothing():
    rng = np.random.default_rng(1)
    J, s = rows_of(rng, FAMILIES[-1], 4), rng.standard_normal(8)
    D = rng.uniform(0.1, 1, 8)
    steps = []
    for factor in (1.0, 1e8):
        root = np.sqrt(factor * D)
        both = torch.tensor(np.concatenate([J * root, (s / root)[None]]))
        steps.append(s + factor * D * (J.T @ multipliers(ops.gramian(both)).numpy()))
    np.testing.assert_allclose(*steps, rtol=1e-6, atol=1e-9)


def test_the_op_is_the_reference():
    torch.manual_seed(2)
    for m in (1, 2, 4, 9):
        J, s = torch.randn(m, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
        J -= 0.9 * J.mean(0)
        found, status = ops.step_multipliers(J @ J.T, J @ s)
        assert status == 0
        torch.testing.assert_close(
            found, reference.step_multipliers(J @ J.T, J @ s, 1e-9), rtol=1e-7, atol=1e-9
        )


def test_bad_arguments_are_named():
    layer = nn.Linear(3, 2)
    parameters, rows = list(layer.parameters()), torch.randn(2, 8)
    before = jacobian.flatten(parameters)
    with pytest.raises(ValueError, match=r"before must be \[8\] and rows \[m, 8\], got \[7\] and \[2, 8\]"):
        project_step(parameters, before[1:], rows)
    with pytest.raises(ValueError, match=r"got \[8\] and \[2, 7\]"):
        project_step(parameters, before, rows[:, 1:])
    sgd = torch.optim.SGD(parameters, lr=1)
    with pytest.raises(ValueError, match=r"SGD has no second moments \(exp_avg_sq\) to measure by; leave out"):
        project_step(parameters, before, rows, optimizer=sgd)
    lion = pytorch_optimizer.Lion(parameters, lr=1)  # two betas, one moment
    layer(torch.ones(1, 3)).sum().backward()
    lion.step()
    with pytest.raises(ValueError, match="Lion has no second moments"):
        project_step(parameters, before, rows, optimizer=lion)
