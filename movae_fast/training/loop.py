"""Run the training loop.

A step (`TrainStep`) computes: forward, Jacobian rows, Gramian, weights, combine, clipping, the optimizer. The
learning-rate schedule advances after it. Nothing in a step reads a value on the host; metrics stay on the
device until a log line is due.
"""

from __future__ import annotations

from typing import Any

from movae_fast.data import Loader
from movae_fast.data.text import TextLoader
from movae_fast.training.encoder_steps import train_encoder
from movae_fast.training.evaluate import MeanImage, evaluate, mean_image, reconstruction_mse
from movae_fast.training.profiler import Profiler
from movae_fast.training.progress import Bar
from movae_fast.training.run import Run
from movae_fast.training.signals import Interrupted, Signals
from movae_fast.training.telemetry import COLLAPSED, NonFiniteError

NOT_FINITE = 1 << 16  # sent in place of a signal number, and larger than any of them


def fit(run: Run, bar: Bar) -> dict[str, float]:
    """Train to the last step and return the final test metrics.

    Raises Interrupted after SIGTERM or SIGINT, once the run is saved, and NonFiniteError for a loss that became
    NaN or infinite.
    """
    final: dict[str, float] = {}
    failed: NonFiniteError | None = None  # kept until all processes know of it
    with Signals() as signals, Profiler(run) as profiler:
        while not run.ended:
            run.model.train()
            left = () if run.finished else run.train_loader.epoch(run.epoch, start=run.batch)
            for x, _ in run.telemetry.waiting(left):
                run.begin_step()
                bar.compiling(run.train_step)
                sample_weight = run.train_loader.sample_weight_of(run.batch)
                part = train_encoder(run)
                metrics = run.train_step(x, run.step, run.noise(len(x)), log_due(run, 1), sample_weight, part)
                run.scheduler.step()
                run.telemetry.add(metrics, len(x))
                run.step, run.batch = run.step + 1, run.batch + 1
                run.callbacks.on_step(run, metrics)
                profiler.step()
                if log_due(run) or stage_ends(run):
                    run.telemetry.close(position(run), run.world)
                failed = failed or log_unless_failed(run, bar)
                bar.step()
                if stage_ends(run):
                    if failed:  # as at an epoch's end
                        raise failed
                    end_stage(run, bar)
                signum = run.world.agree(NOT_FINITE if failed else signals.received)
                if signum == NOT_FINITE:
                    raise failed or failure_elsewhere(run)
                if signum:
                    save(run, bar)
                    raise Interrupted(signum)
                if run.config.run.checkpoint_every and run.step % run.config.run.checkpoint_every == 0:
                    save(run, bar)
                if run.finished:
                    break
            if failed:  # every process reads the same window here, so all of them raise
                raise failed
            metrics_of_epoch = end_epoch(run, bar)
            run.callbacks.on_epoch_end(run, metrics_of_epoch)
            final = metrics_of_epoch or final
    return final


def log_unless_failed(run: Run, bar: Bar) -> NonFiniteError | None:
    """Write the log lines whose metrics have arrived; return the error of a loss that is not finite, or None.

    On several GPUs the metrics arrive at different times. A process that raised at once would leave the others
    waiting in an exchange, so the error is returned; the processes then agree and all raise after the same
    step.
    """
    try:
        log(run, bar)
    except NonFiniteError as error:
        if run.world.size == 1:
            raise
        return error
    return None


def failure_elsewhere(run: Run) -> Exception:
    """Return the NonFiniteError that another process reported, as found in this process's copy of the
    metrics."""
    try:
        for _ in run.telemetry.lines(wait=True):
            pass
    except NonFiniteError as error:
        return error
    return FloatingPointError(f"another process found a loss that is not finite, by step {run.step}")


def log_due(run: Run, ahead: int = 0) -> bool:
    """Return whether a log line is due after step `run.step + ahead`: every `log_every` batches, at the end of
    an epoch or the run, and after the first step, whose losses are those of an untrained model."""
    batch = run.batch + ahead
    last = batch == len(run.train_loader) or run.step + ahead in (1, run.total_steps)
    return last or batch % run.config.run.log_every == 0


def position(run: Run) -> dict[str, Any]:
    """Return the fields of a log line that locate it: step, epoch, learning rate, and what applies of two more.

    These are the number of steps of the encoder alone, and a ladder's stage and alpha.
    """
    line = {"step": run.step, "epoch": run.epoch, "train/lr": run.lr}
    if run.aggressive is not None:
        line["train/encoder_steps"] = run.aggressive.taken
    if run.progression is not None:
        last = run.step - 1
        line |= {"train/stage": run.progression.stage(last), "train/alpha": run.progression.alpha(last)}
    return line


def stage_ends(run: Run) -> bool:
    return run.progression is not None and run.progression.ends(run.step)


def end_stage(run: Run, bar: Bar) -> None:
    """Save the checkpoint of the stage that has ended and draw its pictures; those of the last stage are drawn
    at the end of the run."""
    assert run.progression is not None
    stage = run.progression.stage(run.step - 1)
    log(run, bar, wait=True)
    run.save(f"stage_{stage}")
    if run.draw is not None and run.world.main and not run.finished:
        run.draw(run, f"stage_{stage}")
    run.telemetry.restart_clock()


def log(run: Run, bar: Bar, wait: bool = False) -> None:
    """Write the log lines whose metrics have arrived on the host; with `wait`, wait for all of them."""
    for line in run.telemetry.lines(wait):
        bar.log(line)
        write(run, line)


def write(run: Run, line: dict[str, Any]) -> None:
    if run.logs is not None:
        run.logs.write(line)


def save(run: Run, bar: Bar) -> None:
    """Write the `last` checkpoint, and the log lines up to it; raise NonFiniteError instead if a loss since the
    last log line is not finite."""
    log(run, bar, wait=True)
    run.telemetry.check(run.step, run.world)
    run.save("last")


def warn_of_collapse(run: Run, bar: Bar) -> None:
    """Print a warning, with remedies, if hardly any code of the codebook is in use at the end of the first
    epoch."""
    used = run.telemetry.used
    if used is not None and used < COLLAPSED:
        bar.say(
            f"warning: the codebook has collapsed: {used:.1%} of its {run.telemetry.usage.numel():,} codes are "
            "in use at the end of the first epoch. Try a lower learning rate, fewer codes (num_embeddings) or "
            "a larger loss weight of embedding"
        )


def warn_of_skips(run: Run, bar: Bar) -> None:
    """Print a warning, with remedies, if every step so far was skipped."""
    seen, longest = run.telemetry.seen, run.config.optimizer.skip_grad_norm
    if seen and run.telemetry.left_out == seen:
        bar.say(
            f"warning: all {seen:,} steps so far were left out and nothing is trained: their gradients are "
            f"longer than skip_grad_norm {longest:g}, or losses are not finite"
        )


def pictures_due(run: Run) -> str:
    """Return the name for the pictures that are due now, at the end of an epoch or of the run; "" if none
    are."""
    every = run.config.run.save_freq
    kept = run.batch == 0 and run.epoch > 0 and every > 0 and run.epoch % every == 0
    return f"epoch_{run.epoch + (run.batch > 0):04d}" if kept or run.ended else ""


def images_due(run: Run, drawn: bool) -> bool:
    """Return whether the logs get pictures at the run's position, right after an epoch or at its end; `drawn`
    says that pictures are drawn there anyway."""
    every = run.config.run.log_images_every
    return drawn if every is None else every > 0 and (run.ended or run.epoch % every == 0)


def _besides(metrics: dict[str, float]) -> str:
    """Return, as text for the terminal, the test metrics other than the objectives."""
    names = ("mse", "token_perplexity", "mutual_information", "active_units")
    shown = [(name, metrics.get(f"test/{name}")) for name in names]
    return "".join(f"  {name.replace('_', ' ')} {value:.4g}" for name, value in shown if value is not None)


def validate(run: Run, loader: TextLoader, bar: Bar) -> None:
    """Evaluate on the validation split and log the metrics; then let the plateau schedule and the aggressive
    phase react."""
    run.world.average_buffers(run.model)
    with run.averaged():
        metrics = evaluate(run.model, run.losses, loader, run.config.run.seed or 0, run.world)
    line = {name.replace("test/", "valid/"): value for name, value in metrics.items()}
    write(run, {"step": run.step, "epoch": run.epoch, **line})
    if run.plateau is not None and run.plateau.end_epoch(metrics["test/loss"], run.epoch, run.model):
        run.restart_optimizer()
        bar.say(
            f"epoch {run.epoch}: the validation loss does not fall; learning rate {run.next_lr:g} from here on"
            + (", from the best weights so far" if run.plateau.reload else "")
        )
    if run.aggressive is not None and run.aggressive.on:
        run.aggressive.end_epoch(metrics["test/mutual_information"])
        if not run.aggressive.on:
            bar.say(
                f"epoch {run.epoch}: mutual information fell to {run.aggressive.information:.4g} nats; "
                "every step trains encoder and decoder from here on"
            )


def end_epoch(run: Run, bar: Bar) -> dict[str, float]:
    """Evaluate, save checkpoints and draw pictures, whichever are due at the end of an epoch or of the run.

    Returns the test metrics, empty if nothing was evaluated.
    """
    log(run, bar, wait=True)
    every, number = run.config.run, run.epoch + 1
    whole = run.batch == len(run.train_loader)  # not where --steps ends a run inside an epoch
    if whole:
        run.epoch, run.batch = number, 0
    if number == 1:
        warn_of_collapse(run, bar)
    warn_of_skips(run, bar)
    if whole and run.valid_loader is not None:
        validate(run, run.valid_loader, bar)
    due = whole and every.eval_freq > 0 and number % every.eval_freq == 0
    metrics: dict[str, float] = {}
    better = False
    if due or run.finished:
        run.world.average_buffers(run.model)
        with run.averaged():
            metrics = evaluate(run.model, run.losses, run.test_loader, every.seed or 0, run.world)
        if run.finished and isinstance(run.train_loader, Loader) and isinstance(run.test_loader, Loader):
            baseline = MeanImage(mean_image(run.train_loader), run.test_loader.normalize)
            metrics["test/mse_mean_image"] = reconstruction_mse(baseline, run.test_loader, run.world)
        write(run, {"step": run.step, "epoch": run.epoch, **metrics})
        names = run.losses.names
        bar.say(
            f"epoch {number}/{run.epochs}, step {run.step:,}: test "
            + "  ".join(f"{name} {metrics[f'test/{name}']:.4g}" for name in names)
            + _besides(metrics)
            + (f"  ({bar.metrics.split('  ')[-1]})" if "images/s" in bar.metrics else "")
        )
        run.ended = run.finished
        if better := metrics["test/loss"] < run.best:
            run.best = metrics["test/loss"]
            run.save("best")
    kept = whole and every.save_freq > 0 and number % every.save_freq == 0
    if kept:
        run.save(f"epoch_{number:04d}")
    if better:
        run.name_again("best", "last")
    else:
        run.save("last")
    tag = pictures_due(run)
    if run.draw is not None and run.world.main and tag:
        run.draw(run, tag)
    elif run.show is not None and run.world.main and whole and images_due(run, drawn=False):
        run.show(run)
    run.telemetry.restart_clock()
    return metrics
