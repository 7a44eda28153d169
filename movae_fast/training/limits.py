"""Define the range of values that each flag may have, for all commands."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import Any

from movae_fast.bounds import Bounds

MOST = 10**12  # largest whole number; larger ones are typing errors
ONE, ZERO, POSITIVE = Bounds(1), Bounds(0), Bounds(0, above=True)
# Bounds on flags of all commands that do not depend on other flags; `validate` has those that do.
BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "image_size", "epochs", "accumulate"), ONE),
    **dict.fromkeys(
        (
            "anneal_steps",
            "recursive_kl_steps",
            "gramian_every",
            "cycle_period",
            "capacity_max_iter",
            "train_seq",
        ),
        ONE,
    ),
    **dict.fromkeys(("limit_train", "limit_test", "limit", "steps", "eval_freq", "save_freq"), ZERO),
    **dict.fromkeys(
        ("checkpoint_every", "gan_start", "warmup_steps", "warmup_epochs", "fade_in_duration"), ZERO
    ),
    **dict.fromkeys(("max_fid_samples", "max_images", "max_length", "free_bits"), ZERO),
    **dict.fromkeys(("dropout_in", "dropout_out", "word_dropout"), Bounds(0, 1, below=True)),
    **dict.fromkeys(("pad_multiple", "max_words", "top_k", "beam"), ONE),
    "plateau_patience": ONE,
    **dict.fromkeys(("plateau_after", "plateau_decays"), ZERO),
    **dict.fromkeys(("aggressive_steps", "aggressive_window"), Bounds(1, 1_000_000)),
    "top_p": Bounds(0, 1, above=True),
    "temperature": POSITIVE,
    "iw": Bounds(0, 1_000_000),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "skip_grad_norm", "scheduler_lr_min"), ZERO),
    **dict.fromkeys(("upgrad_norm_eps", "upgrad_reg_eps", "coef_kl", "traverse_range"), ZERO),
    **dict.fromkeys(("coff", "max_kl_weight", "min_kl_weight", "gamma", "max_capacity"), ZERO),
    **dict.fromkeys(("lr", "eps"), POSITIVE),
    **dict.fromkeys(("n_samples", "n_interpolate", "n_traverse", "nsamples", "n_betas"), Bounds(1, 100_000)),
    **dict.fromkeys(("iw_images", "n", "trials"), ONE),
    "log_images_every": ZERO,
    "log_every": Bounds(1, 1_000_000),  # the metrics of so many steps are kept on the device
    "profile": Bounds(0, 10_000),
    "num_samples": Bounds(1, 10_000),
    "prefetch": Bounds(1, 1024),
    "num_workers": Bounds(0, 1024),
    "workers": Bounds(1, 1024),
    "seed": Bounds(0, 2**32 - 1),  # NumPy's
    "scheduler_milestones": ONE,
    "resident_share": Bounds(0, 1),
    "ema_decay": Bounds(0, 1, below=True),
    "momentum": Bounds(0, 1, below=True),
    "betas": Bounds(0, 1, below=True),
    "gramian_batch": Bounds(0, 1, above=True),
    "scheduler_gamma": Bounds(0, 1, above=True),
    "ratio": Bounds(0, 1, above=True),
    "pref_weights": POSITIVE,
    "bits": Bounds(2, 8),
    "recons_components": Bounds(1, 1000),
    "num_residual_layers": Bounds(0, 1000),
    **dict.fromkeys(("num_quantizers", "num_groups"), Bounds(1, 64)),
    "pseudo_inputs": Bounds(1, 100_000),
    "importance_samples": Bounds(1, 1000),
    "codebook_decay": Bounds(0, 1, below=True),
    "num_ladders": Bounds(1, 32),
    "num_scales": Bounds(1, 8),
    "groups_per_scale": Bounds(1, 64),
    "outer_blocks": Bounds(0, 8),
    **dict.fromkeys(("outer_cells", "cells_per_group"), Bounds(1, 100)),
    "num_flows": Bounds(0, 100),
    "latents_per_group": Bounds(1, 10_000),
    "channels": Bounds(2, 100_000),
    **dict.fromkeys(("kl_warmup", "kl_constant"), Bounds(0, 1)),
    "kl_least": Bounds(0, 1, above=True),
    "norm_penalty": ZERO,
    "norm_penalty_init": POSITIVE,
}
FREE = Bounds()
MOST_DEVICES = 127  # torch keeps a device's number in a signed byte
PAIRS = ("beta_min", "beta_max")  # a range, which is checked as one where it is used


def check_values(flags: Any, **own: Bounds) -> None:
    """Raise ValueError if a flag in the dataclass `flags` is an empty text or a number outside its bounds.

    The bounds are those in `own`, else those in `BOUNDS`. Every number must be finite, and a whole number at
    most MOST in magnitude.
    """
    for entry in fields(flags):
        if entry.name in PAIRS:
            continue
        _check_value(entry.name, getattr(flags, entry.name), own.get(entry.name, BOUNDS.get(entry.name, FREE)))


def _check_value(name: str, value: Any, bounds: Bounds) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"--{name} is empty; give a value, or leave the flag out")
        if "\0" in value:
            raise ValueError(f"--{name} holds a zero byte, which no name has")
        if name == "device":
            check_device(value)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_value(name, part, bounds)
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_value(f"{name}.{key}", part, bounds)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, int)
        if whole and abs(value) > MOST:
            raise ValueError(
                f"--{name} {shortened(int(value))} is too large; a whole number here is at most {MOST:,}"
            )
        if refusal := bounds.refusal(value):
            raise ValueError(f"--{name} {value} {refusal}")


def check_device(name: str) -> None:
    """Raise ValueError for a device that no machine has; whether this one has it, `device.resolve_device` says.

    This is how torch writes the devices that movae trains on; torch itself takes seconds to import.
    """
    if name == "auto":
        return
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not re.fullmatch(r"|:(0|[1-9]\d*)", name[len(kind) :]):
        raise ValueError(f"--device {name}: unknown or not supported; valid: auto, cpu, cuda, cuda:0, …")
    if kind == "cpu" and int(index or 0):
        raise ValueError(f"--device {name}: there is one CPU device, whatever its processors: cpu")
    if int(index or 0) > MOST_DEVICES:
        raise ValueError(f"--device {name}: a device's number is at most {MOST_DEVICES}")


def shortened(value: int) -> str:
    """Return a whole number as text; one of more than 20 digits as "of N digits"."""
    digits = math.floor(math.log10(abs(value))) + 1 if value else 1
    return str(value) if digits <= 20 else f"of {digits} digits"
