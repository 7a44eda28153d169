"""`movae doctor --gpu`, as far as a machine without a GPU can run it: its checks hold on a CPU and can fail."""

import subprocess
import sys

import pytest
import torch

from movae_fast import ops
from movae_fast.cli import gpu_checks, main, op_checks

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_is_one_line_and_status_one(capsys):
    assert main(["doctor", "--gpu"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("movae doctor --gpu: no GPU to try")


def test_a_check_that_raises_is_a_row_and_the_next_one_runs(capsys, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error:\nno kernel image")

    def absent():
        raise gpu_checks.NothingToCheckError("not installed")

    rows = [
        ("cuda:0", "first", broken),
        ("cuda:0", "second", absent),
        ("all 1", "third", lambda: "error 1e-9"),
    ]
    assert gpu_checks.run_checks(rows) == (2, 1)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED cuda:0  first")
    assert first.endswith("RuntimeError: CUDA error: no kernel image")
    assert second.startswith("-      cuda:0  second")
    assert third.startswith("ok     all 1   third")
    assert third.endswith("error 1e-9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for checks, status in ((rows, 1), (rows[1:], 0)):
        monkeypatch.setattr(gpu_checks, "every_check", lambda checks=checks: checks)
        assert main(["doctor", "--gpu"]) == status
        assert f"{len(checks) - 1} checks, {status} failed" in capsys.readouterr().out


def test_every_op_has_a_check():
    text = " ".join(name for name, _ in op_checks.op_checks(CPU))
    for op in ops.__all__:
        stem = {"project_rows": "project", "project_weights": "project", "step_multipliers": "project"}.get(
            op, op
        )
        assert stem in text, op


def test_compiling_ahead_does_every_check_once_and_survives_one_that_fails(monkeypatch):
    done = []

    def check(i):
        done.append(i)
        if i == 3:
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(
        gpu_checks, "op_checks", lambda device: [(str(i), lambda i=i: check(i)) for i in range(7)]
    )
    for k in range(3):
        gpu_checks.compile_part(CPU, 3, k)
    assert sorted(done) == list(range(7))


def test_compiling_ahead_starts_processes_and_sees_one_that_dies(monkeypatch):
    monkeypatch.setattr(gpu_checks.sys, "executable", "/bin/true")
    assert gpu_checks.compiled_ahead(CPU).endswith(("process", "processes"))
    monkeypatch.setattr(gpu_checks.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit statuses"):
        gpu_checks.compiled_ahead(CPU)


CHECKS = dict(op_checks.op_checks(CPU))


@pytest.mark.parametrize("name", CHECKS)
def test_the_checks_of_the_ops_hold_on_a_cpu(name):
    assert CHECKS[name]()


# The op to spoil, and the check that has to notice.
NOTICED = {
    "nearest_code": "nearest_code float32",
    "quantize": "quantize rotation",
    "code_error": "code_error",
    "gramian": "gramian, combine float32",
    "combine": "gramian, combine float32",
    "linear_cross_entropy": "linear_cross_entropy float32",
    "tc_terms": "tc_terms mss float32",
    "norm_swish": "norm_swish float32",
    "project_weights": "project diagonal, Triton",
    "project_rows": "project diagonal, Triton",
    "step_multipliers": "project trace, Triton",
    "upgrad_weights": "upgrad_weights trace, Triton",
    "gramian_weights": "gramian_weights",
}


@pytest.mark.parametrize("op", ops.__all__)
def test_a_check_notices_a_device_that_computes_something_else(op, monkeypatch):
    """The first call of each pair is the device's; every second call, on the CPU, is left as it is."""
    right, calls = getattr(ops, op), 0

    def scaled(out):
        if isinstance(out, tuple):
            return tuple(scaled(part) for part in out)
        return out * 2 if out.is_floating_point() else out

    def spoiled(*args, **kwargs):
        nonlocal calls
        calls += 1
        out = right(*args, **kwargs)
        if op == "nearest_code":
            return (out + 1) % 33
        return scaled(out) if calls % 2 else out

    monkeypatch.setattr(ops, op, spoiled)
    with pytest.raises(AssertionError):
        CHECKS[NOTICED[op]]()


def test_training_through_the_command_line(monkeypatch):
    monkeypatch.setattr(gpu_checks, "TRAINING", gpu_checks.TRAINING.replace("--device cuda", "--device cpu"))
    flags = "--arch vae --hidden_dims 8 8 --latent_dim 4 --compile off --steps 2"
    with pytest.raises(RuntimeError, match="the step was not captured: replayed 0 times"):
        gpu_checks.trained(0, flags, replays=5)
    with pytest.raises(RuntimeError, match=r"exit status 2.*--arch"):
        gpu_checks.trained(0, "--arch nothing")


def test_the_exchange_by_gloo_in_the_place_of_nccl(tmp_path):
    code = "import sys; from movae_fast.cli import gpu_checks as g; g.exchange(2, sys.argv[1], {}, '', 'gloo')"
    commands = [[sys.executable, "-c", code.format(rank), str(tmp_path / "meeting")] for rank in range(2)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]


def test_dali_that_is_missing_is_no_failure(monkeypatch):
    monkeypatch.setattr(gpu_checks.dali, "available", lambda: False)
    with pytest.raises(gpu_checks.NothingToCheckError, match="not installed"):
        gpu_checks.decodes(CPU)


def test_dali_decodes():
    pytest.importorskip("nvidia.dali")
    assert gpu_checks.decodes(CPU)
