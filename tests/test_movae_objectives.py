"""MO-VAE's gradient-guided, recursive and cyclic objectives against formulas written out in float64."""

import pytest
import torch
from torch.nn import functional as F

from movae_fast.cli.flags.train import parse
from movae_fast.models import build_model
from movae_fast.objectives import LossVector, terms
from movae_fast.schedules import LossSchedule
from movae_fast.training.build import new_model
from movae_fast.training.start import assemble
from movae_fast.training.train_step import TrainStep
from movae_fast.training.world import World
from tests.test_extra_objectives import close

SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
CPU = torch.device("cpu")


def strength(x):
    padded = F.pad(x.double(), (1, 1, 1, 1), mode="replicate")
    across, down = (
        F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]) for kernel in (SOBEL, SOBEL.T)
    )
    return (across**2 + down**2 + 1e-8).sqrt()


def images(n=3, channels=3, side=5):
    torch.manual_seed(0)
    return torch.rand(n, channels, side, side), torch.rand(n, channels, side, side, requires_grad=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_guided_objectives_and_their_gradients(reduction):
    x, image = images()
    wide = image.detach().double().requires_grad_()
    ours = [
        terms.edge_weighted_error(image, x, terms.edge_strength(x), reduction),
        terms.edge_matching(terms.edge_strength(image), terms.edge_strength(x), reduction),
    ]
    edges, pixels = strength(x), []
    for b in range(3):
        weight = edges[b].max(0).values
        pixels.append((weight / weight.max() * (wide[b] - x[b].double()) ** 2).sum())
    apart = (strength(wide) - edges).abs()
    assert bool((apart > 1).any())  # so that both sides of the bend are looked at
    bent = torch.where(apart < 1, apart**2 / 2, apart - 0.5)
    divisor = 75 if reduction == "mean" else 1
    truths = [sum(pixels) / 3 / divisor, bent.sum() / 3 / divisor]
    for got, truth in zip(ours, truths, strict=True):
        close(got, truth)
        close(torch.autograd.grad(got, image)[0], torch.autograd.grad(truth, wide)[0], 1e-4)


def test_a_frame_is_no_edge_and_images_do_not_meet():
    flat = torch.full((1, 1, 4, 4), 0.7)
    torch.testing.assert_close(terms.edge_strength(flat), torch.full_like(flat, 1e-4), rtol=1e-3, atol=0)
    x, image = images()
    each = [
        terms.edge_weighted_error(image[b : b + 1], x[b : b + 1], terms.edge_strength(x[b : b + 1]))
        for b in range(3)
    ]
    close(terms.edge_weighted_error(image, x, terms.edge_strength(x)), sum(each) / 3)
    counts = torch.tensor([1.5, 1.5, 0])
    found = terms.edge_strength(image), terms.edge_strength(x)
    close(terms.edge_matching(*found, "mean", counts), terms.edge_matching(found[0][:2], found[1][:2]))
    weighed = terms.edge_weighted_error(image, x, found[1], "mean", counts)
    close(weighed, (each[0] + each[1]) / 2)


def again(norm="none"):
    torch.manual_seed(0)
    options = {"latent_dim": 3, "hidden_dims": [4, 4], "layer_norm": norm}
    model = build_model("vae", (1, 8, 8), "sigmoid", options)
    model.objectives = ("reconstruction", "kl", "recursive_kl", "cycle")
    model.encodes_again = model.returns = model.draws_prior = True
    return model


def test_the_second_passes_and_the_gradients_of_every_parameter():
    model = again().double()
    losses = LossVector(model, [1.0, 0.0, 0.5, 0.25], "gaussian", "mean", n_data=8)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    noise = model.draw_noise(4)
    got = losses(model(x, noise), x)
    mu, logvar = model.encode(x)
    image = torch.sigmoid(model.decode(mu + (logvar / 2).exp() * noise.latent))
    m, v = model.encode(image)
    kl = ((m**2 + v.exp() - v - 1) / 2).sum(1).mean()
    cycle = ((noise.prior - model.encode(torch.sigmoid(model.decode(noise.prior)))[0]) ** 2).sum(1).mean()
    parameters = list(model.parameters())
    for ours, truth in ((got[2], kl), (got[3], cycle)):
        close(ours, truth, 1e-12)
        mine, exact = (
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for value in (ours, truth)
        )
        for a, b in zip(mine, exact, strict=True):
            assert (a is None) == (b is None)
            if b is not None and float(b.norm()) > 0:
                close(a, b, 1e-10)
    for part in (model.encoder, model.decoder):  # each row reaches both
        for value in got[2:]:
            gradients = torch.autograd.grad(value, list(part.parameters()), retain_graph=True)
            assert all(float(g.norm()) > 0 for g in gradients)
    assert abs(float(noise.prior.mean())) < 1
    assert not torch.equal(noise.prior, noise.latent)


def test_second_passes_leave_running_statistics_to_the_first():
    plain, model = again("batch"), again("batch")
    plain.encodes_again = plain.returns = False
    x, noise = torch.rand(4, 1, 8, 8), model.draw_noise(4)
    for each in (plain, model):
        each(x, noise)
    for (name, one), other in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_the_step_needs_the_whole_jacobian():
    model = again()
    losses = LossVector(model, [1.0, 0.0, 0.5, 0.25], "gaussian", "mean", n_data=8)
    with pytest.raises(ValueError, match='give "all"'):
        TrainStep(model, losses, None)
    step = TrainStep(model, losses, None, jacobian="all")
    x, noise = torch.rand(4, 1, 8, 8), model.draw_noise(4)
    step.gradient(x, 0, noise)
    found = losses(model(x, noise), x)
    exact = torch.autograd.grad(found[0] + found[2] / 2 + found[3] / 4, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_recursive_kls_weight_rises():
    model = again()
    schedule = LossSchedule(recursive_steps=100)
    losses = LossVector(model, [1.0, 1.0, 0.5, 0.25], "gaussian", "mean", n_data=8, schedule=schedule)
    assert losses.weights_at(24).tolist() == [1.0, 1.0, 0.125, 0.25]
    assert losses.weights_at(99).tolist() == losses.weights_at(10_000).tolist() == [1.0, 1.0, 0.5, 0.25]


DIGITS = (
    "--dataset digits --image_size 16 --device cpu --batch_size 16 --limit_train 64 --limit_test 16 --seed 3"
)
SMALL = "--hidden_dims 4 4 --latent_dim 3"


def test_they_are_flags():
    words = f"{DIGITS} {SMALL} --arch vae --extra_objectives edges recursive_kl cycle --agg comfort --steps 3"
    config = parse([*words.split(), "--recursive_kl_steps", "10", "--loss_weights.kl", "0"]).config
    assert config.jacobian == "all"
    assert config.weights() == [1.0, 0.0, 1.0, 1.0, 0.00025, 0.00025]
    run = assemble(config, CPU, World())
    assert run.losses.weights_at(4)[4] == pytest.approx(0.000125)
    run.step = 2
    run.begin_step()  # the last
    assert run.train_step.aggregator.progress == 1
    run.step = 0
    run.begin_step()
    assert run.train_step.aggregator.progress == 0
    x, _ = next(iter(run.train_loader.epoch()))
    metrics = run.train_step(x, 0, run.noise(len(x)), log=True)
    assert bool(metrics.losses.isfinite().all())
    assert bool((metrics.norms[[0, 2, 3, 4, 5]] > 0).all())
    assert not new_model(
        parse(f"{DIGITS} {SMALL} --arch vae --extra_objectives edges".split()).config
    ).passes_again
    coded = parse(f"{DIGITS} --arch vq_vae --hidden_dims 4 4 --extra_objectives edges".split()).config
    assert coded.weights() == [1.0, 1.0, 0.25, 1.0, 1.0]  # MO-VAE's gg_vq_vae
    assert coded.jacobian == "shared"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--arch vae --extra_objectives cycle --jacobian shared",
            "--jacobian shared: --extra",
        ),
        (
            "--arch vae --extra_objectives cycle --agg upgrad --gramian_at features",
            "--gramian_at features: --ex",
        ),
        ("--arch vq_vae --extra_objectives recursive_kl", "a vector of latents; vq_vae"),
        ("--arch vlae --extra_objectives cycle --image_size 32", "one vector of latents for one beta"),
        ("--arch vae --extra_objectives recursive_kl --multirate", "one vector of latents for one beta"),
        ("--arch vae --recursive_kl_steps 9", "--extra_objectives recursive_kl: add it"),
        ("--arch vae --extra_objectives recursive_kl --recursive_kl_steps 0", "--recursive_kl_steps 0"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(["--dataset", "digits", "--image_size", "32", *flags.split()])
