"""The parts that a run is built of."""

import pytest
import torch

from movae_fast.aggregation.weightings import Sum
from movae_fast.training.build import build_aggregator, build_optimizer, compile_mode, new_model, plan_lengths
from movae_fast.training.config import ObjectiveConfig, OptimizerConfig, RunConfig, TrainConfig
from movae_fast.training.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**flags):
    return TrainConfig.from_flat({"dataset": "digits", "image_size": 32} | flags)


def test_rows_are_aggregated_only_where_something_needs_them():
    assert build_aggregator(ObjectiveConfig(), [1, 1], False, CPU) is None
    assert isinstance(build_aggregator(ObjectiveConfig(conflict_free="step"), [1, 1], False, CPU), Sum)
    mean = build_aggregator(ObjectiveConfig(agg="mean"), [1, 0, 2], True, CPU)
    torch.testing.assert_close(mean(torch.tensor([[2.0, 0.0], [0.0, 4.0]])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(("steps", "stage"), [(0, 6), (4, 4)])
@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({"arch": "mlp_vae"}, 1),
        ({"arch": "provlae", "num_ladders": 3}, 3),
        ({"arch": "provlae", "num_ladders": 3, "mode": "indep_train", "train_seq": 2}, 1),
    ],
)
def test_the_length_of_a_run_is_its_stages_lengths_together(flags, stages, steps, stage):
    asked = config(epochs=2, steps=steps, **flags)
    lengths, progression = plan_lengths(asked, new_model(asked), per_epoch=3)
    assert (lengths.epoch, lengths.stage, lengths.total) == (3, stage, stage * stages)
    assert (progression is None) == (asked.model.arch == "mlp_vae")


def test_the_learning_rates_schedule_begins_anew_with_each_stage():
    asked = config(arch="provlae", num_ladders=2, steps=4)
    model = new_model(asked)
    lengths, _ = plan_lengths(asked, model, per_epoch=3)
    _, schedule = build_optimizer(OptimizerConfig(scheduler="cosine"), model, lengths)
    factors = [schedule.lr_lambdas[0](step) for step in range(8)]
    assert factors[:4] == factors[4:]
    assert factors[0] > factors[3]


@pytest.mark.parametrize(
    ("run", "device", "captured", "part_of_batch", "mode"),
    [
        (RunConfig(), CPU, False, False, "off"),
        (RunConfig(), CUDA, False, False, "default"),
        (RunConfig(compile="max-autotune"), CUDA, False, False, "max-autotune"),
        (RunConfig(compile="max-autotune"), CUDA, True, False, "max-autotune-no-cudagraphs"),
        (RunConfig(compile="reduce-overhead"), CUDA, True, True, "off"),
    ],
)
def test_how_a_step_is_compiled(run, device, captured, part_of_batch, mode):
    assert compile_mode(run, device, World(), captured, part_of_batch) == mode


def test_a_layer_that_talks_to_other_processes_is_not_compiled():
    synchronised = RunConfig(compile="default", sync_batchnorm=True)
    assert compile_mode(synchronised, CPU, World(size=2), False, False) == "off"
    assert compile_mode(synchronised, CPU, World(size=1), False, False) == "default"
