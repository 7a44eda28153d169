"""Refuse invalid settings before anything is allocated, with a message that names the flag and the remedy.

`check_settings` runs the checks that need only the configuration, without importing torch; `validate` also runs
those of `device_checks`, which need torch, an aggregator or a library. All raise ValueError.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from movae_fast.aggregation.catalog import (
    AGGREGATORS,
    CONES,
    NEED_TWO_BATCHES,
    checked_options,
    weights_by_gramian,
    weights_rows,
)
from movae_fast.choices import COMPONENTS, DISCRETE, TEXT_SETS
from movae_fast.data.datasets import DATASETS
from movae_fast.data.datasets.facts import CELEBA_CROPS
from movae_fast.models import MODELS, TEXT_MODELS, check_options, model_info
from movae_fast.models.catalog import check_beta_range
from movae_fast.names import pick
from movae_fast.objectives.extras import EXTRAS
from movae_fast.training.config import (
    FROM_EXTRA,
    DataConfig,
    MultiRateConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from movae_fast.training.limits import check_values

# Optimizers that have a metric for the projected step.
SECOND_MOMENTS = ("adam", "adamw", "adamax", "lamb", "diffgrad")


def validate(config: TrainConfig) -> None:
    """Run all checks of a configuration: raise ValueError for invalid settings before anything is allocated.

    Names in `config` (dataset, model, aggregator) are replaced by their exact spelling.
    """
    check_settings(config)
    # Imported here, with torch: a wrong flag is told of without it.
    from movae_fast.training.device_checks import check_machine

    check_machine(config)


def without_export(config: TrainConfig, check: Callable[[TrainConfig], None]) -> None:
    """Call `check` on a configuration with --export left out.

    The path to export to is checked where a run is started or resumed, because a resumed run may keep or change
    it.
    """
    export, config.run.export = config.run.export, None
    try:
        check(config)
    finally:
        config.run.export = export


def check_settings(config: TrainConfig) -> None:
    """Run the checks that need only the configuration, without torch. Raises ValueError."""
    for section in vars(config).values():
        check_values(section)
    check_names(config)
    check_text(config)
    check_data(config)
    check_aggregation(config)
    check_optimizer(config.optimizer)
    check_validation(config)
    check_aggressive(config)
    check_likelihood(config)
    if not config.aggregated and (config.objective.agg_args or config.objective.pref_weights):
        raise ValueError("--agg_args and --pref_weights need an aggregator: --agg upgrad, …")
    check_ladder(config)
    check_hierarchy(config)
    check_multirate(config)
    check_weights(config)
    check_extras(config)
    check_vamp(config)
    check_run(config.run)
    check_model(config)


def check_names(config: TrainConfig) -> None:
    """Replace the names of dataset, model and aggregator by their exact spelling, and set the default image
    size."""
    data, objective = config.data, config.objective
    data.dataset = pick("dataset", data.dataset, [*DATASETS, *TEXT_SETS])
    config.model.arch = pick("arch", config.model.arch, [*MODELS, *TEXT_MODELS])
    if objective.agg in NEED_TWO_BATCHES:
        raise ValueError(f"--agg {objective.agg} needs two independent batches a step; this trainer draws one")
    objective.agg = pick("agg", objective.agg, ["sum", *AGGREGATORS]) if objective.agg else "sum"
    if data.image_size is None and not config.is_text:
        data.image_size = config.info.default_size


def check_model(config: TrainConfig) -> None:
    """Check that the model has the options that were given, and that images of this size suit it."""
    given = config.model.given()
    check_options(config.model.arch, config.image_shape, config.activation, given)


OF_TEXT = ("max_length", "too_long", "label_column", "pad_multiple")
# Flags that do not apply to text; --recons_* choose a likelihood of pixels.
OF_IMAGES = {
    "data": ("image_size", "resize", "crop", "normalize", "binarize", "flip", "antialias", "chn_num", "loader"),
    "objective": ("recons_dist", "recons_reduction", "recons_activation"),
}


def check_text(config: TrainConfig) -> None:
    """Raise ValueError if a model of sentences is given images or the reverse, or a flag that applies only to
    the other."""
    data, arch, dataset = config.data, config.model.arch, config.data.dataset
    if config.is_text != (arch in TEXT_MODELS):
        kind, able = ("text", TEXT_MODELS) if config.is_text else ("images", MODELS)
        sets = ", ".join(TEXT_SETS)
        raise ValueError(
            f"--arch {arch} does not model {kind}, which --dataset {dataset} has; these do: "
            f"{', '.join(able)}" + ("" if config.is_text else f". Corpora for {arch} are {sets}")
        )
    if not config.is_text:
        if given := [name for name in OF_TEXT if getattr(data, name) != getattr(DataConfig(), name)]:
            raise ValueError(f"--{given[0]} is a setting of text; --dataset {dataset} has images: leave it out")
        return
    for section, names in OF_IMAGES.items():
        part = getattr(config, section)
        if given := [name for name in names if getattr(part, name) != getattr(type(part)(), name)]:
            raise ValueError(f"--{given[0]} is a setting of images; --dataset {dataset} is text: leave it out")
    if config.objective.gramian_batch < 1:
        raise ValueError("--gramian_batch does not apply to text; leave it out, or use --gramian_every")
    if config.run.compile not in ("auto", "off"):
        raise ValueError(
            f"--compile {config.run.compile}: torch.compile would unroll an LSTM, once for each length of the "
            "sentences; leave it out"
        )
    config.run.compile = "off"
    if config.run.accumulate > 1 and data.last_batch != "pad":
        raise ValueError("--accumulate on text needs batches of one size: add --last_batch pad")
    gates = ("gate_encoder", "gate_decoder", "gate_position", "gate_bias", "gate_slope")
    if given := [n for n in gates if getattr(config.multirate, n) != getattr(MultiRateConfig(), n)]:
        raise ValueError(f"--{given[0]}: the gates of {arch} are twice a sigmoid, as published; leave it out")


def check_data(config: TrainConfig) -> None:
    """Check the number of channels, and that `accumulate` divides the batch."""
    data, run = config.data, config.run
    assert data.crop in CELEBA_CROPS
    if not config.is_text and data.chn_num not in (None, config.info.channels):
        raise ValueError(f"--chn_num {data.chn_num}: {data.dataset} has {config.info.channels}")
    if data.batch_size % run.accumulate:
        raise ValueError(f"--accumulate {run.accumulate} must divide --batch_size {data.batch_size}")


def check_likelihood(config: TrainConfig) -> None:
    """Check that the likelihood and the output's activation suit the range of the images' values."""
    data, objective = config.data, config.objective
    if objective.recons_reduction == "scaled_sum" and objective.recons_dist != "gaussian":
        raise ValueError(
            f"--recons_reduction scaled_sum is for gaussian only; with --recons_dist {objective.recons_dist} "
            "use mean or sum"
        )
    check_discrete(config)
    if objective.recons_dist == "bernoulli" and data.normalize:
        raise ValueError("--recons_dist bernoulli needs images in [0, 1]; leave out --normalize")
    if objective.recons_dist == "bernoulli" and config.activation != "sigmoid":
        raise ValueError("--recons_dist bernoulli has sigmoid outputs; leave out --recons_activation")
    if data.normalize and config.activation == "sigmoid":
        raise ValueError("--normalize gives images in [-1, 1], which a sigmoid output cannot reach; use tanh")


def check_discrete(config: TrainConfig) -> None:
    """Check that a discretised likelihood (logistic, dmol) is used only with images that have its levels and
    colours."""
    data, o, dist = config.data, config.objective, config.objective.recons_dist
    if o.recons_components != COMPONENTS and dist != "dmol":
        raise ValueError(f"--recons_components is a setting of --recons_dist dmol; {dist} has no components")
    if data.bits < 8 and data.binarize != "none":
        raise ValueError(f"--bits {data.bits}: binarized pixels have one bit; leave out --bits or --binarize")
    if dist in DISCRETE and data.binarize != "none":
        raise ValueError(
            f"--recons_dist {dist} is for images of grey levels; of binarized ones use bernoulli, or leave out "
            "--binarize"
        )
    if dist in DISCRETE and o.recons_activation not in (None, "none"):
        raise ValueError(
            f"--recons_activation {o.recons_activation}: the outputs of --recons_dist {dist} are parameters, "
            "not pixels; leave it out"
        )
    if dist == "dmol" and config.info.channels != 3:
        raise ValueError(
            f"--recons_dist dmol is a mixture over the three colours of a pixel; {data.dataset} is grey: use "
            "--recons_dist logistic"
        )


def check_weights(config: TrainConfig) -> None:
    """Check the objectives' weights, and that the aggregator and the batch size suit these objectives."""
    objective = config.objective
    config.weights()
    if "tc" in config.model_info.objectives and config.data.batch_size < 2:
        raise ValueError("--batch_size 1: total correlation is estimated within a batch; give at least 2")
    if config.needs_jacobian:
        checked_options(objective.agg, **config.aggregator_options())


def check_extras(config: TrainConfig) -> None:
    """Check the objectives that are added, the MMD's kernel and the importance-weighted bound."""
    o, arch, info = config.objective, config.model.arch, config.model_info
    for name in o.extra_objectives:
        if info.latents not in EXTRAS[name].latents or config.is_text:
            raise ValueError(
                f"--extra_objectives {name} needs images and a vector of latents; {arch} has not both"
            )
    if len(set(o.extra_objectives)) < len(o.extra_objectives) or {"dip_i", "dip_ii"} <= set(o.extra_objectives):
        raise ValueError("--extra_objectives: give each once, and one of dip_i and dip_ii")
    if {"dip_i", "dip_ii", "factor"} & set(
        o.extra_objectives
    ) and config.data.batch_size < 2 * config.run.accumulate:
        raise ValueError(
            "--extra_objectives of a batch's statistics need at least 2 images at a time: --batch_size"
        )
    check_lpips(config)
    check_gan_and_passes(config)
    if o.mmd_kernel != "gaussian" and "mmd" not in config.objective_names:
        raise ValueError(f"--mmd_kernel is a setting of mmd_vae; {arch} has no mmd")
    if o.importance_samples == 1:
        if o.importance_gradient != "iwae":
            raise ValueError("--importance_gradient needs several draws: add --importance_samples 10")
        return
    if config.objective_names != ["reconstruction", "kl"] or info.latents != "vector" or config.is_text:
        raise ValueError(
            f"--importance_samples needs the objectives reconstruction and kl of images; {arch} has "
            f"{', '.join(config.objective_names)}"
        )
    if config.reduction != "sum":
        raise ValueError("--importance_samples weighs draws by nats per image: add --recons_reduction sum")
    if config.multirate.multirate or config.ladder.use_capacity_increase:
        raise ValueError("--importance_samples: leave out --multirate and --use_capacity_increase")
    if o.recons_dist == "gaussian_optimal":
        raise ValueError(
            "--importance_samples weighs draws by their likelihood; gaussian_optimal fits its variance"
        )


def check_lpips(config: TrainConfig) -> None:
    """Check that LPIPS has its weights and images that are large enough."""
    o = config.objective
    if ("lpips" in o.extra_objectives) != (o.lpips_weights is not None):
        raise ValueError("--extra_objectives lpips and --lpips_weights FILE need each other")
    if o.lpips_weights is not None and not Path(o.lpips_weights).expanduser().is_file():
        raise ValueError(f"--lpips_weights {o.lpips_weights}: no such file; it is torchvision's VGG16")
    if "lpips" in o.extra_objectives and config.image_shape[1] < 16:
        raise ValueError(
            f"--extra_objectives lpips needs images of 16 pixels; --image_size is {config.image_shape[1]}"
        )


def check_gan_and_passes(config: TrainConfig) -> None:
    """Check the hinge GAN, and the objectives that pass the encoder a second time."""
    o = config.objective
    if config.second_passes and (config.multirate.multirate or "kl_1" in config.objective_names):
        raise ValueError(
            f"--extra_objectives {config.second_passes[0]} needs one vector of latents for one beta: leave it "
            "out of a ladder and of --multirate"
        )
    if "gan" in o.extra_objectives and config.image_shape[1] < 8:
        raise ValueError(
            f"--extra_objectives gan needs images of 8 pixels; --image_size is {config.image_shape[1]}"
        )
    if o.gan_start and "gan" not in o.extra_objectives:
        raise ValueError("--gan_start is a setting of --extra_objectives gan: add it")
    default = ObjectiveConfig().recursive_kl_steps
    if o.recursive_kl_steps != default and "recursive_kl" not in o.extra_objectives:
        raise ValueError("--recursive_kl_steps is a setting of --extra_objectives recursive_kl: add it")


def check_vamp(config: TrainConfig) -> None:
    """Check that the model and the other settings allow a VampPrior, where one is asked for.

    `device_checks.check_encoder` checks the encoder.
    """
    o, info = config.objective, config.model_info
    if o.prior == "normal":
        if o.pseudo_inputs is not None:
            raise ValueError("--pseudo_inputs is a setting of --prior vamp: add it, or leave this out")
        return
    if tuple(info.objectives) != ("reconstruction", "kl") or info.latents != "vector" or config.is_text:
        raise ValueError(
            f"--prior vamp is for images, a vector of latents, and the objectives reconstruction and kl; "
            f"{config.model.arch} has {', '.join(config.objective_names)}"
        )
    unsuited = {
        "multirate": config.multirate.multirate,
        "importance_samples": o.importance_samples > 1,
        "gramian_batch": o.gramian_batch < 1,
        "gramian_at": o.gramian_at != "shared",
    }
    if config.second_passes:
        raise ValueError(
            f"--extra_objectives {config.second_passes[0]} compares with N(0, I); leave out --prior vamp"
        )
    for name in (name for name, given in unsuited.items() if given):
        raise ValueError(f"--{name} does not go with --prior vamp, which depends on the encoder; leave one out")


def check_run(run: RunConfig) -> None:
    """Check the number of processes, and that resuming and exporting overwrite nothing."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if run.distributed is False and processes > 1:
        raise ValueError(
            f"--distributed false: torchrun started {processes} processes, which train together; leave it out"
        )
    if run.exp_dir is not None and run.resume is not None:
        raise ValueError("--resume continues in the run's own folder; leave out --exp_dir")
    if run.export is not None and Path(run.export).exists():
        raise ValueError(f"--export {run.export} exists and is not overwritten; name another file")


def check_aggregation(config: TrainConfig) -> None:
    """Check the settings of aggregation: which gradients, the projection's epsilons, approximations, the
    projected step."""
    o, agg = config.objective, config.objective.agg
    check_cut(config)
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
    check_approximations(config)
    if o.conflict_free != "step" and o.step_metric != "identity":
        raise ValueError("--step_metric is a setting of the projected step: add --conflict_free step")
    if o.step_metric == "optimizer" and config.optimizer.optimizer not in SECOND_MOMENTS:
        raise ValueError(
            f"--step_metric optimizer: {config.optimizer.optimizer} has no second moments to measure by; "
            f"these have: {', '.join(SECOND_MOMENTS)}"
        )


def check_cut(config: TrainConfig) -> None:
    """Raise ValueError if a setting needs features that cut the network in two, and there are none."""
    o, arch, passes = config.objective, config.model.arch, config.second_passes
    if config.model_info.has_features and not passes:
        return
    why = f"{arch} has no features to cut it at"
    if passes:
        why = f"--extra_objectives {' '.join(passes)} reaches the encoder past the features"
    asked = {
        "jacobian": o.jacobian == "shared",
        "gramian_at": o.gramian_at != "shared",
        "gramian_batch": o.gramian_batch < 1,
    }
    for name in (name for name, wrong in asked.items() if wrong):
        raise ValueError(
            f"--{name} {getattr(o, name)}: {why}, so all parameters are shared (--jacobian all, its default): "
            "leave it out"
        )


def check_approximations(config: TrainConfig) -> None:
    """Raise ValueError if an approximation (`--gramian_*`) is combined with a setting that excludes it."""
    o, agg = config.objective, config.objective.agg
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
    if o.gramian_batch < 1 and config.jacobian == "all":
        raise ValueError("--gramian_batch cuts the network at its features: leave --jacobian at shared")
    if o.gramian_batch < 1 and config.run.compile not in ("auto", "off"):
        raise ValueError("--gramian_batch runs uncompiled; leave out --compile")
    if o.gramian_at != "shared":
        choices = "shared, features, last:1, last:2, …"
        if o.gramian_at != "features" and not re.fullmatch(r"last:[1-9]\d*", o.gramian_at):
            raise ValueError(f"--gramian_at {o.gramian_at}: valid: {choices}")
        if config.jacobian == "all":
            raise ValueError("--gramian_at cuts the network at its features: leave --jacobian at shared")
        if o.gramian_batch < 1:
            raise ValueError("--gramian_at and --gramian_batch are two ways to the same weights; give one")
        if not weights_by_gramian(agg):
            able = ", ".join(name for name in AGGREGATORS if weights_by_gramian(name))
            raise ValueError(
                f"--gramian_at: {agg} needs the rows themselves; these do with their Gramian: {able}"
            )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Check the optimizer's parameters and its learning-rate schedule."""
    name, betas, eps = optimizer.optimizer, optimizer.betas, optimizer.eps
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"--betas {betas}: give two numbers from 0 to below 1")
    if eps is not None and name == "sgd":
        raise ValueError("--eps does not apply to sgd")
    if name in FROM_EXTRA and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ValueError(f"--optimizer {name} needs pytorch-optimizer: pip install 'movae-fast[optimizers]'")
    if optimizer.skip_grad_norm and name in FROM_EXTRA:
        raise ValueError(
            f"--skip_grad_norm: {name} counts its steps on the host and cannot take one back; use adam, adamw, "
            "adamax or sgd"
        )
    if optimizer.scheduler == "epoch_cosine" and optimizer.scheduler_per == "epoch":
        raise ValueError(
            "--scheduler epoch_cosine warms up by steps and goes on by epochs; leave out --scheduler_per"
        )
    if optimizer.warmup_epochs and optimizer.warmup_steps:
        raise ValueError("--warmup_epochs and --warmup_steps both set the length of the warm-up; give one")
    if optimizer.scheduler == "multi_step" and not optimizer.scheduler_milestones:
        raise ValueError("--scheduler multi_step needs --scheduler_milestones, the epochs of its drops")


def check_validation(config: TrainConfig) -> None:
    """Raise ValueError for flags that need a validation split which the dataset lacks, or for wrong settings of
    the plateau schedule and of --clip_per."""
    optimizer, default = config.optimizer, OptimizerConfig()
    if config.reads_valid and not config.is_text:
        flag = "--aggressive" if optimizer.aggressive else "--scheduler plateau"
        raise ValueError(
            f"{flag} decides by a validation split, which --dataset {config.data.dataset} does not have; "
            f"corpora have one: {', '.join(TEXT_SETS)}"
        )
    if optimizer.clip_per == "part" and not optimizer.max_grad_norm:
        raise ValueError("--clip_per part: there is no norm to clip to; add --max_grad_norm")
    if optimizer.clip_per == "part" and config.jacobian == "all":
        raise ValueError("--clip_per part: with --jacobian all the parameters are one part; leave it out")
    if optimizer.scheduler != "plateau":
        names = ("plateau_patience", "plateau_after", "plateau_decays", "plateau_reload")
        if given := [name for name in names if getattr(optimizer, name) != getattr(default, name)]:
            raise ValueError(f"--{given[0]} is a setting of another schedule: add --scheduler plateau")
        return
    if optimizer.scheduler_gamma == 1:
        raise ValueError("--scheduler_gamma 1 leaves the learning rate as it is; give plateau 0.5")
    if optimizer.ema_decay and optimizer.plateau_reload:
        raise ValueError(
            "--ema_decay: the average of the weights would go on where --scheduler plateau takes them back; "
            "leave it out, or add --plateau_reload false"
        )


def check_aggressive(config: TrainConfig) -> None:
    """Raise ValueError if --aggressive is given with flags that rule out steps of the encoder alone, or its
    settings without it."""
    optimizer, default = config.optimizer, OptimizerConfig()
    if not optimizer.aggressive:
        for name in ("aggressive_steps", "aggressive_window"):
            if getattr(optimizer, name) != getattr(default, name):
                raise ValueError(f"--{name} is a setting of the encoder's own steps: add --aggressive")
        return
    if config.jacobian == "all":
        raise ValueError("--aggressive steps the part before the features alone: leave --jacobian at shared")
    if config.objective.conflict_free == "step":
        raise ValueError("--aggressive does not project half a step; leave out --conflict_free step")
    if config.objective.gramian_every > 1:
        raise ValueError("--aggressive takes several steps per batch, which --gramian_every counts as one")


def check_ladder(config: TrainConfig) -> None:
    """Check the ladder's stages and the schedules of the KL."""
    ladder, arch = config.ladder, config.model.arch
    names = list(config.model_info.weighted_objectives(vars(config.model), config.image_shape))
    stages = len(names) - 1
    progressive = getattr(config.model_info, "progressive", False)
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
    if (
        getattr(config.model_info, "progressive", None) is not None
        and config.data.batch_size // config.run.accumulate < 2
    ):
        raise ValueError(f"--batch_size: {arch} normalises over the batch; give at least 2 images at a time")


def check_recompute(config: TrainConfig) -> None:
    """Check that what is computed again can be: a hierarchy's cells, eagerly, in one process's BatchNorm."""
    run = config.run
    if not run.recompute:
        return
    if config.model_info.latents != "hierarchy":
        raise ValueError(f"--recompute is for nvae, and {config.model.arch} is none: leave it out")
    if run.compile not in ("auto", "off"):
        raise ValueError(f"--recompute runs eagerly: leave out --compile {run.compile}")
    if run.sync_batchnorm:
        raise ValueError("--recompute would exchange BatchNorm's statistics again: leave out --sync_batchnorm")


def check_hierarchy(config: TrainConfig) -> None:
    """Check the settings of a model with a hierarchy of latents: its network, KL warm-up, KL balancing and
    penalty."""
    o, arch, kind = config.objective, config.model.arch, config.model_info
    kind.check_options(vars(config.model), config.image_shape)
    check_recompute(config)
    if kind.latents != "hierarchy" and (
        own := [n for n in ("kl_balance", "norm_penalty", "norm_penalty_init") if getattr(o, n)]
    ):
        able = ", ".join(name for name in MODELS if model_info(name).latents == "hierarchy")
        raise ValueError(f"--{own[0]} is a setting of {able}; {arch} does not have it")
    names = kind.weighted_objectives(vars(config.model), config.image_shape)
    if o.kl_warmup:
        if o.kl_annealing != "none" or config.ladder.use_kl_annealing:
            raise ValueError(
                "--kl_warmup and --kl_annealing (--use_kl_annealing) anneal the KL's weight; give one"
            )
        if not any(name.startswith("kl") for name in names):
            raise ValueError(f"--kl_warmup needs a KL; {arch} has none")
    for name in ("kl_constant", "kl_least"):
        if not config.kl_warmup and getattr(o, name) != getattr(ObjectiveConfig(), name):
            raise ValueError(f"--{name} is a setting of the KL's warm-up: add --kl_warmup 0.3")
    if o.kl_balance and config.aggregated:
        raise ValueError(
            f"--kl_balance weighs the KLs by hand, and so does --agg {o.agg}: leave out --kl_balance, or use "
            "--agg sum"
        )
    if o.kl_balance and config.multirate.multirate:
        raise ValueError("--kl_balance: with --multirate the drawn beta weighs the KL; leave out --kl_balance")
    if o.kl_balance and not config.kl_warmup:
        raise ValueError("--kl_balance balances while the KL's weight rises: add --kl_warmup 0.3")
    if o.norm_penalty_init is not None and not (config.norm_penalty and config.kl_warmup):
        raise ValueError(
            "--norm_penalty_init begins an annealing along the KL's warm-up: add --norm_penalty and --kl_warmup"
        )


def check_multirate(config: TrainConfig) -> None:
    """Check the settings of multi-rate training, or that none was given without `--multirate`."""
    rate, arch, o = config.multirate, config.model.arch, config.objective
    if not rate.multirate:
        # Configurations of older runs hold the default that all models then shared.
        default = MultiRateConfig(gate_decoder="sqrt" if rate.gate_decoder == "sqrt" else None)
        given = [f.name for f in fields(rate) if getattr(rate, f.name) != getattr(default, f.name)]
        if given:
            raise ValueError(f"--{given[0]} is a setting of multi-rate training: add --multirate")
        return
    if config.model_info.beta_objective not in ("kl", "tc"):
        able = ", ".join(name for name in MODELS if model_info(name).beta_objective in ("kl", "tc"))
        raise ValueError(f"--multirate does not apply to {arch}; it is for {able}")
    check_beta_range(rate.beta_min, rate.beta_max)
    for name in ("beta", "coef_kl"):
        if getattr(o, name) is not None:
            raise ValueError(f"--{name}: with --multirate beta is drawn; set --beta_min and --beta_max instead")
    if config.ladder.use_capacity_increase:
        raise ValueError("--use_capacity_increase replaces beta times the KL: leave it or --multirate out")
