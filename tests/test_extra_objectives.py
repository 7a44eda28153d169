"""Objectives beside the models' own: values and gradients against formulas written out in float64."""

import math

import pytest
import torch

from movae_fast.cli import main
from movae_fast.cli.flags.train import parse
from movae_fast.models import build_model
from movae_fast.objectives import LossVector, terms
from movae_fast.objectives.discriminators import LatentDiscriminator, discriminator_loss, permuted
from movae_fast.training.adversary import Adversary
from movae_fast.training.build import new_model
from movae_fast.training.world import World


def close(got, truth, tolerance=1e-5):
    got, truth = got.detach().double(), truth.detach().double()
    assert float(truth.norm()) > 0
    assert float((got - truth).norm()) <= tolerance * float(truth.norm())


@pytest.mark.parametrize("second", [False, True])
def test_dip_penalties_and_their_gradients(second):
    torch.manual_seed(0)
    mu, logvar = torch.randn(9, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    got = terms.dip_penalties(mu, logvar if second else None)
    wide_mu, wide_logvar = (v.detach().double().requires_grad_() for v in (mu, logvar))
    off = diagonal = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            a, b = wide_mu[:, i], wide_mu[:, j]
            c = (a * b).mean() - a.mean() * b.mean()
            if i == j:
                c = c + (wide_logvar[:, i].exp().mean() if second else 0)
                diagonal = diagonal + (c - 1) ** 2
            else:
                off = off + c**2
    for ours, truth in zip(got, (off, diagonal), strict=True):
        close(ours, truth)
        close(*(torch.autograd.grad(v, m, retain_graph=True)[0] for v, m in ((ours, mu), (truth, wide_mu))))
    if second:
        assert torch.autograd.grad(got[0], logvar, allow_unused=True, retain_graph=True)[0].abs().max() < 1e-5
        close(
            torch.autograd.grad(got[1], logvar)[0],
            torch.autograd.grad(diagonal, wide_logvar)[0],
        )


def test_padding_counts_for_nothing_in_a_covariance_and_in_imq():
    torch.manual_seed(0)
    z, prior = torch.randn(6, 2), torch.randn(6, 2)
    counts = torch.tensor([1.5, 1.5, 1.5, 1.5, 0, 0])
    for ours, alone in zip(terms.dip_penalties(z, z, counts), terms.dip_penalties(z[:4], z[:4]), strict=True):
        close(ours, alone)
    moved = torch.cat([z[:4], 9 * z[4:]])
    close(terms.mmd_imq(moved, prior, counts), terms.mmd_imq(z, prior, counts))


def test_imq_is_the_unbiased_statistic_over_all_pairs():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, requires_grad=True), torch.randn(7, 3)
    wide, other = x.detach().double().requires_grad_(), y.double()

    def kernel(a, b):
        squared = ((a - b) ** 2).sum()
        return sum(6 * s / (6 * s + squared) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    pairs = [(i, j) for i in range(7) for j in range(7)]
    truth = sum(kernel(wide[i], wide[j]) + kernel(other[i], other[j]) for i, j in pairs if i != j) / 42
    truth = truth - 2 * sum(kernel(wide[i], other[j]) for i, j in pairs) / 49
    close(terms.mmd_imq(x, y), truth, 1e-4)
    close(torch.autograd.grad(terms.mmd_imq(x, y), x)[0], torch.autograd.grad(truth, wide)[0], 1e-4)


def importance_case(draws=4, gradient="iwae"):
    torch.manual_seed(0)
    model = build_model("mlp_vae", (1, 4, 4), "sigmoid", {"latent_dim": 2, "hidden_dims": [8]}).double()
    model.importance_samples = draws
    losses = LossVector(model, [1.0, 1.0], "bernoulli", "sum", n_data=3, importance_gradient=gradient)
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64).round()
    return model, losses, x, model.draw_noise(3)


def log_weights(model, x, noise, draws, mu_of_density=None, logvar_of_density=None):
    """log p(x, z_k) - log q(z_k|x) [B, K] written out, and z [B, K, D]."""
    mu, logvar = model.encode(x)
    z = mu[:, None] + torch.exp(0.5 * logvar)[:, None] * noise.latent.view(len(x), draws, -1)
    logits = model.decode(z.flatten(0, 1)).view(len(x), draws, -1)
    pixels = x.view(len(x), 1, -1)
    log_p = (pixels * logits - torch.nn.functional.softplus(logits)).sum(-1)
    log_p = log_p - 0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    m = (mu if mu_of_density is None else mu_of_density)[:, None]
    v = (logvar if logvar_of_density is None else logvar_of_density)[:, None]
    log_q = -0.5 * ((z - m) ** 2 / v.exp() + v + math.log(2 * math.pi)).sum(-1)
    return log_p - log_q, z


def test_the_rows_of_iwae_add_up_to_the_bounds_gradient():
    model, losses, x, noise = importance_case()
    rows = losses(model(x, noise), x)
    got = torch.autograd.grad(sum(rows), list(model.parameters()))
    log_w, _ = log_weights(model, x, noise, 4)
    bound = (log_w.logsumexp(1) - math.log(4)).mean()
    for ours, truth in zip(got, torch.autograd.grad(-bound, list(model.parameters())), strict=True):
        close(ours, truth, 1e-9)


def test_dreg_is_the_doubly_reparametrised_gradient():
    model, losses, x, noise = importance_case(gradient="dreg")
    parts = list(model.encoder.parameters()), list(model.decoder.parameters())
    heads = [*model.mu.parameters(), *model.logvar.parameters()]
    encoder = [*parts[0], *heads]
    rows = losses(model(x, noise), x)
    got = torch.autograd.grad(sum(rows), [*encoder, *parts[1]])
    mu, logvar = (v.detach() for v in model.encode(x))
    log_w, z = log_weights(model, x, noise, 4, mu, logvar)
    weights = log_w.detach().softmax(1)
    # sum_k w_k^2 (d log w_k / d z_k) (d z_k / d phi), the mean over images
    (at_z,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    surrogate = -(weights[..., None] ** 2 * at_z * z).sum((1, 2)).mean()
    truth = [
        *torch.autograd.grad(surrogate, encoder, retain_graph=True),
        *torch.autograd.grad(-(weights * log_w).sum(1).mean(), parts[1]),
    ]
    for ours, expected in zip(got, truth, strict=True):
        close(ours, expected, 1e-9)


def test_evaluation_has_one_draw():
    model, _, x, _ = importance_case()
    model.eval()
    assert model(x).z.shape == (3, 2)


def test_the_discriminators_row_and_step_leave_each_other_alone():
    torch.manual_seed(0)
    net = LatentDiscriminator(3)
    adversary = Adversary(net, World())
    z = torch.randn(8, 3, requires_grad=True)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tc = terms.density_ratio_tc(net(z))
    wide = net.double()
    truth = wide.net(z.detach().double())
    close(tc, (truth[:, 0] - truth[:, 1]).mean(), 1e-4)
    net.float()
    (to_z,) = torch.autograd.grad(tc, z)
    assert float(to_z.norm()) > 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    with torch.no_grad():
        net(z)  # an evaluation is not trained on
    assert len(net.seen) == 1
    adversary.step()
    assert not net.seen
    assert z.grad is None
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_trained_discriminator_finds_the_total_correlation_of_gaussians():
    """Of two Gaussians with correlation 0.8 it is -log(1 - 0.64) / 2."""
    torch.manual_seed(0)
    net = LatentDiscriminator(2)
    net.net = torch.nn.Sequential(
        torch.nn.Linear(2, 32),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Linear(32, 32),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Linear(32, 2),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)

    def drawn(n):
        a, b = torch.randn(2, n)
        return torch.stack([a, 0.8 * a + 0.6 * b], 1)

    for _ in range(500):
        loss = discriminator_loss(net.net, drawn(512), permuted(drawn(512)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tc = float(terms.density_ratio_tc(net.net(drawn(20_000))))
    assert tc == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.12)


def test_permuting_keeps_each_coordinate_and_breaks_their_pairs():
    torch.manual_seed(0)
    z = torch.arange(200.0)[:, None].expand(-1, 3)
    mixed = permuted(z)
    assert torch.equal(mixed.sort(0).values, z)
    assert float((mixed[:, 0] == mixed[:, 1]).float().mean()) < 0.1


FLAGS = (
    "--dataset digits --arch mlp_vae --latent_dim 3 --hidden_dims 16 --device cpu --batch_size 16 "
    "--limit_train 64 --limit_test 32 --seed 3 --log_every 2 --num_samples 2 --save_freq 0 --agg upgrad"
).split()


@pytest.mark.parametrize(
    "more",
    [
        "--extra_objectives factor dip_ii gan --gan_start 2",
        "--importance_samples 3 --importance_gradient dreg",
    ],
)
def test_runs_go_on_bit_for_bit(tmp_path, more):
    words = [*FLAGS, *more.split()]
    assert main(["train", *words, "--steps", "6", "--exp_dir", str(tmp_path / "whole")]) == 0
    assert main(["train", *words, "--steps", "3", "--exp_dir", str(tmp_path / "part")]) == 0
    assert main(["train", "--resume", str(tmp_path / "part"), "--steps", "6"]) == 0
    whole, part = (
        torch.load(tmp_path / run / "checkpoints" / "last.pt", weights_only=True) for run in ("whole", "part")
    )
    states = [(whole["model"], part["model"])]
    for section in {"adversary": "factor", "patches": "gan"}.items():
        if section[1] in more:
            states.append((whole[section[0]]["model"], part[section[0]]["model"]))
    for one, other in states:
        for key, value in one.items():
            assert torch.equal(value, other[key]), key


def test_objectives_are_added_behind_the_models_own():
    config = parse([*FLAGS, "--extra_objectives", "dip_i", "l1", "--loss_weights.l1", "3"]).config
    assert config.objective_names == ["reconstruction", "kl", "off_diagonal", "diagonal", "l1"]
    assert config.weights() == [1.0, 1.0, 10.0, 100.0, 3.0]
    assert new_model(config).objectives == tuple(config.objective_names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch vq_vae --extra_objectives dip_i", "needs images and a vector of latents; vq_vae"),
        ("--arch mlp_vae --extra_objectives dip_i dip_ii", "one of dip_i and dip_ii"),
        ("--arch mlp_vae --extra_objectives factor --batch_size 1", "at least 2 images"),
        ("--arch mlp_vae --extra_objectives fctor", "--extra_objectives"),
        ("--arch vae --importance_samples 3 --image_size 32", "add --recons_reduction sum"),
        ("--arch mlp_vae --importance_samples 3 --extra_objectives l1", "reconstruction, kl, l1"),
        ("--arch mlp_vae --importance_gradient dreg", "--importance_samples 10"),
        ("--arch mlp_vae --mmd_kernel imq", "mlp_vae has no mmd"),
        ("--arch mmd_vae --image_size 32 --mmd_alpha 0 --mmd_lambda 0.001", "mmd is -0.999"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(["--dataset", "digits", *flags.split()])
