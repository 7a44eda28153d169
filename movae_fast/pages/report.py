"""Write the report of one or several runs as one HTML page, which loads nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from movae_fast import __version__
from movae_fast.files import replacing
from movae_fast.pages.answers import Answer, BetaPoint, beta_answer
from movae_fast.pages.charts import Chart, curve_charts
from movae_fast.pages.gather import RunPage, here

TEMPLATE = "report.html.j2"
FLAG = re.compile(r"--\w+( (upgrad|step|[\d.e+-]*\d)\b)?")


def render(pages: Sequence[RunPage], device: torch.device) -> str:
    """Return the report on the given runs as HTML.

    Images and styles are inside it, and its Content-Security-Policy forbids every request. device: the one that
    the report was computed on, which it names.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["flags"] = with_flags
    answer, charts = over_runs(pages)
    return environment.get_template(TEMPLATE).render(
        pages=pages,
        title=", ".join(page.name for page in pages[:3]) + (" and more" if len(pages) > 3 else ""),
        answer=answer,
        charts=charts,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        here=here(device),
        version=__version__,
    )


def with_flags(text: str) -> Markup:
    """Return text as HTML, with `<code>` around flags such as `--agg upgrad`, so that no line breaks inside
    them."""
    return Markup(FLAG.sub(r"<code>\g<0></code>", str(escape(text))))


def over_runs(pages: Sequence[RunPage]) -> tuple[Answer | None, list[Chart]]:
    """Return the answer to which beta to take among several runs, and charts with all their points.

    Runs are compared if they have the same images and likelihood as the first run that has a point. Returns
    (None, []) if fewer than two have.
    """
    curved = [page for page in pages if page.points]
    alike = [page for page in curved if page.images_key == curved[0].images_key]
    if len(alike) < 2:
        return None, []
    every: list[BetaPoint] = [point for page in alike for point in page.points]
    different = len({point.beta for point in every}) > 1
    answer = beta_answer(every, spans_runs=True) if different else None
    return answer, curve_charts({page.name: page.points for page in alike})


def write_report(path: Path, html: str) -> Path:
    """Write the page to `path` and return it; the file appears only when it is complete."""
    with replacing(path) as file:
        file.write(html.encode("utf-8"))
    return path
