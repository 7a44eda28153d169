"""Every setting of a run: one dataclass a subject, each field a flag of the same name.

`validate` checks what can be checked before anything is allocated; a message names the flag and the remedy.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from movae_fast.aggregation.registry import (
    AGGREGATORS,
    CONES,
    NEED_TWO_BATCHES,
    check_runs,
    weights_by_gramian,
    weights_rows,
)
from movae_fast.aggregation.upgrad import STRICT_REG_EPS
from movae_fast.data import DATASETS, DatasetInfo
from movae_fast.data.binarize import Binarization
from movae_fast.data.datasets.celeba import CELEBA_CROPS
from movae_fast.data.loaders.dali import require as require_dali
from movae_fast.data.memory import all_memory
from movae_fast.models import MODELS, VAE, Rates, build_model
from movae_fast.models.provlae import LadderNet
from movae_fast.names import pick
from movae_fast.objectives import ReconsDist, ReconsReduction, resolve_weights
from movae_fast.projected_step import StepMetric
from movae_fast.reference import Regularizer
from movae_fast.training.compiled import CompileMode
from movae_fast.training.limits import check_values
from movae_fast.training.precision import PrecisionName

FROM_EXTRA = ("lamb", "diffgrad", "madgrad")  # optimizers of pytorch-optimizer
SECOND_MOMENTS = ("adam", "adamw", "lamb", "diffgrad")  # optimizers that have a metric for the projected step


@dataclass
class DataConfig:
    """Data.

    Args:
        dataset: Name of the dataset; dashes and case do not matter (`movae doctor` lists them).
        data_dir: Folder that holds (or receives) the original files; for `folder` also a tar of images (.cls
            files beside them are their classes), or a text file that lists images or tars.
        image_size: Side of the square images in pixels; the default is the dataset's own.
        resize: How images reach that side: zero padding, resampling, or padding where 4 pixels are missing.
        crop: CelebA's crop before resizing: centre 148 (MO-VAE), centre 140, 128 around the face, or none.
        download: Fetch missing files through torchvision.
        loader: `resident` keeps the set on the device as uint8, `dali` decodes image files with DALI, `torch`
            with worker processes; `auto` is resident where the set fits.
        resident_share: Share of the device's free memory that `auto` lets a set of image files take.
        num_workers: Worker processes of the `torch` loader, decoding threads of `dali` (0: a processor each).
        prefetch: Batches that `dali` works ahead.
        on_bad_image: What an image file that cannot be read does: stop the run, or stay out of it (all files
            are read once before the first run to find out).
        verify_prepared: Compare the images of a prepared file with its checksums as each is first read; a
            difference stops the run.
        batch_size: Images a step and process.
        last_batch: What becomes of an epoch's last images where they fill no batch: left out (drop), or filled
            up with others that count for nothing (pad); only BatchNorm, the counts of codes and the estimate of
            q(z) in total correlation see those. Either way all steps have one shape.
        eval_batch_size: Images a batch of evaluation; the default is batch_size.
        normalize: Map images to [-1, 1] instead of [0, 1].
        binarize: Grey levels to black and white, a pixel white with its grey level for probability: `static`
            draws each image once, the same for every run and seed; `dynamic` draws training images anew every
            epoch and test images once. `threshold` makes white what is above the middle.
        flip: Mirror training images at random; the default is the dataset's own.
        antialias: Smooth the edges of `sprites`, which are black and white like dSprites' otherwise.
        limit_train: Use this many evenly spaced training images; 0 means all.
        limit_test: Use this many evenly spaced test images; 0 means all.
        chn_num: If given, the channels that the dataset's images must have (1 grey, 3 RGB).
    """

    dataset: str = "cifar10"
    data_dir: str = "data"
    image_size: int | None = None
    resize: Literal["auto", "pad", "bilinear", "bicubic"] = "auto"
    crop: Literal["center148", "center140", "stylegan", "none"] = "center148"
    download: bool = True
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    resident_share: float = 0.4
    num_workers: int = 0
    prefetch: int = 2
    on_bad_image: Literal["error", "skip"] = "error"
    verify_prepared: bool = True
    batch_size: int = 128
    last_batch: Literal["drop", "pad"] = "drop"
    eval_batch_size: int | None = None
    normalize: bool = False
    binarize: Binarization = "none"
    flip: bool | None = None
    antialias: bool = False
    limit_train: int = 0
    limit_test: int = 0
    chn_num: int | None = None


@dataclass
class ModelConfig:
    """Model. An option that the chosen arch does not have is refused.

    Args:
        arch: Name of the model.
        latent_dim: Number of latents (vae, betatc_vae, cnn_vae, mmd_vae, torch_vae, dcgan_vae: 128), or of
            latents a rung (provlae, vlae: 3); linear_vae 32, mlp_vae and betatc_mlp_vae 10, cnn_vae_28 and
            resnet_vae_28 32, those of 32 pixels 256, of 64 pixels 64.
        hidden_dims: Channels of the convolutions (vae: 32 64 128 256 512, betatc_vae: 32 32 32 32,
            vq_vae: 128 256), or widths of the layers (mlp_vae, betatc_mlp_vae: 1200 1200).
        layer_norm: Normalisation in vae (batch) and vq_vae (none).
        embedding_dim: Dimension of a code (vq_vae: 64).
        num_embeddings: Number of codes (vq_vae: 512).
        num_residual_layers: Residual blocks in vq_vae's encoder and decoder (2; the published class has 6).
        max_filters: Channels of the widest convolution (torch_vae, dcgan_vae: 128).
        dim: Base channels (cnn_vae, mmd_vae: 64).
        dim_mults: Multiples of dim, one a stage (cnn_vae, mmd_vae: 1 2 4 8 at 64x64).
        with_bn: BatchNorm in the convolutions (cnn_vae, mmd_vae: true).
        num_ladders: Rungs of the ladder (provlae, vlae: 3).
        hidden_dim: Channels of the convolutions (provlae, vlae: 32).
        fc_dim: Width of the linear layers (provlae, vlae: 256).
        ladder_net: The ladder's network and order of stages (provlae, vlae): the authors', from the most
            abstract rung down, or the PyTorch port's, from the least abstract rung up.
        posterior_cov: linear_vae's posterior covariance, one for all images (shared) or predicted from each.
        residual_block: Two 3x3 convolutions (author), or pythae's bottleneck (resnet_vae_28/32/64: author).
    """

    arch: str = "vae"
    latent_dim: int | None = None
    hidden_dims: list[int] | None = None
    layer_norm: Literal["batch", "layer", "none"] | None = None
    embedding_dim: int | None = None
    num_embeddings: int | None = None
    num_residual_layers: int | None = None
    max_filters: int | None = None
    dim: int | None = None
    dim_mults: list[int] | None = None
    with_bn: bool | None = None
    num_ladders: int | None = None
    hidden_dim: int | None = None
    fc_dim: int | None = None
    ladder_net: LadderNet | None = None
    posterior_cov: Literal["shared", "predicted"] | None = None
    residual_block: Literal["author", "pythae"] | None = None


@dataclass
class ObjectiveConfig:
    """Objectives and their aggregation.

    Args:
        recons_dist: Likelihood of the pixels: BCE (bernoulli), squared error (gaussian) or L1 (laplacian).
        recons_reduction: Over pixels and batch (mean), over pixels with the mean over the batch (sum), or 255
            times the sum over both (scaled_sum, gaussian only); the default is the model's.
        recons_activation: Output activation; by default sigmoid for bernoulli, else the model's or tanh.
        loss_weights: Weight of each objective, in order (`1 0.00025`) or by name (`--loss_weights.kl 4`); the
            default is the model's.
        beta: Weight of the model's regulariser alone: kl, tc for betatc_vae, commitment for vq_vae.
        coef_kl: Multiplies the model's default weight of kl (the collection's beta).
        anneal_steps: Steps over which the dimension-wise KL (of models with a tc) reaches its weight.
        kl_annealing: Factor on the KL's weight, by epoch: from 0 to 1 over the first 30 % of the epochs
            (monotonic), or in four cycles, rising in the first half of each (cyclic).
        tc_estimator: Estimator of log q(z): stratified (mss) or weighted (mws) minibatch sampling.
        mmd_alpha: mmd_vae's alpha: KL weighs 1 - alpha, MMD alpha + lambda - 1.
        mmd_lambda: mmd_vae's lambda.
        agg: Aggregator of the objectives' gradients; `sum` is the plain backward of the sum.
        agg_args: Parameters of the aggregator: `--agg_args.c 0.5`.
        pref_weights: Preference of the aggregator, one weight an objective (default 1/m each).
        jacobian: Aggregate the gradients before the features (shared), or those of every parameter (all).
        upgrad_regularizer: What upgrad and dualproj regularize the Gramian by: a part of each row's own squared
            norm (diagonal), so that no row is too short to be protected, or of the trace (trace), as TorchJD
            does.
        upgrad_norm_eps: Trace of the Gramian below which it is taken for zero; with trace only (TorchJD: 1e-4).
        upgrad_reg_eps: The part of that regularizer (TorchJD: 1e-4).
        gramian_every: Approximation: find the aggregator's weights every so many steps and reuse them between.
        gramian_batch: Approximation: find the weights on this fraction of the batch.
        gramian_at: Approximation: find the weights from the gradients at the features (`features`), or at the
            last K shared layers before them (`last:K`); `shared` is exact.
        conflict_free: What is without conflict: the aggregated gradient, or the optimizer's whole step, which
            is projected onto the steps that worsen no objective to first order (with any agg, also sum).
        step_metric: In what the projected step is closest to the optimizer's: plain length (identity), or
            Adam's second moments (optimizer: adam, adamw, lamb, diffgrad).
    """

    recons_dist: ReconsDist = "gaussian"
    recons_reduction: ReconsReduction | None = None
    recons_activation: Literal["tanh", "sigmoid", "none"] | None = None
    loss_weights: list[float] | dict[str, float] | None = None
    beta: float | None = None
    coef_kl: float | None = None
    anneal_steps: int = 200
    kl_annealing: Literal["none", "monotonic", "cyclic"] = "none"
    tc_estimator: Literal["mss", "mws"] = "mss"
    mmd_alpha: float = 1.0
    mmd_lambda: float = 1.0
    agg: str = "sum"
    agg_args: dict[str, Any] = field(default_factory=dict)
    pref_weights: list[float] | None = None
    jacobian: Literal["shared", "all"] = "shared"
    upgrad_regularizer: Regularizer = "diagonal"
    upgrad_norm_eps: float = 0.0
    upgrad_reg_eps: float = STRICT_REG_EPS
    gramian_every: int = 1
    gramian_batch: float = 1.0
    gramian_at: str = "shared"
    conflict_free: Literal["gradient", "step"] = "gradient"
    step_metric: StepMetric = "identity"


@dataclass
class MultiRateConfig:
    """Multi-rate training: one run for all betas of a range.

    The objectives are reconstruction and beta times the KL (where there is a tc, beta times that), averaged
    over the betas drawn, weight 1 each unless given. An aggregator sees those averages: it resolves the
    conflict between them over the whole range, not at each single beta. Evaluation during training is at beta
    1, or the range's nearest.

    Args:
        multirate: Train the model's multi-rate form, whose layers are gated by beta.
        beta_min: Least beta drawn (log-uniformly).
        beta_max: Greatest beta drawn.
        gate_encoder: Gates of the encoder: sigmoid, or sqrt(relu(1 - e^x)).
        gate_decoder: Gates of the decoder.
        gate_position: Before a layer's BatchNorm or behind it; layers without one are gated themselves.
        beta_per: A beta for each example or one for the batch (the default where there is a tc, which is
            estimated within the batch). One a batch needs post_bn: BatchNorm divides a gate before it out.
        gate_bias: Added to the initial bias of sqrt gates, a seventh of which start closed; negative opens
            them.
        gate_slope: Added to the initial slope of all gates, in the direction that closes them as beta grows.
    """

    multirate: bool = False
    beta_min: float = 0.01
    beta_max: float = 10.0
    gate_encoder: Literal["sigmoid", "sqrt"] = "sigmoid"
    gate_decoder: Literal["sqrt", "sigmoid"] = "sqrt"
    gate_position: Literal["pre_bn", "post_bn"] = "pre_bn"
    beta_per: Literal["example", "batch"] | None = None
    gate_bias: float = 0.0
    gate_slope: float = 0.0


@dataclass
class LadderConfig:
    """Stages of provlae, and schedules of the KL.

    Args:
        mode: `seq_train` all stages, `epochs` (or `steps`) each; `indep_train` stage `train_seq` alone, from
            its predecessor's checkpoint; `visualize` a checkpoint's latents.
        train_seq: The stage of indep_train; stage s has the s most abstract rungs.
        init_from: Run or checkpoint to start from (indep_train) or to draw (visualize).
        fade_in_duration: Steps over which a stage's new rung fades in; 0 adds it at once.
        coff: Weight of the KL of rungs that are not active yet.
        pre_kl: Whether those have a KL at all.
        use_kl_annealing: Anneal the KL's weight in cycles.
        kl_annealing_mode: How the weight rises in a cycle.
        cycle_period: Cycles a stage.
        max_kl_weight: Factor on the KL's weight at the end of a cycle's rise.
        min_kl_weight: Factor at its start.
        ratio: The part of a cycle in which the factor rises.
        use_capacity_increase: Pull each KL towards a growing capacity, weight gamma, instead of towards 0.
        gamma: Weight of the distance between KL and capacity.
        max_capacity: Greatest capacity in nats.
        capacity_max_iter: Steps until it is reached.
    """

    mode: Literal["seq_train", "indep_train", "visualize"] = "seq_train"
    train_seq: int = 1
    init_from: str | None = None
    fade_in_duration: int = 5000
    coff: float = 0.5
    pre_kl: bool = True
    use_kl_annealing: bool = False
    kl_annealing_mode: Literal["linear", "sigmoid", "cosine"] = "linear"
    cycle_period: int = 4
    max_kl_weight: float = 1.0
    min_kl_weight: float = 0.1
    ratio: float = 1.0
    use_capacity_increase: bool = False
    gamma: float = 1000.0
    max_capacity: float = 25.0
    capacity_max_iter: int = 100_000


@dataclass
class OptimizerConfig:
    """Optimizer and schedule.

    Args:
        optimizer: Optimizer; lamb, diffgrad and madgrad need the extra `optimizers`.
        lr: Learning rate.
        weight_decay: Weight decay (decoupled in adamw, lamb, diffgrad).
        momentum: Momentum of sgd and madgrad.
        betas: Decay of the moments in adam, adamw, lamb and diffgrad.
        eps: What keeps a division from zero; the default is the optimizer's own (not sgd).
        max_grad_norm: Clip the gradient of all parameters to this norm; 0 does not clip.
        scheduler: Learning-rate schedule after the warm-up.
        scheduler_per: Whether the rate, warm-up included, changes every step or every epoch.
        scheduler_lr_min: Learning rate at the end of cosine.
        scheduler_gamma: Factor at each milestone of multi_step.
        scheduler_milestones: Epochs of multi_step's drops.
        warmup_steps: Steps of linear warm-up from lr / warmup_steps.
        warmup_epochs: The same in epochs.
    """

    optimizer: Literal["adam", "adamw", "sgd", "lamb", "diffgrad", "madgrad"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float | None = None
    max_grad_norm: float = 0.0
    scheduler: Literal["none", "cosine", "multi_step"] = "none"
    scheduler_per: Literal["step", "epoch"] = "step"
    scheduler_lr_min: float = 0.0
    scheduler_gamma: float = 0.1
    scheduler_milestones: list[int] = field(default_factory=list)
    warmup_steps: int = 0
    warmup_epochs: int = 0


@dataclass
class RunConfig:
    """The run.

    Args:
        epochs: Passes over the training set (a stage, where training has stages).
        steps: Stop (a stage) after this many steps instead; 0 means by epochs.
        seed: Seed of weights, noise, order and mirroring; drawn and recorded if not given.
        device: `auto`, `cpu`, `cuda` or `cuda:1`; under torchrun each process takes its own GPU.
        distributed: Not needed, as processes that torchrun started train together; false refuses them.
        precision: Networks in float32 (fp32), TensorFloat-32 (tf32, CUDA), or autocast to bf16 or fp16.
        compile: torch.compile of the step; `auto` compiles on CUDA and not on a CPU. There all but `default`
            and `off` record the whole step as one CUDA graph too, if optimizer, precision and aggregator allow.
        on_cudnn_benchmark: Let cuDNN try its algorithms for the shapes that it meets (CUDA).
        accumulate: Split each batch into this many parts, one after the other, to save memory.
        sync_batchnorm: BatchNorm over all processes' images rather than each one's own.
        profile: Write a torch profiler trace of this many steps to the run's folder; 0 for none.
        log_every: Steps between lines of metrics.jsonl.
        eval_freq: Epochs between evaluations on the test split; 0 evaluates at the end only.
        save_freq: Epochs between kept checkpoints and figures; 0 keeps `last` and `best` only.
        checkpoint_every: Steps between writes of the `last` checkpoint, besides each epoch's end; 0 for none.
        num_samples: Images of each kind in a figure.
        max_fid_samples: Accepted for compatibility; training computes no FID.
        save_path: Folder under which a run gets dataset/arch/agg/time.
        exp_dir: The run's folder itself, instead of one under save_path; must be new or empty.
        resume: Continue this run (its folder or one of its checkpoints), bit for bit; auto starts the run in
            exp_dir, or goes on with it, whatever a process that was killed left there.
        export: Also write the final weights to this file; an existing file is never overwritten.
    """

    epochs: int = 50
    steps: int = 0
    seed: int | None = None
    device: str = "auto"
    distributed: bool | None = None
    precision: PrecisionName = "fp32"
    compile: CompileMode = "auto"
    on_cudnn_benchmark: bool = True
    accumulate: int = 1
    sync_batchnorm: bool = False
    profile: int = 0
    log_every: int = 50
    eval_freq: int = 1
    save_freq: int = 10
    checkpoint_every: int = 1000
    num_samples: int = 16
    max_fid_samples: int | None = None
    save_path: str = "runs"
    exp_dir: str | None = None
    resume: str | None = None
    export: str | None = None


@dataclass
class WandbConfig:
    """Weights & Biases (extra `wandb`; WANDB_MODE=offline works).

    Args:
        use_wandb: Log to Weights & Biases too.
        wandb_project: Project.
        wandb_entity: Team or user.
        wandb_name: Name of the run.
        wandb_tags: Tags.
    """

    use_wandb: bool = False
    wandb_project: str = "mo-vae"
    wandb_entity: str | None = None
    wandb_name: str | None = None
    wandb_tags: list[str] | None = None


@dataclass
class TrainConfig:
    """Everything that `movae train` is told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    multirate: MultiRateConfig = field(default_factory=MultiRateConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> TrainConfig:
        """From flags by name, as on a command line or in a config.yaml; unknown names are ignored."""
        parts = {}
        for part in fields(cls):
            section = SECTIONS[part.name]
            names = {f.name for f in fields(section)}
            parts[part.name] = section(**{k: v for k, v in values.items() if k in names})
        return cls(**parts)

    def flat(self) -> dict[str, Any]:
        """Flags by name; the inverse of `from_flat`."""
        return {name: value for part in asdict(self).values() for name, value in part.items()}

    @property
    def info(self) -> DatasetInfo:
        return DATASETS[self.data.dataset]

    @property
    def model_class(self) -> type[VAE]:
        return MODELS[self.model.arch]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.data.image_size or self.info.default_size
        return self.info.channels, size, size

    @property
    def aggregated(self) -> bool:
        return self.objective.agg != "sum"

    @property
    def needs_jacobian(self) -> bool:
        """False where the weights of the rows are ones whatever the rows: one backward of the sum does it."""
        return self.objective.agg not in ("sum", "jd_sum")

    @property
    def activation(self) -> Literal["tanh", "sigmoid", "none"]:
        if self.objective.recons_activation is not None:
            return self.objective.recons_activation
        if self.objective.recons_dist == "bernoulli":
            return "sigmoid"
        return self.model_class.default_activation or "tanh"

    @property
    def reduction(self) -> ReconsReduction:
        if self.objective.recons_reduction is None and self.multirate.multirate:
            return "sum"
        return self.objective.recons_reduction or self.model_class.recons_reduction  # type: ignore[return-value]

    @property
    def beta_per(self) -> Literal["example", "batch"]:
        """Whether a multi-rate model draws a beta an example or a batch: tc compares a batch's posteriors."""
        return self.multirate.beta_per or ("batch" if self.model_class.beta_objective == "tc" else "example")

    def weights(self) -> list[float]:
        """The objectives' weights in order."""
        o = self.objective
        defaults = self.model_class.weighted_objectives(vars(self.model), self.image_shape)
        if self.multirate.multirate:
            defaults = dict.fromkeys(defaults, 1.0)  # beta is drawn
        if "mmd" in defaults:
            defaults["kl"] *= 1 - o.mmd_alpha
            defaults["mmd"] *= o.mmd_alpha + o.mmd_lambda - 1
        if self.ladder.use_capacity_increase:
            defaults |= {name: self.ladder.gamma for name in defaults if name.startswith("kl")}
        if o.coef_kl is not None:
            if "kl" not in defaults or o.beta is not None or o.loss_weights is not None:
                raise ValueError("--coef_kl scales the default weight of kl: give it alone, to a model with kl")
            defaults["kl"] *= o.coef_kl
        return resolve_weights(self.model_class, self.image_shape, o.loss_weights, o.beta, defaults)


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "multirate": MultiRateConfig,
    "ladder": LadderConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "wandb": WandbConfig,
}


def resolve_device(name: str) -> torch.device:
    """The device called `name`; asking for CUDA where there is none is an error, never a silent CPU run.

    A GPU that is named by its number becomes the current one: streams and kernels are its own then.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parsed_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu, or see `movae doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s)")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_device(name: str) -> None:
    """Raise ValueError for a device that no machine has; whether this one has it, `resolve_device` says."""
    if name != "auto":
        parsed_device(name)


def parsed_device(name: str) -> torch.device:
    """The device called `name`, whether it is there or not. Raises ValueError for a name of none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; valid: auto, cpu, cuda, cuda:0, …") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: only cpu and cuda devices are supported")
    if device.type == "cpu" and device.index:
        raise ValueError(f"--device {name}: there is one CPU device, whatever its processors: cpu")
    return torch.device("cpu") if device.type == "cpu" else device


def point_at(
    trained: TrainConfig, device: str, data_dir: str | None = None, batch_size: int | None = None
) -> None:
    """Let a trained model's configuration read images for use: there, on that device, so many at a time."""
    data, run = trained.data, trained.run
    data.data_dir = data_dir or data.data_dir
    if batch_size is not None:
        data.batch_size = data.eval_batch_size = batch_size
    run.device, run.accumulate, run.export = device, 1, None


def validate(config: TrainConfig) -> None:
    """Normalise names and refuse what cannot work, before anything is allocated. Raises ValueError."""
    data, objective, run = config.data, config.objective, config.run
    for section in vars(config).values():
        check_values(section)
    data.dataset = pick("dataset", data.dataset, DATASETS)
    config.model.arch = pick("arch", config.model.arch, MODELS)
    if objective.agg in NEED_TWO_BATCHES:
        raise ValueError(f"--agg {objective.agg} needs two independent batches a step; this trainer draws one")
    objective.agg = pick("agg", objective.agg, ["sum", *AGGREGATORS]) if objective.agg else "sum"
    if data.image_size is None:
        data.image_size = config.info.default_size
    assert data.crop in CELEBA_CROPS
    if data.loader == "dali":
        require_dali()
    if data.chn_num not in (None, config.info.channels):
        raise ValueError(f"--chn_num {data.chn_num}: {data.dataset} has {config.info.channels}")
    check_device(run.device)
    if data.batch_size % run.accumulate:
        raise ValueError(f"--accumulate {run.accumulate} must divide --batch_size {data.batch_size}")
    check_aggregation(config)
    check_optimizer(config.optimizer)
    if config.optimizer.warmup_epochs and config.optimizer.warmup_steps:
        raise ValueError("--warmup_epochs and --warmup_steps both set the length of the warm-up; give one")
    if config.optimizer.scheduler == "multi_step" and not config.optimizer.scheduler_milestones:
        raise ValueError("--scheduler multi_step needs --scheduler_milestones, the epochs of its drops")
    if objective.recons_reduction == "scaled_sum" and objective.recons_dist != "gaussian":
        raise ValueError(
            f"--recons_reduction scaled_sum is for gaussian only; with --recons_dist {objective.recons_dist} "
            "use mean or sum"
        )
    if objective.recons_dist == "bernoulli" and data.normalize:
        raise ValueError("--recons_dist bernoulli needs images in [0, 1]; leave out --normalize")
    if objective.recons_dist == "bernoulli" and config.activation != "sigmoid":
        raise ValueError("--recons_dist bernoulli has sigmoid outputs; leave out --recons_activation")
    if data.normalize and config.activation == "sigmoid":
        raise ValueError("--normalize gives images in [-1, 1], which a sigmoid output cannot reach; use tanh")
    if not config.aggregated and (objective.agg_args or objective.pref_weights):
        raise ValueError("--agg_args and --pref_weights need an aggregator: --agg upgrad, …")
    check_ladder(config)
    check_multirate(config)
    weights = config.weights()
    if "tc" in config.model_class.objectives and data.batch_size < 2:
        raise ValueError("--batch_size 1: total correlation is estimated within a batch; give at least 2")
    if config.needs_jacobian:
        check_runs(
            objective.agg,
            sum(w != 0 for w in weights),
            objective.agg_args,
            pref_weights=objective.pref_weights,
            norm_eps=objective.upgrad_norm_eps,
            reg_eps=objective.upgrad_reg_eps,
            regularizer=objective.upgrad_regularizer,
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if run.distributed is False and processes > 1:
        raise ValueError(
            f"--distributed false: torchrun started {processes} processes, which train together; leave it out"
        )
    if run.exp_dir is not None and run.resume is not None:
        raise ValueError("--resume continues in the run's own folder; leave out --exp_dir")
    if run.export is not None and Path(run.export).exists():
        raise ValueError(f"--export {run.export} exists and is not overwritten; name another file")


def check_fits(config: TrainConfig) -> None:
    """Raise ValueError for a batch or a model that the device cannot hold; nothing is allocated.

    To be called after `validate`. What is counted is less than what training takes: of a batch its images,
    their reconstruction and the gradient of that; of the model the weights, their gradient and two moments.
    """
    device = resolve_device(config.run.device)
    has, data = all_memory(device), config.data
    image = 3 * 4 * math.prod(config.image_shape)
    at_once = data.batch_size // config.run.accumulate
    for name, count in (("batch_size", at_once), ("eval_batch_size", data.eval_batch_size or 0)):
        flag = f"--image_size {data.image_size}" if image > has else f"--{name} {getattr(data, name)}"
        _refuse_above(has, device, image * count, flag, "the images of a batch take")
    given = {k: v for k, v in vars(config.model).items() if k != "arch" and v is not None}
    flag = largest_option(given) or f"--arch {config.model.arch}"
    try:
        with torch.device("meta"):
            model = build_model(config.model.arch, config.image_shape, config.activation, given)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{flag}: no machine holds a model of that size ({reason:.120})") from None
    count = sum(p.numel() for p in model.parameters())
    _refuse_above(has, device, 16 * count, flag, f"training its {count:,} parameters takes")


def largest_option(given: dict[str, Any]) -> str:
    """Return the option of a model that has the largest number, as it is written; "" where none has one."""
    numbers = {k: v if isinstance(v, list) else [v] for k, v in given.items() if not isinstance(v, str)}
    largest = {name: max(values, default=0) for name, values in numbers.items()}
    if not largest:
        return ""
    name = max(largest, key=lambda k: largest[k])
    return f"--{name} {given[name]}"


def check_room(flag: str, count: int, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError, in the name of `flag`, for a picture of more images than this machine's memory holds.

    Small images are drawn larger, in three colours; they are there as numbers and as the picture.
    """
    device = torch.device("cpu")
    needed = 16 * count * max(math.prod(image_shape), 3 * 64 * 64)
    _refuse_above(all_memory(device), device, needed, flag, "its images take")


def _refuse_above(has: int, device: torch.device, needed: int, flag: str, what: str) -> None:
    if needed > has:
        raise ValueError(
            f"{flag}: {what} at least {needed / 2**30:,.1f} GiB; {device} has {has / 2**30:,.1f} GiB"
        )


def check_aggregation(config: TrainConfig) -> None:
    """What `validate` asks of the aggregation's approximations, epsilons and projection."""
    o, agg = config.objective, config.objective.agg
    if o.upgrad_regularizer == "diagonal" and o.upgrad_norm_eps:
        raise ValueError(
            "--upgrad_norm_eps is a threshold of the trace: add --upgrad_regularizer trace (TorchJD's), "
            "or leave it out"
        )
    default = ObjectiveConfig()
    names = ("upgrad_regularizer", "upgrad_norm_eps", "upgrad_reg_eps")
    given = [name for name in names if getattr(o, name) != getattr(default, name)]
    if given and agg not in CONES:
        raise ValueError(f"--{given[0]} is a setting of {', '.join(CONES)}; --agg {agg} does not have it")
    approximate = o.gramian_every > 1 or o.gramian_batch < 1 or o.gramian_at != "shared"
    if o.conflict_free == "step" and approximate:
        raise ValueError(
            "--conflict_free step needs every step's rows; leave out the approximation --gramian_*"
        )
    if approximate and not (config.needs_jacobian and weights_rows(agg)):
        raise ValueError(
            "--gramian_every, --gramian_batch and --gramian_at need an aggregator that weights rows; "
            f"{agg} does not"
        )
    if o.gramian_batch < 1 and o.jacobian == "all":
        raise ValueError("--gramian_batch cuts the network at its features: leave --jacobian at shared")
    if o.gramian_batch < 1 and config.run.compile not in ("auto", "off"):
        raise ValueError("--gramian_batch runs uncompiled; leave out --compile")
    if o.gramian_at != "shared":
        choices = "shared, features, last:1, last:2, …"
        if o.gramian_at != "features" and not re.fullmatch(r"last:[1-9]\d*", o.gramian_at):
            raise ValueError(f"--gramian_at {o.gramian_at}: valid: {choices}")
        if o.jacobian == "all":
            raise ValueError("--gramian_at cuts the network at its features: leave --jacobian at shared")
        if not config.model_class.has_features:
            raise ValueError(
                f"--gramian_at {o.gramian_at}: {config.model.arch} has no features to cut it at; valid: shared"
            )
        if o.gramian_batch < 1:
            raise ValueError("--gramian_at and --gramian_batch are two ways to the same weights; give one")
        if not weights_by_gramian(agg):
            able = ", ".join(name for name in AGGREGATORS if weights_by_gramian(name))
            raise ValueError(
                f"--gramian_at: {agg} needs the rows themselves; these do with their Gramian: {able}"
            )
    if o.conflict_free != "step" and o.step_metric != "identity":
        raise ValueError("--step_metric is a setting of the projected step: add --conflict_free step")
    if o.step_metric == "optimizer" and config.optimizer.optimizer not in SECOND_MOMENTS:
        raise ValueError(
            f"--step_metric optimizer: {config.optimizer.optimizer} has no second moments to measure by; "
            f"these have: {', '.join(SECOND_MOMENTS)}"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """What `validate` asks of the optimizer's parameters."""
    name, betas, eps = optimizer.optimizer, optimizer.betas, optimizer.eps
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"--betas {betas}: give two numbers from 0 to below 1")
    if eps is not None and name == "sgd":
        raise ValueError("--eps does not apply to sgd")
    if name in FROM_EXTRA and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ValueError(f"--optimizer {name} needs pytorch-optimizer: pip install 'movae-fast[optimizers]'")


def check_ladder(config: TrainConfig) -> None:
    """What `validate` asks of the ladder's settings."""
    ladder, arch = config.ladder, config.model.arch
    names = list(config.model_class.weighted_objectives(vars(config.model), config.image_shape))
    stages = len(names) - 1
    progressive = getattr(config.model_class, "progressive", False)
    if not progressive and (ladder.mode != "seq_train" or ladder.train_seq != 1 or ladder.init_from):
        raise ValueError(f"--mode, --train_seq and --init_from are for provlae; {arch} has no stages")
    if progressive and not 1 <= ladder.train_seq <= stages:
        raise ValueError(f"--train_seq {ladder.train_seq}: a ladder of {stages} rungs has stages 1 to {stages}")
    if ladder.mode == "indep_train" and ladder.train_seq > 1 and ladder.init_from is None:
        raise ValueError(
            f"--mode indep_train --train_seq {ladder.train_seq} starts from stage {ladder.train_seq - 1}: "
            "name its run or checkpoint, --init_from PATH"
        )
    if ladder.mode == "seq_train" and ladder.train_seq != 1:
        raise ValueError("--train_seq is the stage of --mode indep_train; seq_train runs all of them")
    if ladder.mode == "visualize" and ladder.init_from is None:
        raise ValueError("--mode visualize draws a checkpoint: name it or its run, --init_from PATH")
    annealed = config.objective.kl_annealing != "none"
    if annealed and ladder.use_kl_annealing:
        raise ValueError("--kl_annealing and --use_kl_annealing both anneal the KL's weight; give one")
    needs_kl = annealed or ladder.use_kl_annealing or ladder.use_capacity_increase
    if needs_kl and not any(n.startswith("kl") for n in names):
        raise ValueError(
            f"--kl_annealing, --use_kl_annealing and --use_capacity_increase need a KL; {arch} has none"
        )
    if ladder.use_capacity_increase and (config.objective.beta is not None or config.objective.loss_weights):
        raise ValueError(
            "--use_capacity_increase weighs the KL by --gamma; leave out --beta and --loss_weights"
        )
    if hasattr(config.model_class, "progressive") and config.data.batch_size // config.run.accumulate < 2:
        raise ValueError(f"--batch_size: {arch} normalises over the batch; give at least 2 images at a time")


def check_multirate(config: TrainConfig) -> None:
    """What `validate` asks of the multi-rate settings."""
    rate, arch, o = config.multirate, config.model.arch, config.objective
    if not rate.multirate:
        default = MultiRateConfig()
        given = [f.name for f in fields(rate) if getattr(rate, f.name) != getattr(default, f.name)]
        if given:
            raise ValueError(f"--{given[0]} is a setting of multi-rate training: add --multirate")
        return
    if config.model_class.beta_objective not in ("kl", "tc"):
        able = ", ".join(name for name, model in MODELS.items() if model.beta_objective in ("kl", "tc"))
        raise ValueError(f"--multirate does not apply to {arch}; it is for {able}")
    Rates(rate.beta_min, rate.beta_max)
    for name in ("beta", "coef_kl"):
        if getattr(o, name) is not None:
            raise ValueError(f"--{name}: with --multirate beta is drawn; set --beta_min and --beta_max instead")
    if config.ladder.use_capacity_increase:
        raise ValueError("--use_capacity_increase replaces beta times the KL: leave it or --multirate out")
