"""Define each quantizer's options, number of codes and objectives, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from movae_fast.choices import Quantizer

MOST_CODES = 2**24  # of one codebook: a count of each is kept and logged
# Of a quantizer: its own options, besides `quantizer` itself.
OPTIONS: dict[Quantizer, tuple[str, ...]] = {
    "vq": ("embedding_dim", "num_embeddings"),
    "ema": ("embedding_dim", "num_embeddings", "codebook_decay"),
    "fsq": ("fsq_levels",),
    "rvq": ("embedding_dim", "num_embeddings", "num_quantizers", "quantize_dropout"),
    "grouped_rvq": ("embedding_dim", "num_embeddings", "num_quantizers", "quantize_dropout", "num_groups"),
    "lfq": ("num_embeddings",),
    "bsq": ("num_embeddings",),
    "simvq": ("embedding_dim", "num_embeddings"),
}
ALL_OPTIONS = ("quantizer", *dict.fromkeys(name for names in OPTIONS.values() for name in names))
FSQ_LEVELS = (8, 5, 5, 5)  # Mentzer et al. 2024: for about 1,000 codes


@dataclass(frozen=True)
class QuantizerSettings:
    """Hold the options of a quantizer; those that do not apply to it have their defaults."""

    name: Quantizer
    embedding_dim: int  # channels of a code
    num_embeddings: int  # codes of one codebook
    num_quantizers: int  # codebooks after each other, of each group
    num_groups: int  # of channels
    fsq_levels: tuple[int, ...]
    quantize_dropout: bool
    codebook_decay: float

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Return the number of codes of each codebook; the codebooks of one group of channels come first, then
        the next group's."""
        return (self.num_embeddings,) * (self.num_quantizers * self.num_groups)


def settings_of(options: Mapping[str, Any]) -> QuantizerSettings:
    """Return the quantizer's settings from a model's options.

    Raises ValueError for an unknown quantizer, an option that does not apply to it, or a value that it cannot
    have.
    """
    given = {name: options[name] for name in ALL_OPTIONS if options.get(name) is not None}
    name: Quantizer = given.get("quantizer", "vq")
    if name not in OPTIONS:
        raise ValueError(f"--quantizer {name} is unknown; valid: {', '.join(get_args(Quantizer))}")
    for option in given:
        if option != "quantizer" and option not in OPTIONS[name]:
            raise ValueError(
                f"--{option} does not apply to --quantizer {name}, whose options are {', '.join(OPTIONS[name])}"
            )
    codes = given.get("num_embeddings", 512)
    levels = tuple(given.get("fsq_levels", FSQ_LEVELS))
    check_codes(name, codes, levels)
    dim, groups = given.get("embedding_dim", 64), given.get("num_groups", 2 if name == "grouped_rvq" else 1)
    if name == "fsq":
        codes, dim = math.prod(levels), len(levels)
    elif name in ("lfq", "bsq"):
        dim = codes.bit_length() - 1
    if dim % groups:
        raise ValueError(f"--num_groups {groups} does not divide --embedding_dim {dim}")
    return QuantizerSettings(
        name,
        dim,
        codes,
        given.get("num_quantizers", 4 if name in ("rvq", "grouped_rvq") else 1),
        groups,
        levels,
        given.get("quantize_dropout", False),
        given.get("codebook_decay", 0.99),
    )


def check_codes(name: Quantizer, codes: int, levels: Sequence[int]) -> None:
    """Raise ValueError if the quantizer `name` cannot have this number of codes, or fsq these levels per
    channel."""
    if name == "fsq":
        if not levels or min(levels) < 2:
            raise ValueError(f"--fsq_levels {' '.join(map(str, levels))}: each must be at least 2")
        if math.prod(levels) > MOST_CODES:
            raise ValueError(
                f"--fsq_levels {' '.join(map(str, levels))} make {math.prod(levels):,} codes; at most "
                f"{MOST_CODES:,} are counted: give fewer or smaller levels"
            )
        return
    if codes > MOST_CODES:
        raise ValueError(f"--num_embeddings {codes:,}: at most {MOST_CODES:,} codes are counted; give fewer")
    if name in ("lfq", "bsq") and (codes < 2 or codes & (codes - 1)):
        below = 2 ** max(codes.bit_length() - 1, 1)
        raise ValueError(
            f"--num_embeddings {codes}: --quantizer {name} has a bit per channel, so a power of two such as "
            f"{below} or {2 * below}"
        )


def quantizer_objectives(options: Mapping[str, Any]) -> dict[str, float]:
    """Return objective -> default weight of vq_vae with the quantizer in `options`, in order.

    A codebook of moving averages (ema) has no embedding objective, levels (fsq) have neither that nor
    commitment, and signs (lfq, bsq) have an entropy objective instead.
    """
    name = options.get("quantizer") or "vq"
    if name == "fsq":
        return {"reconstruction": 1.0}
    if name in ("lfq", "bsq"):
        return {"reconstruction": 1.0, "entropy": 0.1}
    if name == "ema":
        return {"reconstruction": 1.0, "commitment": 0.25}
    return {"reconstruction": 1.0, "embedding": 1.0, "commitment": 0.25}


def two_level_objectives(options: Mapping[str, Any]) -> dict[str, float]:
    """Return objective -> default weight of vq_vae_2 with the quantizer in `options`.

    The order is MO-VAE's, with commitment before embedding; the weights are 1, and 0.1 for entropy.
    """
    names = quantizer_objectives(options)
    order = [name for name in ("reconstruction", "commitment", "embedding", "entropy") if name in names]
    return {name: 0.1 if name == "entropy" else 1.0 for name in order}


def check_quantizer(options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError for quantizer options that are invalid or do not fit together."""
    settings_of(options)


def check_two_levels(options: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError for quantizer options that vq_vae_2 cannot have."""
    if settings_of(options).quantize_dropout:
        raise ValueError(
            "--quantize_dropout: the lower level of vq_vae_2 reads all codes of the upper; use vq_vae"
        )
