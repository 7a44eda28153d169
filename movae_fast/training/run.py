"""Hold, save and restore the state of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from movae_fast.aggregation.registry import aggregator_state, load_aggregator_state, set_progress
from movae_fast.data import Loader
from movae_fast.data.text import TextLoader
from movae_fast.files import give_name
from movae_fast.models import VAE, Noise, ProVLAE
from movae_fast.objectives import LossVector
from movae_fast.schedules import Stages
from movae_fast.training import checkpoint
from movae_fast.training.aggressive import Aggressive
from movae_fast.training.callbacks import Callbacks
from movae_fast.training.config import TrainConfig
from movae_fast.training.logs import Logs
from movae_fast.training.optim import forget_state, set_learning_rate
from movae_fast.training.plateau import Plateau
from movae_fast.training.stages import apply_stage
from movae_fast.training.telemetry import Telemetry
from movae_fast.training.train_step import TrainStep
from movae_fast.training.world import World


@dataclass
class Run:
    """Hold everything that a training run consists of; `epoch`, `batch` and `step` are its position."""

    config: TrainConfig
    folder: Path
    device: torch.device
    model: VAE
    train_loader: Loader | TextLoader
    test_loader: Loader | TextLoader
    losses: LossVector
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    scheduler: torch.optim.lr_scheduler.LambdaLR
    telemetry: Telemetry
    total_steps: int
    world: World = field(default_factory=World)
    why_not_captured: str = ""  # what keeps the step from being one graph
    progression: Stages | None = None  # the stages of a progressive model
    valid_loader: TextLoader | None = None  # where something reads the validation split
    plateau: Plateau | None = None  # what lowers the learning rate by the validation loss
    aggressive: Aggressive | None = None  # the phase in which the encoder is trained alone, too
    logs: Logs | None = None
    epoch: int = 0  # epochs that are complete
    batch: int = 0  # batches of the current epoch that are done
    step: int = 0  # optimizer steps that are done
    ended: bool = False  # the last step is done and its pictures are written
    best: float = math.inf
    good: Path | None = None  # the last checkpoint written
    notes: list[str] = field(default_factory=list)  # what was found wrong and repaired when resuming
    draw: Callable[[Run, str], None] | None = field(default=None, repr=False)  # makes pictures
    show: Callable[[Run], None] | None = field(default=None, repr=False)  # gives pictures to the logs alone
    callbacks: Callbacks = field(default_factory=Callbacks, repr=False)

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / len(self.train_loader))

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or (self.plateau is not None and self.plateau.over)

    @property
    def lr(self) -> float:
        """Return the learning rate of the last finished step, computed on the host."""
        last = max(self.scheduler.last_epoch - 1, 0)
        return float(self.scheduler.base_lrs[0]) * self.scheduler.lr_lambdas[0](last)

    @property
    def next_lr(self) -> float:
        """Return the learning rate of the next step."""
        return float(self.scheduler.base_lrs[0]) * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)

    def restart_optimizer(self) -> None:
        """Set the plateau schedule's current learning rate, and reset the optimizer's state if the weights were
        replaced."""
        assert self.plateau is not None
        if self.plateau.reload:
            forget_state(self.optimizer)
        set_learning_rate(self.optimizer, self.next_lr)

    def begin_step(self) -> None:
        """Set an aggregator's progress, and a progressive model's stage and alpha, to those of the coming step.

        At the start of a stage the optimizer's state and the best test loss are reset; the weights carry over.
        """
        set_progress(self.train_step.aggregator, self.step / max(self.total_steps - 1, 1))
        if self.progression is None:
            return
        if self.progression.starts(self.step):
            forget_state(self.optimizer)
            self.best = math.inf
        self.train_step.first = self.step - self.progression.since(self.step)
        assert isinstance(self.model, ProVLAE)
        apply_stage(self.progression, self.step, self.model, self.losses)

    def noise(self, n: int) -> Noise:
        """Draw the noise for the forward pass of this process's n images: its slice of a draw for the global
        batch."""
        draw = self.model.draw_noise(n * self.world.size)
        return draw.of_images(self.world.rank * n, (self.world.rank + 1) * n)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the moving average of the weights in place of the parameters during the block, if the run keeps
        one."""
        if self.train_step.average is None:
            yield
            return
        with self.train_step.average.in_place():
            yield

    def state(self) -> dict[str, Any]:
        """Return the run's state as the sections of a checkpoint."""
        aggregator, average = self.train_step.aggregator, self.train_step.average
        return {
            "config": self.config.flat(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "aggregator": aggregator_state(aggregator) if aggregator is not None else {},
            "reused_weights": self.train_step.weights,
            "scaler": self.train_step.precision.state_dict(),
            "telemetry": self.telemetry.state_dict(),
            "position": {
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "best": self.best,
                "ended": self.ended,
                "processes": self.world.size,
            },
            "rng": checkpoint.rng_state(self.device),
            **{adversary.section: adversary.state_dict() for adversary in self.train_step.adversaries},
            **({"average": average.state_dict(self.model)} if average is not None else {}),
            **({"plateau": self.plateau.state_dict()} if self.plateau is not None else {}),
            **({"aggressive": self.aggressive.state_dict()} if self.aggressive is not None else {}),
            **({"log": self.logs.mark()} if self.logs is not None else {}),
        }

    def export(self, path: Path) -> None:
        """Write the configuration and the weights alone to `path`.

        If the file exists and holds the same weights, nothing is done; with other content a ValueError is
        raised.
        """
        with self.averaged():
            model = {name: value.clone() for name, value in self.model.state_dict().items()}
        if path.exists():
            if checkpoint.digest(checkpoint.load(path).get("model")) != checkpoint.digest(model):
                raise ValueError(f"--export {path} exists, with other weights, and is not overwritten")
            return
        checkpoint.save(path, {"config": self.config.flat(), "model": model})

    def save(self, name: str) -> Path:
        """Write checkpoints/<name>.pt and return its path; raise FloatingPointError if a parameter is not
        finite.

        All processes must call it; process 0 writes.
        """
        if not bool(self.train_step.flat.data.isfinite().all()):
            raise FloatingPointError(f"the model's parameters are not finite after step {self.step}")
        self.world.average_buffers(self.model)
        self.telemetry.merge(self.world)
        path = self.path_of(name)
        if self.world.main:
            checkpoint.save(path, self.state())
        self.good = path
        self.callbacks.on_checkpoint(self, path)
        return path

    def name_again(self, name: str, another: str) -> None:
        """Make checkpoints/<another>.pt the same file as <name>.pt, which was just saved in the run's present
        state."""
        path = self.path_of(another)
        if self.world.main:
            give_name(self.path_of(name), path)
        self.good = path
        self.callbacks.on_checkpoint(self, path)

    def path_of(self, name: str) -> Path:
        """Return the path of the checkpoint with this name."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Restore the run's state from a checkpoint's sections; `path` is the checkpoint's."""
        checkpoint.load_model(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.train_step.prepare_optimizer()
        if self.train_step.average is not None:
            self.train_step.average.load_state_dict(self.model, checkpoint.evaluated_weights(content))
        for adversary in self.train_step.adversaries:
            adversary.load_state_dict(content[adversary.section])
        self.scheduler.last_epoch = content["scheduler"]["last_epoch"]  # the rate itself is in the optimizer
        if self.train_step.aggregator is not None:
            load_aggregator_state(self.train_step.aggregator, content["aggregator"], self.device)
        self.train_step.weights.copy_(content["reused_weights"])
        self.train_step.precision.load_state_dict(content["scaler"])
        self.telemetry.load_state_dict(content["telemetry"])
        if self.plateau is not None:
            self.plateau.load_state_dict(content["plateau"])
        if self.aggressive is not None:
            self.aggressive.load_state_dict(content["aggressive"])
        position = content["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.best, self.good = position["best"], path
        self.ended = self.finished and position.get("ended", True)
        checkpoint.set_rng_state(content["rng"], self.device)
        if self.step:
            self.repeat_schedules()

    def repeat_schedules(self) -> None:
        """Set the stage and the loss weights of the last finished step again after a resume, since an
        evaluation may come before the next step."""
        if self.progression is not None:
            assert isinstance(self.model, ProVLAE)
            apply_stage(self.progression, self.step - 1, self.model, self.losses)
        self.losses.set_step(self.step - 1)
