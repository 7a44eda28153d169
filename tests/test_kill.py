"""kill -9 in the middle of an epoch, then --resume: as if it had never happened."""

import json
import signal
import time

import pytest
import torch

from movae_fast.training import checkpoint
from movae_fast.training.logs import TIMING_KEYS
from tests import lives

FLAGS = (
    "--dataset digits --image_size 16 --hidden_dims 8 8 --latent_dim 4 --epochs 3 --batch_size 20 "
    "--limit_test 64 --log_every 5 --seed 3 --device cpu --agg upgrad --flip true "
    "--checkpoint_every 7 --save_freq 0"
).split()


def start(folder, *flags):
    return lives.start(["train", *flags], folder / "log", before=lives.undrawn)


def finish(folder, process):
    process.join(300)
    assert process.exitcode == 0, (folder / "log").read_text()


def lines(folder):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in text]


@pytest.mark.parametrize(
    "flags",
    ["--loader resident", "--loader torch", "--conflict_free step --step_metric optimizer"],
    ids=["resident", "torch", "projected step"],
)
def test_kill_9_then_resume(tmp_path, flags):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(tmp_path, start(tmp_path, *FLAGS, *flags.split(), "--exp_dir", str(whole)))
    process = start(tmp_path, *FLAGS, *flags.split(), "--exp_dir", str(killed))
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        # 75 steps an epoch: kill in the middle of the second one.
        if metrics.exists() and any('"step": 9' in line for line in metrics.read_text().splitlines()):
            break
        time.sleep(0.002)
    lives.end([process])
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    position = checkpoint.load(killed / "checkpoints" / "last.pt")["position"]
    assert position["epoch"] == 1
    assert 0 < position["batch"] < 75
    finish(tmp_path, start(tmp_path, "--resume", str(killed)))
    assert lines(killed) == lines(whole)
    ends = [checkpoint.load(f / "checkpoints" / "last.pt")["model"] for f in (whole, killed)]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
