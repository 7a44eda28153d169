"""The likelihoods of an image's values, against sums, closed forms and distributions of other people's."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from movae_fast.cli import main
from movae_fast.data.transforms import batch_of
from movae_fast.evaluation import likelihood as bounds
from movae_fast.models import MODELS, SIDES, build_model, make_likelihood, model_options
from movae_fast.models.likelihoods import LEAST_LOG_SCALE, bin_log_mass
from movae_fast.objectives import LossVector, reconstruction
from movae_fast.training.build import make_loader
from movae_fast.training.compiled import graph_counters
from movae_fast.training.config import TrainConfig
from movae_fast.training.logs import read_lines
from movae_fast.training.train_step import TrainStep

DISTS = ("bernoulli", "gaussian", "laplacian", "gaussian_optimal", "logistic", "dmol")
DOUBLE = {"dtype": torch.float64}


def logistic_masses(mean, log_scale, levels):
    """NumPy's: the mass of each of the levels' bins under a logistic, [levels]."""
    x = np.linspace(-1, 1, levels)
    ends = (x[1:] + x[:-1]) / 2
    below = stats.logistic(mean, np.exp(max(log_scale, LEAST_LOG_SCALE))).cdf(ends)
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


@pytest.mark.parametrize("bits", [8, 5, 2])
@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -4.0, -1.0, 2.0, 12.0])
def test_bins_of_a_logistic_have_their_masses_and_sum_to_one(bits, log_scale):
    levels = 2**bits
    x = torch.linspace(-1, 1, levels, **DOUBLE)
    for mean in (-1.7, -1.0, -0.31, 0.0, 0.9961, 1.4):
        found = bin_log_mass(x, torch.tensor(mean, **DOUBLE), torch.tensor(log_scale, **DOUBLE), levels).exp()
        assert float(found.sum()) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(found.numpy(), logistic_masses(mean, log_scale, levels), atol=1e-12)


def test_far_tails_and_extreme_scales_keep_value_and_gradient():
    """Where the difference of the sigmoids rounds to 0, its log is still the tail's slope; in float32."""
    x = torch.tensor([0.5])
    for log_scale in (-7.0, -3.0, 10.0, 60.0):
        for mean in (-40.0, 0.498, 40.0):
            parameters = [torch.tensor([v], requires_grad=True) for v in (mean, log_scale)]
            value = bin_log_mass(x, *parameters, 256)
            exact = bin_log_mass(x.double(), *(p.detach().double() for p in parameters), 256)
            assert value.item() == pytest.approx(exact.item(), rel=1e-4)
            gradients = torch.autograd.grad(value, parameters)
            assert all(g.isfinite().all() for g in gradients)
    # A tail of a logistic is an exponential: its log falls by 1 / scale per unit.
    a, b = (
        bin_log_mass(torch.tensor(v, **DOUBLE), torch.zeros((), **DOUBLE), torch.tensor(-5.0, **DOUBLE), 256)
        for v in (0.5, 0.6)
    )
    assert float(a - b) == pytest.approx(0.1 * math.exp(5))


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("normalized", [False, True])
def test_dmol_sums_to_one_over_a_channel_given_the_others(bits, normalized):
    """p(r, g, b) / p(given) summed over blue; over green and blue; over all three."""
    levels, k = 2**bits, 3
    likelihood = make_likelihood("dmol", 3, normalized=normalized, bits=bits, components=k)
    output = torch.randn(1, 10 * k, 1, 1, **DOUBLE)
    output[:, 4 * k : 7 * k] -= 3  # log-scales
    values = torch.linspace(-1 if normalized else 0, 1, levels, **DOUBLE)

    def p(*colours):
        x = torch.stack(torch.broadcast_tensors(*colours), -1).reshape(-1, 3, 1, 1)
        return torch.exp(-likelihood.errors(output.expand(len(x), -1, -1, -1), x)).flatten()

    # The marginal of the earlier colours is known: a mixture that lacks the later factors.
    logits, means, scales, c = (part[0, ..., 0, 0] for part in parts(output, k))
    weights = torch.softmax(logits, 0)
    sym = lambda v: v if normalized else 2 * v - 1  # noqa: E731
    red, green = values[levels // 3], values[-1]
    of_red = bin_log_mass(sym(red), means[0], scales[0], levels).exp()
    of_green = bin_log_mass(sym(green), means[1] + c[0] * sym(red), scales[1], levels).exp()
    assert float(p(red, green, values).sum() / (weights * of_red * of_green).sum()) == pytest.approx(
        1, abs=1e-6
    )
    both = p(red, values[:, None].expand(-1, levels), values[None].expand(levels, -1))
    assert float(both.sum() / (weights * of_red).sum()) == pytest.approx(1, abs=1e-6)
    if bits == 5:
        grid = torch.meshgrid(values, values, values, indexing="ij")
        assert float(p(*grid).sum()) == pytest.approx(1, abs=1e-6)


def parts(output, k):
    rest = output[:, k:].unflatten(1, (3, 3, k))
    return output[:, :k], rest[:, 0], rest[:, 1], torch.tanh(rest[:, 2])


def test_dmol_is_the_mixture_written_out_in_numpy():
    k, levels = 4, 256
    likelihood = make_likelihood("dmol", 3, components=k)
    output = torch.randn(2, 10 * k, 2, 3, **DOUBLE)
    output[:, 4 * k : 7 * k] -= 1
    grey = torch.randint(0, 256, (2, 3, 2, 3))
    grey[0, :, 0, 0], grey[0, :, 0, 1] = 0, 255  # both ends
    found = likelihood.errors(output, grey.double() / 255)
    for b in range(2):
        for i in range(2):
            for j in range(3):
                logits, means, scales, c = (np.asarray(part[b, ..., i, j]) for part in parts(output, k))
                weights = np.exp(logits) / np.exp(logits).sum()
                r, g, _ = x = grey[b, :, i, j].numpy() / 127.5 - 1
                total = 0.0
                for n in range(k):
                    at = means[0, n], means[1, n] + c[0, n] * r, means[2, n] + c[1, n] * r + c[2, n] * g
                    mass = [
                        logistic_masses(at[v], scales[v, n], levels)[grey[b, v, i, j]] for v in range(len(x))
                    ]
                    total += weights[n] * np.prod(mass)
                assert found[b, 0, i, j].item() == pytest.approx(-math.log(total), rel=1e-6)


def test_logistic_is_one_component_of_each_value():
    likelihood = make_likelihood("logistic", 1, bits=5)
    x = (torch.arange(32, **DOUBLE) / 31).view(1, 1, 4, 8)
    output = torch.tensor([0.2, -2.5], **DOUBLE).view(1, 2, 1, 1).expand(1, 2, 4, 8)
    masses = torch.exp(-likelihood.errors(output, x)).flatten().numpy()
    np.testing.assert_allclose(masses, logistic_masses(0.2, -2.5, 32), rtol=1e-9)
    assert masses.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dist", ["logistic", "dmol"])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_mean_image_is_the_mean_of_what_is_drawn(dist, normalized):
    """Narrow components well inside the range, where neither clamping nor rounding moves the mean."""
    k = 2
    likelihood = make_likelihood(dist, 3, normalized=normalized, components=k)
    if dist == "logistic":
        output = torch.cat([torch.tensor([-0.5, 0.0, 0.4]), torch.full((3,), -5.0)]).view(1, 6, 1, 1)
        expected = torch.tensor([-0.5, 0.0, 0.4])
    else:
        logits, red, green, blue = torch.tensor([0.3, -0.4]), [0.2, -0.3], [0.1, 0.0], [-0.2, 0.3]
        c = torch.tensor([[0.5, -0.5], [0.3, 0.1], [-0.2, 0.4]])
        means = torch.tensor([red, green, blue])
        output = torch.cat([logits, means.flatten(), torch.full((3 * k,), -5.0), c.flatten()]).view(
            1, 10 * k, 1, 1
        )
        w, t = torch.softmax(logits, 0), torch.tanh(c)
        g = means[1] + t[0] * means[0]
        expected = (torch.stack([means[0], g, means[2] + t[1] * means[0] + t[2] * g]) * w).sum(1)
    expected = expected if normalized else (expected + 1) / 2
    torch.testing.assert_close(likelihood.mean(output).flatten(), expected)
    assert likelihood.mean(output * 100).abs().max() <= 1  # in the data's range whatever comes


def test_the_optimal_variance_is_the_closed_form_with_its_gradient():
    """n/2 (log(2 pi v) + 1) at v = an image's mean squared error, against autograd through v and a Gaussian."""
    likelihood = make_likelihood("gaussian_optimal", 3, "none")
    x = torch.rand(4, 3, 5, 5, **DOUBLE)
    output = torch.rand(4, 3, 5, 5, **DOUBLE, requires_grad=True)
    found = likelihood.errors(output, x).flatten()
    v = (output - x).square().mean((1, 2, 3))
    closed = 75 / 2 * (torch.log(2 * math.pi * v) + 1)
    torch.testing.assert_close(found, closed)
    (ours,) = torch.autograd.grad(found.sum(), output)
    (theirs,) = torch.autograd.grad(closed.sum(), output)
    torch.testing.assert_close(ours, theirs)
    gaussian = torch.distributions.Normal(output, v.sqrt().view(-1, 1, 1, 1))
    torch.testing.assert_close(found, -gaussian.log_prob(x).sum((1, 2, 3)))
    for factor in (0.9, 1.1):  # no other variance is better
        other = torch.distributions.Normal(output, (factor * v).sqrt().view(-1, 1, 1, 1))
        assert (-other.log_prob(x).sum((1, 2, 3)) > found).all()


def test_a_perfect_image_has_a_variance_left():
    likelihood = make_likelihood("gaussian_optimal", 1, "none")
    x = torch.rand(2, 1, 4, 4)
    output = x.clone().requires_grad_()
    loss = likelihood.errors(output, x).sum()
    assert loss.item() == pytest.approx(2 * 8 * math.log(2 * math.pi / 12 / 255**2), rel=1e-5)
    assert torch.autograd.grad(loss, output)[0].abs().max() == 0


def test_terms_per_image_add_up_over_parts():
    """What accumulation and several processes count on."""
    x = torch.rand(6, 3, 4, 4)
    for dist in DISTS:
        likelihood = make_likelihood(dist, 3, "sigmoid", components=2)
        output = torch.randn(6, likelihood.channels, 4, 4)
        for reduction in ("mean", "sum"):
            whole = reconstruction(output, x, likelihood, reduction)
            halves = [reconstruction(output[s], x[s], likelihood, reduction) for s in (slice(3), slice(3, 6))]
            torch.testing.assert_close(whole, torch.stack(halves).mean())


@pytest.mark.parametrize("dist", DISTS)
def test_distributions_are_computed_in_float32(dist):
    likelihood = make_likelihood(dist, 3, "sigmoid", components=2)
    output, x = torch.randn(2, likelihood.channels, 4, 4).bfloat16(), torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = likelihood.errors(output, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, likelihood.errors(output.float(), x))


def test_which_are_proper():
    def is_proper(dist, **options):
        return make_likelihood(dist, 3, **options).proper

    assert [is_proper(dist) for dist in DISTS] == [False, False, False, False, True, True]
    assert [is_proper(dist, binarized=True) for dist in ("bernoulli", "gaussian")] == [True, False]


SMALL = {
    "hidden_dims": [8, 8],
    "latent_dim": 4,
    "num_embeddings": 8,
    "embedding_dim": 4,
    "dim": 4,
    "max_filters": 8,
    "hidden_dim": 4,
    "fc_dim": 8,
    "num_ladders": 2,
}


def small_model(arch, dist, shape=None):
    size = SIDES.get(arch, 16)
    shape = shape or (3, size, size)
    likelihood = make_likelihood(dist, 3, "sigmoid", components=2)
    options = {k: v for k, v in SMALL.items() if k in model_options(arch)}
    return build_model(arch, shape, "sigmoid", options, likelihood), shape


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("dist", DISTS)
def test_every_model_takes_a_step_with_every_likelihood(arch, dist):
    torch.manual_seed(0)
    model, shape = small_model(arch, dist)
    weights = [1.0] * len(model.objectives)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = TrainStep(model, LossVector(model, weights, dist, "mean", n_data=8), None, optimizer)
    before = step.flat.data.clone()
    x = torch.randint(0, 256, (4, *shape)) / 255
    record = step(x, 0, model.draw_noise(4))
    assert record.losses.isfinite().all()
    assert (step.flat.data != before).any()
    model.eval()
    assert model.reconstruct(x).shape == x.shape == model.sample(4).shape
    assert model(x).preactivation.shape == (4, model.head_channels, *shape[1:])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(twin.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("dist", [pytest.param("dmol", marks=pytest.mark.slow), "gaussian_optimal"])
def test_a_compiled_step_is_the_eager_one_in_one_graph(dist):
    before = graph_counters()
    records = []
    for mode in ("off", "default"):
        torch.manual_seed(0)
        model, shape = small_model("vae", dist)
        step = TrainStep(model, LossVector(model, [1.0, 1.0], dist, "sum", n_data=8), None, compile_mode=mode)
        x = torch.randint(0, 256, (4, *shape), generator=torch.Generator().manual_seed(0)) / 255
        torch.manual_seed(1)
        record = step.gradient(x, 0, model.draw_noise(4))
        records.append((record.losses, step.flat.grad.clone()))
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-3)
    after = graph_counters()
    assert after["graphs"] - before["graphs"] == 1
    assert after["graph_breaks"] == before["graph_breaks"]


def test_a_head_of_another_likelihood_is_refused():
    model, _ = small_model("vae", "gaussian")
    assert model.likelihood_as("bernoulli").channels == 3
    with pytest.raises(ValueError, match="dmol takes 100 output channels; this model has 3, of gaussian"):
        LossVector(model, [1.0, 1.0], "dmol", "mean", n_data=8)


def test_a_model_without_a_choice_of_likelihood_keeps_its_image_layer(monkeypatch):
    class Plain(MODELS["vae"]):
        def __init__(self, image_shape, activation="tanh", latent_dim=4):
            super().__init__(image_shape, activation, latent_dim, [8])

    monkeypatch.setitem(MODELS, "plain", Plain)
    laplacian = make_likelihood("laplacian", 3, "tanh")
    assert build_model("plain", (3, 16, 16), "tanh", {}, laplacian).likelihood is laplacian
    with pytest.raises(ValueError, match="--recons_dist logistic needs 6 output channels, and plain has 3"):
        build_model("plain", (3, 16, 16), "tanh", {}, make_likelihood("logistic", 3))


def test_an_untrained_bound_is_bits_of_a_proper_likelihood():
    """ELBO below the importance-weighted bound, and bits from nats, with logistics in grey."""
    torch.manual_seed(1)
    likelihood = make_likelihood("logistic", 1, bits=5)
    model = build_model("vae", (1, 8, 8), "none", {"latent_dim": 2, "hidden_dims": [4]}, likelihood).eval()
    x = torch.randint(0, 32, (6, 1, 8, 8)) / 31
    figures, _ = bounds.elbo(model, [(x.repeat(50, 1, 1, 1), None)], "logistic", seed=0)
    assert figures["nats"] == pytest.approx(-figures["elbo"])
    assert figures["bits_per_dim"] == pytest.approx(figures["nats"] / 64 / math.log(2))
    assert 3 < figures["bits_per_dim"] < 8  # uniform is 5
    assert bounds.importance_weighted_bound(model, [(x, None)], "logistic", 50, seed=0) > figures["elbo"]


RUN = (
    "--arch vae --image_size 16 --limit_train 32 --limit_test 16 --batch_size 8 --steps 4 --device cpu "
    "--seed 1 --log_every 2 --latent_dim 4 --hidden_dims 8 8"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 48 colourful images."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for n in range(48):
        small = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((16, 16)).save(folder / f"{n}.png")
    return folder


@pytest.mark.parametrize(
    ("flags", "proper"),
    [
        ("folder --recons_dist dmol --recons_components 2", True),
        ("folder --recons_dist dmol --bits 5 --normalize --recons_reduction sum", True),
        ("folder --recons_dist logistic --precision bf16", True),
        ("digits --recons_dist logistic --multirate", True),
        ("digits --recons_dist bernoulli --binarize static", True),
        ("digits --recons_dist bernoulli", False),
        ("digits --recons_dist gaussian_optimal", False),
    ],
)
def test_runs_report_nats_and_bits_of_proper_likelihoods_alone(tmp_path, pictures, capsys, flags, proper):
    folder = tmp_path / "run"
    words = ["--dataset", *flags.split(), "--data_dir", str(pictures), "--exp_dir", str(folder)]
    assert main(["train", *RUN.split(), *words]) == 0
    assert ("bits per dim" in capsys.readouterr().out) is proper
    last = [line for line in read_lines(folder / "metrics.jsonl") if "test/loss" in line][-1]
    assert ("test/nats" in last) is ("test/bits_per_dim" in last) is proper
    if proper:
        values = 256 * (3 if flags.startswith("folder") else 1)
        assert last["test/bits_per_dim"] == pytest.approx(last["test/nats"] / values / math.log(2))
    assert 0 <= last["test/mse"] < 1
    assert main(["evaluate", str(folder), "--device", "cpu", "--metrics", "objectives,elbo,images"]) == 0
    text = next((folder / "evaluation").glob("metrics*.json")).read_text()
    assert ('"bits_per_dim"' in text) is proper


def test_images_of_five_bits_have_32_levels(pictures):
    """Of a value v of 0 to 255, floor(v / 8) / 31; whatever the loader."""

    def images(**data):
        return next(make_loader(config(pictures, **data), torch.device("cpu"), "test").epoch())[0]

    eight, five = images(), images(bits=5)
    torch.testing.assert_close(five, torch.floor(255 * eight / 8 + 1e-3) / 31)
    n = len(eight)
    fused, _ = batch_of((eight * 255).round().byte(), torch.zeros(n), torch.arange(n), None, False, 5)
    torch.testing.assert_close(fused, five)
    torch.testing.assert_close(images(bits=5, normalize=True), 2 * five - 1)


def config(pictures, **data):
    flags = {"dataset": "folder", "image_size": 16, "data_dir": str(pictures), "limit_test": 16, "arch": "vae"}
    return TrainConfig.from_flat(flags | data)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataset fashion_mnist --recons_dist dmol", "fashion_mnist is grey: use --recons_dist logistic"),
        ("--dataset cifar10 --recons_dist dmol --binarize static", "of binarized ones use bernoulli"),
        (
            "--dataset fashion_mnist --recons_dist logistic --binarize dynamic",
            "of binarized ones use bernoulli",
        ),
        ("--dataset cifar10 --recons_dist dmol --recons_activation tanh", "are parameters, not pixels"),
        (
            "--dataset cifar10 --recons_dist dmol --recons_reduction scaled_sum",
            "scaled_sum is for gaussian only",
        ),
        ("--dataset cifar10 --recons_dist logistic --recons_components 5", "setting of --recons_dist dmol"),
        ("--dataset fashion_mnist --binarize static --bits 5", "binarized pixels have one bit"),
        ("--dataset cifar10 --bits 9", "--bits 9 must be at least 2 and at most 8"),
        (
            "--dataset cifar10 --recons_dist dmol --recons_components 0",
            "--recons_components 0 must be at least 1",
        ),
    ],
)
def test_bad_likelihoods_are_said_before_data_is_read(tmp_path, capsys, flags, said):
    words = [*flags.split(), "--data_dir", str(tmp_path / "nothing"), "--download", "false"]
    assert main(["train", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert len(error) < 600


def test_no_weighted_bound_of_a_fitted_variance(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = "--dataset digits --recons_dist gaussian_optimal"
    assert main(["train", *flags.split(), *RUN.split(), "--exp_dir", str(folder)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--device", "cpu", "--iw", "5"]) == 2
    assert "--iw weights draws by their likelihood" in capsys.readouterr().err
