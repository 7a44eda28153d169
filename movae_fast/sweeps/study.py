"""Run a sweep's study: choose trials, train a run for each, and divide the trials among several processes."""

from __future__ import annotations

import datetime
import fcntl
import itertools
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from movae_fast.evaluation.measure import measure
from movae_fast.files import alive, free_path, replacing
from movae_fast.names import ArgumentError, first_line
from movae_fast.sweeps.search import assigned, parameter, suggest
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate
from movae_fast.training.loop import fit
from movae_fast.training.progress import Bar
from movae_fast.training.run_folder import tidy
from movae_fast.training.signals import Interrupted
from movae_fast.training.start import setup

if TYPE_CHECKING:
    import optuna


UNSIGNED = datetime.timedelta(minutes=1)  # without a sign of life: a trial's process has then ended


@dataclass
class Report:
    """Hold the results of a study.

    `rows` has a dict per complete trial: number, params, values (one per objective in `names`), and `best`,
    whether the trial is the best or on the Pareto front. `error` is the first failed trial's message.
    """

    names: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


@dataclass
class Study:
    """Describe an Optuna study whose trials are training runs in `folder`, and run it."""

    name: str
    folder: Path
    storage: str | None
    search: dict[str, dict[str, Any]]
    objectives: dict[str, str]
    metrics: dict[str, str]  # objective -> metric of `movae evaluate`
    fixed: dict[str, Any]
    grid: bool  # every combination of the choices instead of a search
    trials: int
    workers: int
    samples: int
    prune: bool
    seed: int

    def create(self) -> None:
        """Make the folder and the study, or check those that exist and queue the combinations of a grid.

        Raises ArgumentError if the existing study has another search, objectives or fixed flags.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.journal is not None:
            check_journal(self.journal)
        for folder in (self.folder, *(self.folder / "trials").glob("*")):
            tidy(folder)
        study = self.open()
        asked = {"search": self.search, "objectives": self.objectives, "flags": self.fixed}
        known = study.user_attrs.get("asked", asked)
        differ = [name for name, value in asked.items() if known.get(name) != value]
        if differ:
            raise ArgumentError(
                f"sweep_dir {self.folder} holds a study with other {' and '.join(differ)}; name a new folder"
            )
        study.set_user_attr("asked", asked)
        if self.grid:
            names = [parameter(name) for name in self.search]
            choices = [range(len(space["choices"])) for space in self.search.values()]
            for point in itertools.product(*choices):
                study.enqueue_trial(dict(zip(names, point, strict=True)), skip_if_exists=True)

    def open(self, seed: int = 0) -> optuna.Study:
        """Return the Optuna study in its storage, created if it is new; `seed` is that of the sampler.

        Raises ValueError if Optuna is missing or the storage cannot be read.
        """
        try:
            import optuna
        except ImportError:
            raise ValueError("movae sweep needs Optuna: pip install 'movae-fast[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        where: Any = self.storage
        try:
            if self.journal is not None:
                from optuna.storages import JournalStorage
                from optuna.storages.journal import JournalFileBackend

                where = JournalStorage(JournalFileBackend(str(self.journal)))
            known = {s.study_name: s for s in optuna.get_all_study_summaries(where)}
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever Optuna, or the database's own library, makes of a damaged one
            why = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise ArgumentError(
                f"storage {self.journal or where} cannot be read ({why}); restore it, or name a new one"
            ) from None
        if self.name in known and len(known[self.name].directions) != len(self.objectives):
            raise ArgumentError(
                f"sweep_dir {self.folder} holds a study with other objectives; name a new folder"
            )
        pruner = optuna.pruners.MedianPruner() if self.pruned else optuna.pruners.NopPruner()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna says that parallel sampling is an experimental feature
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.workers > 1)
            return optuna.create_study(
                study_name=self.name,
                storage=where,
                sampler=sampler,
                pruner=pruner,
                directions=list(self.objectives.values()),
                load_if_exists=True,
            )

    @property
    def journal(self) -> Path | None:
        """Return the file that stores the study; None if a database does."""
        if self.storage is not None and "://" in self.storage:
            return None
        return Path(self.storage or self.folder / "study.journal")

    @property
    def pruned(self) -> bool:
        """Return whether trials may be stopped early: only in a search with one objective that is measured
        during training."""
        return self.prune and not self.grid and len(self.objectives) == 1 and not self.metrics

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a lock while this process counts trials and asks for the next one, so that no other process of
        this machine does so at the same time."""
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def counted(self, study: optuna.Study) -> int:
        """Return the number of trials that are finished or running, without those that were interrupted or are
        queued."""
        from optuna.trial import TrialState

        started = [t for t in study.trials if t.state != TrialState.WAITING]
        return sum(not t.user_attrs.get("interrupted", False) for t in started)

    def left(self) -> int:
        return max(0, self.trials - self.counted(self.open()))

    def revive(self) -> None:
        """Queue the parameters of interrupted trials again: those whose process ran on this machine and is
        gone."""
        import optuna

        study = self.open()
        for trial in study.trials:
            if trial.state == optuna.trial.TrialState.RUNNING and lost(trial):
                storage = study._storage
                storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
                study.enqueue_trial(trial.params)
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def work(self, worker: int) -> int:
        """Run trials in this process until the study has all of them; return the process's exit status.

        `worker` is this process's number among the sweep's workers. A trial that fails is recorded and the next
        one runs.
        """
        import optuna

        done = self.counted(self.open())
        study = self.open(self.seed + 1000 * worker + done)
        while True:
            with self.alone():
                if self.counted(study) >= self.trials:
                    return 0
                trial = study.ask()
                trial.set_user_attr("host", socket.gethostname())
                trial.set_user_attr("pid", os.getpid())
            try:
                values = self.trial(trial)
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                print(f"trial {trial.number} pruned", flush=True)
                continue
            except Interrupted as interrupt:
                trial.set_user_attr("interrupted", True)
                study.enqueue_trial(trial.params)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                return 128 + interrupt.signum
            except Exception as error:
                # A trial that fails is a result; the sweep goes on, and says so at its end if all of them do.
                trial.set_user_attr("error", f"{type(error).__name__}: {first_line(error)}")
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                print(f"trial {trial.number} failed: {first_line(error)}", flush=True)
                continue
            study.tell(trial, values)
            shown = "  ".join(f"{n} {v:.4g}" for n, v in zip(self.objectives, values, strict=True))
            print(f"trial {trial.number}: {shown}", flush=True)

    def trial(self, trial: optuna.Trial) -> list[float]:
        """Train a run with the trial's flags, and return the objectives' values."""
        flags = self.fixed | assigned({n: suggest(trial, n, space) for n, space in self.search.items()})
        folder = free_path(self.folder / "trials" / f"{trial.number:04d}")
        config = TrainConfig.from_flat(flags | {"exp_dir": str(folder)})
        validate(config)
        torch.compiler.reset()  # or the trials of one process would run into the limit on recompilations
        run = setup(config)
        assert run.logs is not None
        watched = next(iter(self.objectives)) if self.pruned else None
        logs = Reporting(run.logs, trial, watched, run.total_steps)
        run.logs = logs  # type: ignore[assignment]
        try:
            with Bar(run, Console(quiet=True)) as bar:
                metrics = fit(run, bar)
        finally:
            logs.close()
        if self.metrics:
            run.model.eval()
            run.config.data.limit_train = 0
            names, seed = list(dict.fromkeys(self.metrics.values())), config.run.seed or 0
            measured = measure(run.config, run.model, names, run.device, self.samples, seed)
            metrics = metrics | measured.metrics
        missing = [name for name in self.objectives if name not in metrics]
        if missing:
            raise ValueError(f"objective {missing[0]}: this run has {', '.join(metrics)}")
        return [metrics[name] for name in self.objectives]

    def write(self, results: Report) -> Path:
        """Write the objectives and the results' trials to results.json; return its path."""
        path = self.folder / "results.json"
        content = {"objectives": self.objectives, "trials": results.rows}
        with replacing(path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
        return path


class Reporting:
    """Write a run's log lines as `Logs` does, and report the objective's value at each evaluation to the Optuna
    trial, which may end the run early (TrialPruned)."""

    def __init__(self, logs: Any, trial: optuna.Trial, objective: str | None, steps: int) -> None:
        self.logs, self.trial, self.objective, self.steps = logs, trial, objective, steps

    def write(self, line: dict[str, Any]) -> None:
        import optuna

        self.logs.write(line)
        if self.objective is not None and self.objective in line:
            self.trial.report(line[self.objective], line["step"])
            # At the last step there is nothing left to save.
            if line["step"] < self.steps and self.trial.should_prune():
                raise optuna.TrialPruned

    def mark(self) -> dict[str, Any]:
        return self.logs.mark()

    def close(self) -> None:
        self.logs.close()


def lost(trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a running trial's process is gone: it ran on this machine and no longer exists.

    A trial without a process number was interrupted between being created and being marked; it counts as lost
    after a minute.
    """
    known = trial.user_attrs
    if "pid" not in known or "host" not in known:
        began = trial.datetime_start
        return began is None or datetime.datetime.now() - began > UNSIGNED
    return known["host"] == socket.gethostname() and not alive(known["pid"])


def check_journal(path: Path) -> None:
    """Repair the study's journal: cut off an incomplete last line, which a killed process leaves. Raises
    ValueError for any other damaged line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and not is_entry(line):
                raise ValueError(
                    f"{path}: line {number} is damaged; restore the file, or name a new --sweep_dir"
                )
    if not ends_whole(path):
        from optuna.storages.journal import JournalFileSymlinkLock

        lock = JournalFileSymlinkLock(str(path))
        lock.acquire()
        try:
            if not ends_whole(path):  # now nobody is writing it
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        finally:
            lock.release()


def is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int)


def ends_whole(path: Path) -> bool:
    """Return whether a journal is empty or ends with a complete line."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        return size == 0 or file.read() == b"\n"


def report(study: Study) -> Report:
    """Return the study's complete trials, with the best of them marked, and the first error."""
    import optuna

    opened = study.open()
    complete = [t for t in opened.trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = {t.number for t in (opened.best_trials if complete else [])}
    rows = [
        {"number": t.number, "params": t.params, "values": t.values, "best": t.number in best} for t in complete
    ]
    errors = [t.user_attrs["error"] for t in opened.trials if "error" in t.user_attrs]
    return Report(list(study.objectives), rows, errors[0] if errors else "no trial was run")
