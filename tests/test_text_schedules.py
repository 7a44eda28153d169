"""The plateau schedule and the aggressive phase, which decide by the validation split; the separate clip."""

import math

import pytest
import torch
from torch import nn

from movae_fast.cli import main
from movae_fast.objectives import LossVector
from movae_fast.schedules import Cycles
from movae_fast.training.aggressive import Aggressive, Falling
from movae_fast.training.plateau import Plateau
from movae_fast.training.train_step import Part, TrainStep
from tests.test_lstm_vae import model_of, sentences
from tests.test_text_training import corpus, lines_of, text_run, weights

__all__ = ["corpus", "text_run"]  # fixtures
SGD = "--optimizer sgd --lr 1 --momentum 0 --max_grad_norm 5"
LAGGING = f"{SGD} --aggressive --aggressive_steps 7 --aggressive_window 2"
# The rate that is too large for the corpus makes the loss rise at once.
PLATEAU = "--optimizer sgd --lr 4 --momentum 0.5 --max_grad_norm 1 --scheduler plateau "
PLATEAU += "--plateau_after 1 --plateau_patience 1 --scheduler_gamma 0.5 --plateau_decays 3 --eval_freq 0"


# --- the schedule ---------------------------------------------------------------------------------------------


def published(losses, after, patience, most):
    """He et al.'s rule, as a list of the learning rate's factors by epoch, and the epoch whose weights are used
    from then on."""
    reference, best, worse, decays, factors, used = math.inf, math.inf, 0, 0, [], []
    kept = None
    for epoch, loss in enumerate(losses):
        if loss < best:
            best, kept = loss, epoch
        now = epoch
        if loss > reference:
            worse += 1
            if worse >= patience and epoch >= after:
                reference, worse, decays, now = loss, 0, decays + 1, kept
        else:
            reference, worse = loss, 0
        factors.append(0.5**decays)
        used.append(now)
        if decays == most:
            break
    return factors, used


@pytest.mark.parametrize("seed", range(6))
def test_the_plateau_schedule_is_the_published_one(seed):
    generator = torch.Generator().manual_seed(seed)
    losses = (torch.rand(40, generator=generator) + 3 * torch.linspace(1, 0, 40)).tolist()
    plateau, model = Plateau(2, 5, 0.5, 4, reload=True), nn.Linear(1, 1)
    factors, used = [], []
    for epoch, loss in enumerate(losses):
        with torch.no_grad():
            model.weight.fill_(epoch)
        plateau.end_epoch(loss, epoch + 1, model)
        factors.append(plateau.factor)
        used.append(int(model.weight))
        if plateau.over:
            break
    assert (factors, used) == published(losses, 5, 2, 4)
    assert plateau.decays == 4


def test_a_loss_that_is_not_a_number_is_worse():
    plateau, model = Plateau(1, 0, 0.5, 0, reload=True), nn.Linear(1, 1)
    assert not plateau.end_epoch(1.0, 1, model)
    assert plateau.end_epoch(math.nan, 2, model)
    assert plateau.best == 1.0


def test_annealing_is_the_published_one():
    """From 0.1 to 1 over 10 of 100 epochs, as in docs/text.md; published weights are one increment ahead."""
    per_epoch, start = 50, 0.1
    ours = Cycles("linear", 100 * per_epoch, 1, start, 1.0, 0.1)
    rate, weight = (1 - start) / (10 * per_epoch), start
    for step in range(12 * per_epoch):
        assert ours(step) == pytest.approx(weight, abs=1e-9)
        weight = min(1.0, weight + rate)
    assert ours(12 * per_epoch) == 1


def test_a_run_goes_on_bit_for_bit_through_a_decay(text_run, capsys):
    """The checkpoint lies before the first decay and behind the best weights."""
    whole = text_run(PLATEAU, "--epochs 30", name="whole")
    out = capsys.readouterr().out
    assert out.count("the validation loss does not fall") == 3
    valid = [line for line in lines_of(whole) if "valid/loss" in line]
    rates = [line["train/lr"] for line in lines_of(whole) if "train/lr" in line]
    assert set(rates) >= {4.0, 2.0, 1.0}
    assert len(valid) < 30, "the third decay ends the run"
    first = next(line["step"] for line in lines_of(whole) if line.get("train/lr") == 2.0)
    part = text_run(PLATEAU, "--epochs 30", f"--steps {first - 6}", name="part")
    assert main(["train", "--resume", str(part), "--steps", "0"]) == 0
    one, other = weights(whole), weights(part)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = ("step", "epoch", "train/lr", "valid/loss", "test/loss")
    mine, theirs = (
        [{k: v for k, v in line.items() if k in kept} for line in lines_of(f)] for f in (whole, part)
    )
    assert mine[-4:] == theirs[-4:]
    capsys.readouterr()
    assert main(["train", "--resume", str(part), "--steps", "0", "--limit_test", "5"]) == 2
    assert "a resumed run keeps it" in capsys.readouterr().err
    assert main(["train", "--resume", str(whole)]) == 0
    assert "decayed --plateau_decays times" in capsys.readouterr().out


def test_a_decay_takes_the_best_weights_and_forgets_the_momentum(text_run):
    folder = text_run(PLATEAU, "--plateau_decays 1", "--epochs 30")
    content = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    losses = [line["valid/loss"] for line in lines_of(folder) if "valid/loss" in line]
    assert content["plateau"]["best"] == min(losses) < losses[-1]
    assert all(torch.equal(value, content["plateau"]["weights"][k]) for k, value in content["model"].items())
    momenta = [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]
    assert momenta
    assert not any(m.any() for m in momenta)


# --- the aggressive phase -------------------------------------------------------------------------------------


def test_the_encoder_stops_where_a_window_is_worse_than_the_last():
    losses = [5.0, 3.0, 2.0, 2.0, 1.0, 2.9, 1.0, 9.0]  # means of two, by tokens: 3.5, 2, 2.425, …
    tokens = [1.0, 3.0, 2.0, 2.0, 1.0, 3.0, 1.0, 1.0]
    falling = Falling(2)
    answers = [falling.goes_on(torch.tensor([a * n, n])) for a, n in zip(losses, tokens, strict=True)]
    assert answers[:6] == [True] * 5 + [False]


def test_the_phase_ends_for_good_with_the_first_fall():
    phase = Aggressive(10, 5)
    for information, on in ((0.4, True), (0.4, True), (0.3, False), (0.9, False)):
        phase.end_epoch(information)
        assert phase.on is on
    collapsed = Aggressive(10, 5)
    collapsed.end_epoch(-0.01)
    assert not collapsed.on


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("part", list(Part))
def test_a_step_of_a_part_leaves_the_other_as_it_is(optimizer, part):
    model = model_of("lagging")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = LossVector(model, [1.0, 1.0], "gaussian", "sum", n_data=4)
    made = optimizer(model.parameters(), lr=0.1)
    step = TrainStep(model, losses, None, made, max_grad_norm=0.01)
    noise = model.draw_noise(4)
    step(sentences(T=10), 0, noise, part=part)
    task = {id(p) for p in model.task_parameters()["reconstruction"]}
    for name, p in model.named_parameters():
        moves = {Part.ALL: True, Part.SHARED: id(p) not in task, Part.TASK: id(p) in task}[part]
        assert torch.equal(p, before[name]) is not moves, name
        assert p.grad is not None
    # The norm that is clipped is that of both parts.
    assert float(step.flat.grad.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_run_in_the_aggressive_phase_goes_on_bit_for_bit(text_run):
    """Steps of the encoder are a function of the seed and the step; the phase is part of the checkpoint."""
    flags = f"{LAGGING} --batch_size 2 --log_every 1"
    whole = text_run(flags, "--steps 19", name="whole")
    taken = [line["train/encoder_steps"] for line in lines_of(whole) if "train/encoder_steps" in line]
    assert taken[6] > 7, "the phase is on where the other run stops"
    part = text_run(flags, "--steps 7", name="part")
    assert main(["train", "--resume", str(part), "--steps", "19"]) == 0
    one, other = weights(whole), weights(part)
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = [line["train/encoder_steps"] for line in lines_of(part) if "train/encoder_steps" in line]
    assert again == taken


def test_encoder_steps_change_what_is_learnt(text_run):
    plain = text_run(SGD, "--steps 6", name="plain")
    lagging = text_run(LAGGING, "--steps 6", name="lagging")
    one, other = weights(plain), weights(lagging)
    assert not torch.equal(one["mu.weight"], other["mu.weight"])
    assert [line for line in lines_of(lagging) if "valid/mutual_information" in line] == []  # no whole epoch


# --- the separate clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_the_norms_of_the_parts_are_clipped_apart(apart):
    model = model_of("lagging")
    losses = LossVector(model, [1.0, 1.0], "gaussian", "sum", n_data=4)
    whole, noise = TrainStep(model, losses, None), model.draw_noise(4)
    whole.gradient(sentences(T=10), 0, noise)
    shared, task = whole.flat.shared_grad.clone(), whole.flat.task_grad.clone()
    limit = float(shared.norm()) / 2
    made = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainStep(model, losses, None, made, max_grad_norm=limit, clip_apart=apart)
    step(sentences(T=10), 0, noise)
    norm = float(torch.cat([shared, task]).norm())
    factors = (limit / norm,) * 2 if not apart else (0.5, min(1.0, limit / float(task.norm())))
    for got, expected, factor in zip(
        (step.flat.shared_grad, step.flat.task_grad), (shared, task), factors, strict=True
    ):
        torch.testing.assert_close(got, expected * factor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--dataset digits --arch vae --scheduler plateau", "decides by a validation split"),
        ("--dataset digits --arch vae --aggressive", "decides by a validation split"),
        ("--plateau_patience 3", "add --scheduler plateau"),
        ("--scheduler plateau --scheduler_gamma 1", "--scheduler_gamma 1"),
        ("--scheduler plateau --ema_decay 0.9", "add --plateau_reload false"),
        ("--aggressive_steps 3", "add --aggressive"),
        ("--aggressive --agg upgrad --jacobian all", "leave --jacobian at shared"),
        ("--aggressive --agg upgrad --conflict_free step", "leave out --conflict_free step"),
        ("--aggressive --agg upgrad --gramian_every 2", "--gramian_every"),
        ("--clip_per part", "add --max_grad_norm"),
        ("--clip_per part --max_grad_norm 1 --agg upgrad --jacobian all", "are one part"),
    ],
)
def test_what_makes_no_sense_is_refused(text_run, tmp_path, capsys, flags, match):
    text_run(flags, status=2)
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
