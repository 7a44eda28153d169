"""Malformed command lines and YAML files: status 2, one line that names what is wrong, nothing made."""

import os
import subprocess
import sys
from itertools import islice

import pytest

from movae_fast.cli import main, parsing, train
from movae_fast.cli.errors import shortened
from movae_fast.sweeps.study import Study
from movae_fast.training.yaml_file import read_yaml
from tests import malformed

# So many apart, the lines and files of the quick tests; the slow ones take all.
EVERY = 31


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A trained run, of two latents on digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = "train --dataset digits --image_size 16 --hidden_dims 4 4 --latent_dim 2 --steps 1 --batch_size 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_run", lambda run, tag: None)
        assert main([*words.split(), "--limit_train", "16", "--limit_test", "8", f"--exp_dir={folder}"]) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to stand in; whatever would begin to work says so instead."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "setup", malformed.stopped)
    monkeypatch.setattr(Study, "create", malformed.stopped)
    return folder


def judged(lines, capsys):
    """Judge lines (part of the message, words); count, the slowest's seconds, and the faults."""
    faults, slowest, count = [], 0.0, 0
    for part, line in lines:
        verdict = malformed.judge(line)
        count, slowest = count + 1, max(slowest, verdict.seconds)
        if fault := verdict.fault(part):
            faults.append(f"{fault}: {' '.join(line)[:200]}")
    with capsys.disabled():
        print(f"\n{count} malformed, {count - len(faults)} refused in one line, the slowest in {slowest:.2f} s")
    return count, faults


def files(folder, step=1):
    """Each YAML file written to `folder`, with the line that reads it."""
    folder.mkdir()
    for number, (_, data, line) in enumerate(islice(malformed.yaml_files(), 0, None, step)):
        path = folder / f"{number}.yaml"
        path.write_bytes(data)
        yield "", [str(path) if word == "FILE" else word for word in line]


def lines(run_folder, step=1):
    return islice([*malformed.train_lines(), *malformed.command_lines(str(run_folder))], 0, None, step)


def held(run_folder):
    return sorted((p, p.stat().st_mtime_ns) for p in run_folder.rglob("*"))


@pytest.mark.slow
def test_every_malformed_line(place, run_folder, capsys):
    before = held(run_folder)
    count, faults = judged(lines(run_folder), capsys)
    assert faults == []
    assert count >= 300
    assert held(run_folder) == before


@pytest.mark.slow
def test_every_malformed_file(place, tmp_path, capsys):
    count, faults = judged(files(tmp_path / "yaml"), capsys)
    assert faults == []
    assert count >= 200


def test_malformed_lines(place, run_folder, capsys):
    before = held(run_folder)
    assert judged(lines(run_folder, EVERY), capsys)[1] == []
    assert held(run_folder) == before


def test_malformed_files(place, tmp_path, capsys):
    assert judged(files(tmp_path / "yaml", EVERY), capsys)[1] == []


def test_in_a_process_of_its_own(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    words = [sys.executable, "-m", "movae_fast", "train", "--dataset", "sprites", "--device", "cpu:7"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "movae train: --device cpu:7: there is one CPU device, whatever its processors: cpu\n"
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    "line",
    [
        "--lr 1e-4 --lr 2e-4",
        "--steps 0",
        "--device cpu:0",
        "--agg upgrad --pref_weights 1 2",
        "--agg krum --arch betatc_vae --agg_args.n_selected 2",
        "--momentum 0",
        "--scheduler multi_step --scheduler_milestones 1 --scheduler_gamma 1",
        "--data_dir [1]",
        "--seed 4294967295",
    ],
)
def test_lines_that_are_strange_and_whole(place, line):
    assert malformed.judge(["train", "--dataset", "sprites", *line.split()]).status == "accepted"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr: 1e-4", {"lr": 1e-4}),
        ("lr: 1E+2\nbeta: .5\nmomentum: 0.", {"lr": 100.0, "beta": 0.5, "momentum": 0.0}),
        ("lr: '1e-4'\nseed: '7'", {"lr": 1e-4, "seed": 7}),
        ("epochs: 010", {"epochs": 10}),
        ("compile: off\nnormalize: off\nflip: Yes", {"compile": "off", "normalize": False, "flip": True}),
        ("exp_dir: 2026-01-01\nsave_path: 12:30", {"exp_dir": "2026-01-01", "save_path": "12:30"}),
        ("beta: 2\nlr: 1", {"beta": 2.0, "lr": 1.0}),
        ("loss_weights: {kl: 1e-3}", {"loss_weights": {"kl": 1e-3}}),
        (
            "hidden_dims: &a [4, 8]\nscheduler_milestones: *a",
            {"hidden_dims": [4, 8], "scheduler_milestones": [4, 8]},
        ),
        ("<<: {lr: 1.0, epochs: 2}\nlr: 2.0", {"lr": 2.0, "epochs": 2}),
        ("", {}),
    ],
)
def test_yaml_as_people_write_it(tmp_path, text, values):
    path = tmp_path / "flags.yaml"
    path.write_text(text)
    read = parsing.read_config(str(path), malformed.KINDS)
    assert read == values
    assert {k: type(v) for k, v in read.items()} == {k: type(v) for k, v in values.items()}


def test_the_files_of_the_package_are_read(tmp_path):
    for path in (*parsing.RECIPES.rglob("*.yaml"), *(parsing.RECIPES.parent / "sweeps").rglob("*.yaml")):
        assert read_yaml(path, "--config")


def test_a_message_is_one_line_of_less_than_600_characters():
    assert shortened("a\nb\tc\x1b[31m") == "a\\nb\\tc\\x1b[31m"
    assert shortened("é ü 中") == "é ü 中"
    cut = shortened("begin" + "x" * 5000 + "end")
    assert len(cut) < 600
    assert cut.startswith("begin")
    assert cut.endswith("end")
