"""Plot metrics: losses and cosines over steps, curves over beta, scores of an evaluation, sweeps.

Each file is written under a temporary name and renamed, so a file that exists is complete.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movae_fast.files import replacing

# Ten colours that people with any colour vision tell apart (Petroff 2021, "Accessible color sequences").
PALETTE = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = "osD^v<>pP*"
DASHES = ("-", "--", ":", "-.")
POOLED = 10  # log lines whose measured steps one point of a curve of conflict is the fraction of
POOLED_WORDS = f"of {POOLED} log lines"


def pooled(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, fraction) of a metric such as "train/conflict", a fraction of measured steps, over the last
    POOLED log lines that have it.

    A line alone may have measured one step, and then says 0 or 1.
    """
    seen = [line for line in lines if key in line]
    points = []
    for end, line in enumerate(seen, 1):
        window = seen[max(0, end - POOLED) : end]
        steps = [one.get(f"{key}_steps", 1) for one in window]
        total = sum(one[key] * n for one, n in zip(window, steps, strict=True))
        points.append((line["step"], total / max(sum(steps), 1)))
    return points


def loss_curves(path: Path, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Path:
    """Plot a run's log lines: one panel per objective with its training and test loss over steps, then the
    objectives' cosines with the update, and the fraction of measured steps in conflict.

    path: the PNG to write; it is returned. lines: the lines of `metrics.jsonl`. names: the objectives.
    """
    plt = pyplot()
    has_cosines = any(f"train/cos_{n}" in line for line in lines for n in names)
    fractions = {"train/conflict": "gradient", "train/step_conflict": "applied step"}
    fractions = {key: label for key, label in fractions.items() if any(key in line for line in lines)}
    panels = len(names) + has_cosines + bool(fractions)
    figure, axes = plt.subplots(1, panels, figsize=(3.6 * panels, 3), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=False):
        for split, style in (("train", "-"), ("test", "o-")):
            points = [(line["step"], line[f"{split}/{name}"]) for line in lines if f"{split}/{name}" in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=split, markersize=3, linewidth=1)
        axis.set(title=name, xlabel="step")
        axis.legend(frameon=False)
    if has_cosines:
        axis = axes[0][len(names)]
        for name in names:
            key = f"train/cos_{name}"
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title="cosine of update with gradient", xlabel="step", ylim=(-1.05, 1.05))
        axis.legend(frameon=False)
    if fractions:
        axis = axes[0][-1]
        for key, label in fractions.items():
            axis.plot(*zip(*pooled(lines, key), strict=True), label=label, linewidth=1)
        axis.set(title=f"steps in conflict, {POOLED_WORDS}", xlabel="step", ylim=(-0.05, 1.05))
        axis.legend(frameon=False)
    return _save(figure, path)


def compared_curves(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Plot the curves of several runs over each other, one colour per run; return `path`.

    There is one panel per objective, and one for the fraction of steps in conflict. Training values are lines,
    test values circles. logs: name of a run -> the lines of its log.
    """
    plt = pyplot()
    keys = list(dict.fromkeys(k for lines in logs.values() for line in lines for k in line))
    names = [k.removeprefix("train/weight_") for k in keys if k.startswith("train/weight_")]
    panels: dict[str, tuple[str, ...]] = {name: (f"train/{name}", f"test/{name}") for name in names}
    panels |= {
        title: (key,)
        for title, key in (
            ("MSE of reconstruction (test)", "test/mse"),
            (f"update in conflict, {POOLED_WORDS}", "train/conflict"),
            (f"applied step in conflict, {POOLED_WORDS}", "train/step_conflict"),
        )
        if key in keys
    }
    columns = min(3, max(len(panels), 1))
    rows = math.ceil(max(len(panels), 1) / columns)
    size = (4 * columns, 2.8 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, wanted) in zip(axes.flat, panels.items(), strict=False):
        for k, lines in enumerate(logs.values()):
            for key in wanted:
                points = [(line["step"], line[key]) for line in lines if key in line]
                points = pooled(lines, key) if key.endswith("conflict") else points
                style = "o" if key.startswith("test/") else DASHES[k // len(PALETTE) % len(DASHES)]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour(k), markersize=4, linewidth=1.2)
        axis.set(title=title, xlabel="step")
    handles = [plt.Line2D([], [], color=colour(k), label=name) for k, name in enumerate(logs)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(logs)), frameon=False)
    return _save(figure, path)


def ladder_curves(path: Path, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Path:
    """Plot, for a progressive ladder, the KL of each rung over steps and below it alpha; a dotted line marks
    the start of each stage.

    path: the PNG to write; it is returned. lines: the lines of `metrics.jsonl`. names: the objectives.
    """
    plt = pyplot()
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    lines = [line for line in lines if "train/alpha" in line]
    steps = [line["step"] for line in lines]
    for name in names:
        if name.startswith("kl_"):
            upper.plot(steps, [line[f"train/{name}"] for line in lines], label=f"rung {name[3:]}", linewidth=1)
    lower.plot(steps, [line["train/alpha"] for line in lines], color="black", linewidth=1)
    for before, line in itertools.pairwise(lines):
        if line["train/stage"] != before["train/stage"]:
            for axis in (upper, lower):
                axis.axvline(before["step"], color="grey", linewidth=0.8, linestyle=":")
    upper.set(ylabel="KL (nats)", title="rate of each rung")
    upper.legend(frameon=False)
    lower.set(ylabel="alpha", xlabel="step", ylim=(-0.05, 1.05))
    return _save(figure, path)


def latent_scatter(path: Path, means: Tensor, labels: Tensor, title: str = "") -> Path:
    """Plot posterior means [N, 2] coloured by label [N]; of up to ten, each has a marker of its own, too."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 6), layout="constrained")
    points, classes = means.cpu().numpy(), labels.cpu().numpy()
    few = classes.max() < len(PALETTE)
    for k in np.unique(classes):
        where = classes == k
        shade = colour(int(k)) if few else plt.get_cmap("viridis")(k / classes.max())
        marker = MARKERS[int(k)] if few else "o"
        axis.scatter(points[where, 0], points[where, 1], s=7, color=shade, marker=marker, label=str(k), lw=0)
    limit = max(4.0, float(np.quantile(np.abs(points), 0.995)) * 1.1)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="z0", ylabel="z1", aspect="equal")
    axis.set_title(title, fontsize=8, wrap=True)
    if len(np.unique(classes)) <= 20:
        axis.legend(loc="upper right", markerscale=3, frameon=False)
    return _save(figure, path)


def evaluation_plot(
    path: Path,
    rates: Sequence[float] | None,  # [D] nats
    mutual: np.ndarray | None,  # [D, F] fraction of each factor's entropy
    factors: Sequence[str],
    rates_of: str = "latent",
) -> Path:
    """Plot each latent's rate and, as a heat map, the fraction of each factor's entropy that each latent holds.

    Either panel is left out if its values are None. `factors` names the columns of `mutual`; `rates_of` names
    what the rates belong to, if not to latents. Returns `path`.
    """
    plt = pyplot()
    panels = (rates is not None) + (mutual is not None)
    count = len(rates) if rates is not None else len(mutual) if mutual is not None else 0
    size = (5 * panels, max(3.0, 0.28 * count + 1.5))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    if rates is not None:
        axis = axes[0][0]
        axis.barh(range(count), rates)
        axis.set(title=f"rate of each {rates_of} (nats)", ylabel=rates_of, ylim=(count - 0.5, -0.5))
    if mutual is not None:
        axis = axes[0][-1]
        picture = axis.imshow(mutual, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set(title="I(latent; factor) / H(factor)", ylabel="latent")
        axis.set_xticks(range(len(factors)), factors, rotation=30, ha="right")
        if mutual.size <= 400:
            for (j, k), value in np.ndenumerate(mutual):
                colour = "white" if value < 0.6 else "black"
                axis.text(k, j, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(picture, ax=axis)
    return _save(figure, path)


def sweep_plot(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Plot a sweep: each objective over the trials and over each searched parameter, with the best trials (or
    the Pareto front) as red diamonds.

    A row describes a trial: `number`, `params`, `values` (one per objective in `names`) and whether it is
    `best`. Returns `path`.
    """
    plt = pyplot()
    parameters = list(dict.fromkeys(p for row in rows for p in row["params"]))
    pairs = len(names) == 2
    columns = 1 + pairs + len(parameters)
    size = (3 * columns, 2.8 * max(len(names), 1))
    figure, axes = plt.subplots(max(len(names), 1), columns, figsize=size, squeeze=False, layout="constrained")
    for k, name in enumerate(names):
        xs: list[tuple[str, list[Any]]] = [("trial", [row["number"] for row in rows])]
        if pairs:
            xs.append((names[1 - k], [row["values"][1 - k] for row in rows]))
        xs += [(p, [row["params"].get(p, math.nan) for row in rows]) for p in parameters]
        for axis, (label, values) in zip(axes[k], xs, strict=True):
            for best, style in ((False, {"color": PALETTE[3]}), (True, {"color": PALETTE[2], "marker": "D"})):
                points = [(x, r["values"][k]) for x, r in zip(values, rows, strict=True) if r["best"] is best]
                if points:
                    axis.plot(*zip(*points, strict=True), **{"marker": "o", "ls": "none", "ms": 4} | style)
            axis.set(xlabel=label, ylabel=name)
            low = min((x for x in values if x > 0), default=0)
            if label in parameters and low > 0 and min(values) > 0 and max(values) / low > 20:
                axis.set_xscale("log")
    return _save(figure, path)


@dataclass
class Series:
    """Hold one run of a rate-distortion plot: a multi-rate model's curve, or the single point of another
    model."""

    label: str
    curve: bool
    points: list[dict[str, float]]  # beta, rate, distortion, total, active_units, perhaps mig
    beside: list[dict[str, float]]  # oracle_rate, oracle_distortion at the same betas, where there is an oracle


def curve_plot(path: Path, series: Sequence[Series]) -> Path:
    """Plot distortion over rate; then, over beta, D + R, active units and, where measured, MIG.

    Series with the same label have the same colour. An oracle's optimum is a dashed line. Returns `path`.
    """
    plt = pyplot()
    has_mig = any("mig" in p for s in series for p in s.points)
    panels = [("total", "D + R (nats)"), ("active_units", "active units"), *[("mig", "MIG")] * has_mig]
    figure, axes = plt.subplots(
        1, 1 + len(panels), figsize=(4.2 * (1 + len(panels)), 3.8), squeeze=False, layout="constrained"
    )
    labels = list(dict.fromkeys(s.label for s in series))
    for one in series:
        shade = colour(labels.index(one.label))
        style: dict[str, Any] = {"color": shade, "linewidth": 1, "linestyle": "-" if one.curve else "none"}
        style |= {"marker": "o", "markersize": 3} if one.curve else {"marker": "x", "markersize": 6}
        seen = next(s for s in series if s.label == one.label) is one
        for axis, (x, y) in zip(
            axes[0], [("rate", "distortion"), *(("beta", k) for k, _ in panels)], strict=True
        ):
            known = [p for p in one.points if y in p]
            axis.plot([p[x] for p in known], [p[y] for p in known], label=one.label if seen else None, **style)
        if one.curve:
            mark_betas(axes[0][0], one.points)
    for k, label in enumerate(labels):  # models of other widths have other optima
        beside = [b for s in series if s.label == label for b in s.beside]
        frontier = sorted((b["oracle_rate"], b["oracle_distortion"]) for b in beside)
        if frontier:
            line = {"color": "black", "linewidth": 0.8, "linestyle": "--", "label": None if k else "optimum"}
            axes[0][0].plot(*zip(*frontier, strict=True), **line)
    axes[0][0].set(xlabel="rate (nats)", ylabel="distortion (nats)", title="rate and distortion")
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis, (_, title) in zip(axes[0][1:], panels, strict=True):
        axis.set(xlabel="beta", title=title, xscale="log")
    return _save(figure, path)


def mark_betas(axis: Any, points: Sequence[Mapping[str, float]], every: int = 4) -> None:
    """Write the value of beta beside every `every`-th point of a rate-distortion curve."""
    for point in points[::every]:
        axis.annotate(
            f"{point['beta']:.2g}",
            (point["rate"], point["distortion"]),
            textcoords="offset points",
            xytext=(3, 3),
            fontsize=6,
        )


def response_plot(
    path: Path, betas: Sequence[float], layers: Mapping[str, Tensor], lines: int = 24, panels: int = 40
) -> Path:
    """Plot a multi-rate model's gate values over beta, one panel per gated layer.

    `layers` maps a layer's name to its gate values [number of betas, channels]. At most `panels` layers, and in
    each at most `lines` channels, are drawn, evenly spaced. Returns `path`.
    """
    plt = pyplot()
    chosen = torch.linspace(0, len(layers) - 1, min(panels, len(layers))).round().long().tolist()
    layers = {name: layers[name] for name in (list(layers)[i] for i in chosen)}
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 2.2 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, layers.items(), strict=False):
        channels = values.shape[1]
        shown = torch.linspace(0, channels - 1, min(lines, channels)).round().long()
        axis.plot(betas, values[:, shown].numpy(), linewidth=0.7)
        axis.set_title(f"{name} ({len(shown)} of {channels})", fontsize=7)
        axis.set(xscale="log", ylim=(-0.05, max(1.05, float(values.max()) * 1.05)))
    for axis in axes[-1]:
        axis.set_xlabel("beta")
    return _save(figure, path)


def colour(k: int) -> str:
    """Return the colour of the k-th thing in a plot; after ten the colours repeat."""
    return PALETTE[k % len(PALETTE)]


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up to draw without a screen and with the colours in `PALETTE`.

    A program that has chosen where its own plots go, and a notebook, keep that.
    """
    import matplotlib

    if not {"matplotlib.pyplot", "ipykernel"} & sys.modules.keys():
        matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=PALETTE)
    return plt


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot().close(figure)
    return path
