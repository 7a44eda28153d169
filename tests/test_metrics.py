"""Disentanglement metrics against closed forms, invariances, and a second, naive way of writing them."""

import math

import numpy as np
import pytest
import torch

from movae_fast.evaluation import disentanglement as metrics
from movae_fast.evaluation.disentanglement import (
    METRICS,
    Codes,
    active_latents,
    completeness,
    dci,
    disentanglement,
    entropy,
    factor_vae_score,
    histogram_information,
    jemmig,
    mig,
    mig_sup,
    modularity,
    mutual_information,
    sampled_information,
    sap,
    sap_table,
)

SIZES = (3, 4, 5)


@pytest.fixture
def factors():
    """Every combination of three factors, several times, in random order."""
    every = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    return np.random.default_rng(0).permutation(np.tile(every, (20, 1)))


@pytest.fixture
def noisy(factors):
    random = np.random.default_rng(1)
    mixed = factors @ random.normal(size=(3, 4)) + 0.3 * random.normal(size=(len(factors), 4))
    mixed[:, 0] = factors[:, 0] + 0.2 * random.normal(size=len(factors))
    return mixed


def naive_table(latents, factors, bins=20):
    """I(z; v) [D, F], H(v) and the joint entropies by H(z) + H(v) - H(z, v), one count after the other."""

    def h(columns):
        counts = {}
        for key in zip(*columns, strict=True):
            counts[key] = counts.get(key, 0) + 1
        n = sum(counts.values())
        return -math.fsum(c / n * math.log(c / n) for c in counts.values())

    binned = []
    for z in latents.T:
        edges = np.histogram(z, bins)[1]
        binned.append([max(1, min(bins, int(np.searchsorted(edges, v, side="right")))) for v in z])
    columns = [list(v) for v in factors.T]
    table = [[h([z]) + h([v]) - h([z, v]) for v in columns] for z in binned]
    joint = [[h([z, v]) for v in columns] for z in binned]
    return table, [h([v]) for v in columns], joint


def naive_scores(latents, factors, bins=20):
    table, hv, joint = naive_table(latents, factors, bins)
    d, f = len(table), len(hv)
    gap, jem = 0.0, 0.0
    for k in range(f):
        first, second = sorted((table[j][k] for j in range(d)), reverse=True)[:2]
        best = max(range(d), key=lambda j: table[j][k])
        gap += (first - second) / hv[k] / f
        jem += (1 - (joint[best][k] - first + second) / (hv[k] + math.log(bins))) / f
    sup = 0.0
    mod = 0.0
    for j in range(d):
        shares = sorted((table[j][k] / hv[k] for k in range(f)), reverse=True)
        sup += (shares[0] - shares[1]) / d
        best = max(range(f), key=lambda k: table[j][k])
        rest = math.fsum(table[j][k] ** 2 for k in range(f) if k != best)
        mod += (1 - rest / (table[j][best] ** 2 * (f - 1))) / d
    return {"mig": gap, "mig_sup": sup, "modularity": mod, "jemmig": jem}


def test_mutual_information_in_closed_form():
    # A fair bit through a symmetric channel that flips it with probability e: log 2 - H(e).
    for e in (0.0, 0.1, 0.25, 0.5):
        table = np.array([[1 - e, e], [e, 1 - e]]) / 2
        flip = -sum(p * math.log(p) for p in (e, 1 - e) if p > 0)
        assert mutual_information(table) == pytest.approx(math.log(2) - flip, abs=1e-12)
    # An erased bit keeps 1 - e of it; independence keeps nothing; a bijection keeps all.
    erased = np.array([[0.7, 0, 0.3], [0, 0.7, 0.3]]) / 2
    assert mutual_information(erased) == pytest.approx(0.7 * math.log(2), abs=1e-12)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.diag([1, 1, 2])) == pytest.approx(1.5 * math.log(2), abs=1e-12)
    assert entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5 * math.log(2), abs=1e-12)


def test_agreement_with_a_naive_version(noisy, factors):
    found = histogram_information(noisy, factors)
    table, hv, _ = naive_table(noisy, factors)
    np.testing.assert_allclose(found.mutual, table, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.factor_entropy, hv, rtol=0, atol=1e-10)
    expected = naive_scores(noisy, factors)
    assert mig(found) == pytest.approx(expected["mig"], abs=1e-10)
    assert mig_sup(found) == pytest.approx(expected["mig_sup"], abs=1e-10)
    assert modularity(found) == pytest.approx(expected["modularity"], abs=1e-10)
    assert jemmig(noisy, factors, found) == pytest.approx(expected["jemmig"], abs=1e-10)
    assert 0.05 < mig(found) < 0.95  # no corner case


def test_perfect_codes(factors):
    z = factors.astype(float)
    found = histogram_information(z, factors)
    assert mig(found) == pytest.approx(1, abs=1e-12)
    assert mig_sup(found) == pytest.approx(1, abs=1e-12)
    assert modularity(found) == pytest.approx(1, abs=1e-12)
    # H(z, v) = I = H(v) for a code that is the factor, and the second latent knows nothing.
    assert jemmig(z, factors, found) == pytest.approx(1, abs=1e-12)
    assert factor_vae_score(z, factors, train_votes=500, test_votes=500) == 1
    half = len(z) // 2
    scores = dci(z[:half], factors[:half], z[half:], factors[half:])
    assert scores.disentanglement > 0.99
    assert scores.completeness > 0.99
    assert scores.informativeness == 1


def test_constant_codes(factors):
    z = np.full((len(factors), 3), 0.7)
    found = histogram_information(z, factors)
    for score in (mig(found), mig_sup(found), modularity(found), factor_vae_score(z, factors)):
        assert score == pytest.approx(0, abs=1e-12)
    assert not active_latents(z).any()
    assert mig_sup(found, active_latents(z)) == 0
    half = len(z) // 2
    scores = dci(z[:half], factors[:half], z[half:], factors[half:])
    assert scores.disentanglement == pytest.approx(0, abs=1e-12)
    assert scores.completeness == pytest.approx(0, abs=1e-12)
    assert sap(z[:half], factors[:half], z[half:], factors[half:]) == 0


def test_duplicated_latents_have_no_gap(factors):
    z = np.repeat(factors.astype(float), 2, axis=1)
    found = histogram_information(z, factors)
    assert mig(found) == pytest.approx(0, abs=1e-12)
    assert mig_sup(found) == pytest.approx(1, abs=1e-12)  # each latent still holds one factor
    half = len(z) // 2
    assert sap(z[:half], factors[:half], z[half:], factors[half:]) == pytest.approx(0, abs=1e-12)


def test_one_code_for_two_factors(factors):
    # z0 holds (v0, v1), z1 holds v2: v0 and v1 are in one latent each (MIG 1); z0's gap is nil.
    z = np.stack([factors[:, 0] * 4 + factors[:, 1], factors[:, 2]], 1).astype(float)
    found = histogram_information(z, factors)
    assert mig(found) == pytest.approx(1, abs=1e-12)
    assert mig_sup(found) == pytest.approx(0.5, abs=1e-12)
    a, b = math.log(3) ** 2, math.log(4) ** 2
    assert modularity(found) == pytest.approx((1 - a / (2 * b) + 1) / 2, abs=1e-12)
    # Importances where code 0 serves two of ten factors equally.
    importance = np.zeros((1, 10))
    importance[0, :2] = 0.5
    assert disentanglement(importance) == pytest.approx(1 - math.log(2) / math.log(10), abs=1e-12)
    assert completeness(importance.T) == pytest.approx(1 - math.log(2) / math.log(10), abs=1e-12)
    assert disentanglement(np.diag([1.0, 5.0, 2.0])) == pytest.approx(1, abs=1e-12)


def test_permutation_and_scale_change_nothing(noisy, factors):
    random = np.random.default_rng(2)
    order, latent_order, factor_order = (random.permutation(n) for n in (len(noisy), 4, 3))
    other = (noisy * 4)[order][:, latent_order]  # a power of two: nothing rounds anew
    base = histogram_information(noisy, factors)
    moved = histogram_information(other, factors[order][:, factor_order])
    for score in (mig, mig_sup, modularity):
        assert score(base) == pytest.approx(score(moved), abs=1e-12)
    assert jemmig(noisy, factors, base) == pytest.approx(
        jemmig(other, factors[order], histogram_information(other, factors[order])), abs=1e-12
    )


def test_factor_vae_score_of_codes_that_mix_everything(factors):
    random = np.random.default_rng(3)
    z = random.normal(size=(len(factors), 5))  # knows nothing: the vote is a guess among three factors
    score = factor_vae_score(z, factors, train_votes=2000, test_votes=2000)
    assert score == pytest.approx(1 / 3, abs=0.06)
    # A latent that hardly varies would win every vote; it is pruned.
    with_dead = np.concatenate([factors.astype(float), 1e-3 * random.normal(size=(len(factors), 1))], 1)
    assert factor_vae_score(with_dead, factors, train_votes=300, test_votes=300) == 1


def test_sampled_information_of_known_mixtures():
    """A fair bit at -a or a with unit noise: I = log 2 - E[log(1 + exp(-2 a z))], found by quadrature."""
    n, a = 4000, 1.0
    bits = torch.arange(n) % 2
    other = (torch.arange(n) // 2) % 2
    mu = torch.stack([(2.0 * bits - 1) * a, torch.zeros(n)], 1)
    found = sampled_information(mu, torch.zeros(n, 2), torch.stack([bits, other], 1), draws=4000)
    z = np.linspace(-12, 14, 200_001)
    density = np.exp(-0.5 * (z - a) ** 2) / math.sqrt(2 * math.pi)
    integrand = density * np.log1p(np.exp(-2 * a * z))
    expected = math.log(2) - np.sum(integrand[1:] + integrand[:-1]) / 2 * (z[1] - z[0])
    # log(1 + exp(-2 a z)) has a standard deviation below 0.6: three standard errors of 4000 draws.
    assert found.mutual[0, 0] == pytest.approx(expected, abs=3 * 0.6 / math.sqrt(4000))
    assert found.mutual[0, 1] == pytest.approx(0, abs=1e-9)
    assert found.mutual[1] == pytest.approx([0, 0], abs=1e-9)
    np.testing.assert_allclose(found.factor_entropy, math.log(2), atol=1e-12)
    assert found.latent_entropy[1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.05)
    assert mig(found) == pytest.approx(expected / math.log(2) / 2, abs=0.03)


def test_sampled_information_matches_a_double_loop():
    random = torch.Generator().manual_seed(5)
    mu, logvar = torch.randn(30, 2, generator=random), torch.randn(30, 2, generator=random)
    v = torch.randint(0, 3, (30, 2), generator=random)
    found = sampled_information(mu, logvar, v, draws=30, seed=7)
    again = torch.Generator().manual_seed(7)
    rows = torch.randperm(30, generator=again).tolist()
    noise = torch.randn(30, 2, generator=again, dtype=torch.float64).tolist()
    m, lv = mu.double().tolist(), logvar.double().tolist()
    for j in range(2):
        for k in range(2):
            total = 0.0
            for s, row in enumerate(rows):
                z = m[row][j] + math.exp(0.5 * lv[row][j]) * noise[s][j]
                p = [
                    math.exp(-0.5 * (z - m[n][j]) ** 2 / math.exp(lv[n][j])) / math.exp(0.5 * lv[n][j])
                    for n in range(30)
                ]
                same = [q for n, q in enumerate(p) if v[n, k] == v[row, k]]
                total += math.log(sum(same) / len(same)) - math.log(sum(p) / 30)
            assert found.mutual[j, k] == pytest.approx(total / 30, abs=1e-10)


def test_sap_table_by_hand():
    """Two balanced classes a threshold apart: accuracy 1 from the latent that holds them, 1/2 from another."""
    v = np.arange(400)[:, None] % 2
    z = np.stack([4.0 * v[:, 0] - 2, np.zeros(400)], 1)
    table = sap_table(z[:200], v[:200], z[200:], v[200:])
    np.testing.assert_allclose(table[:, 0], [1, 0.5])
    assert sap(z[:200], v[:200], z[200:], v[200:]) == 0.5


def test_every_named_metric_gives_finite_figures(noisy, factors):
    mu = torch.as_tensor(noisy)
    codes = Codes(mu, torch.full_like(mu, -3.0), torch.as_tensor(factors), n_train=800)
    figures = {}
    for name, metric in METRICS.items():
        if name == "factor_vae":
            continue  # 15,000 votes
        figures |= metric(codes)
    assert {"mig", "mig_sampled", "dci_disentanglement", "dci_completeness", "dci_informativeness"} <= set(
        figures
    )
    assert all(0 <= v <= 1 for v in figures.values())
    assert set(metrics.NEED_TEST_CODES) < set(METRICS)


@pytest.mark.parametrize(
    ("latents", "factors", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2), int), r"same N: got \(3, 2\) and \(4, 2\)"),
        (np.zeros(3), np.zeros((3, 2), int), r"got \(3,\)"),
        (np.zeros((3, 2)), np.zeros((3, 2)), "integers: got float64"),
        (np.full((3, 2), np.nan), np.zeros((3, 2), int), "not finite"),
    ],
)
def test_bad_input_is_one_line(latents, factors, message):
    with pytest.raises(ValueError, match=message):
        histogram_information(latents, factors)
