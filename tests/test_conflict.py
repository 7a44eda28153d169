"""Without conflict, on every model: the trainer's own steps, judged by rows computed anew in float64."""

import copy
import os

import numpy as np
import pytest
import torch

from movae_fast.cli import parsing
from movae_fast.cli.train import conflict_rows
from movae_fast.models.buffers import keeping_buffers
from movae_fast.plots import loss_curves, pooled
from movae_fast.training import checkpoint
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.gradients import Batch
from movae_fast.training.logs import read_lines
from movae_fast.training.start import assemble
from movae_fast.training.telemetry import CONFLICT, conflict_metrics
from movae_fast.training.train_step import Gradient, TrainStep
from movae_fast.training.world import World

ARCHS = ("vae", "betatc_vae", "vq_vae", "mmd_vae", "provlae")
SMALL = {
    "vae": {"hidden_dims": [8, 16, 32], "latent_dim": 8},
    "betatc_vae": {"hidden_dims": [8, 16, 16], "latent_dim": 8},
    "vq_vae": {"hidden_dims": [16, 32], "embedding_dim": 16, "num_embeddings": 64, "num_residual_layers": 1},
    "mmd_vae": {"dim": 8, "dim_mults": [1, 2, 4], "latent_dim": 8},
    "provlae": {"hidden_dim": 8, "fc_dim": 32},
}


class Judge:
    """The trained model in float64 beside it: rows of the whole batch at the parameters before each step."""

    def __init__(self, run):
        self.run = run
        model = copy.deepcopy(run.model).double()
        losses = copy.copy(run.losses)
        aggregator = run.train_step.aggregator
        self.step = TrainStep(model, losses, aggregator, accumulate=1)

    def look(self, x, noise):
        """Take the parameters and the running statistics as they are now, and the rows there."""
        with torch.no_grad():
            pairs = zip(self.step.model.parameters(), self.run.model.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)
            for mine, theirs in zip(self.step.model.buffers(), self.run.model.buffers(), strict=True):
                mine.copy_(theirs)
        scale = self.run.losses.weights_at(self.run.step)[self.run.train_step.active]
        with keeping_buffers(self.step.model):
            self.step.fill_rows([Batch(x.double(), noise.map(torch.Tensor.double), None)], scale)
        self.before = [p.detach().clone() for p in self.run.train_step.flat.shared]

    def cosine(self, change):
        """The least cosine of a change of the shared parameters (theirs) with a row."""
        update = torch.cat([(c.double()).reshape(-1) for c in change])
        views = [torch.cat([v.reshape(-1) for v in row]) for row in self.step.rows.views]
        rows = torch.stack(views)
        inner = rows @ update / (rows.norm(dim=1) * update.norm()).clamp_min(1e-300)
        return float(inner.min())

    def gradient(self):
        return self.cosine([p.grad for p in self.run.train_step.flat.shared])

    def applied(self):
        shared = self.run.train_step.flat.shared
        return self.cosine([b - p.detach() for b, p in zip(self.before, shared, strict=True)])


def least_cosines(steps, data_dir="data", **flags):
    """Of each step: the gradient's and the applied change's least cosine with a row."""
    flags = {"image_size": 32, "batch_size": 16, "device": "cpu", "seed": 0, "limit_test": 16} | flags
    flags |= {"data_dir": data_dir, "download": False, "epochs": 100}
    config = TrainConfig.from_flat(flags | {"steps": steps // 3 if flags["arch"] == "provlae" else steps})
    validate(config)
    run = assemble(config, torch.device("cpu"), World())
    judge, gradient, applied = Judge(run), [], []
    run.model.train()
    while not run.finished:
        for x, _ in run.train_loader.epoch(run.epoch):
            run.begin_step()
            noise = run.noise(len(x))
            judge.look(x, noise)
            run.train_step(x, run.step, noise)
            gradient.append(judge.gradient())
            applied.append(judge.applied())
            run.step += 1
            if run.finished:
                break
        run.epoch += 1
    return np.array(gradient), np.array(applied)


@pytest.mark.parametrize("arch", ARCHS)
def test_forty_steps_of_strict_upgrad_and_of_the_projected_step(arch):
    flags = {"arch": arch, "dataset": "sprites", "limit_train": 640, "fade_in_duration": 4} | SMALL[arch]
    steps = 39 if arch == "provlae" else 40
    gradient, _ = least_cosines(steps, **flags, agg="upgrad")
    assert len(gradient) == steps
    assert (gradient >= CONFLICT).all(), gradient.min()
    _, applied = least_cosines(steps, **flags, agg="sum", conflict_free="step")
    assert (applied >= CONFLICT).all(), applied.min()
    metric = {"conflict_free": "step", "step_metric": "optimizer", "optimizer": "adamw"}
    _, applied = least_cosines(steps, **flags, agg="upgrad", **metric)
    assert (applied >= CONFLICT).all(), applied.min()


@pytest.mark.parametrize("arch", ["betatc_vae", "vq_vae"])
def test_the_judge_sees_what_torchjds_regularizer_and_adam_leave(arch):
    """The test above can fail: TorchJD's epsilons conflict, and so do steps that nothing projects."""
    flags = {"arch": arch, "dataset": "sprites", "limit_train": 640} | SMALL[arch]
    torchjd = {"upgrad_regularizer": "trace", "upgrad_norm_eps": 1e-4, "upgrad_reg_eps": 1e-4}
    gradient, applied = least_cosines(40, **flags, agg="upgrad", **torchjd)
    assert (gradient < CONFLICT).mean() > 0.1
    assert (applied < CONFLICT).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["sprites", "fashion_mnist"])
@pytest.mark.parametrize("arch", ARCHS)
def test_three_hundred_steps(arch, dataset):
    """The published networks at two learning rates; Fashion-MNIST where MOVAE_DATA names its folder."""
    data_dir = os.environ.get("MOVAE_DATA", "data")
    if dataset == "fashion_mnist" and not os.path.isdir(os.path.join(data_dir, "FashionMNIST")):
        pytest.skip("set MOVAE_DATA to the folder that holds FashionMNIST/")
    for lr in (1e-3, 1e-4):
        flags = {"arch": arch, "dataset": dataset, "lr": lr, "batch_size": 64, "fade_in_duration": 50}
        gradient, applied = least_cosines(300, data_dir, **flags, agg="upgrad")
        print(
            f"{arch} {dataset} lr {lr}: gradient {(gradient < CONFLICT).mean():.1%} ({gradient.min():+.4f}), "
            f"applied {(applied < CONFLICT).mean():.1%} ({applied.min():+.4f})"
        )
        assert (gradient >= CONFLICT).all()


def test_a_model_whose_objectives_do_not_reach_the_features_trains():
    """Of vq_vae only the codebook's objective: no row, nothing to project, nothing measured."""
    flags = {"arch": "vq_vae", "dataset": "digits", "image_size": 16, "hidden_dims": [8], "batch_size": 16}
    flags |= {"loss_weights": [0.0, 1.0, 0.0], "agg": "upgrad", "conflict_free": "step", "device": "cpu"}
    config = TrainConfig.from_flat(flags | {"steps": 2, "seed": 0, "limit_train": 64, "limit_test": 16})
    validate(config)
    run = assemble(config, torch.device("cpu"), World())
    x = torch.rand(16, 1, 16, 16)
    record = run.train_step(x, 0, run.noise(16), log=True)
    assert record.step_cosines.isnan().all()


# What is logged.


def test_a_line_says_how_many_measured_steps_conflict():
    nan = float("nan")
    cosines = torch.tensor([[0.5, -0.2, nan], [nan] * 3, [0.1, 0.2, 0.3], [-0.0005, 0.0, nan]])
    assert conflict_metrics(cosines, "train/") == {
        "train/conflict": pytest.approx(1 / 3),
        "train/min_cosine": pytest.approx(-0.2),
        "train/conflict_steps": 3,
    }
    assert conflict_metrics(cosines[1:2], "train/") == {}


@pytest.mark.parametrize(
    ("flags", "gradient", "applied"),
    [
        ("--agg upgrad", 3, 1),
        ("--agg sum", 1, 1),
        ("--agg upgrad --gramian_every 3", 1, 1),
        ("--agg upgrad --gramian_at features", 1, 1),
        ("--agg upgrad --gramian_batch 0.5 --accumulate 1", 1, 1),
        ("--agg config", 3, 1),
        ("--agg sum --conflict_free step", 3, 1),
        ("--agg config --conflict_free step", 3, 1),
    ],
)
def test_the_log_has_true_cosines_of_gradients_and_steps(train, flags, gradient, applied):
    """Three steps per line: the exact Gramian's at every step, an approximation's once, on the logged one."""
    folder = train(flags, "--epochs 3 --log_every 3 --optim adam")
    # The first step has a line of its own, and the line behind it two steps.
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/kl" in line and line["step"] > 3]
    assert lines
    for line in lines:
        # gramian_every's own steps are exact, too: every third, the logged one among them or not.
        assert gradient <= line["train/conflict_steps"] <= 3
        assert line["train/step_conflict_steps"] == applied
        least = min(line[f"train/step_cosine_{name}"] for name in ("reconstruction", "kl"))
        assert line["train/step_min_cosine"] == pytest.approx(least)
        if "--conflict_free step" in flags:
            assert least > CONFLICT
            assert line["train/step_conflict"] == 0
    report = conflict_rows(lines)
    assert [name for name, _, _ in report] == [
        f"update (gradient) in conflict, of {sum(line['train/conflict_steps'] for line in lines)} steps",
        f"applied step in conflict, of {applied * len(lines)} steps",
    ]


def test_an_approximations_logged_cosine_is_the_exact_one(train, monkeypatch):
    """The cosines of reused weights are those of the update with rows of this very batch."""
    seen = []
    differentiate = TrainStep.differentiate

    def checked(self, kind, batch, scale):
        record = differentiate(self, kind, batch, scale)
        if kind.log:
            update = self.flat.shared_grad.double()
            rows = self.rows.rows.double()
            true = rows @ update / (rows.norm(dim=1) * update.norm())
            torch.testing.assert_close(record.cosines.double(), true, rtol=1e-4, atol=1e-5)
            seen.append(kind.gradient)
        return record

    monkeypatch.setattr(TrainStep, "differentiate", checked)
    train("--agg upgrad --gramian_every 4 --log_every 1 --layer_norm none --epochs 2")
    train("--agg upgrad --gramian_at last:1 --log_every 1 --layer_norm none")
    train("--agg sum --log_every 1 --layer_norm none")
    assert set(seen) == {Gradient.ROWS, Gradient.REUSED_WEIGHTS, Gradient.CHEAP_GRAMIAN, Gradient.SUM}


def test_the_figure_has_a_panel_of_conflict(tmp_path):
    lines = [
        {"step": s, "train/kl": 1.0, "train/cos_kl": 0.1, "train/conflict": 0.2, "train/step_conflict": 0.4}
        for s in (1, 2)
    ]
    path = loss_curves(tmp_path / "curves.png", lines, ["kl"])
    without = loss_curves(tmp_path / "other.png", [{"step": 1, "train/kl": 1.0}], ["kl"])
    assert path.stat().st_size > without.stat().st_size


def test_a_point_of_conflict_is_the_fraction_over_ten_log_lines():
    """By hand: of lines with different numbers of measured steps, and of an old run's without a number."""
    key = "train/conflict"
    lines = [{"step": 1, key: 1.0, f"{key}_steps": 1}, {"step": 2}, {"step": 5, key: 0.5, f"{key}_steps": 4}]
    assert pooled(lines, key) == [(1, 1.0), (5, pytest.approx(3 / 5))]
    old = [{"step": k, key: float(k > 10)} for k in range(1, 16)]
    assert pooled(old, key)[9:] == [(10, 0.0), *((k, pytest.approx((k - 10) / 10)) for k in range(11, 16))]


def test_an_old_run_goes_on_with_its_regularizer(train):
    """Its configuration does not name one: the trace was the only one."""
    folder = train("--agg upgrad --steps 3")
    path = folder / "checkpoints" / "last.pt"
    record = checkpoint.load(path)
    del record["config"]["upgrad_regularizer"]
    record["telemetry"]["window"] = record["telemetry"]["window"][:, :4]
    path.unlink()
    checkpoint.save(path, record)
    train(f"--resume {folder} --steps 5")
    assert checkpoint.load(path)["config"]["upgrad_regularizer"] == "trace"


def test_an_old_runs_configuration_keeps_its_regularizer(tmp_path):
    """`--config RUN/config.yaml` of a run from before there were two; a file of a user's own is not touched."""
    kinds = parsing.flag_types(list(SECTIONS.values()))
    recorded = "upgrad_norm_eps: 0.0\nupgrad_reg_eps: 1.0e-06\n"
    for text, expected in {
        f"agg: upgrad\n{recorded}": "trace",
        f"agg: sum\n{recorded}": None,
        f"agg: upgrad\n{recorded}upgrad_regularizer: diagonal\n": "diagonal",
        "agg: upgrad\nupgrad_reg_eps: 1.0e-06\n": None,
    }.items():
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert parsing.read_config(str(path), kinds).get("upgrad_regularizer") == expected
