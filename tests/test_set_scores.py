"""Scores of sets of images: closed forms, an independent NumPy version, and the command."""

import json

import numpy as np
import pytest
import torch

import movae_fast
from movae_fast.cli import main
from movae_fast.evaluation import feature_networks, inception
from movae_fast.evaluation.feature_networks import RandomNetwork, load_network, reference_features
from movae_fast.evaluation.sample_scores import density_coverage, precision_recall
from movae_fast.evaluation.set_scores import check_count
from movae_fast.names import ArgumentError


def numpy_scores(real, fake, k_recall=3, k_coverage=5):
    """Precision, recall, density, coverage by plain loops over sorted distances."""

    def radius(points, i, k):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    def within(point, centres, radii):
        return [np.linalg.norm(point - c) <= r for c, r in zip(centres, radii, strict=True)]

    def radii(points, k):
        return [radius(points, i, k) for i in range(len(points))]

    precision = np.mean([any(within(f, real, radii(real, k_recall))) for f in fake])
    recall = np.mean([any(within(r, fake, radii(fake, k_recall))) for r in real])
    balls = np.array([within(f, real, radii(real, k_coverage)) for f in fake])
    return precision, recall, balls.sum() / (k_coverage * len(fake)), balls.any(0).mean()


def test_precision_recall_density_and_coverage_are_numpys(monkeypatch):
    monkeypatch.setattr("movae_fast.evaluation.sample_scores.BLOCK", 7)
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((30, 3)), 1.2 + rng.standard_normal((22, 3))
    ours = (
        *precision_recall(torch.tensor(real), torch.tensor(fake)),
        *density_coverage(torch.tensor(real), torch.tensor(fake)),
    )
    truth = numpy_scores(real, fake)
    assert 0 < truth[0] < 1
    assert 0 < truth[3] < 1
    assert ours == pytest.approx(truth, abs=1e-12)


def test_the_same_set_is_covered_and_a_distant_one_is_not():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert density_coverage(x, x)[1] == 1.0
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    assert density_coverage(x, x + 100) == (0.0, 0.0)


def test_fid_of_gaussians_is_the_closed_form():
    """|m|^2 + sum (s - t)^2 of independent coordinates, here with exact sample moments."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 3))
    white = (white - white.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    s, t, shift = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.0, -2.0])
    found = inception.distances(torch.tensor(white * s), torch.tensor(white * t + shift), seed=0)
    assert found["fid"] == pytest.approx(float((shift**2).sum() + ((s - t) ** 2).sum()), rel=1e-6)


def test_the_random_network_is_the_same_everywhere_and_reference_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    pixels = (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
    torch.rand(3)
    assert torch.equal(RandomNetwork()(pixels)[0], RandomNetwork()(pixels)[0])
    network, runs = load_network("random", torch.device("cpu")), []

    def show(batches):
        runs.append(1)
        return batches

    for expected in (1, 1):
        features, digest = reference_features(network, lambda: images.split(4), show)
        assert torch.equal(features, network.net(pixels)[0])
        assert len(runs) == expected
    other, moved = reference_features(network, lambda: (1 - images).split(4), show)
    assert len(runs) == 2
    assert moved != digest
    assert not torch.equal(other, features)
    for path in (tmp_path / "movae").iterdir():
        path.write_bytes(path.read_bytes()[:60])  # damaged: computed again
    again, _ = reference_features(network, lambda: images.split(4), show)
    assert torch.equal(again, features)


def test_a_users_network_is_torchscript(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().mean((2, 3))

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    network = load_network(str(tmp_path / "mean.pt"), torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(network.net(pixels)[0], pixels.float().mean((2, 3)))
    (tmp_path / "text.pt").write_text("no network")
    for name, message in (("text.pt", "is not TorchScript"), ("none.pt", "no such file")):
        with pytest.raises(ArgumentError, match=message):
            load_network(str(tmp_path / name), torch.device("cpu"))
    assert feature_networks.file_digest(tmp_path / "text.pt") != network.digest


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("fid", 64, "fid needs 65 images; there are 64"),
        ("kid", 999, "kid needs 1,000 images; there are 999"),
        ("precision_recall", 3, "needs 4 images"),
        ("density_coverage", 5, "needs 6 images"),
    ],
)
def test_fewer_images_than_a_score_needs_are_refused(name, n, message):
    with pytest.raises(ArgumentError, match=message):
        check_count([name], n, 64)
    check_count([name], n + 1, 64)


def test_the_command_scores_a_run_and_says_by_what(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = (
        "--dataset digits --image_size 16 --arch vq_vae --hidden_dims 8 8 --embedding_dim 4 --num_embeddings 8 "
    )
    flags += "--device cpu --batch_size 16 --limit_train 64 --limit_test 100 --seed 3 --steps 2 --save_freq 0"
    run = tmp_path / "run"
    assert main(["train", *flags.split(), "--exp_dir", str(run)]) == 0
    asked = ["evaluate", str(run), "--device", "cpu", "--metrics", "fid,precision_recall,density_coverage"]
    assert main([*asked, "--feature_network", "random", "--fid_images", "100"]) == 0
    content = json.loads((run / "evaluation" / "metrics.json").read_text())
    names = ("fid", "precision", "recall", "density", "coverage")
    assert {f"{n}_reconstructions" for n in names} <= content["figures"].keys()
    assert not any("samples" in name for name in content["figures"])  # codes without a prior are no samples
    assert "kid_reconstructions" not in content["figures"]
    assert content["scores"]["images"] == 100
    assert len(content["scores"]["reference_sha256"]) == 64
    assert "no fitted prior" in content["scores"]["samples"]
    capsys.readouterr()
    assert main([*asked, "--feature_network", "random", "--fid_images", "50"]) == 2
    assert "fid needs 65 images; there are 50" in capsys.readouterr().err
    assert main(asked) == 2
    assert "--feature_network random" in capsys.readouterr().err
    metrics = ["fid", "precision_recall", "density_coverage"]
    model = movae_fast.load(run, "cpu")
    found = movae_fast.evaluate(model, metrics, feature_network="random", fid_images=100)
    assert found == content["figures"]
    for wrong, message in (
        ({}, "^metrics fid compares features: give fid_weights FILE"),
        ({"feature_network": "random", "fid_weights": "x"}, "^fid_weights and feature_network both choose"),
        ({"feature_network": "random", "fid_images": 1}, "^fid_images 1 must be at least 2"),
        ({"fid_weights": tmp_path / "none.pth"}, "none.pth: no such file"),
        ({"feature_network": "random", "fid_images": 50}, "^metrics fid needs 65 images; there are 50"),
    ):
        with pytest.raises(ArgumentError, match=message):
            movae_fast.evaluate(model, metrics, **wrong)
