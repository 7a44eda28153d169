"""ops.project_weights: against quadprog, against 50 digits, and against the conditions that define it."""

import math
import warnings

import numpy as np
import pytest
import torch
from torchjd.aggregation import DualProj, UPGrad
from torchjd.linalg import QuadprogProjector

from movae_fast import _csrc, ops
from tests.gramians import FAMILIES, gramian, kkt_residual, regularised, size, solution

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quadprog

ISAS = [name for name in _csrc.nearest_code_isas() if name in ("avx512", "avx2", "portable")]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("MOVAE_CPU_ISA", request.param)
    return request.param


def by_quadprog(A, u):
    """min v' A v, v >= u."""
    return quadprog.solve_qp(A, np.zeros(len(u)), np.eye(len(u)), u.astype(float))[0]


def project(G, u, norm_eps, reg_eps):
    projected, status = ops.project_rows(torch.tensor(u), torch.tensor(G), norm_eps=norm_eps, reg_eps=reg_eps)
    assert status == 0
    return projected.numpy()


def preferences(rng, m):
    """One of each kind: alike, positive, of mixed signs."""
    return [np.full(m, 1 / m), rng.uniform(0.1, 1, m), rng.standard_normal(m)][rng.integers(3)]


def sizes(rng, count):
    """m from 1 to 64, small ones more often: their supports can all occur."""
    return np.where(rng.random(count) < 0.75, rng.integers(1, 17, count), rng.integers(1, 65, count))


def compare(seed, count):
    """The largest error against quadprog, and KKT residual, of `count` Gramians of all families; and where."""
    rng = np.random.default_rng(seed)
    error, residual = (0.0, ""), (0.0, "")
    for t, m in enumerate(sizes(rng, count)):
        family = FAMILIES[t % len(FAMILIES)]
        G, pref = gramian(rng, family, int(m)), preferences(rng, m)
        A = regularised(G, 1e-4, 1e-4)
        weights, status = ops.project_weights(torch.tensor(G), torch.tensor(pref))
        assert status == 0
        each = np.diag(pref)
        projected = project(G, np.concatenate([each, pref[None]]), 1e-4, 1e-4)
        truth = np.array([by_quadprog(A, u) for u in [*each, pref]])
        for found, true in ((weights.numpy(), truth[:-1].sum(0)), (projected[-1], truth[-1])):
            error = max(error, (float(np.abs(found - true).max()) / size(pref, true), family))
        for u, v in zip([*each, pref], projected, strict=True):
            if np.any(u):
                residual = max(residual, (kkt_residual(A, u, v), family))
    return error, residual


def test_equals_quadprog_on_degenerate_gramians():
    error, residual = compare(seed=0, count=330)
    assert error[0] <= 1e-10, error
    assert residual[0] <= 1e-12, residual


@pytest.mark.slow
def test_equals_quadprog_on_ten_thousand_gramians():
    error, residual = compare(seed=1, count=10_000)
    print(f"10,000 Gramians: error against quadprog {error}, KKT residual {residual}")
    assert error[0] <= 1e-10, error
    assert residual[0] <= 1e-12, residual


@pytest.mark.parametrize("reg_eps", [1e-4, 1e-6, 1e-8])
def test_fifty_digits(isa, reg_eps):
    """The answer is the exact one rounded, whatever the condition; quadprog loses digits with 1 / reg_eps."""
    rng = np.random.default_rng(2)
    found = 0
    for t in range(55):
        family, m = FAMILIES[t % len(FAMILIES)], int(rng.integers(1, 13))
        G = gramian(rng, family, m)
        A = regularised(G, 0, reg_eps)
        for u in (np.eye(m)[rng.integers(m)], rng.standard_normal(m)):
            v = project(G, u, 0, reg_eps)
            exact = solution(A, u, v)
            if exact is None:
                continue
            found += 1
            assert np.abs(v - exact).max() <= 8 * np.finfo(float).eps * size(u, exact), (family, m)
    assert found >= 100


@pytest.mark.parametrize("reg_eps", [1e-6, 1e-8])
def test_kkt_with_little_regularisation(isa, reg_eps):
    rng = np.random.default_rng(3)
    for t, m in enumerate(sizes(rng, 110)):
        G = gramian(rng, FAMILIES[t % len(FAMILIES)], int(m))
        u = rng.standard_normal(m)
        assert kkt_residual(regularised(G, 0, reg_eps), u, project(G, u, 0, reg_eps)) <= 1e-12, (t, m)


def test_unregularised_singular_gramians():
    """reg_eps = 0 with a singular Gramian: quadprog refuses; any solution satisfies the conditions."""
    rng = np.random.default_rng(4)
    for t in range(60):
        family = ("rank 1", "rank m/2", "equal rows", "opposite rows", "stationary")[t % 5]
        m = int(rng.integers(2, 17))
        G, u = gramian(rng, family, m), rng.uniform(0.1, 1, m)
        v = project(G, u, 0, 0)
        assert kkt_residual(regularised(G, 0, 0), u, v) <= 1e-9, (family, m)


def test_every_cpu_path_and_number_of_threads_agree(monkeypatch):
    rng = np.random.default_rng(5)
    G = torch.tensor(gramian(rng, "gaussian", 80))
    answers = []
    for isa in ISAS:
        monkeypatch.setenv("MOVAE_CPU_ISA", isa)
        torch.set_num_threads(1)
        answers.append(ops.project_weights(G)[0])
        torch.set_num_threads(2)
        assert torch.equal(answers[-1], ops.project_weights(G)[0])
    torch.set_num_threads(1)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-14, atol=1e-14)


def test_closed_form_of_two():
    """m = 2: w1 = c1 + c2 max(0, -A12 / A11) and the other way round, with c = max(pref, 0)."""
    for angle in np.linspace(0, np.pi, 13):
        for length in (1.0, 1e-3, 50.0):
            J = np.array([[1.0, 0.0], [length * np.cos(angle), length * np.sin(angle)]])
            for pref in ([0.5, 0.5], [2.0, 1.0], [-1.0, 3.0]):
                A = regularised(J @ J.T, 1e-4, 1e-4)
                c = np.maximum(pref, 0)
                true = c + c[::-1] * np.maximum(0, -A[0, 1] / np.diagonal(A))
                found, _ = ops.project_weights(torch.tensor(J @ J.T), torch.tensor(pref, dtype=torch.float64))
                np.testing.assert_allclose(found.numpy(), true, rtol=1e-14)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 17])
def test_equals_torchjd(m):
    """With float64 Gramians TorchJD solves the same problem, at its own epsilons and at others."""
    for eps in (1e-4, 1e-6):
        projector = QuadprogProjector(norm_eps=eps, reg_eps=eps)
        J = torch.randn(m, 30, dtype=torch.float64)
        G = J @ J.T
        ours, _ = ops.project_weights(G, norm_eps=eps, reg_eps=eps)
        torch.testing.assert_close(
            ours, UPGrad(projector=projector).gramian_weighting(G), rtol=1e-9, atol=1e-12
        )
        ours, _ = ops.project_weights(G, norm_eps=eps, reg_eps=eps, mode="dualproj")
        torch.testing.assert_close(
            ours, DualProj(projector=projector).gramian_weighting(G), rtol=1e-9, atol=1e-12
        )


def test_small_gramians_give_the_preference():
    G = 1e-6 * torch.eye(3)
    assert ops.project_weights(G)[0].tolist() == [1 / 3] * 3
    assert ops.project_weights(torch.zeros(2, 2), norm_eps=0.0)[0].tolist() == [0.5, 0.5]
    assert ops.project_weights(torch.zeros(2, 2), norm_eps=0.0, reg_eps=0.0)[0].tolist() == [0.5, 0.5]
    assert ops.project_weights(torch.ones(1, 1))[0].tolist() == [1.0]


def test_scaling_the_gramian_changes_nothing_without_norm_eps():
    J = torch.randn(4, 9, dtype=torch.float64)
    G = J @ J.T
    weights, _ = ops.project_weights(G, norm_eps=0, reg_eps=1e-6)
    for power in (-900, -100, 100, 900):  # exact: powers of two
        assert torch.equal(ops.project_weights(G * 2.0**power, norm_eps=0, reg_eps=1e-6)[0], weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad):
    for i, j in ((0, 0), (0, 2), (2, 2)):
        G = torch.eye(3, dtype=torch.float64)
        G[i, j] = G[j, i] = bad
        for mode in ("upgrad", "dualproj"):
            weights, status = ops.project_weights(G, mode=mode)
            assert weights.isnan().all()
            assert status == -1
    pref = torch.tensor([1.0, bad, 1.0])
    weights, _ = ops.project_weights(torch.eye(3), pref)
    assert weights.isnan().all() or bad == -math.inf  # which, like any preference below zero, adds nothing


def test_float32_gramian_and_uneven_strides():
    J = torch.randn(3, 8)
    G = J @ J.T
    expected, _ = ops.project_weights(G.double().contiguous())
    assert torch.equal(ops.project_weights(G)[0], expected)
    assert torch.equal(ops.project_weights(G.T)[0], ops.project_weights(G.T.contiguous())[0])


def test_vectors_of_any_shape():
    J = torch.randn(3, 8, dtype=torch.float64)
    u = torch.randn(2, 4, 3, dtype=torch.float64)
    together, status = ops.project_rows(u, J @ J.T)
    assert together.shape == u.shape
    assert status == 0
    torch.testing.assert_close(together[1, 2], ops.project_rows(u[1, 2], J @ J.T)[0], rtol=1e-14, atol=1e-14)
    assert ops.project_rows(u[:0], J @ J.T)[0].shape == (0, 4, 3)


def test_errors_show_the_operands():
    with pytest.raises(ValueError, match=r"m >= 1, got \[0, 0\]"):
        ops.project_weights(torch.ones(0, 0))
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        ops.project_weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"pref must be \[m\]; got \[2\].*\[3, 3\]"):
        ops.project_weights(torch.eye(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"u must be \[..., m\]; got \[2\].*\[3, 3\]"):
        ops.project_rows(torch.ones(2), torch.eye(3))
    with pytest.raises(ValueError, match="reg_eps must be >= 0"):
        ops.project_weights(torch.eye(3), reg_eps=-1.0)
    with pytest.raises(ValueError, match="mode must be one of"):
        ops.project_weights(torch.eye(3), mode="mean")
    with pytest.raises(TypeError, match="int64"):
        ops.project_weights(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(lambda g: ops.project_weights(g)[0])(torch.ones(2, 3, 3))


def test_opcheck():
    J = torch.randn(3, 8)
    for G in (J @ J.T, (J @ J.T).double()):
        for total in (True, False):
            for pref in (torch.rand(3, dtype=torch.float64), None):
                torch.library.opcheck(torch.ops.movae.project_weights, (G, pref, 1e-4, 1e-4, total))
    torch.library.opcheck(torch.ops.movae.upgrad_weights, (J, torch.rand(3), 0.0, 1e-6, True))


def test_upgrad_weights_is_both_in_one():
    J = torch.randn(5, 3000)
    for mode in ("upgrad", "dualproj"):
        weights, G, status = ops.upgrad_weights(J, mode=mode)
        assert torch.equal(G, ops.gramian(J))
        assert torch.equal(weights, ops.project_weights(G, mode=mode)[0])
        assert status == 0
    with pytest.raises(ValueError, match=r"m >= 1, got \[0, 4\]"):
        ops.upgrad_weights(torch.ones(0, 4))


def test_under_compile():
    def weights(J):
        return ops.project_weights(ops.gramian(J * 2))[0] + ops.upgrad_weights(J)[0]

    J = torch.randn(4, 50)
    torch.testing.assert_close(torch.compile(weights, fullgraph=True)(J), weights(J))
