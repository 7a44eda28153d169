"""Whole runs through the command line on embedded data, in this process."""

import json
import math
import signal
import threading
import time

import pytest
import torch
import yaml

from movae_fast.cli import main
from movae_fast.cli.train import against_mean_image
from movae_fast.data import DATASETS
from movae_fast.training import checkpoint, loop
from movae_fast.training.build import load_model, loss_schedule
from movae_fast.training.compiled import graph_counters
from movae_fast.training.config import OptimizerConfig, TrainConfig
from movae_fast.training.logs import TIMING_KEYS, read_lines
from movae_fast.training.optim import lr_factor
from movae_fast.training.signals import Signals


def metrics_of(folder):
    """The metric lines without what the clock says."""
    return [
        {k: v for k, v in line.items() if k not in TIMING_KEYS} for line in read_lines(folder / "metrics.jsonl")
    ]


def weights_of(folder, name="last"):
    return checkpoint.load(folder / "checkpoints" / f"{name}.pt")["model"]


def same_weights(a, b):
    return all(torch.equal(v, weights_of(b)[k]) for k, v in weights_of(a).items())


@pytest.mark.draws
def test_a_run_leaves_what_it_promises(train):
    folder = train("--agg upgrad", "--epochs 2", "--save_freq 1")
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "checkpoints/epoch_0001.pt",
        "figures/samples_epoch_0002.png",
        "figures/reconstructions_epoch_0002.png",
        "figures/loss_curves.png",
    } <= names
    assert any(n.startswith("tensorboard/events") for n in names)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["agg"] == "upgrad"
    assert saved["seed"] == 3
    lines = read_lines(folder / "metrics.jsonl")
    first = lines[0]
    assert first["step"] == 1
    for objective in ("reconstruction", "kl"):
        for kind in ("", "weight_", "cos_", "grad_norm_"):
            assert math.isfinite(first[f"train/{kind}{objective}"])
    assert first["train/images_per_s"] > 0
    last = lines[-1]
    assert {"test/reconstruction", "test/kl", "test/loss", "test/mse", "test/mse_mean_image"} <= set(last)
    assert [line["step"] for line in lines if "test/mse" in line] == [3, 6]


def test_config_yaml_reproduces_the_run(train):
    first = train("--agg aligned_mtl", "--flip true", "--max_grad_norm 1")
    second = first.parent / "again"
    assert main(["train", "--config", str(first / "config.yaml"), "--exp_dir", str(second)]) == 0
    assert metrics_of(first) == metrics_of(second)


@pytest.mark.parametrize(("below", "warns"), [(1.1, True), (0.0, False)])
def test_a_collapsed_codebook_is_a_warning_after_the_first_epoch(train, capsys, monkeypatch, below, warns):
    assert loop.COLLAPSED == 0.02
    monkeypatch.setattr(loop, "COLLAPSED", below)
    flags = "--arch vq_vae --embedding_dim 4 --num_embeddings 8 --num_residual_layers 1 --hidden_dims 4 8"
    train(flags, "--latent_dim null", "--epochs 2")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the codebook has collapsed") == warns
    assert ("8 codes are in use at the end of the first epoch. Try a lower learning rate" in said) == warns


@pytest.mark.parametrize(
    "flags",
    [
        "--arch betatc_vae --recons_reduction sum --agg cagrad --agg_args.c 0.4",
        "--arch betatc_vae --tc_estimator mws --limit_test 65",  # the last test batch holds one image
        "--arch vq_vae --embedding_dim 4 --num_embeddings 8 --num_residual_layers 1 --agg upgrad",
        "--arch cnn_vae --dim 4 --coef_kl 20 --normalize --agg mgda",
        "--arch mmd_vae --dim 4 --mmd_alpha 0.5 --jacobian all --agg upgrad",
        "--arch torch_vae --max_filters 8 --recons_dist bernoulli --agg pcgrad --loader torch",
        "--arch dcgan_vae --max_filters 8 --agg config --optimizer sgd --scheduler cosine --warmup_steps 2",
        "--arch vae --agg nash_mtl --recons_dist laplacian --optimizer adamw --weight_decay 0.1",
        "--arch vae --agg gradvac --scheduler multi_step --scheduler_milestones 1 --loss_weights.kl 4",
        "--arch vae --agg upgrad --pref_weights 1 2 --beta 2 --dataset sprites --antialias",
    ],
)
def test_every_model_and_kind_of_aggregator_trains(train, flags):
    words = flags.split()
    model_only = ["--hidden_dims", "--latent_dim"]
    arch = words[words.index("--arch") + 1]
    drop = {"vq_vae": ["--latent_dim"], "cnn_vae": model_only[:1], "mmd_vae": model_only[:1]}
    drop |= {"torch_vae": model_only[:1], "dcgan_vae": model_only[:1]}
    nothing = [f"{flag} null" for flag in drop.get(arch, [])]
    folder = train(flags, *nothing)
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert math.isfinite(last["test/loss"])
    if arch == "vq_vae":
        assert 0 < last["test/codebook_usage"] <= 1
        assert 1 <= last["test/perplexity"] <= 8


def test_jd_sum_and_sum_are_the_same_run(train):
    a, b = train("--agg sum"), train("--agg jd_sum")
    assert same_weights(a, b)


def test_evaluating_more_often_changes_nothing(train):
    a = train("--epochs 3", "--eval_freq 1")
    b = train("--epochs 3", "--eval_freq 0", "--save_freq 1", "--checkpoint_every 2", "--log_every 1")
    assert same_weights(a, b)


def test_loaders_train_the_same_weights(train):
    runs = [train("--flip true", f"--loader {loader}") for loader in ("resident", "torch")]
    assert same_weights(*runs)
    assert metrics_of(runs[0]) == metrics_of(runs[1])


def test_seeds_differ_and_repeat(train):
    a, b, c = train("--seed 1"), train("--seed 1"), train("--seed 2")
    assert same_weights(a, b)
    assert not same_weights(a, c)


class StopAfter:
    """Sends this process a signal when a run has done `steps` steps."""

    def __init__(self, monkeypatch, steps, signum=signal.SIGTERM):
        original = loop.log_due

        def log_due(run, ahead=0):
            if run.step == steps and not ahead:
                signal.raise_signal(signum)
            return original(run, ahead)

        monkeypatch.setattr(loop, "log_due", log_due)


@pytest.mark.parametrize(
    ("loader", "flags"),
    [
        ("resident", "--agg upgrad"),
        ("torch", "--agg gradvac --scheduler cosine --flip true"),
        pytest.param("torch", "--agg upgrad", marks=pytest.mark.slow),
        pytest.param("resident", "--agg gradvac --scheduler cosine --flip true", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(train, monkeypatch, capsys, loader, flags):
    whole = train(flags, "--epochs 2", f"--loader {loader}", "--limit_train 700", "--log_every 3")
    with monkeypatch.context() as patch:
        StopAfter(patch, 9)  # epoch 2, within a log window
        stopped = train(
            flags, "--epochs 2", f"--loader {loader}", "--limit_train 700", "--log_every 3", status=128 + 15
        )
    assert "--resume" in capsys.readouterr().out
    assert checkpoint.load(stopped / "checkpoints" / "last.pt")["position"]["step"] == 9
    assert main(["train", "--resume", str(stopped)]) == 0
    assert metrics_of(whole) == metrics_of(stopped)
    assert same_weights(whole, stopped)


def test_sigint_saves_too(train, monkeypatch):
    with monkeypatch.context() as patch:
        StopAfter(patch, 1, signal.SIGINT)
        folder = train(status=130)
    assert (folder / "checkpoints" / "last.pt").exists()


def test_resuming_a_finished_run_and_extending_it(train, capsys):
    long = train("--epochs 2")
    short = train("--epochs 1")
    assert main(["train", "--resume", str(short)]) == 0
    assert "is finished at step 3; raise --epochs" in capsys.readouterr().out
    assert main(["train", "--resume", str(short), "--epochs", "2"]) == 0
    assert same_weights(long, short)


@pytest.mark.parametrize("flags", ["--epochs 2", "--steps 5"])
def test_a_run_stopped_after_its_last_step_has_its_end_yet_to_come(train, monkeypatch, capsys, flags):
    whole = train(flags)
    with monkeypatch.context() as patch:
        StopAfter(patch, 5 if "steps" in flags else 6)
        stopped = train(flags, status=143)
    assert not any("test/loss" in line for line in read_lines(stopped / "metrics.jsonl")[-1:])
    assert main(["train", "--resume", str(stopped)]) == 0
    assert metrics_of(whole) == metrics_of(stopped)
    assert same_weights(whole, stopped)
    capsys.readouterr()
    assert main(["train", "--resume", str(stopped)]) == 0
    assert "is finished at step" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(train, capsys):
    folder = train()
    assert main(["train", "--resume", str(folder), "--lr", "0.5"]) == 2
    assert "the run has --lr 0.001; a resumed run keeps it" in capsys.readouterr().err


def test_a_loss_that_blows_up_stops_the_run(train, capsys):
    folder = train("--lr 1e18", "--optimizer sgd", "--epochs 3", "--recons_reduction sum", status=1)
    error = capsys.readouterr().err
    assert "became" in error
    assert "at step" in error
    assert "checkpoint" in error
    for path in (folder / "checkpoints").glob("*.pt"):
        assert all(v.isfinite().all() for v in checkpoint.load(path)["model"].values() if v.is_floating_point())


def test_the_step_and_objective_are_named_exactly(train, monkeypatch, capsys):
    """A NaN that appears at step 5 within a window of 4 is reported as step 5, with the epoch's checkpoint."""
    from movae_fast.training.train_step import TrainStep

    original = TrainStep.__call__

    def poisoned(self, x, step, *args, **kwargs):
        record = original(self, x, step, *args, **kwargs)
        if step == 4:
            record.losses[1] = math.nan
        return record

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    folder = train("--epochs 3", "--log_every 4", status=1)
    error = capsys.readouterr().err
    assert "kl became nan at step 5" in error
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'last.pt'}" in error
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["step"] == 3


@pytest.mark.parametrize(
    "flags",
    [
        "--agg sum",
        "--agg upgrad",
        "--agg dualproj --jacobian all --accumulate 2",
        "--agg upgrad --gramian_every 2",
        "--agg upgrad --gramian_batch 0.5 --precision bf16",
        "--agg cagrad --last_batch pad --batch_size 110",
        "--agg pcgrad",
        "--agg upgrad --arch vq_vae --num_residual_layers 1 --embedding_dim 4 --num_embeddings 8",
    ],
)
def test_nothing_in_the_loop_reads_the_device(train, monkeypatch, flags):
    """Between log lines no tensor is read on the host: .item(), float() or .cpu() would wait for a GPU."""
    reads = []
    step = {"inside": False, "times": 0}
    from movae_fast.training.run import Run

    for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            if step["inside"]:
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    from movae_fast.training.train_step import TrainStep

    original_call = TrainStep.__call__

    def call(self, *args, **kwargs):
        step["inside"] = True
        step["times"] += 1
        return original_call(self, *args, **kwargs)

    original_due = loop.log_due

    def log_due(run: Run, ahead: int = 0):
        if not ahead:
            step["inside"] = False
        return original_due(run, ahead)

    monkeypatch.setattr(TrainStep, "__call__", call)
    monkeypatch.setattr(loop, "log_due", log_due)
    given = ("--latent_dim null",) if "vq_vae" in flags else ()
    train(flags, *given, "--optimizer sgd", "--max_grad_norm 1", "--log_every 3")
    assert reads == []
    assert step["times"] == 3


def test_export_writes_weights_once(train, tmp_path, capsys):
    target = tmp_path / "models" / "weights.pth"
    folder = train(f"--export {target}")
    config, model = load_model(target, torch.device("cpu"))
    assert config.model.arch == "vae"
    assert torch.equal(model.state_dict()["mu.weight"], weights_of(folder)["mu.weight"])
    assert main(["train", "--dataset", "digits", "--export", str(target)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main(["train", "--resume", str(target)]) == 2
    assert "holds weights only" in capsys.readouterr().err


def test_two_runs_in_one_second_have_their_own_folders(train, tmp_path):
    for _ in range(2):
        train("--exp_dir null", f"--save_path {tmp_path}/runs", "--steps 1")
    runs = list((tmp_path / "runs" / "digits" / "vae" / "sum").iterdir())
    assert len(runs) == 2
    assert all(len((r / "metrics.jsonl").read_text().splitlines()) == 2 for r in runs)


def test_several_processes_that_cannot_find_each_other_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["train", "--dataset", "digits", "--exp_dir", str(tmp_path / "run")]) == 2
    assert "start the processes with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_learning_rate_schedules():
    def rates(**options):
        factor = lr_factor(OptimizerConfig(lr=2.0, **options), total_steps=10, steps_per_epoch=2)
        return [2.0 * factor(s) for s in range(11)]

    assert rates() == [2.0] * 11
    assert rates(warmup_steps=4)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    cosine = rates(scheduler="cosine", scheduler_lr_min=0.2)
    assert cosine[0] == 2.0
    assert cosine[5] == pytest.approx(1.1)
    assert cosine[10] == pytest.approx(0.2)
    drops = rates(scheduler="multi_step", scheduler_milestones=[2, 4])
    assert drops[3:5] == [2.0, pytest.approx(0.2)]
    assert drops[8] == pytest.approx(0.02)


@pytest.mark.parametrize("scheduler", ["cosine", "multi_step"])
def test_a_lines_rate_is_that_of_its_last_step(train, scheduler):
    flags = ["--epochs 3", "--lr 0.5", "--log_every 1", "--warmup_steps 2", f"--scheduler {scheduler}"]
    if scheduler == "multi_step":
        flags += ["--scheduler_milestones 1 2", "--scheduler_per epoch"]
    folder = train(*flags)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "train/lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    config = TrainConfig.from_flat(checkpoint.load(folder / "checkpoints" / "last.pt")["config"])
    factor = lr_factor(config.optimizer, 9, 3)
    assert [line["train/lr"] for line in lines] == pytest.approx([0.5 * factor(step) for step in range(9)])


def test_the_error_beside_the_mean_images_is_said_as_it_is():
    said = {0.25: "75.0% below", 3.83: "283.0% above", 1.0: "0.0% below"}
    for mse, words in said.items():
        text = against_mean_image({"test/mse": mse, "test/mse_mean_image": 1.0})
        assert text == f"reconstruction error {words} the mean image's; "
    assert against_mean_image({"test/mse": 1.0, "test/mse_mean_image": 0.0}) == ""


def test_rates_by_epoch_are_torchs_schedule_stepped_once_an_epoch():
    options = {"lr": 2.0, "scheduler": "cosine", "scheduler_lr_min": 0.2}
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=0.2)
    expected = []
    for _ in range(5):
        expected += 3 * [optimizer.param_groups[0]["lr"]]  # 3 steps an epoch
        optimizer.step()
        schedule.step()
    factor = lr_factor(OptimizerConfig(scheduler_per="epoch", **options), 15, 3)
    assert [2.0 * factor(s) for s in range(15)] == pytest.approx(expected)
    # Two epochs of warm-up, then the five.
    late = lr_factor(OptimizerConfig(scheduler_per="epoch", warmup_epochs=2, **options), 21, 3)
    assert [2.0 * late(s) for s in range(21)] == pytest.approx(3 * [1.0] + 3 * [2.0] + expected)
    smooth = lr_factor(OptimizerConfig(lr=2.0, warmup_epochs=2), 21, 3)
    assert [smooth(s) for s in range(8)] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1])


def test_kl_annealing_by_epoch():
    config = TrainConfig()
    assert loss_schedule(config, 80, 2).kl_factor is None
    config.objective.kl_annealing = "monotonic"  # to 1 over 12 of 40 epochs
    factor = loss_schedule(config, 80, 2).kl_factor
    assert [factor(s) for s in (0, 1, 2, 3, 12, 24, 25, 79)] == pytest.approx(
        [0, 0, 1 / 12, 1 / 12, 0.5, 1, 1, 1]
    )
    config.objective.kl_annealing = "cyclic"  # four cycles of 10 epochs, rising over 5
    factor = loss_schedule(config, 80, 2).kl_factor
    assert [factor(s) for s in (0, 2, 8, 10, 19, 20, 22, 79)] == pytest.approx([0, 0.2, 0.8, 1, 1, 0, 0.2, 1])


def test_flags_and_config_are_inverse():
    config = TrainConfig()
    config.data.dataset, config.model.hidden_dims = "digits", [1, 2]
    assert TrainConfig.from_flat(config.flat()) == config
    assert json.dumps(config.flat())
    assert config.info is DATASETS["digits"]


def test_the_bar_shows_on_a_terminal(train, monkeypatch, capsys):
    from rich.console import Console

    from movae_fast.cli import train as train_command

    monkeypatch.setattr(train_command, "Console", lambda **options: Console(force_terminal=True, width=160))
    train("--epochs 2")
    shown = capsys.readouterr().out
    assert "epoch 2/2" in shown
    assert "ETA" in shown
    assert "images/s" in shown


def test_signals_are_given_back_and_a_second_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    worker = threading.Thread(target=lambda: Signals().__enter__())
    worker.start()
    worker.join()
    time.sleep(0)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_compiled_run_compiles_once_through_epochs_evaluation_and_resume(train):
    before = graph_counters()
    ragged = ("--agg upgrad", "--batch_size 110", "--last_batch pad")  # 300 images: 80 in the last step
    folder = train(*ragged, "--compile default", "--save_freq 1", "--epochs 3")
    middle = graph_counters()
    assert middle["graphs"] - before["graphs"] == 1
    assert middle["graph_breaks"] == before["graph_breaks"]
    train(f"--resume {folder}", "--epochs 4")
    assert graph_counters()["graphs"] - middle["graphs"] <= 1  # a new run's own, or the old one from the cache
    eager = train(*ragged, "--epochs 4")
    a, b = read_lines(folder / "metrics.jsonl")[-1], read_lines(eager / "metrics.jsonl")[-1]
    assert a["test/loss"] == pytest.approx(b["test/loss"], rel=5e-3)  # Adam amplifies rounding


@pytest.mark.parametrize(
    "flags",
    [
        "--gramian_every 2",
        "--gramian_batch 0.5",
        "--gramian_at last:2",
        "--conflict_free step --step_metric optimizer",
        "--accumulate 2",
        "--precision bf16",
        "--batch_size 110 --last_batch pad",
    ],
)
def test_the_step_s_variants_train_and_resume_bit_for_bit(train, flags):
    through = train("--agg upgrad", flags, "--epochs 3")
    part = train("--agg upgrad", flags, "--steps 5")  # in the middle of an epoch, and between two Gramians
    train(f"--resume {part}", "--steps 9")
    # The line at step 6 has a window that the stop at step 5 cut; every later one is the same.
    ours, theirs = ([line for line in metrics_of(f) if line["step"] > 6] for f in (part, through))
    assert ours == theirs
    assert ours
    assert same_weights(through, part)


def test_a_profile_names_the_step_s_regions(train):
    folder = train("--agg upgrad", "--profile 2", "--epochs 3")
    trace = json.loads((folder / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    for region in ("forward and rows", "gramian", "projection", "combine", "optimizer"):
        assert names.count(region) == 2, region


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--accumulate 3", "--accumulate 3 must divide --batch_size 100"),
        ("--gramian_batch 0 --agg upgrad", "--gramian_batch 0.0 must be above 0"),
        ("--gramian_every 2", "need an aggregator that weights rows; sum does not"),
        ("--gramian_every 2 --agg config", "need an aggregator that weights rows; config does not"),
        ("--gramian_batch 0.5 --agg upgrad --jacobian all", "leave --jacobian at shared"),
        ("--gramian_batch 0.5 --agg upgrad --compile default", "runs uncompiled"),
        ("--precision tf32", "--precision tf32 is CUDA's"),
        ("--compile fast", "compile"),
    ],
)
def test_settings_of_the_step_that_cannot_work_are_named(train, capsys, flags, said):
    train(flags, status=2)
    assert said in capsys.readouterr().err
