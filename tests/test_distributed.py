"""Two gloo ranks against one process on the union of their batches, through the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from movae_fast.objectives import LossVector
from movae_fast.training import checkpoint
from movae_fast.training.logs import read_lines
from movae_fast.training.start import as_process_0_read
from movae_fast.training.train_step import TrainStep
from movae_fast.training.world import World, connect
from tests import lives

COMMON = [
    *("--dataset", "digits", "--image_size", "16", "--latent_dim", "4", "--hidden_dims", "8", "8"),
    *("--limit_train", "320", "--limit_test", "70", "--log_every", "1", "--seed", "3", "--device", "cpu"),
    *("--eval_batch_size", "16", "--optimizer", "sgd", "--lr", "0.05"),
]


STARTED: list[BaseProcess] = []


@pytest.fixture(autouse=True)
def _none_left():
    yield
    lives.end(STARTED)
    STARTED.clear()


def start(folder, *flags, ranks=1, before=lives.undrawn):
    """The processes of one run; each writes what it says to a file of its own, and calls `before()` first."""
    where = [] if "--resume" in flags else [*COMMON, "--exp_dir", str(folder)]
    return start_command(folder, ["train", *where, *flags], ranks, before)


def start_command(folder, words, ranks=1, before=lives.undrawn):
    """The processes of `movae WORDS`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(lives.start(words, said(folder, rank), env, before=before))
    STARTED.extend(processes)
    return processes


def said(folder, rank):
    return folder.parent / f"{folder.name}.{rank}.log"


def finish(folder, processes, status=0):
    for rank, process in enumerate(processes):
        process.join(180)
        assert process.exitcode == status, said(folder, rank).read_text()


def run(folder, *flags, ranks=1, status=0):
    finish(folder, start(folder, *flags, ranks=ranks), status)
    return folder


def weights(folder):
    model = checkpoint.load(folder / "checkpoints" / "last.pt")["model"]
    return torch.cat([v.flatten().double() for k, v in model.items() if v.is_floating_point()])


def distance(a, b):
    return float((weights(a) - weights(b)).norm() / weights(b).norm())


def test_lines(folder):
    return [line for line in read_lines(folder / "metrics.jsonl") if "test/loss" in line]


test_lines.__test__ = False


@pytest.mark.parametrize(
    ("agg", "norm"),
    [
        ("sum", "none"),
        ("upgrad", "none"),
        pytest.param("aligned_mtl", "none", marks=pytest.mark.slow),
        pytest.param("cagrad", "none", marks=pytest.mark.slow),
        pytest.param("pcgrad", "none", marks=pytest.mark.slow),  # random: all ranks draw the same order
        pytest.param("graddrop", "none", marks=pytest.mark.slow),
        pytest.param("sum", "batch", marks=pytest.mark.slow),
        ("upgrad", "batch"),
    ],
)
def test_two_ranks_are_one_process_with_the_doubled_batch(tmp_path, agg, norm):
    # BatchNorm amplifies rounding: at lr 0.05 two orders of summation are 1e-4 apart after 20 steps.
    # GradDrop drops an element by a threshold, near which rounding decides: after some steps the two differ.
    flags = ["--agg", agg, "--layer_norm", norm, "--steps", "1" if agg == "graddrop" else "20"]
    # A log line of several steps: the window's losses are a strided view, which gloo does not see as one.
    flags += ["--lr", "0.01" if norm == "batch" else "0.05", "--log_every", "3"]
    one = run(tmp_path / "one", *flags, "--batch_size", "64")
    two = run(tmp_path / "two", *flags, "--batch_size", "32", "--sync_batchnorm", "true", ranks=2)
    assert distance(two, one) < 1e-5
    for a, b in zip(test_lines(two), test_lines(one), strict=True):
        assert a["test/loss"] == pytest.approx(b["test/loss"], rel=1e-5)
        assert a["test/mse"] == pytest.approx(b["test/mse"], rel=1e-5)
    last = read_lines(two / "metrics.jsonl")
    alone = read_lines(one / "metrics.jsonl")
    for a, b in zip(last, alone, strict=True):
        for key in ("train/reconstruction", "train/kl"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--agg upgrad --conflict_free step",
        "--agg sum --conflict_free step --step_metric optimizer --optimizer adamw --eps 1e-3",
        "--agg upgrad --gramian_at features",
        pytest.param("--agg upgrad --gramian_at last:2 --accumulate 2", marks=pytest.mark.slow),
        pytest.param("--agg upgrad --gramian_batch 0.5", marks=pytest.mark.slow),
    ],
)
def test_projected_steps_and_cheaper_gramians_on_two_ranks(tmp_path, flags):
    """The step's multipliers, and the weights, are the union's: all ranks apply the same bits."""
    flags = [*flags.split(), "--layer_norm", "none", "--steps", "20"]
    flags += [] if "adamw" in flags else ["--lr", "0.05"]
    flags += ["--lr", "0.003"] if "adamw" in flags else []
    one = run(tmp_path / "one", *flags, "--batch_size", "64")
    two = run(tmp_path / "two", *flags, "--batch_size", "32", ranks=2)
    if "--gramian_batch" in flags:  # of each rank's own first images, not of the union's
        assert distance(two, one) < 0.05
        return
    assert distance(two, one) < 1e-5
    for a, b in zip(read_lines(two / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
        for key in ("train/step_min_cosine", "train/min_cosine"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_skipped_steps_and_averages_on_two_ranks(tmp_path):
    """All ranks leave out the same steps, and hold the same average: that of one process."""
    flags = "--agg upgrad --conflict_free step --optimizer adamax --eps 1e-3 --lr 0.002 --layer_norm none"
    flags += " --steps 20 --ema_decay 0.8 --skip_grad_norm 0.744 --log_every 5"
    one = run(tmp_path / "one", *flags.split(), "--batch_size", "64")
    two = run(tmp_path / "two", *flags.split(), "--batch_size", "32", ranks=2)
    assert distance(two, one) < 1e-4
    counts = [
        [line["train/skipped_steps"] for line in read_lines(f / "metrics.jsonl") if "train/lr" in line]
        for f in (one, two)
    ]
    assert counts[0] == counts[1]
    assert 0 < sum(counts[0]) < 20
    a, b = (checkpoint.load(f / "checkpoints" / "last.pt")["average"] for f in (one, two))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-5)
    for x, y in zip(test_lines(one), test_lines(two), strict=True):
        assert x["test/loss"] == pytest.approx(y["test/loss"], rel=1e-4)


def poison():
    """On the second rank, make the third step's loss infinite, with a gradient that is finite."""
    lives.undrawn()
    call, count = LossVector.__call__, 0

    def poisoned(self, *args):
        nonlocal count
        values = call(self, *args)
        count += torch.is_grad_enabled()
        bad = os.environ.get("RANK") == "1" and torch.is_grad_enabled() and count == 3
        return (values[0] + (torch.inf if bad else 0), *values[1:])

    LossVector.__call__ = poisoned


def test_a_loss_that_is_not_finite_on_one_rank_skips_on_all(tmp_path):
    folder = tmp_path / "run"
    flags = "--agg sum --steps 6 --log_every 6 --skip_grad_norm 1e9 --batch_size 16".split()
    finish(folder, start(folder, *flags, ranks=2, before=poison))
    lines = read_lines(folder / "metrics.jsonl")
    assert sum(line.get("train/skipped_steps", 0) for line in lines) == 1
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert all(v.isfinite().all() for v in state["model"].values())


@pytest.mark.slow
def test_a_padded_last_batch_on_two_ranks(tmp_path):
    """320 images at 50 a step: of the last step's 50, the second rank has none that counts."""
    flags = ["--agg", "upgrad", "--layer_norm", "none", "--epochs", "3", "--last_batch", "pad"]
    one = run(tmp_path / "one", *flags, "--batch_size", "50")
    two = run(tmp_path / "two", *flags, "--batch_size", "25", ranks=2)
    assert distance(two, one) < 1e-5
    lines = [read_lines(folder / "metrics.jsonl") for folder in (two, one)]
    assert lines[0][-1]["step"] == 21
    for a, b in zip(*lines, strict=True):
        for key in ("train/reconstruction", "train/kl", "test/loss"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.slow
def test_the_all_jacobian_and_a_codebook_on_two_ranks(tmp_path):
    for name, flags in {
        "all": ["--jacobian", "all", "--layer_norm", "none"],
        "every": ["--gramian_every", "4", "--layer_norm", "none"],
    }.items():
        flags += ["--agg", "upgrad", "--steps", "20"]
        one = run(tmp_path / f"{name}1", *flags, "--batch_size", "64")
        two = run(tmp_path / f"{name}2", *flags, "--batch_size", "32", ranks=2)
        assert distance(two, one) < 1e-5


def test_statistics_of_a_batch_are_those_of_all_ranks(tmp_path):
    flags = ["--layer_norm", "none", "--extra_objectives", "dip_ii", "--agg", "upgrad", "--steps", "8"]
    one = run(tmp_path / "one", *flags, "--lr", "0.01", "--batch_size", "64")
    two = run(tmp_path / "two", *flags, "--lr", "0.01", "--batch_size", "32", ranks=2)
    assert distance(two, one) < 1e-4


@pytest.mark.slow
def test_a_discriminator_is_trained_on_the_images_of_all_ranks(tmp_path):
    flags = ["--layer_norm", "none", "--extra_objectives", "gan", "--agg", "upgrad", "--steps", "8"]
    one = run(tmp_path / "one", *flags, "--lr", "0.01", "--batch_size", "64")
    two = run(tmp_path / "two", *flags, "--lr", "0.01", "--batch_size", "32", ranks=2)
    assert distance(two, one) < 1e-4
    patches = [checkpoint.load(folder / "checkpoints" / "last.pt")["patches"]["model"] for folder in (one, two)]
    for key, value in patches[0].items():
        assert float((patches[1][key] - value).norm()) < 0.01 * float(value.norm()) + 1e-5, key


def test_a_ladders_stages_on_two_ranks(tmp_path):
    flags = ["--dataset", "sprites", "--image_size", "32", "--arch", "provlae", "--mode", "seq_train"]
    flags += ["--hidden_dims", "null", "--hidden_dim", "4", "--fc_dim", "8", "--latent_dim", "2"]
    flags += ["--num_ladders", "2", "--recons_dist", "bernoulli", "--steps", "6", "--fade_in_duration", "4"]
    flags += ["--lr", "0.00001", "--beta", "1"]
    one = run(tmp_path / "one", *flags, "--batch_size", "32")
    two = run(tmp_path / "two", *flags, "--batch_size", "16", "--sync_batchnorm", "true", ranks=2)
    assert distance(two, one) < 1e-5
    for a, b in zip(read_lines(two / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
        assert a.get("train/alpha") == b.get("train/alpha")
        for key in ("train/reconstruction", "train/kl_1", "train/kl_2", "test/loss"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--layer_norm none",  # a beta an example: each rank has its slice of the global batch's
        pytest.param("--beta_per batch --gate_position post_bn --sync_batchnorm true", marks=pytest.mark.slow),
    ],
)
def test_multi_rate_betas_on_two_ranks(tmp_path, flags):
    words = [*flags.split(), "--multirate", "--agg", "upgrad", "--steps", "6", "--lr", "0.0001"]
    one = run(tmp_path / "one", *words, "--batch_size", "64")
    two = run(tmp_path / "two", *words, "--batch_size", "32", ranks=2)
    assert distance(two, one) < 1e-5
    for a, b in zip(read_lines(two / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
        for key in ("train/reconstruction", "train/kl", "test/loss"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def watch():
    """After every step, compare the parameters with those of the first rank."""
    lives.undrawn()
    original = TrainStep.__call__

    def call(self, x, step, *args):
        record = original(self, x, step, *args)
        flat = self.flat.data
        other = flat.clone()
        torch.distributed.broadcast(other, 0)
        assert torch.equal(flat, other), f"rank {self.world.rank} is apart after step {step}"
        print("same", step, flush=True)
        return record

    TrainStep.__call__ = call


@pytest.mark.parametrize("agg", ["sum", "upgrad"])
def test_parameters_are_the_same_bits_on_all_ranks_after_every_step(tmp_path, agg):
    folder = tmp_path / "run"
    flags = ["--agg", agg, "--batch_size", "32", "--optimizer", "adam", "--max_grad_norm", "0.5"]
    finish(folder, start(folder, *flags, "--epochs", "2", ranks=2, before=watch))
    assert (tmp_path / "run.1.log").read_text().count("same") == 10


def test_a_run_of_two_ranks_goes_on_with_one(tmp_path):
    flags = ["--agg", "upgrad", "--batch_size", "32", "--layer_norm", "none"]
    through = run(tmp_path / "through", *flags, "--epochs", "3", ranks=2)
    part = run(tmp_path / "part", *flags, "--epochs", "2", ranks=2)
    run(part, "--resume", str(part), "--epochs", "3")
    assert distance(part, through) < 1e-5
    assert checkpoint.load(part / "checkpoints" / "last.pt")["config"]["batch_size"] == 64
    a, b = (read_lines(f / "metrics.jsonl") for f in (part, through))
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert a[-1]["test/loss"] == pytest.approx(b[-1]["test/loss"], rel=1e-5)
    statuses = lives.wait(start(part, "--resume", str(part), "--epochs", "4", ranks=3), 180)
    assert 2 in statuses
    assert set(statuses) <= {1, 2}  # 1: it was still about to meet a process that had refused
    refused = said(part, statuses.index(2)).read_text()
    assert "cannot be divided among 3 processes" in refused


@pytest.mark.parametrize("quantizer", ["ema", "lfq"])
def test_quantizers_see_the_batch_of_all_ranks(tmp_path, quantizer):
    """The averages that ema's codes follow, and the entropy of lfq's mean distribution over the batch."""
    common = [w for k, w in enumerate(COMMON) if "--latent_dim" not in COMMON[max(k - 1, 0) : k + 1]]
    flags = [*common, "--arch", "vq_vae", "--quantizer", quantizer, "--num_embeddings", "16", "--lr", "0.01"]
    models = []
    for name, ranks in (("one", 1), ("two", 2)):
        words = ["train", *flags, "--agg", "upgrad", "--steps", "10", "--batch_size", str(64 // ranks)]
        finish(
            tmp_path / name, start_command(tmp_path / name, [*words, "--exp_dir", str(tmp_path / name)], ranks)
        )
        models.append(checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["model"])
    one, two = models
    for model in models:  # a process counts its own images
        model["code_usage"] = model["code_usage"] / model["code_usage"].sum()
    for name, value in one.items():
        if value.is_floating_point():
            assert (value - two[name]).norm() <= 1e-5 * value.norm(), name


def wait_for_steps(folder, steps):
    for _ in range(600):
        if len(read_lines(folder / "metrics.jsonl")) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not get going")


def test_one_rank_killed_ends_the_other_with_a_message(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, "--agg", "upgrad", "--batch_size", "32", "--epochs", "2000", ranks=2)
    wait_for_steps(folder, 5)
    processes[1].kill()
    started = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert time.monotonic() - started < 60
    message = said(folder, 0).read_text()
    assert "another process of this run ended" in message
    assert f"movae train --resume {folder}" in message


def test_a_signal_to_one_rank_stops_and_saves_all(tmp_path):
    folder = tmp_path / "run"
    processes = start(folder, "--agg", "upgrad", "--batch_size", "32", "--epochs", "2000", ranks=2)
    wait_for_steps(folder, 5)
    os.kill(processes[1].pid, signal.SIGTERM)
    finish(folder, processes, status=128 + signal.SIGTERM)
    step = checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["step"]
    assert step >= read_lines(folder / "metrics.jsonl")[-1]["step"] >= 5


def test_torchrun_starts_a_run(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "-m",
        "movae_fast",
        "train",
        *COMMON,
        "--exp_dir",
        folder,
        "--batch_size",
        "32",
        "--epochs",
        "1",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(folder / "metrics.jsonl")
    assert lines[-1]["step"] == 5  # 320 images, 64 a step
    assert json.dumps(lines)


def _meet_again(rank, port, folder):
    """Join and leave four worlds by a store that outlives them, as torchrun's does; rank 1 comes late."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    sums = []
    for k in range(4):
        time.sleep(0.1 * rank)
        world, _ = connect("cpu")
        sums += [int(world.sum_(torch.tensor(k + rank)))]
        world.close()
    assert sums == [1, 3, 5, 7]
    (folder / str(rank)).touch()


def test_a_process_trains_again_with_the_same_store(tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lives.ranks(_meet_again, store.port, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


class _Other(World):
    """Process 1 of two, of which process 0 read step 9."""

    def broadcast(self, value):
        return 9

    def all(self, value):
        return value


def test_a_checkpoint_that_was_read_too_early_is_read_again(monkeypatch):
    def at(step):
        return {"position": {"epoch": 1, "batch": step - 6, "step": step}}

    files = [at(9), at(6)]
    monkeypatch.setattr(checkpoint, "read", lambda path: (path, files.pop(0)))
    path = Path("run/checkpoints/last.pt")
    assert as_process_0_read(_Other(1, 2), path, at(9)) == at(9)
    assert len(files) == 2
    assert as_process_0_read(_Other(1, 2), path, at(6)) == at(9)
    with pytest.raises(checkpoint.CheckpointError, match=r"last.pt: process 0 read step 9 of it and another"):
        as_process_0_read(_Other(1, 2), path, at(6))
