"""A run: what `fit` works on, how it is set up from a configuration, saved, and restored."""

from __future__ import annotations

import datetime
import math
import os
import random
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from movae_fast import data as datasets
from movae_fast.aggregation.registry import aggregator_state, load_aggregator_state, make_aggregator
from movae_fast.aggregation.weightings import Sum
from movae_fast.data import Binarizer, Loader, ReadOptions
from movae_fast.files import remove_leftovers, replacing, set_aside
from movae_fast.models import VAE, GaussianVAE, Noise, ProVLAE, build_model, make_multirate, model_options
from movae_fast.nn.sync_batchnorm import convert_sync_batchnorm
from movae_fast.objectives import LossVector
from movae_fast.ops.extension import keep_freed_memory
from movae_fast.schedules import Capacity, Cycles, Factor, LossSchedule, Stages, annealing_by_epoch, restarted
from movae_fast.training import checkpoint
from movae_fast.training.compiled import resolve_mode
from movae_fast.training.config import TrainConfig, resolve_device
from movae_fast.training.cuda_graph import CudaGraphs
from movae_fast.training.logs import Logs, require_wandb
from movae_fast.training.optim import forget, lr_factor, make_optimizer
from movae_fast.training.precision import Precision
from movae_fast.training.stages import apply_stage
from movae_fast.training.telemetry import Telemetry
from movae_fast.training.train_step import CAPTURED_MODES, TrainStep, why_not_captured
from movae_fast.training.world import World, connect


@dataclass
class Run:
    """Everything of a training run; `epoch`, `batch` and `step` are its position."""

    config: TrainConfig
    folder: Path
    device: torch.device
    model: VAE
    train_loader: Loader
    test_loader: Loader
    losses: LossVector
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    scheduler: torch.optim.lr_scheduler.LambdaLR
    telemetry: Telemetry
    total_steps: int
    world: World = field(default_factory=World)
    why_not_captured: str = ""  # what keeps the step from being one graph
    progression: Stages | None = None  # the stages of a progressive model
    logs: Logs | None = None
    epoch: int = 0  # epochs that are complete
    batch: int = 0  # batches of the current epoch that are done
    step: int = 0  # optimizer steps that are done
    ended: bool = False  # the last step is done and its figures are written
    best: float = math.inf
    good: Path | None = None  # the last checkpoint written
    notes: list[str] = field(default_factory=list)  # what a resume found amiss, and mended
    draw: Callable[[Run, str], None] | None = field(default=None, repr=False)  # makes figures

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / len(self.train_loader))

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def lr(self) -> float:
        """The learning rate of the last step that is done, without asking the device."""
        last = max(self.scheduler.last_epoch - 1, 0)
        return float(self.scheduler.base_lrs[0]) * self.scheduler.lr_lambdas[0](last)

    def begin_step(self) -> None:
        """Bring a progressive model to the stage and alpha of the step to come.

        A stage begins with a new optimizer's state and a new best; the weights carry over.
        """
        if self.progression is None:
            return
        if self.progression.starts(self.step):
            forget(self.optimizer)
            self.best = math.inf
        self.train_step.first = self.step - self.progression.since(self.step)
        assert isinstance(self.model, ProVLAE)
        apply_stage(self.progression, self.step, self.model, self.losses)

    def noise(self, n: int) -> Noise:
        """Draw the forward pass's noise of this rank's n images: its slice of one draw for the global batch."""
        draw = self.model.draw_noise(n * self.world.size)
        return draw.of_images(self.world.rank * n, (self.world.rank + 1) * n)

    def state(self) -> dict[str, Any]:
        """The sections of a checkpoint."""
        aggregator = self.train_step.aggregator
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
            **({"log": self.logs.mark()} if self.logs is not None else {}),
        }

    def export(self, path: Path) -> None:
        """Write configuration and weights alone to `path`, which holds these weights or does not exist."""
        model = self.model.state_dict()
        if path.exists():
            if checkpoint.digest(checkpoint.load(path).get("model")) != checkpoint.digest(model):
                raise ValueError(f"--export {path} exists, with other weights, and is not overwritten")
            return
        checkpoint.save(path, {"config": self.config.flat(), "model": model})

    def save(self, name: str) -> Path:
        """Write checkpoints/<name>.pt, unless a parameter stopped being finite (FloatingPointError).

        All ranks call it; rank 0 writes.
        """
        if not bool(self.train_step.flat.data.isfinite().all()):
            raise FloatingPointError(f"the model's parameters are not finite after step {self.step}")
        self.world.average_buffers(self.model)
        self.telemetry.merge(self.world)
        path = self.path_of(name)
        if self.world.main:
            checkpoint.save(path, self.state())
        self.good = path
        return path

    def path_of(self, name: str) -> Path:
        """Where the checkpoint of that name is."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def restore(self, record: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint's sections."""
        checkpoint.load_model(self.model, record["model"], path)
        self.optimizer.load_state_dict(record["optimizer"])
        self.train_step.prepare_optimizer()
        self.scheduler.last_epoch = record["scheduler"]["last_epoch"]  # the rate itself is in the optimizer
        if self.train_step.aggregator is not None:
            load_aggregator_state(self.train_step.aggregator, record["aggregator"], self.device)
        self.train_step.weights.copy_(record["reused_weights"])
        self.train_step.precision.load_state_dict(record["scaler"])
        self.telemetry.load_state_dict(record["telemetry"])
        position = record["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.best, self.good = position["best"], path
        self.ended = self.finished and position.get("ended", True)
        checkpoint.set_rng_state(record["rng"], self.device)
        if self.step:
            self.repeat_schedules()

    def repeat_schedules(self) -> None:
        """Bring what the last step set by its number to where it was: an evaluation may be what comes next."""
        if self.progression is not None:
            assert isinstance(self.model, ProVLAE)
            apply_stage(self.progression, self.step - 1, self.model, self.losses)
        self.losses.set_step(self.step - 1)


def setup(config: TrainConfig, joined: tuple[World, str] | None = None, take: bool = False) -> Run:
    """A new run from a validated configuration: reads the data, builds everything, makes the run's folder.

    The folder is made last, so that a configuration that fails leaves nothing behind, and `last` is the first
    file in it: a run that is killed can always go on.
    joined: the processes and the device, where they are known. take: start in an exp_dir that holds files, too.
    """
    require_wandb(config.wandb)
    check_descriptors(config.data.num_workers)
    world, config.run.device = joined or connect(config.run.device)
    world.on_main(lambda: check_places(config, take))
    device = resolve_device(config.run.device)
    if config.run.seed is None:
        config.run.seed = int(world.share(int.from_bytes(os.urandom(4), "little") >> 1))  # type: ignore[call-overload]
    run = assemble(config, device, world)
    run.folder = Path(world.on_main(lambda: str(begin(run, take))))
    run.good = run.path_of("last")
    return run


def begin(run: Run, take: bool) -> Path:
    """Make a new run's folder, its first checkpoint, its config.yaml and its logs; the folder."""
    run.folder = make_folder(run.config, take)
    checkpoint.save(run.path_of("last"), run.state())
    write_config(run.folder, run.config)
    open_logs(run, None, None)
    return run.folder


def resume(
    path: Path,
    changes: Callable[[dict[str, Any]], TrainConfig],
    joined: tuple[World, str] | None = None,
) -> Run:
    """The run at `path` (its folder or a checkpoint in it) at the position where it was saved.

    `changes` turns the saved flags into the configuration to continue with. On another number of processes the
    global batch stays what it was, so that the run continues with the same steps. A run that is finished gets
    no logs, and nothing of it is written. Raises CheckpointError for a checkpoint that is damaged or of another
    model, ValueError for changes that end the run before the checkpoint.
    """
    path, record = checkpoint.read(path)
    if "optimizer" not in record:
        raise checkpoint.CheckpointError(
            f"{path} holds weights only; a run is resumed from its checkpoints/last.pt"
        )
    if path.absolute().parent.name != "checkpoints":
        raise checkpoint.CheckpointError(
            f"{path} lies in no run: a run goes on in the folder of its checkpoints/"
        )
    config = changes(record["config"])
    require_wandb(config.wandb)
    check_descriptors(config.data.num_workers)
    world, config.run.device = joined or connect(config.run.device)
    keep_global_batch(config, record["position"]["processes"], world.size)
    run = assemble(config, resolve_device(config.run.device), world)
    run.restore(record, path)
    if config.run.export is not None and not run.ended and Path(config.run.export).exists():
        raise ValueError(f"--export {config.run.export} exists and is not overwritten; name another file")
    if run.step > run.total_steps:
        raise ValueError(
            f"{path}: the run has done {run.step:,} steps ({run.epoch:,} epochs); "
            f"--epochs {config.run.epochs} --steps {config.run.steps} end it at {run.total_steps:,}"
        )
    run.folder = path.parent.parent
    world.on_main(lambda: go_on(run, record.get("log")))
    return run


def go_on(run: Run, mark: dict[str, Any] | None) -> None:
    """Clear a resumed run's folder of what a killed process left; open its logs, unless it is finished."""
    tidy(run.folder)
    if not run.ended:
        open_logs(run, run.step, mark)
        write_config(run.folder, run.config)


def tidy(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run's folder."""
    for inside in (folder, folder / "checkpoints", folder / "figures"):
        remove_leftovers(inside)


def start_or_resume(config: TrainConfig, changes: Callable[[dict[str, Any]], TrainConfig]) -> Run:
    """Go on with the run in `exp_dir`, or start it there: whatever a process that was killed left in it.

    config: of the run if it starts. changes: as for `resume`.
    """
    assert config.run.exp_dir is not None
    folder = Path(config.run.exp_dir)
    joined = connect(config.run.device)
    found, note = joined[0].on_main(lambda: latest(folder))
    if found is None:
        config.run.device = joined[1]
        return setup(config, joined, take=True)
    run = resume(found, changes, joined)
    run.notes += [note] if note else []
    return run


def latest(folder: Path) -> tuple[Path | None, str]:
    """The checkpoint from which the run in `folder` goes on, None if it has none; and what was amiss.

    That is `last`, or where it is damaged the latest one that is whole; `last` is then set aside. Raises
    CheckpointError if none is whole.
    """
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.glob("*.pt")):
        return None, ""
    last = checkpoints / "last.pt"
    try:
        checkpoint.load(last)
    except checkpoint.CheckpointError as error:
        found = checkpoint.whole(checkpoints)
        if not found:
            raise checkpoint.CheckpointError(
                f"{str(error)[:300]}; no checkpoint in {checkpoints} is whole: name another --exp_dir, or move "
                "these files away"
            ) from None
        kept = f", now {set_aside(last).name}" if last.exists() else ""
        return found[0][0], f"{last.name} is missing or damaged{kept}; going on from {found[0][0].name}"
    return last, ""


def keep_global_batch(config: TrainConfig, before: int, now: int) -> None:
    """Change the batch of each process so that all of them together take the images that they took before."""
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


def load_model(path: Path, device: torch.device) -> tuple[TrainConfig, VAE]:
    """The configuration and the model, in evaluation mode, of a run or checkpoint (or exported weights)."""
    config, model, _ = load_trained(path, device)
    return config, model


def load_trained(path: Path, device: torch.device) -> tuple[TrainConfig, VAE, int]:
    """The same, and by how many processes it was trained (1 where only weights are left)."""
    path, record = checkpoint.read(path)
    config = TrainConfig.from_flat(record["config"])
    model = new_model(config).to(device)
    checkpoint.load_model(model, record["model"], path)
    return config, model.eval(), record.get("position", {}).get("processes", 1)


def new_model(config: TrainConfig) -> VAE:
    """The configuration's model with fresh weights, on the CPU."""
    options = {name: value for name, value in vars(config.model).items() if name != "arch"}
    model = build_model(config.model.arch, config.image_shape, config.activation, options)
    rate = config.multirate
    if rate.multirate:
        assert isinstance(model, GaussianVAE)
        gates = (rate.gate_encoder, rate.gate_decoder, rate.gate_position)
        start = (rate.gate_bias, rate.gate_slope)
        make_multirate(model, rate.beta_min, rate.beta_max, *gates, config.beta_per, *start)
    return model


def assemble(config: TrainConfig, device: torch.device, world: World) -> Run:
    """Everything of a run but its folder and logs, at position zero."""
    if device.type == "cpu":
        keep_freed_memory()
    seed = config.run.seed or 0
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = config.run.on_cudnn_benchmark
    # Built before any data is read: a size that does not fit is said at once.
    model = new_model(config).to(device)
    # The layout that convolutions are fastest in, on CUDA's tensor cores and on a CPU alike.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_from(config, model)
    if config.run.sync_batchnorm and world.size > 1:
        convert_sync_batchnorm(model)
    weights = config.weights()
    aggregator = None
    if config.needs_jacobian:
        o = config.objective
        m = sum(w != 0 for w in weights)
        aggregator = make_aggregator(
            o.agg,
            m,
            o.agg_args,
            o.pref_weights,
            norm_eps=o.upgrad_norm_eps,
            reg_eps=o.upgrad_reg_eps,
            regularizer=o.upgrad_regularizer,
        ).to(device)
    elif config.objective.conflict_free == "step":
        aggregator = Sum()  # with the rows, which the projection needs
    train_loader = make_loader(config, device, "train", world)
    test_loader = make_loader(config, device, "test", world)
    per_epoch = len(train_loader)
    steps = config.run.steps or config.run.epochs * per_epoch  # a stage, where there are stages
    progression, total = stages(config, model, steps), steps
    if progression is not None:
        total = progression.total
    losses = LossVector(
        model,
        weights,
        config.objective.recons_dist,
        config.reduction,
        n_data=len(train_loader.source),
        tc_estimator=config.objective.tc_estimator,
        schedule=loss_schedule(config, steps, per_epoch),
    )
    precision = Precision(config.run.precision, device)
    mode = resolve_mode(config.run.compile, device)
    why_not = why_not_captured(config.run.compile, device, config.optimizer.optimizer, aggregator)
    if not why_not:
        mode = CAPTURED_MODES[config.run.compile]
    if config.objective.gramian_batch < 1:
        mode = "off"
    optimizer = make_optimizer(config.optimizer, model.parameters())
    factor: Factor = lr_factor(config.optimizer, steps, per_epoch)
    if total != steps:  # each stage has the whole schedule
        factor = restarted(factor, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    train_step = TrainStep(
        model,
        losses,
        aggregator,
        optimizer,
        jacobian=config.objective.jacobian,
        max_grad_norm=config.optimizer.max_grad_norm,
        step_metric=config.objective.step_metric if config.objective.conflict_free == "step" else None,
        precision=precision,
        # A layer that talks to other processes cannot be part of a compiled graph.
        compile_mode="off" if config.run.sync_batchnorm and world.size > 1 else mode,
        world=world,
        accumulate=config.run.accumulate,
        gramian_every=config.objective.gramian_every,
        gramian_batch=config.objective.gramian_batch,
        gramian_at=config.objective.gramian_at,
        recorder=None if why_not else CudaGraphs(device),
    )
    codes = getattr(model, "num_embeddings", 0)
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
        telemetry=Telemetry(model.objectives, config.run.log_every, device, codes),
        total_steps=total,
        world=world,
        why_not_captured=why_not,
        progression=progression,
    )


def loss_schedule(config: TrainConfig, steps: int, per_epoch: int) -> LossSchedule:
    """Return how the loss changes over a stage of `steps` steps by the configuration."""
    ladder, objective = config.ladder, config.objective
    factor: Factor | None = None
    if ladder.use_kl_annealing:
        weights = (ladder.min_kl_weight, ladder.max_kl_weight)
        factor = Cycles(ladder.kl_annealing_mode, steps, ladder.cycle_period, *weights, ladder.ratio)
    elif objective.kl_annealing != "none":
        factor = annealing_by_epoch(objective.kl_annealing, steps, per_epoch)
    grows = ladder.use_capacity_increase
    capacity = Capacity(ladder.max_capacity, ladder.capacity_max_iter) if grows else None
    return LossSchedule(objective.anneal_steps, factor, capacity)


def stages(config: TrainConfig, model: VAE, steps: int) -> Stages | None:
    """Return the stages of `steps` steps each that the configuration asks of a progressive model."""
    if not (isinstance(model, ProVLAE) and model.progressive):
        return None
    ladder = config.ladder
    alone = ladder.mode == "indep_train"
    first, last = (ladder.train_seq, ladder.train_seq) if alone else (1, model.num_ladders)
    return Stages(first, last, steps, ladder.fade_in_duration, ladder.coff if ladder.pre_kl else 0.0)


def start_from(config: TrainConfig, model: VAE) -> None:
    """The weights of the previous stage, for indep_train."""
    ladder = config.ladder
    if ladder.mode != "indep_train" or ladder.train_seq == 1:
        return
    assert ladder.init_from is not None
    assert isinstance(model, ProVLAE)
    path, record = checkpoint.read(Path(ladder.init_from))
    checkpoint.load_model(model, record["model"], path)
    if int(model.stage) != ladder.train_seq - 1:
        raise ValueError(
            f"--init_from {path} is of stage {int(model.stage)}; stage {ladder.train_seq} starts from stage "
            f"{ladder.train_seq - 1}"
        )


def make_loader(
    config: TrainConfig,
    device: torch.device,
    split: str,
    world: World | None = None,
    in_order: bool = False,
) -> Loader:
    """The loader of one split by the configuration; `in_order` reads the training split as a test split."""
    world = world or World()
    data, info = config.data, config.info
    train = split == "train"
    source = datasets.open_split(
        info,
        ReadOptions(
            root=Path(data.data_dir).expanduser(),
            split=split,
            image_size=config.image_shape[1],
            download=data.download,
            device=device if data.loader != "torch" else torch.device("cpu"),
            crop=data.crop,
            resize=data.resize,
            antialias=data.antialias,
        ),
        data.on_bad_image,
        data.verify_prepared,
    )
    source = datasets.limited(source, data.limit_train if train else data.limit_test)
    kind, why = datasets.choose_loader(data.loader, source, device, data.resident_share)
    options: dict[str, Any] = {
        "train": train and not in_order,
        "seed": config.run.seed or 0,
        "flip": info.flip if data.flip is None else data.flip,
        "normalize": data.normalize,
        "binarizer": Binarizer(data.binarize, split, config.run.seed or 0),
        "rank": world.rank,
        "world": world.size,
        "pad": data.last_batch == "pad",
    }
    size = data.batch_size if train else data.eval_batch_size or data.batch_size
    options |= {"num_workers": data.num_workers, "prefetch": data.prefetch}
    options["compiled"] = resolve_mode(config.run.compile, device) != "off"
    loader = datasets.make_loader(kind, source, size, device, **options)
    loader.why = why
    return loader


def left_out(run: Run) -> dict[str, int]:
    """How many unreadable images each split does without, where there are any."""
    loaders = {"train": run.train_loader, "test": run.test_loader}
    counts = {f"data/left_out_{split}": len(loader.left_out) for split, loader in loaders.items()}
    return counts if any(counts.values()) else {}


OURS = ("config.yaml", "metrics.jsonl", "tensorboard", "figures", "wandb_id", "trace.json")  # in a run's folder


def check_places(config: TrainConfig, take: bool) -> None:
    """Refuse, before anything is read, places where the run could not write. Makes nothing."""
    if config.run.exp_dir is not None and not take:
        check_empty(Path(config.run.exp_dir))
    for flag, given in (("exp_dir", config.run.exp_dir), ("export", config.run.export)):
        if given is not None:
            check_place(flag, Path(given))
    if config.run.exp_dir is None:
        check_place("save_path", Path(config.run.save_path))
    if config.run.export is not None and Path(config.run.export).exists():
        raise ValueError(f"--export {config.run.export} exists and is not overwritten; name another file")


def check_descriptors(workers: int) -> None:
    """Raise this process's limit on open files to what it needs, where it may; ValueError where it may not."""
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


def check_place(flag: str, path: Path) -> None:
    """Refuse a path below which nothing can be made."""
    above = path.absolute()
    while not above.exists():
        above = above.parent
    if above != path.absolute() and not above.is_dir():
        raise ValueError(f"--{flag} {path}: {above} is a file, not a folder; name another place")
    if not os.access(above, os.W_OK | os.X_OK if above.is_dir() else os.W_OK):
        raise ValueError(f"--{flag} {path}: {above} may not be written; name another place")


def make_folder(config: TrainConfig, take: bool = False) -> Path:
    """The run's new folder: exp_dir, or save_path/dataset/arch/agg/time. Never one that holds anything.

    take: an exp_dir that holds no checkpoint may hold other files; those with names of ours are set aside.
    """
    if config.run.exp_dir is not None:
        folder = Path(config.run.exp_dir)
        if take and folder.is_dir():
            clear_killed(folder)
            for path in [folder / name for name in OURS if (folder / name).exists()]:
                set_aside(path)
        else:
            check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.run.save_path, config.data.dataset, config.model.arch, config.objective.agg)
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = base / f"{time}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            continue
        return folder
    raise ValueError(f"--save_path {base}: no free folder name for {time}")


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds more than a run that was killed before its first checkpoint leaves."""
    clear_killed(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--exp_dir {folder} is not empty and is not overwritten; name a new folder, or continue "
            f"the run in it: movae train --resume {folder}"
        )


def clear_killed(folder: Path) -> None:
    """Remove what a run leaves that was killed before its first checkpoint was whole."""
    for inside in (folder / "checkpoints", folder):
        remove_leftovers(inside)
    with suppress(OSError):  # it is not there, or not empty
        (folder / "checkpoints").rmdir()


def open_logs(run: Run, step: int | None, mark: dict[str, Any] | None) -> None:
    """A run's logs, from `step` on if it was resumed, with the unreadable images in the first line."""
    run.logs = Logs(run.folder, run.config.flat(), run.config.wandb, step, mark)
    run.notes += [run.logs.note] if run.logs.note else []
    if not run.logs.length and (left := left_out(run)):
        run.logs.write({"step": 0, **left})


def write_config(folder: Path, config: TrainConfig) -> None:
    """config.yaml: every flag's value, seed included; `movae train --config` reads it."""
    flat = {k: v for k, v in config.flat().items() if k not in ("resume", "exp_dir", "export")}
    options = model_options(config.model.arch)
    model_only = {k for k in vars(config.model) if k != "arch" and k not in options}
    text = yaml.safe_dump({k: v for k, v in flat.items() if k not in model_only}, sort_keys=False)
    path = folder / "config.yaml"
    if not path.exists() or path.read_bytes() != text.encode():
        with replacing(path) as file:
            file.write(text.encode())
