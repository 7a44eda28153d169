"""Priors over a vector of latents: densities against other libraries and closed forms, samples against
densities."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.mixture import GaussianMixture

from movae_fast.priors.flow import AutoregressivePrior
from movae_fast.priors.flow_matching import FlowMatchingPrior
from movae_fast.priors.gmm import MixturePrior

D = 3


def posteriors(n=2000, seed=0):
    """Means in two clusters, and variances of a hundredth."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(n, D, generator=generator) + 3.0 * (torch.arange(n) % 2)[:, None] - 1
    return torch.stack([means, torch.full((n, D), math.log(0.01))], 1)


def disturbed(prior):
    """A prior whose weights are none that it starts with, and which standardises."""
    torch.manual_seed(0)
    prior.standardise_by(posteriors())
    for parameter in prior.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    return prior.eval()


NETS = {
    "flow": lambda dim: disturbed(AutoregressivePrior(dim, 16, 2)),
    "flow_matching": lambda dim: disturbed(FlowMatchingPrior(dim, 16, 2)),
}


@pytest.mark.parametrize("full", [True, False])
def test_the_mixture_is_scikit_learns(full):
    prior, values = MixturePrior(D, 4, full), posteriors()
    prior.fit(values, seed=3)
    noise = torch.randn(len(values), D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z = values[:, 0].double() + 0.1 * noise
    kind = "full" if full else "diag"
    other = GaussianMixture(4, covariance_type=kind, random_state=3, max_iter=200).fit(z.numpy())
    torch.testing.assert_close(prior.log_prob(z), torch.from_numpy(other.score_samples(z.numpy())))
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0))
    covariance = torch.cov(z.T)
    assert (torch.cov(drawn.T) - covariance).norm() < 0.05 * covariance.norm()
    assert (drawn.mean(0) - z.mean(0)).abs().max() < 0.1


@pytest.mark.parametrize("name", NETS)
def test_a_density_integrates_to_one(name):
    """Over a fine grid that holds nearly all of it, of two latents."""
    torch.manual_seed(0)
    made = {"flow": AutoregressivePrior, "flow_matching": FlowMatchingPrior}[name](2, 16, 2)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        axis = torch.linspace(-8, 8, 81)
        density = made.log_prob(torch.cartesian_prod(axis, axis)).double().exp()
    assert density.sum().item() * 0.2**2 == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("name", NETS)
def test_samples_follow_the_density(name):
    """E_p[log p] by samples is the negative entropy: a Gaussian fitted to samples cannot be likelier, and the
    density at samples beats that of a prior that knows the scale alone."""
    prior = NETS[name](D)
    z = prior.sample(4000, torch.Generator().manual_seed(1))
    own = prior.log_prob(z).double().mean().item()
    fitted = MixturePrior(D, 1, True)
    fitted.fit(torch.stack([z, torch.full_like(z, -40.0)], 1), 0)
    assert own > fitted.log_prob(z).mean().item() - 0.05


def test_a_flow_is_inverted_by_its_samples():
    """What is sampled from noise u has density N(u) times the volume: change of variables, by autograd."""
    prior = NETS["flow"](D)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    z = prior.sample(1, generator)

    def noise_of(z):
        x = prior.standardised(z)
        for block in prior.blocks:
            shift, log_scale = block(x)
            x = ((x - shift) * torch.exp(-log_scale)).flip(1)
        return x

    torch.testing.assert_close(noise_of(z), u, atol=1e-5, rtol=0)
    jacobian = torch.autograd.functional.jacobian(lambda v: noise_of(v)[0], z)[:, 0]
    expected = -0.5 * (u.square() + math.log(2 * math.pi)).sum() + jacobian.det().abs().log()
    torch.testing.assert_close(prior.log_prob(z)[0].float(), expected, atol=1e-4, rtol=0)


def test_the_divergence_is_the_jacobians_trace():
    prior = NETS["flow_matching"](D)
    u, t = torch.randn(4, D), torch.rand(4, 1)
    velocity, divergence = prior.with_divergence(u, t)
    torch.testing.assert_close(velocity, prior.velocity(u, t))
    for i in range(4):
        rows = torch.autograd.functional.jacobian(
            lambda v, i=i: prior.velocity(v, t[i : i + 1])[0], u[i : i + 1]
        )
        torch.testing.assert_close(divergence[i], rows[:, 0].trace(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_two_clusters_are_learned(name):
    """Likelier than the best single Gaussian by half a nat; two far clusters gain log 2 less what overlaps."""
    torch.manual_seed(0)
    prior = {"flow": AutoregressivePrior, "flow_matching": FlowMatchingPrior}[name](D, 64, 3)
    values, generator = posteriors(), torch.Generator().manual_seed(0)
    prior.standardise_by(values)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for _ in range(250):
        rows = torch.randint(len(values), (256,), generator=generator)
        optimizer.zero_grad()
        prior.loss(values[rows], rows, prior.draws(256, generator)).backward()
        optimizer.step()
    single = MixturePrior(D, 1, True)
    single.fit(values, 0)
    held_out = posteriors(500, seed=9)
    z = held_out[:, 0] + 0.1 * torch.randn(500, D, generator=generator)
    with torch.no_grad():
        gain = prior.log_prob(z).double().mean() - single.log_prob(z).mean()
    assert gain > 0.4
