"""Draw the charts of a page as SVG, which needs no font file and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from movae_fast.pages.answers import BetaPoint
from movae_fast.plots import DASHES, colour, pyplot

SIZE = (4.6, 2.9)  # inches: one chart fills a phone's width, several stand side by side on a desktop


@dataclass(frozen=True)
class Chart:
    """Hold a chart or picture of a page: title, an explanation of how to read it, and the image as a `data:`
    URL."""

    title: str
    note: str
    source: str
    width: int = 0  # of a picture, in pixels; 0 for a chart, which is scaled to the page


def svg(figure: Any) -> str:
    """Return a matplotlib figure as an SVG image in a `data:` URL, and close the figure."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    pyplot().close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def axes() -> tuple[Any, Any]:
    """Return a new matplotlib figure and its axes, in the style of the page."""
    plt = pyplot()
    style = {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif", "svg.hashsalt": "movae"}
    plt.rcParams.update(style)
    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    return figure, axis


Lines = Sequence[Mapping[str, Any]]


def points_of(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a log has the metric `key`, and its values there."""
    both = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in both], [value for _, value in both]


def objective_chart(lines: Lines, name: str, note: str) -> Chart | None:
    """Draw an objective's training and test values over the steps; return None if the log has neither."""
    train, test = points_of(lines, f"train/{name}"), points_of(lines, f"test/{name}")
    if not train[0] and not test[0]:
        return None
    figure, axis = axes()
    axis.plot(*train, color=colour(0), linewidth=1.3, label="training images")
    axis.plot(*test, "o", color=colour(2), markersize=5, label="test images")
    axis.set(xlabel="step")
    axis.legend(frameon=False)
    return Chart(f"Objective: {name}", note, svg(figure))


def lines_chart(
    lines: Lines, title: str, note: str, keys: Mapping[str, str], zero: bool = False
) -> Chart | None:
    """Draw several metrics of a log over the steps in one chart; return None if the log has none of them.

    keys: metric -> its name in the legend. A metric that is always 0 is left out, such as the cosine of
    an objective whose Jacobian row is zero. zero: draw a line at 0 and shade the region below it.
    """
    there = {key: name for key, name in keys.items() if any(line.get(key) for line in lines)}
    if not there:
        return None
    figure, axis = axes()
    for k, (key, name) in enumerate(keys.items()):
        if key not in there:
            continue  # a metric that is left out keeps its colour, so that colours agree between charts
        steps, values = points_of(lines, key)
        style = {"linewidth": 1.3, "marker": "o" if len(steps) < 3 else "", "markersize": 4}
        axis.plot(steps, values, DASHES[k % len(DASHES)], color=colour(k), label=name, **style)
    if zero:
        low, high = axis.get_ylim()
        low = min(low, -0.1 * high)
        axis.axhspan(low, 0, color=colour(2), alpha=0.1, linewidth=0)
        axis.axhline(0, color="#444444", linewidth=0.8)
        axis.set_ylim(low, high)
    axis.set(xlabel="step")
    every = [value for key in there for value in points_of(lines, key)[1]]
    if not zero and min(every) > 0 and max(every) > 50 * min(every):
        axis.set_yscale("log")
    axis.legend(frameon=False, ncols=2 if len(there) > 3 else 1)
    return Chart(title, note, svg(figure))


def curve_charts(curves: Mapping[str, Sequence[BetaPoint]]) -> list[Chart]:
    """Draw three charts: distortion over rate, distortion + rate over beta, and active latents over beta.

    curves: a run's name -> its points; each run has its own colour.
    """
    figure, axis = axes()
    for k, (name, points) in enumerate(curves.items()):
        axis.plot(
            [p.rate for p in points], [p.distortion for p in points], "o-", color=colour(k), ms=4, label=name
        )
        for point in points[:: max(1, len(points) // 5)]:
            place = {"textcoords": "offset points", "xytext": (4, 3), "fontsize": 8}
            axis.annotate(f"{point.beta:.2g}", (point.rate, point.distortion), **place)
    axis.set(xlabel="rate (nats per image)", ylabel="distortion (nats per image)")
    if len(curves) > 1:
        axis.legend(frameon=False)
    made = [
        Chart(
            "What each beta trades",
            "Numbers beside the points are betas. Further left the code carries less, further down the "
            "reconstruction is better; a curve nearer to the lower left corner is the better model.",
            svg(figure),
        )
    ]
    for key, title, note in (
        ("total", "Distortion + rate over beta", "The lowest point is the best bound on the likelihood."),
        ("active_units", "Active latents over beta", "How many latents still depend on the image."),
    ):
        figure, axis = axes()
        for k, points in enumerate(curves.values()):
            axis.plot([p.beta for p in points], [getattr(p, key) for p in points], "o-", color=colour(k), ms=4)
        axis.set(xlabel="beta", xscale="log")
        made.append(Chart(title, note, svg(figure)))
    return made


def usage_chart(counts: Sequence[float], note: str) -> Chart:
    """Draw how often each code of a codebook is used, in descending order."""
    figure, axis = axes()
    ordered = sorted(counts, reverse=True)
    axis.fill_between(range(1, len(ordered) + 1), ordered, step="mid", color=colour(0), linewidth=0)
    axis.set(xlabel="code, the most used first", ylabel="times chosen", xlim=(0.5, len(ordered) + 0.5))
    return Chart("How often each code is used", note, svg(figure))


def rates_chart(rates: Sequence[float], words: str) -> Chart:
    """Draw the rates of all latents (or groups) in nats per image, in descending order.

    words: what the bars are called, "latent" or "group".
    """
    figure, axis = axes()
    ordered = sorted(rates, reverse=True)
    axis.bar(range(1, len(ordered) + 1), ordered, color=colour(0))
    axis.set(xlabel=f"{words}, the busiest first", ylabel="nats per image")
    note = f"The rate of each {words}: a bar near zero is a {words} that the decoder can do without."
    return Chart(f"What each {words} carries", note, svg(figure))
