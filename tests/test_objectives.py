"""Objectives against closed forms, other formulas and sampling-error bounds."""

import math

import pytest
import torch
from torch.nn import functional as F

from movae_fast.models import MODELS, build_model, make_likelihood
from movae_fast.objectives import (
    OBJECTIVES,
    LossVector,
    batch_mean,
    dimension_wise_kl,
    kl_standard_normal,
    log_densities,
    mmd,
    mutual_information,
    reconstruction,
    resolve_weights,
    rung_kl,
    total_correlation,
)
from movae_fast.objectives.extras import EXTRAS
from movae_fast.reference import gaussian_log_density
from movae_fast.schedules import Capacity, LossSchedule


def tc_decomposition(z, mu, logvar, n_data, estimator, sample_weight=None):
    densities = log_densities(z, mu, logvar, n_data, estimator)
    return [
        term(densities, sample_weight) for term in (mutual_information, total_correlation, dimension_wise_kl)
    ]


def test_reconstruction_equals_torchs_losses():
    pre, x = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    tanh, sigmoid = torch.tanh(pre), torch.sigmoid(pre)
    for dist, activation, theirs in (
        ("gaussian", "tanh", F.mse_loss(tanh, x, reduction="sum")),
        ("gaussian", "sigmoid", F.mse_loss(sigmoid, x, reduction="sum")),
        ("laplacian", "none", F.l1_loss(pre, x, reduction="sum")),
        ("bernoulli", "sigmoid", F.binary_cross_entropy(sigmoid, x, reduction="sum")),
    ):
        likelihood = make_likelihood(dist, 3, activation)
        torch.testing.assert_close(reconstruction(pre, x, likelihood, "mean"), theirs / x.numel())
        torch.testing.assert_close(reconstruction(pre, x, likelihood, "sum"), theirs / 4)
    scaled = F.mse_loss(tanh * 255, x * 255, reduction="sum") / 255
    likelihood = make_likelihood("gaussian", 3, "tanh")
    torch.testing.assert_close(reconstruction(pre, x, likelihood, "scaled_sum"), scaled)


def test_bernoulli_stays_finite_where_probabilities_round_to_one():
    pre = torch.tensor([[[[60.0, -60.0]]]], requires_grad=True)
    likelihood = make_likelihood("bernoulli", 1, "sigmoid")
    loss = reconstruction(pre, torch.tensor([[[[0.0, 1.0]]]]), likelihood, "sum")
    loss.backward()
    assert loss.item() == pytest.approx(120.0)
    assert pre.grad.flatten().tolist() == [1.0, -1.0]


def test_kl_equals_torchs_and_its_monte_carlo_estimate():
    mu, logvar = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    theirs = torch.distributions.kl_divergence(q, p).sum(1).mean()
    torch.testing.assert_close(kl_standard_normal(mu, logvar), theirs)
    n = 20_000
    z = q.sample((n,))
    draws = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(-1)  # [n] i.i.d. estimates of the same number
    # Six standard errors: a chance of 2e-9 to fail while right.
    assert abs(float(draws.mean() - theirs)) < 6 * float(draws.std()) / math.sqrt(n)


@pytest.mark.parametrize("estimator", ["mws", "mss"])
def test_tc_decomposition_sums_to_the_monte_carlo_kl(estimator):
    mu, logvar = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    z = mu + (logvar / 2).exp() * torch.randn_like(mu)
    parts = tc_decomposition(z, mu, logvar, 5000, estimator)
    zero = torch.zeros_like(z)
    whole = (gaussian_log_density(z, mu, logvar) - gaussian_log_density(z, zero, zero)).sum(1).mean()
    # The terms cancel in pairs: what is left is float64's rounding of sums of about 40.
    assert abs(float(sum(parts) - whole)) < 64 * 40 * 2.3e-16


def test_total_correlation_sees_what_it_should():
    """With every example of the data in the batch, independent latents have TC near 0, copied ones do not."""
    torch.manual_seed(1)
    n = 1500
    mu = torch.randn(n, 2, dtype=torch.float64)
    logvar = torch.full_like(mu, -3.0)
    noise = (logvar / 2).exp() * torch.randn_like(mu)
    copied = mu[:, :1].expand(-1, 2)
    independent = float(tc_decomposition(mu + noise, mu, logvar, n, "mss")[1])
    dependent = float(tc_decomposition(copied + noise, copied, logvar, n, "mss")[1])
    # Closed form for the correlated Gaussian: variances 1 + e^-3, covariance 1.
    rho = 1 / (1 + math.exp(-3))
    assert dependent == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.15)
    assert abs(independent) < 0.15


def test_mmd_equals_its_expectation_on_gaussians():
    """E k for independent normals is a Gaussian integral; the V-statistic adds the diagonal's (1 - E k) / n."""
    n, d, shift, repeats = 64, 3, 1.5, 400
    width = d**2  # k = exp(-|x - y|^2 / d^2)

    def expected(a, b):  # x - y ~ N(a - b, 2 I)
        factor = (1 + 4 / width) ** (-d / 2)
        return factor * math.exp(-d * (a - b) ** 2 / (width + 4))

    same, across = expected(0, 0), expected(shift, 0)
    v_statistic = 2 * (1 / n + (1 - 1 / n) * same) - 2 * across
    draws = torch.tensor(
        [float(mmd(torch.randn(n, d) + shift, torch.randn(n, d))) for _ in range(repeats)], dtype=torch.float64
    )
    assert abs(float(draws.mean()) - v_statistic) < 6 * float(draws.std()) / math.sqrt(repeats)
    assert float(mmd(torch.ones(4, d), torch.ones(4, d))) == 0.0


def vector(arch="betatc_vae", **options):
    model = build_model(arch, (1, 16, 16), "tanh", {"hidden_dims": [4, 4], "latent_dim": 3})
    weights = resolve_weights(MODELS[arch], (1, 16, 16), None)
    return model, LossVector(model, weights, "gaussian", "mean", n_data=100, **options)


def test_only_the_dimension_wise_kl_is_annealed():
    _, losses = vector(schedule=LossSchedule(4))
    assert losses.weights_at(0).tolist() == [1.0, 1.0, 1.0, 0.25]
    assert losses.weights_at(3).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert losses.weights_at(99).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_weights_and_factors_are_functions_of_the_step_alone():
    """Read in any order and any number of times, they are the same, and nothing in the vector has moved."""
    schedule = LossSchedule(5, lambda step: 1 / (1 + step), Capacity(3.0, 10))
    model, losses = vector(schedule=schedule)
    x = torch.rand(4, 1, 16, 16)
    out = model(x)
    kl_model, kl_losses = vector("vae", schedule=schedule)
    kl_losses.set_step(4)
    kl_out = kl_model(x)
    before = losses(out, x), kl_losses(kl_out, x)
    steps = [7, 0, 3, 3, 100, 0]
    for one in (losses, kl_losses):
        tensors = {name: v.clone() for name, v in vars(one).items() if isinstance(v, torch.Tensor)}
        read = {step: one.weights_at(step).tolist() for step in range(101)}
        assert [one.weights_at(step).tolist() for step in steps] == [read[step] for step in steps]
        for name, value in tensors.items():
            assert torch.equal(getattr(one, name), value), name
    for old, new in zip(before, (losses(out, x), kl_losses(kl_out, x)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert float(kl_losses.capacity) == pytest.approx(1.2)


def test_every_model_s_objectives_have_a_term():
    ladder = build_model("vlae", (1, 64, 64), "tanh", {"num_ladders": 4, "hidden_dim": 4, "fc_dim": 8})
    signs = build_model("vq_vae", (1, 16, 16), "tanh", {"quantizer": "lfq"})
    named = {name for model in (*MODELS.values(), ladder, signs) for name in model.objectives}
    assert named <= OBJECTIVES.keys()
    named |= {name for extra in EXTRAS.values() for name in extra.objectives}
    assert {name for name in OBJECTIVES.keys() - named if not name.startswith("kl_")} == set()


def test_an_objective_without_a_term_is_named():
    model, _ = vector("vae")
    model.objectives = ("reconstruction", "dkwl")
    with pytest.raises(ValueError, match=r"ConvVAE.objectives: OBJECTIVES has no dkwl \(did you mean dwkl"):
        LossVector(model, [1.0, 1.0], "gaussian", "mean", n_data=100)


def test_an_objective_of_one_s_own_is_one_entry(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "size", lambda batch: batch.out.z.square().mean())
    model, _ = vector("vae")
    model.objectives = ("reconstruction", "kl", "size")
    losses = LossVector(model, [1.0, 1.0, 0.5], "gaussian", "mean", n_data=100)
    x = torch.rand(4, 1, 16, 16)
    out = model(x)
    assert torch.equal(losses(out, x)[2], out.z.square().mean())
    assert losses.weights_at(0).tolist() == [1.0, 1.0, 0.5]


def test_what_several_terms_need_is_computed_once(monkeypatch):
    calls = []
    terms = LossVector.__module__.replace("vector", "terms")
    monkeypatch.setattr(f"{terms}.log_densities", lambda *a, f=log_densities: calls.append(a) or f(*a))
    model, losses = vector()
    x = torch.rand(4, 1, 16, 16)
    out = model(x)
    found = losses(out, x)
    assert len(calls) == 1
    expected = tc_decomposition(out.z, out.mu, out.logvar, 100, "mss")
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_ladder_s_rungs_are_the_kls_of_their_latents(reduction):
    options = {"num_ladders": 3, "hidden_dim": 4, "fc_dim": 8, "latent_dim": 2}
    model = build_model("vlae", (1, 32, 32), "sigmoid", options)
    losses = LossVector(model, [1.0] * 4, "gaussian", reduction, n_data=100)
    x = torch.rand(5, 1, 32, 32)
    out = model(x)
    found = losses(out, x)
    for rung in range(3):
        own = slice(2 * rung, 2 * rung + 2)
        expected = kl_standard_normal(out.mu[:, own], out.logvar[:, own]) / (2 if reduction == "mean" else 1)
        torch.testing.assert_close(found[1 + rung], expected)


def test_losses_are_separate_graphs():
    """The KL's gradient does not visit the decoder: its parameters get None, not zeros."""
    model = build_model("vae", (1, 16, 16), "tanh", {"hidden_dims": [4, 4], "latent_dim": 3})
    losses = LossVector(model, [1.0, 1.0], "gaussian", "mean", 100)
    x = torch.rand(4, 1, 16, 16)
    _, kl = losses(model(x), x)
    gradients = torch.autograd.grad(kl, list(model.decoder.parameters()), allow_unused=True)
    assert all(g is None for g in gradients)


def test_weights_by_order_by_name_and_by_beta():
    vae = MODELS["vae"]
    shape = (1, 32, 32)
    assert resolve_weights(vae, shape, None) == [1.0, 0.00025]
    assert resolve_weights(vae, shape, [2, 3]) == [2.0, 3.0]
    assert resolve_weights(vae, shape, {"kl": 4}) == [1.0, 4.0]
    assert resolve_weights(vae, shape, None, beta=0.5) == [1.0, 0.5]
    assert resolve_weights(MODELS["betatc_vae"], shape, None, beta=6) == [1.0, 1.0, 6.0, 1.0]


@pytest.mark.parametrize(
    ("given", "beta", "message"),
    [
        ([1.0], None, r"1 values; the objectives are 2, in order: reconstruction, kl"),
        ({"kll": 1.0}, None, r"kll: no such objective \(did you mean kl\?\); in order: reconstruction, kl"),
        ([1.0, -1.0], None, "kl is -1"),
        ([1.0, math.nan], None, "kl is nan"),
        ([0.0, 0.0], None, "all zero"),
        ([1.0, 1.0], 2.0, "both set the weight of kl"),
    ],
)
def test_bad_weights_are_refused(given, beta, message):
    with pytest.raises(ValueError, match=message):
        resolve_weights(MODELS["vae"], (1, 32, 32), given, beta)


def test_images_that_count_nothing_are_not_there():
    """Six images of eight, at 8/6 each: a mean is that of the six, a sum over the batch that of a full one."""
    double = {"dtype": torch.float64}
    pre, x = torch.randn(8, 3, 4, 4, **double), torch.rand(8, 3, 4, 4, **double)
    mu, logvar, z = torch.randn(3, 8, 6, **double).unbind()
    share = (torch.arange(8) < 6).double() * (8 / 6)
    close = torch.testing.assert_close
    for reduction, factor in (("mean", 1), ("sum", 1), ("scaled_sum", 8 / 6)):
        for dist in ("gaussian", "laplacian", "bernoulli", "gaussian_optimal", "logistic", "dmol"):
            likelihood = make_likelihood(dist, 3, "sigmoid", components=2)
            output = pre.repeat(1, 7, 1, 1)[:, : likelihood.channels]
            short = reconstruction(output[:6], x[:6], likelihood, reduction)
            close(reconstruction(output, x, likelihood, reduction, share), factor * short)
    close(kl_standard_normal(mu, logvar, share), kl_standard_normal(mu[:6], logvar[:6]))
    close(rung_kl(mu, logvar, "mean", share), rung_kl(mu[:6], logvar[:6], "mean"))
    close(rung_kl(mu, logvar, "mean"), kl_standard_normal(mu, logvar) / 6)
    close(mmd(mu, z, share), mmd(mu[:6], z[:6]))
    # Two processes of four images each: the means of what they find.
    close((mmd(mu[:4], z[:4], share[:4]) * 6 / 4) / 2, mmd(mu[:4], z[:4]))
    assert float(mmd(mu[6:], z[6:], share[6:])) == 0
    close((batch_mean(z[:4, 0], share[:4]) + batch_mean(z[4:, 0], share[4:])) / 2, z[:6, 0].mean())


def test_terms_of_total_correlation_are_means_of_what_counts_within_the_whole_batch():
    mu, logvar, z = torch.randn(3, 8, 6, dtype=torch.float64).unbind()
    share = (torch.arange(8) < 6).double() * (8 / 6)
    found = tc_decomposition(z, mu, logvar, 1000, "mss", share)
    alone = torch.eye(8, dtype=torch.float64) * 8
    each = [tc_decomposition(z, mu, logvar, 1000, "mss", one) for one in alone[:6]]
    for term, terms in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(term, torch.stack(terms).mean())


def test_parts_of_a_capacity_add_up():
    model = build_model("vae", (1, 16, 16), "tanh", {"hidden_dims": [4, 4], "latent_dim": 3})
    losses = LossVector(
        model, [1.0, 1.0], "gaussian", "mean", n_data=8, schedule=LossSchedule(capacity=Capacity(2.0, 1))
    )
    losses.set_step(5)
    out, x = model(torch.rand(8, 1, 16, 16)), torch.rand(8, 1, 16, 16)
    share = (torch.arange(8) < 6) * (8 / 6)

    def kl(rows, share=None):
        part = out._replace(**{k: getattr(out, k)[rows] for k in ("preactivation", "mu", "logvar", "z")})
        return losses(part, x[rows], share)[1]

    parts = [kl(slice(4 * k, 4 * k + 4), share[4 * k : 4 * k + 4]) for k in range(2)]
    torch.testing.assert_close(sum(parts) / 2, kl(slice(0, 6)))
