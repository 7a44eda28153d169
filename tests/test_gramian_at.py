"""Weights from a cheaper Gramian: at the features, or at the last shared modules; then one backward."""

import pytest
import torch

from movae_fast import jacobian, ops
from movae_fast.aggregation import UPGrad
from movae_fast.aggregation.registry import AGGREGATORS, is_weighting, make_aggregator, weights_by_gramian
from movae_fast.jacobian import at_features
from movae_fast.models import MODELS, ConvVAE
from movae_fast.training.compiled import graph_counters
from movae_fast.training.gradients import Batch, forward, last_parameters
from movae_fast.training.precision import Precision
from tests.test_jacobian import net
from tests.test_step import gradient, images, relative, step

PLACES = ("features", "last:1", "last:2")
ARGS = {"constant": {"weights": [1.0, 2.0]}, "nash_mtl": {}, "krum": {}, "trimmed_mean": {}}


def by_hand(made, x, noise, at):
    """The definition: rows where `at` says, their Gramian, its weights, the weighted losses' gradient."""
    scale = made.scale_at(0)
    features, weighted, *_ = forward(made.network, Batch(x, noise, None), scale)
    upstream = at_features(weighted, features, []).features
    rows = []
    last = last_parameters(made.model, at)
    for row in upstream:
        given = [(f, g) for f, g in zip(features, row, strict=True) if g is not None]
        if not given:
            rows.append(None)
        elif at == "features":
            parts = [torch.zeros_like(f) if g is None else g for f, g in zip(features, row, strict=True)]
            rows.append(torch.cat([p.reshape(-1) for p in parts]))
        else:
            found = torch.autograd.grad(
                [f for f, _ in given], last, [g for _, g in given], retain_graph=True, allow_unused=True
            )
            pairs = zip(found, last, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    size = max(len(r) for r in rows if r is not None)
    matrix = torch.stack([torch.zeros(size).to(x) if r is None else r for r in rows])
    weights = made.aggregator.gramian_weighting(matrix.double() @ matrix.double().T)
    total = sum(w.to(loss.dtype) * loss for w, loss in zip(weights, weighted, strict=True))
    return weights, torch.autograd.grad(total, made.flat.shared, allow_unused=True)


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("arch", ["vae", "betatc_vae", "vq_vae", "mmd_vae"])
def test_it_is_its_definition(arch, at):
    made = step(arch, dtype=torch.float64, gramian_at=at)
    x = images(dtype=torch.float64)
    torch.manual_seed(2)
    noise = made.model.draw_noise(len(x))
    weights, expected = by_hand(step(arch, dtype=torch.float64, gramian_at=at), x, noise, at)
    _, record = gradient(made, x)
    torch.testing.assert_close(record.weights[made.active], weights.to(record.weights), rtol=1e-9, atol=1e-12)
    for p, g in zip(made.flat.shared, expected, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-9, atol=1e-12)
    # Own parameters get what they always get, and the exact weights are others.
    exact = step(arch, dtype=torch.float64)
    _, of_exact = gradient(exact, x)
    assert relative(made.flat.task_grad, exact.flat.task_grad) < 1e-12
    assert not torch.allclose(of_exact.weights, record.weights, rtol=1e-3)


@pytest.mark.parametrize("at", PLACES)
def test_parts_of_a_batch_have_the_batchs_weights(at):
    whole, parts = (step("vq_vae", dtype=torch.float64, gramian_at=at, accumulate=k) for k in (1, 4))
    x = images(dtype=torch.float64)
    a, record = gradient(whole, x)
    b, record_parts = gradient(parts, x)
    torch.testing.assert_close(record_parts.weights, record.weights, rtol=1e-9, atol=1e-12)
    assert relative(b, a) < 1e-10
    assert torch.equal(record_parts.usage, record.usage)


def test_the_pass_for_the_weights_leaves_no_mark_on_running_statistics():
    once, twice = step(gramian_at="features"), step(gramian_at="features", accumulate=2)
    gradient(once, images())
    before = [b.clone() for b in twice.model.buffers()]
    gradient(twice, images())
    tracked = dict(twice.model.named_buffers())["encoder.0.1.num_batches_tracked"]
    assert int(tracked) == 2  # one update per part, not two
    assert any(not torch.equal(a, b) for a, b in zip(before, twice.model.buffers(), strict=True))


@pytest.mark.parametrize("at", ["features", pytest.param("last:1", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph(at):
    before = graph_counters()
    eager, compiled = step(gramian_at=at), step(gramian_at=at, compile_mode="default")
    for number in range(2):
        x = images(16) + 0.01 * number
        a, record = gradient(eager, x, number)
        b, again = gradient(compiled, x, number)
        assert relative(b, a) < 1e-4
        torch.testing.assert_close(again.weights, record.weights, rtol=1e-3, atol=1e-5)
    after = graph_counters()
    assert after["graphs"] - before["graphs"] == 1
    assert after["graph_breaks"] == before["graph_breaks"]


def test_bf16_and_fp16():
    x = images(64)
    a, _ = gradient(step(gramian_at="features"), x)
    for name in ("bf16", "fp16"):
        half = step(gramian_at="features", precision=Precision(name, torch.device("cpu")))
        b, _ = gradient(half, x)
        if name == "fp16":
            b = b / half.precision.scaler.get_scale()
        assert 1e-4 < relative(b, a) < 0.2


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "crmogm"])
def test_an_aggregator_that_draws_or_remembers_is_asked_once_per_step(name):
    """The weights of the log are those of the update: the gradient is their weighted sum of rows."""
    made = step("betatc_vae", agg=name, gramian_at="features", dtype=torch.float64)
    calls = []
    made.aggregator.gramian_weighting.register_forward_hook(lambda *_: calls.append(1))
    x = images(dtype=torch.float64)
    for number in range(3):
        torch.manual_seed(2)
        record = made.gradient(x, number, made.model.draw_noise(len(x)), log=True)
        expected = (record.weights.double() @ made.rows.rows).float()
        assert relative(made.flat.shared_grad, expected) < 1e-5
        assert len(calls) == number + 1


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if weights_by_gramian(name)])
def test_every_aggregator_that_weights_by_the_gramian(name):
    made = step("betatc_vae", agg=name, gramian_at="features")
    _, record = gradient(made, images())
    assert record.weights.isfinite().all()


def test_which_aggregators_weight_by_the_gramian():
    """The list by name is what the aggregators themselves say."""
    for name in AGGREGATORS:
        aggregator = make_aggregator(name, 3 if name == "krum" else 2, ARGS.get(name))
        rows_needed = name in (
            "jd_sum",
            "mean",
            "constant",
            "random",
        )  # weights without a Gramian, or by chance
        assert weights_by_gramian(name) == (is_weighting(aggregator) and not rows_needed), name


def test_overflow_keeps_the_last_finite_weights():
    made = step(gramian_at="features", gramian_every=3, precision=Precision("fp16", torch.device("cpu")))
    made.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, record = gradient(made, images(), 0)
    good = made.weights.clone()
    made.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    gradient(made, images(), 3)
    assert torch.equal(made.weights, good)
    assert record.weights.isfinite().all()


def test_models_and_counts_that_cannot_work_are_named():
    model = MODELS["vae"]((3, 16, 16), "tanh", latent_dim=4, hidden_dims=[8])
    heads = {id(p) for head in (model.mu, model.logvar) for p in head.parameters()}
    assert {id(p) for p in last_parameters(model, "last:1")} == heads  # both heads are the last layer
    assert len(last_parameters(model, "last:3")) == len(model.shared_parameters())
    for wrong in ("last:0", "last:4", "last:99"):
        with pytest.raises(ValueError, match=r"the model has 3 shared layers; give last:1 to last:3"):
            last_parameters(model, wrong)
    with pytest.raises(ValueError, match="valid: shared, features, last:1"):
        last_parameters(model, "first:2")

    class Hierarchy(ConvVAE):
        has_features = False

    with pytest.raises(ValueError, match=r"Hierarchy has no features.*valid: shared"):
        last_parameters(Hierarchy((3, 16, 16), "tanh", 4, [8]), "features")
    with pytest.raises(ValueError, match="must weight rows by their Gramian alone"):
        step(agg="config", gramian_at="features")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--agg upgrad --gramian_at first", "--gramian_at first: valid: shared, features, last:1"),
        ("--agg upgrad --gramian_at last:0", "--gramian_at last:0: valid: shared, features, last:1"),
        ("--agg upgrad --gramian_at last:99", "gramian_at last:99: the model has 5 shared layers"),
        ("--agg graddrop --gramian_at features", "graddrop does not"),
        ("--agg constant --gramian_at features", "constant needs the rows themselves; these do with their"),
        ("--agg upgrad --gramian_at features --jacobian all", "leave --jacobian at shared"),
        ("--agg upgrad --gramian_at features --gramian_batch 0.5", "two ways to the same weights; give one"),
        ("--agg upgrad --gramian_at features --conflict_free step", "needs every step's rows"),
        ("--agg upgrad --gramian_every 2 --conflict_free step", "needs every step's rows"),
        (
            "--agg upgrad --upgrad_regularizer rows",
            "--upgrad_regularizer rows: unknown; valid: trace, diagonal",
        ),
        ("--agg upgrad --upgrad_norm_eps 1e-4", "add --upgrad_regularizer trace"),
        (
            "--agg mgda --upgrad_reg_eps 0.1",
            "is a setting of upgrad, dualproj, nupgrad, comfort, crmogm; --agg mgda does not have it",
        ),
        ("--conflict_free step --gramian_every 2", "needs every step's rows"),
        ("--agg upgrad --upgrad_reg_eps -1", "--upgrad_reg_eps -1.0 must be zero or more"),
        ("--agg upgrad --step_metric optimizer", "add --conflict_free step"),
        ("--conflict_free step --step_metric optimizer --optim sgd", "sgd has no second moments"),
        ("--conflict_free steps", "--conflict_free steps: unknown (did you mean step?)"),
    ],
)
def test_flags_that_cannot_work_are_named(train, capsys, tmp_path, flags, said):
    train(flags, status=2)
    error = capsys.readouterr().err
    assert said in error, error
    assert not (tmp_path / "run1").exists()


# In somebody else's loop.


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_backward_with_a_cheaper_gramian(at):
    model, x = net()
    features, losses = model(x)
    place = list(model.a.parameters()) + list(model.b.parameters())
    weights = jacobian.backward(
        losses, features=features, aggregator=UPGrad.strict(), gramian_at=place if at == "parameters" else at
    )
    ours = [p.grad.clone() for p in model.shared]
    model.zero_grad()
    features, losses = model(x)
    targets = place if at == "parameters" else features
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
        pairs = zip(found, targets, strict=True)
        rows.append(torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in pairs]))
    expected = UPGrad.strict().gramian_weighting(ops.gramian(torch.stack(rows)))
    torch.testing.assert_close(weights, expected)
    torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum().backward()
    for p, g in zip(model.shared, ours, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_every_parameter_before_the_features_is_in_one_layer():
    for arch, options in (
        ("vae", {}),
        ("vq_vae", {}),
        ("provlae", {"hidden_dim": 8, "fc_dim": 16}),
        ("cnn_vae", {"dim": 8, "dim_mults": [1, 2, 4]}),
    ):
        model = MODELS[arch]((3, 32, 32), "tanh", **options)
        layers = model.shared_layers()
        assert sorted(id(p) for layer in layers for p in layer) == sorted(map(id, model.shared_parameters()))
        assert all(layers)
    ladder = MODELS["provlae"]((3, 32, 32), "tanh", hidden_dim=8, fc_dim=16).shared_layers()
    assert len(ladder[-1]) == 2 * 3  # a weight and a bias of every rung's head


def test_backward_takes_an_iterator_or_one_parameter():
    found = []
    for place in (lambda m: iter(m.a.parameters()), lambda m: list(m.a.parameters())):
        model, x = net()
        features, losses = model(x)
        found.append(
            jacobian.backward(losses, features=features, aggregator=UPGrad.strict(), gramian_at=place(model))
        )
    assert torch.equal(*found)
    model, x = net()
    features, losses = model(x)
    jacobian.backward(losses, features=features, aggregator=UPGrad.strict(), gramian_at=model.a.weight)


def test_backward_returns_its_rows():
    model, x = net()
    features, losses = model(x)
    weights, rows = jacobian.backward(losses, features=features, aggregator=UPGrad(), return_rows=True)
    update = torch.cat([p.grad.reshape(-1) for p in jacobian.leaves(features)])
    assert rows.shape == (3, len(update))
    assert rows[2].abs().sum() == 0
    torch.testing.assert_close(weights.to(rows) @ rows, update)


def test_backward_names_what_cannot_work():
    model, x = net()
    features, losses = model(x)
    given = {"features": features, "aggregator": UPGrad()}
    with pytest.raises(
        ValueError, match="gramian_at must be shared, features or shared parameters; got 'last'"
    ):
        jacobian.backward(losses, **given, gramian_at="last")
    with pytest.raises(ValueError, match="names no parameter"):
        jacobian.backward(losses, **given, gramian_at=[])
    with pytest.raises(ValueError, match="a parameter that is not shared"):
        jacobian.backward(losses, **given, gramian_at=list(model.heads.parameters()))
    with pytest.raises(ValueError, match="gramian_at needs features="):
        jacobian.backward(losses, aggregator=UPGrad(), gramian_at="features")
    with pytest.raises(ValueError, match="ConFIG needs the rows themselves"):
        jacobian.backward(
            losses, features=features, aggregator=make_aggregator("config", 3), gramian_at="features"
        )
    with pytest.raises(ValueError, match="leave out return_rows"):
        jacobian.backward(losses, **given, gramian_at="features", return_rows=True)
