"""Define and check the flags of `movae sweep`, and its YAML file."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from movae_fast.cli import parsing
from movae_fast.cli.flags.curve import CurveConfig, check_curve
from movae_fast.names import nearest
from movae_fast.sweeps.search import bundles, check_objectives, check_space, check_trials, is_bundle
from movae_fast.training.config import SECTIONS
from movae_fast.training.config_checks import check_settings
from movae_fast.training.limits import ONE, ZERO, check_values
from movae_fast.training.yaml_file import read_yaml

DESCRIPTION = "Search over flags of `movae train`: movae sweep --config provlae, or a YAML file"
SWEEPS = Path(__file__).parents[2] / "sweeps"


@dataclass
class SweepFlags:
    """Sweep.

    Args:
        config: Sweep by name, or a YAML file: `search` (flag -> {low, high, log, step} or {choices}; choices
            that are mappings each set the flags in them, under any name), `objectives` (metric -> minimize or
            maximize), and any of `config` (a recipe), `flags` (fixed ones), `sampler` (tpe, or grid: every
            combination of the choices), `curve` (flags of `movae curve`, which draws the trials at the end, and
            `select`: names of the search of whose values only the best is drawn), `trials`, `workers`,
            `storage`, `samples`, `prune`.
        trials: Trials that the study shall have in all, those of earlier calls included.
        workers: Processes that share the study.
        storage: Journal file, or URL of a database for many machines; by default study.journal in the folder.
        sweep_dir: Folder of the study and its runs; one that holds this study is continued.
        seed: Seed of the sampler.
        device: Device of every trial.
        data_dir: Folder of the original files, for every trial.
        worker: Number of a worker process; set by the sweep itself.
    """

    config: str
    trials: int | None = None
    workers: int | None = None
    storage: str | None = None
    sweep_dir: str | None = None
    seed: int = 0
    device: str | None = None
    data_dir: str | None = None
    worker: int | None = None


@dataclass
class SweepFile:
    """Hold the content of a sweep's YAML file."""

    search: dict[str, dict[str, Any]]
    objectives: dict[str, str] = field(default_factory=lambda: {"test/loss": "minimize"})
    config: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    sampler: str = "tpe"
    curve: dict[str, Any] | None = None
    trials: int | None = None
    workers: int = 1
    storage: str | None = None
    samples: int = 10_000
    prune: bool = True


@dataclass
class SweepAsked:
    """Hold one call of `movae sweep`: its arguments, the flags read from them, and the sweep's file that they
    name."""

    argv: list[str]
    flags: SweepFlags
    spec: SweepFile
    stem: str  # what the study is called


def parse(argv: Sequence[str]) -> SweepAsked:
    """Return the flags of `movae sweep` and the sweep's file, after all checks that do not need torch.

    Raises ValueError for an invalid flag, or a file that is missing or invalid.
    """
    words = parsing.normalise(argv, parsing.flag_types([SweepFlags]))
    name, words = parsing.take(words, "config")
    if name is None and "--help" not in words:
        raise ValueError(f"which sweep? give --config, one of {parsing.listed(sweep_names())} or a YAML file")
    parser = parsing.new_parser("sweep", [SweepFlags], DESCRIPTION)
    given = parsing.parse(parser, words if name is None else [f"--config={name}", *words], {})
    flags = SweepFlags(**{"config": name, **given})
    spec, stem = read_sweep(flags.config)
    check_sweep(flags, spec)
    return SweepAsked(list(argv), flags, spec, stem)


def check_sweep(flags: SweepFlags, spec: SweepFile) -> dict[str, Any]:
    """Check a sweep as far as that works without torch, and return the flags that all its trials share.

    Values in `spec` are converted in place to the types of their flags. Raises ValueError if Optuna is not
    installed or something in the file or the flags is invalid.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("movae sweep needs Optuna: pip install 'movae-fast[sweep]'")
    check_values(flags, worker=ZERO)
    check_values(spec, samples=ONE)
    kinds = parsing.flag_types(list(SECTIONS.values()))
    type_search(flags.config, spec, kinds)
    if spec.curve is not None:
        curve_config(spec, [], None)
    if not spec.objectives:
        raise ValueError(f"--config {flags.config}: objectives are empty")
    check_objectives(spec.objectives)
    fixed = parsing.read_config(spec.config, kinds) if spec.config else {}
    fixed |= spec.flags | {k: v for k in ("device", "data_dir") if (v := getattr(flags, k)) is not None}
    check_trials(spec.search, spec.objectives, fixed, check_settings)
    return fixed


def sweep_names() -> list[str]:
    return sorted(str(p.relative_to(SWEEPS).with_suffix("")) for p in SWEEPS.rglob("*.yaml"))


def read_sweep(name: str) -> tuple[SweepFile, str]:
    """Return the sweep called `name`, or in the YAML file of that path, and a short name for its study and
    folder.

    Raises ValueError for an unknown name, or a file that is not a sweep's.
    """
    path = parsing.find_yaml(name, SWEEPS, "sweep")
    values = read_yaml(path, "--config")
    known = [f.name for f in dataclasses.fields(SweepFile)]
    if not isinstance(values, dict) or not isinstance(values.get("search"), dict) or not values["search"]:
        raise ValueError(f"--config {path}: a sweep has `search`, the flags to search over with their ranges")
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: {key} is unknown{nearest(str(key), known)}")
    kinds = typing.get_type_hints(SweepFile)
    values = {key: parsing.typed(key, value, kinds[key]) for key, value in values.items()}
    inside = path.is_relative_to(SWEEPS)
    return SweepFile(**values), str(path.relative_to(SWEEPS).with_suffix("")) if inside else path.stem


def type_search(config: str, spec: SweepFile, kinds: dict[str, Any]) -> None:
    """Check the names in `search` and `flags` of a sweep's file, and convert their values to the types of the
    flags.

    kinds: flag of `movae train` -> its type; config: the file's name for messages. Changes `spec` in place.
    Raises ValueError for a name that is not a flag or a value of another type.
    """
    for name, space in spec.search.items():
        check_space(name, space)
    bundled = [key for choice in bundles(spec.search) for key in choice]
    single = [name for name, space in spec.search.items() if not is_bundle(space)]
    for where, names in (("search", [*single, *bundled]), ("flags", list(spec.flags))):
        for name in names:
            if name not in kinds:
                raise ValueError(f"--config {config}: {where}: {name} is no flag{nearest(name, kinds)}")
    check_sampler(config, spec)
    spec.flags = {name: parsing.typed(name, value, kinds[name]) for name, value in spec.flags.items()}
    for name, space in spec.search.items():
        type_space(name, space, kinds)


def type_space(name: str, space: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Convert in place the choices of one searched flag to its type, or check the ends of its range.

    A choice may be a mapping that sets several flags; then each of its values gets the type of its own flag.
    Raises ValueError for a value of another type.
    """
    if is_bundle(space):
        space["choices"] = [{k: parsing.typed(k, v, kinds[k]) for k, v in c.items()} for c in space["choices"]]
    elif "choices" in space:
        space["choices"] = [parsing.typed(name, choice, kinds[name]) for choice in space["choices"]]
    else:
        for end in ("low", "high"):
            parsing.typed(name, space[end], kinds[name])


def check_sampler(name: str, spec: SweepFile) -> None:
    """Raise ValueError for an unknown sampler, or for the grid sampler with a search over a range instead of
    choices."""
    if spec.sampler not in ("tpe", "grid"):
        raise ValueError(f"--config {name}: sampler {spec.sampler}: valid: tpe, grid")
    for key, space in spec.search.items():
        if spec.sampler == "grid" and "choices" not in space:
            raise ValueError(f"--config {name}: search: {key}: a grid is over {{choices: [...]}}")


def curve_config(spec: SweepFile, runs: list[str], folder: Path | None) -> CurveConfig:
    """Return the section `curve` of a sweep's file as flags of `movae curve`, for the given runs and output
    folder.

    Raises ValueError for a name that is not a flag of `movae curve`, or an invalid value.
    """
    given = dict(spec.curve or {})
    known = {f.name for f in dataclasses.fields(CurveConfig)} - {"runs", "out"}
    for key in given:
        if key not in {*known, "select"}:
            raise ValueError(f"curve: {key} is unknown{nearest(str(key), [*known, 'select'])}")
    select = given.pop("select", [])
    if not isinstance(select, list):
        raise ValueError(f"curve: select: {select} must be a list of names of the search")
    kinds = typing.get_type_hints(CurveConfig)
    given = {key: parsing.typed(f"curve: {key}", value, kinds[key]) for key, value in given.items()}
    for name in select:
        if name not in spec.search:
            raise ValueError(f"curve: select: {name} is not searched{nearest(str(name), spec.search)}")
    config = CurveConfig(runs=runs, out=None if folder is None else str(folder), **given)
    check_curve(config)
    return config
