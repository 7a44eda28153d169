"""The progressive ladder: its layers, its stages, what fades, what resumes."""

import json
import math
import signal

import imageio.v3 as iio
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from movae_fast.cli import main
from movae_fast.evaluation.sampling import ladder_traversals
from movae_fast.models import Noise, build_model
from movae_fast.objectives import LossVector
from movae_fast.run_pictures import traversal_caption
from movae_fast.schedules import Capacity, LossSchedule, Stages
from movae_fast.training import checkpoint
from movae_fast.training.compiled import graph_counters
from movae_fast.training.config import OptimizerConfig
from movae_fast.training.logs import read_lines
from movae_fast.training.optim import forget_state, make_optimizer
from movae_fast.training.stages import apply_stage
from movae_fast.training.train_step import Gradient, TrainStep

SMALL = {"latent_dim": 2, "num_ladders": 3, "hidden_dim": 6, "fc_dim": 10}
FLAGS = (
    "--arch provlae --dataset sprites --image_size 32 --latent_dim 2 --hidden_dims null --hidden_dim 4 "
    "--fc_dim 8 --num_ladders 3 --recons_dist bernoulli --batch_size 20 --limit_train 200 --steps 5 "
    "--fade_in_duration 4 --beta 2 --coff 0.25"
)


def ladder(arch="provlae", shape=(1, 32, 32), **options):
    model = build_model(arch, shape, "sigmoid", SMALL | options)
    # BatchNorms that have seen data, so that evaluation is not the identity.
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, *shape))
    return model


def conv(a, b, k):
    return a * b * k * k + b + 2 * b  # with BatchNorm


def linear(a, b):
    return a * b + b + 2 * b


@pytest.mark.parametrize(
    ("shape", "rungs"), [((1, 64, 64), 3), ((3, 64, 64), 4), ((1, 28, 28), 2), ((3, 48, 48), 1)]
)
def test_the_networks_layers_at_any_size(shape, rungs):
    model = build_model("provlae", shape, "sigmoid", {"num_ladders": rungs})
    channels, size, _ = shape
    target = 2 ** math.ceil(math.log2(size))
    count = conv(channels, 32, 4) + (rungs - 1) * conv(32, 32, 4)
    for i in range(rungs):
        side = target // 2 ** (i + 2)
        count += conv(32, 32, 4) + linear(32 * side * side, 256) + 256 * 6 + 6
        count += linear(3, 256) + linear(256, 32 * side * side)
    count += (rungs - 1) * (conv(64, 32, 3) + conv(32, 32, 3))
    # Rung 1's map has a quarter of the side: with a join one doubling is left, without it two.
    count += (1 if rungs > 1 else 2) * conv(32, 32, 3) + 32 * channels * 9 + channels
    assert sum(p.numel() for p in model.parameters()) == count
    out = model(torch.rand(2, *shape))
    assert out.preactivation.shape == (2, *shape)
    assert out.mu.shape == (2, 3 * rungs)
    assert model.objectives == ("reconstruction", *(f"kl_{i + 1}" for i in range(rungs)))


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((1, 28, 28), {"latent_dim": 2}, 3_630_417),
        ((1, 32, 32), {"latent_dim": 2}, 3_630_417),
        ((3, 64, 64), {}, 14_053_019),
        ((3, 64, 64), {"hidden_dim": 64}, 28_387_355),
    ],
)
def test_the_ports_network_has_its_parameters(shape, options, count):
    model = build_model("provlae", shape, "sigmoid", {"ladder_net": "port"} | options)
    assert sum(p.numel() for p in model.parameters()) == count
    target = 2 ** math.ceil(math.log2(shape[1]))
    sides = [generator[-1].unflattened_size[1] for generator in model.generators]
    assert sides == [target // 2, target // 4, target // 8]
    out = model(torch.rand(2, *shape))
    assert out.preactivation.shape == (2, *shape)


@pytest.mark.parametrize("rungs", [1, 2, 4])
@pytest.mark.parametrize("net", ["authors", "port"])
def test_either_network_has_any_number_of_rungs(net, rungs):
    model = build_model("provlae", (3, 48, 48), "sigmoid", SMALL | {"ladder_net": net, "num_ladders": rungs})
    assert model(torch.rand(2, 3, 48, 48)).preactivation.shape == (2, 3, 48, 48)


def test_the_ports_stages_begin_at_the_least_abstract_rung():
    model = ladder(ladder_net="port").eval()
    z = torch.randn(4, 6)
    for stage in (1, 2, 3):
        model.set_stage(stage)
        assert model.active.tolist() == [1.0] * stage + [0.0] * (3 - stage)
        later = torch.cat([z[:, : 2 * stage], torch.randn(4, 6 - 2 * stage)], 1)
        assert torch.equal(model.decode(z), model.decode(later))  # rungs to come change nothing
        newest = z.clone()
        newest[:, 2 * stage - 2 : 2 * stage] += 1
        assert not torch.equal(model.decode(z), model.decode(newest))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_of_the_port_begins_where_the_last_one_ended(stage):
    model = ladder(ladder_net="port").eval()
    x, noise = torch.rand(5, 1, 32, 32), Noise(torch.randn(5, 6))
    model.set_stage(stage - 1)
    before = model(x, noise)
    model.set_stage(stage, alpha=0.0)
    after = model(x, noise)
    assert torch.equal(after.preactivation, before.preactivation)
    known = 2 * (stage - 1)  # latents of the rungs that were active
    assert torch.equal(after.mu[:, :known], before.mu[:, :known])
    model.set_stage(stage, alpha=0.5)
    assert not torch.equal(model(x, noise).mu[:, known : known + 2], before.mu[:, known : known + 2])


def test_the_port_trains_its_rungs_in_order(train):
    folder = train(f"{FLAGS} --ladder_net port --agg upgrad")
    kept = {f"stage_{s}": checkpoint.load(folder / "checkpoints" / f"stage_{s}.pt")["model"] for s in (1, 2, 3)}
    fresh = kept["stage_1"]["generators.2.0.0.weight"]
    assert torch.equal(
        kept["stage_2"]["generators.2.0.0.weight"], fresh
    )  # nothing reaches rung 3 before stage 3
    assert not torch.equal(kept["stage_3"]["generators.2.0.0.weight"], fresh)
    assert not torch.equal(
        kept["stage_2"]["generators.1.0.0.weight"], kept["stage_1"]["generators.1.0.0.weight"]
    )


def test_more_rungs_than_the_image_allows():
    with pytest.raises(ValueError, match="--num_ladders 5: images of side 64 allow at most 4"):
        build_model("provlae", (1, 64, 64), "sigmoid", {"num_ladders": 5})
    with pytest.raises(ValueError, match="side 8 allow at most 1"):
        build_model("provlae", (1, 8, 8), "sigmoid", {"num_ladders": 2})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_begins_where_the_last_one_ended(stage, training):
    model = ladder().train(training)
    x, noise = torch.rand(5, 1, 32, 32), Noise(torch.randn(5, 6))
    model.set_stage(stage - 1)
    before = model(x, noise)
    model.set_stage(stage, alpha=0.0)
    after = model(x, noise)
    assert torch.equal(after.preactivation, before.preactivation)
    seen = 2 * (3 - (stage - 1))  # latents of the rungs that were active
    assert torch.equal(after.mu[:, seen:], before.mu[:, seen:])
    assert torch.equal(after.logvar[:, seen:], before.logvar[:, seen:])
    model.set_stage(stage, alpha=0.5)
    half = model(x, noise)
    assert not torch.equal(half.preactivation, before.preactivation)
    assert not torch.equal(half.mu[:, seen - 2 : seen], before.mu[:, seen - 2 : seen])


def test_the_last_stage_with_alpha_one_is_the_plain_ladder():
    model, plain = ladder().eval(), ladder("vlae").eval()
    assert not plain.progressive
    plain.load_state_dict(model.state_dict())
    model.set_stage(3, alpha=1.0)
    x, noise = torch.rand(5, 1, 32, 32), Noise(torch.randn(5, 6))
    for a, b in zip(model(x, noise)[:4], plain(x, noise)[:4], strict=True):
        assert torch.equal(a, b)


def test_latents_of_rungs_not_yet_active_change_nothing():
    model = ladder().eval()
    z = torch.randn(4, 6)
    model.set_stage(1)
    other = torch.cat([torch.randn(4, 4), z[:, 4:]], 1)
    assert torch.equal(model.decode(z), model.decode(other))
    model.set_stage(2)
    assert not torch.equal(model.decode(z), model.decode(other))


def losses_of(model, beta=2.0, **options):
    weights = [1.0] + [beta] * model.num_ladders
    return LossVector(model, weights, "bernoulli", "sum", n_data=100, **options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_reach_inactive_rungs_through_the_pre_kl_only(stage):
    model = ladder()
    losses = losses_of(model)
    stages = Stages(1, 3, steps=10, fade_in=0, pre_kl=0.5)
    step = (stage - 1) * 10 + 3
    apply_stage(stages, step, model, losses)
    x = torch.rand(6, 1, 32, 32)
    values = losses(model(x), x)
    for rung in range(3):
        head = list(model.heads[rung].parameters())
        own = list(model.generators[rung].parameters())
        active = rung >= 3 - stage
        found = torch.autograd.grad(values[0], [*head, *own], retain_graph=True)
        assert any(bool(g.any()) for g in found[:2]) is active
        assert any(bool(g.any()) for g in found[2:]) is active
        (kl,) = torch.autograd.grad(values[1 + rung], head[:1], retain_graph=True)
        assert bool(kl.any())
        others = [values[1 + k] for k in range(3) if k != rung]
        assert not bool(torch.autograd.grad(sum(others), head[:1], retain_graph=True)[0].any())
    assert losses.weights_at(step).tolist() == [1.0] + [2.0 if r >= 3 - stage else 0.5 for r in range(3)]
    apply_stage(Stages(1, 3, 10, 0, pre_kl=0.0), step, model, losses)
    assert losses.weights_at(step).tolist() == [1.0] + [2.0 if r >= 3 - stage else 0.0 for r in range(3)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_each_stages_loss_recomputed(stage, reduction):
    model = ladder()
    beta, coff, n = 4.0, 0.3, 6
    losses = LossVector(model, [1.0, beta, beta, beta], "bernoulli", reduction, n_data=100)
    stages = Stages(1, 3, steps=10, fade_in=8, pre_kl=coff)
    step = (stage - 1) * 10 + 3
    apply_stage(stages, step, model, losses)
    assert float(model.alpha) == (1.0 if stage == 1 else 3 / 8)
    x = torch.rand(n, 1, 32, 32)
    out = model(x, Noise(torch.randn(n, 6)))
    gradient = TrainStep(model, losses, None)
    total = (torch.stack(losses(out, x)) * losses.weights_at(step)).sum()
    assert gradient.m == 4
    p = torch.sigmoid(out.preactivation.double())
    entropy = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / n
    prior = Normal(torch.zeros(n, 2, dtype=torch.float64), 1.0)
    expected = entropy if reduction == "sum" else entropy / 1024
    for rung in range(3):
        mu, sigma = (v[:, 2 * rung : 2 * rung + 2].double() for v in (out.mu, (out.logvar / 2).exp()))
        kl = kl_divergence(Normal(mu, sigma), prior).sum() / n
        kl = kl if reduction == "sum" else kl / 2
        expected = expected + kl * (beta if rung >= 3 - stage else coff)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_encoder_and_decoder_by_hand():
    """The forward pass written out once more, at stage 2 with alpha 0.25."""
    model = ladder().eval()
    model.set_stage(2, 0.25)
    x = torch.rand(3, 1, 32, 32)
    mu, logvar = model.encode(x)
    h1 = model.blocks[0](x)
    h2 = model.blocks[1](h1)
    h3 = model.blocks[2](h2)
    read = [model.heads[0](model.rungs[0](h1)), model.heads[1](model.rungs[1](0.25 * h2))]
    read.append(model.heads[2](model.rungs[2](h3)))
    torch.testing.assert_close(mu, torch.cat([r[:, :2] for r in read], 1))
    torch.testing.assert_close(logvar, torch.cat([r[:, 2:] for r in read], 1).clamp(max=3))
    z = torch.randn(3, 6)
    y = model.generators[2](z[:, 4:])
    y = F.interpolate(y, scale_factor=2)
    y = model.ups[1](
        F.interpolate(model.joins[1](torch.cat([y, 0.25 * model.generators[1](z[:, 2:4])], 1)), scale_factor=2)
    )
    y = model.ups[0](F.interpolate(model.joins[0](torch.cat([y, torch.zeros(3, 6, 8, 8)], 1)), scale_factor=2))
    y = model.out(model.finish[0](F.interpolate(y, scale_factor=2)))
    torch.testing.assert_close(model.decode(z), y)


def test_annealing_and_capacity_leave_the_pre_kl_alone():
    model = ladder()
    losses = losses_of(model, schedule=LossSchedule(0, lambda step: 0.5, Capacity(10.0, 100)))
    apply_stage(Stages(1, 3, 10, 0, pre_kl=0.25), 15, model, losses)
    losses.set_step(15)
    assert losses.weights_at(15).tolist() == [1.0, 0.25, 1.0, 1.0]
    assert float(losses.capacity) == pytest.approx(1.5)
    x = torch.rand(4, 1, 32, 32)
    out = model(x)
    plain = losses_of(model)(out, x)
    found = losses(out, x)
    assert torch.equal(found[1], plain[1])
    for k in (2, 3):
        torch.testing.assert_close(found[k], (plain[k] - 1.5).abs())
    losses.weights_at(5000)
    assert float(losses.capacity) == pytest.approx(1.5)  # reading weights moves nothing
    losses.set_step(5000)
    assert float(losses.capacity) == 10.0


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb", "diffgrad", "madgrad"])
def test_an_optimizer_that_forgets_steps_like_a_new_one(name):
    def new(p):
        return make_optimizer(OptimizerConfig(name, lr=0.1, weight_decay=0.01), [p])

    def steps(optimizer, p, n):
        for k in range(n):
            p.grad = torch.full_like(p, k + 1.0)
            optimizer.step()

    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    used = new(a)
    steps(used, a, 5)
    with torch.no_grad():
        a.fill_(1)
    forget_state(used)
    steps(used, a, 3)
    steps(new(b), b, 3)
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.ones(3))


def state_of(folder, name="last"):
    return checkpoint.load(folder / "checkpoints" / f"{name}.pt")


def test_all_stages_one_after_another(train):
    folder = train(FLAGS, "--log_every 1")
    for stage in (1, 2, 3):
        saved = state_of(folder, f"stage_{stage}")
        assert int(saved["model"]["stage"]) == stage
        assert saved["position"]["step"] == 5 * stage
        counts = {int(s["step"]) for s in saved["optimizer"]["state"].values()}
        assert counts == {5}  # new at each stage
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/stage" in line]
    assert [line["train/stage"] for line in lines] == [1] * 5 + [2] * 5 + [3] * 5
    assert [line["train/alpha"] for line in lines] == [1] * 5 + [0, 0.25, 0.5, 0.75, 1] * 2
    # Weights carry over: the trunk of stage 2 is not that of stage 1, nor a fresh one.
    assert not torch.equal(
        state_of(folder, "stage_1")["model"]["out.weight"], state_of(folder, "stage_2")["model"]["out.weight"]
    )


def test_a_stage_begins_with_weights_of_its_own(train, monkeypatch):
    found = []

    differentiate = TrainStep.differentiate

    def counted(self, kind, *inputs):
        found.append(kind.gradient)
        return differentiate(self, kind, *inputs)

    monkeypatch.setattr(TrainStep, "differentiate", counted)
    train(FLAGS, "--agg upgrad", "--gramian_every 2")
    rows, reused = Gradient.ROWS, Gradient.REUSED_WEIGHTS
    assert found == [rows, reused, rows, reused, rows] * 3


@pytest.mark.parametrize("name", ["lamb", "diffgrad", "madgrad"])
def test_other_optimizers_train_every_stage_and_resume(train, name):
    flags = (FLAGS, f"--optim {name}", "--lr 0.003", "--betas 0.8 0.99", "--eps 1e-5")
    through = train(*flags, "--compile_mode off", "--on_cudnn_benchmark False")
    part = train(*flags, "--compile_mode off", "--checkpoint_every 7")
    kept = state_of(part)
    assert checkpoint.digest(kept["model"]) == checkpoint.digest(state_of(through)["model"])
    assert all(bool(v.isfinite().all()) for v in kept["model"].values())
    # Continue stage 2's checkpoint as a run of its own.
    last = part / "checkpoints" / "last.pt"
    last.write_bytes((part / "checkpoints" / "stage_2.pt").read_bytes())
    train(f"--resume {part}")
    for section in ("model", "optimizer"):
        assert checkpoint.digest(state_of(part)[section]) == checkpoint.digest(kept[section]), section


@pytest.mark.parametrize("agg", ["sum", "upgrad"])
def test_resume_in_the_middle_of_a_fade_in_is_bit_exact(train, monkeypatch, agg):
    through = train(FLAGS, f"--agg {agg}", "--warmup_steps 2")
    call = TrainStep.__call__

    def stop_at_seven(self, x, step, *args):
        record = call(self, x, step, *args)
        if step == 6:  # of stage 2, alpha 0.25
            signal.raise_signal(signal.SIGTERM)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stop_at_seven)
        part = train(FLAGS, f"--agg {agg}", "--warmup_steps 2", status=143)
    saved = state_of(part)
    assert saved["position"]["step"] == 7
    assert float(saved["model"]["alpha"]) == 0.25
    train(f"--resume {part}")
    a, b = state_of(through), state_of(part)
    for section in ("model", "optimizer", "scheduler", "rng"):
        assert checkpoint.digest(a[section]) == checkpoint.digest(b[section]), section


def test_stages_trained_one_by_one(train, capsys):
    first = train(FLAGS, "--mode indep_train")
    assert int(state_of(first)["model"]["stage"]) == 1
    second = train(FLAGS, "--mode indep_train", "--train_seq 2", f"--init_from {first}")
    assert int(state_of(second)["model"]["stage"]) == 2
    assert state_of(second)["position"]["step"] == 5
    capsys.readouterr()
    train(FLAGS, "--mode indep_train", "--train_seq 3", f"--init_from {first}", status=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train_seq 4 --mode indep_train", "--train_seq 4: a ladder of 3 rungs has stages 1 to 3"),
        ("--train_seq 2 --mode indep_train", "starts from stage 1: name its run or checkpoint, --init_from"),
        ("--train_seq 2", "--train_seq is the stage of --mode indep_train"),
        ("--mode visualize", "--mode visualize draws a checkpoint"),
        ("--num_ladders 4", "--num_ladders 4: images of side 32 allow at most 3"),
        ("--batch_size 1", "normalises over the batch"),
        ("--betas 0.9", "give two numbers"),
        ("--eps 1e-8 --optim sgd", "--eps does not apply to sgd"),
        ("--chn_num 3", "--chn_num 3: sprites has 1"),
        ("--ratio 0", "--ratio 0.0 must be above 0"),
        ("--coff -1", "--coff -1.0 must be zero or more"),
        ("--use_capacity_increase", "weighs the KL by --gamma"),
        (
            "--arch vae --mode indep_train --hidden_dim null --fc_dim null --num_ladders null",
            "vae has no stages",
        ),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, message, tmp_path):
    status = main(["train", *FLAGS.split(), *flags.split(), "--exp_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_ladder(train, capsys):
    first = train(FLAGS, "--mode indep_train")
    capsys.readouterr()
    flags = ("--mode indep_train", "--train_seq 2", f"--init_from {first}")
    train(FLAGS.replace("--num_ladders 3", "--num_ladders 2"), *flags, status=2)
    assert main(["train", "--resume", str(first), "--steps", "50"]) == 2
    assert "the run has --steps 5; a resumed run keeps it" in capsys.readouterr().err


@pytest.mark.draws
def test_pictures_of_every_stage_and_of_a_checkpoint(train, capsys):
    folder = train(FLAGS)
    figures = folder / "figures"
    for stage in (1, 2, 3):
        for kind in ("input", "reconstructions", "traversal"):
            assert (figures / f"{kind}_stage_{stage}.png").stat().st_size > 200
        assert iio.imread(figures / f"traversal_stage_{stage}.gif").shape[0] == 10
    assert (figures / "ladder.png").stat().st_size > 1000
    for kind in ("input", "samples", "reconstructions", "traversal"):  # the end is drawn once, under two names
        (end,) = figures.glob(f"{kind}_epoch_*.png")
        assert end.samefile(figures / f"{kind}_stage_3.png")
    whole = (figures / "traversal_stage_3.gif").read_bytes()
    (figures / "traversal_stage_3.gif").unlink()  # killed between the two names
    assert main(["train", "--resume", str(folder)]) == 0
    assert (figures / "traversal_stage_3.gif").read_bytes() == whole
    capsys.readouterr()
    made = figures / "traversal_stage_2.gif"
    before = made.read_bytes()
    weights = folder / "checkpoints" / "stage_2.pt"
    assert main(["train", "--arch", "provlae", "--mode", "visualize", "--init_from", str(weights)]) == 0
    assert made.read_bytes() == before
    assert (figures / "traversal_stage_2-2.gif").read_bytes() == before
    meta = iio.immeta(made)
    assert meta["loop"] == 0
    assert meta["duration"] == 200
    other = train("--agg upgrad")
    assert main(["train", "--arch", "provlae", "--mode", "visualize", "--init_from", str(other)]) == 2
    assert "which is no ladder" in capsys.readouterr().err


def test_a_traversal_moves_one_latent_and_only_active_rungs():
    model = ladder().eval()
    model.set_stage(2)
    assert (
        traversal_caption(model, "run, step 4")
        == "each latent of a test image alone; stage 2 of 3; run, step 4"
    )
    values, images = ladder_traversals(model, torch.rand(1, 1, 32, 32), normalize=False)
    assert images.shape == (3, 2, 10, 1, 32, 32)
    assert (float(values[0]), float(values[-1])) == (-2.5, 2.5)
    assert bool((images[:2, :, 0] != images[:2, :, -1]).flatten(1).any(1).all())
    assert torch.equal(images[2], images[2, :1, :1].expand_as(images[2]))  # rung 1 is not active


def test_evaluate_a_ladder(train):
    folder = train(FLAGS)
    words = ["--metrics", "elbo,mig,objectives", "--samples", "200", "--limit_test", "60", "--device", "cpu"]
    assert main(["evaluate", str(folder), *words]) == 0
    record = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert len(record["rate_of_latents"]) == 6
    rate = sum(record["figures"][f"kl_{k}"] for k in (1, 2, 3))
    assert record["figures"]["rate"] == pytest.approx(rate, rel=1e-4)


@pytest.mark.slow
def test_three_stages_compile_once(train):
    before = graph_counters()
    train(FLAGS, "--agg upgrad", "--compile default", "--log_every 1")
    after = graph_counters()
    assert after["graphs"] - before["graphs"] == 1
    assert after["graph_breaks"] == before["graph_breaks"]
