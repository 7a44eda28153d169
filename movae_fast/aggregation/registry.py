"""Make and use aggregators by name: those of TorchJD and two of MO-VAE, with their parameters by keyword.

The names and parameters are listed in `catalog`. TorchJD is imported when the first aggregator is made.
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
    "set_progress",
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

    args: its parameters by name. pref_weights: its preference, m numbers; None for equal ones. norm_eps,
    reg_eps, regularizer: settings of the projection onto the dual cone (UPGrad, DualProj; see
    `ops.project_weights`). The default is strict: regularizer "diagonal" with reg_eps 1e-6. TorchJD's own
    settings are "trace", 1e-4 and 1e-4. A norm_eps above 0, which is a threshold on the trace, implies "trace"
    if no regularizer is given.

    Raises ValueError for a parameter or a preference that the aggregator does not have, and, with the command
    to install it, for a solver that is missing.
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
    """Make the aggregator `name` and try it once on rows of m objectives; raise ValueError if that fails.

    Some of TorchJD's aggregators need a certain number of rows. `options` are those of `make_aggregator`.
    """
    aggregator = make_aggregator(name, m, args, **options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        rows = torch.eye(m, m + 1) + 0.1
        try:
            aggregate(aggregator, rows, ops.gramian(rows))
        except (ValueError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).replace("`", "").split())
            raise ValueError(f"--agg {name} does not take the rows of {m} objectives: {reason}") from None


def is_fused(aggregator: nn.Module | None) -> bool:
    """Return whether an aggregator is one of this package's, which run on the rows' device without host reads;
    False for None."""
    if aggregator is None:
        return False
    from movae_fast.aggregation.fused import FusedAggregator

    return isinstance(aggregator, FusedAggregator)


def is_weighting(aggregator: nn.Module) -> bool:
    """Return whether the aggregator's update is a weighted sum of rows whose weights depend on the Gramian
    alone."""
    import torchjd.aggregation as jd

    return isinstance(aggregator, jd.GramianWeightedAggregator)


def aggregate(
    aggregator: jd.Aggregator,
    rows: Tensor,  # [m, P]
    gramian: Tensor,  # [m, m] float64
) -> tuple[Tensor, Tensor | None]:
    """Return the update [P] and, if the aggregator weights rows, its weights [m]; else None for the weights.

    An aggregator whose weights depend on the Gramian alone is given the float64 `gramian`.
    """
    import torchjd.aggregation as jd

    if isinstance(aggregator, jd.GramianWeightedAggregator):
        weights = aggregator.gramian_weighting(gramian)
    elif isinstance(aggregator, jd.WeightedAggregator):
        weights = aggregator.weighting(rows)
    else:
        return aggregator(rows), None
    return ops.combine(rows, weights), weights


def set_progress(aggregator: nn.Module | None, progress: float) -> None:
    """Tell an aggregator how far training is, from 0 at the first step to 1 at the last: COMFORT changes with
    it."""
    if aggregator is None:
        return
    from movae_fast.aggregation.comfort import MixtureWeighting

    for module in aggregator.modules():
        if isinstance(module, MixtureWeighting):
            module.progress.fill_(progress)


def aggregator_state(aggregator: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what an aggregator remembers between steps, for a checkpoint: the attributes of each of its
    modules, as plain values, tensors and tuples."""
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
    """Restore the state that `aggregator_state` returned, with its tensors on `device`."""
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
