"""`movae runs`, and runs by the beginning of their name in every command that takes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from movae_fast.cli import main
from movae_fast.cli.flags import curve, evaluate, generate, reconstruct, sample, train
from movae_fast.training.run_list import IN_ROW, find_run, list_runs

LINES = (
    {"step": 10, "epoch": 0, "train/conflict": 0.25},
    {"step": 20, "epoch": 1, "test/loss": 3.5, "test/mse": 0.02},
)


def make_run(folder: Path, age: float, **config) -> Path:
    """Make a run's files, `age` seconds old."""
    (folder / "checkpoints").mkdir(parents=True)
    flags = {"dataset": "digits", "arch": "vae", "agg": "upgrad", "multirate": False, "seed": 1} | config
    (folder / "config.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in flags.items()) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    when = time.time() - age
    os.utime(folder / "config.yaml", (when, when))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs"
    make_run(root / "digits" / "vae" / "upgrad" / "20260101-100000", 300)
    make_run(root / "digits" / "vae" / "sum" / "20260101-110000", 200, agg="sum")
    make_run(root / "sprites" / "vq_vae" / "upgrad" / "20260102-090000", 100, dataset="sprites", arch="vq_vae")
    return root


def test_the_list_says_what_each_run_is_and_reached(runs: Path) -> None:
    listed = list_runs(runs)
    assert [r.name for r in listed] == ["20260101-100000", "20260101-110000", "20260102-090000"]
    row = listed[-1].as_row()
    assert [r.as_row() for r in list_runs(runs, IN_ROW)] == [r.as_row() for r in listed]
    assert (row["dataset"], row["arch"]) == ("sprites", "vq_vae")
    assert (row["step"], row["test/loss"], row["train/conflict"]) == (20, 3.5, 0.25)


def test_conflict_is_the_fraction_over_the_logs_last_lines(runs: Path) -> None:
    """Of a log whose lines measured 1, 3 and no steps; the last line alone would say 0."""
    run = runs / "digits" / "vae" / "sum" / "20260101-110000"
    measured = [(1, 1.0, 1), (4, 1 / 3, 3), (5, 0.0, 4)]
    lines = [
        {"step": s, "train/conflict": f, "train/conflict_steps": n, "train/min_cosine": -0.5}
        for s, f, n in measured
    ]
    damaged = {"step": 6, "train/conflict": "x", "train/conflict_steps": 9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, damaged]))
    (row,) = (r.as_row() for r in list_runs(runs) if r.path == run)
    assert row["train/conflict"] == pytest.approx(2 / 8)


def test_a_damaged_run_is_listed_with_what_can_be_read(runs: Path) -> None:
    run = runs / "digits" / "vae" / "sum" / "20260101-110000"
    (run / "config.yaml").write_bytes(b"\xff{: not yaml")
    (run / "metrics.jsonl").write_bytes(b'{"step": 4}\n{"step": "x"}\nhalf a li')
    (row,) = (r for r in list_runs(runs) if r.path == run)
    assert row.config == {}
    assert row.step == 4
    (run / "metrics.jsonl").unlink()
    assert len(list_runs(runs)) == 3
    assert main(["runs"]) == 0


def test_the_table_and_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--sort", "arch", "--limit", "1"]) == 0
    table = capsys.readouterr().out
    assert "20260102-090000" in table
    assert "25%" in table
    assert "20260101" not in table
    assert main(["runs", str(runs), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["agg"] for row in rows] == ["upgrad", "sum", "upgrad"]
    assert rows[0]["config"]["seed"] == 1


def test_no_run_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 1
    assert "no run below" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("latest", "sprites/vq_vae/upgrad/20260102-090000"),
        ("20260102", "sprites/vq_vae/upgrad/20260102-090000"),
        ("20260101-11", "digits/vae/sum/20260101-110000"),
        ("digits/vae/sum", "digits/vae/sum/20260101-110000"),
        ("runs/digits/vae/sum/20260101-110000", "digits/vae/sum/20260101-110000"),
    ],
)
def test_a_run_by_the_beginning_of_its_name(runs: Path, name: str, found: str) -> None:
    expected = Path("runs", found)
    assert find_run(name) == expected
    assert Path(evaluate.parse([name]).weights) == expected
    assert Path(sample.parse([name])[0].weights) == expected
    assert [Path(r) for r in curve.parse([name, "latest"]).runs] == [expected, find_run("latest")]
    assert Path(str(train.parse(["--resume", name]).resumed)) == expected
    assert Path(generate.parse(["--model", name, "--outdir", "x"]).model) == expected
    assert Path(reconstruct.parse(["--model", name]).model) == expected
    ladder = ["--arch", "provlae", "--dataset", "sprites", "--mode", "visualize", "--init_from", name]
    config = train.parse(ladder).config
    assert config is not None
    assert Path(str(config.ladder.init_from)) == expected


def test_a_wrong_name_is_answered_with_the_runs_that_are_there(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "20260103"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "20260103: there is no such file" in error
    assert all(r.name in error for r in list_runs(runs))
    assert main(["evaluate", "20260101"]) == 2
    error = capsys.readouterr().err
    assert "beginning of 2 runs" in error
    assert "20260102" not in error


@pytest.mark.parametrize(
    "words", ["evaluate runs", "sample runs", "compare runs latest", "generate --outdir x --model runs"]
)
def test_a_folder_in_a_runs_place_is_answered_with_the_runs_in_it(runs: Path, capsys, words: str) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert "no run" in error
    assert all(r.name in error for r in list_runs(runs))
    assert error.count("\n") == 1


def test_a_folder_of_runs_is_no_run(runs: Path) -> None:
    assert find_run("runs/digits") == Path("runs/digits")  # movae curve takes it whole
    assert find_run(
        "auto.pt", runs / "sprites" / "vq_vae" / "upgrad" / "20260102-090000" / "checkpoints"
    ) == Path("auto.pt")


def test_two_hundred_runs_take_less_than_a_second(tmp_path: Path) -> None:
    """CPU seconds of a process, less those of one that lists nothing; some machines are slow: twice the aim."""
    for k in range(200):
        make_run(tmp_path / "many" / f"{k:04d}", k, **{f"flag_{i}": i for i in range(100)})
    (tmp_path / "none").mkdir()

    def seconds(folder: str) -> float:
        before = os.times()
        command = [sys.executable, "-m", "movae_fast", "runs", str(tmp_path / folder), "--limit", "5"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    assert seconds("many") - seconds("none") < 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "flags.yaml: no such file; give a YAML file"),
        ("[1", "--config is not YAML: while parsing"),
        ("beta: 3", "--config has beta, which is no flag of this command"),
    ],
)
def test_a_file_of_flags_that_cannot_be_read_is_one_line(text, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "flags.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["runs", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    path.write_text("limit: -1")
    assert main(["runs", "--config", str(path)]) == 2
    assert "--limit -1 must be at least 0" in capsys.readouterr().err
