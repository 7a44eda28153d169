"""Define what a study searches over (ranges and choices of flags) and for (metrics of a run)."""

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

# Figures of `movae evaluate` besides its metrics of factors -> the metric that gives them.
FIGURES = {
    **dict.fromkeys(("rate", "distortion", "elbo", "active_units"), "elbo"),
    **dict.fromkeys(("psnr", "ssim", "ms_ssim"), "images"),
    **dict.fromkeys(("dci_disentanglement", "dci_completeness", "dci_informativeness"), "dci"),
    **{name: name for name in ON_FACTORS if name != "dci"},
}


def check_space(name: str, space: Any) -> None:
    """Refuse a range that is none."""
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
    """Yield every choice that is a mapping of flags."""
    return [choice for space in search.values() if is_bundle(space) for choice in space["choices"]]


def parameter(name: str) -> str:
    """Return the name under which the study stores the index of a choice."""
    return f"{name} (choice)"


def is_bundle(space: Any) -> bool:
    """Return whether the choices are mappings of flags."""
    return "choices" in space and isinstance(space["choices"][0], dict)


def assigned(values: dict[str, Any]) -> dict[str, Any]:
    """Return flags by name from values of the search, with a mapping's own flags in its place."""
    flags: dict[str, Any] = {}
    for name, value in values.items():
        flags |= value if isinstance(value, dict) else {name: value}
    return flags


def suggest(trial: optuna.Trial, name: str, space: dict[str, Any]) -> Any:
    """Return one flag's value; a range between whole numbers gives whole numbers."""
    if "choices" in space:
        # Optuna's own choices are scalars; ours may be lists.
        return space["choices"][trial.suggest_int(parameter(name), 0, len(space["choices"]) - 1)]
    low, high, log = space["low"], space["high"], bool(space.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, step=space.get("step", 1), log=log)
    return trial.suggest_float(name, low, high, step=space.get("step"), log=log)


def check_objectives(objectives: Mapping[str, str]) -> None:
    """Refuse a direction that there is not, and a figure that no run has."""
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
    """Refuse a search with a value that makes no run, which `check` says, or whose runs lack an objective.

    Every value is tried by itself, with the first values of the other flags.
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
    """Check the configuration; return the names of its runs' test metrics, in order."""
    check(config)
    names = list(config.model_info.weighted_objectives(vars(config.model), config.image_shape))
    names += ["loss", "mse", "mse_mean_image"]
    if config.model_info.latents == "codebook":
        names += ["codebook_usage", "perplexity"]
    return dict.fromkeys(f"test/{name}" for name in names)


def check_storage(storage: str | None) -> None:
    """Refuse a storage that cannot be, before the folder of the study is made."""
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
    """Return the rows whose values of the names in `over` have the best first objective, everything else
    being equal.

    Seeds are not compared but averaged.
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
