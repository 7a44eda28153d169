"""The scale-free regularizer and the step's multipliers: against quadprog, 50 digits, and laws that must
hold."""

import math
import warnings

import numpy as np
import pytest
import torch

from movae_fast import ops, reference
from movae_fast.ops import extension
from tests.gramians import FAMILIES, gramian, kkt_residual, size, solution
from tests.test_ops_project_weights import ISAS, by_quadprog, preferences, sizes

TINY = np.finfo(float).tiny


@pytest.fixture(params=[*ISAS, "reference"])
def path(request, monkeypatch):
    """Each CPU path, and the plain torch that stands in for it."""
    if request.param == "reference":
        monkeypatch.setattr(extension, "missing", lambda z: True)
    else:
        monkeypatch.setenv("MOVAE_CPU_ISA", request.param)
    return request.param


def powers(G):
    """Powers of two that bring the diagonal into [1/4, 1), 1 for a zero row: written out from the
    definition."""
    d = np.diagonal(G)
    some = d >= TINY
    s = np.where(some, 2.0 ** -np.ceil((np.floor(np.log2(np.where(some, d, 1))) + 1) / 2), 1.0)
    scaled = d * s * s
    assert ((scaled[some] >= 0.25) & (scaled[some] < 1)).all()
    return s


def regularised(G, reg_eps):
    """The scaled problem's matrix and the scales, from the definition A = S (G + reg_eps diag(G)) S."""
    s = powers(G)
    A = s[:, None] * G * s
    A += reg_eps * np.diag(np.diagonal(A))
    zero = np.diagonal(G) < TINY
    A[zero], A[:, zero] = 0, 0
    A[zero, zero] = 1
    return A, s


def weights(G, pref, reg_eps=1e-6):
    found, status = ops.project_weights(
        torch.tensor(G), torch.tensor(pref), norm_eps=0, reg_eps=reg_eps, regularizer="diagonal"
    )
    assert status == 0
    return found.numpy()


def project(G, u, reg_eps):
    found, status = ops.project_rows(
        torch.tensor(u), torch.tensor(G), norm_eps=0, reg_eps=reg_eps, regularizer="diagonal"
    )
    assert status == 0
    return found.numpy()


def multipliers(G, b, reg_eps=1e-9):
    found, status = ops.step_multipliers(torch.tensor(G), torch.tensor(b), reg_eps=reg_eps)
    assert status == 0
    return found.numpy()


def test_rescaling_rows_rescales_the_weights(path):
    """weights(S G S, pref) = S^-1 weights(G, S pref) for every positive diagonal S."""
    rng = np.random.default_rng(0)
    largest = 0.0
    for t, m in enumerate(sizes(rng, 44 if path == "reference" else 220)):
        G, pref = gramian(rng, FAMILIES[t % len(FAMILIES)], int(m)), np.abs(preferences(rng, m))
        S = 10.0 ** rng.uniform(-12, 12, m)
        left = S * weights(S[:, None] * G * S, pref)
        right = weights(G, S * pref)
        lengths = np.sqrt(np.diagonal(G))  # a weight is measured by what it adds to the update
        scale = max(np.abs(lengths * right).max(), TINY)
        largest = max(largest, float(np.abs(lengths * (left - right)).max() / scale))
    assert largest <= 1e-9


def homogeneous(A, u):
    """quadprog's answer by way of a u of length one: its tolerances are absolute."""
    length = np.abs(u).max()
    return by_quadprog(A, u / length) * length if length > 0 else 0 * u


def test_equals_quadprog_on_the_scaled_problem(path):
    rng = np.random.default_rng(1)
    for t, m in enumerate(sizes(rng, 66 if path == "reference" else 330)):
        family = FAMILIES[t % len(FAMILIES)]
        G, pref = gramian(rng, family, int(m)), preferences(rng, m)
        A, s = regularised(G, 1e-4)
        truth = np.array([homogeneous(A, u / s) for u in [*np.diag(pref), pref]])
        found = project(G, np.concatenate([np.diag(pref), pref[None]]), 1e-4) / s
        for v, true in zip(found, truth, strict=True):
            assert np.abs(v - true).max() <= 1e-10 * size(pref / s, true), (family, m)
        total = weights(G, pref, 1e-4) / s
        assert np.abs(total - truth[:-1][pref > 0].sum(0)).max() <= 1e-10 * size(pref / s, truth), (family, m)


@pytest.mark.parametrize("reg_eps", [1e-4, 1e-6, 1e-8, 1e-9])
@pytest.mark.parametrize("isa", ISAS)
def test_fifty_digits(isa, reg_eps, monkeypatch):
    monkeypatch.setenv("MOVAE_CPU_ISA", isa)
    rng = np.random.default_rng(2)
    found = 0
    for t in range(55):
        family, m = FAMILIES[t % len(FAMILIES)], int(rng.integers(1, 13))
        G = gramian(rng, family, m)
        A, s = regularised(G, reg_eps)
        u = rng.standard_normal(m)
        v = project(G, u, reg_eps) / s
        exact = solution(A, u / s, v)
        if exact is None:
            continue
        found += 1
        assert np.abs(v - exact).max() <= 8 * np.finfo(float).eps * size(u / s, exact), (family, m)
    assert found >= 50


def test_the_update_conflicts_with_no_row_however_short(path):
    """What TorchJD's regularizer does not give: rows of lengths 1 to 1e-6, at obtuse angles."""
    rng = np.random.default_rng(3)
    for m in (2, 3, 4, 8):
        J = rng.standard_normal((m, 4 * m))
        J = (J - 1.2 * J.mean(0)) * np.logspace(0, -6, m)[:, None]
        G = J @ J.T
        w = weights(G, np.full(m, 1 / m))
        cosines = G @ w / np.sqrt(np.diagonal(G)) / np.sqrt(w @ G @ w)
        assert cosines.min() >= -1e-5, m
    torchjd, _ = ops.project_weights(torch.tensor(G), regularizer="trace")
    cosines = G @ torchjd.numpy() / np.sqrt(np.diagonal(G)) / np.sqrt(torchjd.numpy() @ G @ torchjd.numpy())
    assert cosines.min() < -0.1  # the test can fail


def test_zero_rows_keep_their_preference_and_meet_nobody(path):
    rng = np.random.default_rng(4)
    for zero in (0.0, 5e-324, TINY / 2):
        J = rng.standard_normal((4, 6))
        G = J @ J.T
        G[1], G[:, 1] = 1e-170, 1e-170  # not even an inner product that rounding left over
        G[1, 1] = zero
        pref = np.array([1.0, 0.3, 2.0, 0.5])
        keep = [0, 2, 3]
        found = weights(G, pref)
        assert found[1] == 0.3
        np.testing.assert_allclose(found[keep], weights(G[np.ix_(keep, keep)], pref[keep]), rtol=1e-12)
    assert weights(np.zeros((3, 3)), pref[:3]).tolist() == pref[:3].tolist()


@pytest.mark.parametrize("power", [-1000, -520, 520, 1000])
def test_small_and_large_diagonals(path, power):
    """Powers of two, which change no digit: the same weights from 1e-301 to 1e301."""
    rng = np.random.default_rng(5)
    J = rng.standard_normal((4, 3)) - 0.5
    G, pref = J @ J.T, rng.uniform(0.1, 1, 4)
    scaled = weights(G * 2.0**power, pref)
    if path == "reference":
        np.testing.assert_allclose(scaled, weights(G, pref), rtol=1e-9)
    else:
        assert np.array_equal(scaled, weights(G, pref))
    mixed = np.array([1e300, 1.0, 1e-300])
    assert np.isfinite(weights(np.diag(mixed), np.ones(3))).all()
    assert np.isfinite(weights(np.full((2, 2), 1.7e308), np.ones(2))).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(path, bad):
    for i, j in ((0, 0), (0, 2), (2, 2)):
        G = torch.eye(3, dtype=torch.float64)
        G[i, j] = G[j, i] = bad
        for found, status in (
            ops.project_weights(G, regularizer="diagonal"),
            ops.project_weights(G, regularizer="diagonal", mode="dualproj"),
            ops.step_multipliers(G, torch.ones(3)),
        ):
            assert found.isnan().all()
            assert status == -1
    found, _ = ops.step_multipliers(torch.eye(3), torch.tensor([1.0, bad, 1.0]))
    assert found.isnan().all()


def exact_multipliers(G, b, reg_eps):
    """By quadprog, in coordinates in which the rows are alike in length: min 1/2 l'Al + l'b, l >= 0."""
    A, s = regularised(G, reg_eps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import quadprog
    length = max(np.abs(s * b).max(), TINY)
    found = quadprog.solve_qp(A, -s * b / length, np.eye(len(b)), np.zeros(len(b)))[0]
    return s * found * length, A, s


def test_multipliers_equal_quadprog(path):
    rng = np.random.default_rng(6)
    for t, m in enumerate(sizes(rng, 33 if path == "reference" else 220)):
        family = FAMILIES[t % len(FAMILIES)]
        J = gramian(rng, family, int(m))
        b = np.sqrt(np.diagonal(J)) * rng.standard_normal(m)
        truth, _, s = exact_multipliers(J, b, 1e-4)
        found = multipliers(J, b, 1e-4)
        scale = max(np.abs(truth / s).max(), np.abs(s * b).max(), TINY)
        assert np.abs((found - truth) / s).max() <= 1e-9 * scale, (family, m)


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6, 1e-8, 0.0])
def test_the_corrected_step_conflicts_with_no_row_on_near_opposite_rows(angle):
    """Two rows all but opposite, a thousand times different in length, and a step that opposes one of them."""
    rng = np.random.default_rng(7)
    a, away, other = np.linalg.qr(rng.standard_normal((50, 3)))[0].T
    J = np.stack([a, 1e-3 * (-np.cos(angle) * a + np.sin(angle) * away)])
    for step in (a + other, -a + other, rng.standard_normal(50)):
        found = multipliers(J @ J.T, J @ step)
        corrected = step + J.T @ found
        cosines = J @ corrected / np.linalg.norm(J, axis=1) / np.linalg.norm(corrected)
        assert cosines.min() >= -1e-7, angle
        # The closest such step, not any: the correction is orthogonal to what it leaves (to the regularizer).
        assert abs((corrected - step) @ corrected) <= 1e-6 * step @ step
        assert (found >= 0).all()


def test_multipliers_satisfy_the_conditions(path):
    rng = np.random.default_rng(8)
    for t, m in enumerate(sizes(rng, 55)):
        G = gramian(rng, FAMILIES[t % len(FAMILIES)], int(m))
        b = np.sqrt(np.diagonal(G)) * rng.standard_normal(m)
        A, s = regularised(G, 1e-6)
        found = multipliers(G, b, 1e-6) / s
        y = A.astype(np.longdouble) @ found.astype(np.longdouble) + s * b
        scale = max(np.abs(found).max(), np.abs(s * b).max(), TINY)
        residual = np.abs(np.minimum(found, y)).max() / scale
        assert residual <= (1e-8 if path == "reference" else 1e-12), (t, m)


def test_a_step_without_conflict_is_left_alone():
    J = np.abs(np.random.default_rng(9).standard_normal((4, 9)))
    assert multipliers(J @ J.T, J @ np.ones(9)).tolist() == [0.0] * 4


def test_kkt_of_the_projection(path):
    rng = np.random.default_rng(10)
    for t, m in enumerate(sizes(rng, 44)):
        G = gramian(rng, FAMILIES[t % len(FAMILIES)], int(m))
        A, s = regularised(G, 1e-4)
        u = rng.standard_normal(m)
        assert kkt_residual(A, u / s, project(G, u, 1e-4) / s) <= (1e-9 if path == "reference" else 1e-12), t


def test_the_reference_says_what_the_specification_says():
    """C + reg_eps I with C the correlation matrix, v = S v'."""
    J = (
        torch.randn(4, 9, dtype=torch.float64)
        * torch.tensor([1e3, 1.0, 1e-3, 1e-6], dtype=torch.float64)[:, None]
    )
    G = J @ J.T
    A, S = reference.regularized_gramian(G, "diagonal", 0.0, 1e-6)
    torch.testing.assert_close(A, torch.corrcoef(J) * 0 + S[:, None] * G * S + 1e-6 * torch.eye(4))
    torch.testing.assert_close(A.diagonal(), torch.full((4,), 1 + 1e-6, dtype=torch.float64))
    torch.testing.assert_close(S, G.diagonal().rsqrt())


def test_errors_show_the_operands():
    with pytest.raises(ValueError, match=r"regularizer must be one of .*'trace', 'diagonal'.*; got 'row'"):
        ops.project_weights(torch.eye(2), regularizer="row")
    with pytest.raises(ValueError, match="reg_eps must be >= 0"):
        ops.project_weights(torch.eye(2), reg_eps=math.nan)
    with pytest.raises(ValueError, match=r"slopes must be \[m\]; got \[3\].*\[2, 2\]"):
        ops.step_multipliers(torch.eye(2), torch.ones(3))
    with pytest.raises(TypeError, match="slopes must be floating point, got int64"):
        ops.step_multipliers(torch.eye(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(lambda b: ops.step_multipliers(torch.eye(2), b)[0])(torch.ones(3, 2))


def test_opcheck():
    J = torch.randn(3, 8, dtype=torch.float64)
    for total in (True, False):
        torch.library.opcheck(torch.ops.movae.project_weights, (J @ J.T, None, 0.0, 1e-6, total, True))
    torch.library.opcheck(torch.ops.movae.step_multipliers, (J @ J.T, torch.randn(3), 1e-9))
    torch.library.opcheck(torch.ops.movae.upgrad_weights, (J, torch.rand(3), 0.0, 1e-6, True, True))


def test_under_compile():
    def both(J, b):
        G = ops.gramian(J * 2)
        return ops.project_weights(G, regularizer="diagonal")[0] + ops.step_multipliers(G, b)[0]

    J, b = torch.randn(4, 50), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(J, b), both(J, b))
