"""`movae compare`: what differs between runs, their scores, their curves."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest

from movae_fast import plots
from movae_fast.cli import check_outputs, main, parsing
from movae_fast.cli.compare import differing, flags_table
from movae_fast.cli.flags.curve import CurveConfig
from movae_fast.training.config import ModelConfig
from movae_fast.training.log_lines import conflict_of
from movae_fast.training.run_list import RunSummary, run_folder, unlike_names


def make_run(folder: Path, slope: float, **config) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    flags = {"dataset": "digits", "arch": "vae", "lr": 0.001, "exp_dir": None} | config
    (folder / "config.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in flags.items()) + "\n")
    lines = [
        {
            "step": k,
            "train/lr": 1e-3,
            "train/kl": slope * k,
            "train/weight_kl": 1.0,
            "train/conflict": k / 4,
            "train/conflict_steps": 1,
            "train/min_cosine": -0.1 * k,
        }
        for k in (1, 2, 3)
    ]
    lines.append({"step": 3, "test/kl": slope, "test/loss": 7 * slope})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "vae" / "first", 1.0, agg="sum")
    make_run(tmp_path / "runs" / "vae" / "second", -2.0, agg="upgrad", lr=0.01)
    return tmp_path / "runs"


def test_the_terminal_has_what_differs_and_the_scores(runs: Path, capsys) -> None:
    assert main(["compare", "first", "second"]) == 0
    out = capsys.readouterr().out
    rows = {cells[1].strip(): cells for line in out.splitlines() if (cells := line.split("│"))[1:]}
    assert [c.strip() for c in rows["agg"][2:4]] == ["sum", "upgrad"]
    assert [c.strip() for c in rows["lr"][2:4]] == ["0.001", "0.01"]
    assert "dataset" not in rows
    assert [c.strip() for c in rows["weighted sum"][2:4]] == ["7", "-14"]
    assert rows["update in conflict"][2].strip() == "50.0% of 3 steps"
    assert (runs / "vae" / "first" / "compare" / "compare.png").is_file()
    assert main(["compare", "first", "second"]) == 0  # nothing is overwritten
    assert (runs / "vae" / "first" / "compare" / "compare-2.png").is_file()


def test_the_plot_has_a_colour_per_run(runs: Path, tmp_path: Path) -> None:
    lines = [{"step": k, "train/weight_kl": 1.0, "train/kl": float(k)} for k in range(1, 5)]
    other = [line | {"train/kl": -line["train/kl"]} for line in lines]
    picture = iio.imread(plots.compared_curves(tmp_path / "a.png", {"a": lines, "b": other}))[..., :3]
    for k in range(2):
        wanted = [int(plots.colour(k)[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture.astype(int) - wanted).max(-1) == 0).sum() > 50
    third = [int(plots.colour(2)[i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(picture.astype(int) - third).max(-1) == 0).sum() == 0


def test_flags_that_one_run_lacks_differ_and_places_do_not() -> None:
    configs = [{"a": 1, "b": [1, 2], "exp_dir": "x"}, {"a": 1, "b": [1, 2], "c": None, "exp_dir": "y"}]
    assert differing(configs) == {"c": ["", None]}
    named = [RunSummary(Path(k), datetime.now(), config) for k, config in zip("xy", configs, strict=True)]
    assert flags_table(["x", "y"], named).row_count == 0  # no run has a value to show


def test_names_are_as_long_as_it_takes() -> None:
    assert unlike_names([Path("/r/a/1"), Path("/r/b/2")]) == ["1", "2"]
    assert unlike_names([Path("/r/a/1"), Path("/r/b/1")]) == ["a/1", "b/1"]
    assert unlike_names([Path("/r/a/1"), Path("/r/a/1")]) == ["1", "1"]


def test_conflict_counts_steps_and_not_lines() -> None:
    lines = [
        {"train/conflict": 1.0, "train/conflict_steps": 1, "train/min_cosine": -0.5},
        {"train/conflict": 0.0, "train/conflict_steps": 3, "train/min_cosine": 0.2},
        {"train/loss": 1.0},
    ]
    assert conflict_of(lines) == (0.25, 4, -0.5)
    assert conflict_of(lines, "step_") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["first"], "needs two runs or more"),
        (["first", "vae/first"], "needs two runs or more"),
        (["first", "third"], "below runs are vae/second, vae/first"),
        (["first", "runs/vae"], "it is no run"),
        ([], "which runs?"),
    ],
)
def test_bad_requests_are_one_line(runs: Path, capsys, words, message) -> None:
    assert main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("vae/first, vae/second", "vae/second, vae/first")
    assert error.count("\n") == 1


def test_a_checkpoint_names_its_run(runs: Path) -> None:
    folder = runs / "vae" / "first"
    (folder / "checkpoints" / "last.pt").touch()
    assert run_folder(folder / "checkpoints" / "last.pt") == folder
    with pytest.raises(ValueError, match=r"below .* are (first|second), "):
        run_folder(runs / "vae")


def test_one_run_whose_name_begins_like_null_is_a_list_of_one() -> None:
    kinds = parsing.flag_types([CurveConfig, ModelConfig])
    for name in ("nvae", "none_at_all", "[x"):
        written = [f'--runs=["{name}"]'] if name[0] != "[" else [f"--runs={name}"]
        assert parsing.normalise(["--runs", name], kinds) == written
    for value in ("null", "None", "[8, 8]"):
        assert parsing.normalise(["--hidden_dims", value], kinds) == [f"--hidden_dims={value}"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A folder's name that is a file's, and a place below a file, of every flag that names one."""
    file = tmp_path / "file"
    file.touch()
    folders = [("export", "outdir"), ("sample", "save_dir"), ("compare", "out"), ("curve", "out")]
    for command, flag in folders:
        with pytest.raises(ValueError, match=f"^--{flag} .*file is a file, not a folder"):
            check_outputs(command, SimpleNamespace(**{flag: str(file)}))
    for command, flag in [*folders, ("report", "out"), ("encode", "out")]:
        with pytest.raises(ValueError, match=f"^--{flag} .*file is a file, not a folder"):
            check_outputs(command, SimpleNamespace(**{flag: str(file / "below")}))
    check_outputs("report", SimpleNamespace(out=str(file)))  # the command itself overwrites nothing
    check_outputs("export", SimpleNamespace(outdir=None))
    assert list(tmp_path.iterdir()) == [file]
