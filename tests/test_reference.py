"""The reference ops against loops and closed forms in float64: they are what everything else is held to."""

import math

import pytest
import torch

from movae_fast import reference


def test_nearest_code_is_the_brute_force_argmin():
    z, codebook = torch.randn(200, 5, dtype=torch.float64), torch.randn(17, 5, dtype=torch.float64)
    expected = [min(range(17), key=lambda k: float((row - codebook[k]).square().sum())) for row in z]
    assert reference.nearest_code(z, codebook).tolist() == expected


def test_nearest_code_takes_the_lowest_of_duplicates_and_zero_for_nan():
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]])
    z = torch.tensor([[1.0, 0.1], [math.nan, 0.0], [5.0, 4.0]])
    assert reference.nearest_code(z, codebook).tolist() == [1, 0, 0]


def test_quantize_returns_codewords_errors_counts_and_sums():
    z, codebook = torch.randn(50, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    z_q, index, sq_err, count, code_sum = reference.quantize(z, codebook)
    for i in range(50):
        assert torch.equal(z_q[i], codebook[index[i]])
        assert sq_err[i] == pytest.approx(float((z[i] - codebook[index[i]]).square().sum()))
    for k in range(4):
        assert count[k] == int((index == k).sum())
        torch.testing.assert_close(code_sum[k], z[index == k].sum(0))


def test_gramian_and_combine():
    rows = torch.randn(3, 100)
    expected = [[sum(float(a) * float(b) for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
    torch.testing.assert_close(reference.gramian(rows), torch.tensor(expected, dtype=torch.float64))
    assert reference.gramian(rows).dtype == torch.float64
    torch.testing.assert_close(reference.combine(rows, torch.tensor([1.0, 0.0, 2.0])), rows[0] + 2 * rows[2])


def stratified_weight(i, j, m, n):
    if i == j:
        return 1 / n
    if j == (i + 1) % m:
        return (n - m + 1) / (n * (m - 1))
    return 1 / (m - 1)


@pytest.mark.parametrize("estimator", ["mws", "mss"])
def test_tc_terms_equal_brute_force(estimator):
    m, d, n = 7, 3, 1000
    z, mu, logvar = (torch.randn(m, d, dtype=torch.float64) for _ in range(3))
    log_q_z, log_prod = reference.tc_terms(z, mu, logvar, n, estimator)
    for i in range(m):
        joint, parts = 0.0, [0.0] * d
        for j in range(m):
            weight = 1 / (n * m) if estimator == "mws" else stratified_weight(i, j, m, n)
            densities = [
                math.exp(-0.5 * float((z[i, k] - mu[j, k]) ** 2) / math.exp(logvar[j, k]))
                / math.sqrt(2 * math.pi * math.exp(logvar[j, k]))
                for k in range(d)
            ]
            joint += weight * math.prod(densities)
            parts = [p + weight * q for p, q in zip(parts, densities, strict=True)]
        assert float(log_q_z[i]) == pytest.approx(math.log(joint), abs=1e-12)
        assert float(log_prod[i]) == pytest.approx(sum(map(math.log, parts)), abs=1e-12)


def test_stratified_weights_sum_to_one_and_need_two():
    like = torch.zeros(1, dtype=torch.float64)
    weights = reference.log_importance_weights(9, 500, "mss", like).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(weights.diagonal(), torch.full((9,), 1 / 500, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 2"):
        reference.log_importance_weights(1, 500, "mss", like)
