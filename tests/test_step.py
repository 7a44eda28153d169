"""The gradient step's variants against each other: compiled, in parts, approximate, in lower precision."""

import pytest
import torch

from movae_fast.aggregation.registry import make_aggregator
from movae_fast.models import MODELS, build_model
from movae_fast.objectives import LossVector, resolve_weights
from movae_fast.schedules import LossSchedule
from movae_fast.training.compiled import graph_counters
from movae_fast.training.config import OptimizerConfig
from movae_fast.training.flat import FlatParameters, Rows
from movae_fast.training.optim import make_optimizer
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import TrainStep

SHAPE = (3, 16, 16)
OPTIONS = {
    "vae": {"hidden_dims": [8, 16], "latent_dim": 6},
    "betatc_vae": {"hidden_dims": [8, 8], "latent_dim": 6},
    "vq_vae": {"hidden_dims": [8, 16], "embedding_dim": 8, "num_embeddings": 32},
    "mmd_vae": {"dim": 8, "dim_mults": [1, 2], "latent_dim": 6},
}


def step(arch="vae", agg="upgrad", dtype=torch.float32, jacobian="shared", network=None, lr=None, **options):
    torch.manual_seed(0)
    model = build_model(arch, SHAPE, "tanh", OPTIONS[arch] | (network or {})).to(dtype)
    weights = resolve_weights(MODELS[arch], SHAPE, None)
    losses = LossVector(model, weights, "gaussian", "mean", n_data=5000, schedule=LossSchedule(10))
    aggregator = None if agg == "sum" else make_aggregator(agg, len(losses.active))
    optimizer = None if lr is None else torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return TrainStep(model, losses, aggregator, optimizer, jacobian=jacobian, **options)


WITHOUT_BATCH_NORM = {"vae": {"layer_norm": "none"}, "vq_vae": {}}


def images(n=16, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.rand(n, *SHAPE).to(dtype)


def gradient(step, x, number=0, sample_weight=None):
    torch.manual_seed(2)
    record = step.gradient(x, number, step.model.draw_noise(len(x)), sample_weight=sample_weight)
    return step.flat.grad.clone(), record


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("arch", ["vae", "vq_vae"])
def test_float32_rows_are_float64_rows(arch):
    single, double = step(arch), step(arch, dtype=torch.float64)
    for p, q in zip(double.model.parameters(), single.model.parameters(), strict=True):
        p.data.copy_(q.data)
    x = images()
    gradient(single, x)
    torch.manual_seed(2)
    double.gradient(x.double(), 0, single.model.draw_noise(len(x)).map(torch.Tensor.double))
    # A convolution network's backward in float32: some tens of roundings of 6e-8.
    assert relative(single.rows.rows, double.rows.rows) < 1e-5
    assert relative(single.flat.task_grad, double.flat.task_grad) < 1e-5


def test_accumulated_parts_equal_the_batch_without_batch_statistics():
    for agg in ("upgrad", "sum", "config"):
        whole, parts = (step("vq_vae", agg, torch.float64, accumulate=k) for k in (1, 4))
        x = images(dtype=torch.float64)
        a, record = gradient(whole, x)
        b, record_parts = gradient(parts, x)
        assert relative(b, a) < 1e-12
        assert relative(record_parts.losses, record.losses) < 1e-12
        assert torch.equal(record_parts.usage, record.usage)


@pytest.mark.parametrize("agg", ["upgrad", "sum"])
def test_parts_survive_outputs_that_the_next_part_overwrites(agg):
    """What --compile reduce-overhead does: each replay of its graph leaves its results in the same memory."""
    plain, replayed = (step("vq_vae", agg, accumulate=2) for _ in range(2))
    region, held = (replayed.by_sum if agg == "sum" else replayed.by_rows), []
    compute = region.call

    def overwriting(*inputs):
        result = compute(*inputs)
        if not held:
            held.append(result)
        for name in ("losses", "usage"):
            getattr(held[0], name).copy_(getattr(result, name))
        return result._replace(losses=held[0].losses, usage=held[0].usage)

    region.call = overwriting
    x = images()
    _, expected = gradient(plain, x)
    _, record = gradient(replayed, x)
    assert relative(record.losses, expected.losses) < 1e-6
    assert torch.equal(record.usage, expected.usage)


def test_every_parameter_starts_at_an_aligned_place():
    for arch in OPTIONS:
        flat = step(arch).flat
        assert all(start % 16 == 0 for start in flat.starts.values())
        assert flat.n_shared % 16 == 0
    narrow = build_model("provlae", (3, 32, 32), "tanh", {"hidden_dim": 3, "fc_dim": 5, "latent_dim": 1})
    own = [p for params in narrow.task_parameters().values() for p in params]
    flat = FlatParameters(narrow.shared_parameters(), own, align=3)
    assert all(start % 16 == 0 for start in flat.starts.values())
    assert flat.n_shared % (16 * 3) == 0  # each of three ranks' shares, too


@pytest.mark.parametrize("arch", WITHOUT_BATCH_NORM)
def test_a_padded_batch_is_the_short_one_without_batch_statistics(arch):
    network, n = WITHOUT_BATCH_NORM[arch], 11
    x = images(16, torch.float64)
    share = (torch.arange(16) < n).double() * (16 / n)
    for options in ({}, {"agg": "sum"}, {"accumulate": 2}, {"gramian_every": 2}):
        padded, short = (step(arch, dtype=torch.float64, network=network, **options) for _ in range(2))
        short.accumulate = 1
        noise = padded.model.draw_noise(16)
        for number in range(2):
            record = padded.gradient(x, number, noise, sample_weight=share)
            expected = short.gradient(x[:n], number, noise.of_images(0, n))
            # float64's rounding through some ten layers.
            assert relative(padded.flat.grad, short.flat.grad) < 1e-12, options
            assert relative(record.losses, expected.losses) < 1e-12, options
        whole = padded.gradient(x, 1, noise)
        assert relative(whole.losses, expected.losses) > 1e-4  # what was added would have been seen


@pytest.mark.parametrize("jacobian", ["shared", "all"])
def test_reused_weights_make_the_update_that_the_rows_make(jacobian):
    exact = step(dtype=torch.float64, jacobian=jacobian)
    reusing = step(dtype=torch.float64, jacobian=jacobian, gramian_every=4)
    x = images(dtype=torch.float64)
    a, record = gradient(exact, x, 0)
    b, _ = gradient(reusing, x, 0)
    assert relative(b, a) < 1e-12
    c, again = gradient(reusing, x, 1)  # same batch: the reused weights are right, by one backward
    assert relative(c, a) < 1e-12
    assert torch.equal(again.weights, record.weights)
    assert again.cosines.isnan().all()


def test_part_of_the_batch_gives_nearly_the_batch_s_weights():
    exact, part = step(dtype=torch.float64), step(dtype=torch.float64, gramian_batch=0.5)
    x = images(64, dtype=torch.float64)
    a, record = gradient(exact, x)
    before = {k: v.clone() for k, v in part.model.named_buffers()}
    b, approximate = gradient(part, x)
    assert not torch.equal(approximate.weights, record.weights)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    # The extra forward of the part leaves no mark on the running statistics: one update, the whole batch's.
    for name, value in part.model.named_buffers():
        assert torch.allclose(value, dict(exact.model.named_buffers())[name]), name
        assert not torch.equal(value, before[name]) or "usage" in name


def test_flat_views_keep_shapes_strides_and_values():
    torch.manual_seed(0)
    model = build_model("vae", SHAPE, "tanh", OPTIONS["vae"]).to(memory_format=torch.channels_last)
    before = {k: (v.detach().clone(), v.stride()) for k, v in model.named_parameters()}
    own = [p for params in model.task_parameters().values() for p in params]
    flat = FlatParameters(model.shared_parameters(), own, align=7)
    assert flat.n_shared % 7 == 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.stride() == before[name][1]
        assert p.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
        assert p.grad.untyped_storage().data_ptr() == flat.grad.untyped_storage().data_ptr()
    rows = Rows(flat, 3)
    rows.resize([0, 2])
    rows.views[1][0].fill_(1)
    assert rows.rows[0].abs().sum() == 0
    assert rows.rows[1].sum() == rows.views[1][0].numel()
    assert torch.equal(rows.spread_rows()[[0, 2]], rows.rows)
    assert rows.spread_rows()[1].abs().sum() == 0


def test_bf16_gradients_are_near_and_losses_float32():
    x = images(64)
    for arch in ("vae", "vq_vae"):
        full, half = step(arch), step(arch, precision=Precision("bf16", torch.device("cpu")))
        a, record = gradient(full, x)
        b, record_half = gradient(half, x)
        assert record_half.losses.dtype == torch.float32
        # bfloat16 keeps 8 bits: a few percent after some layers, and never nothing.
        assert 1e-4 < relative(b, a) < 0.2
        assert relative(record_half.losses, record.losses) < 0.05


def test_fp16_s_scale_does_not_choose_the_objectives_and_overflow_skips():
    device = torch.device("cpu")
    x = images(32)
    small, large = (step(precision=Precision("fp16", device)) for _ in range(2))
    small.precision.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    large.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    a, record = gradient(small, x)
    b, record_large = gradient(large, x)
    assert relative(b / 2**12, a / 64) < 0.05
    assert relative(record_large.weights, record.weights) < 0.05
    assert relative(record_large.norms, record.norms) < 0.05
    optimizer = torch.optim.Adam(large.model.parameters(), lr=0.1, fused=True)
    large.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    gradient(large, x)
    before = large.flat.data.clone()
    large.precision.unscale_gradients(optimizer)
    large.precision.scaler.step(optimizer)
    large.precision.scaler.update()
    assert torch.equal(large.flat.data, before)
    assert large.precision.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_first_step_that_overflows_in_fp16_leaves_the_optimizer_new(name):
    results = []
    for overflows in (True, False):
        parameter = torch.nn.Parameter(torch.ones(1000))
        optimizer = make_optimizer(OptimizerConfig(optimizer=name, lr=0.1), [parameter])
        precision = Precision("fp16", torch.device("cpu"))
        gradients = [torch.full((1000,), torch.inf)] if overflows else []
        for gradient in [*gradients, torch.ones(1000), -3 * torch.ones(1000)]:
            parameter.grad = precision.scale(gradient)
            precision.unscale_gradients(optimizer)
            precision.scaler.step(optimizer)
            precision.scaler.update()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="--precision tf32 is CUDA's"):
        Precision("tf32", torch.device("cpu"))


@pytest.mark.parametrize("arch", ["vae", pytest.param("vq_vae", marks=pytest.mark.slow)])
def test_the_compiled_step_is_the_eager_step_in_one_graph(arch):
    before = graph_counters()
    eager, compiled = step(arch), step(arch, compile_mode="default")
    whole, padded = torch.ones(16), (torch.arange(16) < 10) * 1.6
    for number, share in enumerate((whole, whole, padded)):
        x = images(16) + 0.01 * number
        a, record = gradient(eager, x, number, share)
        b, record_compiled = gradient(compiled, x, number, share)
        assert relative(b, a) < 1e-5
        assert relative(record_compiled.losses, record.losses) < 1e-5
        compiled.model.eval()  # an evaluation between steps
        with torch.no_grad():
            compiled.model(x[:5])
        compiled.model.train()
    after = graph_counters()
    assert after["graphs"] - before["graphs"] == 1
    assert after["graph_breaks"] == before["graph_breaks"]
    for name, value in compiled.model.named_buffers():
        assert torch.allclose(value, dict(eager.model.named_buffers())[name], rtol=1e-4), name
