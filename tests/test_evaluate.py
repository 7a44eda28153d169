"""`movae evaluate`: its figures against closed forms, its files, its refusals."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import signal
from torch import nn

from movae_fast.cli import main
from movae_fast.data.datasets.sprites import SIZE, Sprites, factors_of, index_of
from movae_fast.evaluation import image_quality, inception, likelihood
from movae_fast.evaluation.likelihood import importance_weighted_bound
from movae_fast.models import make_likelihood
from movae_fast.models.base import GaussianVAE

pytestmark = pytest.mark.filterwarnings("ignore:Importing `spectral_angle_mapper`:FutureWarning")


class Linear(GaussianVAE):
    """p(x|z) = N(Wz, 1/2), q(z|x) = N(Ax, diag s): every figure has a closed form."""

    def __init__(self, a, w, logvar):
        super().__init__((1, 2, 2), "none")
        self.latent_dim = len(a)
        self.a, self.w, self.lv = nn.Parameter(a), nn.Parameter(w), nn.Parameter(logvar)

    def encode(self, x):
        mu = x.flatten(1) @ self.a.T
        return mu, self.lv.expand_as(mu)

    def decode(self, z):
        return (z @ self.w.T).view(-1, 1, 2, 2)


def exact(w):
    """The posterior of the linear model: covariance (1 + 2 W'W)^-1, mean 2 cov W'x."""
    cov = torch.linalg.inv(torch.eye(w.shape[1]) + 2 * w.T @ w)
    return 2 * cov @ w.T, cov


def evidence(x, w):
    """log N(x; 0, WW' + 1/2)."""
    covariance = w @ w.T + 0.5 * torch.eye(len(w))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(w)).double(), covariance.double())
    return float(normal.log_prob(x.flatten(1).double()).mean())


def test_bounds_of_the_true_posterior_are_the_evidence():
    # Orthogonal columns make the posterior's covariance diagonal, so this q is exact and every weight is p(x).
    w = torch.linalg.qr(torch.randn(4, 2)).Q * torch.tensor([1.0, 0.5])
    a, cov = exact(w)
    model = Linear(a, w, cov.diagonal().log()).eval()
    x = torch.randn(50, 1, 2, 2)
    truth = evidence(x, w)
    bound = importance_weighted_bound(model, [(x, None)], "gaussian", draws=7, seed=0)
    assert bound == pytest.approx(truth, abs=1e-5)  # float32 encode and decode
    # In expectation over z the ELBO is the evidence too; its draws scatter by the posterior's own entropy.
    figures, rates = likelihood.elbo(model, [(x.repeat(200, 1, 1, 1), None)], "gaussian", seed=0)
    assert figures["elbo"] == pytest.approx(truth, abs=5 * 1.5 / math.sqrt(10_000))
    assert figures["rate"] == pytest.approx(float(rates.sum()))
    mu = x.flatten(1) @ a.T
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, cov.diagonal().sqrt().expand_as(mu)),
        torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu)),
    )
    torch.testing.assert_close(rates.float(), kl.mean(0), rtol=1e-5, atol=1e-6)
    assert figures["active_units"] == 2


def test_more_draws_tighten_the_bound_towards_the_evidence():
    w = torch.linalg.qr(torch.randn(4, 2)).Q
    a, cov = exact(w)
    wider = 0.8
    model = Linear(a, w, cov.diagonal().log() + wider).eval()
    x = torch.randn(400, 1, 2, 2)
    truth = evidence(x, w)
    one, few, many = (
        importance_weighted_bound(model, [(x, None)], "gaussian", k, seed=0) for k in (1, 10, 3000)
    )
    # One draw is the ELBO: below by KL(q || p) = (e^s - 1 - s) / 2 a latent. Its log weights are
    # (e^s - 1)/2 times chi-squares, with standard deviation (e^s - 1) / sqrt(2) a latent.
    gap, scatter = math.expm1(wider) - wider, math.expm1(wider) / math.sqrt(400)
    assert one == pytest.approx(truth - gap, abs=4 * scatter)
    assert one < few < many
    # The weights' variance is 0.44: 4 standard errors of 3000 draws, averaged over 400 images.
    assert many == pytest.approx(truth, abs=4 * math.sqrt(0.44 / 3000 / 400) + 0.44 / 6000)


@pytest.mark.parametrize("dist", ["bernoulli", "gaussian", "laplacian"])
def test_likelihoods_are_normalised(dist):
    """Their integral over x (or sum over 0 and 1) is one."""
    pre = torch.tensor(0.3).view(1, 1, 1, 1)
    if dist == "bernoulli":
        x, step = torch.tensor([0.0, 1.0]), 1.0
    else:
        x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
        step = float(x[1] - x[0])
    x = x.view(-1, 1, 1, 1)
    total = likelihood.log_likelihood(pre.expand(x.shape), x, make_likelihood(dist, 1)).exp().sum() * step
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_an_inactive_unit_is_not_counted():
    w = torch.eye(4)[:, :2]
    model = Linear(torch.stack([torch.eye(4)[0], 0.05 * torch.eye(4)[1]]), w, torch.zeros(2)).eval()
    figures, _ = likelihood.elbo(model, [(torch.randn(4000, 1, 2, 2), None)], "gaussian", seed=0)
    assert figures["active_units"] == 1  # variances 1 and 0.0025


def test_image_quality_by_hand():
    class Constant(nn.Module):
        image_shape = (1, 64, 64)

        def reconstruct(self, x):
            return x.clamp(0, 1) * 0 + 0.5

    x = torch.rand(8, 1, 64, 64)
    figures = image_quality.image_quality(
        Constant(), [(x[:4], None), (x[4:], None)], False, torch.device("cpu")
    )
    mse = float((x - 0.5).square().mean())
    assert figures["psnr"] == pytest.approx(-10 * math.log10(mse), abs=1e-4)
    assert figures["ssim"] < 0.1
    assert figures["ms_ssim_scales"] == 3

    class Same(Constant):
        def reconstruct(self, x):
            return x

    figures = image_quality.image_quality(Same(), [(x, None)], False, torch.device("cpu"))
    assert figures["ssim"] == pytest.approx(1, abs=1e-5)
    assert figures["ms_ssim"] == pytest.approx(1, abs=1e-5)


def published_ssim(x, y, c1=0.01**2, c2=0.03**2):
    """Luminance and contrast terms [H - 10, W - 10] of two grey images, by SciPy and without padding."""
    at = np.arange(-5, 6)
    window = np.exp(-(at**2) / 4.5)
    window = np.outer(window, window) / window.sum() ** 2

    def mean(v):
        return signal.convolve2d(v, window, mode="valid")

    mx, my = mean(x), mean(y)
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    contrast = (2 * (mean(x * y) - mx * my) + c2) / (mean(x * x) - mx**2 + mean(y * y) - my**2 + c2)
    return luminance, contrast


@pytest.mark.parametrize("shape", [(1, 11, 11), (1, 11, 19), (3, 28, 28), (1, 64, 64)])
def test_ssim_has_the_published_window_and_no_padding(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, *shape, generator=generator)
    y = (x + 0.2 * torch.randn(3, *shape, generator=generator)).clamp(0, 1)
    expected = [
        np.mean([np.mean(np.prod(published_ssim(a.double().numpy(), b.double().numpy()), 0)) for a, b in pair])
        for pair in (zip(x[i], y[i], strict=True) for i in range(3))
    ]
    assert image_quality.ssim(x, y).tolist() == pytest.approx(expected, rel=1e-9)
    assert image_quality.ssim(x, x).tolist() == pytest.approx([1.0] * 3)


# structural_similarity(x, y, data_range=1, gaussian_weights=True, use_sample_covariance=False) of scikit-image
# 0.26.0 (sigma 1.5), for the images below.
SCIKIT_IMAGE = {11: 0.9493464217049404, 28: 0.3723054370537221, 64: -0.05686853982920147}


@pytest.mark.parametrize("size", SCIKIT_IMAGE)
def test_ssim_is_scikit_images(size):
    x, y = waves(size)
    assert float(image_quality.ssim(x, y)) == pytest.approx(SCIKIT_IMAGE[size], rel=1e-9)


def waves(size):
    at = torch.arange(size, dtype=torch.float64)
    x = 0.5 + 0.5 * torch.sin(0.9 * at[:, None]) * torch.cos(0.37 * at)
    y = 0.5 + 0.4 * torch.sin(0.8 * at[:, None] + 0.3) * torch.cos(0.4 * at)
    return x[None, None], y[None, None]


def test_ms_ssim_is_the_product_over_scales():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 48, 48, generator=generator).double()
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    expected = []
    for a, b in zip(x[:, 0].numpy(), y[:, 0].numpy(), strict=True):
        total, betas = 1.0, np.array([0.0448, 0.2856, 0.3001])
        for n, beta in enumerate(betas / betas.sum()):
            luminance, contrast = published_ssim(a, b)
            total *= np.mean(contrast if n < 2 else luminance * contrast) ** beta
            a, b = (v.reshape(len(v) // 2, 2, -1, 2).mean((1, 3)) for v in (a, b))
        expected.append(total)
    assert image_quality.ms_ssim(x, y, 3).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("size", "scales"), [(8, None), (10, None), (11, 1), (16, 1), (21, 1), (22, 2), (44, 3), (88, 4), (176, 5)]
)
def test_image_quality_of_every_size(size, scales):
    class Close(nn.Module):
        image_shape = (1, size, size)

        def reconstruct(self, x):
            return (x * 0.9 + 0.05).clamp(0, 1)

    x = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    figures = image_quality.image_quality(Close(), [(x, None)], False, torch.device("cpu"))
    assert figures.get("ms_ssim_scales") == scales
    assert all(math.isfinite(v) for v in figures.values())
    assert set(figures) == {"psnr"} if scales is None else 0.9 < figures["ms_ssim"] < 1
    if scales == 1:
        assert figures["ms_ssim"] == pytest.approx(figures["ssim"])


def test_factors_of_a_sprite_are_those_it_was_drawn_with():
    source = Sprites(torch.randperm(SIZE)[:50], 16, torch.device("cpu"))
    rows = torch.tensor([3, 1, 40])
    found = source.factors(rows)
    assert torch.equal(index_of(found), source.index[rows])
    assert torch.equal(found[:, 0], source.gather(rows)[1])
    assert torch.equal(found, factors_of(source.index[rows]))


def test_evaluate_leaves_a_table_a_json_and_a_figure(train, capsys):
    folder = train("--dataset sprites", "--recons_dist bernoulli")
    command = [
        *("evaluate", str(folder), "--metrics", "objectives,elbo,images,mig,mig-sup,mig_sampled,jemmig"),
        *("--samples", "300", "--iw", "5", "--iw_images", "8", "--limit_test", "64", "--device", "cpu"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "mig sampled" in printed
    record = json.loads((folder / "evaluation" / "metrics.json").read_text())
    figures = record["figures"]
    assert {"kl", "mse", "rate", "distortion", "elbo", "iw_bound_5", "psnr", "ssim", "mig", "jemmig"} <= set(
        figures
    )
    assert figures["elbo"] == pytest.approx(-figures["rate"] - figures["distortion"])
    assert figures["rate"] == pytest.approx(figures["kl"], rel=1e-4)
    assert np.array(record["mutual_information_share"]).shape == (4, 5)
    assert record["estimators"]["histogram"] == "histogram, 20 bins"
    first = (folder / "evaluation" / "metrics.json").read_bytes()
    assert main(command) == 0
    again = folder / "evaluation" / "metrics-2.json"
    assert again.read_bytes() == first == (folder / "evaluation" / "metrics.json").read_bytes()
    assert (folder / "evaluation" / "metrics-2.png").stat().st_size > 1000


def test_evaluate_a_codebook(train):
    codebook = "--arch vq_vae --embedding_dim 4 --num_embeddings 8 --num_residual_layers 1"
    folder = train(codebook, "--latent_dim null")
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 0
    figures = json.loads((folder / "evaluation" / "metrics.json").read_text())["figures"]
    assert 1 <= figures["perplexity"] <= 8
    assert "rate" not in figures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--metrics mig", "--metrics mig needs data with known discrete factors; digits has none"),
        ("--metrics migg", "--metrics migg: unknown; did you mean"),
        ("--metrics ,", "--metrics is empty"),
        ("--samples 5", "--samples 5 must be at least 100"),
        (f"--save_dir {__file__}", f"--save_dir {__file__}: {__file__} is a file, not a folder"),
        (f"--save_dir {__file__}/x", f"--save_dir {__file__}/x: {__file__} is a file, not a folder"),
    ],
)
def test_refusals_are_one_line_before_work_starts(train, capsys, flags, message, monkeypatch):
    folder = train()
    monkeypatch.setattr("movae_fast.evaluation.measure.make_loader", None)
    capsys.readouterr()
    assert main(["evaluate", str(folder), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message.split(";")[0] in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file as torch-fidelity's, of a network that was never trained."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


def numpy_fid(a, b):
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)), the trace of the root by the eigenvalues of S T."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root


def numpy_kid(a, b):
    """The unbiased squared MMD with the kernel (x'y / d + 1)^3."""
    kaa, kbb, kab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n = len(a)
    return sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kaa, kbb)) - 2 * kab.mean()


def test_inception_distances_by_hand():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 8)), 0.5 + 1.3 * rng.standard_normal((60, 8))
    found = inception.distances(torch.tensor(a), torch.tensor(b), seed=0)
    assert found["fid"] == pytest.approx(numpy_fid(a, b), rel=1e-6)
    assert found["kid"] == pytest.approx(numpy_kid(a, b), rel=1e-5)
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole
    same = inception.distances(torch.tensor(a), torch.tensor(a), seed=0)
    assert same["fid"] == pytest.approx(0, abs=1e-6)


def test_inception_features_are_of_rounded_rgb_pixels():
    seen = []

    def network(pixels):
        seen.append(pixels)
        return (pixels.flatten(1).float(),)

    images = torch.tensor([[-0.1, 0.0], [0.5, 1.2]]).view(1, 1, 2, 2)
    inception.features_of(network, [images, images])
    assert [p.shape for p in seen] == [(1, 3, 2, 2)] * 2
    assert seen[0].dtype == torch.uint8
    assert seen[0][0, 2].flatten().tolist() == [0, 0, 128, 255]


def test_evaluate_fid_and_kid(train, inception_weights):
    flags = f"--device cpu --metrics images --fid_weights {inception_weights} --fid_images 6".split()
    folder = train()
    assert main(["evaluate", str(folder), *flags]) == 0
    figures = json.loads((folder / "evaluation" / "metrics.json").read_text())["figures"]
    assert figures["fid_images"] == 6
    for kind in ("reconstructions", "samples"):
        assert figures[f"fid_{kind}"] > 0
        assert math.isfinite(figures[f"kid_{kind}"])
    codebook = "--arch vq_vae --embedding_dim 4 --num_embeddings 8 --num_residual_layers 1 --latent_dim null"
    folder = train(*[codebook])
    assert main(["evaluate", str(folder), *flags]) == 0
    figures = json.loads((folder / "evaluation" / "metrics.json").read_text())["figures"]
    assert figures["fid_reconstructions"] > 0
    assert "fid_samples" not in figures


def test_inception_weights_are_refused_before_work_starts(train, tmp_path, capsys, monkeypatch):
    folder = train()
    monkeypatch.setattr("movae_fast.evaluation.measure.make_loader", None)
    capsys.readouterr()

    def said(path, reason):
        assert main(["evaluate", str(folder), "--fid_weights", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"--fid_weights {path}" in error
        assert reason in error
        assert error.count("\n") == 1

    said(tmp_path / "none.pth", "no such file; it is https://")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    said(tmp_path / "other.pth", "is not torch-fidelity's Inception")
    (tmp_path / "text.pth").write_text("not weights")
    said(tmp_path / "text.pth", "is not torch-fidelity's Inception")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pth")
    said(tmp_path / "pickle.pth", "is not torch-fidelity's Inception")
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    assert main(["evaluate", str(folder), "--fid_weights", "x"]) == 2
    assert "pip install 'movae-fast[metrics]'" in capsys.readouterr().err


def test_too_many_samples(train, capsys):
    folder = train("--dataset sprites")
    assert main(["evaluate", str(folder), "--metrics", "sap", "--samples", "600000"]) == 2
    assert "needs 900000 images (300000 of them to test); there are 727280" in capsys.readouterr().err


def test_evaluate_a_multi_rate_model_at_a_beta(train, capsys):
    folder = train("--multirate", "--epochs 3")

    def figures(*flags):
        assert main(["evaluate", str(folder), "--device", "cpu", "--metrics", "elbo", *flags]) == 0
        newest = max((folder / "evaluation").glob("metrics*.json"), key=lambda p: p.stat().st_mtime_ns)
        record = json.loads(newest.read_text())
        return record["figures"], record.get("beta")

    default, none = figures()
    one, beta = figures("--beta", "1")
    assert none is None
    assert beta == 1
    assert one == default
    assert figures("--beta", "0.01")[0]["rate"] != one["rate"]
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--beta", "0"]) == 2
    assert "--beta 0 must be above 0 and finite" in capsys.readouterr().err
    assert main(["evaluate", str(train()), "--beta", "1"]) == 2
    assert "--beta needs a multi-rate model; this vae was trained for one beta" in capsys.readouterr().err
