"""Find and read the runs of a rate-distortion plot, check that they are comparable, and label them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from movae_fast.evaluation.rate_distortion import Point, is_multirate, nominal_beta
from movae_fast.training.build import load_trained
from movae_fast.training.config import TrainConfig
from movae_fast.training.logs import read_lines
from movae_fast.training.run_folder import folder_of

# Flags by which runs of one curve may differ without being another kind of run.
NOT_A_KIND = ("beta", "loss_weights", "coef_kl", "multirate", "beta_per", "data_dir", "loader", "limit_test")
CLOSE = 1e-3  # betas that differ by less than this share are one: recipes round them


@dataclass
class Member:
    """Hold one run of a rate-distortion plot, with its measured points."""

    path: Path
    config: TrainConfig
    multirate: bool
    betas: list[float]
    latents: int
    label: str = ""
    points: list[Point] = field(default_factory=list)
    beside: list[dict[str, float]] = field(default_factory=list)  # the oracle's metrics, a dict a point
    closed: dict[str, float] = field(default_factory=dict)  # gated layer -> share of gates shut at every beta
    seconds: float = 0.0
    processes: int = 1  # that trained it

    @property
    def train_seconds(self) -> float:
        """Return the seconds that the run spent in training steps according to its log; 0 without a log."""
        metrics = read_lines(folder_of(self.path) / "metrics.jsonl")
        lines = [line for line in metrics if line.get("train/images_per_s")]
        steps = [0, *(line["step"] for line in lines)]
        size = self.config.data.batch_size * self.processes
        return sum(
            (line["step"] - before) * size / line["train/images_per_s"]
            for before, line in zip(steps, lines, strict=False)
        )


def expanded(names: Sequence[str]) -> list[Path]:
    """Return the paths of the runs that are named: a run or checkpoint itself, the runs in a folder, or the
    complete trials of a sweep. Raises ValueError if a name has none."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"{name}: no such run or folder")
        inside = [path] if path.is_file() or is_run(path) else runs_below(path)
        if not inside:
            raise ValueError(f"{name} holds no run; name runs, folders of runs, or a sweep's folder")
        paths += inside
    return list(dict.fromkeys(paths))


def is_run(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).is_file() for name in ("last.pt", "best.pt"))


def runs_below(folder: Path) -> list[Path]:
    results = folder / "results.json"
    if results.is_file() and (folder / "trials").is_dir():
        try:
            numbers = [int(row["number"]) for row in json.loads(results.read_bytes())["trials"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{results} is damaged ({type(error).__name__}); the sweep's own command makes it anew"
            ) from None
        return [trial_folder(folder, number) for number in numbers]
    return sorted(p.parent for p in folder.rglob("checkpoints") if is_run(p.parent))


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the folder of a sweep's complete trial; if it was started several times, that of the last run."""
    tails = [p for p in (sweep / "trials").glob(f"{number:04d}*") if is_run(p)]
    if not tails:
        raise ValueError(f"{sweep}: trial {number} has no run in trials/{number:04d}")
    return max(tails, key=lambda p: (len(p.name), p.name))


def read_member(
    path: Path, device: torch.device, betas_within: Callable[[float, float], list[float]]
) -> Member:
    """Read one run; `betas_within` chooses the betas of a multi-rate run, given the range it was trained for.

    Raises ValueError, which names the path, for a model that is neither multi-rate nor has a single beta.
    """
    trained, model, processes, _ = load_trained(path, device)
    multirate = is_multirate(model)
    if multirate:
        assert model.rates is not None
        wanted = betas_within(model.rates.beta_min, model.rates.beta_max)
    else:
        try:
            wanted = [nominal_beta(trained)]
        except ValueError as error:
            raise ValueError(f"{path} is neither a multi-rate run nor one of a fixed beta: {error}") from None
    return Member(path, trained, multirate, wanted, model.latent_dim, processes=processes)


def check_alike(members: Sequence[Member]) -> None:
    """Raise ValueError if runs have different images or likelihoods, so that their curves cannot share axes."""
    first = members[0]
    mine = of_images(first.config)
    for member in members:
        other = of_images(member.config)
        if other != mine:
            name = next(k for k in mine if mine[k] != other[k])
            raise ValueError(
                f"{first.path} has {name} {mine[name]} and {member.path} has {other[name]}: "
                "rates and distortions of different images do not share axes"
            )


def of_images(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of images and likelihood that two runs must share for their distortions to be
    comparable."""
    names = ("dataset", "image_size", "resize", "crop", "normalize", "binarize", "bits", "antialias")
    others = {"corpus_digest": config.corpus.corpus_digest, "recons_dist": config.objective.recons_dist}
    return {n: getattr(config.data, n) for n in names} | others


def add_plain_betas(members: Sequence[Member]) -> None:
    """Add the beta of each single-beta run to every multi-rate run whose range includes it, so that they can be
    compared."""
    plain = {m.betas[0] for m in members if not m.multirate}
    for member in members:
        if member.multirate:
            ends = member.betas[0] * (1 - CLOSE), member.betas[-1] * (1 + CLOSE)
            inside = {b for b in plain if ends[0] <= b <= ends[1]}
            own = {b for b in member.betas if not any(abs(b - p) <= CLOSE * p for p in inside)}
            member.betas = sorted(inside | own)


def label_members(members: Sequence[Member]) -> None:
    """Set each run's label for the plot: its kind, and the flags in which runs of that kind differ."""
    for multirate, name in ((True, "multi-rate"), (False, "beta-VAEs")):
        same = [m for m in members if m.multirate is multirate]
        flags = [kind_flags(m) for m in same]
        differing = [key for key in (flags[0] if flags else ()) if any(f[key] != flags[0][key] for f in flags)]
        for member, own in zip(same, flags, strict=True):
            member.label = ", ".join([name, *(f"{key} {own[key]}" for key in differing)])


def kind_flags(member: Member) -> dict[str, Any]:
    """Return the flags that distinguish kinds of runs: all but those of optimizer and run, and `NOT_A_KIND`."""
    config = member.config
    parts = [config.data, config.model, config.objective, config.ladder]
    if member.multirate:
        parts.append(config.multirate)
    return {k: v for part in parts for k, v in vars(part).items() if k not in NOT_A_KIND}
