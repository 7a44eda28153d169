"""Answer questions about a run in whole sentences, from its log and its rate-distortion points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from movae_fast.training.log_lines import conflict_of

Tone = Literal["good", "attention", "neutral"]
CONFLICT = -1e-3  # a cosine below this counts as a conflict, as in the log
MANY, FEW = 0.5, 0.1  # fractions of codes in use: from MANY on well used, below FEW hardly used


@dataclass(frozen=True)
class Answer:
    """Hold a question, its short answer, the sentences that explain it, and whether it is good news
    (`tone`)."""

    question: str
    short: str
    why: str
    tone: Tone = "neutral"


@dataclass(frozen=True)
class BetaPoint:
    """Hold the rate and the distortion, in nats per image, and the number of active latents at one beta."""

    beta: float
    rate: float
    distortion: float
    active_units: int

    @property
    def total(self) -> float:
        """Return distortion + rate, the negative ELBO, in nats per image."""
        return self.rate + self.distortion


Lines = Sequence[Mapping[str, Any]]


def against(lines: Lines, names: Sequence[str], kind: str) -> dict[str, tuple[float, float]]:
    """Return objective -> (fraction of log lines in conflict with it, mean cosine), for the objectives whose
    cosine is in the log.

    kind: "cos_" for the cosine of an objective's gradient with the update, "step_cosine_" with the applied
    step. A line is in conflict if the cosine is below CONFLICT.
    """
    made = {}
    for name in names:
        values = [line[f"train/{kind}{name}"] for line in lines if f"train/{kind}{name}" in line]
        if values:
            made[name] = sum(v < CONFLICT for v in values) / len(values), sum(values) / len(values)
    return made


def conflict_answer(lines: Lines, names: Sequence[str], agg: str) -> Answer | None:
    """Answer which objectives the updates and the applied steps made worse; None if the log has no cosines.

    names: the objectives. agg: the run's aggregator, on which the advice depends.
    """
    update, step = conflict_of(lines), conflict_of(lines, "step_")
    if update is None and step is None:
        return None
    question = "Which objective conflicts?"
    parts = []
    worst: tuple[float, str] = (0.0, "")
    for conflict, kind, what in ((update, "cos_", "update"), (step, "step_cosine_", "applied step")):
        if conflict is None:
            continue
        of = against(lines, names, kind)
        worse = sorted(((f, n) for n, (f, _) in of.items() if f > 0), reverse=True)
        if conflict.fraction == 0:
            parts.append(f"No {what} of {conflict.steps:,} measured ones worked against any objective.")
            continue
        shown = ", ".join(f"{n} in {f:.0%}" for f, n in worse)
        parts.append(
            f"{conflict.fraction:.0%} of {conflict.steps:,} measured {what}s worked against an objective"
            + (f" (of the log's lines, against {shown})." if shown else ".")
        )
        if worse and kind == "cos_":
            worst = worse[0]
    if worst[1]:
        parts.append("Remedy: --agg upgrad" if agg == "sum" else "Another aggregator may have less")
        parts[-1] += ", whose update never works against an objective." if agg == "sum" else "."
        return Answer(question, f"{worst[1]}: in {worst[0]:.0%} of the updates", " ".join(parts), "attention")
    if update is not None and update.fraction == 0:
        tone: Tone = "good"
        short = "None: no update worked against an objective"
        if step is not None and step.fraction > 0:
            of = against(lines, names, "step_cosine_")
            name, (fraction, _) = max(of.items(), key=lambda entry: entry[1][0])
            short = f"None in the updates; {name} in {fraction:.0%} of the applied steps"
            tone = "neutral"
            parts.append(
                "The optimizer's memory brings conflict back into the step that is applied; "
                "--conflict_free step takes it out."
            )
        return Answer(question, short, " ".join(parts), tone)
    return Answer(question, "Seldom, and no objective more than another", " ".join(parts))


def codebook_answer(used: int, codes: int, perplexity: float, images: int) -> Answer:
    """Answer whether a codebook of `codes` codes is used, given that `images` test images use `used` of them
    with this perplexity."""
    fraction = used / codes
    why = (
        f"{images:,} test images use {used:,} of {codes:,} codes ({fraction:.0%}), as unevenly as if "
        f"{perplexity:.0f} codes were used equally often (the perplexity)."
    )
    question = "Is the codebook used?"
    if fraction >= MANY:
        return Answer(question, f"Yes: {fraction:.0%} of its codes", why, "good")
    hint = " Fewer codes (--num_embeddings) would do as well, or a lower learning rate may use more of them."
    if fraction < FEW:
        return Answer(question, f"Hardly: {fraction:.0%} of its codes", why + hint, "attention")
    return Answer(question, f"In part: {fraction:.0%} of its codes", why + hint, "neutral")


def latents_answer(active: int, latents: int, words: str = "latents") -> Answer:
    """Answer how many of the latents are active, that is, carry information about the image."""
    why = (
        "An active one changes with the image; the others are noise to the decoder. Fewer active ones than "
        "there are is no fault by itself: the model needs no more at this beta."
    )
    tone: Tone = "attention" if active == 0 else "neutral"
    return Answer("How many latents are used?", f"{active} of {latents} {words} are active", why, tone)


def quality_answer(last: Mapping[str, float]) -> Answer | None:
    """Answer how much smaller the reconstructions' squared error is than that of the mean training image.

    last: metric -> value. Returns None if it lacks `test/mse` or `test/mse_mean_image`.
    """
    mse, mean = last.get("test/mse"), last.get("test/mse_mean_image")
    if mse is None or not mean:
        return None
    less = 1 - mse / mean
    short = f"Their error is {abs(less):.0%} {'below' if less >= 0 else 'above'} the mean image's"
    why = (
        f"Mean squared error {mse:.4g} per pixel value (images between 0 and 1); showing the mean training "
        f"image every time would give {mean:.4g}."
    )
    tone: Tone = "good" if less > 0.3 else "attention" if less < 0.1 else "neutral"
    return Answer("Are reconstructions better than a guess?", short, why, tone)


def beta_answer(points: Sequence[BetaPoint], spans_runs: bool = False) -> Answer | None:
    """Answer which beta to take for which purpose, from points of a rate-distortion curve; None for fewer than
    two.

    spans_runs: whether the points are of several runs instead of one multi-rate model.
    """
    if len(points) < 2:
        return None
    best = min(points, key=lambda p: p.total)
    sharp = min(points, key=lambda p: p.distortion)
    compact = thrifty(points)
    of = "of these runs" if spans_runs else "of this curve"
    why = (
        f"Beta {best.beta:.3g} has the least distortion + rate {of} ({best.total:.4g} nats per image), that "
        "is the best bound on the likelihood of test images: take it to generate. "
        f"For the sharpest reconstructions take {sharp.beta:.3g} (distortion {sharp.distortion:.4g}, at a rate "
        f"of {sharp.rate:.3g} nats). For a compact code take {compact.beta:.3g}: it is the largest beta that "
        f"keeps half of what can be gained in distortion, at a rate of {compact.rate:.3g} nats with "
        f"{compact.active_units} active latents."
    )
    edge = best.beta in (min(p.beta for p in points), max(p.beta for p in points))
    if edge:
        why += " The best one lies at the end of the range: one further out may be better."
    return Answer("Which beta to take?", f"{best.beta:.3g}, to generate", why, "attention" if edge else "good")


def thrifty(points: Sequence[BetaPoint]) -> BetaPoint:
    """Return the point of the largest beta whose distortion is at most midway between the smallest and
    the largest."""
    least, most = min(p.distortion for p in points), max(p.distortion for p in points)
    good = [p for p in points if p.distortion <= (least + most) / 2]
    return max(good, key=lambda p: p.beta)
