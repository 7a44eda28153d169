"""What TensorBoard, Weights & Biases and MLflow receive: metrics, pictures, settings, the configuration."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from movae_fast.cli import main
from movae_fast.training.log_lines import read_lines
from movae_fast.training.loop import images_due

EPOCHS = ("--epochs 2", "--log_images_every 1")


def events_of(folder):
    """Return what TensorBoard itself reads of a run."""
    loaded = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return loaded.Reload()


@pytest.mark.draws
def test_tensorboard_has_pictures_settings_and_the_configuration(train):
    folder = train(*EPOCHS, "--agg upgrad")
    events = events_of(folder)
    assert set(events.Tags()["images"]) == {"images/samples", "images/reconstructions"}
    images = events.Images("images/samples")
    assert [image.step for image in images] == [3, 6]
    shown = iio.imread(io.BytesIO(images[-1].encoded_image_string))
    assert np.array_equal(shown, iio.imread(folder / "figures" / "samples_epoch_0002.png"))
    assert (images[-1].height, images[-1].width) == shown.shape[:2]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    config = yaml.safe_load(text.removeprefix("```yaml").removesuffix("```"))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: config[name] for name in saved} == saved
    plugins = events.summary_metadata
    assert "_hparams_/session_start_info" in plugins
    assert b"upgrad" in plugins["_hparams_/session_start_info"].plugin_data.content


@pytest.mark.draws
def test_pictures_go_to_the_logs_when_they_are_drawn_unless_told_otherwise(train):
    for flags, steps in (((), [6]), (("--log_images_every 0",), [])):
        events = events_of(train("--epochs 2", *flags))
        tags = events.Tags()["images"]
        assert [i.step for i in events.Images("images/samples")] == steps if steps else tags == []


def test_when_pictures_are_due():
    def run(every, epoch, ended=False):
        flags = SimpleNamespace(run=SimpleNamespace(log_images_every=every))
        return SimpleNamespace(config=flags, epoch=epoch, ended=ended)

    assert images_due(run(None, 3), drawn=True)
    assert not images_due(run(None, 3), drawn=False)
    assert not images_due(run(0, 3, ended=True), drawn=True)
    assert [images_due(run(2, epoch), drawn=False) for epoch in (1, 2, 3, 4)] == [False, True, False, True]
    assert images_due(run(2, 3, ended=True), drawn=False)


def test_the_first_step_has_a_line_of_its_own(train):
    lines = [line for line in read_lines(train("--epochs 1") / "metrics.jsonl") if "train/lr" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]


@pytest.mark.draws
def test_weights_and_biases_get_the_same(train, monkeypatch):
    logged, given = [], {}

    class Fake:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            given["finished"] = True

    module = SimpleNamespace(Image=lambda picture: ("image", picture.shape))
    module.init = lambda **kwargs: given.update(kwargs) or Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(*EPOCHS, "--use_wandb")
    assert given["config"]["arch"] == "vae"
    assert given["finished"]
    pictures = [(step, values) for step, values in logged if "images/samples" in values]
    assert [step for step, _ in pictures] == [3, 6]
    assert all(v["images/reconstructions"][0] == "image" for _, v in pictures)
    assert any("test/loss" in values for _, values in logged)


@pytest.mark.slow
@pytest.mark.draws
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_metrics_settings_and_pictures_in_one_run(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    flags = ("--use_mlflow", f"--mlflow_uri {uri}", "--mlflow_experiment mine")
    folder = train(*EPOCHS, *flags)
    client = mlflow.MlflowClient(tracking_uri=uri)
    number = (folder / "mlflow_id").read_text()
    run = client.get_run(number)
    assert run.info.run_name == folder.name
    assert run.info.status == "FINISHED"
    assert run.data.params["arch"] == "vae"
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert run.data.metrics["test/loss"] == pytest.approx(last["test/loss"], rel=1e-12)
    assert [m.step for m in client.get_metric_history(number, "test/loss")] == [3, 6]
    assert {a.path for a in client.list_artifacts(number)} >= {"config.yaml", "images"}
    train(f"--resume {folder}", "--epochs 3")  # goes on in the same run
    assert [m.step for m in client.get_metric_history(number, "test/loss")] == [3, 6, 9]


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_fails_later_ends_no_run(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    from movae_fast.training.mlflow_log import MlflowLog

    log = MlflowLog.__new__(MlflowLog)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise ConnectionError("the server is gone")

    log.client, log.run, log.failed = SimpleNamespace(log_batch=fail, set_terminated=fail), "1", False
    with pytest.warns(UserWarning, match="the server is gone; the run goes on without it"):
        log.write(1, {"test/loss": 1.0})
    log.write(2, {"test/loss": 1.0})
    log.close()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_is_named_before_the_run(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    words = f"train --dataset digits --image_size 16 --hidden_dims 8 --steps 1 --use_{name} --exp_dir"
    assert main([*words.split(), str(tmp_path / "run")]) == 2
    assert f"pip install 'movae-fast[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
