"""Make aggregators by name: every one that TorchJD offers, with its parameters by keyword.

`catalog` has the names and their parameters. TorchJD is imported with the first aggregator that is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.aggregation.catalog import (
    AGGREGATORS,
    CONES,
    FUSED,
    NEED_TWO_BATCHES,
    aggregator_args,
    checked_options,
    weights_by_gramian,
    weights_rows,
)
from movae_fast.choices import STRICT_REG_EPS, Regularizer

if TYPE_CHECKING:
    import torchjd.aggregation as jd

__all__ = [
    "AGGREGATORS",
    "CONES",
    "FUSED",
    "NEED_TWO_BATCHES",
    "aggregate",
    "aggregator_args",
    "aggregator_state",
    "check_runs",
    "is_fused",
    "is_weighting",
    "load_aggregator_state",
    "make_aggregator",
    "weights_by_gramian",
    "weights_rows",
]


def make_aggregator(
    name: str,
    m: int,
    args: Mapping[str, Any] | None = None,
    pref_weights: Sequence[float] | None = None,
    norm_eps: float = 0.0,
    reg_eps: float = STRICT_REG_EPS,
    regularizer: Regularizer | None = None,
) -> jd.Aggregator:
    """Make the aggregator `name` for m objectives.

    `norm_eps`, `reg_eps` and `regularizer` are those of the projection onto the dual cone (UPGrad, DualProj;
    see `ops.project_weights`). The defaults are strict: "diagonal", 1e-6. TorchJD's own are "trace", 1e-4 and
    1e-4; a norm_eps, which is a threshold of the trace, means "trace" by itself. Raises ValueError for a
    parameter or a preference that the aggregator does not have, and ImportError's remedy where a solver is
    missing.
    """
    options = checked_options(name, m, args, pref_weights, norm_eps, reg_eps, regularizer)
    if "pref_vector" in options:
        options["pref_vector"] = torch.tensor(options["pref_vector"], dtype=torch.float64)
    try:
        return AGGREGATORS[name](**options)
    except ImportError as error:
        remedy = "pip install 'movae-fast[solvers]'"
        raise ValueError(f"--agg {name} needs a solver that is not installed: {remedy} ({error})") from None
    except TypeError as error:
        raise ValueError(
            f"--agg {name}: {error}; its parameters are {', '.join(aggregator_args(name))}"
        ) from None
    except ValueError as error:
        raise ValueError(f"--agg_args of {name}: {error}") from None


def check_runs(name: str, m: int, args: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Raise ValueError for an aggregator that cannot be made for m objectives (see `make_aggregator`), or that
    refuses their rows: some of TorchJD's ask for a number of them."""
    aggregator = make_aggregator(name, m, args, **options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        rows = torch.eye(m, m + 1) + 0.1
        try:
            aggregate(aggregator, rows, ops.gramian(rows))
        except (ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).replace("`", "").split())
            raise ValueError(f"--agg {name} does not take the rows of {m} objectives: {reason}") from None


def is_fused(aggregator: nn.Module | None) -> bool:
    """Return whether an aggregator runs where the rows are and reads nothing on the host; False without one."""
    if aggregator is None:
        return False
    from movae_fast.aggregation.fused import FusedAggregator

    return isinstance(aggregator, FusedAggregator)


def is_weighting(aggregator: nn.Module) -> bool:
    """Return whether the aggregator weights rows by their Gramian alone."""
    import torchjd.aggregation as jd

    return isinstance(aggregator, jd.GramianWeightedAggregator)


def aggregate(
    aggregator: jd.Aggregator,
    rows: Tensor,  # [m, P]
    gramian: Tensor,  # [m, m] float64
) -> tuple[Tensor, Tensor | None]:
    """Return the update [P] and, where the aggregator weights rows, its weights [m].

    A weighting that sees only the Gramian gets the float64 one.
    """
    import torchjd.aggregation as jd

    if isinstance(aggregator, jd.GramianWeightedAggregator):
        weights = aggregator.gramian_weighting(gramian)
    elif isinstance(aggregator, jd.WeightedAggregator):
        weights = aggregator.weighting(rows)
    else:
        return aggregator(rows), None
    return ops.combine(rows, weights), weights


def aggregator_state(aggregator: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the state that an aggregator keeps between steps, per module: plain values, tensors, tuples."""
    state: dict[str, dict[str, Any]] = {}
    for path, module in aggregator.named_modules():
        kept: dict[str, Any] = {}
        for key, value in {**vars(module), **module._buffers}.items():
            if key == "training":
                continue
            if isinstance(value, Tensor):
                kept[key] = value.detach().clone()
            elif isinstance(value, int | float | bool | tuple | None):
                kept[key] = value
            elif type(value).__module__ == "numpy":
                kept[key] = {"numpy": torch.tensor(value)}
        state[path] = kept
    return state


def load_aggregator_state(
    aggregator: nn.Module, state: Mapping[str, Mapping[str, Any]], device: torch.device | str = "cpu"
) -> None:
    """Put back what `aggregator_state` took, for rows on `device`."""
    modules = dict(aggregator.named_modules())
    for path, kept in state.items():
        module = modules[path]
        if kept.get("step", 0) and hasattr(module, "_init_optim_problem"):
            module._init_optim_problem()  # NashMTL builds its program at step 0 only
        for key, value in kept.items():
            if isinstance(value, dict):
                value = value["numpy"].cpu().numpy()
            elif isinstance(value, Tensor):
                value = value.to(device)
            elif isinstance(value, tuple):  # the key of a state names the device that it lies on
                value = tuple(torch.device(device) if isinstance(v, torch.device) else v for v in value)
            setattr(module, key, value)
