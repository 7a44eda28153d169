"""ops.gramian_weights: against TorchJD, against 50 digits, and against what defines each method."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import torchjd.aggregation as jd

from movae_fast import ops, reference
from movae_fast.ops import extension
from movae_fast.ops.gramian_weights import METHODS, _gramian_weights_cuda, _warn_of_the_host, weigh_in_torch
from tests.gramians import FAMILIES, gramian, jacobian

EPS = np.finfo(float).eps
ALIGNED = ("aligned_mtl_min", "aligned_mtl_median", "aligned_mtl_rmse")
SIZES = range(1, 9)


def weights(G, method, **options):
    return ops.gramian_weights(torch.as_tensor(G), method, **options).numpy()


def whole_numbers(rng, family, m):
    """A Gramian of small integers, which float64 holds exactly: its rank is what it should be."""
    J = np.round(4 * jacobian(rng, family, m)).clip(-99, 99)
    if family in ("rank 1", "rank m/2"):
        rank = 1 if family == "rank 1" else (m + 1) // 2
        J = rng.integers(-4, 5, (m, rank)) @ rng.integers(-4, 5, (rank, 8))
    return (J @ J.T).astype(float)


def spectrum(G):
    """Eigenvalues and eigenvectors in 50 digits."""
    with mpmath.workdps(50):
        values, vectors = mpmath.eigsy(mpmath.matrix(G.tolist()))
    return values, vectors


def known_rank(values, tolerance):
    """Whether the cut-off lies where no rounding of the eigenvalues reaches it."""
    return not any(tolerance / 16 < abs(v) < 16 * tolerance for v in values)


@pytest.mark.parametrize("family", FAMILIES)
def test_functions_of_the_eigenvalues_in_fifty_digits(family):
    """Aligned-MTL, IMTL-G: eigenvalues are good to m eps of the largest, and so is w beside the condition."""
    rng = np.random.default_rng(0)
    compared = 0
    for m in SIZES:
        exact = family in ("rank 1", "rank m/2", "zero row", "equal rows", "opposite rows")
        G = whole_numbers(rng, family, m) if exact else gramian(rng, family, m)
        values, vectors = spectrum(G)
        largest = max(values)
        cutoff = m * EPS * float(largest)
        if not known_rank(values, cutoff) or not np.any(G):
            continue
        kept = sorted(v for v in values if v > cutoff)
        loss = 8 * m * EPS * float(largest / kept[0])
        pref = rng.uniform(0.1, 1, m)
        compared += loss < 1e-3
        scales = (kept[0], kept[(len(kept) - 1) // 2], sum(kept) / len(kept))
        for method, scale in zip(ALIGNED, scales, strict=True):
            with mpmath.workdps(50):
                factors = mpmath.diag([mpmath.sqrt(scale / v) if v > cutoff else 0 for v in values])
                true = vectors * factors * vectors.T * mpmath.matrix(pref.tolist())
            found = weights(G, method, pref=torch.tensor(pref))
            limit = loss * float(mpmath.sqrt(scale / kept[0])) * np.linalg.norm(pref)
            assert np.abs(found - np.array(true.tolist(), dtype=float).ravel()).max() <= limit, (method, m)
        with mpmath.workdps(50):
            inverse = vectors * mpmath.diag([1 / v if abs(v) > cutoff else 0 for v in values]) * vectors.T
            v = inverse * mpmath.matrix([mpmath.sqrt(G[i, i]) for i in range(m)])
            total = sum(v)
        if abs(total) < 1e-11:
            continue
        true = np.array([float(x / total) for x in v])
        error = loss * float(
            mpmath.norm(mpmath.matrix(np.sqrt(np.diagonal(G)).tolist())) / kept[0] / abs(total)
        )
        assert np.abs(weights(G, "imtl_g") - true).max() <= error * (1 + m * np.abs(true).max()), m
    assert compared >= (1 if family in ("near-parallel", "row norms 1e-6 to 1e6", "stationary") else 5)


@pytest.mark.parametrize(
    "family", ["gaussian", "conflicting", "zero row", "equal rows", "scales 1e-30 to 1e30"]
)
def test_equals_torchjd(family):
    rng = np.random.default_rng(1)
    for m in SIZES:
        G = (
            whole_numbers(rng, family, m)
            if family.endswith("row") or "equal" in family
            else gramian(rng, family, m)
        )
        T, pref = torch.tensor(G), torch.tensor(rng.uniform(0.1, 1, m))
        for mode in ("min", "median", "rmse"):
            theirs = jd.AlignedMTL(pref, scale_mode=mode).gramian_weighting(T)
            ours = ops.gramian_weights(T, f"aligned_mtl_{mode}", pref)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            weights(G, "imtl_g"), jd.IMTLG().gramian_weighting(T).numpy(), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("epsilon", "max_iters"), [(1e-3, 100), (1e-9, 7), (0.3, 100)])
def test_mgda_takes_torchjds_steps(family, epsilon, max_iters):
    """Where two rows are equally good to step to, rounding decides; the vector that is reached is the same."""
    rng = np.random.default_rng(2)
    for m in SIZES:
        G = gramian(rng, family, m)
        theirs = jd.MGDA(epsilon, max_iters).gramian_weighting(torch.tensor(G)).numpy()
        ours = weights(G, "mgda", epsilon=epsilon, max_iters=max_iters)
        assert ours.sum() == pytest.approx(1)
        apart = (ours - theirs) @ G @ (ours - theirs)
        # A square that is zero comes out as m^2 products' roundings.
        assert apart <= 4 * m * m * EPS * np.trace(G), m
        if family in ("gaussian", "conflicting"):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_mgda_of_two_in_closed_form():
    for angle in np.linspace(0, np.pi, 9):
        J = np.array([[1.0, 0.0], [3 * np.cos(angle), 3 * np.sin(angle)]])
        G = J @ J.T
        share = np.clip((G[1, 1] - G[0, 1]) / np.square(J[0] - J[1]).sum(), 0, 1)
        np.testing.assert_allclose(weights(G, "mgda"), [share, 1 - share], atol=1e-15)


@pytest.mark.parametrize("family", FAMILIES)
def test_pcgrad_is_the_loop_given_the_orders(family):
    rng = np.random.default_rng(3)
    for m in SIZES:
        G = torch.tensor(gramian(rng, family, m))
        order = torch.rand(m, m).argsort(1)
        expected = reference.pcgrad(G, order)
        found = ops.gramian_weights(G, "pcgrad", order=order)
        # m dependent steps, each with a sum of m products of which some cancel.
        limit = 4 * m * m * EPS * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def test_pcgrad_draws_every_order_equally_often():
    G = torch.tensor(gramian(np.random.default_rng(4), "conflicting", 3))
    others = [list(itertools.permutations(range(3)))] * 3
    outcomes = [reference.pcgrad(G, torch.tensor(order)) for order in itertools.product(*others)]
    expected = torch.stack(outcomes).mean(0)
    spread = torch.stack(outcomes).std(0)
    assert (spread > 0).any()  # the order matters here, so the test can fail
    draws = torch.stack([ops.gramian_weights(G, "pcgrad") for _ in range(2000)])
    assert ((draws.mean(0) - expected).abs() <= 4 * spread / math.sqrt(2000)).all()
    assert len({tuple(w.tolist()) for w in draws}) == len(
        {tuple(round(x, 12) for x in w.tolist()) for w in outcomes}
    )


def cagrad_gap(G, found, c):
    """f(w) - min_i <g_i, d> in 50 digits: 0 at the optimum of both problems, and nowhere else; and phi / |g_w|.

    w minimises f(w) = <g_w, g_0> + phi |g_w| on the simplex exactly where d = g_0 + phi g_w / |g_w| maximises
    the least <g_i, d> in the ball of radius phi = c |g_0|.
    """
    with mpmath.workdps(50):
        m = len(G)
        A = mpmath.matrix(G.tolist()) / sum(G[i, i] for i in range(m))
        mean = mpmath.matrix([mpmath.mpf(1) / m] * m)
        excess = mpmath.matrix(found.tolist()) - mean
        w = excess / sum(excess)
        phi = c * mpmath.sqrt((mean.T * A * mean)[0])
        length = mpmath.sqrt((w.T * A * w)[0])
        inner = A * (mean + phi / length * w)
        assert min(excess) >= -m * EPS
        # On the ball's surface, as far as the mean's and the weights' quadratic forms in float64 can tell.
        rounding = 4 * m * m * EPS * (c * c + sum(excess) * sum(found))
        assert abs((excess.T * A * excess)[0] - phi**2) <= rounding
        return float((w.T * A * mean)[0] + phi * length - min(inner)), float(phi / length)


@pytest.mark.parametrize("family", FAMILIES)
def test_cagrad_is_optimal_in_fifty_digits_and_as_near_torchjd_as_its_solver_allows(family):
    rng = np.random.default_rng(5)
    for m in SIZES:
        G = gramian(rng, family, m)
        for c in (0.1, 0.5, 2.0):
            found = weights(G, "cagrad", c=c)
            theirs = jd.CAGrad(c).gramian_weighting(torch.tensor(G)).numpy()
            if not found.any():
                assert not theirs.any(), (m, c)
                continue
            gap, stretch = cagrad_gap(G, found, c)
            # Of trace 1 the Gramian is good to eps, and so is the level that its rows are brought to.
            assert gap <= 8 * m * EPS * max(1, c) * max(1, stretch), (m, c)
            # |d' - d|^2 <= 2 phi / |g_w| (f(w') - f*) for any w': CLARABEL stops at a gap of some 1e-8.
            apart = (found - theirs) @ G @ (found - theirs) / np.trace(G)
            assert apart <= 2 * stretch * 4e-8 + 4 * m * m * EPS, (m, c)


def test_cagrad_of_two_by_a_fine_search():
    for angle in (0.3, 1.2, 2.0, 2.9):
        J = np.array([[1.0, 0.0], [2 * np.cos(angle), 2 * np.sin(angle)]])
        G = J @ J.T
        mean, shares = J.mean(0), np.linspace(0, 1, 200_001)[:, None]
        hull = shares * J[0] + (1 - shares) * J[1]
        phi = 0.5 * np.linalg.norm(mean)
        best = hull[np.argmin(hull @ mean + phi * np.linalg.norm(hull, axis=1))]
        expected = mean + phi * best / np.linalg.norm(best)
        np.testing.assert_allclose(weights(G, "cagrad") @ J, expected, atol=2e-5)


def test_cagrad_with_no_radius_is_the_mean():
    G = gramian(np.random.default_rng(6), "conflicting", 4)
    np.testing.assert_allclose(weights(G, "cagrad", c=0.0), jd.CAGrad(0.0).gramian_weighting(torch.tensor(G)))


@pytest.mark.parametrize("m", SIZES)
def test_zero_gramians_are_torchjds(m):
    zero = torch.zeros(m, m, dtype=torch.float64)
    for method, peer in {
        "aligned_mtl_min": jd.AlignedMTL(),
        "cagrad": jd.CAGrad(0.5),
        "imtl_g": jd.IMTLG(),
        "mgda": jd.MGDA(),
        "pcgrad": jd.PCGrad(),
    }.items():
        assert torch.equal(ops.gramian_weights(zero, method), peer.gramian_weighting(zero)), method


@pytest.mark.parametrize("method", METHODS)
def test_scaling_by_powers_of_two_changes_nothing(method):
    G = torch.tensor(gramian(np.random.default_rng(7), "conflicting", 5))
    options = {"order": torch.rand(5, 5).argsort(1)} if method == "pcgrad" else {}
    options |= {"norm_eps": 0.0} if method == "cagrad" else {}
    expected = ops.gramian_weights(G, method, **options)
    # IMTL-G's threshold is absolute, as TorchJD's: the longest row's length may not exceed some 1e12.
    for power in (-900, -100, 60) if method == "imtl_g" else (-900, -100, 100, 900):
        assert torch.equal(ops.gramian_weights(G * 2.0**power, method, **options), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(method, bad):
    for i, j in ((0, 0), (0, 2), (2, 2)):
        G = torch.eye(3, dtype=torch.float64)
        G[i, j] = G[j, i] = bad
        assert ops.gramian_weights(G, method).isnan().all()
    if method in ALIGNED:
        assert ops.gramian_weights(torch.eye(3), method, torch.tensor([1.0, bad, 1.0])).isnan().all()


@pytest.mark.parametrize("method", METHODS)
def test_sizes_dtypes_and_strides(method):
    J = torch.randn(70, 100, dtype=torch.float64)
    large = ops.gramian_weights(J @ J.T, method)
    assert large.isfinite().all()
    G = (J[:4] @ J[:4].T).float()
    options = {"order": torch.rand(4, 4).argsort(1)} if method == "pcgrad" else {}
    expected = ops.gramian_weights(G.double(), method, **options)
    assert torch.equal(ops.gramian_weights(G, method, **options), expected)
    assert torch.equal(ops.gramian_weights(G.T, method, **options), expected)


def test_errors_show_the_operands():
    eye = torch.eye(3)
    for G, shape in ((torch.ones(0, 0), r"\[0, 0\]"), (torch.ones(2, 3), r"\[2, 3\]")):
        with pytest.raises(ValueError, match=f"m >= 1, got {shape}"):
            ops.gramian_weights(G, "mgda")
    with pytest.raises(TypeError, match="int64"):
        ops.gramian_weights(eye.long(), "mgda")
    with pytest.raises(ValueError, match="method must be one of"):
        ops.gramian_weights(eye, "mean")
    with pytest.raises(ValueError, match=r"pref must be \[m\]; got \[2\].*\[3, 3\]"):
        ops.gramian_weights(eye, "aligned_mtl_min", torch.ones(2))
    with pytest.raises(ValueError, match="mgda takes no preference"):
        ops.gramian_weights(eye, "mgda", torch.ones(3))
    with pytest.raises(ValueError, match=r"order must be \[m, m\] int64"):
        ops.gramian_weights(eye, "pcgrad", order=torch.ones(3, 3))
    for order in ([0, 1, 3], [0, 1, -1], [0, 1, 1], [0, 1, 1 << 40]):
        rows = torch.tensor([[0, 1, 2], order, [2, 0, 1]])
        with pytest.raises(
            ValueError, match=rf"order\[1\] must be a permutation of 0..2; it has {order[2]} at 2"
        ):
            ops.gramian_weights(eye, "pcgrad", order=rows)
        with pytest.raises(ValueError, match=r"must be a permutation of 0..2"):
            weigh_in_torch(eye.double(), "pcgrad", None, rows, 0.0, 0.0, 1)
    for parameters in ({"c": math.nan}, {"c": math.inf}, {"norm_eps": math.nan}):
        with pytest.raises(ValueError, match="c and norm_eps must be >= 0 and finite"):
            ops.gramian_weights(eye, "cagrad", **parameters)
    for parameters in ({"epsilon": math.nan}, {"max_iters": 1.5}, {"max_iters": 1 << 63}):
        with pytest.raises(ValueError, match=r"epsilon and max_iters must|max_iters must be a whole number"):
            ops.gramian_weights(eye, "mgda", **parameters)
    with pytest.raises(ValueError, match="mgda takes no order"):
        ops.gramian_weights(eye, "mgda", order=torch.ones(3, 3).long())
    with pytest.raises(ValueError, match="c and norm_eps must be >= 0"):
        ops.gramian_weights(eye, "cagrad", c=-1.0)
    with pytest.raises(ValueError, match="epsilon and max_iters must be > 0"):
        ops.gramian_weights(eye, "mgda", max_iters=0)
    with pytest.raises(NotImplementedError, match="no vmap rule"):
        torch.vmap(lambda g: ops.gramian_weights(g, "mgda"))(torch.ones(2, 3, 3))


def test_opcheck():
    G, pref, order = torch.eye(3), torch.rand(3), torch.rand(3, 3).argsort(1)
    for method in range(len(METHODS)):
        torch.library.opcheck(torch.ops.movae.gramian_weights, (G, method, pref, order, 0.5, 1e-4, 10))


@pytest.mark.parametrize("reason", ["the extension was built without nvcc", "there is no CUDA driver"])
def test_cuda_without_its_cpp_is_the_cpus_answer_and_a_warning_once(monkeypatch, reason):
    """The CUDA implementation on CPU tensors, whose copy to the host is then no copy: the same bits."""
    monkeypatch.setattr(extension, "cuda_missing", lambda: reason)
    monkeypatch.setattr(reference, "gramian_weights", None)  # TorchJD's classes, which read each decision
    _warn_of_the_host.cache_clear()
    G = torch.as_tensor(gramian(np.random.default_rng(0), FAMILIES[0], 5))
    pref, order = torch.rand(5, dtype=torch.float64), torch.rand(5, 5).argsort(1)

    def check_all():
        for number, method in enumerate(METHODS):
            given = (pref if method.startswith("aligned") else None, order if method == "pcgrad" else None)
            a, b = (0.5, 1e-4) if method == "cagrad" else (1e-3, 0.0)
            found = _gramian_weights_cuda(G, number, *given, a, b, 100)
            assert torch.equal(found, ops.gramian_weights(G, method, given[0], order=given[1]))

    with pytest.warns(RuntimeWarning, match=f"computed on the host.*{reason}") as said:
        check_all()
    assert len(said) == 1
