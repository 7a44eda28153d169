"""Multi-rate models: gates against formulas, betas against single passes, the step's variants, bad input."""

import copy
import itertools
import math
import pickle
import signal

import pytest
import torch
from torch import nn

from movae_fast.aggregation.registry import make_aggregator
from movae_fast.models import Gated, Rates, build_model, gated_layers, make_multirate
from movae_fast.models.multirate import LAYERS, GatedVariance, from_product, gate
from movae_fast.objectives import LossVector
from movae_fast.training import gradients
from movae_fast.training.build import load_model
from movae_fast.training.compiled import graph_counters
from movae_fast.training.logs import read_lines
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import TrainStep
from tests.test_training import StopAfter, metrics_of, same_weights

KINDS = ("sigmoid", "sqrt")
SHAPE = (1, 16, 16)
SMALL = {
    "vae": {"hidden_dims": [8, 8], "latent_dim": 4},
    "betatc_vae": {"hidden_dims": [8, 8], "latent_dim": 4},
    "cnn_vae": {"dim": 8, "latent_dim": 4},
    "torch_vae": {"max_filters": 8, "latent_dim": 4},
    "dcgan_vae": {"max_filters": 8, "latent_dim": 4},
    "provlae": {"latent_dim": 2, "num_ladders": 2, "hidden_dim": 4, "fc_dim": 8},
    "vlae": {"latent_dim": 2, "num_ladders": 1, "hidden_dim": 4, "fc_dim": 8},
    "linear_vae": {"latent_dim": 4},
    "mlp_vae": {"latent_dim": 4, "hidden_dims": [16, 8]},
}
# A weightless 28x28 network of the large ones suffices where only its layers matter.
SIZED = {"resnet_vae_28": {}, "cnn_vae_28": {}}


def multirate(arch, dtype=torch.float32, options=None, shape=SHAPE, **gates):
    torch.manual_seed(0)
    return make_multirate(build_model(arch, shape, "sigmoid", options or SMALL[arch]).to(dtype), **gates)


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


# Gates.

# Where the kink is, where 1 - e^x rounds to 0, the smallest floats, and far out on both sides.
POINTS = [
    0.0,
    -1e-45,
    1e-45,
    -1e-38,
    1e-38,
    -1e-20,
    -1e-9,
    1e-9,
    -1e-7,
    -1e-3,
    -0.5,
    -1,
    -17,
    -104,
    -1e4,
    1,
    104,
    1e4,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_their_slopes_are_exact_and_finite_everywhere(kind, dtype):
    x = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    value = gate(x, kind)
    (slope,) = torch.autograd.grad(value.sum(), x)
    same = from_product(value.detach(), x.detach(), value.detach(), kind)  # of dL/dg = 1
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for point, *found in zip(x.tolist(), value.tolist(), slope.tolist(), same.tolist(), strict=True):
        assert all(math.isfinite(v) for v in found)
        if kind == "sigmoid":
            true = math.exp(-abs(point)) / (1 + math.exp(-abs(point)))
            expected = true if point < 0 else 1 - true, true * (1 - true)
        elif point >= 0:
            assert found == [0.0, 0.0, 0.0]  # a closed gate passes nothing, in either direction
            continue
        else:
            root = math.sqrt(-math.expm1(point))
            expected = root, -math.exp(point) / (2 * root)
        # A handful of roundings; numbers below the least normal one have few digits, and autograd forms the
        # slope from 1 - g or 1 - g^2, that is to eps of 1.
        assert found[0] == pytest.approx(expected[0], rel=8 * eps, abs=8 * tiny), point
        assert found[1] == pytest.approx(expected[1], rel=8 * eps, abs=2 * eps), point
        assert found[2] == pytest.approx(expected[1], rel=8 * eps, abs=8 * tiny), point


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas", [1, 5])
@pytest.mark.parametrize("trailing", [(), (3, 2)])
def test_the_backward_that_keeps_only_the_product_is_autograds(kind, betas, trailing):
    rates = Rates(0.01, 10)
    layer = Gated(nn.Identity(), 7, rates, kind).double()
    rates.log_beta = torch.linspace(-4, 2, betas, dtype=torch.float64)
    y = torch.randn(5, 7, *trailing, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(y)
    inputs = [y, layer.gate_weight, layer.gate_bias]
    found = torch.autograd.grad(layer(y), inputs, upstream)
    g = layer.gate_values(rates.log_beta)
    if kind == "sqrt":
        assert (g == 0).any()
        assert (g > 0).any()
    expected = torch.autograd.grad(y * g.view(*g.shape, *(1 for _ in trailing)), inputs, upstream)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-14


@pytest.mark.parametrize(
    ("layer", "x", "units"),
    [
        (nn.Linear(3, 5), torch.randn(4, 3), 5),
        (nn.Conv2d(3, 5, 3), torch.randn(4, 3, 8, 8), 5),
        (nn.ConvTranspose2d(3, 5, 3), torch.randn(4, 3, 8, 8), 5),
        (nn.BatchNorm2d(3), torch.randn(4, 3, 8, 8), 3),
    ],
)
def test_a_gated_layer_is_the_layer_times_its_gate(layer, x, units):
    rates = Rates(0.01, 10)
    gated = Gated(layer, units, rates, "sigmoid")
    rates.log_beta = torch.tensor([0.01, 0.1, 1, 10]).log()
    out, plain = gated(x), layer(x)
    n = torch.tensor([-1, -1 / 3, 1 / 3, 1]) * 3**0.5  # log-equidistant from end to end
    for i in range(4):
        for c in range(units):
            g = torch.sigmoid(gated.gate_weight[c] * n[i] + gated.gate_bias[c])
            torch.testing.assert_close(out[i, c], plain[i, c] * g)


def test_standardised_log_betas_and_their_draws():
    rates = Rates(0.02, 5)
    drawn = torch.empty(20_000, 3)[:, 1]  # strided, as the column that a draw of noise fills is
    rates.draw(drawn)
    assert math.log(0.02) <= drawn.min() < math.log(0.021)
    assert math.log(4.9) < drawn.max() <= math.log(5)
    n = rates.standardise(drawn.double())
    assert abs(float(n.mean())) < 4 / 20_000**0.5  # four standard errors
    assert abs(float(n.var()) - 1) < 4 * (0.8 / 20_000) ** 0.5  # a uniform's kurtosis is 1.8
    batch = Rates(0.02, 5, "batch")
    batch.draw(drawn)
    assert drawn.unique().numel() == 1


def test_how_many_gates_start_closed():
    """P(c >= sqrt(3) |w|) for w, c ~ U(-1, 1) is 1 / (4 sqrt 3) = 14.4 %; a negative bias opens them."""
    rates, ends = Rates(0.01, 10), torch.tensor([0.01, 10]).log()
    units = 40_000
    always_closed = (Gated(nn.Identity(), units, rates, "sqrt").gate_values(ends) == 0).all(0)
    p = 1 / (4 * 3**0.5)
    assert abs(float(always_closed.float().mean()) - p) < 4 * (p * (1 - p) / units) ** 0.5
    opened = Gated(nn.Identity(), units, rates, "sqrt", gate_bias=-3.0).gate_values(ends)
    assert (opened > 0).all()
    torch.manual_seed(0)
    a = Gated(nn.Identity(), 9, rates, "sigmoid", gate_bias=-3.0)
    torch.manual_seed(0)
    assert torch.equal(a.gate_bias, Gated(nn.Identity(), 9, rates, "sigmoid").gate_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slope_closes_gates_as_beta_grows_and_widens_the_posterior(kind):
    rates, ends = Rates(0.01, 10), torch.tensor([0.01, 1, 10]).log()
    for form, sign in ((Gated, -1), (GatedVariance, 1)):
        # A shift by 1 turns every slope of U(-1, 1) in one direction; the least values may have met 0 or 1.
        layer = form(nn.Identity(), 500, rates, kind, gate_bias=-3.0, gate_slope=1.0)
        assert (sign * layer.gate_values(ends).diff(dim=0) >= 0).all()


# Models.

PUBLISHED = {  # plain, multi-rate (Bae et al.'s own code, counted)
    "cnn_vae_28": (1, 17_526_977, 17_565_249),
    "cnn_vae_32": (3, 40_462_723, 40_600_195),
    "cnn_vae_64": (3, 34_594_563, 34_731_523),
    "resnet_vae_28": (1, 1_881_217, 1_888_513),
    "resnet_vae_32": (3, 7_896_963, 7_915_843),
    "resnet_vae_64": (3, 2_770_819, 2_778_755),
}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameter_counts_are_the_published_networks(arch):
    channels, plain, multi = PUBLISHED[arch]
    size = int(arch[-2:])
    with torch.device("meta"):
        model = build_model(arch, (channels, size, size), "sigmoid", {})
        assert count(model) == plain
        if arch == "resnet_vae_32":
            # The published multi-rate network alone ends in a 3x3 kernel; ours keeps the plain network's 4x4.
            model.decoder[-1] = nn.ConvTranspose2d(64, 3, 3, 2, 1, 1)
        assert count(make_multirate(model)) == multi
        if arch == "resnet_vae_28":
            assert count(build_model(arch, (1, 28, 28), "sigmoid", {"residual_block": "pythae"})) == 865_025


@pytest.mark.parametrize("arch", [*SMALL, *SIZED])
@pytest.mark.parametrize("position", ["pre_bn", "post_bn"])
def test_every_layer_but_the_image_s_is_gated(arch, position):
    if arch in SMALL:
        model = build_model(arch, SHAPE, "sigmoid", SMALL[arch])
    else:
        with torch.device("meta"):
            model = build_model(arch, (1, 28, 28), "sigmoid", SIZED[arch])
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if position == "post_bn" and not norms:
        with pytest.raises(ValueError, match="no BatchNorm; use pre_bn"):
            make_multirate(model, gate_position=position)
        return
    make_multirate(model, gate_encoder="sigmoid", gate_decoder="sqrt", gate_position=position)
    gated = gated_layers(model)
    assert len(gated) == len(layers) - 1
    inside = [g.layer for g in gated.values()]
    if position == "pre_bn":
        assert {id(m) for m in inside} == {id(m) for m in layers[:-1]}
    else:
        assert {id(m) for m in inside if m in norms} == {id(m) for m in norms}
    decoder = {id(p) for p in model.task_parameters()["reconstruction"]}
    for g in gated.values():
        assert g.kind == ("sqrt" if id(g.gate_weight) in decoder else "sigmoid")
        assert g.rates is model.rates
    assert not any("rates" in name or "beta" in name for name in model.state_dict())


@pytest.mark.parametrize("arch", [a for a in SMALL if a not in ("vlae", "torch_vae")])
def test_a_beta_an_example_is_a_pass_for_each_beta(arch):
    model = multirate(arch, torch.float64).eval()
    x = torch.rand(5, *SHAPE, dtype=torch.float64)
    noise = model.draw_noise(5)
    betas = torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
    model.set_beta(betas)
    together = model(x, noise), model.reconstruct(x), model.decode(noise.latent)
    outputs = []
    for i, beta in enumerate(betas.tolist()):
        model.set_beta(beta)
        out = model(x[i : i + 1], noise.of_images(i, i + 1))
        alone = out, model.reconstruct(x[i : i + 1]), model.decode(noise.latent[i : i + 1])
        for name in ("preactivation", "mu", "logvar", "z", "beta"):
            torch.testing.assert_close(getattr(together[0], name)[i], getattr(out, name)[0])
        torch.testing.assert_close(together[1][i], alone[1][0])
        torch.testing.assert_close(together[2][i], alone[2][0])
        outputs.append(model.reconstruct(x[:1]))
    # The betas do make a difference, if a small one through BatchNorms that have seen no data.
    assert all(relative(a, b) > 1e-12 for a, b in itertools.pairwise(outputs))


def test_evaluation_ignores_drawn_betas_and_starts_at_beta_one():
    model = multirate("vae").eval()
    x, noise = torch.rand(3, *SHAPE), model.draw_noise(3)
    out = model(x, noise)
    assert out.beta.tolist() == [1.0]
    noise = noise._replace(log_beta=torch.full((3,), 99.0))
    assert torch.equal(model(x, noise).preactivation, out.preactivation)
    assert multirate("vae", beta_max=0.5).eval()(x).beta.item() == pytest.approx(0.5)
    model.set_beta(4.0)
    assert float(model(x, noise).beta) == pytest.approx(4.0)
    assert not torch.equal(model(x, noise).preactivation, out.preactivation)
    noise = noise._replace(log_beta=torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(model.train()(x, noise).beta, noise.log_beta.exp())
    double = model.eval().double()
    assert double(x.double()).beta.dtype == torch.float64
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive and finite"):
            model.set_beta(beta)
    with pytest.raises(ValueError, match="for one beta; train it with --multirate"):
        build_model("vae", SHAPE, "sigmoid", SMALL["vae"]).set_beta(1.0)


def test_copies_share_rates_among_their_own_gates_only():
    model = multirate("mlp_vae")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.rates is not model.rates
        assert all(g.rates is twin.rates for g in gated_layers(twin).values())


# Objectives.


def test_the_second_objective_is_beta_times_the_rate():
    x = torch.rand(6, *SHAPE)
    for arch in ("vae", "provlae"):
        model = multirate(arch)
        out = model(x)
        normal = torch.distributions.Normal
        prior = normal(torch.zeros_like(out.mu), 1.0)
        kl = torch.distributions.kl_divergence(normal(out.mu, (out.logvar / 2).exp()), prior)
        rungs = 2 if arch == "provlae" else 1
        losses = LossVector(model, [1.0] * (1 + rungs), "gaussian", "sum", 100)(out, x)
        for k in range(rungs):
            part = kl.chunk(rungs, 1)[k].sum(1)
            torch.testing.assert_close(
                losses[1 + k], sum(b * r for b, r in zip(out.beta, part, strict=True)) / 6
            )
        torch.testing.assert_close(losses[0], (out.preactivation.sigmoid() - x).square().sum() / 6)


def test_beta_weights_total_correlation_alone():
    model = multirate("betatc_vae", beta_per="batch")
    x = torch.rand(6, *SHAPE)
    out = model(x)
    assert out.beta.unique().numel() == 1
    losses = LossVector(model, [1.0] * 4, "gaussian", "sum", 100)
    found, plain = losses(out, x), losses(out._replace(beta=None), x)
    torch.testing.assert_close(found[2], out.beta[0] * plain[2])
    assert all(torch.equal(found[i], plain[i]) for i in (0, 1, 3))


# The linear VAE, whose optimum is known (Bae et al., section 3.2; distortion the summed squared error).


def linear_data(k):
    """Images [400, 3, 2, 2], their mean, and the k largest eigenpairs of their covariance, all float64."""
    torch.manual_seed(3)
    x = (torch.randn(400, 12) @ torch.randn(12, 12) * torch.logspace(0.3, -1.5, 12) + torch.rand(12)).double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return x.view(-1, 3, 2, 2), mean, values.flip(0), vectors.flip(1)[:, :k]


def linear_model(k, **gates):
    model = build_model("linear_vae", (3, 2, 2), "none", {"latent_dim": k}).double()
    model = make_multirate(model, 0.01, 10, **gates).eval()
    for p in model.parameters():
        p.data.zero_()
    for g in gated_layers(model).values():
        g.gate_bias.data.fill_(-40.0 if g.kind == "sqrt" else 40.0)  # open: 1 to the last bit
        if isinstance(g.layer, nn.Linear) and g.layer.in_features == k:
            g.layer.weight.data.copy_(torch.eye(k))
    return model


def respond(gated, slope, offset):
    """Make a gate's argument slope * log beta + offset [C]."""
    rates = gated.rates
    half, centre = (rates.high - rates.low) / 2, (rates.high + rates.low) / 2
    gated.gate_weight.data.fill_(slope * half / 3**0.5)
    gated.gate_bias.data.copy_(offset + slope * centre)


@torch.no_grad()
def exact_objectives(model, x):
    """Distortion and rate with the expectation over z done exactly: D gains tr(W^T W C)."""
    mu, logvar = model.encode(x)
    flat = model.decode(torch.eye(model.latent_dim).double()) - model.decode(
        torch.zeros(1, model.latent_dim).double()
    )
    spread = (logvar.exp() * flat.flatten(1).square().sum(1)).sum(1)
    distortion = (model.decode(mu) - x).flatten(1).square().sum(1) + spread
    rate = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    return float(distortion.mean()), float(rate.mean())


BETAS = [0.01, 0.05, 0.3, 1.0, 4.0, 10.0]


def test_sqrt_gates_hold_the_linear_vaes_optimum_at_every_beta():
    k = 5
    x, mean, values, vectors = linear_data(k)
    top = values[:k]
    model = linear_model(k, gate_encoder="sqrt", gate_decoder="sqrt")
    encoder, decoder = model.encoder[1], model.decoder[0]
    encoder.layer.weight.data.copy_((vectors / top.sqrt()).T)
    encoder.layer.bias.data.copy_(-encoder.layer.weight.data @ mean)
    model.decoder[1].weight.data.copy_(vectors * top.sqrt())
    model.decoder[1].bias.data.copy_(mean)
    for g in (encoder, decoder, model.logvar):
        respond(g, 1.0, -(2 * top).log())
    seen = set()
    for beta in BETAS:
        model.set_beta(beta)
        active = top > beta / 2  # the water level where distortion is the whole squared error
        seen.add(int(active.sum()))
        best_rate = 0.5 * float((2 * top[active] / beta).log().sum())
        best_distortion = beta / 2 * int(active.sum()) + float(values.sum() - top[active].sum())
        distortion, rate = exact_objectives(model, x)
        assert distortion == pytest.approx(best_distortion, rel=1e-12)
        assert rate == pytest.approx(best_rate, rel=1e-12)
    assert len(seen) > 2  # betas with several numbers of active latents


def test_sigmoid_gates_hold_the_optimal_encoder_of_a_fixed_decoder():
    k = 5
    x, mean, _, _ = linear_data(k)
    w = torch.randn(12, k, dtype=torch.float64)
    left, s, right = torch.linalg.svd(w, full_matrices=False)
    model = linear_model(k, gate_encoder="sigmoid")
    encoder = model.encoder[1]
    encoder.layer.weight.data.copy_(left.T)
    encoder.layer.bias.data.copy_(-left.T @ mean)
    respond(encoder, -1.0, 2 * s.log() + math.log(2))
    model.mu.layer.weight.data.copy_(right.T / s)
    respond(model.logvar, 1.0, -w.square().sum(0).log() - math.log(2))
    for beta in BETAS:
        model.set_beta(beta)
        mu, logvar = model.encode(x)
        gram = w.T @ w + beta / 2 * torch.eye(k, dtype=torch.float64)
        expected = (x.flatten(1) - mean) @ torch.linalg.solve(gram, w.T).T
        torch.testing.assert_close(mu, expected, rtol=1e-11, atol=1e-11)
        variance = beta / 2 / (w.square().sum(0) + beta / 2)
        torch.testing.assert_close(logvar[0].exp(), variance, rtol=1e-12, atol=0)


# The step.


def step(model, agg="sum", weights=None, **options):
    weights = weights or [1.0] * len(model.objectives)
    losses = LossVector(model, weights, "gaussian", "sum", n_data=1000)
    aggregator = None if agg == "sum" else make_aggregator(agg, len(losses.active))
    return TrainStep(model, losses, aggregator, **options)


def gradient(s, x, noise):
    record = s.gradient(x, 0, noise)
    return s.flat.grad.clone(), record


@pytest.mark.parametrize("agg", ["sum", "upgrad"])
def test_a_step_is_the_mean_over_examples_each_with_its_beta(agg):
    options = {"hidden_dims": [8, 8], "latent_dim": 4, "layer_norm": "none"}
    model = multirate("vae", torch.float64, options)
    x, noise = torch.rand(6, *SHAPE, dtype=torch.float64), model.draw_noise(6)
    taken = step(copy.deepcopy(model), agg)
    found, record = gradient(taken, x, noise)
    rows = []
    parameters = [*model.shared_parameters(), *model.task_parameters()["reconstruction"]]
    for k in range(2):
        total = [torch.zeros_like(p) for p in parameters]
        for i in range(6):
            model.eval().set_beta(float(noise.log_beta[i].exp()))
            out = model(x[i : i + 1], noise.of_images(i, i + 1))
            kl = 0.5 * (out.mu.square() + out.logvar.exp() - 1 - out.logvar).sum()
            value = (
                (out.preactivation.sigmoid() - x[i]).square().sum() if k == 0 else noise.log_beta[i].exp() * kl
            )
            grads = torch.autograd.grad(value / 6, parameters, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
        row = torch.zeros_like(taken.flat.data)  # laid out as the step's own, with its gaps
        task = [*taken.flat.shared, *taken.flat.task]
        for t, p in zip(total, task, strict=True):
            taken.flat.view(row, p).copy_(t)
        rows.append(row)
    if agg == "sum":
        assert relative(found, rows[0] + rows[1]) < 1e-12
    else:
        n = taken.flat.n_shared
        expected = sum(w * row[:n] for w, row in zip(record.weights.double(), rows, strict=True))
        assert relative(taken.rows.rows, torch.stack([row[:n] for row in rows])) < 1e-12
        assert relative(found[:n], expected) < 1e-6  # the recorded weights are float32
        assert relative(found[n:], (rows[0] + rows[1])[n:]) < 1e-12


def test_parts_of_a_batch_have_their_own_betas():
    options = {"hidden_dims": [8, 8], "latent_dim": 4, "layer_norm": "none"}
    model = multirate("vae", torch.float64, options)
    x, noise = torch.rand(8, *SHAPE, dtype=torch.float64), model.draw_noise(8)
    for agg in ("sum", "upgrad"):
        whole, _ = gradient(step(copy.deepcopy(model), agg), x, noise)
        parts, _ = gradient(step(copy.deepcopy(model), agg, accumulate=4), x, noise)
        assert relative(parts, whole) < 1e-12
    part = step(copy.deepcopy(model), "upgrad", gramian_batch=0.5)
    assert torch.cosine_similarity(gradient(part, x, noise)[0], whole, dim=0) > 0.9


def test_bfloat16_networks_have_float32_gates_and_near_gradients():
    model = multirate("vae")
    x, noise = torch.rand(64, *SHAPE), model.draw_noise(64)
    full, record = gradient(step(copy.deepcopy(model)), x, noise)
    half, rounded = gradient(step(model, precision=Precision("bf16", torch.device("cpu"))), x, noise)
    assert rounded.losses.dtype == torch.float32
    assert 1e-4 < relative(half, full) < 0.2  # as without gates: a few percent after some layers
    assert relative(rounded.losses, record.losses) < 0.05


def compiles_once(arch, agg, backend):
    model = multirate(arch)
    eager, compiled = step(copy.deepcopy(model), agg), step(model, agg, compile_mode="default")
    regions = {compiled.by_sum: gradients.of_sum, compiled.by_rows: gradients.exact_rows}
    for region, function in regions.items() if backend != "inductor" else ():
        region.call = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    before = graph_counters()
    x = torch.rand(8, *SHAPE)
    for k in range(3):
        torch.manual_seed(k)
        noise = model.draw_noise(8)
        a, b = gradient(eager, x, noise)[0], gradient(compiled, x, noise)[0]
        assert relative(b, a) < 1e-4  # another order of float32's sums
        model.eval().set_beta(0.1 * (k + 1))  # evaluation in between leaves the graph alone
        model(x)
        model.train()
    after = graph_counters()
    assert after["graphs"] - before["graphs"] == 1
    assert after["graph_breaks"] == before["graph_breaks"]


@pytest.mark.parametrize(("arch", "agg"), [("vae", "upgrad"), ("betatc_vae", "sum")])
def test_the_step_is_traced_as_one_graph_for_all_betas(arch, agg):
    compiles_once(arch, agg, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vae", "provlae", "linear_vae"])
def test_the_step_compiles_once_and_gives_the_same_gradient(arch):
    compiles_once(arch, "sum", "inductor")


# Whole runs.

FLAGS = "--multirate --hidden_dims null --arch"


@pytest.mark.parametrize(
    "flags",
    [
        "--arch vae --agg upgrad --kl_annealing cyclic --epochs 2 --scheduler cosine --scheduler_per epoch",
        "--arch vae --gate_position post_bn --beta_per batch --gate_encoder sqrt --gate_decoder sigmoid",
        "--arch betatc_vae --agg upgrad --beta_min 0.1",
        "--hidden_dims 16 8 --arch betatc_mlp_vae",
        "--hidden_dims null --arch provlae --num_ladders 2 --hidden_dim 4 --fc_dim 8 --image_size 32",
        "--hidden_dims null --arch linear_vae --posterior_cov predicted --recons_activation none",
        "--hidden_dims 16 8 --arch mlp_vae --recons_dist bernoulli --gate_bias -2 --gate_slope 1",
        "--hidden_dims null --arch resnet_vae_28 --image_size 28 --limit_train 100 --limit_test 20 "
        "--residual_block pythae --kl_annealing monotonic --warmup_epochs 1",
    ],
)
def test_multi_rate_runs_train_and_load(train, flags):
    folder = train("--multirate", flags)
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert math.isfinite(last["test/loss"])
    config, model = load_model(folder, torch.device("cpu"))
    assert config.multirate.multirate
    assert config.reduction == "sum"
    x = torch.rand(2, *config.image_shape)
    first = model.reconstruct(x)
    model.set_beta(5.0)
    assert not torch.equal(model.reconstruct(x), first)


@pytest.mark.parametrize("flags", ["--agg upgrad --gramian_every 2", "--accumulate 2 --kl_annealing monotonic"])
def test_multi_rate_runs_resume_bit_for_bit(train, monkeypatch, flags):
    through = train("--multirate", flags, "--epochs 3")
    with monkeypatch.context() as patch:
        StopAfter(patch, steps=5)
        part = train("--multirate", flags, "--epochs 3", status=128 + signal.SIGTERM)
    train(f"--resume {part}")
    assert metrics_of(part)[-1] == metrics_of(through)[-1]
    assert same_weights(through, part)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--multirate --beta_min 0", "--beta_min 0 and --beta_max 10 must satisfy 0 < beta_min < beta_max"),
        ("--multirate --beta_min 3 --beta_max 2", "--beta_min 3 and --beta_max 2 must satisfy"),
        ("--multirate --beta_max .inf", "must satisfy 0 < beta_min < beta_max"),
        ("--multirate --beta 2", "--beta: with --multirate beta is drawn; set --beta_min and --beta_max"),
        ("--multirate --coef_kl 2", "--coef_kl: with --multirate beta is drawn"),
        ("--multirate --gate_bias .nan", "--gate_bias nan must be finite"),
        ("--multirate --gate_position post_bn --layer_norm layer", "no BatchNorm; use pre_bn"),
        ("--multirate --beta_per batch", "--beta_per batch with --gate_position pre_bn: BatchNorm divides"),
        ("--multirate --gate_encoder relu", "--gate_encoder relu: unknown; valid: sigmoid, sqrt"),
        ("--multirate --arch mmd_vae --dim 4", "--multirate does not apply to mmd_vae; it is for vae,"),
        ("--multirate --arch vq_vae", "--multirate does not apply to vq_vae"),
        ("--multirate --use_capacity_increase", "--use_capacity_increase replaces beta times the KL"),
        ("--beta_min 0.1", "--beta_min is a setting of multi-rate training: add --multirate"),
        (
            "--arch cnn_vae_28 --hidden_dims null",
            "--image_size 16 does not fit cnn_vae_28: give --image_size 28",
        ),
        ("--arch resnet_vae_64 --hidden_dims null --image_size 32", "for 32x32 there is resnet_vae_32"),
        ("--arch resnet_vae_28 --residual_block wide", "--residual_block wide"),
        ("--posterior_cov shared", "--posterior_cov does not apply to vae"),
        ("--kl_annealing linear", "valid: none, monotonic, cyclic"),
        ("--kl_annealing cyclic --arch betatc_vae", "need a KL; betatc_vae has none"),
        ("--kl_annealing cyclic --use_kl_annealing", "both anneal the KL's weight; give one"),
        ("--warmup_epochs 2 --warmup_steps 3", "--warmup_epochs and --warmup_steps both set"),
        ("--warmup_epochs -1", "--warmup_epochs -1 must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_named_at_once(train, capsys, tmp_path, flags, said):
    train(flags, status=2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run1").exists()
