"""Start a run from a configuration, or continue one from its checkpoint."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from movae_fast.data.text import TextLoader
from movae_fast.ops.extension import keep_freed_memory
from movae_fast.training import checkpoint
from movae_fast.training.build import (
    build_aggregator,
    build_aggressive,
    build_losses,
    build_network,
    build_optimizer,
    build_plateau,
    build_step,
    make_loader,
    make_text_loader,
    plan_lengths,
)
from movae_fast.training.config import TrainConfig
from movae_fast.training.device import resolve_device
from movae_fast.training.logs import Logs, require_extras
from movae_fast.training.machine import write_machine
from movae_fast.training.run import Run
from movae_fast.training.run_folder import check_places, folder_of, latest, make_folder, tidy, write_config
from movae_fast.training.telemetry import Telemetry
from movae_fast.training.world import World, connect


def setup(config: TrainConfig, joined: tuple[World, str] | None = None, take: bool = False) -> Run:
    """Start a new run from a validated configuration: read the data, build everything, create the run's folder.

    The folder is created last, so that a configuration that fails leaves nothing behind, and the checkpoint
    `last` is the first file in it, so that a killed run can always be resumed.

    joined: the processes and the device, if this process has joined them already (`world.connect`). take: allow
    an exp_dir that holds files.
    """
    require_extras(config.wandb, config.mlflow)
    check_descriptors(config.data.num_workers)
    world, config.run.device = joined or connect(config.run.device)
    world.on_main(lambda: check_places(config, take))
    device = resolve_device(config.run.device)
    if config.run.seed is None:
        config.run.seed = int(world.broadcast(int.from_bytes(os.urandom(4), "little") >> 1))  # type: ignore[call-overload]
    run = assemble(config, device, world)
    run.folder = Path(world.on_main(lambda: str(begin(run, take))))
    run.good = run.path_of("last")
    return run


def begin(run: Run, take: bool) -> Path:
    """Create a new run's folder with its first checkpoint, config.yaml and logs; return the folder."""
    run.folder = make_folder(run.config, take)
    checkpoint.save(run.path_of("last"), run.state())
    write_config(run.folder, run.config)
    if isinstance(run.train_loader, TextLoader):
        run.train_loader.source.vocabulary.write(run.folder / "vocab.txt")
    open_logs(run, None, None)
    return run.folder


def resume(
    path: Path,
    changes: Callable[[dict[str, Any]], TrainConfig],
    joined: tuple[World, str] | None = None,
) -> Run:
    """Load the run at `path` (its folder or a checkpoint in it) at the position where it was saved.

    `changes` turns the saved flags into the configuration to continue with. With another number of processes
    the global batch keeps its size, so that the run continues with the same steps. For a finished run no logs
    are opened and nothing is written.

    joined: the processes and the device, if this process has joined them already. Raises CheckpointError for a
    checkpoint that is damaged or of another model, ValueError for changes that end the run before the
    checkpoint.
    """
    path, content = checkpoint.read(path)
    if "optimizer" not in content:
        raise checkpoint.CheckpointError(
            f"{path} holds weights only; a run is resumed from its checkpoints/last.pt"
        )
    if path.absolute().parent.name != "checkpoints":
        raise checkpoint.CheckpointError(
            f"{path} lies in no run: a run goes on in the folder of its checkpoints/"
        )
    config = changes(content["config"])
    require_extras(config.wandb, config.mlflow)
    check_descriptors(config.data.num_workers)
    world, config.run.device = joined or connect(config.run.device)
    content = as_process_0_read(world, path, content)
    keep_global_batch(config, content["position"]["processes"], world.size)
    run = assemble(config, resolve_device(config.run.device), world)
    run.restore(content, path)
    if config.run.export is not None and not run.ended and Path(config.run.export).exists():
        raise ValueError(f"--export {config.run.export} exists and is not overwritten; name another file")
    if run.step > run.total_steps:
        raise ValueError(
            f"{path}: the run has done {run.step:,} steps ({run.epoch:,} epochs); "
            f"--epochs {config.run.epochs} --steps {config.run.steps} end it at {run.total_steps:,}"
        )
    run.folder = folder_of(path)
    world.on_main(lambda: go_on(run, content.get("log")))
    return run


def as_process_0_read(world: World, path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the checkpoint at `path` that process 0 read, on every process.

    A process that trains again may read the file before process 0 has written the end of the run before. It
    reads again, now that process 0 is known to have read. Raises CheckpointError if the positions still differ.
    """

    def step() -> int:
        return int(content["position"]["step"])

    shared = world.broadcast(step())
    if shared != step():
        content = checkpoint.read(path)[1]
    if not world.all(shared == step()):
        raise checkpoint.CheckpointError(
            f"{path}: process 0 read step {shared:,} of it and another process another; "
            "give all processes the same folder"
        )
    return content


def go_on(run: Run, mark: dict[str, Any] | None) -> None:
    """Remove what a killed process left in a resumed run's folder, and open its logs unless the run is
    finished.

    mark: the checkpoint's state of the logs (`Logs.mark`).
    """
    tidy(run.folder)
    if not run.ended:
        open_logs(run, run.step, mark)
        write_config(run.folder, run.config)


def start_or_resume(config: TrainConfig, changes: Callable[[dict[str, Any]], TrainConfig]) -> Run:
    """Resume the run in `exp_dir`, or start it there if the folder has no checkpoint, whatever a killed process
    left.

    config: the run's configuration if it starts. changes: as for `resume`.
    """
    assert config.run.exp_dir is not None
    folder = Path(config.run.exp_dir)
    joined = connect(config.run.device)
    saved, note = joined[0].on_main(lambda: latest(folder))
    if saved is None:
        config.run.device = joined[1]
        return setup(config, joined, take=True)
    run = resume(saved, changes, joined)
    run.notes += [note] if note else []
    return run


def assemble(config: TrainConfig, device: torch.device, world: World) -> Run:
    """Build a run at step 0, without its folder and logs."""
    if device.type == "cpu":
        keep_freed_memory()
    set_seeds(config.run.seed or 0)
    torch.backends.cudnn.benchmark = config.run.on_cudnn_benchmark
    # Build the model before reading any data, so that sizes that do not fit are reported at once.
    model = build_network(config, device, world)
    weights = config.weights()
    aggregator = build_aggregator(config.objective, weights, config.needs_jacobian, device)
    loader_of = make_text_loader if config.is_text else make_loader
    train_loader, test_loader = (loader_of(config, device, split, world) for split in ("train", "test"))
    lengths, progression = plan_lengths(config, model, len(train_loader))
    losses = build_losses(config, model, weights, len(train_loader.source), lengths, world)
    plateau = build_plateau(config.optimizer)
    optimizer, scheduler = build_optimizer(config.optimizer, model, lengths, plateau)
    train_step, why_not = build_step(config, device, world, model, losses, aggregator, optimizer)
    return Run(
        config=config,
        folder=Path(),
        device=device,
        model=model,
        train_loader=train_loader,
        test_loader=test_loader,
        losses=losses,
        optimizer=optimizer,
        train_step=train_step,
        scheduler=scheduler,
        telemetry=Telemetry(
            model.objectives,
            config.run.log_every,
            device,
            model.code_sizes,
            count_skipped=config.optimizer.skip_grad_norm > 0,
            groups=model.groups,
        ),
        total_steps=lengths.total,
        world=world,
        why_not_captured=why_not,
        progression=progression,
        valid_loader=make_text_loader(config, device, "valid", world) if config.reads_valid else None,
        plateau=plateau,
        aggressive=build_aggressive(config.optimizer),
    )


def set_seeds(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch with the run's seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep_global_batch(config: TrainConfig, before: int, now: int) -> None:
    """Change each process's batch size so that the global batch keeps its size when a run of `before` processes
    is resumed on `now`.

    Raises ValueError if that is not possible.
    """
    if before == now:
        return
    old = config.data.batch_size
    total = old * before
    if total % now or total // now % config.run.accumulate:
        raise ValueError(
            f"--resume: the run's {total} images a step ({before} processes of {old}) cannot be divided among "
            f"{now} processes" + (f" in {config.run.accumulate} parts" if config.run.accumulate > 1 else "")
        )
    config.data.eval_batch_size = config.data.eval_batch_size or old
    config.data.batch_size = total // now


def open_logs(run: Run, step: int | None, mark: dict[str, Any] | None) -> None:
    """Open a run's logs; a new log starts with a line on unreadable images, if there are any.

    step, mark: for a resumed run its step and the checkpoint's state of the logs, else None.
    """
    run.logs = Logs(run.folder, run.config.flat(), run.config.wandb, step, mark, run.config.mlflow)
    run.notes += [run.logs.note] if run.logs.note else []
    write_machine(run.folder, run.device, run.step, run.world.size)
    if not run.logs.length and (left := left_out(run)):
        run.logs.write({"step": 0, **left})


def left_out(run: Run) -> dict[str, int]:
    """Return the number of unreadable images that each split leaves out, as metrics; empty if none."""
    loaders = {"train": run.train_loader, "test": run.test_loader}
    counts = {f"data/left_out_{split}": len(loader.left_out) for split, loader in loaders.items()}
    return counts if any(counts.values()) else {}


def check_descriptors(workers: int) -> None:
    """Raise this process's limit on open files to what `workers` loader processes need; ValueError if it may
    not."""
    need = 64 + 16 * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or soft >= need:
        return
    if hard < need:
        raise ValueError(
            f"this process may open {hard} files at a time and needs {need}: raise the limit (ulimit -n {need})"
            + (f", or lower --num_workers {workers}" if workers else "")
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
