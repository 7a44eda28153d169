"""The projection against quadprog, against 50 digits, and against the conditions that define it."""

import itertools
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl

# conftest.py lies beside this file, so that pytest does not put the repository's root on the path by itself.
sys.path.insert(0, str(Path(__file__).parents[2]))

from movae_fast.kernels import gramian as gramian_kernel
from movae_fast.kernels import project_weights as kernel
from tests.gramians import FAMILIES, gramian, jacobian, kkt_residual, regularised, size, solution

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import quadprog

SMALLEST = np.finfo(float).tiny


def by_own_norms(G: np.ndarray, reg_eps: float) -> tuple[np.ndarray, np.ndarray]:
    """What `diagonal` solves: A, and the powers of two that scale G's rows to a diagonal in [1/4, 1)."""
    diagonal = np.diagonal(G)
    zero = diagonal < SMALLEST
    exponent = np.frexp(np.where(zero, 1, diagonal))[1] - 1
    scale = np.where(zero, 1.0, np.ldexp(1.0, (-1 - exponent) // 2))
    A = G * np.maximum.outer(scale, scale) * np.minimum.outer(scale, scale)
    A += reg_eps * np.diag(np.diagonal(A))
    A[zero] = A[:, zero] = 0
    A[zero, zero] = 1
    return A, scale


def problem(G: np.ndarray, norm_eps: float, reg_eps: float, diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and the rows' scales, of either regulariser."""
    return by_own_norms(G, reg_eps) if diagonal else (regularised(G, norm_eps, reg_eps), np.ones(len(G)))


def project(G, given, norm_eps, reg_eps, mode, diagonal, device):
    G, given = (torch.as_tensor(x, dtype=torch.float64, device=device) for x in (G, given))
    out, status = kernel.project(G, given, norm_eps, reg_eps, mode, diagonal)
    assert out.dtype == torch.float64
    assert status.dtype == torch.int32
    assert status.shape == ()
    assert status == 0
    return out.cpu().numpy()


def by_quadprog(A, u):
    """min v' A v, v >= u."""
    return quadprog.solve_qp(A, np.zeros(len(u)), np.eye(len(u)), np.asarray(u, float))[0]


def multipliers_by_quadprog(A, b):
    """min l' A l / 2 + l' b, l >= 0."""
    return quadprog.solve_qp(A, -b, np.eye(len(b)), np.zeros(len(b)))[0]


def slackness(A, b, multipliers):
    """max |min(l, A l + b)| beside |A| |l| + |b|, in extended precision: 0 at the solution alone."""
    wide = multipliers.astype(np.longdouble)
    return float((np.abs(np.minimum(wide, A.astype(np.longdouble) @ wide + b)) / sums(A, b, multipliers)).max())


def sums(A, b, multipliers):
    return np.abs(A) @ np.abs(multipliers) + np.abs(b)


def preferences(rng, m):
    """One of each kind: alike, positive, of mixed signs."""
    return [np.full(m, 1 / m), rng.uniform(0.1, 1, m), rng.standard_normal(m)][rng.integers(3)]


BOTH_MODES = ("sum", "rows")


def check_against_quadprog(rng, t, most, cases, device):
    """Gramian number t of those of one seed, in each case: a mode and whether the regulariser is `diagonal`."""
    family, m = FAMILIES[t % len(FAMILIES)], int(rng.integers(1, most + 1))
    G, pref = gramian(rng, family, m), preferences(rng, m)
    for mode, diagonal in cases:
        A, scale = problem(G, 1e-4, 1e-4, diagonal)
        # In scaled units: u / s is what the problem is in, s v what it gives.
        given = (pref if mode == "sum" else pref[None]) * scale
        found = project(G, given, 1e-4, 1e-4, mode, diagonal, device).reshape(m) / scale
        each = np.array([by_quadprog(A, c * e) for c, e in zip(pref, np.eye(m), strict=True)])
        true = each.sum(0) if mode == "sum" else by_quadprog(A, pref)
        assert np.abs(found - true).max() <= 1e-10 * size(pref, true), (family, m, mode, diagonal)
        if mode == "rows" and np.any(pref > 0):
            assert kkt_residual(A, pref, found) <= 1e-12, (family, m, diagonal)


def test_equals_quadprog_on_degenerate_gramians(device):
    """Each family with either mode and either regulariser; the slow test has all combinations."""
    rng = np.random.default_rng(0)
    for t in range(11):
        odd = bool(t % 2)
        check_against_quadprog(rng, t, 7, (("sum", odd), ("rows", not odd)), device)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
def test_equals_quadprog_on_larger_gramians(diagonal, device):
    rng = np.random.default_rng(1)
    for t in range(66):
        check_against_quadprog(rng, t, 20, [(mode, diagonal) for mode in BOTH_MODES], device)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("m", [31, 32, 33, 48, 64])
def test_equals_quadprog_on_the_largest(m, diagonal, device):
    rng = np.random.default_rng(m)
    for family in ("gaussian", "conflicting"):
        G, u = gramian(rng, family, m), rng.standard_normal((2, m))
        A, scale = problem(G, 0, 1e-4, diagonal)
        found = project(G, u * scale, 0, 1e-4, "rows", diagonal, device) / scale
        for x, v in zip(u, found, strict=True):
            assert np.abs(v - by_quadprog(A, x)).max() <= 1e-10 * size(x, v)
            assert kkt_residual(A, x, v) <= 1e-12


def check_fifty_digits(seed, count, problems, device):
    """One row of each of `count` Gramians for each problem: its regulariser, and whether that is `diagonal`."""
    rng = np.random.default_rng(seed)
    known = 0
    for t in range(count):
        family, m = FAMILIES[t % len(FAMILIES)], int(rng.integers(1, 13))
        G = gramian(rng, family, m)
        u = [np.eye(m)[rng.integers(m)], rng.standard_normal(m)]
        for which, (reg_eps, diagonal) in enumerate(problems):
            A, scale = problem(G, 0, reg_eps, diagonal)
            x = u[(t + which) % 2]
            v = project(G, x[None] * scale, 0, reg_eps, "rows", diagonal, device)[0] / scale
            exact = solution(A, x, v)
            if exact is None:
                continue
            known += 1
            assert np.abs(v - exact).max() <= 8 * np.finfo(float).eps * size(x, exact), (family, m)
    assert known >= 0.9 * len(problems) * count


def test_fifty_digits(device):
    """The answer is the exact one rounded, whatever the condition; the slow test has all pairs."""
    check_fifty_digits(2, 11, [(1e-4, False), (1e-8, True)], device)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("reg_eps", [1e-4, 1e-6, 1e-8])
def test_fifty_digits_of_more(reg_eps, diagonal, device):
    check_fifty_digits(3, 110, 2 * [(reg_eps, diagonal)], device)


def check_unregularised(rng, t, diagonal, device):
    family = ("rank 1", "rank m/2", "equal rows", "opposite rows", "stationary")[t % 5]
    m = int(rng.integers(2, 17))
    G, u = gramian(rng, family, m), rng.uniform(0.1, 1, m)
    A, scale = problem(G, 0, 0, diagonal)
    v = project(G, u[None] * scale, 0, 0, "rows", diagonal, device)[0] / scale
    assert kkt_residual(A, u, v) <= 1e-9, (family, m, diagonal)


def test_unregularised_singular_gramians(device):
    """reg_eps = 0 with a singular Gramian: quadprog refuses; any solution satisfies the conditions."""
    rng = np.random.default_rng(4)
    for t in range(10):  # each family once with either regulariser
        check_unregularised(rng, t, t >= 5, device)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
def test_more_unregularised_singular_gramians(diagonal, device):
    rng = np.random.default_rng(5)
    for t in range(150):
        check_unregularised(rng, t, diagonal, device)


# Found by counting: all of these take an index out of the support again, or need the tableau made again.
HARD = [
    *[("near-parallel", 11, 1e-8, True, 448255), ("rank 1", 5, 1e-11, True, 823862)],
    *[("rank m/2", 8, 1e-14, True, 53674), ("row norms 1e-6 to 1e6", 3, 1e-7, True, 225855)],
    *[("near-parallel", 10, 1e-8, True, 830550), ("rank m/2", 9, 1e-11, False, 936914)],
]


def check_hard(family, m, reg_eps, diagonal, seed, device):
    rng = np.random.default_rng(seed)
    G, x = gramian(rng, family, m), rng.standard_normal(m)
    A, scale = problem(G, 0, reg_eps, diagonal)
    v = project(G, x[None] * scale, 0, reg_eps, "rows", diagonal, device)[0] / scale
    assert kkt_residual(A, x, v) <= 1e-12
    found = project(G, x[None] / scale, 0, reg_eps, "multipliers", diagonal, device)[0] / scale
    assert found.min() >= 0
    assert slackness(A, x, found) <= 1e-14


@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, device):
    check_hard(*case, device)


@pytest.mark.parametrize("case", HARD[1:3])
def test_least_index_alone(case, device, monkeypatch):
    """The rule that cannot cycle, which no case found needs, from the first exchange on."""
    if device == "cuda":
        pytest.skip("a compiled kernel has its constants in it")
    monkeypatch.setattr(kernel, "PATIENCE", tl.constexpr(0))
    check_hard(*case, device)


def test_the_matrix_is_that_of_the_cpu_path(device):
    """To the last bit: a l^2 / 2 - l has its minimum at 1 / a, and a comes from a trace added up in order."""
    rng = np.random.default_rng(6)
    for m in (1, 3, 8):
        G = np.diag(10.0 ** rng.uniform(-8, 8, m))
        found = project(G, -np.ones((1, m)), 1e-4, 1e-7, "multipliers", False, device)[0]
        np.testing.assert_array_max_ulp(found, 1 / np.diagonal(regularised(G, 1e-4, 1e-7)), 1)


def check_closed_form_of_two(angle, length, diagonal, pref, device):
    """m = 2: w1 = c1 + c2 max(0, -A12 / A11) and the other way round, with c = max(pref, 0)."""
    J = np.array([[1.0, 0.0], [length * np.cos(angle), length * np.sin(angle)]])
    G = J @ J.T
    A, scale = problem(G, 1e-4, 1e-4, diagonal)
    c = np.maximum(pref, 0) / scale
    true = scale * (c + c[::-1] * np.maximum(0, -A[0, 1] / np.diagonal(A)))
    found = project(G, pref, 1e-4, 1e-4, "sum", diagonal, device)
    np.testing.assert_allclose(found, true, rtol=1e-14)


PREFERENCES_OF_TWO = ([0.5, 0.5], [-1.0, 3.0])


def test_closed_form_of_two(device):
    """Each pair of an angle, a length, a regulariser and a preference; the slow test has all combinations."""
    for at, angle in enumerate(np.linspace(0, np.pi, 5)):
        for which, length in enumerate((1.0, 1e-3)):
            for diagonal in (False, True):
                pref = PREFERENCES_OF_TWO[(at + which + diagonal) % 2]
                check_closed_form_of_two(angle, length, diagonal, pref, device)


@pytest.mark.slow
def test_closed_form_of_two_everywhere(device):
    """Every combination, at more angles and lengths."""
    for angle, length, diagonal, pref in itertools.product(
        np.linspace(0, np.pi, 13), (1.0, 1e-3, 50.0), (False, True), (*PREFERENCES_OF_TWO, [2.0, 1.0])
    ):
        check_closed_form_of_two(angle, length, diagonal, pref, device)


def test_small_gramians_give_the_preference(device):
    for G, norm_eps, reg_eps in (
        (1e-6 * np.eye(3), 1e-4, 1e-4),
        (np.zeros((3, 3)), 0, 1e-4),
        (np.zeros((3, 3)), 0, 0),
    ):
        for diagonal in (False, True):
            assert project(G, [0.25, 2, -1], norm_eps, reg_eps, "sum", diagonal, device).tolist() == [
                0.25,
                2,
                0,
            ]
    assert project([[1.0]], [1.0], 0, 1e-4, "sum", False, device).tolist() == [1.0]
    assert project(np.eye(2), [[-1.0, -2.0]], 0, 1e-4, "rows", False, device).tolist() == [[0, 0]]
    assert project(np.eye(2), np.zeros((0, 2)), 0, 1e-4, "rows", False, device).shape == (0, 2)


@pytest.mark.parametrize("diagonal", [False, True])
def test_scaling_the_gramian_changes_nothing_without_norm_eps(diagonal, device):
    J = np.random.default_rng(7).standard_normal((3, 9))
    weights = project(J @ J.T, np.ones(3), 0, 1e-6, "sum", diagonal, device)
    for power in (-900, -100, 100, 900):  # exact: powers of two
        scaled = J @ J.T * 2.0**power
        assert np.array_equal(project(scaled, np.ones(3), 0, 1e-6, "sum", diagonal, device), weights)


def test_rows_of_any_length_are_alike_by_their_own_norms(device):
    """weights(S G S, pref) = inv(S) weights(G, S pref): rescaling changes nothing but the weights' units."""
    rng = np.random.default_rng(8)
    for t, family in enumerate(FAMILIES):
        m = int(rng.integers(2, 4))
        G, pref = gramian(rng, family, m), rng.uniform(0.1, 1, m)
        S = 10.0 ** rng.uniform(-12, 12, m)
        if t % 2:  # exact
            S = 2.0 ** np.round(np.log2(S))
        found = S * project(np.diag(S) @ G @ np.diag(S), pref / S, 0, 1e-4, "sum", True, device)
        expected = project(G, pref, 0, 1e-4, "sum", True, device)
        # In units of the rows' norms: in others one long row's weight would hide the rest.
        norm = np.sqrt(np.diagonal(G)) + (np.diagonal(G) == 0)
        found, expected = found * norm, expected * norm
        assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max(), family


def test_zero_rows_keep_their_preference_and_touch_nobody(device):
    rng = np.random.default_rng(9)
    G, pref = gramian(rng, "conflicting", 5), rng.uniform(0.1, 1, 5)
    expected = project(G, pref, 0, 1e-4, "sum", True, device)
    for diagonal_entry in (0.0, 5e-324, 1e-310):
        wider = np.zeros((7, 7))
        wider[:5, :5] = G
        wider[5, 5] = wider[6, 6] = diagonal_entry
        wider[0, 5] = wider[5, 6] = 1e-170  # more than two such rows can have: rounding
        found = project(wider, [*pref, 0.75, 3.0], 0, 1e-4, "sum", True, device)
        assert np.array_equal(found, [*expected, 0.75, 3.0])
        # Nothing pulls such a row's weight above its bound but zero.
        rows = project(wider, [[*pref, -1.0, 2.0]], 0, 1e-4, "rows", True, device)
        assert rows[0, 5:].tolist() == [0.0, 2.0]


def test_the_longest_and_the_shortest_rows(device):
    """Diagonals from the smallest to the largest numbers beside each other, whose sum would overflow."""
    lengths = np.array([2.0**-510, 1.0, 2.0**511.5, 2.0**511.5, 1e150])
    cosines = np.array(
        [
            [1, -0.5, 0, 0, 0],
            [-0.5, 1, -0.5, 0, 0],
            [0, -0.5, 1, -0.5, 0],
            [0, 0, -0.5, 1, -0.5],
            [0, 0, 0, -0.5, 1],
        ]
    )
    G = cosines * np.maximum.outer(lengths, lengths) * np.minimum.outer(lengths, lengths)
    assert np.isfinite(G).all()
    with np.errstate(over="ignore"):
        assert np.isinf(np.trace(G))
    pref = np.array([0.5, 0.25, 1.0, 1.0, 0.125])
    found = project(G, pref / lengths, 0, 1e-4, "sum", True, device) * lengths
    A = cosines + 1e-4 * np.eye(5)
    true = sum(by_quadprog(A, c * e) for c, e in zip(pref, np.eye(5), strict=True))
    np.testing.assert_allclose(found, true, rtol=1e-10)


def check_multipliers(rng, t, diagonals, device):
    """A row of Gramian number t of those of one seed for each regulariser."""
    family, m = FAMILIES[t % len(FAMILIES)], int(rng.integers(1, 9))
    G = gramian(rng, family, m)
    for diagonal in diagonals:
        x = rng.standard_normal(m)
        A, scale = problem(G, 0, 1e-4, diagonal)
        found = project(G, x[None] / scale, 0, 1e-4, "multipliers", diagonal, device)[0] / scale
        true = multipliers_by_quadprog(A, x)
        assert np.abs(found - true).max() <= 1e-9 * size(x, true), (family, m)
        assert found.min() >= 0
        assert slackness(A, x, found) <= 1e-14, (family, m)


def test_multipliers_equal_quadprog(device):
    rng = np.random.default_rng(10)
    for t in range(11):
        check_multipliers(rng, t, (False, True), device)


@pytest.mark.slow
def test_multipliers_equal_quadprog_on_more(device):
    rng = np.random.default_rng(11)
    for t in range(66):
        check_multipliers(rng, t, (False, True, False, True), device)


@pytest.mark.parametrize("reg_eps", [1e-6, 1e-9])
@pytest.mark.parametrize("apart", [1e-6, 1e-9, 1e-12])
def test_multipliers_of_near_opposite_rows(apart, reg_eps, device):
    G = np.array([[1, apart - 1, 0.1], [apart - 1, 1, -0.1], [0.1, -0.1, 4]])
    b = np.array([[-1, -0.5, 0.3], [-1, 1, 0.2], [1e6, -1, -1], [1, 1, 1]])
    for diagonal in (False, True):
        A, scale = problem(G, 0, reg_eps, diagonal)
        for x, found in zip(
            b, project(G, b / scale, 0, reg_eps, "multipliers", diagonal, device) / scale, strict=True
        ):
            assert found.min() >= 0
            assert slackness(A, x, found) <= 1e-14


def test_multipliers_without_a_solution_are_reported(device):
    G, b = torch.zeros(2, 2, dtype=torch.float64, device=device), torch.tensor([[-1.0, 1.0]], device=device)
    assert kernel.project(G, b, 0, 0, "multipliers", False)[1] == 1


MODES = [("sum", torch.ones(3)), ("rows", torch.ones(2, 3)), ("multipliers", torch.ones(1, 3))]
PLACES = ((0, 0), (0, 2), (2, 2))


def check_not_finite(bad, place, mode, given, diagonal, device):
    G = torch.eye(3, dtype=torch.float64, device=device)
    G[place] = bad
    out, status = kernel.project(G, given.to(device), 1e-4, 1e-4, mode, diagonal)
    assert out.isnan().all()
    assert status == -1


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_everywhere(bad, device):
    for place, (mode, given), diagonal in itertools.product(PLACES, MODES, (False, True)):
        check_not_finite(bad, place, mode, given, diagonal, device)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad, device):
    """Each place and each mode with either regulariser; the slow test has all combinations."""
    good = torch.eye(3, dtype=torch.float64, device=device)
    for at, place in enumerate(PLACES):
        for which, (mode, given) in enumerate(MODES):
            check_not_finite(bad, place, mode, given, bool((at + which) % 2), device)
    weights, status = kernel.project(good, torch.tensor([1.0, bad, 1.0], device=device), 0, 1e-4, "sum", True)
    # Minus infinity, like any preference below zero, adds nothing.
    assert weights.tolist() == [1, 0, 1] if bad == -math.inf else weights.isnan().all()
    assert status == 0
    given = torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 1.0]], device=device)
    for mode in ("rows", "multipliers"):
        rows, status = kernel.project(good, given, 0, 1e-4, mode, False)
        assert rows[0].isfinite().all()
        assert rows[1].isnan().all()
        assert status == 0


def test_only_the_upper_triangle_is_read(device):
    J = torch.randn(4, 9, dtype=torch.float64, device=device)
    G = J @ J.T
    upper = G.triu() + torch.full_like(G, math.nan).tril(-1)
    for diagonal in (False, True):
        for mode, given in (("sum", torch.ones(4)), ("rows", torch.randn(2, 4))):
            found = [kernel.project(g, given.to(device), 0, 1e-4, mode, diagonal)[0] for g in (G, upper)]
            assert torch.equal(*found)


def check_upgrad(m, P, dtype, mode, diagonal, device):
    rows = torch.from_numpy(jacobian(np.random.default_rng(m), "conflicting", m)).to(device)
    rows = (rows[:, torch.arange(P, device=device) % rows.shape[1]] * torch.randn(P, device=device)).to(dtype)
    given = torch.rand(m, dtype=torch.float64, device=device)
    weights, G, status = kernel.upgrad(rows, given, 1e-4, 1e-5, mode, diagonal)
    assert status == 0
    assert torch.equal(G, G.T)
    truth = gramian_kernel.gramian(rows)
    norm = truth.diagonal().sqrt()
    assert ((G - truth).abs() <= 2 * P * 2.0**-53 * norm[:, None] * norm).all()
    alone = kernel.project(G, given if mode == "sum" else given[None], 1e-4, 1e-5, mode, diagonal)[0].view(-1)
    torch.testing.assert_close(weights, alone, rtol=1e-14, atol=1e-14 * float(alone.abs().max()))
    again = kernel.upgrad(rows, given, 1e-4, 1e-5, mode, diagonal)
    assert torch.equal(weights, again[0])
    assert torch.equal(G, again[1])


@pytest.mark.parametrize(
    ("m", "P", "dtype"),
    [
        *[(1, 1, torch.float32), (2, 1000, torch.float64), (3, 257, torch.float32), (4, 20_000, torch.float32)],
        *[(8, 1500, torch.float64), (9, 30, torch.float32)],
    ],
)
def test_upgrad_is_both_in_one(m, P, dtype, device):
    check_upgrad(m, P, dtype, "sum", m % 2 == 0, device)


@pytest.mark.parametrize(("m", "mode"), [(3, "rows"), (8, "multipliers"), (9, "rows")])
def test_upgrad_in_other_modes(m, mode, device):
    check_upgrad(m, 40, torch.float32, mode, True, device)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "P"), [(8, 1), (5, 70_000), (16, 7000), (17, 300), (31, 40), (33, 60), (64, 70)])
def test_upgrad_at_more_shapes(m, P, device):
    check_upgrad(m, P, torch.float32, "sum", True, device)


def test_upgrad_of_strided_rows_and_of_nothing(device):
    wide = torch.randn(3, 70, device=device)
    pref = torch.tensor([0.5, 0.25, 0.25], device=device)
    for rows in (wide[:, 5:60], torch.randn(40, 3, device=device).T):
        found = kernel.upgrad(rows, pref, 0, 1e-4, "sum", True)
        for x, y in zip(found, kernel.upgrad(rows.contiguous(), pref, 0, 1e-4, "sum", True), strict=True):
            assert torch.equal(x, y)
    weights, G, status = kernel.upgrad(wide[:, :0], pref, 0, 1e-4, "sum", True)
    assert weights.tolist() == [0.5, 0.25, 0.25]
    assert not G.any()
    assert status == 0


def test_upgrad_of_a_nan(device):
    for m in (3, 9):
        rows = torch.randn(m, 50, device=device)
        rows[1, 7] = math.nan
        weights, _, status = kernel.upgrad(rows, torch.ones(m, device=device), 0, 1e-4, "sum", True)
        assert weights.isnan().all()
        assert status == -1
