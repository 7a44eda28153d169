"""Define which flags a resumed run may change, and build its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from movae_fast.training.config import FILLED_IN, RunConfig, TrainConfig
from movae_fast.training.config_checks import validate, without_export
from movae_fast.training.config_files import with_its_regularizer
from movae_fast.training.device_checks import check_fits
from movae_fast.training.run_folder import folder_of

# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {
    *(f.name for f in dataclasses.fields(RunConfig)),
    *(
        "data_dir",
        "download",
        "loader",
        "resident_share",
        "num_workers",
        "prefetch",
        "eval_batch_size",
        "limit_test",
    ),
    *("use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_tags"),
    *("use_mlflow", "mlflow_uri", "mlflow_experiment"),
} - {"seed", "log_every", "save_path"}


def settings_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that a run was saved with, as the defaults for resuming it.

    Flags of that one call (resume, exp_dir, export) and what a run finds of its corpus are left out; a
    regularizer is added to runs older than its flag.
    """
    left_out = ("resume", "exp_dir", "export", *FILLED_IN)
    return with_its_regularizer({k: v for k, v in saved.items() if k not in left_out})


def continued(values: dict[str, Any], saved: Mapping[str, Any], resumed: str) -> TrainConfig:
    """Return the configuration of a resumed run from `values`, all its flags by name, checked against the saved
    ones.

    resumed: the run's folder or checkpoint. Raises ValueError for a change of a flag that has to stay the same
    within a run.
    """
    known = settings_of(saved)
    folder = folder_of(Path(resumed))
    where, values["exp_dir"] = values["exp_dir"], None
    if where is not None and Path(where).resolve() != folder.resolve():
        raise ValueError(f"--resume {resumed} goes on in {folder}; leave out --exp_dir {where}")
    kept = {"epochs", "steps"} if known["arch"] == "provlae" else set()  # they are its stages' lengths
    if known.get("aggressive") or known.get("scheduler") == "plateau":
        kept |= {"limit_test", "eval_batch_size"}  # training decides by what is evaluated
    changed = [k for k, v in known.items() if (k not in RESUMABLE or k in kept) and values[k] != v]
    if changed:
        was = ", ".join(f"--{k} {known[k]}" for k in changed)
        raise ValueError(
            f"--resume {resumed}: the run has {was}; a resumed run keeps it. Start a new run instead"
        )
    if values["export"] is None and (export := saved.get("export")) and not Path(export).exists():
        values["export"] = export  # it was to be written at the end
    config = TrainConfig.from_flat(values | {name: saved[name] for name in FILLED_IN if name in saved})
    without_export(config, validate)
    check_fits(config)
    return config
