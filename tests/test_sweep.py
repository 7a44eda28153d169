"""`movae sweep`: two workers share a study, it resumes, it reports; and what it refuses."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from movae_fast.choices import TEXT_SETS
from movae_fast.cli import main, parsing
from movae_fast.cli.sweep import SweepFlags, make_study, read_sweep, sweep_names
from movae_fast.data import DATASETS
from movae_fast.evaluation.curve_runs import expanded
from movae_fast.plots import sweep_plot
from movae_fast.sweeps.search import check_space
from movae_fast.sweeps.study import Report, Study
from movae_fast.training.config import SECTIONS, TrainConfig
from movae_fast.training.config_checks import check_settings, validate
from movae_fast.training.signals import Interrupted

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

FLAGS = {
    "dataset": "digits",
    "image_size": 16,
    "arch": "vae",
    "latent_dim": 4,
    "hidden_dims": [8, 8],
    "steps": 3,
    "batch_size": 50,
    "limit_train": 200,
    "limit_test": 50,
    "num_samples": 1,
    "device": "cpu",
    "seed": 0,
}
SEARCH = {"beta": {"low": 0.01, "high": 4.0, "log": True}, "latent_dim": {"choices": [2, 4]}}


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep's file; the words that run it in tmp_path."""

    def write(**values):
        given = {
            "flags": FLAGS,
            "search": SEARCH,
            "trials": 2,
            "objectives": {"test/loss": "minimize"},
        } | values
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        return ["sweep", "--config", str(path), "--sweep_dir", str(tmp_path / "sweep")]

    return write


def in_this_process(monkeypatch):
    """Workers one after the other, here: they share the tests' interpreter."""

    class Now:
        def __init__(self, words):
            self.status = main(words[3:])

        def wait(self):
            return self.status

    monkeypatch.setattr(subprocess, "Popen", Now)


def numbers(folder):
    return [t["number"] for t in json.loads((folder / "results.json").read_text())["trials"]]


def test_a_study_runs_resumes_and_reports_its_best(sweep, tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    words = sweep()
    assert main(words) == 0
    folder = tmp_path / "sweep"
    assert numbers(folder) == [0, 1]
    assert main([*words, "--trials", "4", "--workers", "2"]) == 0
    record = json.loads((folder / "results.json").read_text())
    assert numbers(folder) == [0, 1, 2, 3]
    values = [t["values"][0] for t in record["trials"]]
    assert [t["number"] for t in record["trials"] if t["best"]] == [values.index(min(values))]
    saved = yaml.safe_load((folder / "trials" / "0002" / "config.yaml").read_text())
    trial = record["trials"][2]
    assert saved["beta"] == trial["params"]["beta"]
    assert saved["latent_dim"] == SEARCH["latent_dim"]["choices"][trial["params"]["latent_dim (choice)"]]
    assert (folder / "study.png").stat().st_size > 1000
    assert "best trial of 4" in capsys.readouterr().out
    assert main(words) == 0  # it has all of them
    assert numbers(folder) == [0, 1, 2, 3]


def test_two_objectives_report_a_pareto_front(sweep, tmp_path, monkeypatch, capsys):
    in_this_process(monkeypatch)
    flags = FLAGS | {"dataset": "sprites", "limit_train": 400}
    objectives = {"mig": "maximize", "test/mse": "minimize"}
    assert main(sweep(flags=flags, objectives=objectives, trials=3, samples=200)) == 0
    trials = json.loads((tmp_path / "sweep" / "results.json").read_text())["trials"]
    front = {t["number"] for t in trials if t["best"]}

    def beats(a, b):
        (ma, ea), (mb, eb) = a["values"], b["values"]
        return ma >= mb and ea <= eb and (ma, ea) != (mb, eb)

    assert front == {t["number"] for t in trials if not any(beats(o, t) for o in trials)}
    assert "Pareto front" in capsys.readouterr().out


def test_a_sweep_whose_trials_all_fail_says_the_first_error(sweep, monkeypatch, capsys):
    in_this_process(monkeypatch)
    # Finite, allowed, and hopeless: the loss overflows.
    assert main(sweep(flags=FLAGS | {"lr": 1e30}, trials=2)) == 1
    error = capsys.readouterr().err
    assert "no trial succeeded; the first error: " in error
    assert "NonFiniteError" in error or "FloatingPointError" in error


def test_an_interrupted_trial_is_run_again(sweep, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    words = sweep(trials=1)
    spec, stem = read_sweep(words[2])
    study = make_study(SweepFlags(words[2], sweep_dir=str(tmp_path / "sweep")), spec, stem)
    study.create()
    lost = study.open().ask()
    lost.suggest_float("beta", 0.01, 4.0, log=True)
    lost.set_user_attr("host", socket.gethostname())
    lost.set_user_attr("pid", 2**22 + 1)  # beyond any process
    assert main(words) == 0
    trials = json.loads((tmp_path / "sweep" / "results.json").read_text())["trials"]
    assert [t["number"] for t in trials] == [1]
    assert trials[0]["params"]["beta"] == lost.params["beta"]


def test_a_trial_killed_before_it_was_signed_is_run_again(sweep, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    words = sweep(trials=1)
    spec, stem = read_sweep(words[2])
    study = make_study(SweepFlags(words[2], sweep_dir=str(tmp_path / "sweep")), spec, stem)
    study.create()
    unsigned = study.open().ask()
    study.revive()
    assert study.left() == 0  # it may be about to be signed
    monkeypatch.setattr("movae_fast.sweeps.study.UNSIGNED", datetime.timedelta(0))
    study.revive()
    assert study.left() == 1
    assert main(words) == 0
    assert numbers(tmp_path / "sweep") == [unsigned.number + 1]


def journal_of(sweep, tmp_path, monkeypatch):
    """A study of one trial: the words that run it and its journal."""
    in_this_process(monkeypatch)
    words = sweep(trials=1)
    assert main(words) == 0
    return words, tmp_path / "sweep" / "study.journal"


@pytest.mark.parametrize("half", [b'{"op_code": 5, "worker', b"{", b"\0\0"])
def test_half_a_journal_line_of_a_killed_process_is_cut_off(sweep, tmp_path, monkeypatch, half):
    words, journal = journal_of(sweep, tmp_path, monkeypatch)
    with journal.open("ab") as file:
        file.write(half)
    assert main([*words, "--trials", "2"]) == 0
    assert numbers(tmp_path / "sweep") == [0, 1]


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"5", b"{}", b"\0" * 80, b"[" * 100_000, b""])
def test_a_damaged_journal_is_said_by_name(sweep, tmp_path, monkeypatch, capsys, damage):
    words, journal = journal_of(sweep, tmp_path, monkeypatch)
    texts = journal.read_bytes().split(b"\n")
    texts[2] = damage
    journal.write_bytes(b"\n".join(texts))
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{journal}: line 3 is damaged" in error
    assert error.count("\n") == 1
    assert journal.read_bytes() == b"\n".join(texts)


def test_a_journal_whose_lines_make_no_study_is_said_by_name(sweep, tmp_path, monkeypatch, capsys):
    words, journal = journal_of(sweep, tmp_path, monkeypatch)
    texts = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([b'{"op_code":4}', *texts]))
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{journal} cannot be read" in error
    assert error.count("\n") == 1


def test_a_damaged_list_of_results_is_said_by_name(tmp_path):
    (tmp_path / "trials").mkdir()
    for text in ("{", "[]", "null", '{"trials": [{}]}', '{"trials": [{"number": "x"}]}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is damaged"):
            expanded([str(tmp_path)])


@pytest.mark.parametrize("grid", [False, True])
def test_a_signal_ends_a_sweep_and_the_same_command_goes_on(sweep, tmp_path, monkeypatch, capsys, grid):
    in_this_process(monkeypatch)
    search = {"search": {"latent_dim": {"choices": [2, 4, 6]}}, "sampler": "grid"} if grid else {}
    words = sweep(trials=3, **search)

    def interrupted(self, trial):
        if trial.number == 1:
            raise Interrupted(signal.SIGTERM)
        return trial_of(self, trial)

    trial_of = Study.trial
    with monkeypatch.context() as patch:
        patch.setattr(Study, "trial", interrupted)
        assert main(words) == 143
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "sweep" / "results.json").exists()
    assert main(words) == 0
    trials = json.loads((tmp_path / "sweep" / "results.json").read_text())["trials"]
    assert len(trials) == 3
    if grid:
        assert len({tuple(t["params"].values()) for t in trials}) == 3


def test_sigterm_to_a_sweep_ends_its_workers(sweep, tmp_path):
    words = sweep(trials=4, workers=2, flags=FLAGS | {"steps": 1_000_000, "log_every": 4})
    process = subprocess.Popen(
        [sys.executable, "-m", "movae_fast", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    trials = tmp_path / "sweep" / "trials"
    for _ in range(600):
        if sum(path.stat().st_size > 0 for path in trials.glob("*/metrics.jsonl")) == 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on" in out
    assert all((folder / "checkpoints" / "last.pt").is_file() for folder in trials.iterdir())


def test_pruning_stops_a_trial_that_lags(sweep, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    assert main(sweep(flags=FLAGS | {"steps": 0, "epochs": 2}, trials=3)) == 0
    assert numbers(tmp_path / "sweep") == [0, 2]


MODELS = {"choices": [{"multirate": True, "beta_min": 0.1}, {"beta": 0.5}, {"beta": 4.0}]}


def test_a_grid_runs_every_combination_and_ends_in_curves(sweep, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    drawn = []
    monkeypatch.setattr("movae_fast.cli.sweep.draw", lambda config, paths, console: drawn.append(paths) or [])
    words = sweep(
        sampler="grid",
        trials=None,
        search={"model": MODELS, "lr": {"choices": [1e-3, 1e-9]}, "seed": {"choices": [0, 1]}},
        curve={"betas": 3, "select": ["lr"]},
    )
    words += ["--data_dir", str(tmp_path)]
    assert main([*words, "--trials", "5"]) == 0  # some of them, and then the rest
    assert main(words) == 0
    folder = tmp_path / "sweep"
    trials = json.loads((folder / "results.json").read_text())["trials"]
    assert len(trials) == 12
    assert len({json.dumps(t["params"], sort_keys=True) for t in trials}) == 12
    seen = set()
    for t in trials:
        flags = yaml.safe_load((folder / "trials" / f"{t['number']:04d}" / "config.yaml").read_text())
        model = MODELS["choices"][t["params"]["model (choice)"]]
        assert {k: flags[k] for k in model} == model
        assert flags["multirate"] is ("multirate" in model)
        assert flags["data_dir"] == str(tmp_path)
        seen.add((t["params"]["model (choice)"], flags["lr"], flags["seed"]))
    assert len(seen) == 12
    # Of each model the learning rate with the better mean over seeds, with all its seeds.
    means = {}
    for t in trials:
        p = t["params"]
        means.setdefault(p["model (choice)"], {}).setdefault(p["lr (choice)"], []).append(t["values"][0])
    best = {model: min(by, key=lambda lr: sum(by[lr])) for model, by in means.items()}
    wanted = [t["number"] for t in trials if best[t["params"]["model (choice)"]] == t["params"]["lr (choice)"]]
    assert [int(p.name) for p in drawn[-1]] == wanted
    assert len(wanted) == 6


def test_a_sweeps_curve_is_drawn(sweep, tmp_path, monkeypatch):
    in_this_process(monkeypatch)
    flags = FLAGS | {"recons_dist": "bernoulli", "recons_reduction": "sum"}
    assert (
        main(sweep(flags=flags, sampler="grid", trials=None, search={"model": MODELS}, curve={"betas": 3})) == 0
    )
    record = json.loads((tmp_path / "sweep" / "curve" / "curve.json").read_text())
    assert [len(r["points"]) for r in record["runs"]] == [5, 1, 1]
    assert (tmp_path / "sweep" / "curve" / "curve.png").exists()


@pytest.mark.slow
def test_twelve_trials_with_two_parallel_workers(sweep, tmp_path):
    words = sweep(trials=12, workers=2)
    command = [sys.executable, "-m", "movae_fast", *words]
    assert subprocess.run([*command, "--trials", "6"], check=False).returncode == 0
    assert len(numbers(tmp_path / "sweep")) == 6
    assert subprocess.run(command, check=False).returncode == 0
    assert numbers(tmp_path / "sweep") == list(range(12))
    assert (tmp_path / "sweep" / "study.png").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": None}, "a sweep has `search`"),
        ({"search": {"betta": {"low": 1, "high": 2}}}, "betta is no flag (did you mean beta"),
        ({"search": {"beta": {"low": 2, "high": 1}}}, "low 2 must be a number below high 1"),
        ({"search": {"beta": {"choices": []}}}, "choices are a list"),
        ({"objectives": {"mig": "maximize"}}, "mig needs data with known discrete factors; digits has none"),
        ({"objectives": {"migg": "maximize"}}, "migg is unknown"),
        ({"objectives": {"mig": "max"}}, "valid: minimize, maximize"),
        ({"flags": FLAGS | {"image_size": 15}, "trials": 0}, "must be at least 1"),
        ({"trails": 3}, "trails is unknown (did you mean trials"),
        ({"sampler": "random"}, "sampler random: valid: tpe, grid"),
        ({"sampler": "grid"}, "search: beta: a grid is over {choices: [...]}"),
        ({"search": {"any": {"choices": [{"betta": 1}]}}}, "betta is no flag (did you mean beta"),
        ({"search": {"any": {"choices": [{"beta": 1.0}, 2]}}}, "either every choice is a mapping"),
        ({"search": {"any": {"choices": [{"beta": 1.0}, {"beta": -1.0}]}}}, "is -1.0"),
        ({"curve": {"beta": 3}}, "curve: beta is unknown (did you mean betas"),
        ({"curve": {"select": ["lr"]}}, "curve: select: lr is not searched"),
    ],
)
def test_bad_sweeps_are_one_line(sweep, capsys, values, message, tmp_path):
    assert main(sweep(**values)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_another_study_in_the_folder_is_refused(sweep, monkeypatch, capsys):
    in_this_process(monkeypatch)
    assert main(sweep(trials=1)) == 0
    assert main(sweep(trials=1, search={"beta": {"low": 1.0, "high": 2.0}})) == 2
    assert "holds a study with other search" in capsys.readouterr().err
    assert main(sweep(objectives={"test/loss": "minimize", "test/mse": "minimize"})) == 2
    assert "other objectives" in capsys.readouterr().err


def test_ranges():
    for space in (
        {"low": 1, "high": 2, "step": 1},
        {"low": 0.1, "high": 2, "log": True},
        {"choices": [[1], [2]]},
    ):
        check_space("beta", space)
    with pytest.raises(ValueError, match="no step and a low above 0"):
        check_space("beta", {"low": 0.0, "high": 2, "log": True})
    with pytest.raises(ValueError, match=r"give \{low, high\}"):
        check_space("beta", {"low": 0.0})


def test_the_sweeps_and_the_recipes_beside_them_are_valid():
    kinds = parsing.flag_types(list(SECTIONS.values()))
    for name in sweep_names():
        spec, stem = read_sweep(name)
        make_study(SweepFlags(name), spec, stem)
    names = [
        n
        for n in parsing.recipe_names()
        if n.startswith(
            ("provlae/", "mrvae/", "nvae/", "text/", "quantizers/", "objectives/", "priors/fashion_mnist")
        )
    ]
    assert len([n for n in names if n.startswith("provlae/")]) == 9
    for name in names:
        values = parsing.read_config(name, kinds)
        if values["dataset"] in TEXT_SETS:
            check_settings(TrainConfig.from_flat(values))  # without the corpus, which is the user's to bring
            continue
        if values["dataset"] not in DATASETS:
            values["dataset"] = "celeba"  # another of its shape: the reader may come with a plug-in
        validate(TrainConfig.from_flat(values))


def test_the_plot_of_an_empty_study(tmp_path):
    found = Report(["test/loss"])
    assert sweep_plot(tmp_path / "study.png", found.names, found.rows).exists()
