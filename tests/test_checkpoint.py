"""Checkpoints: whole or absent, and refused when they are not what was written."""

import os
import random

import numpy as np
import pytest
import torch

from movae_fast.training import checkpoint
from movae_fast.training.checkpoint import CheckpointError

SECTIONS = {"config": {"arch": "vae", "lr": 0.1, "dims": [1, 2]}, "model": {"w": torch.arange(6.0).view(2, 3)}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, SECTIONS)
    return path


def test_round_trip(path):
    record = checkpoint.load(path)
    assert record["config"] == SECTIONS["config"]
    assert torch.equal(record["model"]["w"], SECTIONS["model"]["w"])
    assert set(record) == set(SECTIONS)
    assert torch.load(path, weights_only=True)["format"] == checkpoint.FORMAT


def test_a_crash_while_writing_leaves_the_old_file(path, monkeypatch):
    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"config": {}})
    monkeypatch.undo()
    assert set(checkpoint.load(path)) == set(SECTIONS)
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated, damaged or not a checkpoint"):
        checkpoint.load(path)


def test_tampered_with_one_number(path):
    record = torch.load(path, weights_only=True)
    record["model"]["w"][0, 0] = 7
    torch.save(record, path)
    with pytest.raises(CheckpointError, match="altered after it was written; these parts differ: model"):
        checkpoint.load(path)


def test_a_flipped_bit(path):
    data = bytearray(path.read_bytes())
    at = data.find(np.float32(5.0).tobytes())
    assert at > 0
    data[at + 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_a_missing_section(path):
    record = torch.load(path, weights_only=True)
    del record["config"]
    torch.save(record, path)
    with pytest.raises(CheckpointError, match="these parts differ: config"):
        checkpoint.load(path)


def test_somebody_elses_file(path, tmp_path):
    torch.save({"w": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of movae-fast"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.pt")


def test_another_model_is_refused_with_what_differs(path):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="of another model: it lacks weight, bias; has w besides"):
        checkpoint.load_model(model, SECTIONS["model"], path)
    with pytest.raises(CheckpointError, match=r"weight is \(1, 3\), expected \(2, 3\)"):
        checkpoint.load_model(model, {"weight": torch.zeros(1, 3), "bias": torch.zeros(2)}, path)


def test_random_state_round_trip():
    state = checkpoint.rng_state()
    first = (torch.rand(3), np.random.rand(3), random.random())
    checkpoint.set_rng_state(state)
    second = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(first[0], second[0])
    assert (first[1] == second[1]).all()
    assert first[2] == second[2]


class Machine:
    """CUDA in one process: a generator for each visible GPU, whose state is a seed and an offset as on CUDA."""

    def __init__(self, gpus, current=0):
        self.states = [[7, 0] for _ in range(gpus)]
        self.current = current

    def draw(self, i):
        """A draw by GPU i, which depends on the state alone."""
        self.states[i][1] += 4
        return tuple(self.states[i])

    def get(self, i="cuda"):
        i = self.current if i == "cuda" else torch.device("cuda", i).index
        return torch.tensor(self.states[i], dtype=torch.int64).view(torch.uint8)

    def set(self, state, i="cuda"):
        i = self.current if i == "cuda" else torch.device("cuda", i).index
        self.states[i] = state.view(torch.int64).tolist()  # an IndexError for a GPU that is not there

    def set_all(self, states):
        for i, state in enumerate(states):
            self.set(state, i)

    def use(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)
        monkeypatch.setattr(
            torch.cuda, "get_rng_state_all", lambda: [self.get(i) for i in range(len(self.states))]
        )
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.set_all)
        return self


def through_a_file(path, state):
    checkpoint.save(path, {"rng": state})
    return checkpoint.load(path)["rng"]


def test_ranks_go_on_sharing_one_draw(path, monkeypatch):
    """Two processes that see both GPUs; process r draws on cuda:r, and only process 0 saves."""
    before = [Machine(2, current=r) for r in range(2)]
    for _ in range(3):
        shared = {machine.draw(r) for r, machine in enumerate(before)}
        assert len(shared) == 1
    before[0].use(monkeypatch)
    saved = through_a_file(path, checkpoint.rng_state())
    after = [Machine(2, current=r) for r in range(2)]
    for machine in after:
        machine.use(monkeypatch)
        checkpoint.set_rng_state(saved)
    assert after[0].draw(0) == after[1].draw(1) == before[0].draw(0)


@pytest.mark.parametrize(("device", "gpus", "current"), [("cuda:1", 2, 0), ("cuda", 1, 0), ("cuda:0", 4, 3)])
def test_the_runs_device_is_saved_and_another_can_go_on(path, monkeypatch, device, gpus, current):
    before = Machine(3, current=2).use(monkeypatch)
    before.draw(1)
    saved = through_a_file(path, checkpoint.rng_state(torch.device("cuda", 1)))
    after = Machine(gpus, current).use(monkeypatch)
    checkpoint.set_rng_state(saved, torch.device(device))
    assert after.draw(torch.device(device).index or 0) == before.draw(1)


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("used", [0, 1])
def test_an_older_checkpoint_of_all_devices_still_loads(path, monkeypatch, used, gpus):
    before = Machine(2, current=used).use(monkeypatch)
    before.draw(used)
    saved = {**checkpoint.rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    after = Machine(gpus).use(monkeypatch)
    checkpoint.set_rng_state(through_a_file(path, saved))
    assert after.draw(0) == before.draw(used)


def test_a_run_on_a_cpu_leaves_cuda_alone(monkeypatch):
    machine = Machine(1).use(monkeypatch)
    state = checkpoint.rng_state(torch.device("cpu"))
    assert state["cuda"] == []
    machine.draw(0)
    checkpoint.set_rng_state({**state, "cuda": [machine.get(0) * 0]}, torch.device("cpu"))
    assert machine.states == [[7, 4]]


def test_digest_sees_values_shapes_dtypes_and_keys():
    base = {"a": torch.zeros(2, 3), "b": [1, "x", None]}
    variants = [
        {"a": torch.zeros(3, 2), "b": [1, "x", None]},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": [1, "x", None]},
        {"a": torch.zeros(2, 3), "b": [1, "y", None]},
        {"a": torch.zeros(2, 3), "c": [1, "x", None]},
        {"a": torch.zeros(2, 3), "b": [True, "x", None]},
    ]
    digests = {checkpoint.digest(v) for v in [base, *variants]}
    assert len(digests) == len(variants) + 1
    assert checkpoint.digest({"a": torch.zeros(2, 3), "b": [1, "x", None]}) == checkpoint.digest(base)


def test_find(path, tmp_path):
    assert checkpoint.find(tmp_path) == path
    assert checkpoint.find(path) == path
    begun = tmp_path / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"begun is a run without a checkpoint: it has not come to"):
        checkpoint.find(begun)
    with pytest.raises(CheckpointError, match=r"is no run: no checkpoints/last\.pt in it"):
        checkpoint.find(path.parent)
    with pytest.raises(CheckpointError, match="no checkpoint or run at"):
        checkpoint.find(tmp_path / "nothing")


def test_checkpoints_of_one_state_are_one_file_that_a_later_write_leaves(train, monkeypatch):
    """`best` and `last` of a first epoch; then `last` alone goes on. `epoch_0001` is a file of its own."""
    folder = train("--save_freq 1") / "checkpoints"
    best, kept, last = (folder / f"{name}.pt" for name in ("best", "epoch_0001", "last"))
    assert best.samefile(last)
    assert not best.samefile(kept)
    before = best.read_bytes()
    written = []

    def save(path, sections):
        written.append((path.name, best.read_bytes() == before))
        saved(path, sections)

    saved = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    train(f"--resume {folder.parent}", "--epochs 2", "--save_freq 0", "--eval_freq 0", "--checkpoint_every 1")
    assert written[:3] == [("last.pt", True)] * 3
    assert checkpoint.load(last)["position"]["epoch"] == 2
    assert checkpoint.load(kept)["position"]["epoch"] == 1
