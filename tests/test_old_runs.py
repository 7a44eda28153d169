"""A run of an earlier version loads, and goes on to where that version would have taken it."""

import shutil
from pathlib import Path

import pytest
import torch

from movae_fast.cli import main
from movae_fast.training.build import load_model
from movae_fast.training.logs import read_lines

# Written by commit 575f895: vq_vae, UPGrad, 6 steps; `--resume RUN --steps 12` took it to the loss below.
RUN = Path(__file__).parent / "fixtures" / "run_before_the_move"
LOSS_AT_12 = 0.25904276175424457


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_its_model_loads(run: Path) -> None:
    config, model = load_model(run, torch.device("cpu"))
    assert config.model.arch == "vq_vae"
    assert model(torch.rand(2, 1, 16, 16)).preactivation.shape == (2, 1, 16, 16)


def test_it_goes_on_as_it_would_have(run: Path) -> None:
    before = read_lines(run / "metrics.jsonl")
    assert main(["train", "--resume", str(run), "--steps", "12"]) == 0
    lines = read_lines(run / "metrics.jsonl")
    assert lines[: len(before)] == before
    assert lines[-1]["step"] == 12
    # Another machine rounds otherwise.
    assert lines[-1]["test/loss"] == pytest.approx(LOSS_AT_12, rel=1e-3)
