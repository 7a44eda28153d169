"""The hierarchy: its layers against functions written down independently, its distributions, its rows."""

import math

import pytest
import torch
from torch.nn import functional as F

from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.evaluation.sampling import estimate_statistics
from movae_fast.models import NVAE, Noise, build_model, make_likelihood, make_multirate
from movae_fast.models.multirate import gated_layers
from movae_fast.models.nvae import branch
from movae_fast.models.nvae.branch import is_fusible
from movae_fast.models.nvae.cells import Cell, decoder_cell, encoder_cell
from movae_fast.models.nvae.convs import MaskedConv2d, NormedConv2d
from movae_fast.models.nvae.flows import ShiftFlow, flow_pairs
from movae_fast.models.nvae.group import Group
from movae_fast.models.nvae.normals import kl_between, normal_of
from movae_fast.names import ArgumentError
from movae_fast.objectives import LossVector
from movae_fast.priors.choice import Choice
from tests.nvae_models import SMALL, images, small

PAPER = [
    ({"preset": "mnist"}, (1, 28, 28), None, 33_363_134, 33_554_470),
    ({"preset": "mnist", "channels": 16}, (1, 32, 32), None, 8_853_246, 8_950_118),
    ({"preset": "omniglot"}, (1, 28, 28), None, 8_853_246, 8_950_118),
    ({"preset": "celeba64", "num_flows": 0}, (3, 64, 64), 100, 151_371_764, 151_936_828),
    ({"preset": "celeba64"}, (3, 64, 64), 100, 153_281_364, 153_882_828),
]


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("options", "shape", "outputs", "plain", "gated"), PAPER)
def test_the_published_numbers_of_parameters(options, shape, outputs, plain, gated):
    with torch.device("meta"):
        likelihood = None if outputs is None else make_likelihood("dmol", 3)
        model = NVAE(shape, "sigmoid", **options, likelihood=likelihood)
        assert model.head.weight.shape[0] == (outputs or 1)
        assert count(model) == plain
        make_multirate(model, gate_encoder="sigmoid", gate_decoder="sigmoid")
    assert count(model) == gated


def test_mnists_layers_in_numbers():
    with torch.device("meta"):
        model = NVAE((1, 28, 28), "sigmoid")
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 255
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 214
    assert model.decoder.constant.shape == (256, 4, 4)
    assert model.map_shapes == [(20, 4, 4)] * 5 + [(20, 8, 8)] * 10
    with torch.device("meta"):
        celeba = NVAE((3, 64, 64), "none", preset="celeba64")
    assert celeba.decoder.constant.shape == (512, 8, 8)
    assert celeba.groups == (5, 10, 20)


# Layers.


def normed(conv, x):
    """What a normed convolution computes, output by output."""
    rows = []
    for w, length in zip(conv.weight, conv.log_norm.flatten(), strict=True):
        w = w * getattr(conv, "mask", torch.ones_like(conv.weight))[len(rows)]
        rows.append(w * length.exp() / (w.square().sum().sqrt() + 1e-5))
    return F.conv2d(x, torch.stack(rows), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def attended(cell, x):
    a = cell.attention
    hidden = (x.mean(dim=(2, 3)) @ a.squeeze.weight.T + a.squeeze.bias).clamp(min=0)
    scale = torch.sigmoid(hidden @ a.excite.weight.T + a.excite.bias)
    return x * scale[:, :, None, None]


def normalised(bn, x):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * bn.weight[:, None, None] + bn.bias[:, None, None]


def swish(x):
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("down", [False, True])
def test_an_encoder_cell(down):
    cell, x = encoder_cell(4, 8 if down else 4, down).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    first, _, conv1, second, _, conv2 = cell.branch
    h = normed(conv2, swish(normalised(second, normed(conv1, swish(normalised(first, x))))))
    skip = x
    if down:
        s = swish(x)
        corners = (s[:, :, ::2, ::2], s[:, :, 1::2, 1::2], s[:, :, ::2, 1::2], s[:, :, 1::2, ::2])
        parts = [
            torch.einsum("bihw,oi->bohw", part, effective) + conv.bias[:, None, None]
            for part, conv in zip(corners, cell.skip.convs, strict=True)
            for effective in [conv.effective_weight()[:, :, 0, 0]]
        ]
        skip = torch.cat(parts, 1)
    torch.testing.assert_close(cell(x), skip + 0.1 * attended(cell, h))


@pytest.mark.parametrize("up", [False, True])
def test_a_decoder_cell(up):
    cell = decoder_cell(4, 2 if up else 4, 3, up).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    layers = [layer for layer in cell.branch if not isinstance(layer, torch.nn.Upsample)]
    bn0, wide, bn1, _, deep, bn2, _, narrow, bn3 = layers
    assert all(conv.bias is None for conv in (wide, deep, narrow))
    h = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else x
    h = torch.einsum("bihw,oi->bohw", normalised(bn0, h), wide.weight[:, :, 0, 0])
    h = F.conv2d(swish(normalised(bn1, h)), deep.weight, padding=2, groups=12)
    h = torch.einsum("bihw,oi->bohw", swish(normalised(bn2, h)), narrow.weight[:, :, 0, 0])
    h = normalised(bn3, h)
    skip = x
    if up:
        along = torch.linspace(0, 5, 12, dtype=torch.float64)
        lower = along.floor().clamp(max=4).long()
        t = along - lower
        one_way = x[:, :, lower] * (1 - t)[:, None] + x[:, :, lower + 1] * t[:, None]
        both = one_way[..., lower] * (1 - t) + one_way[..., lower + 1] * t
        skip = torch.einsum("bihw,oi->bohw", both, cell.skip.conv.effective_weight()[:, :, 0, 0])
    torch.testing.assert_close(cell(x), skip + 0.1 * attended(cell, h))


def test_a_normed_convolution_starts_near_torchs_and_survives_a_weight_of_zero():
    conv, x = NormedConv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), normed(conv, x))
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert float((conv(x) - plain).detach().abs().max()) < 0.1
    with torch.no_grad():
        conv.weight.zero_()
    conv(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in conv.parameters())


# The order of the modules.


def test_modules_are_passed_in_the_published_order():
    """Two scales: 1 group at the smallest resolution, 2 at the largest; 2 cells per outer block."""
    model, passed = small().eval(), []
    names = {Cell: "cell", Group: "group", NormedConv2d: "conv"}
    for name, module in model.named_modules():
        if type(module) in names and ".skip." not in name:
            module.register_forward_hook(
                lambda m, _, out: passed.append(
                    (names[type(m)], type(getattr(m, "skip", m)).__name__, out.shape[1:])
                )
            )
    inside = ("DownSkip", "UpSkip", "Identity")
    model.encode(images())
    cells = [(kind, tuple(shape)) for name, kind, shape in passed if name == "cell"]
    assert cells == [
        ("Identity", (4, 8, 8)),  # before: cells - 1, then down
        ("DownSkip", (8, 4, 4)),
        ("Identity", (8, 4, 4)),  # a cell per group, the largest resolution first
        ("Identity", (8, 4, 4)),
        ("DownSkip", (16, 2, 2)),
        ("Identity", (16, 2, 2)),
    ]
    activations = model.encode(images())
    assert [tuple(a.shape[1:]) for a in activations] == [(16, 2, 2), (8, 4, 4), (8, 4, 4)]
    passed.clear()
    model.forward_features(activations, model.draw_noise(3))
    assert [(kind, tuple(shape)) for name, kind, shape in passed if name == "cell"] == [
        ("UpSkip", (8, 4, 4)),  # none before the first group of all
        ("Identity", (8, 4, 4)),
        ("Identity", (8, 4, 4)),
        ("UpSkip", (4, 8, 8)),
        ("Identity", (4, 8, 8)),
    ]
    assert {kind for name, kind, _ in passed if name == "cell"} <= set(inside)
    heads = [tuple(shape) for name, _, shape in passed if name == "conv" and shape[0] == 4 and shape[1] < 8]
    assert heads == [(4, 2, 2)] + [(4, 4, 4)] * 4  # q of the first group; p and q of the others


def test_each_group_reads_its_own_activation_and_images_reach_the_decoder_through_latents_alone():
    model = small().eval()
    features = [f.detach().requires_grad_() for f in model.encode(images())]
    out = model.forward_features(tuple(features), model.draw_noise(3))
    for i, kl in enumerate(out.kl):
        found = torch.autograd.grad(kl.sum(), features, retain_graph=True, allow_unused=True)
        assert [g is not None for g in found] == [j <= i for j in range(3)]  # later ones are not known yet
    # With the latents held, nothing of the features is left in the picture.
    with torch.no_grad():
        for group in model.decoder.each():
            group.posterior_head.weight.zero_()
            group.posterior_head.bias.zero_()
    noise = model.draw_noise(3)
    first = model.forward_features(tuple(features), noise).preactivation
    second = model.forward_features(tuple(torch.randn_like(f) for f in features), noise).preactivation
    assert torch.equal(first, second)


# Distributions.


def test_zero_deltas_have_no_kl_and_finite_gradients():
    raw = (6 * torch.randn(4, 6, 3, 3, dtype=torch.float64)).requires_grad_()
    delta = torch.zeros_like(raw, requires_grad=True)
    kl = kl_between(normal_of(raw + delta), normal_of(raw))
    assert torch.equal(kl, torch.zeros_like(kl))
    kl.sum().backward()
    assert raw.grad.isfinite().all()
    assert torch.equal(delta.grad.abs().max(), delta.grad.new_zeros(()))  # 0 is its minimum


def test_kl_and_densities_are_torchs():
    q, p = (normal_of(torch.randn(2, 6, 3, 3, dtype=torch.float64)) for _ in range(2))
    mine, theirs = (
        kl_between(q, p),
        torch.distributions.kl_divergence(
            torch.distributions.Normal(q.mean, q.sigma), torch.distributions.Normal(p.mean, p.sigma)
        ),
    )
    torch.testing.assert_close(mine, theirs)
    z = q.at(torch.randn_like(q.mean))
    torch.testing.assert_close(p.log_density(z), torch.distributions.Normal(p.mean, p.sigma).log_prob(z))


def test_raw_values_are_clamped_softly():
    wide = normal_of(torch.tensor([-1e3, 1e3, 0.0, -1e3, 1e3, 0.0], dtype=torch.float64).view(1, 6, 1, 1))
    assert wide.mean.flatten().tolist() == [-5, 5, 0]
    expected = [math.exp(-5) + 0.01, math.exp(5) + 0.01, 1.01]  # a prior without a state has sigma 1.01
    assert wide.sigma.flatten().tolist() == pytest.approx(expected)


@torch.no_grad()
def test_without_deltas_a_reconstruction_is_a_sample_by_the_same_noise():
    model = small().eval()
    with torch.no_grad():
        for group in model.decoder.each():
            group.posterior_head.weight.zero_()
            group.posterior_head.bias.zero_()
    noise = model.draw_noise(3)
    out = model.forward_features(model.encode(images()), noise)
    assert all(torch.equal(kl, torch.zeros_like(kl)) for kl in out.kl)
    torch.testing.assert_close(out.preactivation, model.decode(noise.latent), rtol=1e-12, atol=1e-12)
    assert float(out.log_ratio.abs().max()) < 1e-12
    with torch.no_grad():  # and a model with deltas is another matter
        model.decoder.groups[1].posterior_head.bias += 0.5
    moved = model.forward_features(model.encode(images()), noise)
    assert float(moved.kl[1].min()) > 0
    assert float((moved.preactivation - out.preactivation).abs().max()) > 1e-6


def test_the_log_ratio_is_the_kl_on_average():
    model = small().eval()
    features = tuple(f[:1].expand(4000, -1, -1, -1) for f in model.encode(images(1)))
    with torch.no_grad():
        out = model.forward_features(features, model.draw_noise(4000))
    kl = torch.stack([k.sum(1) for k in out.kl]).sum(0)
    difference = out.log_ratio - kl
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 4000**0.5


@torch.no_grad()
def test_temperature_multiplies_the_priors_sigma():
    group = small().decoder.groups[1]
    state = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    noise = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    p = normal_of(group.prior_head(state))
    torch.testing.assert_close(group.generate(state, noise, 0.7), p.mean + 0.7 * p.sigma * noise)
    model = small().eval()
    cold = model.decode(model.sample_latents(2), 0.0)
    torch.testing.assert_close(cold[0], cold[1])


# Flows.


def in_order(z, mirror):
    """Latents [1, z, h, w] in the order of a flow: pixel by pixel, in each the channels."""
    flat = z.flatten(2).permute(0, 2, 1)
    return (flat.flip(1) if mirror else flat).flatten()


@pytest.mark.parametrize("mirror", [False, True])
def test_a_flow_shifts_each_latent_by_those_before_it(mirror):
    torch.manual_seed(3)
    flow = ShiftFlow(2, mirror).double()
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    rows = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in in_order(flow(z), mirror)]
    jacobian = torch.stack([in_order(row, mirror) for row in rows])
    torch.testing.assert_close(jacobian.diagonal(), torch.ones(18, dtype=torch.float64))
    assert torch.equal(jacobian.triu(1), torch.zeros_like(jacobian))
    # It is no smaller set than those before: a 3x3 and a 5x5 kernel see the last pixel from the first.
    assert (jacobian.tril(-1) != 0).sum() > 60


def test_pairs_of_flows_keep_the_volume():
    flows = flow_pairs(2, 2).double()
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flows, z).view(18, 18)
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(0, abs=1e-10)
    assert not torch.equal(flows(z), z)
    assert len(flows) == 4
    assert sum(isinstance(m, MaskedConv2d) for m in flows.modules()) == 12


@torch.no_grad()
def test_a_flows_kl_is_its_log_ratio():
    model = small(num_flows=1).eval()
    out = model.forward_features(model.encode(images()), model.draw_noise(3))
    torch.testing.assert_close(torch.stack([k.sum(1) for k in out.kl]).sum(0), out.log_ratio)
    without = small(num_flows=1).eval()
    with torch.no_grad():
        for module in without.modules():
            if isinstance(module, MaskedConv2d):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
    still = Noise(torch.zeros(3, without.latent_dim, dtype=torch.float64))
    plain = small(num_flows=0)
    state = {k: v for k, v in without.state_dict().items() if k in plain.state_dict()}
    state = {k: v for k, v in state.items() if not k.startswith("singular")}
    plain.load_state_dict(state, strict=False)
    features = without.encode(images())
    torch.testing.assert_close(
        without.forward_features(features, still).preactivation,
        plain.eval().forward_features(plain.encode(images()), still).preactivation,
    )


# Images.


def test_the_border_does_not_count():
    model = small((1, 12, 12), outer_blocks=2).eval()  # a multiple of 8, or 4 less
    assert model.border == 2
    x = images(2, (1, 12, 12))
    noise = model.draw_noise(2)
    seen = {}
    model.encoder.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    out = model.forward_features(model.encode(x), noise)
    assert out.preactivation.shape == x.shape
    assert seen["x"].shape == (2, 1, 16, 16)
    torch.testing.assert_close(seen["x"][:, :, 2:14, 2:14], 2 * x - 1)
    assert bool((seen["x"][:, :, :2] == -1).all())
    assert bool((seen["x"][..., 14:] == -1).all())
    inner = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    inner[:, :, 2:14, 2:14] = 1
    losses = LossVector(model, [1.0] * 3, "bernoulli", "sum", 10)
    before = losses(out, x)

    def disturbed(_, __, full):
        return full + 9 * (1 - inner) * torch.randn_like(full)

    hook = model.head.register_forward_hook(disturbed)
    after = losses(model.forward_features(model.encode(x), noise), x)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (
            20,
            {"outer_blocks": 3},
            "--image_size 20 does not fit nvae .* multiple of 16, or 4 pixels less: 12, 16 or 28",
        ),
        (28, {"channels": 5}, "--channels 5 .* even number, 4 or 6"),
        (28, {"groups_per_scale": 100, "kl_rows": "group"}, "--kl_rows group: 150 groups .* --kl_rows scale"),
        (8, {"outer_blocks": 2, "num_flows": 1}, "--num_flows 1: .* maps of 1x1, .* or --num_flows 0"),
    ],
)
def test_what_does_not_fit_is_said_with_what_does(size, options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model("nvae", (1, size, size), "sigmoid", SMALL | options)


@pytest.mark.parametrize("size", [4, 8, 12, 20, 28])
def test_sizes_that_fit(size):
    model = small((3, size, size)).eval()
    x = images(2, (3, size, size))
    assert model(x).preactivation.shape == x.shape
    assert model.sample(2).shape == x.shape


# Rows.


@torch.no_grad()
def test_rows_of_scales_groups_and_all_add_up_to_the_same():
    found = {}
    for rows in ("scale", "group", "total"):
        model = small(kl_rows=rows).eval()
        assert tuple(model.weighted_objectives(SMALL | {"kl_rows": rows}, (1, 8, 8))) == model.objectives
        out = model.forward_features(model.encode(images()), Noise(torch.zeros(3, model.latent_dim).double()))
        losses = LossVector(model, [1.0] * len(model.objectives), "bernoulli", "sum", 10)
        found[rows] = [float(v) for v in losses(out, images())[1:]]
        groups = [float(kl.sum(1).mean()) for kl in out.kl]
    assert found["group"] == pytest.approx(groups)
    assert found["scale"] == pytest.approx([groups[0], groups[1] + groups[2]])
    assert found["total"] == pytest.approx([sum(groups)])


def test_parts_of_the_latents_are_the_groups_maps():
    model = small()
    assert [p.name for p in model.parts("scale")] == ["scale 1 (2x2)", "scale 2 (4x4)"]
    assert len(model.parts("group")) == 3
    for kind in ("scale", "group"):
        columns = [i for part in model.parts(kind) for i in range(model.latent_dim)[part.columns]]
        assert columns == list(range(model.latent_dim))
    z = model.sample_latents(2)
    _, second, _ = model.parts("group")
    assert torch.equal(z[:, second.columns].view(2, 2, 4, 4), model.noise_of(1, z))


# Gates.


def test_open_gates_are_the_plain_network():
    plain = small(num_flows=1).eval()
    gated = make_multirate(small(num_flows=1), gate_encoder="sigmoid", gate_decoder="sigmoid").double().eval()
    layers = gated_layers(gated)
    assert "head" not in layers
    convs = [m for m in plain.modules() if isinstance(m, torch.nn.Conv2d)]
    linears = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == len(convs) - 1 + len(linears)
    with torch.no_grad():
        for layer in layers.values():
            layer.gate_bias.fill_(60.0)
            layer.gate_weight.zero_()
    x, noise = images(), plain.draw_noise(3)
    for beta in (0.01, 1.0, 10.0):
        gated.set_beta(beta)
        mine = gated.forward_features(gated.encode(x), noise)
        theirs = plain.forward_features(plain.encode(x), noise)
        torch.testing.assert_close(mine.preactivation, theirs.preactivation)
        torch.testing.assert_close(mine.kl, theirs.kl)
    with torch.no_grad():
        next(iter(layers.values())).gate_bias.fill_(0.0)
    assert not torch.allclose(gated(x, noise).preactivation, theirs.preactivation)


def test_each_image_weighs_its_rate_by_its_own_beta():
    model = make_multirate(small(), gate_encoder="sigmoid", gate_decoder="sigmoid").double()
    noise = model.draw_noise(5)
    assert noise.log_beta.shape == (5,)
    assert len(set(noise.log_beta.tolist())) == 5
    out = model(images(5), noise)
    torch.testing.assert_close(out.beta, noise.log_beta.exp())
    losses = LossVector(model, [1.0] * 3, "bernoulli", "sum", 10)(out, images(5))
    per_image = (out.kl[1].sum(1) + out.kl[2].sum(1)) * noise.log_beta.exp()
    torch.testing.assert_close(losses[2], per_image.mean())


def test_statistics_of_samples_are_those_of_a_pass_in_training() -> None:
    """After re-estimation each BatchNorm of the decoder standardises the samples that it was estimated on."""
    model = small().eval()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(2, 5)
    encoder_before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    outputs = []
    norm = next(m for m in model.decoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    estimate_statistics(model, 3, 64, torch.Generator().manual_seed(0), 0.7)
    assert not any(m.training for m in model.modules())
    hook = norm.register_forward_hook(lambda module, given, out: outputs.append(given[0]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.sample(64, generator, 0.7)
    hook.remove()
    seen = torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)
    # Not exactly: while estimating, the layers before it standardise each batch by itself.
    assert torch.allclose(norm.running_mean, seen, atol=2e-3)
    assert float((norm.running_mean - seen).abs().max()) < 0.01 * float(seen.abs().max())
    assert all(torch.equal(v, encoder_before[k]) for k, v in model.encoder.state_dict().items())
    assert norm.momentum == pytest.approx(0.05)


def test_temperature_narrows_the_priors() -> None:
    model = small().eval()
    with torch.no_grad():
        wide, narrow = (
            model.sample(64, torch.Generator().manual_seed(0), temperature) for temperature in (1.0, 0.0)
        )
    assert float(narrow.std(0).max()) < 1e-6  # every draw is the same
    assert float(wide.std(0).max()) > 1e-4


def test_a_codebook_has_no_temperature() -> None:
    model = build_model("vq_vae", (1, 16, 16), "sigmoid", {"hidden_dims": [8, 8], "num_embeddings": 8})
    generator = torch.Generator()
    with pytest.raises(ArgumentError, match=r"temperature 0\.5"):
        SampleSource(model).check(Choice(0.5))
    with pytest.raises(ArgumentError, match="no BatchNorm"):
        estimate_statistics(build_model("linear_vae", (1, 8, 8), "none", {}), 1, 2, generator)


@pytest.mark.parametrize("rates", [None, ("sigmoid", "example"), ("sqrt", "example")], ids=str)
def test_gate_batchnorm_and_swish_as_one_op_are_the_modules(rates, monkeypatch) -> None:
    """Values, gradients and running statistics; the modules are what runs without the extension."""
    found = []
    for fused in (True, False):
        model = small()
        if rates is not None:
            make_multirate(model, gate_encoder="sigmoid", gate_decoder=rates[0], beta_per=rates[1])
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "gate_" in name:
                        p.copy_(torch.linspace(-1, 1, p.numel()))
        calls = []
        monkeypatch.setattr(branch, "is_fusible", is_fusible if fused else lambda layer: False)
        original = branch.norm_swish
        with monkeypatch.context() as patch:
            patch.setattr(branch, "norm_swish", lambda *a, of=original, into=calls: into.append(a) or of(*a))
            torch.manual_seed(5)
            noise = model.draw_noise(3)
            model.condition(noise)
            out = model.train().forward_features(model.encode(images()), noise)
        loss = out.preactivation.square().sum() + sum(kl.sum() for kl in out.kl)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss.detach(), out.preactivation.detach(), *grads, *model.buffers()])
        gated = [a for a in calls if a[2] is not None]
        assert bool(calls) == fused
        assert bool(gated) == (fused and rates is not None)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
