"""Define every setting of a run: one dataclass per subject, each field a flag of the same name.

`config_checks.validate` checks which settings go together. Neither module imports torch. There is no
TYPE_CHECKING block here, since jsonargparse would execute it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from movae_fast import models
from movae_fast.choices import (
    COMPONENTS,
    DISCRETE,
    STRICT_REG_EPS,
    TEXT_SETS,
    Binarization,
    CompileMode,
    Extra,
    ImportanceGradient,
    KLRows,
    LadderNet,
    MMDKernel,
    PrecisionName,
    Preset,
    Quantizer,
    ReconsDist,
    ReconsReduction,
    Regularizer,
    StepMetric,
    TooLong,
    TrainedPrior,
)
from movae_fast.data import text
from movae_fast.data.datasets import DATASETS, DatasetInfo
from movae_fast.objectives.extras import SECOND_PASSES, extra_objectives
from movae_fast.objectives.weights import resolve_weights

FROM_EXTRA = ("lamb", "diffgrad", "madgrad")  # optimizers of pytorch-optimizer


@dataclass
class DataConfig:
    """Data.

    Args:
        dataset: Name of the dataset; dashes and case do not matter (`movae data list` has them).
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
        batch_size: Images per step and process.
        last_batch: What becomes of an epoch's last images where they fill no batch: left out (drop), or filled
            up with others that count for nothing (pad); only BatchNorm, the counts of codes and the estimate of
            q(z) in total correlation see those. Either way all steps have one shape.
        eval_batch_size: Images a batch of evaluation; the default is batch_size.
        normalize: Map images to [-1, 1] instead of [0, 1].
        binarize: Grey levels to black and white, a pixel white with its grey level for probability: `static`
            draws each image once, the same for every run and seed; `dynamic` draws training images anew every
            epoch and test images once. `threshold` makes white what is above the middle.
        bits: Bits of a value: below 8 the images have 2^bits grey levels instead of 256.
        flip: Mirror training images at random; the default is the dataset's own.
        antialias: Smooth the edges of `sprites`, which are black and white like dSprites' otherwise.
        limit_train: Use this many evenly spaced training images; 0 means all.
        limit_test: Use this many evenly spaced test images; 0 means all.
        chn_num: If given, the channels that the dataset's images must have (1 grey, 3 RGB).
        max_length: Most words of a sentence (text); 0 for any number.
        too_long: What becomes of a longer one: an error, cut to that length, or left out; counted.
        label_column: Whether lines are label<TAB>text (text); the default is the corpus's own.
        pad_multiple: Sentences of one batch have one length (1), or lengths that are padded to the next
            multiple of this, for fewer shapes.
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
    bits: int = 8
    flip: bool | None = None
    antialias: bool = False
    limit_train: int = 0
    limit_test: int = 0
    chn_num: int | None = None
    max_length: int = 0
    too_long: TooLong = "error"
    label_column: bool | None = None
    pad_multiple: int = 1


@dataclass
class ModelConfig:
    """Model. An option that the chosen arch does not have is refused.

    Args:
        arch: Name of the model.
        latent_dim: Number of latents (vae, betatc_vae, cnn_vae, mmd_vae, torch_vae, dcgan_vae: 128), or of
            latents per rung (provlae, vlae: 3); linear_vae 32, mlp_vae and betatc_mlp_vae 10, cnn_vae_28 and
            resnet_vae_28 32, those of 32 pixels 256, of 64 pixels 64.
        hidden_dims: Channels of the convolutions (vae: 32 64 128 256 512, betatc_vae: 32 32 32 32,
            vq_vae: 128 256), or widths of the layers (mlp_vae, betatc_mlp_vae: 1200 1200).
        layer_norm: Normalisation in vae (batch) and vq_vae (none).
        quantizer: What vq_vae and vq_vae_2 have between encoder and decoder: a codebook that is trained (vq) or
            follows averages (ema), levels of each channel (fsq), codebooks that each quantize what is left over
            (rvq), the same for groups of channels (grouped_rvq), signs (lfq; bsq on the sphere), or a frozen
            codebook behind a learned layer (simvq).
        embedding_dim: Dimension of a code (vq_vae, vq_vae_2: 64; fsq, lfq and bsq follow from their codes).
        num_embeddings: Number of codes (vq_vae, vq_vae_2: 512), of each codebook; lfq, bsq: a power of two.
        num_quantizers: Codebooks after each other (rvq, grouped_rvq: 4).
        num_groups: Groups of channels (grouped_rvq: 2).
        fsq_levels: Levels of each channel (fsq: 8 5 5 5, which are 1,000 codes).
        quantize_dropout: Train each image with a random number of codebooks, so that the first few alone are a
            code, too (rvq, grouped_rvq: false); `movae evaluate --metrics depth` has the curve.
        codebook_decay: Decay per step of the averages that codes follow (ema: 0.99).
        num_residual_layers: Residual blocks in vq_vae's and vq_vae_2's encoder and decoder (2; the published
            vq_vae has 6).
        max_filters: Channels of the widest convolution (torch_vae, dcgan_vae: 128).
        dim: Base channels (cnn_vae, mmd_vae: 64).
        dim_mults: Multiples of dim, one per stage (cnn_vae, mmd_vae: 1 2 4 8 at 64x64).
        with_bn: BatchNorm in the convolutions (cnn_vae, mmd_vae: true).
        num_ladders: Rungs of the ladder (provlae, vlae: 3).
        hidden_dim: Channels of the convolutions (provlae, vlae: 32; vq_vae_2: 128).
        fc_dim: Width of the linear layers (provlae, vlae: 256).
        ladder_net: The ladder's network and order of stages (provlae, vlae): the authors', from the most
            abstract rung down, or the PyTorch port's, from the least abstract rung up.
        posterior_cov: linear_vae's posterior covariance, one for all images (shared) or predicted from each.
        dropout_in: Dropout of the words that lstm_vae's decoder reads (0.5).
        dropout_out: Dropout of its outputs (0.5).
        word_dropout: Fraction of those words that are replaced by <unk> (0).
        free_bits: Nats per latent and sentence below which lstm_vae's KL costs the same (0).
        skip_latent: Whether lstm_vae's logits are linear in z as well (false).
        residual_block: Two 3x3 convolutions (author), or pythae's bottleneck (resnet_vae_28/32/64: author).
        preset: nvae's numbers for a dataset: mnist (the default), omniglot, celeba64, cifar10, or tiny for a
            CPU; the options below replace them one by one. Or lstm_vae's sizes and initial values: lagging
            (512/1024/32, He et al. 2019; the default), texar (512/550/32), multirate (256/256/32), synthetic
            (50/50/2), for embedding, LSTM and latents.
        num_scales: Resolutions that have latents (nvae).
        groups_per_scale: Groups of latents at the largest resolution (nvae).
        ada_groups: Half as many groups at each smaller resolution as at the next larger one (nvae).
        latents_per_group: Channels of a group's latent map (nvae).
        channels: Channels of the stem; they double where the side halves (nvae).
        outer_blocks: Halvings of the side before the largest resolution that has latents (nvae).
        outer_cells: Cells per such halving, in the encoder and in the decoder (nvae).
        cells_per_group: Cells before each group, in the encoder and in the decoder (nvae).
        num_flows: Pairs of autoregressive flows per group (nvae).
        kl_rows: What has a KL objective of its own: each scale, each group, or all together (nvae: scale).
    """

    arch: str = "vae"
    latent_dim: int | None = None
    hidden_dims: list[int] | None = None
    layer_norm: Literal["batch", "layer", "none"] | None = None
    quantizer: Quantizer | None = None
    embedding_dim: int | None = None
    num_embeddings: int | None = None
    num_quantizers: int | None = None
    num_groups: int | None = None
    fsq_levels: list[int] | None = None
    quantize_dropout: bool | None = None
    codebook_decay: float | None = None
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
    preset: Preset | None = None
    num_scales: int | None = None
    groups_per_scale: int | None = None
    ada_groups: bool | None = None
    latents_per_group: int | None = None
    channels: int | None = None
    outer_blocks: int | None = None
    outer_cells: int | None = None
    cells_per_group: int | None = None
    num_flows: int | None = None
    kl_rows: KLRows | None = None
    dropout_in: float | None = None
    dropout_out: float | None = None
    word_dropout: float | None = None
    free_bits: float | None = None
    skip_latent: bool | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that are given, by name, without `arch`."""
        return {name: value for name, value in vars(self).items() if name != "arch" and value is not None}


@dataclass
class ObjectiveConfig:
    """Objectives and their aggregation.

    Args:
        recons_dist: Likelihood of the pixels: BCE (bernoulli), squared error (gaussian), L1 (laplacian), a
            Gaussian whose variance is the best one for each image (gaussian_optimal), a discretised logistic
            per value (logistic), or a mixture of those over a pixel's three colours (dmol).
        recons_components: Components of the mixture dmol.
        recons_reduction: Over pixels and batch (mean), over pixels with the mean over the batch (sum), or 255
            times the sum over both (scaled_sum, gaussian only); the default is the model's.
        recons_activation: Output activation; by default sigmoid for bernoulli, none for logistic and dmol,
            whose outputs are parameters, else the model's or tanh.
        loss_weights: Weight of each objective, in order (`1 0.00025`) or by name (`--loss_weights.kl 4`); the
            default is the model's.
        beta: Weight of the model's regulariser alone: kl, tc for betatc_vae, mmd for mmd_vae,
            commitment for vq_vae and vq_vae_2 (entropy with lfq and bsq).
        coef_kl: Multiplies the model's default weight of kl (the collection's beta).
        anneal_steps: Steps over which the dimension-wise KL (of models with a tc) reaches its weight.
        kl_annealing: Factor on the KL's weight, by epoch: from 0 to 1 over the first 30 % of the epochs
            (monotonic), or in four cycles, rising in the first half of each (cyclic).
        kl_warmup: The part of the steps in which the KL's weight rises to 1, by step; 0 is none. The default is
            0.3 for nvae with --agg sum and one rate, else 0.
        kl_constant: The part of the steps that comes before that rise.
        kl_least: Factor on the KL's weight where the rise begins.
        kl_balance: During that rise, balance the KLs of nvae's groups; the default is to do so.
        norm_penalty: Weight of nvae's penalty: the sum of all convolutions' largest singular values and all
            BatchNorms' largest scales. Its gradient is added to the update. The default is the preset's.
        norm_penalty_init: Weight that it begins with, annealed on a logarithmic scale as the KL's weight rises.
        tc_estimator: Estimator of log q(z): stratified (mss) or weighted (mws) minibatch sampling.
        mmd_alpha: mmd_vae's alpha: KL weighs 1 - alpha, MMD alpha + lambda - 1.
        mmd_lambda: mmd_vae's lambda.
        mmd_kernel: Kernel of mmd_vae's MMD: the published Gaussian (gaussian), or the inverse multiquadric over
            seven scales, unbiased (imq).
        extra_objectives: Objectives added to the model's own, behind them: dip_i and dip_ii (off_diagonal,
            diagonal: DIP-VAE's penalties of the latents' covariance), factor (adversarial_tc: FactorVAE's total
            correlation, by a discriminator with an optimizer of its own), l1, lpips, gan (adversarial:
            the hinge GAN's, by a discriminator of patches that is trained likewise), edges (edge_weighted,
            edge_matching: MO-VAE's gg_vae), recursive_kl (the KL of the encoded reconstruction), cycle (the
            distance of draws from the prior from what their images are encoded to). The last two reach encoder
            and decoder at once, so they need --jacobian all, their default.
        gan_start: Step from which the objective adversarial counts; its discriminator is trained before, too.
        recursive_kl_steps: Steps in which the weight of recursive_kl rises to its full size.
        lpips_weights: File of torchvision's VGG16 weights, for lpips.
        importance_samples: Draws of the posterior for each image in training: above 1 the objectives are those
            of the importance-weighted bound (IWAE), with --recons_reduction sum.
        importance_gradient: The encoder's gradient of that bound: as it is (iwae), or doubly reparametrised,
            with less noise (dreg).
        prior: Prior of a vector of latents: N(0, I) (normal), or the mean of the posteriors of learned
            pseudo-inputs (vamp, the VampPrior), for models with the objectives reconstruction and kl whose
            encoder has no BatchNorm. The kl is then log q(z given x) - log p(z) of the draws.
        pseudo_inputs: Number of pseudo-inputs of vamp (500).
        agg: Aggregator of the objectives' gradients; `sum` is the plain backward of the sum.
        agg_args: Parameters of the aggregator: `--agg_args.c 0.5`.
        pref_weights: Preference of the aggregator, one weight per objective (default 1/m each).
        jacobian: Aggregate the gradients before the features (shared), or those of every parameter (all); the
            default is shared, and all for nvae, which has no features, and for recursive_kl and cycle.
        upgrad_regularizer: What upgrad, dualproj, nupgrad and comfort regularize the Gramian by: a part of each
            row's own squared norm (diagonal), so that no row is too short to be protected, or of the trace
            (trace), as TorchJD does.
        upgrad_norm_eps: Trace of the Gramian below which it is taken for zero; with trace only (TorchJD: 1e-4).
        upgrad_reg_eps: The part of that regularizer (TorchJD: 1e-4).
        gramian_every: Approximation: find the aggregator's weights every so many steps and reuse them between.
        gramian_batch: Approximation: find the weights on this fraction of the batch.
        gramian_at: Approximation: find the weights from the gradients at the features (`features`), or at the
            last K shared layers before them (`last:K`); `shared` is exact.
        conflict_free: What is without conflict: the aggregated gradient, or the optimizer's whole step, which
            is projected onto the steps that worsen no objective to first order (with any agg, also sum).
        step_metric: In what the projected step is closest to the optimizer's: plain length (identity), or
            Adam's second moments (optimizer: adam, adamw, lamb, diffgrad; adamax: its infinity norm).
    """

    recons_dist: ReconsDist = "gaussian"
    recons_components: int = COMPONENTS
    recons_reduction: ReconsReduction | None = None
    recons_activation: Literal["tanh", "sigmoid", "none"] | None = None
    loss_weights: list[float] | dict[str, float] | None = None
    beta: float | None = None
    coef_kl: float | None = None
    anneal_steps: int = 200
    kl_annealing: Literal["none", "monotonic", "cyclic"] = "none"
    kl_warmup: float | None = None
    kl_constant: float = 1e-4
    kl_least: float = 1e-4
    kl_balance: bool | None = None
    norm_penalty: float | None = None
    norm_penalty_init: float | None = None
    tc_estimator: Literal["mss", "mws"] = "mss"
    mmd_alpha: float = 1.0
    mmd_lambda: float = 1.0
    mmd_kernel: MMDKernel = "gaussian"
    extra_objectives: list[Extra] = field(default_factory=list)
    gan_start: int = 0
    recursive_kl_steps: int = 25_000
    lpips_weights: str | None = None
    importance_samples: int = 1
    importance_gradient: ImportanceGradient = "iwae"
    prior: TrainedPrior = "normal"
    pseudo_inputs: int | None = None
    agg: str = "sum"
    agg_args: dict[str, Any] = field(default_factory=dict)
    pref_weights: list[float] | None = None
    jacobian: Literal["shared", "all"] | None = None
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
        gate_decoder: Gates of the decoder; the default is sqrt, and sigmoid for nvae.
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
    gate_decoder: Literal["sqrt", "sigmoid"] | None = None
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
        cycle_period: Cycles per stage.
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
        weight_decay: Weight decay (decoupled in adamw, lamb, diffgrad; added to the gradient in the others).
        momentum: Momentum of sgd and madgrad.
        betas: Decay of the moments in adam, adamw, adamax, lamb and diffgrad.
        eps: What keeps a division from zero; the default is the optimizer's own (not sgd). In adamax it is
            added to the gradient's size before the maximum; hierarchies of latents take 1e-3.
        max_grad_norm: Clip the gradient of all parameters to this norm; 0 does not clip.
        clip_per: Whether that is the norm of the whole model's gradient, or that of each part's: the shared
            parameters before the features, and the rest.
        skip_grad_norm: Leave out a step whose gradient is longer than this, or one of whose losses is not
            finite, as if it had not been (`train/skipped_steps` counts them); 0 leaves out none.
        ema_decay: Decay per step of an exponential moving average of the weights, which is then evaluated,
            sampled and exported in their place; 0 keeps none.
        scheduler: Learning-rate schedule after the warm-up; epoch_cosine warms up by steps, then changes with
            the epoch and reaches scheduler_lr_min in the last one; plateau decays where the loss on the
            validation split (of text) stops falling.
        scheduler_per: Whether the learning rate, warm-up included, changes every step or every epoch.
        scheduler_lr_min: Learning rate at the end of cosine and epoch_cosine.
        scheduler_gamma: Factor at each milestone of multi_step, and at each decay of plateau.
        scheduler_milestones: Epochs of multi_step's drops.
        warmup_steps: Steps of linear warm-up from lr / warmup_steps.
        warmup_epochs: The same in epochs.
        plateau_patience: Epochs with a worse validation loss than the one before, until a decay.
        plateau_after: Epochs without a decay at the run's beginning.
        plateau_decays: Decays after which training is over; 0 for any number.
        plateau_reload: At a decay, go on from the weights of the best validation loss with a new optimizer.
        aggressive: Train the encoder alone before each step of the decoder, until the loss stops falling, in
            epochs that raise the mutual information on the validation split (text; He et al. 2019).
        aggressive_steps: Most steps of the encoder before one of the decoder.
        aggressive_window: Steps of the encoder whose mean loss per token is compared with that of as many
            before.
    """

    optimizer: Literal["adam", "adamw", "adamax", "sgd", "lamb", "diffgrad", "madgrad"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float | None = None
    max_grad_norm: float = 0.0
    skip_grad_norm: float = 0.0
    ema_decay: float = 0.0
    clip_per: Literal["model", "part"] = "model"
    scheduler: Literal["none", "cosine", "epoch_cosine", "multi_step", "plateau"] = "none"
    scheduler_per: Literal["step", "epoch"] = "step"
    scheduler_lr_min: float = 0.0
    scheduler_gamma: float = 0.1
    scheduler_milestones: list[int] = field(default_factory=list)
    warmup_steps: int = 0
    warmup_epochs: int = 0
    plateau_patience: int = 2
    plateau_after: int = 15
    plateau_decays: int = 5
    plateau_reload: bool = True
    aggressive: bool = False
    aggressive_steps: int = 99
    aggressive_window: int = 15


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
        recompute: Gradient checkpointing (nvae): keep of each cell its input alone, and compute the rest again
            in the backward. Less memory, more time, the same numbers; runs eagerly.
        sync_batchnorm: BatchNorm over all processes' images rather than each one's own; KL balancing likewise.
        profile: Write a torch profiler trace of this many steps to the run's folder; 0 for none.
        log_every: Steps between lines of metrics.jsonl; the first step has a line of its own.
        log_images_every: Epochs between pictures in TensorBoard and the other logs, and at the end; the default
            is when pictures are drawn (save_freq), 0 is never.
        eval_freq: Epochs between evaluations on the test split; 0 evaluates at the end only.
        save_freq: Epochs between kept checkpoints and pictures; 0 keeps `last` and `best` only.
        checkpoint_every: Steps between writes of the `last` checkpoint, besides each epoch's end; 0 for none.
        num_samples: Images of each kind in a picture.
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
    recompute: bool = False
    sync_batchnorm: bool = False
    profile: int = 0
    log_every: int = 50
    log_images_every: int | None = None
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
class MlflowConfig:
    """MLflow (extra `mlflow`).

    Args:
        use_mlflow: Log to MLflow too.
        mlflow_uri: Tracking server or folder (http://…, sqlite:///mlflow.db); the default is MLflow's own
            (MLFLOW_TRACKING_URI).
        mlflow_experiment: Experiment.
    """

    use_mlflow: bool = False
    mlflow_uri: str | None = None
    mlflow_experiment: str = "movae-fast"


@dataclass
class CorpusFacts:
    """Hold what a run on text found its corpus to be: no flags, but part of its configuration."""

    vocabulary_size: int | None = None  # with the special words
    longest: int | None = None  # tokens of the longest sentence
    corpus_digest: str | None = (
        None  # SHA-256 of the corpus as the model sees it, by which a resumed run knows it
    )


FILLED_IN = tuple(f.name for f in fields(CorpusFacts))


@dataclass
class TrainConfig:
    """Hold all settings of `movae train`, by subject."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    multirate: MultiRateConfig = field(default_factory=MultiRateConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    corpus: CorpusFacts = field(default_factory=CorpusFacts)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> TrainConfig:
        """Build the configuration from flags by name, as a command line or a config.yaml has them; unknown
        names are ignored."""
        parts: dict[str, Any] = {}
        for part in fields(cls):
            section = CorpusFacts if part.name == "corpus" else SECTIONS[part.name]
            names = {f.name for f in fields(section)}
            parts[part.name] = section(**{k: v for k, v in values.items() if k in names})
        return cls(**parts)

    def flat(self) -> dict[str, Any]:
        """Return all flags by name; the inverse of `from_flat`."""
        return {name: value for part in asdict(self).values() for name, value in part.items()}

    @property
    def info(self) -> DatasetInfo:
        if self.is_text:
            raise ValueError(
                f"--dataset {self.data.dataset} is text, and this needs images; `movae sample RUN` prints the "
                "sentences of a run"
            )
        return DATASETS[self.data.dataset]

    @property
    def model_class(self) -> type[models.VAE]:
        return models.model_class(self.model.arch)

    @property
    def model_info(self) -> models.ModelInfo | type[models.VAE]:
        """Return the facts about the model's class that are known without importing it."""
        return models.model_info(self.model.arch)

    @property
    def is_text(self) -> bool:
        """Return whether the dataset consists of sentences rather than images."""
        return self.data.dataset in TEXT_SETS

    @property
    def reads_valid(self) -> bool:
        """Return whether training uses the validation split, for its learning rate or its aggressive phase."""
        return self.optimizer.aggressive or self.optimizer.scheduler == "plateau"

    @property
    def text_options(self) -> text.TextOptions:
        """Return the options for reading the corpus of sentences."""
        data = self.data
        root = Path(data.data_dir).expanduser()
        return text.TextOptions(root, data.label_column, data.max_length, data.too_long)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape [C, S, S] of an image; for sentences [V, 1, T], as one-hot words, once the corpus is
        known."""
        if self.is_text:
            return self.corpus.vocabulary_size or 5, 1, self.corpus.longest or 2
        size = self.data.image_size or self.info.default_size
        return self.info.channels, size, size

    @property
    def aggregated(self) -> bool:
        return self.objective.agg != "sum"

    @property
    def needs_jacobian(self) -> bool:
        """Return whether the aggregator needs Jacobian rows; plain sums need only one backward pass of the
        summed loss."""
        return self.objective.agg not in ("sum", "jd_sum")

    @property
    def activation(self) -> Literal["tanh", "sigmoid", "none"]:
        if self.objective.recons_activation is not None:
            return self.objective.recons_activation
        if self.objective.recons_dist == "bernoulli":
            return "sigmoid"
        if self.objective.recons_dist in DISCRETE:
            return "none"
        return self.model_info.default_activation or "tanh"

    @property
    def likelihood(self) -> models.Likelihood:
        """Return the likelihood of the images' values, which determines the number of the model's output
        channels."""
        return models.make_likelihood(
            self.objective.recons_dist,
            self.info.channels,
            self.activation,
            normalized=self.data.normalize,
            bits=self.data.bits,
            components=self.objective.recons_components,
            binarized=self.data.binarize != "none",
        )

    @property
    def reduction(self) -> ReconsReduction:
        if self.objective.recons_reduction is None and self.multirate.multirate:
            return "sum"
        return self.objective.recons_reduction or self.model_info.recons_reduction  # type: ignore[return-value]

    @property
    def jacobian(self) -> Literal["shared", "all"]:
        """Return which gradients are aggregated: those of the shared parameters ("shared") or of all ("all").

        A model without features, or an objective that reaches the encoder past them, has only shared
        parameters.
        """
        cut = self.model_info.has_features and not self.second_passes
        return self.objective.jacobian or ("shared" if cut else "all")

    @property
    def second_passes(self) -> list[Extra]:
        """Return the added objectives whose gradient reaches the encoder past the features."""
        return [name for name in self.objective.extra_objectives if name in SECOND_PASSES]

    @property
    def kl_warmup(self) -> float:
        """Return the fraction of the steps over which the KL's weight rises to 1; by default 0 if an aggregator
        or the drawn beta weighs the KL."""
        o = self.objective
        if o.kl_warmup is not None:
            return o.kl_warmup
        otherwise = self.aggregated or self.multirate.multirate or o.kl_annealing != "none"
        if otherwise or self.ladder.use_kl_annealing or not self.model_info.warms_up:
            return 0.0
        return 0.3

    @property
    def kl_balance(self) -> bool:
        """Return whether the KLs of a hierarchy's groups are balanced while their weight rises."""
        given = self.objective.kl_balance
        may = self.model_info.latents == "hierarchy" and not self.aggregated and not self.multirate.multirate
        return may and self.kl_warmup > 0 if given is None else given

    @property
    def norm_penalty(self) -> float:
        """Return the weight of the model's penalty on its weights' norms."""
        given = self.objective.norm_penalty
        return self.model_info.default_penalty(vars(self.model)) if given is None else given

    @property
    def gate_decoder(self) -> Literal["sqrt", "sigmoid"]:
        """Return the kind of gates in a multi-rate model's decoder."""
        return self.multirate.gate_decoder or self.model_info.default_decoder_gate

    @property
    def beta_per(self) -> Literal["example", "batch"]:
        """Return whether a multi-rate model draws one beta per example or one per batch; by default per batch
        with a total correlation, which compares the posteriors of a batch."""
        return self.multirate.beta_per or ("batch" if self.model_info.beta_objective == "tc" else "example")

    @property
    def objective_names(self) -> list[str]:
        """Return the objectives in order: the model's own, and those added to them."""
        own = self.model_info.weighted_objectives(vars(self.model), self.image_shape)
        return [*own, *extra_objectives(self.objective.extra_objectives)]

    def weights(self) -> list[float]:
        """Return the objectives' loss weights in order."""
        o = self.objective
        defaults = self.model_info.weighted_objectives(vars(self.model), self.image_shape)
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
        defaults |= extra_objectives(o.extra_objectives)
        return resolve_weights(self.model_info, self.image_shape, o.loss_weights, o.beta, defaults)

    def aggregator_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `make_aggregator`, without the aggregator's name."""
        o = self.objective
        return {
            "m": sum(weight != 0 for weight in self.weights()),
            "args": o.agg_args,
            "pref_weights": o.pref_weights,
            "norm_eps": o.upgrad_norm_eps,
            "reg_eps": o.upgrad_reg_eps,
            "regularizer": o.upgrad_regularizer,
        }


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "multirate": MultiRateConfig,
    "ladder": LadderConfig,
    "optimizer": OptimizerConfig,
    "run": RunConfig,
    "wandb": WandbConfig,
    "mlflow": MlflowConfig,
}
