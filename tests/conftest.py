"""Fixtures that several test files share."""

import os

import pytest
import torch

from movae_fast.cli import main

# Tiny models: a second thread costs more in waiting than it brings, above all on a busy machine.
torch.set_num_threads(1)
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """What is remembered between runs starts empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def train(tmp_path, capsys, monkeypatch, request):
    """Train through the command line on `digits`, tiny; the run's folder. `draws` marks who wants figures."""
    if "draws" not in request.keywords:
        monkeypatch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
    count = 0

    def run(*flags: str, status: int = 0):
        nonlocal count
        count += 1
        folder = tmp_path / f"run{count}"
        given = {f.partition("=")[0].split()[0] for f in flags}
        defaults = {
            "--dataset": "digits",
            "--image_size": "16",
            "--latent_dim": "4",
            "--hidden_dims": "8 8",
            "--epochs": "1",
            "--batch_size": "100",
            "--limit_train": "300",
            "--limit_test": "64",
            "--log_every": "2",
            "--seed": "3",
            "--device": "cpu",
            "--exp_dir": str(folder),
        }
        if "--resume" in given:
            defaults = {}
        words = [w for k, v in defaults.items() if k not in given for w in (k, *v.split())]
        assert main(["train", *words, *(w for f in flags for w in f.split())]) == status, (
            capsys.readouterr().err
        )
        return folder

    return run
