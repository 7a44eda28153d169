"""torchrun's own ways: two machines that meet, and a restart after a process died."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from movae_fast.training.logs import read_lines
from tests.test_distributed import COMMON, distance, run

TIMEOUT = 400


def agent(folder: Path, name: str, flags: str, *launch: str) -> subprocess.Popen[bytes]:
    """Start one machine's torchrun; what it says goes to a file of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", *launch]
    command += ["-m", "movae_fast", "train", *COMMON, "--exp_dir", str(folder), *flags.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with open(folder.parent / f"{folder.name}.{name}.log", "wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def said(folder: Path, name: str) -> str:
    return (folder.parent / f"{folder.name}.{name}.log").read_text()


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_two_machines_train_as_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "machines"
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "two"]
    meeting += ["--rdzv_endpoint", f"127.0.0.1:{port}"]
    flags = "--agg upgrad --layer_norm none --batch_size 32 --epochs 2"
    agents = [agent(folder, str(i), flags, *meeting) for i in range(2)]
    try:
        for i, process in enumerate(agents):
            assert process.wait(timeout=TIMEOUT) == 0, said(folder, str(i))
    finally:
        for process in agents:
            stop(process)
    alone = run(tmp_path / "alone", *"--agg upgrad --layer_norm none --batch_size 64 --epochs 2".split())
    assert distance(folder, alone) < 1e-5
    assert len(read_lines(folder / "metrics.jsonl")) == len(read_lines(alone / "metrics.jsonl"))


def workers(parent: int) -> list[int]:
    """Return the process ids of an agent's workers."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_a_restart_goes_on_from_the_last_checkpoint_by_itself(tmp_path: Path) -> None:
    flags = "--agg upgrad --batch_size 16 --epochs 12 --checkpoint_every 2"
    launch = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    through = tmp_path / "through"
    process = agent(through, "a", flags, *launch)
    assert process.wait(timeout=TIMEOUT) == 0, said(through, "a")

    folder = tmp_path / "restarted"
    process = agent(folder, "a", flags, *launch)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (lines := read_lines(folder / "metrics.jsonl")) or lines[-1]["step"] < 20:
            assert time.monotonic() < deadline, said(folder, "a")
            assert process.poll() is None, said(folder, "a")
            time.sleep(0.05)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=TIMEOUT) == 0, said(folder, "a")
    finally:
        stop(process)
    assert "goes on" in said(folder, "a") or "resum" in said(folder, "a"), said(folder, "a")
    assert distance(folder, through) == 0
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl") if "train/lr" in line]
    assert steps == list(range(1, 121))  # each once
