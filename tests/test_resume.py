"""Where a run goes on: `--resume auto`, the first checkpoint, the log as a part of it, what is refused."""

import json
import os
import shutil

import pytest

from movae_fast.cli import main
from movae_fast.training import checkpoint, loop
from movae_fast.training.logs import TIMING_KEYS, Logs, read_lines
from movae_fast.training.signals import Interrupted
from movae_fast.training.telemetry import Telemetry

WANDB = type("Off", (), {"use_wandb": False})()


def lines(folder):
    return [
        {k: v for k, v in line.items() if k not in TIMING_KEYS} for line in read_lines(folder / "metrics.jsonl")
    ]


def last(folder):
    record = checkpoint.load(folder / "checkpoints" / "last.pt")
    return {k: checkpoint.digest(v) for k, v in record.items() if k not in ("config", "log")}


def stop_at(monkeypatch, step):
    """Let SIGTERM arrive after that step."""
    fit = loop.fit

    def stopping(run, bar):
        run.world.agree = lambda received: 15 if run.step == step else 0
        return fit(run, bar)

    monkeypatch.setattr("movae_fast.cli.train.fit", stopping)


def auto(folder, train, *flags, status=0):
    train(f"--exp_dir {folder}", "--resume auto", *FLAGS, *flags, status=status)


# The fixture gives no defaults to a command that resumes.
FLAGS = (
    "--dataset digits --image_size 16 --latent_dim 4 --hidden_dims 8 8 --epochs 2 --batch_size 100 "
    "--limit_train 300 --limit_test 64 --log_every 2 --seed 3 --device cpu",
)


def test_the_first_checkpoint_is_there_before_the_first_step(train, monkeypatch):
    whole = train("--epochs 2")
    with monkeypatch.context() as patch:
        patch.setattr("movae_fast.cli.train.fit", lambda *_: os.kill(os.getpid(), 0) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("--epochs 2")
    killed = whole.with_name("run2")
    assert checkpoint.load(killed / "checkpoints" / "last.pt")["position"]["step"] == 0
    train(f"--resume {killed}")
    assert lines(killed) == lines(whole)
    assert last(killed) == last(whole)


def test_auto_starts_and_goes_on(train, tmp_path, monkeypatch, capsys):
    whole, folder = train("--epochs 2"), tmp_path / "here"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        auto(folder, train, status=143)
    assert "continued" not in capsys.readouterr().out
    auto(folder, train)
    assert "continued at step 2" in capsys.readouterr().out
    assert lines(folder) == lines(whole)
    assert last(folder) == last(whole)
    auto(folder, train)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("leftover", ["checkpoints/.last.pt.4194305.tmp", ".config.yaml.4194305.tmp"])
def test_a_run_killed_before_its_first_checkpoint_is_no_obstacle(train, tmp_path, leftover):
    folder = tmp_path / "run1"  # of the fixture
    (folder / leftover).parent.mkdir(parents=True)
    (folder / leftover).write_text("half")
    train()
    assert not (folder / leftover).exists()


def test_auto_keeps_what_is_not_its_own(train, tmp_path):
    folder = tmp_path / "here"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("slurm.out", "config.yaml", "metrics.jsonl", "tensorboard/events"):
        (folder / name).write_text("mine")
    auto(folder, train)
    for name in ("slurm.out", "config.yaml.old", "metrics.jsonl.old", "tensorboard.old/events"):
        assert (folder / name).read_text() == "mine"
    assert lines(folder)


def test_auto_goes_on_from_the_latest_whole_checkpoint(train, tmp_path, capsys):
    whole, folder = train("--epochs 2", "--save_freq 1"), tmp_path / "here"
    auto(folder, train, "--save_freq 1")
    (folder / "checkpoints" / "best.pt").unlink()
    for name in ("last.pt", "epoch_0002.pt"):
        (folder / "checkpoints" / name).write_bytes(b"damaged")
    auto(folder, train, "--save_freq 1")
    assert "going on from epoch_0001.pt" in capsys.readouterr().out
    assert (folder / "checkpoints" / "last.pt.old").read_bytes() == b"damaged"
    assert last(folder) == last(whole)
    assert lines(folder) == lines(whole)
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(b"damaged")
    auto(folder, train, "--save_freq 1", status=2)
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_damaged_last_names_what_is_whole(train, capsys):
    """Where `best` is the same file, what damages one damages both; a kept epoch is a file of its own."""
    folder = train("--save_freq 1", "--epochs 2")
    best, last = (folder / "checkpoints" / f"{name}.pt" for name in ("best", "last"))
    whole = best.read_bytes()
    last.write_bytes(b"damaged")
    named = ["epoch_0002.pt (step "] if best.samefile(last) else ["epoch_0002.pt (step ", "best.pt (step "]
    for _ in range(2):
        for words in (["train", "--resume", str(folder)], ["evaluate", str(folder)]):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert "last.pt is truncated, damaged" in error
            assert all(part in error for part in named)
            assert error.count("\n") == 1
        best.unlink()
        best.write_bytes(whole)
        named = ["epoch_0002.pt (step ", "best.pt (step "]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exp_dir", "elsewhere"], "leave out --exp_dir elsewhere"),
        (["--save_path", "elsewhere"], "the run has --save_path runs"),
        (["--epochs", "1"], "the run has done 6 steps (2 epochs); --epochs 1 --steps 0 end it at 3"),
        (["--steps", "2"], "end it at 2"),
        (["--config", "demo"], "the run has "),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(train, capsys, flags, message):
    folder = train("--epochs 2")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert main(["train", "--resume", str(folder), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_run_s_own_folder_may_be_named(train):
    folder = train("--epochs 1")
    train(f"--resume {folder}", f"--exp_dir {folder}/../{folder.name}", "--epochs 2")
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["position"]["epoch"] == 2


def test_auto_needs_a_folder(capsys):
    assert main(["train", "--resume", "auto"]) == 2
    assert "--resume auto needs --exp_dir" in capsys.readouterr().err


def test_a_checkpoint_in_no_run_is_refused(train, tmp_path, capsys):
    folder = train()
    shutil.copy(folder / "checkpoints" / "last.pt", tmp_path / "last.pt")
    assert main(["train", "--resume", str(tmp_path / "last.pt")]) == 2
    assert "lies in no run" in capsys.readouterr().err


@pytest.mark.draws
def test_nothing_is_written_where_nothing_is_to_be_done(train, tmp_path):
    folder = train("--save_freq 1")
    (folder / "config.yaml").write_text("# my own\n")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
    train(f"--resume {folder}")
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.draws
@pytest.mark.parametrize("arch", ["vae", pytest.param("provlae", marks=pytest.mark.slow)])
def test_figures_that_are_missing_are_drawn(train, arch):
    flags = "--arch provlae --hidden_dims null --latent_dim 2 --hidden_dim 4 --image_size 32 --steps 2"
    folder = train(*([flags] if arch == "provlae" else []))
    whole = {p.name: p.read_bytes() for p in (folder / "figures").iterdir()}
    for name in [n for n in whole if "epoch_" in n]:
        (folder / "figures" / name).unlink()
        train(f"--resume {folder}")
        assert {p.name: p.read_bytes() for p in (folder / "figures").iterdir()} == whole


def test_an_export_that_a_kill_prevented_is_written(train, tmp_path, monkeypatch, capsys):
    target, folder = tmp_path / "weights.pth", tmp_path / "here"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        auto(folder, train, f"--export {target}", status=143)
    train(f"--resume {folder}")
    assert target.exists()
    auto(folder, train, f"--export {target}")  # finished, and its weights are there
    auto(folder, train, f"--export {target}", "--epochs 3", status=2)
    assert "exists and is not overwritten" in capsys.readouterr().err


# The log.


@pytest.fixture
def log(tmp_path):
    """A log with three lines before a mark and two after it."""
    logs = Logs(tmp_path, {}, WANDB, None)
    for step in (1, 2, 3):
        logs.write({"step": step, "train/a": step / 7})
    mark = logs.mark()
    for step in (3, 4):
        logs.write({"step": step, "test/a": 1.0})
    logs.close()
    return tmp_path / "metrics.jsonl", mark


def reopened(path, mark):
    logs = Logs(path.parent, {}, WANDB, 3, mark)
    logs.close()
    return logs.note


def test_the_log_is_cut_to_where_the_checkpoint_was_written(log):
    """Also a line of the checkpoint's own step, which came after it."""
    path, mark = log
    assert reopened(path, mark) == ""
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    assert "test/a" not in read_lines(path)[-1]


def test_a_log_without_a_mark_is_cut_by_steps(log):
    path, _ = log
    assert reopened(path, None) == ""
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 3]


@pytest.mark.parametrize("damage", [b"{", b"\0\0\0\0", b"[" * 100_000, b"5", b'{"a": 1}', b"{}"])
def test_a_damaged_line_drops_no_other(log, damage):
    path, mark = log
    texts = path.read_bytes().split(b"\n")
    texts[1] = damage
    path.write_bytes(b"\n".join(texts))
    assert [line["step"] for line in read_lines(path)] == [1, 3, 3, 4]
    note = reopened(path, mark)
    assert "1 damaged lines" in note
    assert "metrics.jsonl.old" in note
    assert path.with_name("metrics.jsonl.old").read_bytes() == b"\n".join(texts)
    assert path.read_bytes() == b"\n".join([texts[0], texts[2], texts[3], b""])


def test_bytes_that_are_no_text_are_an_error_that_names_the_line(log):
    path, mark = log
    texts = path.read_bytes().split(b"\n")
    texts[1] = b"\xff\xfe" + texts[1]
    path.write_bytes(b"\n".join(texts))
    for call in (lambda: read_lines(path), lambda: reopened(path, mark)):
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged: byte \d+ is not UTF-8"):
            call()
    assert path.read_bytes() == b"\n".join(texts)


def test_a_log_that_is_gone_is_said(log):
    path, mark = log
    path.unlink()
    assert "is gone" in reopened(path, mark)


def test_damage_after_the_mark_is_of_no_consequence(log):
    path, mark = log
    with path.open("ab") as file:
        file.write(b"\xff\xff half a li")
    assert reopened(path, mark) == ""
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]


def test_a_line_that_does_not_fit_leaves_none(tmp_path, monkeypatch):
    logs = Logs(tmp_path, {}, WANDB, None)
    logs.write({"step": 1})

    class Full:
        """A file that takes five bytes more."""

        def __init__(self, file):
            self.file, self.left = file, 5

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written, self.left = self.file.write(data[: self.left]), 0
            return written

        def truncate(self, length):
            self.file.truncate(length)

    file, logs.file = logs.file, Full(logs.file)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        logs.write({"step": 2})
    logs.file = file
    logs.close()
    assert logs.path.read_text() == json.dumps({"step": 1}) + "\n"


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((None, (1, 2, 3, 4)), (2, (3,))):
        logs = Logs(tmp_path, {}, WANDB, resume_step)
        for step in steps:
            logs.write({"step": step, "train/a": step / 4 + (resume_step or 0), "epoch": 1})
        logs.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/a"]
    # What the first one wrote after step 2 is dropped.
    assert [(e.step, e.value) for e in events.Scalars("train/a")] == [(1, 0.25), (2, 0.5), (3, 2.75)]


def test_a_best_checkpoint_of_the_last_epoch_is_of_a_finished_run(train):
    folder = train()
    before = lines(folder)
    train(f"--resume {folder}/checkpoints/best.pt")
    assert lines(folder) == before


@pytest.mark.parametrize("where", ["parsing", "setup", "fit"])
def test_ctrl_c_is_one_line_and_status_130(train, monkeypatch, capsys, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    place = {"parsing": "parsing.normalise", "setup": "setup", "fit": "fit"}[where]
    monkeypatch.setattr(f"movae_fast.cli.train.{place}", interrupt)
    train(status=130)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("go on with" in error) is (where == "fit")


def test_interrupted_keeps_its_name():
    assert str(Interrupted(15)) == "SIGTERM"


@pytest.mark.parametrize(
    "flags",
    [
        "--arch provlae --hidden_dims null --latent_dim 2 --hidden_dim 4 --image_size 32 --num_ladders 2 "
        "--epochs 1 --fade_in_duration 3",
        "--arch provlae --hidden_dims null --latent_dim 2 --hidden_dim 4 --image_size 32 --num_ladders 2 "
        "--epochs 1 --use_capacity_increase true --max_capacity 40 --capacity_max_iter 12",
    ],
    ids=["stages", "capacity"],
)
def test_an_evaluation_is_the_first_thing_after_a_resume(train, monkeypatch, flags):
    """Stopped after an epoch's last step: the weights and the capacity are those of that step."""
    whole = train(flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        part = train(flags, status=143)
    assert not any("test/loss" in line for line in lines(part))
    train(f"--resume {part}")
    assert lines(part) == lines(whole)
    assert last(part) == last(whole)


def test_a_log_line_on_its_way_to_the_host_is_part_of_the_checkpoint(train, monkeypatch):
    """As on a GPU, where a window arrives later than the step that ends it."""
    folder = train("--epochs 2")
    late = Telemetry.lines
    monkeypatch.setattr(Telemetry, "lines", lambda self, wait=False: late(self, wait) if wait else iter(()))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        part = train("--epochs 2", status=143)
    assert [line["step"] for line in lines(part)] == [1, 2]
    train(f"--resume {part}")
    assert lines(part) == lines(folder)


def test_a_run_goes_on_in_its_own_folder_from_inside_its_checkpoints(train, monkeypatch):
    folder = train("--epochs 2")
    monkeypatch.chdir(folder / "checkpoints")
    train("--resume last.pt", "--epochs 3")
    assert lines(folder)[-1]["epoch"] == 3
    assert {path.suffix for path in (folder / "checkpoints").iterdir()} == {".pt"}
