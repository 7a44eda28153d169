"""Train a model from Python: `movae_fast.train`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from movae_fast.api import notebook
from movae_fast.api.settings import Config, naming_arguments, settings
from movae_fast.api.trained_run import TrainedRun
from movae_fast.names import ArgumentError
from movae_fast.run_pictures import draw_missing, draw_run, show_run
from movae_fast.training.callbacks import Callbacks, nothing
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import check_settings, validate, without_export
from movae_fast.training.continuing import continued, settings_of
from movae_fast.training.device_checks import check_fits
from movae_fast.training.loop import fit
from movae_fast.training.progress import Bar
from movae_fast.training.run import Run
from movae_fast.training.run_list import find_run
from movae_fast.training.signals import Interrupted
from movae_fast.training.start import resume, setup, start_or_resume
from movae_fast.training.train_step import StepMetrics


def train(
    config: Config | None = None,
    *,
    on_step: Callable[[Run, StepMetrics], object] | None = None,
    on_epoch_end: Callable[[Run, dict[str, float]], object] | None = None,
    on_checkpoint: Callable[[Run, Path], object] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> TrainedRun:
    """Train a model as the command `movae train` does, and return the run, which gives access to its folder.

    config: the name of a recipe (`"demo"`, `"mo_vae/cifar10-vae-upgrad"`), the path of a YAML file, settings by
        name, or a `TrainConfig`; None means the defaults.
    overrides: single settings, named like the command's flags: `epochs=3, latent_dim=16`. `resume=` continues
        an earlier run, given its folder, its name, a checkpoint, or "latest"; `resume="auto"` continues the run
        in `exp_dir`, or starts it there.
    on_step, on_epoch_end, on_checkpoint: called with the run and with a step's metrics, an epoch's metrics, or
        the path of a checkpoint. See `training.callbacks.Callbacks`. A step's metrics lie on the device: the
        loop waits for it only if a callback reads a value.
    progress: whether to show a bar and a line per epoch, and in a notebook the pictures.

    Ctrl-C (in a notebook, interrupting the kernel) saves the run and raises KeyboardInterrupt, whose message
    says how to continue. Raises ArgumentError for settings that cannot work, before any file is written, and
    NonFiniteError if a loss becomes NaN or infinite. Under torchrun every process calls this function, and they
    train together.
    """
    given = {"on_step": on_step, "on_epoch_end": on_epoch_end, "on_checkpoint": on_checkpoint}
    for name, function in given.items():
        if function is not None and not callable(function):
            raise ArgumentError(f"{name} {function!r:.80} is no function")
    with naming_arguments():
        work = start(settings(config, overrides))
    work.callbacks = Callbacks(on_step or nothing, on_epoch_end or nothing, on_checkpoint or nothing)
    return trained(work, progress)


def start(given: dict[str, Any]) -> Run:
    """Return the run that the settings start, or continue with `resume`, ready to be trained. Raises ValueError
    for settings that cannot work."""
    resumed = given.pop("resume", None)

    def changes(where: str) -> Callable[[dict[str, Any]], TrainConfig]:
        defaults = TrainConfig().flat()
        return lambda saved: continued({**defaults, **settings_of(saved), **given}, saved, where)

    if resumed not in (None, "auto"):
        where = str(find_run(resumed))
        return resume(Path(where), changes(where))
    config = TrainConfig.from_flat(given)
    if config.ladder.mode == "visualize":
        raise ArgumentError("mode visualize draws a trained ladder; movae_fast.load gives its model")
    if resumed is None:
        check_settings(config)  # refuses, among others, an export's path that exists
    without_export(config, validate)
    check_fits(config)
    if resumed is None:
        return setup(config)
    if config.run.exp_dir is None:
        raise ArgumentError("resume auto needs exp_dir: the folder in which the run starts, or goes on")
    return start_or_resume(config, changes(config.run.exp_dir))


def trained(work: Run, progress: bool) -> TrainedRun:
    """Train the run to its end, draw and export what its settings ask for, and return it; its logs are closed
    in any case."""
    shown = progress and work.world.main
    tags: list[str] = []

    def draw(run: Run, tag: str) -> None:
        draw_run(run, tag)
        tags.append(tag)

    work.draw, work.show = draw, show_run
    try:
        draw_missing(work)
        if not work.ended:
            with Bar(work, Console(quiet=not shown)) as bar:
                fit(work, bar)
        if tags and shown and notebook.running():  # below the bar, which may swallow what is shown meanwhile
            notebook.show_pictures(work.folder, tags[-1])
        if work.config.run.export is not None and work.world.main:
            work.export(Path(work.config.run.export))
        return TrainedRun(work.folder)
    except Interrupted as interrupt:
        stop(work, interrupt)
    finally:
        logs, work.logs = work.logs, None
        if logs is not None:
            logs.close()


def stop(work: Run, interrupt: Interrupted) -> NoReturn:
    """Raise KeyboardInterrupt after SIGINT, SystemExit after another signal; the run has been saved."""
    if interrupt.signum == signal.SIGINT:
        raise KeyboardInterrupt(
            f"saved at step {work.step:,}; go on with movae_fast.train(resume={str(work.folder)!r})"
        ) from None
    raise SystemExit(128 + interrupt.signum) from None
