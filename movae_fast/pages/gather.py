"""Collect the content of a report on one run, from its log and from its model's output on test images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from movae_fast.data import Loader, to_unit
from movae_fast.evaluation.curve_runs import of_images
from movae_fast.evaluation.measure import Report, measure_elbo
from movae_fast.evaluation.rate_distortion import curve_points, log_spaced, nominal_beta
from movae_fast.evaluation.sample_source import SampleSource, find_source
from movae_fast.evaluation.trained import adapt_config, beta_kept
from movae_fast.models import NVAE, GaussianVAE
from movae_fast.models.codebook_vae import CodebookVAE
from movae_fast.names import ArgumentError, first_line
from movae_fast.pages.answers import (
    Answer,
    BetaPoint,
    beta_answer,
    codebook_answer,
    conflict_answer,
    latents_answer,
    quality_answer,
)
from movae_fast.pages.charts import (
    Chart,
    curve_charts,
    lines_chart,
    objective_chart,
    rates_chart,
    usage_chart,
)
from movae_fast.pages.sheets import sheets_of
from movae_fast.training.build import Trained, load_trained, make_loader
from movae_fast.training.config import TrainConfig
from movae_fast.training.log_lines import read_lines
from movae_fast.training.machine import NAME, machine
from movae_fast.training.run_list import run_folder
from movae_fast.training.telemetry import codebook_metrics

# Objective -> a sentence on it, for a reader who does not know the field.
MEANINGS = {
    "reconstruction": "How far images are from their reconstructions; smaller is better.",
    "kl": "How much the code says about an image, in nats; smaller is a more compact code.",
    "tc": "How much the latents repeat each other; smaller is more independent.",
    "mi": "How much the code says about which image it is.",
    "dwkl": "How far each latent strays from the prior.",
    "mmd": "How far codes are from the prior, by samples.",
    "embedding": "How far the codebook's vectors are from what the encoder gives.",
    "commitment": "How far the encoder's output is from the codebook's vectors.",
}


@dataclass(frozen=True)
class Options:
    """Hold the numbers of images and betas that a report is computed from, and where its data is."""

    images: int = 16  # test images, and samples, in a picture
    betas: int = 12  # points of a multi-rate model's curve
    limit: int = 1000  # test images that metrics are computed from, evenly spaced
    batch_size: int = 500
    seed: int = 0
    data_dir: str | None = None


@dataclass(frozen=True)
class Score:
    """Hold a metric, its value as text, and the protocol: how and on which images it was measured."""

    name: str
    value: str
    protocol: str


@dataclass
class RunPage:
    """Hold the content of a report on one run; a part that could not be made is empty, and `notes` says why."""

    name: str
    path: Path
    sentence: str
    config: TrainConfig
    answers: list[Answer] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    pictures: list[Chart] = field(default_factory=list)
    curve: list[Chart] = field(default_factory=list)
    points: list[BetaPoint] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)  # flags that are not the default
    yaml: str = ""
    machines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is missing, and why

    @property
    def images_key(self) -> tuple[tuple[str, Any], ...]:
        """Return the settings, as pairs of name and value, in which two runs must agree for their rates and
        distortions to be comparable: those of the images and the likelihood."""
        return tuple(of_images(self.config).items())


@torch.no_grad()
def gather(path: Path, name: str, device: torch.device, options: Options) -> RunPage:
    """Return the content of a report on the run at `path`, which is its folder or one of its checkpoints.

    name: of the run, as the report shows it. If the test images cannot be read, the page has only what the log
    gives, and a note. Raises ValueError if `path` is no run, CheckpointError if its model cannot be loaded.
    """
    folder = run_folder(path)
    trained = load_trained(path, device)
    lines = read_lines(folder / "metrics.jsonl")
    config = trained.config
    names = objectives_of(lines) or list(trained.model.objectives)
    page = RunPage(name, folder, sentence_of(trained, lines), config)
    page.settings = unusual(config)
    page.yaml = yaml.safe_dump({k: v for k, v in config.flat().items() if v is not None}, sort_keys=False)
    page.machines = machines_of(folder)
    page.scores = logged_scores(lines, config)
    add(page.answers, conflict_answer(lines, names, config.objective.agg))
    page.charts = log_charts(lines, names)
    if config.is_text:
        page.notes.append("A model of text: `movae sample RUN` prints its sentences.")
    else:
        adapt_config(config, device.type, options.data_dir, options.batch_size)
        config.data.limit_test = options.limit
        try:
            loader = make_loader(config, device, "test")
        except (ValueError, OSError) as error:
            page.notes.append(
                f"No pictures and no numbers of test images, which cannot be read here: {first_line(error)}"
            )
        else:
            add_model(page, trained, loader, options)
    add(page.answers, quality_answer(last_values(lines)))
    page.scores += evaluation_scores(folder)
    return page


def add(answers: list[Answer], answer: Answer | None) -> None:
    """Append an answer unless it is None."""
    if answer is not None:
        answers.append(answer)


def add_model(page: RunPage, trained: Trained, loader: Loader, options: Options) -> None:
    """Add to the page the metrics, charts and pictures that the model gives on the loader's images."""
    config, model = trained.config, trained.model
    n = len(loader.source)
    protocol = f"{n:,} evenly spaced test images, one draw of z each, seed {options.seed}"
    rates: Tensor | None = None
    if isinstance(model, CodebookVAE):
        add_codebook(page, model, loader)
    elif isinstance(model, GaussianVAE | NVAE):
        report = Report()
        metrics = measure_elbo(report, model, loader, config.objective.recons_dist, options.seed)
        rates = report.rates
        beta = "" if model.rates is None else f", at beta {float(model.rates.evaluated.exp()):.3g}"
        apart = constant_of(model, config)
        page.scores += [
            Score(k.replace("_", " "), f"{v:.6g}", protocol + beta + apart * (k in ("distortion", "elbo")))
            for k, v in metrics.items()
        ]
        if report.rates is not None:
            page.charts.append(rates_chart(report.rates.tolist(), report.rates_of))
        if isinstance(model, GaussianVAE):
            page.answers.append(latents_answer(int(metrics["active_units"]), model.latent_dim))
        add_curve(page, trained, loader, options)
    drawn, of = samples_of(page, trained, options)
    page.pictures = sheets_of(model, loader, rates, options.images, drawn, of)


def constant_of(model: GaussianVAE | NVAE, config: TrainConfig) -> str:
    """Return how a distortion in nats of a density differs from that of the curves and of the log; "" where it
    does not."""
    likelihood = model.likelihood_as(config.objective.recons_dist)
    constant = likelihood.constant * math.prod(model.image_shape)
    if not constant:
        return ""
    return f"; with the likelihood's constant, {constant:.4g} nats, which the curves and the log leave out"


def samples_of(page: RunPage, trained: Trained, options: Options) -> tuple[Tensor, str]:
    """Return samples [n, C, S, S] in [0, 1], and a sentence on what they are drawn from: the prior that was
    fitted to the run, where there is one, or the model's own."""
    model = trained.model
    try:
        source = find_source(page.path, trained.config, model)
    except ArgumentError as error:  # of other weights
        page.notes.append(f"The fitted prior is not used: {first_line(error)}")
        source = SampleSource(model)
    if source.fitted is not None:
        of = f"drawn from the fitted prior ({source.fitted.config.kind})"
    elif source.is_prior:
        of = f"decoded from draws of {model.prior_words}"
    else:
        of = "drawn code by code, without a fitted prior: texture and no shape (movae prior fits one)"
    parts = source.images(options.images, options.batch_size, torch.Generator().manual_seed(options.seed))
    return to_unit(torch.cat(list(parts)), trained.config.data.normalize), of


def add_codebook(page: RunPage, model: CodebookVAE, loader: Loader) -> None:
    """Add to the page how often the loader's images use each code of the model's codebooks."""
    codes = sum(model.code_sizes)
    counts = torch.zeros(codes, dtype=torch.float64)
    for x, _ in loader.epoch():
        (z,) = model.encode(x)
        counts += model.code(z).usage.double().cpu()
    metrics = codebook_metrics(counts, model.code_sizes)
    n, used = len(loader.source), int((counts > 0).sum())
    page.answers.append(codebook_answer(used, codes, metrics["perplexity"], n))
    note = "A long flat line at zero is codes that no image uses."
    page.charts.append(usage_chart(counts.tolist(), note))
    protocol = f"{n:,} evenly spaced test images"
    page.scores.append(Score("codes in use", f"{used:,} of {codes:,}", protocol))
    page.scores.append(Score("perplexity of the codes", f"{metrics['perplexity']:.4g}", protocol))


def add_curve(page: RunPage, trained: Trained, loader: Loader, options: Options) -> None:
    """Add to the page rate and distortion on the loader's images: at several betas for a multi-rate model, else
    at the beta of training; and the answer to which beta to take."""
    config, model = trained.config, trained.model
    if model.rates is not None:
        betas = log_spaced(model.rates.beta_min, model.rates.beta_max, options.betas)
    else:
        try:
            betas = [nominal_beta(config)]
        except ValueError:
            return  # its loss is not distortion + beta * rate, so it has no point
    with beta_kept(model):
        dist, rows = config.objective.recons_dist, options.batch_size
        points = curve_points(model, loader, betas, dist, options.seed, rows)
    page.points = [BetaPoint(p.beta, p.rate, p.distortion, p.active_units) for p in points]
    if len(points) > 1:
        page.curve = curve_charts({page.name: page.points})
    answer = beta_answer(page.points)
    if answer is None:
        why = (
            f"That is in nats per image{of_flag(config, betas[0])}. A run with --multirate has a whole range "
            "in one set of weights; several runs of the same images in one report are compared by their betas."
        )
        answer = Answer("Which beta to take?", f"It was trained for one: {betas[0]:.3g}", why)
    page.answers.append(answer)


def of_flag(config: TrainConfig, beta: float) -> str:
    """Return words that give the setting `beta` where it differs from the given beta in nats, since the run's
    loss is averaged over pixels; else ""."""
    given = config.objective.beta
    return f" (--beta {given:g} with the reduction {config.reduction})" if given not in (None, beta) else ""


def objectives_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the objectives whose weights are in a log, in the order of their first appearance."""
    prefix = "train/weight_"
    return list(dict.fromkeys(k[len(prefix) :] for line in lines for k in line if k.startswith(prefix)))


def log_charts(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Chart]:
    """Return charts of what a log has: each objective in `names`, cosines, weights, usage of a codebook, and
    the fade-in of a ladder's rungs."""
    seen = {key for line in lines for key in line}
    charts = [objective_chart(lines, name, meaning(name)) for name in names if f"train/{name}" in seen]
    cosines = {f"train/cos_{name}": name for name in names}
    steps = {f"train/step_cosine_{name}": name for name in names}
    weights = {f"train/weight_{name}": name for name in names}
    charts += [
        lines_chart(
            lines,
            "Does the update help every objective?",
            "Cosine between the update and each objective's own gradient. Above 0 the update improves that "
            "objective; in the shaded part it makes it worse: a conflict.",
            cosines,
            zero=True,
        ),
        lines_chart(
            lines,
            "Does the applied step?",
            "The same for the step that the optimizer really takes, with its memory of earlier steps.",
            steps,
            zero=True,
        ),
        lines_chart(
            lines,
            "Weights of the objectives",
            "What the aggregator multiplies each objective's gradient by.",
            weights,
        ),
        lines_chart(
            lines,
            "Codes in use while training",
            "Fraction of the codebook that a stretch of training used.",
            {"train/codebook_usage": "fraction of codes"},
        ),
        lines_chart(
            lines,
            "Fade-in of the rungs",
            "How far the newest rung of the ladder has come in.",
            {"train/alpha": "alpha"},
        ),
    ]
    return [chart for chart in charts if chart is not None]


def meaning(name: str) -> str:
    """Return a sentence that explains an objective to a reader from outside the field; "" for an unknown
    one."""
    if name in MEANINGS:
        return MEANINGS[name]
    if name.startswith("kl_"):
        return f"How much rung (or group) {name[3:]} of the code says about an image, in nats."
    return ""


def last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return metric -> its last value in a log, for numbers."""
    return {k: v for line in lines for k, v in line.items() if isinstance(v, int | float)}


def logged_scores(lines: Sequence[Mapping[str, Any]], config: TrainConfig) -> list[Score]:
    """Return the metrics of training's last evaluation on the test split as scores; [] if there was none."""
    tested = [line for line in lines if "test/loss" in line]
    if not tested:
        return []
    limit = config.data.limit_test
    images = f"{limit:,} evenly spaced test images" if limit else "all test images"
    protocol = f"training's own evaluation after step {tested[-1]['step']:,}: {images}, one draw of z each"
    rows = [(k, v) for k, v in tested[-1].items() if k.startswith("test/") and not k.endswith("images_per_s")]
    return [Score(k.removeprefix("test/").replace("_", " "), f"{v:.6g}", protocol) for k, v in rows]


def evaluation_scores(folder: Path) -> list[Score]:
    """Return the metrics that `movae evaluate` wrote last into a run's folder as scores; [] if there are
    none."""
    files = sorted((folder / "evaluation").glob("metrics*.json"), key=lambda p: p.stat().st_mtime)
    if not files:
        return []
    try:
        content = json.loads(files[-1].read_bytes())
        metrics = content["figures"].items()
    except (ValueError, KeyError, AttributeError):
        return []
    samples = f", factors from {content['samples']:,} images" if "samples" in content else ""
    beta = f", beta {content['beta']:g}" if "beta" in content else ""
    protocol = f"movae evaluate ({files[-1].name}): seed {content.get('seed')}{samples}{beta}"
    return [Score(k.replace("_", " "), f"{v:.6g}", protocol) for k, v in metrics]


def unusual(config: TrainConfig) -> dict[str, str]:
    """Return setting -> value as text, for settings that are not the default, without paths; dataset, model and
    aggregator are always included."""
    usual = TrainConfig().flat()
    places = ("exp_dir", "export", "resume", "data_dir", "save_path")
    flat = {k: v for k, v in config.flat().items() if k not in places and v is not None}
    return {k: str(v) for k, v in flat.items() if v != usual[k] or k in ("dataset", "arch", "agg")}


def machines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the machines that a run was trained on, one description per start; [] if they cannot be read."""
    try:
        texts = (folder / NAME).read_text(encoding="utf-8").splitlines()
        return [json.loads(text) for text in texts]
    except (OSError, ValueError):
        return []


def here(device: torch.device) -> dict[str, Any]:
    """Return a description of this machine, which makes the report."""
    return machine(device)


def sentence_of(trained: Trained, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return two sentences on a run: its model and size, data, number of steps, objectives and aggregator."""
    config = trained.config
    size = sum(p.numel() for p in trained.model.parameters())
    what = "a multi-rate " if trained.model.rates is not None else "a "
    how = "their plain sum" if config.objective.agg == "sum" else f"the aggregator {config.objective.agg}"
    steps = trained.step if trained.step is not None else max((line["step"] for line in lines), default=0)
    side = "" if config.is_text else f" at {config.image_shape[1]} x {config.image_shape[2]} pixels"
    count = len(trained.model.objectives)
    return (
        f"{what.capitalize()}{config.model.arch} with {size:,} parameters, trained on "
        f"{config.data.dataset}{side} for {steps:,} steps of "
        f"{config.data.batch_size * trained.processes:,}. Its {count} objectives are joined by {how}."
    )
