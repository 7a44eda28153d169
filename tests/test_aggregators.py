"""Aggregators by name: all of TorchJD's, their parameters, their state."""

import re

import pytest
import torch
import torchjd.aggregation as jd

from movae_fast import ops
from movae_fast.aggregation.catalog import argument_kinds, checked_options
from movae_fast.aggregation.registry import (
    AGGREGATORS,
    NEED_TWO_BATCHES,
    aggregate,
    aggregator_args,
    aggregator_state,
    check_runs,
    load_aggregator_state,
    make_aggregator,
)

ARGS = {"constant": {"weights": [1.0, 2.0, 3.0]}}
# At least three rows are trimmed or trusted; these need the numbers that make sense for m = 3.
ARGS |= {"trimmed_mean": {"trim_number": 1}, "krum": {"n_byzantine": 0, "n_selected": 1}}


def rows(seed=0, m=3):
    return torch.randn(m, 50, generator=torch.Generator().manual_seed(seed))


def test_every_aggregator_of_torchjd_has_a_name():
    bases = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator"}
    classes = {n for n in jd.__all__ if not n.endswith("Weighting")} - bases
    only_weightings = {"CRMOGM", "MoDo", "SDMGrad"}
    squeezed = {n.replace("_", "") for n in (*AGGREGATORS, *NEED_TWO_BATCHES, "sum")}
    for name in classes | only_weightings:
        assert name.lower() in squeezed, name


@pytest.mark.parametrize("name", AGGREGATORS)
def test_each_aggregates(name):
    aggregator = make_aggregator(name, 3, ARGS.get(name))
    jacobian = rows()
    update, weights = aggregate(aggregator, jacobian, ops.gramian(jacobian))
    assert update.shape == (50,)
    assert update.isfinite().all()
    if weights is not None:
        torch.testing.assert_close(update, weights.to(jacobian) @ jacobian)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_strict_projection_protects_a_short_row(name):
    """Two rows at 120 degrees, one a thousand times shorter: TorchJD's reg_eps lets the update oppose it."""
    jacobian = torch.zeros(2, 50)
    jacobian[0, 0], jacobian[1, 0], jacobian[1, 1] = 1000.0, -0.5, 0.866
    strict, _ = aggregate(make_aggregator(name, 2), jacobian, ops.gramian(jacobian))
    loose, _ = aggregate(make_aggregator(name, 2, norm_eps=1e-4, reg_eps=1e-4), jacobian, ops.gramian(jacobian))
    cosine = [float(torch.cosine_similarity(u, jacobian[1], dim=0)) for u in (strict, loose)]
    assert cosine[0] > cosine[1]
    assert cosine[1] < -0.1


def test_scaling_the_losses_changes_no_decision():
    """TorchJD's norm_eps is absolute: small losses silently become their mean; strict UPGrad has no scale."""
    jacobian = rows(m=2)
    jacobian[1] = -0.5 * jacobian[0] + 0.1 * jacobian[1]
    weights = [
        aggregate(make_aggregator("upgrad", 2), jacobian * s, ops.gramian(jacobian * s))[1] for s in (1.0, 1e-6)
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)
    zero = torch.zeros(2, 50)
    _, at_zero = aggregate(make_aggregator("upgrad", 2), zero, ops.gramian(zero))
    assert at_zero.tolist() == [0.5, 0.5]


def test_preferences():
    jacobian = torch.eye(3, 50)
    aggregator = make_aggregator("upgrad", 3, None, [1.0, 2.0, 3.0])
    _, weights = aggregate(aggregator, jacobian, ops.gramian(jacobian))
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="2 values; 3 objectives"):
        make_aggregator("upgrad", 3, None, [1.0, 2.0])
    with pytest.raises(ValueError, match="mgda has no preference; these have: upgrad"):
        make_aggregator("mgda", 3, None, [1.0, 2.0, 3.0])


def test_parameters_are_checked():
    assert aggregator_args("cagrad") == ["c", "norm_eps"]
    assert make_aggregator("cagrad", 2, {"c": 0.25}).c == 0.25
    with pytest.raises(ValueError, match=r"--agg_args.d: cagrad has no such parameter.*c, norm_eps"):
        make_aggregator("cagrad", 2, {"d": 1})
    with pytest.raises(ValueError, match="it has no parameters"):
        make_aggregator("pcgrad", 2, {"c": 1})
    with pytest.raises(ValueError, match="its parameters are weights"):
        make_aggregator("constant", 2)
    with pytest.raises(ValueError, match=r"--agg_args.max_iters 0: mgda takes a whole number from 1"):
        make_aggregator("mgda", 2, {"max_iters": 0})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("mgda", {"max_iters": -1}, "--agg_args.max_iters -1: mgda takes a whole number from 1 to 1,000,000"),
        ("mgda", {"max_iters": 2.0}, "--agg_args.max_iters 2.0: mgda takes a whole number"),
        ("mgda", {"epsilon": -1.0}, "--agg_args.epsilon -1.0: mgda takes a finite number above 0"),
        ("cagrad", {"norm_eps": float("inf")}, "--agg_args.norm_eps inf: cagrad takes a finite number"),
        ("cagrad", {"c": float("nan")}, "--agg_args.c nan"),
        ("cagrad", {"c": "0.5"}, "--agg_args.c 0.5: cagrad takes a finite number"),
        ("cagrad", {"c": True}, "--agg_args.c True"),
        ("aligned_mtl", {"scale_mode": "most"}, "takes one of min, median, rmse"),
        ("constant", {"weights": [1.0, float("nan"), 1.0]}, "constant takes a list of finite numbers"),
        ("constant", {"weights": [1.0]}, "does not take the rows of 3 objectives"),
        ("crmogm", {"weighting": "mean"}, "crmogm takes one of upgrad, dualproj, aligned_mtl,"),
        ("krum", {"n_byzantine": 1}, "does not take the rows of 3 objectives"),
        ("krum", {"n_selected": 4}, "does not take the rows of 3 objectives"),
        ("trimmed_mean", {"trim_number": 2}, "does not take the rows of 3 objectives"),
        ("pcd", {"tau": 2}, "--agg_args.tau 2: pcd takes a number from 0 to 1"),
    ],
)
def test_what_no_step_could_use_is_refused_at_once(name, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_runs(name, 3, args)


# Of each kind of number its ends, what lies beside them, and the middle.
WHOLE, REAL = [0, 1, 2, 3, 4], [0, 0.01, 0.5, 1, 1.5]


def trials(name):
    """Yield arguments of an aggregator, each with a value at an end of its range or beside it."""
    kinds = argument_kinds(name)
    if name == "constant":
        yield from ({"weights": [1.0] * count} for count in range(1, 5))
        return
    yield {}
    for key, kind in kinds.items():
        if kind is str:
            yield from ({key: inner} for inner in [*AGGREGATORS, "nosuch"] if inner != "crmogm")
        elif kind in (int, float):
            yield from ({key: value} for value in (WHOLE if kind is int else REAL))


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_what_is_known_of_an_aggregators_arguments_is_what_its_class_says(name, m):
    """It is refused without torch exactly if the class, or its first step, refuses it."""
    matrix = torch.eye(m, m + 1) + 0.1
    for args in trials(name):
        try:
            options = checked_options(name, m, args)
            known = True
        except ValueError:
            options, known = args | ({"n_tasks": m} if name == "nash_mtl" else {}), False
        try:
            aggregator = AGGREGATORS[name](**options)
            aggregate(aggregator, matrix, ops.gramian(matrix))
            takes = True
        except (ValueError, TypeError, AttributeError, KeyError):
            takes = False
        assert known == takes, f"{name} {args}: {'taken' if known else 'refused'} by its flags"


@pytest.mark.parametrize(
    "weights", [[0.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [float("nan"), 1.0, 1.0], [float("inf"), 1.0, 1.0]]
)
def test_a_preference_is_positive(weights):
    with pytest.raises(ValueError, match="each is a number above 0"):
        check_runs("upgrad", 3, None, pref_weights=weights)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_trial_of_an_aggregator_draws_no_random_numbers(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_runs(name, 4, {"weights": [1.0] * 4} if name == "constant" else None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["gradvac", "pcd", "excess_mtl", "nash_mtl", "crmogm"])
def test_state_survives_a_checkpoint(name):
    """Three steps, save, two more: the same two updates from a fresh aggregator with the saved state."""
    first = make_aggregator(name, 3)
    for seed in range(3):
        aggregate(first, rows(seed), ops.gramian(rows(seed)))
    state = aggregator_state(first)
    second = make_aggregator(name, 3)
    load_aggregator_state(second, state)
    fresh = make_aggregator(name, 3)
    differs = False
    for seed in (3, 4):
        updates = []
        for aggregator in (first, second, fresh):
            torch.manual_seed(seed)
            updates.append(aggregate(aggregator, rows(seed), ops.gramian(rows(seed)))[0])
        torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=0)
        differs |= not torch.allclose(updates[0], updates[2])
    # The test can fail: without its state the aggregator answers differently (NashMTL's state is a warm start).
    assert differs or name == "nash_mtl"
