"""A hierarchy in training: its penalty, warm-up and balancing, its rows, its bounds, several processes."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from movae_fast.aggregation.upgrad import UPGrad
from movae_fast.evaluation import hierarchy
from movae_fast.evaluation.rate_distortion import curve_points
from movae_fast.models import MODELS, NVAE, make_multirate
from movae_fast.models.nvae.convs import NormedConv2d
from movae_fast.objectives import LossVector, balance_factors
from movae_fast.schedules import LogLinear, LossSchedule, Warmup
from movae_fast.training.config import TrainConfig
from movae_fast.training.precision import Precision
from movae_fast.training.telemetry import CONFLICT
from movae_fast.training.train_step import TrainStep
from tests.nvae_models import SMALL, images, small


def step_of(model, agg=None, penalty=None, lr=None, schedule=None, **options):
    losses = LossVector(
        model,
        [1.0] * len(model.objectives),
        "bernoulli",
        "sum",
        10,
        schedule=schedule or LossSchedule(penalty=None if penalty is None else lambda step: penalty),
    )
    optimizer = None if lr is None else torch.optim.SGD(model.parameters(), lr)
    return TrainStep(model, losses, agg, optimizer, jacobian="all", **options)


# The penalty.


def test_power_iteration_finds_the_largest_singular_values():
    torch.manual_seed(0)
    model = small(num_flows=1)
    model.start_penalty()
    penalised = model.penalised()
    convs = [conv for group in penalised.convs for conv in group]
    assert len(convs) == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    exact = [torch.linalg.svdvals(effective(conv).detach().flatten(1)) for conv in convs]
    for norm, values in zip(torch.cat(model.singular.norms(penalised, 0)).tolist(), exact, strict=True):
        # Between two values that are closer to each other than that, 40 iterations may not have decided.
        gap = float(1 - values[1] / values[0]) if len(values) > 1 else 0.0
        missing = 1 - norm / float(values[0])
        assert -1e-12 < missing < (0.01 if gap > 0.05 else max(0.01, gap))


def effective(conv):
    return conv.effective_weight() if isinstance(conv, NormedConv2d) else conv.weight


def exact_penalty(model):
    """The penalty by singular value decompositions."""
    norms = [torch.linalg.matrix_norm(effective(m).flatten(1), 2) for m in convs_of(model)]
    scales = [m.weight.abs().max() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    return torch.stack(norms).sum() + torch.stack(scales).sum()


def convs_of(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


def converge(model):
    with torch.no_grad():
        model.singular.norms(model.penalised(), 1000)


def test_the_penaltys_gradient_is_that_of_the_norms():
    model = small()
    penalised = model.penalised()
    converge(model)
    parameters = penalised.parameters()
    mine = torch.autograd.grad(model.penalty(penalised), parameters)
    theirs = torch.autograd.grad(exact_penalty(model), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    scales = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {id(p) for p in parameters} >= scales


@pytest.mark.parametrize(
    ("agg", "options"),
    [
        (None, {}),
        (None, {"accumulate": 2}),
        (UPGrad, {}),
        (UPGrad, {"accumulate": 2}),
        (UPGrad, {"gramian_every": 2}),
    ],
)
def test_the_penaltys_gradient_is_added_behind_the_aggregator(agg, options):
    """With and without: the difference is its weight times its gradient, whatever aggregates."""
    found = {}
    for weight in (None, 0.3):
        model = small()
        converge(model)
        step = step_of(model, agg and agg.strict(), weight, **options)
        noise = model.draw_noise(4)._replace(latent=torch.full((4, model.latent_dim), 0.3).double())
        for number in range(2):
            step.gradient(images(4), number, noise)
        found[weight] = {name: p.grad.clone() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    penalty = torch.autograd.grad(0.3 * exact_penalty(model), parameters, allow_unused=True)
    expected = dict(zip(found[None], penalty, strict=True))
    for name, plain in found[None].items():
        added = 0 if expected[name] is None else expected[name]
        torch.testing.assert_close(found[0.3][name], plain + added, rtol=1e-4, atol=1e-6)


def test_the_step_takes_the_penalty_before_it_clips():
    model = small()
    step = step_of(model, None, 1e6, lr=1.0, max_grad_norm=0.5)
    before = step.flat.data.clone()
    step(images(4), 0, model.draw_noise(4))
    assert float((step.flat.data - before).norm()) == pytest.approx(0.5, rel=1e-5)
    # Nearly all of it is the penalty's: it lowers the norms.
    assert bool(exact_penalty(model) < exact_penalty(small()))


def test_a_loss_scale_does_not_reach_the_penalty():
    """fp16's gradients are divided by the scale before the penalty's is added."""
    moved = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = NVAE((1, 8, 8), "sigmoid", **SMALL)
        step = step_of(model, None, 10.0, lr=0.1)
        if scaled:
            step.precision = Precision("fp32", model.device)
            step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = step.flat.data.clone()
        torch.manual_seed(5)
        step(images(4).float(), 0, model.draw_noise(4))
        moved.append(step.flat.data - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-5)


def test_singular_vectors_go_on_from_where_they_were():
    model = small()
    assert any(name.startswith("singular.u_") for name in model.state_dict())
    step, before = step_of(model, None, 0.1, lr=0.0), model.singular.u_9.clone()
    step(images(4), 0, model.draw_noise(4))
    assert not torch.equal(model.singular.u_9, before)
    kept = model.singular.u_9.clone()
    with torch.no_grad():
        model(images(4))
    assert torch.equal(model.singular.u_9, kept)


# Warm-up and balancing.


def test_the_kls_factor_rises_from_its_least_to_1():
    warmup = Warmup(1e-4 * 1000, 0.3 * 1000)
    assert [warmup(s) for s in (0, 60, 150, 300, 301, 999)] == pytest.approx(
        [1e-4, 59.9 / 300, 149.9 / 300, 299.9 / 300, 1, 1]
    )
    assert [warmup.lasts(s) for s in (0, 300, 301)] == [True, True, False]
    annealed = LogLinear(10.0, 0.1, warmup)
    assert annealed(150) == pytest.approx(10 * (0.1 / 10) ** (149.9 / 300))
    assert annealed(999) == pytest.approx(0.1)


def test_alpha_is_by_resolution_and_number_of_groups():
    with torch.device("meta"):
        assert NVAE((1, 28, 28)).balance() == [1.0] * 5 + [2.0] * 10
        assert NVAE((3, 64, 64), preset="celeba64").balance() == [1.0] * 5 + [2.0] * 10 + [4.0] * 20
        assert NVAE((3, 32, 32), preset="cifar10").balance() == [1.0] * 30


def test_factors_are_in_proportion_to_what_a_group_carries():
    kl, alpha = np.array([3.0, 0.5, 10.0, 0.0]), np.array([1.0, 1.0, 2.0, 2.0])
    expected = (kl + 0.01) / alpha
    expected *= 4 / expected.sum()
    mine = balance_factors(torch.tensor(kl), torch.tensor(alpha))
    np.testing.assert_allclose(mine.numpy(), expected)


def test_kls_are_balanced_in_training_while_their_factor_rises():
    model = small()
    warmup = Warmup(0, 10)
    losses = LossVector(
        model, [1.0] * 3, "bernoulli", "sum", 10, schedule=LossSchedule(kl_factor=warmup, balanced=warmup.lasts)
    )
    noise = model.draw_noise(4)
    out = model(images(4), noise)
    kl = torch.stack([k.sum(1).mean() for k in out.kl]).detach()
    counts, k = (1, 2), torch.tensor([0, 1, 1])
    alpha = torch.tensor([4.0**0 / counts[0], 4.0 / counts[1], 4.0 / counts[1]]).double()
    factors = (kl + 0.01) / (alpha / alpha.min())
    factors = factors / factors.mean()
    losses.set_step(3)
    _, *balanced = losses(out, images(4))
    torch.testing.assert_close(
        torch.stack(balanced), torch.stack([(factors * kl)[k == i].sum() for i in (0, 1)])
    )
    # The factors are constants for the gradient.
    (mine,) = torch.autograd.grad(balanced[0], out.kl[0], retain_graph=True)
    torch.testing.assert_close(mine, torch.full_like(mine, float(factors[0]) / 4))
    for number, network in ((10, model), (3, model.eval())):
        losses.set_step(number)
        with torch.no_grad():
            out = network(images(4), noise)
            _, *plain = losses(out, images(4))
        expected = [float(k.sum(1).mean()) for k in out.kl]
        assert [float(v) for v in plain] == pytest.approx([expected[0], expected[1] + expected[2]])


def config(**flags):
    return TrainConfig.from_flat({"dataset": "digits", "arch": "nvae", "preset": "tiny"} | flags)


def test_defaults_follow_what_weighs_the_rows():
    plain = config()
    assert (plain.jacobian, plain.kl_warmup, plain.kl_balance, plain.norm_penalty) == ("all", 0.3, True, 1e-2)
    assert config(preset="celeba64").norm_penalty == 0.1
    for other in (config(agg="upgrad"), config(multirate=True), config(kl_annealing="cyclic")):
        assert (other.kl_warmup, other.kl_balance) == (0.0, False)
    assert config(agg="upgrad", kl_warmup=0.1).kl_warmup == 0.1
    assert config(kl_warmup=0.0).kl_balance is False
    assert config(multirate=True).gate_decoder == "sigmoid"
    others = [TrainConfig.from_flat({"dataset": "digits", "arch": arch}) for arch in MODELS if arch != "nvae"]
    assert {(c.jacobian, c.kl_warmup, c.kl_balance, c.norm_penalty, c.gate_decoder) for c in others} == {
        ("shared", 0.0, False, 0.0, "sqrt")
    }


# Rows and conflict.


def conflicts(steps, batch=16, **options):
    torch.manual_seed(0)
    model = NVAE((1, 8, 8), "sigmoid", **(SMALL | options))
    step = step_of(model, UPGrad.strict(), 0.01)
    step.optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(2)
    pool = torch.randint(0, 2, (64, 1, 8, 8), generator=generator).float()
    found = []
    for number in range(steps):
        rows = torch.randperm(64, generator=generator)[:batch]
        record = step(pool[rows], number, model.draw_noise(batch), log=True)
        assert bool(record.losses.isfinite().all())
        found.append(float(record.cosines.min()))
    return sum(cosine < CONFLICT for cosine in found)


def test_strict_upgrad_over_scales_has_no_step_in_conflict():
    assert conflicts(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["scale", "group"])
def test_strict_upgrad_has_no_step_in_conflict_of_a_hundred(rows):
    assert conflicts(100, kl_rows=rows) == 0


def test_rates_of_groups_are_in_the_record():
    model = small()
    step = step_of(model, None, lr=0.1, accumulate=2)
    record = step(images(4), 0, model.draw_noise(4))
    assert record.rates.shape == (3,)
    assert float(record.rates.sum()) == pytest.approx(float(record.losses[1:].sum()), rel=1e-5)


# Bounds and curves.


def test_more_draws_bound_the_likelihood_closer():
    model = small().eval()
    with torch.no_grad():  # posteriors that are off, so that weights differ
        for group in model.decoder.each():
            group.posterior_head.bias.normal_(0, 0.3)
    batches = [(images(4), None)]
    bounds = {
        k: np.mean(
            [hierarchy.importance_weighted_bound(model, batches, "bernoulli", k, seed) for seed in range(6)]
        )
        for k in (1, 10, 200)
    }
    figures, groups = hierarchy.elbo(model, [(images(4).repeat(50, 1, 1, 1), None)], "bernoulli", 0)
    assert bounds[1] < bounds[10] < bounds[200]
    assert figures["elbo"] < bounds[10]
    assert figures["elbo"] == pytest.approx(bounds[1], abs=3)
    assert figures["rate"] == pytest.approx(float(groups.sum()))
    assert figures["rate"] == pytest.approx(figures["rate_scale_1"] + figures["rate_scale_2"])
    whole = hierarchy.importance_weighted_bound(model, batches, "bernoulli", 30, 0)
    parts = hierarchy.importance_weighted_bound(model, batches, "bernoulli", 30, 0, at_once=7)
    assert whole == pytest.approx(parts)


def test_a_channel_is_active_by_its_kl():
    model = small().eval()
    with torch.no_grad():
        for group in model.decoder.each():
            group.posterior_head.weight.zero_()
            group.posterior_head.bias.zero_()
        model.decoder.groups[1].posterior_head.bias[1] = 1.0  # the mean of the second channel
    figures, groups = hierarchy.elbo(model, [(images(4), None)], "bernoulli", 0)
    assert figures["active_units"] == 1
    assert [float(g) > 0.1 for g in groups] == [False, True, False]


class Images:
    """What `curve_points` takes of a loader."""

    def __init__(self, x, batch):
        self.source, self.batch = x, batch

    def epoch(self):
        return ((part, None) for part in self.source.split(self.batch))


def test_a_curve_is_the_model_at_each_beta_whatever_the_batches():
    model = make_multirate(small(), gate_encoder="sigmoid", gate_decoder="sigmoid").double().eval()
    x, betas = images(5), [0.1, 1.0, 5.0]
    one = curve_points(model, Images(x, 5), betas, "bernoulli", 0, 100)
    other = curve_points(model, Images(x, 2), betas, "bernoulli", 0, 2)
    for beta, a, b in zip(betas, one, other, strict=True):
        model.set_beta(beta)
        figures, _ = hierarchy.elbo(model, [(x, None)], "bernoulli", 0)
        assert (a.beta, a.active_units) == (beta, figures["active_units"])
        assert (a.rate, a.distortion) == pytest.approx((figures["rate"], figures["distortion"]))
        assert (b.rate, b.distortion) == pytest.approx((a.rate, a.distortion))
    assert len({round(p.rate, 6) for p in one}) == 3


# Cells that are computed again in the backward.


def bytes_kept(call):
    """The bytes of all storages that a call's graph keeps for its backward."""
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(kept.values())


@pytest.mark.parametrize(("agg", "multirate"), [(None, False), ("upgrad", True)])
def test_recomputed_cells_give_the_same_bits(agg, multirate):
    """Parameters, running statistics and their counts after two steps; with rows, one backward per row."""
    found = []
    for recompute in (False, True):
        model = small().to(memory_format=torch.channels_last)
        if multirate:
            make_multirate(model, gate_encoder="sigmoid", gate_decoder="sigmoid")
        if recompute:
            model.recompute_cells()
        step = step_of(model, None if agg is None else UPGrad.strict(), penalty=0.01, lr=0.01)
        torch.manual_seed(3)
        for number in range(2):
            step(images(4), number, model.draw_noise(4), log=number == 1)
        found.append(model.state_dict())
    counts = [v for name, v in found[1].items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {2}
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


def test_recomputed_cells_keep_less():
    model = small().to(memory_format=torch.channels_last)
    before = bytes_kept(lambda: model(images(16)))
    model.recompute_cells()
    assert bytes_kept(lambda: model(images(16))) < 0.6 * before


# The compiler.


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_compiled_once_and_is_the_eager_one(monkeypatch, backend):
    """Whatever changes with the step, as the contents of tensors: the KL's weight, balancing, the penalty's."""
    if backend != "inductor":
        compile = torch.compile

        def quickly(function, **options):
            return compile(function, backend=backend, **(options | {"options": None}))

        monkeypatch.setattr(torch, "compile", quickly)
    torch._dynamo.reset()
    found = {}
    for mode in ("off", "default"):
        torch.manual_seed(0)
        options = {"num_scales": 1, "outer_cells": 1, "channels": 2, "latents_per_group": 1}
        model = NVAE((1, 4, 4), "sigmoid", **(SMALL | options))
        warmup = Warmup(0, 3)
        schedule = LossSchedule(kl_factor=warmup, balanced=warmup.lasts, penalty=lambda step: 0.01 * (step + 1))
        step = step_of(model, None, schedule=schedule, lr=0.01, compile_mode=mode)
        torch.manual_seed(1)
        for number in range(6):
            if number == 2:
                counters.clear()
            step(images(4, (1, 4, 4)).float(), number, model.draw_noise(4))
        found[mode] = step.flat.data.clone()
    assert counters["stats"]["unique_graphs"] == 0
    assert sum(counters["graph_break"].values()) == 0
    torch.testing.assert_close(found["default"], found["off"], rtol=1e-3, atol=1e-5)


def test_bfloat16_leaves_distributions_losses_and_norms_alone():
    torch.manual_seed(0)
    model = NVAE((1, 8, 8), "sigmoid", **(SMALL | {"num_flows": 1}))
    noise, x = model.draw_noise(4), images(4).float()
    with torch.no_grad(), Precision("bf16", model.device).autocast():
        out = model(x, noise)
    with torch.no_grad():
        exact = model(x, noise)
    assert {out.preactivation.dtype, *(kl.dtype for kl in out.kl)} == {torch.float32}
    torch.testing.assert_close(out.preactivation, exact.preactivation, atol=0.1, rtol=0.1)
    step = step_of(model, UPGrad.strict(), 0.01, lr=1e-3, precision=Precision("bf16", model.device))
    record = step(x, 0, noise)
    assert bool(record.losses.isfinite().all())
    assert bool(step.flat.data.isfinite().all())
