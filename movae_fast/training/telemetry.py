"""Metrics of the steps since the last log line, kept on the device and fetched once a line."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from movae_fast.models import VQOutput
from movae_fast.training.step import StepRecord


class NonFiniteError(FloatingPointError):
    """A loss became NaN or infinite; carries the step and the objective."""

    def __init__(self, step: int, objective: str, value: float) -> None:
        super().__init__(f"{objective} became {value} at step {step}")
        self.step, self.objective = step, objective


class Telemetry:
    """A window of steps: losses, weights, cosines, norms [steps, m] each, and how often each code was used."""

    FIELDS = ("losses", "weights", "cosines", "norms")

    def __init__(self, names: tuple[str, ...], size: int, device: torch.device, codes: int = 0) -> None:
        self.names, self.size = names, size
        self.window = torch.full((size, len(self.FIELDS), len(names)), torch.nan, device=device)
        self.usage = torch.zeros(codes, device=device)
        self.filled = 0
        self.started = time.perf_counter()
        self.images = 0

    def record(self, record: StepRecord, out: Any, batch: int) -> None:
        """Keep one step, without reading anything on the host."""
        self.window[self.filled] = torch.stack([v.to(self.window) for v in record])
        if isinstance(out, VQOutput):
            self.usage += out.usage.to(self.usage)
        self.filled += 1
        self.images += batch

    def check(self, last_step: int) -> None:
        """Raise NonFiniteError for the window's first loss that is not finite (one host read)."""
        losses = self.window[: self.filled, 0].cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            row, column = (int(v) for v in bad[0])
            step = last_step - self.filled + 1 + row
            raise NonFiniteError(step, self.names[column], float(losses[row, column]))

    def fetch(self, last_step: int) -> dict[str, float]:
        """Means over the window by objective, codebook figures, images/s; empties the window."""
        self.check(last_step)
        means = self.window[: self.filled].nanmean(0).cpu()
        line: dict[str, float] = {}
        for i, kind in enumerate(("", "weight_", "cos_", "grad_norm_")):
            for j, name in enumerate(self.names):
                value = float(means[i, j])
                if not math.isnan(value):
                    line[f"train/{kind}{name}"] = value
        line |= {f"train/{k}": v for k, v in codebook_figures(self.usage).items()}
        now = time.perf_counter()
        line["train/images_per_s"] = self.images / max(now - self.started, 1e-9)
        self.started, self.images, self.filled = now, 0, 0
        self.window.fill_(torch.nan)
        self.usage.zero_()
        return line

    def restart_clock(self) -> None:
        """Leave out of images/s what was not training (evaluation, checkpoints, figures)."""
        self.started, self.images = time.perf_counter(), 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": self.window[: self.filled].clone(),
            "usage": self.usage.clone(),
            "filled": self.filled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = state["filled"]
        self.window[: self.filled] = state["window"]
        self.usage.copy_(state["usage"])
        self.restart_clock()


def codebook_figures(usage: Tensor) -> dict[str, float]:
    """Counts [K] to the share of codes in use and the perplexity exp(entropy) of their distribution."""
    if not usage.numel():
        return {}
    p = usage.double() / usage.sum().clamp_min(1)
    entropy = -torch.special.xlogy(p, p).sum()
    figures = torch.stack([(usage > 0).double().mean(), entropy.exp()]).tolist()
    return {"codebook_usage": figures[0], "perplexity": figures[1]}
