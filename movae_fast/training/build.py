"""Build the parts of a run, each from its own section of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from movae_fast import data as datasets
from movae_fast.aggregation.registry import make_aggregator
from movae_fast.data import Binarizer, Loader, ReadOptions
from movae_fast.data.text import TextLoader, limited_text, read_text
from movae_fast.models import (
    LSTMVAE,
    NVAE,
    VAE,
    GaussianVAE,
    ProVLAE,
    build_model,
    make_multirate,
    make_text_multirate,
)
from movae_fast.models.vamp import PSEUDO_INPUTS, PseudoInputs
from movae_fast.nn.sync_batchnorm import convert_sync_batchnorm
from movae_fast.objectives import LossVector
from movae_fast.objectives.discriminators import LatentDiscriminator, PatchDiscriminator
from movae_fast.objectives.extras import extra_objectives
from movae_fast.objectives.perceptual import load_lpips
from movae_fast.schedules import (
    Capacity,
    Cycles,
    Factor,
    LogLinear,
    LossSchedule,
    Stages,
    Warmup,
    annealing_by_epoch,
    restarted,
)
from movae_fast.training import checkpoint
from movae_fast.training.adversary import Adversary
from movae_fast.training.aggressive import Aggressive
from movae_fast.training.compiled import resolve_mode
from movae_fast.training.config import LadderConfig, ObjectiveConfig, OptimizerConfig, RunConfig, TrainConfig
from movae_fast.training.cuda_graph import CudaGraphs
from movae_fast.training.optim import lr_factor, make_optimizer
from movae_fast.training.plateau import Plateau
from movae_fast.training.precision import Precision
from movae_fast.training.train_step import CAPTURED_MODES, TrainStep, why_not_captured
from movae_fast.training.world import World

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Lengths:
    """Hold the lengths of an epoch, of a stage and of the whole run, in steps; a run without stages is one
    stage."""

    epoch: int
    stage: int
    total: int


def load_model(path: Path, device: torch.device) -> tuple[TrainConfig, VAE]:
    """Return the configuration and the model, in evaluation mode, of a run or checkpoint (or exported
    weights)."""
    trained = load_trained(path, device)
    return trained.config, trained.model


class Trained(NamedTuple):
    """Hold what a checkpoint has of a trained model."""

    config: TrainConfig
    model: VAE
    processes: int  # of the training; 1 where only weights are left
    step: int | None  # None where only weights are left


def load_trained(path: Path, device: torch.device) -> Trained:
    """Return the configuration and the model, in evaluation mode, of a run or checkpoint (or exported
    weights), with its step."""
    path, content = checkpoint.read(path)
    config = TrainConfig.from_flat(content["config"])
    model = new_model(config).to(device)
    checkpoint.load_model(model, checkpoint.evaluated_weights(content), path)
    position = content.get("position", {})
    return Trained(config, model.eval(), position.get("processes", 1), position.get("step"))


def new_model(config: TrainConfig) -> VAE:
    """Build the model that the configuration describes, with fresh weights, on the CPU."""
    options = {name: value for name, value in vars(config.model).items() if name != "arch"}
    likelihood = None if config.is_text else config.likelihood  # a model of sentences has its own
    model = build_model(config.model.arch, config.image_shape, config.activation, options, likelihood)
    model.objectives = (*model.objectives, *extra_objectives(config.objective.extra_objectives))
    if isinstance(model, GaussianVAE):
        model.importance_samples = config.objective.importance_samples
        model.encodes_again = "recursive_kl" in config.objective.extra_objectives
        model.returns = "cycle" in config.objective.extra_objectives
        model.draws_prior = model.draws_prior or model.returns
        if config.objective.prior == "vamp":
            count = config.objective.pseudo_inputs or PSEUDO_INPUTS
            model.pseudo_inputs = PseudoInputs(count, config.image_shape, config.data.normalize)
    rate = config.multirate
    if rate.multirate:
        if isinstance(model, LSTMVAE):
            return make_text_multirate(model, rate.beta_min, rate.beta_max, config.beta_per)
        gates = (rate.gate_encoder, config.gate_decoder, rate.gate_position)
        start = (rate.gate_bias, rate.gate_slope)
        make_multirate(model, rate.beta_min, rate.beta_max, *gates, config.beta_per, *start)
    return model


def build_network(config: TrainConfig, device: torch.device, world: World) -> VAE:
    """Return the model that training starts from, on its device: fresh weights, or those of the stage
    before."""
    model = new_model(config).to(device)
    # The layout that convolutions are fastest in, on CUDA's tensor cores and on a CPU alike.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_from(config.ladder, model)
    if config.run.sync_batchnorm and world.size > 1:
        convert_sync_batchnorm(model)
    if config.run.recompute and isinstance(model, NVAE):
        model.recompute_cells()
    if config.norm_penalty and isinstance(model, NVAE):
        model.start_penalty()
    return model


def build_aggregator(
    objective: ObjectiveConfig, weights: Sequence[float], needs_jacobian: bool, device: torch.device
) -> nn.Module | None:
    """Return the aggregator of the objectives whose weight is not 0; None if one backward pass of their
    weighted sum is enough."""
    if needs_jacobian:
        return make_aggregator(
            objective.agg,
            sum(w != 0 for w in weights),
            objective.agg_args,
            objective.pref_weights,
            norm_eps=objective.upgrad_norm_eps,
            reg_eps=objective.upgrad_reg_eps,
            regularizer=objective.upgrad_regularizer,
        ).to(device)
    if objective.conflict_free != "step":
        return None
    from movae_fast.aggregation.weightings import Sum  # the projection needs the rows; TorchJD is imported

    return Sum()


def build_aggressive(optimizer: OptimizerConfig) -> Aggressive | None:
    """Return the aggressive phase, in which the encoder is trained alone, or None if the configuration has
    none."""
    if not optimizer.aggressive:
        return None
    return Aggressive(optimizer.aggressive_steps, optimizer.aggressive_window)


def build_losses(
    config: TrainConfig, model: VAE, weights: Sequence[float], n_data: int, lengths: Lengths, world: World
) -> LossVector:
    """Return the vector of objectives, with their weights and the schedules of these."""
    together = world.size > 1 and config.run.sync_batchnorm
    objective = config.objective
    return LossVector(
        model,
        weights,
        objective.recons_dist,
        config.reduction,
        n_data=n_data,
        tc_estimator=objective.tc_estimator,
        schedule=loss_schedule(config, lengths.stage, lengths.epoch),
        mean_over_ranks=(lambda values: world.sum_(values) / world.size) if together else lambda values: values,
        # In evaluation ranks have different numbers of batches: a statistic is then each batch's own.
        gather=lambda rows: world.gather_rows(rows) if torch.is_grad_enabled() else rows,
        mmd_kernel=objective.mmd_kernel,
        importance_gradient=objective.importance_gradient,
        dip_variances="dip_ii" in objective.extra_objectives,
        discriminator=build_discriminator(objective, model, world),
        patches=build_patches(objective, model, world),
        perceptual=build_perceptual(config, model.device),
    )


def build_perceptual(
    config: TrainConfig, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return LPIPS of images in the data's range where the run has its objective."""
    if config.objective.lpips_weights is None:
        return None
    net, normalize = (
        load_lpips(Path(config.objective.lpips_weights).expanduser(), device),
        config.data.normalize,
    )
    return lambda x, y: net(datasets.to_unit(x, normalize), datasets.to_unit(y, normalize))


def build_discriminator(objective: ObjectiveConfig, model: VAE, world: World) -> LatentDiscriminator | None:
    """Return FactorVAE's discriminator where the run has its objective, the same on every process."""
    if "factor" not in objective.extra_objectives:
        return None
    return same_everywhere(LatentDiscriminator(model.latent_dim).to(model.device), world)


def build_patches(objective: ObjectiveConfig, model: VAE, world: World) -> PatchDiscriminator | None:
    """Return the hinge GAN's discriminator where the run has its objective, the same on every process."""
    if "gan" not in objective.extra_objectives:
        return None
    return same_everywhere(PatchDiscriminator(model.image_shape).to(model.device), world)


def same_everywhere(module: M, world: World) -> M:
    """Return a module with process 0's parameters on every process."""
    for parameter in module.parameters():
        world.broadcast_(parameter.data)
    return module


def build_plateau(optimizer: OptimizerConfig) -> Plateau | None:
    """Return the schedule that lowers the learning rate by the validation loss, or None for other schedules."""
    if optimizer.scheduler != "plateau":
        return None
    return Plateau(
        optimizer.plateau_patience,
        optimizer.plateau_after,
        optimizer.scheduler_gamma,
        optimizer.plateau_decays,
        optimizer.plateau_reload,
    )


def build_optimizer(
    optimizer: OptimizerConfig, model: VAE, lengths: Lengths, plateau: Plateau | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer and its learning-rate scheduler, which starts anew with each stage."""
    built = make_optimizer(optimizer, model.parameters())
    factor: Factor = lr_factor(optimizer, lengths.stage, lengths.epoch)
    if lengths.total != lengths.stage:
        factor = restarted(factor, lengths.stage)
    if plateau is not None:
        base = factor
        return built, torch.optim.lr_scheduler.LambdaLR(built, lambda step: base(step) * plateau.factor)
    return built, torch.optim.lr_scheduler.LambdaLR(built, factor)


def build_step(
    config: TrainConfig,
    device: torch.device,
    world: World,
    model: VAE,
    losses: LossVector,
    aggregator: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> tuple[TrainStep, str]:
    """Return the training step, and the reason why it cannot be recorded as one CUDA graph ("" if it can)."""
    objective, run = config.objective, config.run
    why_not = why_not_captured(
        "off" if run.recompute else run.compile, device, config.optimizer.optimizer, aggregator
    )
    discriminators = (losses.settings.discriminator, losses.settings.patches)
    adversaries = [Adversary(each, world) for each in discriminators if each is not None]
    if adversaries and not why_not:
        why_not = "--extra_objectives factor or gan, whose discriminator is trained beside the step"
    apart = objective.gramian_batch < 1 or bool(adversaries) or objective.importance_gradient == "dreg"
    apart = apart or bool(config.second_passes)
    # What compares the images of all processes exchanges them within the forward.
    apart = apart or (world.size > 1 and exchanges(config))
    step = TrainStep(
        model,
        losses,
        aggregator,
        optimizer,
        jacobian=config.jacobian,
        max_grad_norm=config.optimizer.max_grad_norm,
        clip_apart=config.optimizer.clip_per == "part",
        skip_grad_norm=config.optimizer.skip_grad_norm,
        ema_decay=config.optimizer.ema_decay,
        step_metric=objective.step_metric if objective.conflict_free == "step" else None,
        precision=Precision(run.precision, device),
        compile_mode=compile_mode(run, device, world, not why_not, apart),
        world=world,
        accumulate=run.accumulate,
        gramian_every=objective.gramian_every,
        gramian_batch=objective.gramian_batch,
        gramian_at=objective.gramian_at,
        recorder=None if why_not else CudaGraphs(device),
        adversaries=adversaries,
    )
    return step, why_not


def exchanges(config: TrainConfig) -> bool:
    """Return whether the forward pass or an objective talks to other processes."""
    statistics = {"mmd", "entropy", "off_diagonal"} & set(config.objective_names)
    return bool(statistics) or config.model.quantizer == "ema"


def compile_mode(
    run: RunConfig, device: torch.device, world: World, captured: bool, part_of_batch: bool
) -> str:
    """Return the torch.compile mode of a step.

    captured: whether the step is recorded as a CUDA graph. part_of_batch: whether the Gramian is computed on a
    part of the batch, which is not compiled.
    """
    # Layers that communicate with other processes cannot be compiled, nor can a batch that is divided, nor what
    # a backward computes again.
    if run.recompute or part_of_batch or (run.sync_batchnorm and world.size > 1):
        return "off"
    return CAPTURED_MODES[run.compile] if captured else resolve_mode(run.compile, device)


def plan_lengths(config: TrainConfig, model: VAE, per_epoch: int) -> tuple[Lengths, Stages | None]:
    """Return the run's lengths in steps, and the stages of a progressive model (None for others).

    `epochs` or `steps` of the configuration is the length of one stage; `per_epoch` is the steps per epoch.
    """
    stage = config.run.steps or config.run.epochs * per_epoch
    stages = build_stages(config.ladder, model, stage)
    return Lengths(per_epoch, stage, stage if stages is None else stages.total), stages


def loss_schedule(config: TrainConfig, steps: int, per_epoch: int) -> LossSchedule:
    """Return the schedules that change the loss over a stage of `steps` steps, as the configuration asks."""
    ladder, objective = config.ladder, config.objective
    factor: Factor | None = None
    if ladder.use_kl_annealing:
        weights = (ladder.min_kl_weight, ladder.max_kl_weight)
        factor = Cycles(ladder.kl_annealing_mode, steps, ladder.cycle_period, *weights, ladder.ratio)
    elif objective.kl_annealing != "none":
        factor = annealing_by_epoch(objective.kl_annealing, steps, per_epoch)
    elif config.kl_warmup:
        factor = Warmup(objective.kl_constant * steps, config.kl_warmup * steps, objective.kl_least)
    balanced = factor.lasts if config.kl_balance and isinstance(factor, Warmup) else None
    grows = ladder.use_capacity_increase
    capacity = Capacity(ladder.max_capacity, ladder.capacity_max_iter) if grows else None
    penalty = penalty_weight(config, factor)
    starts = (objective.gan_start, objective.recursive_kl_steps)
    return LossSchedule(objective.anneal_steps, factor, capacity, balanced, penalty, *starts)


def penalty_weight(config: TrainConfig, kl_factor: Factor | None) -> Factor | None:
    """Return the schedule of the weight of the model's penalty: constant, or annealed along with the KL's
    weight; None without a penalty."""
    first, last = config.objective.norm_penalty_init, config.norm_penalty
    if not last:
        return None
    if first is None or kl_factor is None:
        return lambda step: last
    return LogLinear(first, last, kl_factor)


def build_stages(ladder: LadderConfig, model: VAE, steps: int) -> Stages | None:
    """Return the stages of a progressive model, each of `steps` steps; None for a model without stages."""
    if not (isinstance(model, ProVLAE) and model.progressive):
        return None
    alone = ladder.mode == "indep_train"
    first, last = (ladder.train_seq, ladder.train_seq) if alone else (1, model.num_ladders)
    return Stages(first, last, steps, ladder.fade_in_duration, ladder.coff if ladder.pre_kl else 0.0)


def start_from(ladder: LadderConfig, model: VAE) -> None:
    """Load the weights that the previous stage ended with, if the configuration trains one stage alone
    (indep_train).

    Raises ValueError if `init_from` is a checkpoint of another stage.
    """
    if ladder.mode != "indep_train" or ladder.train_seq == 1:
        return
    assert ladder.init_from is not None
    assert isinstance(model, ProVLAE)
    path, content = checkpoint.read(Path(ladder.init_from))
    checkpoint.load_model(model, content["model"], path)
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
    """Build the image loader of one split that the configuration asks for.

    in_order: read the training split in file order without random changes, as a test split is read.
    """
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
        "bits": data.bits,
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


def make_text_loader(
    config: TrainConfig,
    device: torch.device,
    split: str,
    world: World | None = None,
    in_order: bool = False,
) -> TextLoader:
    """Build the loader of one split ("train", "valid" or "test") of a corpus of sentences; `in_order` gives
    each training sentence once, as of a test split."""
    data, train, world = config.data, split == "train" and not in_order, world or World()
    source = read_text(data.dataset, config.text_options).split(split)
    return TextLoader(
        limited_text(source, data.limit_train if split == "train" else data.limit_test),
        data.batch_size if train else data.eval_batch_size or data.batch_size,
        device,
        train=train,
        seed=config.run.seed or 0,
        multiple=data.pad_multiple,
        pad=data.last_batch == "pad",
        rank=world.rank,
        world=world.size,
    )
