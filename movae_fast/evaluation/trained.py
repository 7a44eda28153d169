"""Adapt a trained model's configuration to its use for evaluation, and check its options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from movae_fast.models import VAE, model_class, model_options
from movae_fast.models.multirate import Rates
from movae_fast.names import ArgumentError
from movae_fast.training.config import TrainConfig
from movae_fast.training.run_folder import folder_of


def adapt_config(
    trained: TrainConfig, device: str, data_dir: str | None = None, batch_size: int | None = None
) -> None:
    """Change a trained model's configuration, in place, to another device, data folder and batch size."""
    data, run = trained.data, trained.run
    data.data_dir = data_dir or data.data_dir
    if batch_size is not None:
        data.batch_size = data.eval_batch_size = batch_size
    run.device, run.accumulate, run.export = device, 1, None


def caption_of(trained: TrainConfig, weights: Path, beta: float | None = None, step: int | None = None) -> str:
    """Return the words of a caption that say which run (or file of weights) a picture is of, and at which
    beta and step."""
    of_run = weights.is_dir() or weights.absolute().parent.name == "checkpoints"
    name = folder_of(weights).absolute().name if of_run else weights.name
    about = f"{name}: {trained.model.arch} on {trained.data.dataset}, {trained.objective.agg}"
    return about + ("" if beta is None else f", beta {beta:.3g}") + ("" if step is None else f", step {step:,}")


def beta_of(model: VAE) -> float | None:
    """Return the beta that a multi-rate model is set to; None of a model with one beta."""
    return None if model.rates is None else float(model.rates.evaluated.exp().reshape(-1)[0])


@contextmanager
def beta_kept(model: VAE) -> Iterator[None]:
    """Set a multi-rate model back, when the block ends, to the beta that it had before."""
    before = None if model.rates is None else model.rates.evaluated
    try:
        yield
    finally:
        if model.rates is not None and before is not None:
            model.rates.evaluated = before


def option_of(trained: TrainConfig, model: VAE, name: str) -> Any:
    """Return the value of an option with which the model was built, given or default; None if it has no such
    option."""
    arch = trained.model.arch
    if name not in model_options(arch):
        return None
    if (given := getattr(trained.model, name)) is not None:
        return given
    default = inspect.signature(model_class(arch).__init__).parameters[name].default
    # Where the default depends on the size of the images, the model knows what became of it.
    return getattr(model, name, None) if default is None else default


def check_option(trained: TrainConfig, model: VAE, name: str, value: object) -> None:
    """Raise ArgumentError unless the model was built with this value of the option `name`; a value of None
    always passes."""
    if value is None:
        return
    if name not in model_options(trained.model.arch):
        raise ArgumentError(f"{name} {value}: {trained.model.arch} has no such option; leave it out")
    if value != (has := option_of(trained, model, name)):
        raise ArgumentError(f"{name} {value}: the model has {has}")


def rates_of(trained: TrainConfig, model: VAE, argument: str) -> Rates:
    """Return a multi-rate model's rates; raise ArgumentError, which names `argument`, for another model."""
    if model.rates is None:
        raise ArgumentError(
            f"{argument} needs a multi-rate model; this {trained.model.arch} was trained for one beta "
            "(train with --multirate)"
        )
    return model.rates
