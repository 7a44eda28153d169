"""The VampPrior: its density, its rows, its samples and its bounds against formulas written out in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from movae_fast.cli import main
from movae_fast.cli.flags.train import parse
from movae_fast.evaluation import likelihood
from movae_fast.evaluation.prior_scores import latent_scores
from movae_fast.models import build_model
from movae_fast.models.vamp import Components, PseudoInputs, draw_from, mixture_log_density
from movae_fast.objectives import LossVector
from movae_fast.training import checkpoint
from movae_fast.training.build import new_model
from movae_fast.training.config_checks import validate
from movae_fast.training.gradients import Batch, Network, exact_rows
from movae_fast.training.precision import Precision
from tests.test_distributed import finish, start_command

CPU = torch.device("cpu")


def written_out(z, mu, logvar):
    """log 1/K sum_k N(z; mu_k, exp(logvar_k)) [N]: float64, one component after the other."""
    z, mu, logvar = (v.double() for v in (z, mu, logvar))
    total = torch.zeros(len(z), dtype=torch.float64)
    for m, v in zip(mu, logvar, strict=True):
        inside = torch.ones(len(z), dtype=torch.float64)
        for d in range(z.shape[1]):
            inside = inside * torch.exp(-((z[:, d] - m[d]) ** 2) / (2 * v[d].exp()))
            inside = inside / (2 * math.pi * v[d].exp()).sqrt()
        total = total + inside / len(mu)
    return total.log()


def components(count=5, width=3):
    torch.manual_seed(0)
    return Components(torch.randn(count, width), 0.5 * torch.randn(count, width) - 1)


def test_the_density_is_the_mean_of_the_components():
    mixture, z = components(), torch.randn(20, 3)
    truth = written_out(z, *mixture)
    assert truth.std() > 0.5
    torch.testing.assert_close(mixture_log_density(z, mixture).double(), truth, atol=1e-5, rtol=1e-5)
    # Far from all components every density underflows; their logarithm does not.
    far = mixture_log_density(torch.full((1, 3), 100.0), mixture)
    assert bool(far.isfinite().all())
    assert float(far) < -1e3


def test_draws_are_those_of_the_mixture():
    mixture, n = components(), 40_000
    z = draw_from(mixture, n, torch.Generator().manual_seed(0)).double()
    mu, variance = mixture.mu.double(), mixture.logvar.double().exp()
    mean = mu.mean(0)
    spread = (variance + mu**2).mean(0) - mean**2
    assert ((z.mean(0) - mean).abs() < 5 * (spread / n).sqrt()).all()
    torch.testing.assert_close(z.var(0), spread, rtol=0.05, atol=0)
    cold = draw_from(mixture, 50, torch.Generator().manual_seed(0), temperature=0.0)
    assert all(any(torch.equal(row, m) for m in mixture.mu) for row in cold)
    assert cold.unique(dim=0).shape == mixture.mu.shape


def vamp_model(arch="mlp_vae", shape=(1, 4, 4), count=6, **options):
    torch.manual_seed(1)
    model = build_model(arch, shape, "none", {"latent_dim": 2, **options}).double()
    model.pseudo_inputs = PseudoInputs(count, shape, normalize=False).double()
    model.pseudo_inputs.values.data.uniform_(-0.2, 1.2)  # some values are beyond the images' range
    return model


def test_the_row_of_kl_is_the_gradient_of_log_q_less_log_p():
    """Through the features, as a step computes it, and at the pseudo-inputs; reconstruction has none there."""
    model = vamp_model(hidden_dims=[8])
    losses = LossVector(model, [1.0, 0.5], "gaussian", "sum", n_data=7)
    x, noise = torch.rand(7, 1, 4, 4, dtype=torch.float64), model.draw_noise(7)
    task = [p for params in model.task_parameters().values() for p in params]
    network = Network(model, losses, Precision("fp32", CPU), model.shared_parameters(), task, cut=True)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    result = exact_rows(network, Batch(x, noise, None), weights)

    mu, logvar = model.posterior(x)
    z = mu + torch.exp(0.5 * logvar) * noise.latent
    images = model.pseudo_inputs.values.clip(0, 1)
    posterior = (-0.5 * (noise.latent**2 + logvar + math.log(2 * math.pi))).sum(1)
    kl = (posterior - written_out(z, *model.posterior(images))).mean()
    error = (model.decode(z) - x).square().sum() / 7
    torch.testing.assert_close(result.losses, torch.stack([error, kl]).detach())
    assert result.nonzero == [0, 1]
    for row, truth in zip(result.shared, (error, 0.5 * kl), strict=True):
        expected = torch.autograd.grad(truth, network.shared, retain_graph=True, allow_unused=True)
        for ours, theirs in zip(row, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    (at_values,) = torch.autograd.grad(kl, model.pseudo_inputs.values)
    inside = (model.pseudo_inputs.values > 0) & (model.pseudo_inputs.values < 1)
    assert torch.equal(at_values != 0, inside)


def test_the_bounds_are_below_the_exact_likelihood_of_a_linear_model():
    """Of a linear decoder p(x) is a mixture of Gaussians in closed form: the bound of many draws reaches it."""
    model = vamp_model("linear_vae", (1, 2, 2), count=4).eval()
    model.pseudo_inputs.values.data.uniform_(0, 1)
    with torch.no_grad():
        model.logvar.value.fill_(0)  # wide enough to draw from
        model.mu.weight.mul_(3)
        offset = model.decode(torch.zeros(1, 2, dtype=torch.float64)).flatten()
        w = torch.stack([model.decode(e[None]).flatten() - offset for e in torch.eye(2).double()], 1)
        mu, logvar = (v.detach().clone() for v in model.components())
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    each = [
        torch.distributions.MultivariateNormal(w @ m + offset, w @ torch.diag(v.exp()) @ w.T + torch.eye(4) / 2)
        for m, v in zip(mu, logvar, strict=True)
    ]
    exact = torch.stack([q.log_prob(x.flatten(1)) for q in each]).logsumexp(0).mean() - math.log(4)
    many, one = (
        likelihood.importance_weighted_bound(model, [(x, None)], "gaussian", draws, seed=0)
        for draws in (40_000, 1)
    )
    assert many == pytest.approx(float(exact), abs=0.02)
    figures, rates = likelihood.elbo(model, [(x.repeat(500, 1, 1, 1), None)], "gaussian", seed=0)
    assert rates is None
    assert figures["elbo"] < float(exact) - 0.05
    model.pseudo_inputs = None  # the same weights under N(0, I) are another model
    other = likelihood.importance_weighted_bound(model, [(x, None)], "gaussian", 40_000, seed=0)
    assert abs(other - many) > 0.1
    assert one < many


class WrittenOut(nn.Module):
    """The mixture as a prior that is fitted afterwards."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def log_prob(self, z):
        return written_out(z, *self.mixture)


def test_a_fitted_prior_is_compared_with_the_models_own():
    """The same density once more gains nothing, and N(0, I) in its place is another ELBO."""
    model = vamp_model(hidden_dims=[8]).eval()
    batches = [(torch.rand(30, 1, 4, 4, dtype=torch.float64), None)]
    with torch.no_grad():
        scores = latent_scores(WrittenOut(model.components()), model, batches, "gaussian", 0)
    assert scores["elbo_gain"] == pytest.approx(0, abs=1e-9)
    assert scores["elbo"] == pytest.approx(scores["elbo_vamp"])
    figures, _ = likelihood.elbo(model, batches, "gaussian", 0)
    assert figures["elbo"] == pytest.approx(scores["elbo_vamp"])
    model.pseudo_inputs = None
    with torch.no_grad():
        under_normal = latent_scores(WrittenOut(components(4, 2)), model, batches, "gaussian", 0)
    assert abs(under_normal["elbo_standard_normal"] - scores["elbo_vamp"]) > 0.01


FLAGS = (
    "--dataset digits --image_size 8 --arch mlp_vae --latent_dim 3 --hidden_dims 16 --device cpu "
    "--batch_size 16 --limit_train 64 --limit_test 32 --seed 3 --log_every 2 --num_samples 2 --save_freq 0 "
    "--agg upgrad --recons_dist bernoulli --prior vamp --pseudo_inputs 5"
).split()


def test_a_run_goes_on_and_is_measured_and_sampled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(["train", *FLAGS, "--steps", "6", "--exp_dir", str(whole)]) == 0
    assert main(["train", *FLAGS, "--steps", "3", "--exp_dir", str(part)]) == 0
    assert main(["train", "--resume", str(part), "--steps", "6"]) == 0
    models = [checkpoint.load(run / "checkpoints" / "last.pt")["model"] for run in (whole, part)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    begun = new_model(parse(FLAGS).config)
    assert models[0]["pseudo_inputs.values"].shape == begun.pseudo_inputs.values.shape == (5, 1, 8, 8)
    assert main(["evaluate", str(whole), "--device", "cpu", "--metrics", "elbo", "--iw", "5"]) == 0
    figures = json.loads((whole / "evaluation" / "metrics.json").read_text())["figures"]
    assert figures["elbo"] == pytest.approx(-figures["rate"] - figures["distortion"])
    assert math.isfinite(figures["iw_bound_5"])
    capsys.readouterr()
    assert main(["sample", str(whole), "--device", "cpu", "--n_samples", "4", "--temperature", "0.5"]) == 0
    assert "the VampPrior of 5 pseudo-inputs, the model's own prior" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch vae --image_size 32 --prior vamp", "vae has BatchNorm.*--layer_norm layer"),
        ("--arch torch_vae --image_size 32 --prior vamp", "torch_vae has BatchNorm.*mlp_vae has none"),
        ("--arch betatc_vae --image_size 32 --prior vamp", "betatc_vae has reconstruction, mi, tc, dwkl"),
        ("--arch vq_vae --prior vamp", "vq_vae has reconstruction, embedding, commitment"),
        ("--arch mlp_vae --prior vamp --multirate", "--multirate does not go with --prior vamp"),
        ("--arch mlp_vae --prior vamp --agg upgrad --gramian_at features", "--gramian_at does not go"),
        ("--arch mlp_vae --prior vamp --importance_samples 3", "--importance_samples does not go"),
        ("--arch mlp_vae --prior vamp --extra_objectives cycle", "cycle compares with N.0, I.; leave out"),
        ("--arch mlp_vae --pseudo_inputs 3", "--pseudo_inputs is a setting of --prior vamp"),
        ("--arch mlp_vae --prior vamp --pseudo_inputs 0", "--pseudo_inputs 0"),
        ("--arch mlp_vae --prior vam", "--prior"),
    ],
)
def test_what_does_not_fit_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        validate(parse(["--dataset", "digits", *flags.split()]).config)


def test_the_pseudo_inputs_are_images_of_the_data():
    for normalize, least in ((False, 0.0), (True, -1.0)):
        torch.manual_seed(0)
        made = PseudoInputs(200, (1, 8, 8), normalize)
        assert isinstance(made.values, nn.Parameter)
        unit = (made() - least) / (1 - least)
        assert unit.mean().item() == pytest.approx(0.05, abs=1e-3)
        assert unit.std().item() == pytest.approx(0.01, abs=1e-3)
        made.values.data.fill_(-5)
        assert bool((made() == least).all())


@pytest.mark.slow
def test_two_ranks_train_what_one_process_does(tmp_path):
    """Each rank has all pseudo-inputs: the mean of the ranks' rows is the row of the union of the batches."""
    models = []
    for name, ranks in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        words = [
            "train",
            *FLAGS,
            "--optimizer",
            "sgd",
            "--lr",
            "0.01",
            "--steps",
            "6",
            "--exp_dir",
            str(folder),
        ]
        words[words.index("--batch_size") + 1] = str(16 // ranks)
        finish(folder, start_command(folder, words, ranks))
        models.append(checkpoint.load(folder / "checkpoints" / "last.pt")["model"])
    one, two = models
    begun = new_model(parse(FLAGS).config).state_dict()
    for name, value in one.items():
        assert (value - two[name]).norm() <= 1e-5 * value.norm(), name
        assert not torch.equal(value, begun[name])
