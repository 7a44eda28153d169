"""Define what a sweep varies (ranges and choices of flags) and what it optimizes (metrics of a run)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from movae_fast.evaluation.metric_names import ON_FACTORS
from movae_fast.names import ArgumentError, nearest
from movae_fast.training.config import TrainConfig

if TYPE_CHECKING:
    import optuna

# Result of `movae evaluate`, other than those of factor metrics -> the metric that computes it.
FIGURES = {
    **dict.fromkeys(("rate", "distortion", "elbo", "active_units"), "elbo"),
    **dict.fromkeys(("psnr", "ssim", "ms_ssim"), "images"),
    **dict.fromkeys(("dci_disentanglement", "dci_completeness", "dci_informativeness"), "dci"),
    **{name: name for name in ON_FACTORS if name != "dci"},
}


def check_space(name: str, space: Any) -> None:
    """Raise ValueError if `space`, the range or the choices given for the flag `name`, is not valid."""
    valid = "{low, high} with log or step, or {choices: [...]}"
    if not isinstance(space, dict) or not (set(space) == {"choices"} or {"low", "high"} <= set(space)):
        raise ValueError(f"search: {name}: give {valid}")
    if "choices" in space:
        if not isinstance(space["choices"], list) or not space["choices"]:
            raise ValueError(f"search: {name}: choices are a list that is not empty")
        mappings = [isinstance(choice, dict) for choice in space["choices"]]
        if any(mappings) and not all(mappings):
            raise ValueError(f"search: {name}: either every choice is a mapping of flags or none is")
        return
    if set(space) - {"low", "high", "log", "step"}:
        raise ValueError(f"search: {name}: give {valid}")
    low, high = space["low"], space["high"]
    numbers = [v for v in (low, high) if type(v) in (int, float) and math.isfinite(v)]
    if len(numbers) < 2 or not low < high:
        raise ValueError(f"search: {name}: low {low} must be a number below high {high}")
    step, log = space.get("step", 1), space.get("log", False)
    if type(step) not in (int, float) or not 0 < step < math.inf:
        raise ValueError(f"search: {name}: step {step} must be a number above 0")
    if type(low) is int and type(high) is int and type(step) is not int:
        raise ValueError(f"search: {name}: between whole numbers step {step} must be one, too")
    if not isinstance(log, bool):
        raise ValueError(f"search: {name}: log {log} must be true or false")
    if space.get("log") and ("step" in space or low <= 0):
        raise ValueError(f"search: {name}: a logarithmic range has no step and a low above 0")


def bundles(search: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every choice in the search that is a mapping of several flags rather than one flag's value."""
    return [choice for space in search.values() if is_bundle(space) for choice in space["choices"]]


def parameter(name: str) -> str:
    """Return the name of the Optuna parameter that holds the index of the choice made for a flag."""
    return f"{name} (choice)"


def is_bundle(space: Any) -> bool:
    """Return whether the choices of a search space are mappings of several flags rather than values of one
    flag."""
    return "choices" in space and isinstance(space["choices"][0], dict)


def assigned(values: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a trial by name: a value that is a mapping of flags is replaced by its entries."""
    flags: dict[str, Any] = {}
    for name, value in values.items():
        flags |= value if isinstance(value, dict) else {name: value}
    return flags


def suggest(trial: optuna.Trial, name: str, space: dict[str, Any]) -> Any:
    """Ask Optuna for the value of the flag `name` in this trial; a range between whole numbers gives whole
    numbers."""
    if "choices" in space:
        # Optuna's own choices are scalars; ours may be lists.
        return space["choices"][trial.suggest_int(parameter(name), 0, len(space["choices"]) - 1)]
    low, high, log = space["low"], space["high"], bool(space.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, step=space.get("step", 1), log=log)
    return trial.suggest_float(name, low, high, step=space.get("step"), log=log)


def check_objectives(objectives: Mapping[str, str]) -> None:
    """Raise ValueError for a direction other than minimize or maximize, or a metric that no run has."""
    for name, direction in objectives.items():
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"objectives: {name}: {direction}: valid: minimize, maximize")
        if not name.startswith("test/") and name not in FIGURES:
            raise ValueError(
                f"objectives: {name} is unknown{nearest(name, FIGURES)}; valid: test/NAME, {', '.join(FIGURES)}"
            )


def check_trials(
    search: Mapping[str, dict[str, Any]],
    objectives: Mapping[str, str],
    fixed: Mapping[str, Any],
    check: Callable[[TrainConfig], None],
) -> None:
    """Check the search by the configurations of its trials: raise ValueError if one is not valid, or if its
    runs would not measure an objective.

    Each value of each flag is tried once, with the first values of the other flags. `check` raises ValueError
    for an invalid configuration; `fixed` are the flags that do not vary.
    """
    first = {
        name: space["choices"][0] if "choices" in space else space["low"] for name, space in search.items()
    }
    config = TrainConfig.from_flat(dict(fixed) | assigned(first))
    measured = measured_by(config, check)
    for name, space in search.items():
        for value in space["choices"][1:] if "choices" in space else [space["high"]]:
            try:
                tried = TrainConfig.from_flat(dict(fixed) | assigned(first | {name: value}))
                measured |= measured_by(tried, check)
            except ValueError as error:
                raise ValueError(f"search: {name}: {error}") from None
    for name in objectives:
        if name.startswith("test/") and name not in measured:
            raise ValueError(f"objectives: {name}: a run measures {', '.join(measured)}")
    factors = [n for n in objectives if FIGURES.get(n) in ON_FACTORS]
    if factors and not config.info.factor_sizes:
        raise ValueError(
            f"objectives: {factors[0]} needs data with known discrete factors; {config.info.name} has none"
        )


def measured_by(config: TrainConfig, check: Callable[[TrainConfig], None]) -> dict[str, None]:
    """Check a configuration with `check`, and return the names of the test metrics that its runs log, as the
    keys of a dict."""
    check(config)
    names = config.objective_names
    names += ["loss", "mse", "mse_mean_image"]
    if config.model_info.latents == "codebook":
        names += ["codebook_usage", "perplexity"]
    return dict.fromkeys(f"test/{name}" for name in names)


def check_storage(storage: str | None) -> None:
    """Raise ArgumentError for a study's storage (a file or a database URL) that cannot be opened, before any
    folder is made."""
    if storage is None:
        return
    if "://" not in storage:
        if not Path(storage).expanduser().absolute().parent.is_dir():
            raise ArgumentError(f"storage {storage}: its folder is not there; make it first")
        return
    import optuna

    try:
        optuna.storages.get_storage(storage)
    except Exception as error:  # SQLAlchemy's, or a driver that is not installed
        reason = " ".join(str(error).split())
        raise ArgumentError(f"storage {storage}: {type(error).__name__}: {reason:.200}") from None


def selected(
    objectives: Mapping[str, str], rows: Sequence[dict[str, Any]], over: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the trials that use the best value of the parameters in `over`, separately for each setting of the
    other parameters.

    Best means the best first objective, averaged over seeds; trials that differ only by seed are kept together.
    A row is a trial of `study.Report`.
    """
    worse = 1 if next(iter(objectives.values())) == "minimize" else -1
    mine, kept = {parameter(name) for name in over}, []
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        settings = {k: v for k, v in row["params"].items() if k not in ("seed", parameter("seed"))}
        rest = json.dumps({k: v for k, v in settings.items() if k not in mine}, sort_keys=True)
        own = json.dumps({k: v for k, v in settings.items() if k in mine}, sort_keys=True)
        groups.setdefault(rest, {}).setdefault(own, []).append(row)
    for group in groups.values():
        kept += min(group.values(), key=lambda same: worse * statistics.mean(r["values"][0] for r in same))
    return sorted(kept, key=lambda row: row["number"])
