"""Write a run's metrics, settings and pictures to MLflow (extra `mlflow`)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from movae_fast.files import replacing
from movae_fast.names import first_line
from movae_fast.training.config import MlflowConfig

AT_ONCE = 100  # settings that MLflow takes in one call


class MlflowLog:
    """Send a run to the MLflow server, or folder, that the configuration names.

    A server that fails during a run is left alone from then on, with one warning: the run's own log has
    everything. One that fails at the start stops the run before its first step.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], flags: MlflowConfig) -> None:
        import mlflow

        self.failed = False
        try:
            self.client = mlflow.MlflowClient(tracking_uri=flags.mlflow_uri)
            self.run = known_run(self.client, folder / "mlflow_id") or self.new_run(folder, config, flags)
        except Exception as error:  # of MLflow, of its network library, of its database
            raise ValueError(f"--use_mlflow: {first_line(error)[:200]}; see --mlflow_uri") from None

    def new_run(self, folder: Path, config: Mapping[str, Any], flags: MlflowConfig) -> str:
        """Make the run at MLflow, with its settings; return its id, which the run's folder keeps."""
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(flags.mlflow_experiment)
        number = (
            experiment.experiment_id if experiment else self.client.create_experiment(flags.mlflow_experiment)
        )
        run = self.client.create_run(number, run_name=folder.absolute().name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in config.items() if value is not None]
        for first in range(0, len(params), AT_ONCE):
            self.client.log_batch(run, params=params[first : first + AT_ONCE])
        self.client.log_text(run, yaml.safe_dump(dict(config), sort_keys=False), "config.yaml")
        with replacing(folder / "mlflow_id") as file:
            file.write(run.encode())
        return run

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in scalars.items()]
        self.attempt(lambda: self.client.log_batch(self.run, metrics=metrics))

    def write_images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:  # uint8 [h, w, 3] each
        """Send pictures by their name."""
        for name, picture in pictures.items():
            self.attempt(partial(self.client.log_image, self.run, picture, key=name, step=step))

    def close(self) -> None:
        """Tell MLflow that the process is done with the run."""
        self.attempt(lambda: self.client.set_terminated(self.run))

    def attempt(self, send: Callable[[], Any]) -> None:
        """Send, unless that failed before."""
        if self.failed:
            return
        try:
            send()
        except Exception as error:
            self.failed = True
            text = f"MLflow: {first_line(error)[:200]}; the run goes on without it, its own log has everything"
            warnings.warn(text, stacklevel=2)


def known_run(client: Any, path: Path) -> str | None:
    """Return the id in a resumed run's file, open for more; None where there is no file."""
    if not path.exists():
        return None
    run = path.read_text(encoding="utf-8").strip()
    client.update_run(run, status="RUNNING")
    return run
