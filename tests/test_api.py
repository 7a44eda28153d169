"""`movae_fast.train`, `load` and `evaluate`, as a Python program calls them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import movae_fast
from movae_fast.cli import main
from movae_fast.names import ArgumentError
from movae_fast.training.train_step import StepMetrics
from tests.trained_models import FAMILIES, write_model

TINY = {
    "dataset": "digits",
    "image_size": 16,
    "latent_dim": 4,
    "hidden_dims": (8, 8),
    "epochs": 2,
    "batch_size": 100,
    "limit_train": 300,
    "limit_test": 64,
    "seed": 3,
    "device": "cpu",
    "recons_activation": "sigmoid",
}


def test_a_run_from_python_is_that_of_the_command_line(tmp_path: Path, capsys) -> None:
    """The same metrics to the last digit, and callbacks see every step, epoch and checkpoint."""
    steps, epochs, written = [], [], []
    run = movae_fast.train(
        **TINY,
        exp_dir=tmp_path / "python",
        on_step=lambda run, metrics: steps.append((run.step, type(metrics), metrics.losses.shape)),
        on_epoch_end=lambda run, metrics: epochs.append((run.epoch, metrics["test/loss"])),
        on_checkpoint=lambda run, path: written.append((path.name, path.is_file())),
    )
    assert "epoch 2/2" in capsys.readouterr().out
    assert steps == [(k, StepMetrics, (2,)) for k in range(1, 7)]
    assert [number for number, _ in epochs] == [1, 2]
    assert {("best.pt", True), ("last.pt", True)} <= set(written)
    words = [w for k, v in TINY.items() for w in (f"--{k}", *map(str, v if isinstance(v, tuple) else [v]))]
    assert main(["train", *words, "--exp_dir", str(tmp_path / "cli")]) == 0
    cli = movae_fast.TrainedRun.find(tmp_path / "cli")
    same = [
        name for name in run.metrics if "reconstruction" in name or name.startswith(("test/kl", "test/mse"))
    ]
    assert len(same) > 5
    assert {name: cli.metrics[name] for name in same} == {name: run.metrics[name] for name in same}
    assert epochs[-1][1] == run.metrics["test/loss"]
    assert {p.name for p in run.pictures()} >= {"loss_curves.png", "samples_epoch_0002.png"}
    assert run.config["latent_dim"] == 4
    assert "test split" in run._repr_html_()

    again = movae_fast.train(resume=run.folder, epochs=3, progress=False)
    assert capsys.readouterr().out.count("epoch 3/3") == 0
    assert again.history()[-1]["step"] == 9
    model = movae_fast.load(again)
    assert (movae_fast.evaluate(model, "objectives", limit_test=64, seed=3)["loss"]) == pytest.approx(
        again.metrics["test/loss"], rel=1e-5
    )
    with pytest.raises(ArgumentError, match=r"^resume .*the run has batch_size 100"):
        movae_fast.train(resume=run.folder, batch_size=50)


def test_a_callback_s_error_ends_the_run_and_a_signal_saves_it(tmp_path: Path) -> None:
    def fail(run, metrics):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        movae_fast.train(**TINY, exp_dir=tmp_path / "a", on_step=fail, progress=False)
    assert movae_fast.train(**TINY, exp_dir=tmp_path / "a", resume="auto", progress=False).history()

    def interrupt(run, metrics):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"saved at step 2; go on with movae_fast.train\(resume="):
        movae_fast.train(**TINY, exp_dir=tmp_path / "b", on_step=interrupt, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": "nope"}, "config nope: no such file or recipe"),
        ({"config": 3}, "config 3: give a recipe's name"),
        ({"ltaent_dim": 3}, "ltaent_dim: no such setting (did you mean latent_dim"),
        ({"lr": "fast"}, "lr 'fast': expected a number"),
        ({"lr": -1.0}, "lr -1.0 must be positive"),
        ({"arch": "vea"}, "arch vea: unknown (did you mean"),
        ({"resume": "auto"}, "resume auto needs exp_dir"),
        ({"on_step": 3}, "on_step 3 is no function"),
        ({"mode": "visualize", "arch": "provlae", "init_from": "x"}, "mode visualize"),
        ({"multirate": True, "beta_per": "batch", "layer_norm": "batch"}, "beta_per batch with gate_position"),
    ],
)
def test_wrong_settings_are_named(given, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as error:
        movae_fast.train(**given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "--" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_run_is_answered_with_those_that_are_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint or run at nope"):
        movae_fast.load("nope")
    (tmp_path / "runs" / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "config.yaml").write_text("arch: vae\n")
    with pytest.raises(ValueError, match=r"nope: .*below runs are one"):
        movae_fast.load("nope")
    with pytest.raises(ArgumentError, match="holds no run"):
        movae_fast.TrainedRun.find(tmp_path)


WIDE = [f for f in FAMILIES if f.startswith(("cnn_vae_", "resnet_vae_", "dcgan", "torch_vae"))]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in WIDE else ()) for f in FAMILIES]
)
def test_what_is_decoded_is_the_reconstruction(family: str, tmp_path: Path) -> None:
    """For every model; and the wrapper's images are the network's."""
    model = movae_fast.load(write_model(family, tmp_path), "cpu")
    assert not model.network.training
    x = torch.rand(5, *model.image_shape, generator=torch.Generator().manual_seed(0))
    z = model.encode(x)
    assert z.shape == (5, *model.latent_shape)
    assert not z.requires_grad
    seen = model.reconstruct(x)
    assert seen.shape == x.shape
    torch.testing.assert_close(model.decode(z), seen, rtol=1e-5, atol=1e-5)
    normalize = model.config.data.normalize
    with torch.no_grad():
        direct = model.network.reconstruct(2 * x - 1 if normalize else x)
    torch.testing.assert_close(seen, ((direct + 1) / 2 if normalize else direct).clamp(0, 1))
    assert seen.std() > 1e-4  # not all one value, which any decoder could give


def test_samples_are_the_seed_s(tmp_path: Path) -> None:
    model = movae_fast.load(write_model("mlp_vae", tmp_path))
    samples = model.sample(300, seed=4)  # more than one batch
    assert samples.shape == (300, *model.image_shape)
    assert torch.equal(samples, model.sample(300, seed=4))
    assert not torch.equal(samples[:3], model.sample(3, seed=5))
    assert not torch.equal(model.sample(3), model.sample(3))
    assert model.sample(300, seed=4, temperature=0.1).std(0).mean() < samples.std(0).mean() / 2


def test_images_of_other_types_and_wrong_ones(tmp_path: Path) -> None:
    model = movae_fast.load(write_model("vae", tmp_path))
    grey = np.random.default_rng(0).integers(0, 256, (3, 1, 16, 16), dtype=np.uint8)
    expected = model.encode(torch.from_numpy(grey) / 255)
    torch.testing.assert_close(model.encode(grey), expected)
    torch.testing.assert_close(model.encode(grey.astype(np.float64) / 255), expected)
    for wrong, message in (
        (grey[0], r"images \[1, 16, 16\]: expected \[N, 1, 16, 16\] \(of one image, give image\[None\]\)"),
        (grey[:, :, :8], r"images \[3, 1, 8, 16\]: expected"),
        (grey.astype(np.int64), "images of int64: give uint8"),
        (grey.astype(np.float32), "give values in"),
        (np.full((1, 1, 16, 16), np.nan, np.float32), "images from nan to nan"),
        (grey[:0], "expected"),
    ):
        with pytest.raises(ArgumentError, match=message):
            model.encode(wrong)
    with pytest.raises(ArgumentError, match=r"latents \[2, 4\]: expected \[N, 3\]"):
        model.decode(torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match="quantize needs a model with a codebook; vae has a vector"):
        model.quantize(torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="beta needs a multi-rate model"):
        model.set_beta(1.0)
    with pytest.raises(ArgumentError, match="n 0 must be"):
        model.sample(0)


def test_codes(tmp_path: Path) -> None:
    model = movae_fast.load(write_model("vq_vae", tmp_path))
    x = torch.rand(4, *model.image_shape)
    z = model.encode(x)
    codewords, indices = model.quantize(z)
    distance = (z[:, None] - model.network.codebook.detach()[None, :, :, None, None]).square().sum(2)
    assert torch.equal(indices, distance.double().argmin(1))
    assert len(indices.unique()) > 1
    torch.testing.assert_close(model.indices_to_image(indices), model.reconstruct(x))
    assert torch.equal(model.quantize(codewords).indices, indices)
    for wrong, message in ((indices + 16, "the codebook has 0 to 15"), (indices[0], "expected")):
        with pytest.raises(ArgumentError, match=message):
            model.indices_to_image(wrong)
    with pytest.raises(ArgumentError, match="posterior: vq_vae has a codebook"):
        model.posterior(x)


def test_a_multi_rate_model_computes_at_its_beta(tmp_path: Path) -> None:
    model = movae_fast.load(write_model("vae, multi-rate", tmp_path))
    x = torch.rand(2, *model.image_shape)
    assert model.beta == pytest.approx(1)
    at_one = model.encode(x)
    assert model.set_beta(0.02) is model
    assert model.beta == pytest.approx(0.02)
    at_little = model.encode(x)
    assert not torch.allclose(at_one, at_little, atol=1e-4)
    torch.testing.assert_close(model.set_beta(1).encode(x), at_one)
    with pytest.raises(ArgumentError, match="must be above 0"):
        model.set_beta(-1)
