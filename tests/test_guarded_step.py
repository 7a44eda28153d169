"""Adamax, steps that are left out, and the average of the weights, against loops written out."""

import copy
import itertools

import pytest
import torch
from torch import nn

from movae_fast.aggregation.registry import aggregator_state, make_aggregator
from movae_fast.aggregation.weightings import Sum
from movae_fast.models import build_model
from movae_fast.objectives import LossVector
from movae_fast.training import checkpoint
from movae_fast.training.average import WeightAverage
from movae_fast.training.build import load_model
from movae_fast.training.config import OptimizerConfig
from movae_fast.training.flat import FlatParameters
from movae_fast.training.guarded_step import StepGuard
from movae_fast.training.logs import read_lines
from movae_fast.training.optim import Adamax, forget_state, lr_factor, make_optimizer
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import TrainStep
from movae_fast.training.world import World
from tests.host_reads import NoHostRead

CPU = torch.device("cpu")
SHAPE = (1, 16, 16)


def gradients(steps, seed=0, size=40):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 1, size)
    return [torch.randn(size, generator=generator) * scales for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 3e-4, 0.5])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamax_is_torchs_and_the_paper_s(decay, eps):
    """Torch's own for 50 steps, and the formulas in float64."""
    start = torch.linspace(-1, 1, 40)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": eps, "weight_decay": decay}
    a, b = Adamax([ours], **options), torch.optim.Adamax([theirs], foreach=False, **options)
    p, m, u = start.double(), torch.zeros(40).double(), torch.zeros(40).double()
    for t, g in enumerate(gradients(50), 1):
        ours.grad, theirs.grad = g.clone(), g.clone()
        a.step()
        b.step()
        g = g.double() + decay * p
        m, u = 0.9 * m + 0.1 * g, torch.maximum(0.99 * u, g.abs() + eps)
        p = p - 0.01 / (1 - 0.9**t) * m / u
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.detach().double(), p, rtol=1e-5, atol=1e-5)
    state = a.state_dict()["state"][0]
    for name, value in b.state_dict()["state"][0].items():  # one reads the other's
        torch.testing.assert_close(state[name], value.to(state[name]), rtol=1e-5, atol=1e-7)


def test_adamax_s_state_is_loaded_and_forgotten():
    def run(optimizer, parameter, steps):
        for g in steps:
            parameter.grad = g.clone()
            optimizer.step()

    steps = gradients(6)
    whole, half = (nn.Parameter(torch.ones(40)) for _ in range(2))
    a, b = Adamax([whole]), Adamax([half])
    run(a, whole, steps)
    run(b, half, steps[:3])
    c = Adamax([half])
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    run(c, half, steps[3:])
    assert torch.equal(whole, half)
    forget_state(c)
    fresh = nn.Parameter(half.detach().clone())
    run(c, half, steps)
    run(Adamax([fresh]), fresh, steps)
    assert torch.equal(half, fresh)


OPTIMIZERS = ("adam", "adamw", "adamax", "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e3])
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_left_out_is_a_step_that_never_was(name, bad, at):
    """Moments and step count too: the steps after it are those of a run without it."""
    results = []
    for skips in (True, False):
        parameter = nn.Parameter(torch.ones(40))
        optimizer = make_optimizer(OptimizerConfig(optimizer=name, lr=0.1, weight_decay=0.1), [parameter])
        guard = StepGuard(optimizer, nn.Module(), 100.0, World())
        todo = gradients(5)
        if skips:
            todo.insert(at, torch.full((40,), bad))
        left_out = []
        for g in todo:
            parameter.grad = g.clone()
            guard.begin()
            with NoHostRead():
                guard.judge(g.norm(), torch.ones(2))
                optimizer.step()
                left_out.append(guard.end())
        assert [int(v) for v in left_out] == [int(skips and i == at) for i in range(len(todo))]
        results.append((parameter.detach(), optimizer.state_dict()["state"]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def train_step(name="adam", agg="sum", arch="vae", seed=0, **options):
    torch.manual_seed(seed)
    model = build_model(arch, SHAPE, "sigmoid", {"latent_dim": 4, "hidden_dims": [8, 8]})
    losses = LossVector(model, [1.0] * len(model.objectives), "gaussian", "mean", n_data=64)
    if agg == "sum":
        aggregator = Sum() if options.get("step_metric") else None
    else:
        aggregator = make_aggregator(agg, len(losses.active))
    return TrainStep(
        model,
        losses,
        aggregator,
        make_optimizer(OptimizerConfig(optimizer=name), model.parameters()),
        **options,
    )


def batch(step, i):
    generator = torch.Generator().manual_seed(i)
    noise = step.model.draw_noise(8).map(lambda draw: torch.randn(draw.shape, generator=generator))
    return torch.rand(8, *SHAPE, generator=generator), noise


def everything(step):
    """What a step changes: parameters, buffers, optimizer, average."""
    state = step.optimizer.state_dict()["state"]
    values = [v for entry in state.values() for v in entry.values()]
    average = [] if step.average is None else [step.average.values]
    return [v.clone() for v in (step.flat.data, *step.model.buffers(), *values, *average)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"agg": "upgrad", "max_grad_norm": 0.1},
        {"agg": "upgrad", "accumulate": 2},
        {"agg": "upgrad", "step_metric": "identity"},
        {"step_metric": "optimizer"},
        {"agg": "upgrad", "gramian_at": "features"},
    ],
    ids=str,
)
def test_a_bad_batch_leaves_no_mark(name, options):
    """One image of NaN, or huge: nothing changes, BatchNorm's statistics and the average included."""
    if name == "sgd" and options.get("step_metric") == "optimizer":
        pytest.skip("sgd has no metric")
    step = train_step(name, skip_grad_norm=50.0, ema_decay=0.9, **options)
    for i in range(3):
        record = step(*swapped(batch(step, i), i), log=True)
        assert record.skipped == 0
    for bad in (torch.nan, 1e4, torch.inf):
        before = everything(step)
        x, noise = batch(step, 7)
        x[3] = bad
        assert step(x, 3, noise, log=True).skipped == 1
        for a, b in zip(everything(step), before, strict=True):
            assert torch.equal(a, b)
    before = step.flat.data.clone()
    assert step(*swapped(batch(step, 8), 3)).skipped == 0
    assert (step.flat.data != before).any()
    assert step.flat.data.isfinite().all()


def swapped(data, i):
    x, noise = data
    return x, i, noise


def test_a_clipped_step_that_overflows_in_fp16_leaves_no_nan_between_the_parameters():
    """Nothing writes there again: one norm of NaN would be the norm of every step after it."""
    precision = Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    step = train_step(max_grad_norm=0.1, precision=precision)
    x, noise = batch(step, 0)
    before = step.flat.data.clone()
    step(x * torch.nan, 0, noise)
    assert torch.equal(step.flat.data, before)
    for buffer in step.model.buffers():
        buffer.nan_to_num_()
    step(x, 1, noise)
    assert step.flat.data.isfinite().all()
    assert not torch.equal(step.flat.data, before)


@pytest.mark.parametrize("agg", ["crmogm", "excess_mtl", "fairgrad", "nash_mtl", "gradvac", "graddrop"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_aggregators_on_the_host_do_not_see_what_is_left_out(agg, precision):
    """Some raise, and some remember a NaN: of a step that overflows in fp16 as of one that is skipped."""
    guard = {} if precision == "fp16" else {"skip_grad_norm": 1e6}
    step = train_step(agg=agg, precision=Precision(precision, CPU), **guard)
    step.max_grad_norm = 1.0
    if precision == "fp16":
        step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step(*swapped(batch(step, 0), 0))
    buffers = [buffer.clone() for buffer in step.model.buffers()]
    before, kept = step.flat.data.clone(), str(aggregator_state(step.aggregator))
    x, noise = batch(step, 1)
    record = step(x * torch.nan, 1, noise, log=True)
    assert torch.equal(step.flat.data, before)
    assert str(aggregator_state(step.aggregator)) == kept
    assert record.skipped == (precision == "fp32")
    for buffer, old in zip(step.model.buffers(), buffers, strict=True):
        buffer.copy_(old)
    assert step(x, 2, noise).skipped == 0
    assert step.flat.data.isfinite().all()
    assert not torch.equal(step.flat.data, before)


def test_weights_are_reused_behind_a_step_that_was_left_out():
    step = train_step(agg="nash_mtl", gramian_every=3, skip_grad_norm=1e6, max_grad_norm=1.0)
    x, noise = batch(step, 1)
    skipped = [int(step(x * (torch.nan if i == 3 else 1), i, noise).skipped) for i in range(6)]
    assert skipped == [0, 0, 0, 1, 0, 0]


def test_a_loss_that_is_not_finite_is_enough():
    """Where its gradient is finite all the same."""
    step = train_step(skip_grad_norm=1e30)
    term = step.losses.terms[0]
    step.losses.terms[0] = lambda b: term(b) + torch.inf
    before = everything(step)
    assert step(*swapped(batch(step, 0), 0)).skipped == 1
    assert torch.equal(before[0], step.flat.data)
    step.losses.terms[0] = term
    assert step(*swapped(batch(step, 0), 0)).skipped == 0


def test_the_threshold_is_of_the_norm_before_clipping():
    step = train_step(max_grad_norm=1e-3)
    x, noise = batch(step, 0)
    step.gradient(x, 0, noise)
    norm = float(step.flat.grad.norm())
    for factor, skipped in ((0.99, 1), (1.01, 0)):
        assert train_step(max_grad_norm=1e-3, skip_grad_norm=factor * norm)(x, 0, noise).skipped == skipped


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_s_scale_and_the_threshold_are_two_reasons(name):
    """An overflow halves the scale and is left out; a long gradient is left out and leaves the scale alone."""
    precision = Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    step = train_step(name, skip_grad_norm=50.0, ema_decay=0.9, precision=precision)
    assert step(*swapped(batch(step, 0), 0)).skipped == 0
    before = everything(step)
    x, noise = batch(step, 1)
    # A batch that is far too bright, in units that fp16 holds.
    assert step(x + 40, 1, noise).skipped == 1
    assert precision.scaler.get_scale() == 2.0**4
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    assert step(x, 1, noise).skipped == 1
    assert precision.scaler.get_scale() == 2.0**59
    for a, b in zip(everything(step), before, strict=True):
        assert torch.equal(a, b)


def test_an_overflow_in_fp16_leaves_the_average_alone_without_a_threshold():
    precision = Precision("fp16", CPU)
    step = train_step(ema_decay=0.5, precision=precision)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    step(*swapped(batch(step, 0), 0))
    before = step.average.values.clone()
    assert not torch.equal(before, step.flat.data)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    step(*swapped(batch(step, 1), 1))
    assert torch.equal(step.average.values, before)


@pytest.mark.parametrize("options", [{}, {"agg": "upgrad", "step_metric": "identity"}])
def test_the_average_is_the_loop_s(options):
    """In float64, of the parameters after each step, its projection included."""
    step = train_step("adamax", ema_decay=0.8, **options)
    expected = step.flat.data.double()
    for i in range(12):
        step(*swapped(batch(step, i), i))
        expected = 0.8 * expected + 0.2 * step.flat.data.double()
    torch.testing.assert_close(step.average.values.double(), expected, rtol=1e-5, atol=1e-6)
    own = step.flat.data.clone()
    with step.average.in_place():
        assert torch.equal(step.flat.data, step.average.values)
    assert torch.equal(step.flat.data, own)
    with pytest.raises(KeyError), step.average.in_place():
        raise KeyError
    assert torch.equal(step.flat.data, own)


def test_an_average_is_saved_by_names_whatever_the_layout():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Conv2d(2, 2, 3)
            self.c = self.a
            self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    model = Tied().to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    one = WeightAverage(FlatParameters(trained, []), 0.5)
    one.flat.data.normal_()
    one.update()
    state = one.state_dict(model)
    assert set(state) == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"}
    other = WeightAverage(FlatParameters(trained[2:], trained[:2], align=3), 0.5)
    other.load_state_dict(model, state)
    for name, value in other.state_dict(model).items():
        assert torch.equal(value, state[name])


def test_a_run_shows_exports_and_resumes_its_average(train, tmp_path, monkeypatch):
    flags = [
        "--epochs 3",
        "--optimizer adamax",
        "--lr 0.01",
        "--ema_decay 0.9",
        "--skip_grad_norm 1e6",
        "--log_every 1",
        "--scheduler epoch_cosine",
        "--warmup_epochs 1",
    ]
    folder = train(*flags, f"--export {tmp_path / 'weights.pt'}")
    content = checkpoint.load(folder / "checkpoints" / "last.pt")
    average, own = content["average"], content["model"]
    assert any(not torch.equal(average[k], own[k]) for k in average)
    exported = checkpoint.load(tmp_path / "weights.pt")["model"]
    _, model = load_model(folder, CPU)
    for name, value in model.state_dict().items():
        expected = average.get(name, own[name])
        assert torch.equal(value, expected)
        assert torch.equal(exported[name], expected)
    # The evaluation at the end was of the average.
    lines = read_lines(folder / "metrics.jsonl")
    train_alike = train(*flags[:-1], "--warmup_epochs 1", "--eval_freq 0")
    assert read_lines(train_alike / "metrics.jsonl")[-1]["test/loss"] == lines[-1]["test/loss"]
    without = train(*(f for f in flags if "ema" not in f))
    assert read_lines(without / "metrics.jsonl")[-1]["test/loss"] != lines[-1]["test/loss"]
    weights = checkpoint.load(without / "checkpoints" / "last.pt")["model"]
    assert all(torch.equal(weights[k], own[k]) for k in own)  # an average touches nothing


def test_skipped_steps_are_counted_and_the_run_goes_on(train, monkeypatch):
    """A window's means are of the losses that are numbers; the first two steps have a window each here."""
    call, number = TrainStep.__call__, itertools.count()

    def poisoned(self, images, step, noise, *rest):
        n = next(number)
        return call(self, images * (torch.nan if n in (1, 4) else 1), step, noise, *rest)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    folder = train("--epochs 3", "--log_every 2", "--skip_grad_norm 1e9")
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/lr" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 0, 1, 0, 0, 0]
    means = [line.get("train/reconstruction") for line in lines]
    assert means.pop(1) is None  # its one step was left out
    assert all(mean > 0 for mean in means)
    number = itertools.count(1)
    train("--epochs 3", status=1)  # without the flag a loss that is NaN stops the run


def test_a_run_that_leaves_out_every_step_says_so(train, capsys):
    train("--epochs 2", "--skip_grad_norm 1e-9")
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: all 3 steps so far were left out and nothing is trained" in said
    assert "steps left out (skip_grad_norm) │ 6" in said
    train("--epochs 1", "--skip_grad_norm 1e9")
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_skips_and_averages_resumes_bit_for_bit(train, monkeypatch):
    flags = ["--epochs 2", "--ema_decay 0.9", "--skip_grad_norm 0.4", "--optimizer adamax", "--log_every 4"]
    flags += ["--batch_size 20", "--precision fp16", "--checkpoint_every 6"]
    whole = train(*flags)
    half = train(*flags, "--steps 6")
    assert sum(line.get("train/skipped_steps", 0) for line in read_lines(whole / "metrics.jsonl")) > 0
    train(f"--resume {half}", "--steps 0")
    a, b = (checkpoint.load(f / "checkpoints" / "last.pt") for f in (whole, half))
    for section in ("model", "optimizer", "average", "scaler"):
        assert checkpoint.digest(a[section]) == checkpoint.digest(b[section])


def test_epoch_cosine_warms_up_by_steps_and_ends_in_the_last_epoch():
    """torch's schedule of period epochs - warm-up - 1, stepped after each epoch behind the warm-up."""
    config = OptimizerConfig(lr=2.0, scheduler="epoch_cosine", scheduler_lr_min=0.02, warmup_epochs=2)
    factor = lr_factor(config, 8 * 3, 3)
    rates = [2.0 * factor(s) for s in range(24)]
    assert rates[:6] == pytest.approx([2.0 * (s + 1) / 6 for s in range(6)])
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8 - 2 - 1, eta_min=0.02)
    for epoch in range(2, 8):
        if epoch > 2:
            optimizer.step()
            schedule.step()
        assert rates[3 * epoch : 3 * epoch + 3] == pytest.approx(3 * [optimizer.param_groups[0]["lr"]])
    assert rates[-1] == pytest.approx(0.02)
    short = lr_factor(OptimizerConfig(scheduler="epoch_cosine", warmup_steps=5), 6, 3)  # no epoch is left
    assert [short(s) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ema_decay 1", "--ema_decay 1.0 must be at least 0 and below 1"),
        ("--skip_grad_norm -1", "--skip_grad_norm -1.0 must be zero or more"),
        ("--optimizer lamb --skip_grad_norm 5", "lamb counts its steps on the host"),
        ("--scheduler epoch_cosine --scheduler_per epoch", "leave out --scheduler_per"),
    ],
)
def test_settings_that_cannot_be_are_said(train, capsys, flags, said):
    train(*(f"--{f.strip()}" for f in flags.split("--")[1:]), status=2)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
