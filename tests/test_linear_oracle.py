"""The linear VAE's closed form against its own loss, an optimiser, and the gates that reproduce it."""

import math

import pytest
import torch

from movae_fast.evaluation.linear_oracle import LinearOracle, linear_losses, linear_optimum

BETAS = (0.01, 0.1, 0.5, 1.0, 3.0, 12.0)
CONVENTIONS = [("gaussian", 1.0), ("gaussian", 0.3), ("squared_error", 1.0)]


def covariance(d, seed, spread=2.0):
    """A random d x d covariance whose eigenvalues lie on both sides of the water levels of BETAS."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.exp(spread * torch.randn(d, generator=generator, dtype=torch.float64))) @ basis.T


@pytest.mark.parametrize(("convention", "sigma2"), CONVENTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_loss_at_its_parameters(convention, sigma2, seed):
    s = covariance(12, seed)
    for k in (1, 5, 12, 14):
        for beta in BETAS:
            found = linear_optimum(s, k, beta, convention, sigma2)
            rate, distortion = linear_losses(s, found.w, found.v, found.c, convention, sigma2)
            assert found.rate == pytest.approx(float(rate), abs=1e-10)
            assert found.distortion == pytest.approx(float(distortion), abs=1e-10)
            assert found.loss == pytest.approx(float(distortion + beta * rate), abs=1e-10)
            assert found.active == int((found.v.abs().sum(1) > 0).sum())


def test_the_loss_is_the_expectation_over_data_and_draws():
    """Independently of the oracle: Monte Carlo of both terms with torch.distributions."""
    normal = torch.distributions.Normal
    s, d, k, n = covariance(4, 7, 0.5), 4, 2, 400_000
    w, v, c = torch.randn(d, k).double(), 0.5 * torch.randn(k, d).double(), torch.rand(k).double() + 0.2
    x = torch.randn(n, d, dtype=torch.float64) @ torch.linalg.cholesky(s).T
    mu = x @ v.T
    q = normal(mu, c.sqrt().expand_as(mu))
    kl = torch.distributions.kl_divergence(q, normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
    mean = q.sample() @ w.T
    for convention, sigma2 in CONVENTIONS:
        rate, distortion = linear_losses(s, w, v, c, convention, sigma2)
        if convention == "gaussian":
            nll = -normal(mean, math.sqrt(sigma2)).log_prob(x).sum(1)
        else:
            nll = (x - mean).square().sum(1)
        for truth, draws in ((rate, kl), (distortion, nll)):
            assert float(truth) == pytest.approx(float(draws.mean()), abs=5 * float(draws.std()) / math.sqrt(n))


def lowest(s, k, beta, convention, sigma2, start):
    """The loss that L-BFGS reaches from a random start."""
    generator = torch.Generator().manual_seed(start)
    shapes = ((len(s), k), (k, len(s)), (k,))
    w, v, log_c = (0.5 * torch.randn(n, generator=generator, dtype=torch.float64) for n in shapes)
    parameters = [p.requires_grad_() for p in (w, v, log_c)]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=250, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        rate, distortion = linear_losses(s, w, v, log_c.exp(), convention, sigma2)
        total = distortion + beta * rate
        total.backward()
        return total

    optimizer.step(loss)
    return float(loss().detach())


@pytest.mark.parametrize(("convention", "sigma2"), [("gaussian", 1.0), ("squared_error", 1.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_no_optimiser_beats_it(convention, sigma2, beta):
    s, k = covariance(6, 1, 1.0), 3
    found = linear_optimum(s, k, beta, convention, sigma2)
    best = min(lowest(s, k, beta, convention, sigma2, start) for start in range(4))
    assert best >= found.loss - 1e-7
    # And it comes close: what bounds it from below is the optimum, not some number far under it.
    assert best == pytest.approx(found.loss, abs=1e-4)


def test_the_frontier_has_slope_minus_beta_and_is_its_own_inverse():
    oracle = LinearOracle(covariance(12, 3), 8)
    for beta in BETAS:
        rate, distortion = oracle.point(beta)
        if rate == 0:
            assert oracle.beta_at_rate(rate) == math.inf
            continue
        assert oracle.beta_at_rate(rate) == pytest.approx(beta, rel=1e-9)
        assert oracle.distortion_at_rate(rate) == pytest.approx(distortion, abs=1e-9)
        step = 1e-5
        slope = (oracle.distortion_at_rate(rate + step) - oracle.distortion_at_rate(rate - step)) / (2 * step)
        # D*'' and D*''' are at most 2 and 4 times beta: the central difference errs by step^2 times that.
        assert slope == pytest.approx(-beta, rel=1e-5)
    assert oracle.distortion_at_rate(0.0) == pytest.approx(
        oracle.a * float(oracle.values.sum()) + oracle.constant
    )


def test_frozen_decoder_with_sigmoid_gates_gives_its_optimal_encoder():
    """W held at A S B': rows A' gated by sigmoid(2 log s - eta), then B S^-1, and c by its own sigmoid gate."""
    d, k = 9, 4
    s = covariance(d, 5)
    a, b = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, k))
    lengths = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    w = (a * lengths) @ b.T
    for beta in BETAS:
        eta = math.log(beta)
        v = (b / lengths) @ (torch.sigmoid(2 * lengths.log() - eta)[:, None] * a.T)
        # c = beta / (diag(W'W) + beta)
        c = torch.sigmoid(eta - w.square().sum(0).log())
        inputs = [v.requires_grad_(), c.requires_grad_()]
        rate, distortion = linear_losses(s, w, v, c)
        # The loss is convex in (V, c), so a zero gradient is the optimum; its terms are as large as |S| |W|.
        for gradient in torch.autograd.grad(distortion + beta * rate, inputs):
            assert float(gradient.norm()) < 1e-12 * float(1 + s.norm() * w.norm() + beta)


@pytest.mark.parametrize(("convention", "sigma2"), CONVENTIONS)
def test_one_set_of_weights_with_sqrt_gates_is_optimal_at_every_beta(convention, sigma2):
    """W = U L^1/2 g, V = L^-1/2 g U', c = 1 - g^2 and g = sqrt(relu(1 - exp(eta - log l))): no beta in U, L."""
    s, k = covariance(10, 2), 6
    oracle = LinearOracle(s, k, convention, sigma2)
    values, u = oracle.values[:k], oracle.vectors[:, :k]
    for beta in BETAS:
        exponent = math.log(beta) - (2 * oracle.a * values).log()
        g = torch.relu(1 - exponent.exp()).sqrt()
        rate, distortion = linear_losses(
            s, u * values.sqrt() * g, (u / values.sqrt() * g).T, 1 - g.square(), convention, sigma2
        )
        assert float(distortion + beta * rate) == pytest.approx(oracle.optimum(beta).loss, rel=1e-13)


def test_a_singular_covariance_and_more_latents_than_dimensions():
    s = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    found = linear_optimum(s, 5, 0.5, "squared_error")
    assert found.active == 2
    assert found.distortion == pytest.approx(0.5)  # t = 1/4, twice
    assert found.rate == pytest.approx(0.5 * math.log(8 * 4))
    assert LinearOracle(s, 5, "squared_error").beta_at_rate(found.rate) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), 1, 1.0), "square"),
        ((torch.full((2, 2), math.nan), 1, 1.0), "not finite"),
        ((torch.eye(2), 0, 1.0), "k 0 must be at least 1"),
        ((torch.eye(2), 1, 0.0), "beta 0.0 must be positive"),
        ((torch.eye(2), 1, math.inf), "beta inf must be positive"),
        ((torch.eye(2), 1, 1.0, "gauss"), "valid: gaussian, squared_error"),
        ((torch.eye(2), 1, 1.0, "gaussian", 0.0), "sigma2 0.0 must be positive"),
        ((torch.eye(2), 1, 1.0, "squared_error", 0.5), "leave it at 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_optimum(*arguments)
