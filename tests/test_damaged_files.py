"""Damaged checkpoints, logs, journals, prepared files and configurations: refused in one line, or mended."""

import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml
from PIL import Image

from movae_fast.cli import main
from movae_fast.training import checkpoint
from movae_fast.training.logs import TIMING_KEYS
from movae_fast.training.loop import fit
from movae_fast.training.signals import Interrupted
from tests import damage
from tests.test_sweep import FLAGS as TRIAL
from tests.test_sweep import SEARCH, in_this_process

TINY = (
    "--dataset digits --image_size 16 --hidden_dims 4 --latent_dim 2 --batch_size 20 --limit_train 60 "
    "--limit_test 20 --log_every 1 --num_samples 2 --seed 3 --device cpu"
).split()
COUNTS = {"slow": 25, "fast": 4}  # of each kind of file


@pytest.fixture
def counted(capsys):
    """Call with a command and the damaged file: its status, after checking what it said; counts by outcome."""
    counts = Counter()

    def run(words, name, none=None):
        status = main([str(w) for w in words])
        said = capsys.readouterr().err
        assert status in (0, 2) or (none is not None and none in said), said
        if status == 2:
            assert said.count("\n") == 1, said
            assert len(said) < 620, said
            assert name in said, said
        counts["refused" if status else "mended, or of no consequence"] += 1
        return status

    run.counts = counts
    return run


@pytest.fixture(params=[pytest.param("slow", marks=pytest.mark.slow), "fast"])
def times(request, counted, capsys):
    """How many files to damage; prints what became of them."""
    yield COUNTS[request.param]
    with capsys.disabled():
        if request.param == "slow":
            print(f"\n{request.node.name}: " + ", ".join(f"{n} {what}" for what, n in counted.counts.items()))


@pytest.fixture
def drawn_nothing(monkeypatch):
    for name in ("draw_run", "draw_missing"):
        monkeypatch.setattr(f"movae_fast.cli.train.{name}", lambda *_: None)


def draws(seed, n, kinds):
    """n damages in turn, each with a generator of its own."""
    for i in range(n):
        yield random.Random(f"{seed} {i}"), kinds[i % len(kinds)]


def lines(folder):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(t).items() if k not in TIMING_KEYS} for t in texts]


def model_of(folder):
    return checkpoint.digest(checkpoint.load(folder / "checkpoints" / "last.pt")["model"])


def stopped_run(tmp_path, monkeypatch):
    """A whole run, and one like it that a signal stopped after its fifth step of nine."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(["train", *TINY, "--epochs", "3", "--exp_dir", str(whole)]) == 0

    def stopping(run, bar):
        run.world.agree = lambda received: 15 if run.step == 5 else 0
        return fit(run, bar)

    with monkeypatch.context() as patch:
        patch.setattr("movae_fast.cli.train.fit", stopping)
        patch.setattr(Interrupted, "__str__", lambda self: "stopped")
        assert main(["train", *TINY, "--epochs", "3", "--exp_dir", str(part)]) == 143
    return whole, part


def test_checkpoints(times, counted, tmp_path, monkeypatch, drawn_nothing):
    whole, part = stopped_run(tmp_path, monkeypatch)
    data = (part / "checkpoints" / "last.pt").read_bytes()
    for number, (draw, how) in enumerate(draws("checkpoint", times, damage.ALL)):
        folder = tmp_path / f"{number}"
        shutil.copytree(part, folder)
        last = folder / "checkpoints" / "last.pt"
        last.write_bytes(how(draw, data))
        if counted(["train", "--resume", folder], "last.pt") == 2:
            # The one of the last epoch's end is whole: named, and taken by whoever asks for no certain one.
            words = ["train", *TINY, "--epochs", "3", "--exp_dir", folder, "--resume", "auto"]
            assert main([str(w) for w in words]) == 0
            assert (folder / "checkpoints" / "last.pt.old").exists()
        assert model_of(folder) == model_of(whole)
        assert lines(folder) == lines(whole)


def test_logs(times, counted, tmp_path, monkeypatch, drawn_nothing):
    whole, part = stopped_run(tmp_path, monkeypatch)
    data = (part / "metrics.jsonl").read_bytes()
    before = lines(part)
    for number, (draw, how) in enumerate(draws("log", times, damage.TEXT)):
        folder = tmp_path / f"{number}"
        shutil.copytree(part, folder)
        (folder / "metrics.jsonl").write_bytes(how(draw, data))
        if counted(["train", "--resume", folder], "metrics.jsonl") == 2:
            continue
        assert model_of(folder) == model_of(whole)
        found, expected = lines(folder), lines(whole)
        # What was written after the stop is there, and of what was before all lines but the damaged ones.
        after = expected[len(before) :]
        assert found[len(found) - len(after) :] == after
        earlier = [line for line in found[: len(found) - len(after)] if "epoch" in line]
        assert sum(line in before for line in earlier) >= len(earlier) - 2


def test_journals(times, counted, tmp_path, monkeypatch, drawn_nothing):
    pytest.importorskip("optuna")
    in_this_process(monkeypatch)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({"flags": TRIAL | {"steps": 1}, "search": SEARCH, "trials": 2}))
    words = ["sweep", "--config", file, "--sweep_dir", tmp_path / "sweep"]
    assert main([str(w) for w in words]) == 0
    monkeypatch.setattr("movae_fast.cli.study.Study.work", lambda self, worker: 0)
    journal = tmp_path / "sweep" / "study.journal"
    data = journal.read_bytes()
    for draw, how in draws("journal", times, damage.TEXT):
        journal.write_bytes(how(draw, data))
        # Half a journal is one of a study with fewer trials.
        counted(words, "study.journal", none="no trial succeeded")


def test_prepared_files(times, counted, tmp_path, drawn_nothing):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(images / f"{i:02d}.png")
    assert main(["data", "prepare", str(images), "--image_size", "16"]) == 0
    common = ["train", "--dataset", "folder", "--data_dir", images, "--steps", "1", "--batch_size", "4"]
    common += ["--image_size", "16", "--device", "cpu", "--seed", "0", "--hidden_dims", "4"]
    assert main([str(w) for w in [*common, "--exp_dir", tmp_path / "whole"]]) == 0
    files = sorted(p for p in (images / "prepared").iterdir() if p.is_file())
    for number, (draw, how) in enumerate(draws("prepared", times, damage.SIZES)):
        path = files[number % len(files)]
        data = path.read_bytes()
        path.write_bytes(how(draw, data))
        folder = tmp_path / f"{number}"
        if counted([*common, "--exp_dir", folder], "prepared") == 0:
            assert model_of(folder) == model_of(tmp_path / "whole")
        path.write_bytes(data)


def test_configurations(times, counted, tmp_path):
    assert main(["train", *TINY, "--steps", "1", "--exp_dir", str(tmp_path / "run")]) == 0
    data = (tmp_path / "run" / "config.yaml").read_bytes()
    path = tmp_path / "config.yaml"
    for draw, how in draws("config", times, damage.ALL):
        path.write_bytes(how(draw, data))
        # Refused in any case: what is left of the file may be a valid one.
        assert counted(["train", "--config", path, "--dataset", "nothing"], "") == 2
