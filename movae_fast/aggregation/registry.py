"""Make aggregators by name: every one that TorchJD offers, with its parameters by keyword.

A name is TorchJD's class name in snake case (`cagrad`, `imtl_g`, `nash_mtl`, …), plus `jd_sum` for its Sum and
`sum` (or None) for the ordinary backward of the summed loss, which needs no Jacobian.
"""

from __future__ import annotations

import inspect
import math
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchjd.aggregation as jd
from torch import Tensor, nn

from movae_fast import ops
from movae_fast.aggregation.upgrad import STRICT_REG_EPS, DualProj, UPGrad
from movae_fast.aggregation.weightings import IMTLG, MGDA, AlignedMTL, CAGrad, PCGrad
from movae_fast.names import nearest
from movae_fast.reference import Regularizer


def _upgrad(pref_vector: Tensor | None = None, cone: Mapping[str, Any] | None = None) -> jd.Aggregator:
    return UPGrad(pref_vector, **(cone or {}))


def _dualproj(pref_vector: Tensor | None = None, cone: Mapping[str, Any] | None = None) -> jd.Aggregator:
    return DualProj(pref_vector, **(cone or {}))


def _crmogm(
    weighting: str = "upgrad", alpha: float = 0.9, cone: Mapping[str, Any] | None = None
) -> jd.Aggregator:
    able = [n for n in AGGREGATORS if weights_by_gramian(n) and n != "crmogm"]
    if weighting not in able:
        raise ValueError(f"weighting {weighting}: unknown{nearest(weighting, able)}; valid: {', '.join(able)}")
    takes_cone = "cone" in inspect.signature(AGGREGATORS[weighting]).parameters
    inner = AGGREGATORS[weighting](**({"cone": cone} if takes_cone else {}))
    return jd.GramianWeightedAggregator(jd.CRMOGMWeighting(inner.gramian_weighting, alpha=alpha))


def _cagrad(c: float = 0.5, norm_eps: float = 1e-4) -> jd.Aggregator:
    return CAGrad(c=c, norm_eps=norm_eps)


def _fairgrad(alpha: float = 2.0, max_iters: int | None = None) -> jd.Aggregator:
    return jd.FairGrad(alpha=alpha, max_iters=max_iters)


def _krum(n_byzantine: int = 0, n_selected: int = 1) -> jd.Aggregator:
    return jd.Krum(n_byzantine=n_byzantine, n_selected=n_selected)


def _trimmed_mean(trim_number: int = 0) -> jd.Aggregator:
    return jd.TrimmedMean(trim_number=trim_number)


def _nash_mtl(
    n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
) -> jd.Aggregator:
    # cvxpy tells of the formulation at every solve; it is TorchJD's, and nothing a user can act on.
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
    return jd.NashMTL(n_tasks, max_norm, update_weights_every, optim_niter)


def _constant(weights: Sequence[float]) -> jd.Aggregator:
    return jd.Constant(torch.tensor(weights, dtype=torch.float32))


def _aligned_mtl_median(pref_vector: Tensor | None = None) -> jd.Aggregator:
    return AlignedMTL(pref_vector, scale_mode="median")


AGGREGATORS: dict[str, Callable[..., jd.Aggregator]] = {
    "jd_sum": jd.Sum,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "aligned_mtl": AlignedMTL,
    "aligned_mtl_median": _aligned_mtl_median,
    "cagrad": _cagrad,
    "config": jd.ConFIG,
    "constant": _constant,
    "crmogm": _crmogm,
    "excess_mtl": jd.ExcessMTL,
    "fairgrad": _fairgrad,
    "graddrop": jd.GradDrop,
    "gradvac": jd.GradVac,
    "imtl_g": IMTLG,
    "krum": _krum,
    "mean": jd.Mean,
    "mgda": MGDA,
    "nash_mtl": _nash_mtl,
    "pcd": jd.PCD,
    "pcgrad": PCGrad,
    "random": jd.Random,
    "trimmed_mean": _trimmed_mean,
}

# Those that run where the rows are and read nothing on the host; the rest are TorchJD's.
FUSED = ("upgrad", "dualproj", "aligned_mtl", "aligned_mtl_median", "cagrad", "imtl_g", "mgda", "pcgrad")

# Those that project onto the dual cone, and so have a regularizer.
CONES = ("upgrad", "dualproj", "crmogm")

# TorchJD's weightings that want two independent mini-batches a step: on one, they lose what they are for.
NEED_TWO_BATCHES = ("modo", "sdmgrad")

MOST_WHOLE = 1_000_000  # of an aggregator's whole numbers: rounds of a solver, rows, steps

# Set by the trainer rather than by a flag: the preference has its own flag, the rest follow from the run.
_NOT_FLAGS = ("pref_vector", "cone", "n_tasks", "f", "leak")


def aggregator_args(name: str) -> list[str]:
    """Return the names that `--agg_args.<name>` accepts for this aggregator."""
    parameters = inspect.signature(AGGREGATORS[name]).parameters
    return [p for p in parameters if p not in _NOT_FLAGS]


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
    factory = AGGREGATORS[name]
    known = inspect.signature(factory).parameters
    kinds = argument_kinds(name)
    options: dict[str, Any] = {}
    for key, value in (args or {}).items():
        valid = aggregator_args(name)
        if key not in valid:
            has = f"its parameters are {', '.join(valid)}" if valid else "it has no parameters"
            raise ValueError(f"--agg_args.{key}: {name} has no such parameter{nearest(key, valid)}; {has}")
        options[key] = checked_argument(name, key, value, kinds[key])
    if pref_weights is not None:
        if "pref_vector" not in known:
            takers = [n for n in AGGREGATORS if "pref_vector" in inspect.signature(AGGREGATORS[n]).parameters]
            raise ValueError(f"--pref_weights: {name} has no preference; these have: {', '.join(takers)}")
        if len(pref_weights) != m:
            raise ValueError(f"--pref_weights has {len(pref_weights)} values; {m} objectives are aggregated")
        if not all(math.isfinite(w) and w > 0 for w in pref_weights):
            raise ValueError(f"--pref_weights {list(pref_weights)}: each is a number above 0")
        options["pref_vector"] = torch.tensor(pref_weights, dtype=torch.float64)
    if "cone" in known:
        regularizer = regularizer or ("trace" if norm_eps > 0 else "diagonal")
        options["cone"] = {"norm_eps": norm_eps, "reg_eps": reg_eps, "regularizer": regularizer}
    if "n_tasks" in known:
        options["n_tasks"] = m
    if missing := [k for k in kinds if known[k].default is inspect.Parameter.empty and k not in options]:
        raise ValueError(f"--agg {name} needs --agg_args.{missing[0]}; its parameters are {', '.join(kinds)}")
    try:
        return factory(**options)
    except ImportError as error:
        remedy = "pip install 'movae-fast[solvers]'"
        raise ValueError(f"--agg {name} needs a solver that is not installed: {remedy} ({error})") from None
    except TypeError as error:
        raise ValueError(
            f"--agg {name}: {error}; its parameters are {', '.join(aggregator_args(name))}"
        ) from None
    except ValueError as error:
        raise ValueError(f"--agg_args of {name}: {error}") from None


def argument_kinds(name: str) -> dict[str, Any]:
    """Return the type of each argument that `aggregator_args` lists."""
    factory = AGGREGATORS[name]
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    return {key: hints[key] for key in aggregator_args(name)}


def checked_argument(name: str, key: str, value: Any, kind: Any) -> Any:
    """Return an aggregator's argument if it is of its kind; all their numbers are finite and not negative."""
    options = typing.get_args(kind) or (kind,)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        fits, wanted = value in options, f"one of {', '.join(options)}"
    elif kind is str:
        fits, wanted = isinstance(value, str), "a name"
    elif typing.get_origin(kind) is Sequence:
        numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
        fits, wanted = numbers and all(math.isfinite(v) for v in value), "a list of finite numbers"
    else:
        whole = int in options and float not in options
        inside = number and 0 <= value < math.inf
        if whole:
            inside = isinstance(value, int) and inside and value <= MOST_WHOLE
        fits = inside or (value is None and type(None) in options)
        wanted = f"a whole number from 0 to {MOST_WHOLE:,}" if whole else "a finite number, zero or more"
    if not fits:
        raise ValueError(f"--agg_args.{key} {value}: {name} takes {wanted}")
    return value


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


def weights_rows(name: str) -> bool:
    """Return whether the update of the aggregator called `name` is a weighted sum of rows."""
    return name not in ("config", "graddrop", "trimmed_mean")


def weights_by_gramian(name: str) -> bool:
    """Return whether the aggregator called `name` weights rows by their Gramian alone."""
    by_rows = ("excess_mtl", "nash_mtl")
    by_nothing = ("jd_sum", "mean", "constant", "random")
    return weights_rows(name) and name not in by_rows + by_nothing


def is_weighting(aggregator: nn.Module) -> bool:
    """Return whether the aggregator weights rows by their Gramian alone."""
    return isinstance(aggregator, jd.GramianWeightedAggregator)


def aggregate(
    aggregator: jd.Aggregator,
    rows: Tensor,  # [m, P]
    gramian: Tensor,  # [m, m] float64
) -> tuple[Tensor, Tensor | None]:
    """Return the update [P] and, where the aggregator weights rows, its weights [m].

    A weighting that sees only the Gramian gets the float64 one.
    """
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
