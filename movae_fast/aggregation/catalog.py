"""List the aggregators by name, with their parameters: those of TorchJD, and MO-VAE's `comfort` and
`nupgrad`.

A name is TorchJD's class name in snake case (`cagrad`, `imtl_g`, `nash_mtl`, …), plus `jd_sum` for its Sum and
`sum` (or None) for an ordinary backward pass of the summed loss, which needs no Jacobian.

Neither torch nor TorchJD is imported before an aggregator is made, so names and parameters are checked fast.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from movae_fast.bounds import Bounds
from movae_fast.choices import STRICT_REG_EPS, Regularizer
from movae_fast.names import nearest

if TYPE_CHECKING:
    from torch import Tensor
    from torchjd.aggregation import Aggregator


def _torchjd(name: str, *args: Any, **kwargs: Any) -> Aggregator:
    import torchjd.aggregation

    return getattr(torchjd.aggregation, name)(*args, **kwargs)


def _jd_sum() -> Aggregator:
    return _torchjd("Sum")


def _upgrad(pref_vector: Tensor | None = None, cone: Mapping[str, Any] | None = None) -> Aggregator:
    from movae_fast.aggregation.upgrad import UPGrad

    return UPGrad(pref_vector, **(cone or {}))


def _dualproj(pref_vector: Tensor | None = None, cone: Mapping[str, Any] | None = None) -> Aggregator:
    from movae_fast.aggregation.upgrad import DualProj

    return DualProj(pref_vector, **(cone or {}))


def _aligned_mtl(
    pref_vector: Tensor | None = None, scale_mode: Literal["min", "median", "rmse"] = "min"
) -> Aggregator:
    from movae_fast.aggregation.weightings import AlignedMTL

    return AlignedMTL(pref_vector, scale_mode)


def _aligned_mtl_median(pref_vector: Tensor | None = None) -> Aggregator:
    return _aligned_mtl(pref_vector, "median")


def _cagrad(c: float = 0.5, norm_eps: float = 1e-4) -> Aggregator:
    from movae_fast.aggregation.weightings import CAGrad

    return CAGrad(c=c, norm_eps=norm_eps)


def _comfort(
    k: float = 1.0,
    a: float = 1.0,
    first: float = 0.01,
    last: float = 1.0,
    epsilon: float = 1e-5,
    max_iters: int = 250,
    cone: Mapping[str, Any] | None = None,
) -> Aggregator:
    from movae_fast.aggregation.comfort import COMFORT

    return COMFORT(k, a, first, last, epsilon, max_iters, **(cone or {}))


def _config(pref_vector: Tensor | None = None) -> Aggregator:
    return _torchjd("ConFIG", pref_vector)


def _constant(weights: Sequence[float]) -> Aggregator:
    import torch

    return _torchjd("Constant", torch.tensor(weights, dtype=torch.float32))


def _crmogm(weighting: str = "upgrad", alpha: float = 0.9, cone: Mapping[str, Any] | None = None) -> Aggregator:
    takes_cone = "cone" in inspect.signature(AGGREGATORS[weighting]).parameters
    inner = AGGREGATORS[weighting](**({"cone": cone} if takes_cone else {}))
    return _torchjd(
        "GramianWeightedAggregator", _torchjd("CRMOGMWeighting", inner.gramian_weighting, alpha=alpha)
    )


def _excess_mtl(robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> Aggregator:
    return _torchjd("ExcessMTL", robust_step_size=robust_step_size, n_warmup_steps=n_warmup_steps)


def _fairgrad(alpha: float = 2.0, max_iters: int | None = None) -> Aggregator:
    return _torchjd("FairGrad", alpha=alpha, max_iters=max_iters)


def _graddrop() -> Aggregator:
    return _torchjd("GradDrop")


def _gradvac(beta: float = 0.5, eps: float = 1e-8) -> Aggregator:
    return _torchjd("GradVac", beta=beta, eps=eps)


def _imtl_g() -> Aggregator:
    from movae_fast.aggregation.weightings import IMTLG

    return IMTLG()


def _krum(n_byzantine: int = 0, n_selected: int = 1) -> Aggregator:
    return _torchjd("Krum", n_byzantine=n_byzantine, n_selected=n_selected)


def _mean() -> Aggregator:
    return _torchjd("Mean")


def _mgda(epsilon: float = 0.001, max_iters: int = 100) -> Aggregator:
    from movae_fast.aggregation.weightings import MGDA

    return MGDA(epsilon, max_iters)


def _nash_mtl(
    n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
) -> Aggregator:
    import warnings

    # cvxpy warns about the formulation at every solve; it is TorchJD's, and users cannot change it.
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
    return _torchjd("NashMTL", n_tasks, max_norm, update_weights_every, optim_niter)


def _nupgrad(
    pref_vector: Tensor | None = None,
    row_lengths: Literal["own", "shortest"] = "own",
    cone: Mapping[str, Any] | None = None,
) -> Aggregator:
    from movae_fast.aggregation.nupgrad import NUPGrad

    return NUPGrad(pref_vector, **(cone or {}), row_lengths=row_lengths)


def _pcd(tau: float = 0.02, beta: float = 0.999, eps: float = 1e-8) -> Aggregator:
    return _torchjd("PCD", tau=tau, beta=beta, eps=eps)


def _pcgrad() -> Aggregator:
    from movae_fast.aggregation.weightings import PCGrad

    return PCGrad()


def _random() -> Aggregator:
    return _torchjd("Random")


def _trimmed_mean(trim_number: int = 0) -> Aggregator:
    return _torchjd("TrimmedMean", trim_number=trim_number)


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "jd_sum": _jd_sum,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "aligned_mtl": _aligned_mtl,
    "aligned_mtl_median": _aligned_mtl_median,
    "cagrad": _cagrad,
    "comfort": _comfort,
    "config": _config,
    "constant": _constant,
    "crmogm": _crmogm,
    "excess_mtl": _excess_mtl,
    "fairgrad": _fairgrad,
    "graddrop": _graddrop,
    "gradvac": _gradvac,
    "imtl_g": _imtl_g,
    "krum": _krum,
    "mean": _mean,
    "mgda": _mgda,
    "nash_mtl": _nash_mtl,
    "nupgrad": _nupgrad,
    "pcd": _pcd,
    "pcgrad": _pcgrad,
    "random": _random,
    "trimmed_mean": _trimmed_mean,
}

# Aggregators that run on the rows' device and read nothing on the host; the rest are TorchJD's own.
FUSED = (
    *("upgrad", "dualproj", "nupgrad", "comfort"),
    *("aligned_mtl", "aligned_mtl_median", "cagrad", "imtl_g", "mgda", "pcgrad"),
)

# Aggregators that project onto the dual cone, and so have a regularizer.
CONES = ("upgrad", "dualproj", "nupgrad", "comfort", "crmogm")

# TorchJD's weightings that need two independent mini-batches per step; with one their guarantees are lost.
NEED_TWO_BATCHES = ("modo", "sdmgrad")

MOST_WHOLE = 1_000_000  # largest value of an aggregator's integer options, such as iterations of a solver

# Of an aggregator's numbers, all of them zero or more, those that have less room, as their classes say. TorchJD
# would say it too, after the seconds that importing it takes.
BOUNDS = {
    ("comfort", "a"): Bounds(0, above=True),
    ("comfort", "first"): Bounds(0, 1),
    ("comfort", "last"): Bounds(0, 1),
    ("comfort", "epsilon"): Bounds(0, above=True),
    ("comfort", "max_iters"): Bounds(1, MOST_WHOLE),
    ("crmogm", "alpha"): Bounds(0, 1),
    ("excess_mtl", "robust_step_size"): Bounds(0, above=True),
    ("gradvac", "beta"): Bounds(0, 1),
    ("krum", "n_selected"): Bounds(1, MOST_WHOLE),
    ("mgda", "epsilon"): Bounds(0, above=True),
    ("mgda", "max_iters"): Bounds(1, MOST_WHOLE),
    ("nash_mtl", "update_weights_every"): Bounds(1, MOST_WHOLE),
    ("nash_mtl", "optim_niter"): Bounds(1, MOST_WHOLE),
    ("pcd", "tau"): Bounds(0, 1),
    ("pcd", "beta"): Bounds(0, 1, below=True),
}

# Set by the trainer rather than by a flag: the preference has its own flag, the rest follow from the run.
_NOT_FLAGS = ("pref_vector", "cone", "n_tasks")


def aggregator_args(name: str) -> list[str]:
    """Return the parameters of the aggregator `name` that a user can set as `--agg_args.<parameter>`."""
    parameters = inspect.signature(AGGREGATORS[name]).parameters
    return [p for p in parameters if p not in _NOT_FLAGS]


def checked_options(
    name: str,
    m: int,
    args: Mapping[str, Any] | None = None,
    pref_weights: Sequence[float] | None = None,
    norm_eps: float = 0.0,
    reg_eps: float = STRICT_REG_EPS,
    regularizer: Regularizer | None = None,
) -> dict[str, Any]:
    """Check the settings of the aggregator `name` for m objectives; return the keyword arguments that make it.

    The arguments are those of `registry.make_aggregator`; a preference is returned as a list of numbers. Raises
    ValueError for a parameter or a preference that the aggregator does not have, or a value out of range.
    """
    known = inspect.signature(AGGREGATORS[name]).parameters
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
        options["pref_vector"] = pref_weights
    if "cone" in known:
        regularizer = regularizer or ("trace" if norm_eps > 0 else "diagonal")
        options["cone"] = {"norm_eps": norm_eps, "reg_eps": reg_eps, "regularizer": regularizer}
    if "n_tasks" in known:
        options["n_tasks"] = m
    if missing := [k for k in kinds if known[k].default is inspect.Parameter.empty and k not in options]:
        raise ValueError(f"--agg {name} needs --agg_args.{missing[0]}; its parameters are {', '.join(kinds)}")
    check_rows(name, m, {k: options.get(k, known[k].default) for k in kinds})
    return options


def check_rows(name: str, m: int, args: Mapping[str, Any]) -> None:
    """Raise ValueError if the aggregator with the parameters `args` cannot aggregate m objectives."""
    if name == "crmogm":
        inner = args["weighting"]
        kinds = argument_kinds(inner)
        parameters = inspect.signature(AGGREGATORS[inner]).parameters
        check_rows(inner, m, {k: parameters[k].default for k in kinds})
    reason = ""
    if name == "krum":
        least = max(args["n_byzantine"] + 3, args["n_selected"])
        reason = f"it needs {least} or more (n_byzantine + 3 and n_selected)" if m < least else ""
    elif name == "trimmed_mean":
        least = 2 * args["trim_number"] + 1
        reason = f"it needs {least} or more (2 * trim_number + 1)" if m < least else ""
    elif name == "constant":
        count = len(args["weights"])
        reason = f"its weights are {count}" if m != count else ""
    elif name == "nash_mtl" and m == 1:
        reason = "it bargains between two or more"
    if reason:
        raise ValueError(f"--agg {name} does not take the rows of {m} objectives: {reason}")


def argument_kinds(name: str) -> dict[str, Any]:
    """Return the annotated type of each parameter that `aggregator_args` lists."""
    factory = AGGREGATORS[name]
    parameters = inspect.signature(factory).parameters
    # Resolve the types of these arguments only: others' types name classes of torch, which is not imported.
    wanted = SimpleNamespace(__annotations__={key: parameters[key].annotation for key in aggregator_args(name)})
    return typing.get_type_hints(wanted, getattr(factory, "__globals__", None))


def checked_argument(name: str, key: str, value: Any, kind: Any) -> Any:
    """Return the value of an aggregator's parameter `key` if it has the type `kind` and lies in its range.

    Raises ValueError otherwise.
    """
    options, near = typing.get_args(kind) or (kind,), ""
    if typing.get_origin(kind) is typing.Literal:
        fits, wanted = value in options, f"one of {', '.join(options)}"
    elif kind is str:  # the name of an aggregator that weights rows by their Gramian
        able = [n for n in AGGREGATORS if weights_by_gramian(n) and n != "crmogm"]
        fits, wanted, near = value in able, f"one of {', '.join(able)}", nearest(str(value), able)
    elif typing.get_origin(kind) is Sequence:
        numbers = isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value)
        fits, wanted = numbers and all(math.isfinite(v) for v in value), "a list of finite numbers"
    else:
        whole = int in options and float not in options
        bounds = BOUNDS.get((name, key), Bounds(0, MOST_WHOLE) if whole else Bounds(0))
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        fits = (number and not bounds.refusal(value)) or (value is None and type(None) in options)
        wanted = range_in_words(bounds, whole)
    if not fits:
        raise ValueError(f"--agg_args.{key} {value}{near}: {name} takes {wanted}")
    return value


def range_in_words(bounds: Bounds, whole: bool) -> str:
    """Return an error message's description of the numbers within the bounds."""
    if whole:
        return f"a whole number from {bounds.least} to {bounds.most:,}"
    if math.isinf(bounds.most):
        return "a finite number above 0" if bounds.above else "a finite number, zero or more"
    return f"a number from {bounds.least:g} to {'below ' if bounds.below else ''}{bounds.most:g}"


def weights_rows(name: str) -> bool:
    """Return whether the update of the aggregator called `name` is a weighted sum of rows."""
    return name not in ("config", "graddrop", "trimmed_mean")


def weights_by_gramian(name: str) -> bool:
    """Return whether the aggregator called `name` weights rows by their Gramian alone."""
    by_rows = ("excess_mtl", "nash_mtl")
    by_nothing = ("jd_sum", "mean", "constant", "random")
    return weights_rows(name) and name not in by_rows + by_nothing
