"""`movae curve`: against the linear optimum, passes beta by beta, `movae evaluate`; its files; its refusals."""

import csv
import json
import math

import pytest
import torch

from movae_fast.cli import main
from movae_fast.data import Images, ResidentLoader
from movae_fast.evaluation import likelihood
from movae_fast.evaluation.curve_runs import Member, expanded
from movae_fast.evaluation.linear_oracle import LinearOracle
from movae_fast.evaluation.rate_distortion import (
    Point,
    against_run,
    curve_points,
    data_covariance,
    log_spaced,
    nominal_beta,
)
from movae_fast.models import build_model, make_multirate
from movae_fast.training.config import TrainConfig
from movae_fast.training.config_checks import validate

CPU = torch.device("cpu")
N = 3000


def loader(n, shape, batch=500):
    """Images with a few strong directions and weak ones."""
    d = math.prod(shape)
    mixing = torch.linalg.qr(torch.randn(d, d)).Q * torch.logspace(0.2, -1.2, d)
    x = 127 + 40 * torch.randn(n, d) @ mixing.T
    images = x.clamp(0, 255).to(torch.uint8).view(n, *shape)
    return ResidentLoader(Images(images, torch.zeros(n, dtype=torch.long)), batch, CPU, train=False)


def optimal_model(data, oracle, shape, k, least, most):
    """The linear multi-rate model whose sqrt gates realise the optimum at every beta."""
    model = build_model("linear_vae", shape, "none", {"latent_dim": k})
    make_multirate(model, least, most, gate_encoder="sqrt", gate_decoder="sqrt")
    values, u = oracle.values[:k], oracle.vectors[:, :k]
    mean = torch.cat([x.flatten(1).double() for x, _ in data.epoch()]).mean(0)
    middle, half = (math.log(least) + math.log(most)) / 2, (math.log(most) - math.log(least)) / 2
    first, head, inner, outer = model.encoder[1], model.mu, model.decoder[0], model.decoder[1]
    with torch.no_grad():
        first.layer.weight.copy_((u / values.sqrt()).T)
        first.layer.bias.copy_(-(u / values.sqrt()).T @ mean)
        head.layer.weight.copy_(torch.eye(k))
        inner.layer.weight.copy_(torch.diag(values.sqrt()))
        outer.weight.copy_(u)
        outer.bias.copy_(mean)
        model.logvar.layer.value.zero_()
        for bias in (head.layer.bias, inner.layer.bias):
            bias.zero_()
        for gated in (first, model.logvar, inner):
            gated.gate_weight.fill_(half / math.sqrt(3))
            gated.gate_bias.copy_(middle - (2 * values).log())
        head.gate_weight.zero_()
        head.gate_bias.fill_(-40)
    return model.eval()


def test_the_optimal_model_lies_on_the_frontier_at_every_beta():
    shape, k = (1, 4, 4), 6
    data = loader(N, shape)
    covariance = data_covariance(data)
    x = torch.cat([x.flatten(1).double() for x, _ in data.epoch()])
    torch.testing.assert_close(covariance, torch.cov(x.T, correction=0))
    oracle = LinearOracle(covariance, k, "squared_error")
    least, most = 0.2 * float(oracle.values[k - 1]), 4 * float(oracle.values[0])
    model = optimal_model(data, oracle, shape, k, least, most)
    betas = log_spaced(least, most, 9)
    points = curve_points(model, data, betas, "gaussian", seed=0, rows=700)
    active = [oracle.optimum(beta).active for beta in betas]
    assert active[0] == k
    assert active[-1] == 0
    for beta, point in zip(betas, points, strict=True):
        found = oracle.compare(beta, point.rate, point.distortion)
        # The rate has no draws in it, only float32. Near a threshold the gate's root turns an error e of its
        # exponent into sqrt(e) of a gate, and that is squared in every figure.
        assert found["rate_error"] == pytest.approx(0, abs=1e-4)
        # One draw of z an image: 5 standard errors of the squared error's spread, which is below its mean.
        scatter = 5 * oracle.optimum(beta).distortion / math.sqrt(N)
        assert found["distortion_error"] == pytest.approx(0, abs=scatter)
        assert found["excess_loss"] == pytest.approx(beta * found["rate_error"] + found["distortion_error"])
        if point.rate > 1e-3:
            assert found["frontier_beta"] == pytest.approx(beta, rel=1e-3)
        assert point.active_units == pytest.approx(oracle.optimum(beta).active, abs=1)


def test_a_wrong_beta_on_the_frontier_is_a_map_error_and_no_gap():
    oracle = LinearOracle(
        torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)), 3, "squared_error"
    )
    found = oracle.compare(0.5, *oracle.point(1.0))
    assert found["frontier_gap"] == pytest.approx(0, abs=1e-12)
    assert found["frontier_beta"] == pytest.approx(1.0)
    assert found["rate_error"] == pytest.approx(oracle.point(1.0)[0] - oracle.point(0.5)[0])
    assert found["rate_error"] < -0.5
    assert found["excess_loss"] > 0


def gated_vae():
    model = build_model("vae", (1, 16, 16), "sigmoid", {"latent_dim": 4, "hidden_dims": [8, 8]})
    make_multirate(model, 0.01, 10.0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.uniform_(-0.1, 0.1)
    return model.eval()


def test_one_pass_is_a_pass_for_each_beta_whatever_the_batches():
    model, betas = gated_vae(), log_spaced(0.01, 10, 5)
    data = loader(70, (1, 16, 16), batch=32)
    seen = []
    whole = curve_points(model, data, betas, "bernoulli", 1, rows=1000, advance=seen.append)
    assert sum(seen) == 5 * 70
    single = [curve_points(model, data, [b], "bernoulli", 1, rows=1000)[0] for b in betas]
    assert len({round(p.rate, 6) for p in whole}) == 5  # the gates do something
    for rows in (5, 17, 3):  # 3 is fewer than the betas
        split = curve_points(model, data, betas, "bernoulli", 1, rows=rows)
        for a, b, c in zip(whole, single, split, strict=True):
            for other in (b, c):
                assert other.beta == a.beta
                assert other.rate == pytest.approx(a.rate, rel=1e-5)
                assert other.distortion == pytest.approx(a.distortion, rel=1e-5)
                assert other.active_units == a.active_units


def test_a_plain_model_is_what_the_bounds_say():
    model = build_model("vae", (1, 16, 16), "tanh", {"latent_dim": 4, "hidden_dims": [8, 8]}).eval()
    data = loader(96, (1, 16, 16), batch=32)
    for dist in ("gaussian", "laplacian"):
        (point,) = curve_points(model, data, [2.0], dist, 0, rows=50)
        figures, _ = likelihood.elbo(model, data.epoch(), dist, 0)
        assert point.rate == pytest.approx(figures["rate"], rel=1e-6)
        assert point.active_units == figures["active_units"]
        # The draws differ; untrained, the decoder hardly listens to them.
        assert point.distortion + likelihood.likelihood_constant(dist, 256) == pytest.approx(
            figures["distortion"], rel=1e-2
        )
        assert point.loss == pytest.approx(point.distortion + 2 * point.rate)


def test_log_spaced():
    assert log_spaced(0.01, 10, 4) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_spaced(0.3, 7, 5)[::4] == [0.3, 7]
    assert log_spaced(0.5, 8, 1) == [2.0]


@pytest.mark.parametrize(
    ("flags", "beta"),
    [
        ({"beta": 3.0, "recons_reduction": "sum"}, 3.0),
        ({"beta": 3.0, "recons_reduction": "mean"}, 3.0 * 256),
        ({"beta": 3.0, "recons_reduction": "scaled_sum", "batch_size": 10}, 3.0 / 2550),
        ({"loss_weights": [4.0, 2.0], "recons_reduction": "sum"}, 0.5),
        ({"arch": "betatc_vae", "beta": 6.0, "recons_reduction": "sum"}, 6.0),
        ({"arch": "provlae", "beta": 8.0, "recons_reduction": "sum"}, 8.0),
    ],
)
def test_the_beta_of_a_plain_run_is_in_nats(flags, beta):
    config = TrainConfig.from_flat(
        {"dataset": "digits", "image_size": 16, "arch": "vae", "device": "cpu"} | flags
    )
    validate(config)
    assert nominal_beta(config) == pytest.approx(beta)


def test_a_curve_against_a_run():
    curve = [Point(10, 1, 50, 1), Point(1, 3, 30, 2), Point(0.1, 7, 20, 3)]
    found = against_run(curve, Point(1, 4, 26, 2))
    assert found["rate_error"] == -1
    assert found["distortion_error"] == 4
    assert found["total_error"] == 3
    assert found["loss_error"] == 3
    assert found["total_ratio"] == pytest.approx(33 / 30)
    assert found["frontier_gap"] == pytest.approx(27.5 - 26)
    assert against_run(curve, Point(2, 9, 26, 2)) == {"beta": 2}  # no such beta, a rate beyond the curve


@pytest.fixture
def undrawn(monkeypatch):
    """No figures: matplotlib takes seconds."""
    for name in ("curve_plot", "response_plot"):
        monkeypatch.setattr(f"movae_fast.cli.curves.{name}", lambda path, *_: path)


@pytest.fixture
def tiny(train):
    """A function that trains on digits for two steps."""

    def run(*flags):
        return train("--steps 2", "--recons_dist bernoulli", "--recons_reduction sum", *flags)

    return run


def test_a_multirate_run_and_plain_ones_leave_a_json_a_csv_and_figures(tiny, capsys, tmp_path):
    many = tiny("--multirate", "--beta_min 0.1", "--beta_max 5")
    for beta in ("0.3", "4.9999", "8"):
        tiny(f"--beta {beta}")
    capsys.readouterr()
    assert main(["curve", str(tmp_path), "--betas", "4", "--device", "cpu", "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    record = json.loads((tmp_path / "c" / "curve.json").read_text())
    curve, *plain = record["runs"]
    assert curve["run"] == str(many)
    assert [p["beta"] for p in curve["points"]] == pytest.approx(
        [0.1, 0.3, 0.1 * 50 ** (1 / 3), 0.1 * 50 ** (2 / 3), 4.9999]
    )
    assert [(r["label"], r["points"][0]["beta"]) for r in plain] == [("beta-VAEs", b) for b in (0.3, 4.9999, 8)]
    for one in record["runs"]:
        assert one["train_seconds"] > 0
        for p in one["points"]:
            assert p["total"] == pytest.approx(p["rate"] + p["distortion"])
            assert "mig" not in p
    against = {a["beta"]: a for a in record["against"]}
    assert against[4.9999]["rate_error"] == pytest.approx(
        curve["points"][-1]["rate"] - plain[1]["points"][0]["rate"]
    )
    assert "rate_error" not in against[8]
    assert len(curve["closed_gates"]) > 3
    with open(tmp_path / "c" / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 + 3
    assert float(rows[4]["distortion"]) == curve["points"][4]["distortion"]
    for name in ("curve.png", "responses.png"):
        assert (tmp_path / "c" / name).stat().st_size > 5000


@pytest.mark.usefixtures("undrawn")
def test_outside_the_trained_range_it_warns_once(tiny, capsys):
    many = [tiny("--multirate", "--beta_min 0.1", "--beta_max 5") for _ in range(2)]
    capsys.readouterr()
    words = ["curve", *map(str, many), "--betas", "2", "--beta_min", "0.01", "--device", "cpu"]
    assert main(words) == 0
    error = capsys.readouterr().err
    assert "betas 0.01 to 5: trained for 0.1 to 5, the model extrapolates" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_the_linear_model_has_an_oracle_beside_it(train, capsys):
    linear = ("--arch linear_vae", "--hidden_dims null", "--recons_dist gaussian", "--steps 20")
    many = train(*linear, "--multirate")
    assert main(["curve", str(many), "--betas", "3", "--split", "train", "--device", "cpu"]) == 0
    points = json.loads((many / "curve" / "curve.json").read_text())["runs"][0]["points"]
    assert all(p["excess_loss"] > 0 and p["frontier_gap"] > 0 for p in points)
    assert points[-1]["oracle_rate"] < points[0]["oracle_rate"]
    assert all(p["loss"] == pytest.approx(p["oracle_loss"] + p["excess_loss"]) for p in points)
    # Nothing is overwritten.
    assert main(["curve", str(many), "--betas", "2", "--device", "cpu"]) == 0
    assert (many / "curve" / "curve-2.json").is_file()
    assert (many / "curve" / "curve-2.csv").is_file()


@pytest.mark.usefixtures("undrawn")
def test_mig_is_that_of_evaluate(train):
    flags = ("--dataset sprites", "--steps 2", "--beta 1", "--recons_reduction sum")
    plain = train(*flags)
    many = train(*flags[:2], flags[3], "--multirate")
    words = ["--samples", "200", "--device", "cpu"]
    assert main(["evaluate", str(plain), "--metrics", "mig", *words]) == 0
    assert main(["curve", str(plain), str(many), "--betas", "2", "--limit", "50", *words]) == 0
    truth = json.loads((plain / "evaluation" / "metrics.json").read_text())["figures"]["mig"]
    alone, curve = json.loads((plain / "curve" / "curve.json").read_text())["runs"]
    assert alone["points"][0]["mig"] == pytest.approx(truth)
    assert len({p["mig"] for p in curve["points"]}) > 1


def test_a_sweeps_folder_is_its_complete_trials(tmp_path):
    for name in ("0000", "0001", "0001-2", "0003"):
        (tmp_path / "trials" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "trials" / name / "checkpoints" / "last.pt").touch()
    assert [p.name for p in expanded([str(tmp_path)])] == ["0000", "0001", "0001-2", "0003"]
    (tmp_path / "results.json").write_text(json.dumps({"trials": [{"number": 1}, {"number": 3}]}))
    assert [p.name for p in expanded([str(tmp_path)])] == ["0001-2", "0003"]


def refused(words, capsys):
    capsys.readouterr()
    assert main(["curve", *map(str, words), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_has_no_place_on_a_curve_is_refused(train, capsys, tmp_path):
    codebook = train(
        "--arch vq_vae", "--latent_dim null", "--embedding_dim 4", "--num_embeddings 8", "--steps 1"
    )
    free = train("--beta 0", "--steps 1")
    other = train("--beta 1", "--image_size 8", "--hidden_dims 8", "--steps 1")
    many = train("--multirate", "--steps 1")
    (tmp_path / "empty").mkdir()
    assert "neither a multi-rate run nor one of a fixed beta: vq_vae has a codebook" in refused(
        [codebook], capsys
    )
    assert "have no one beta above 0" in refused([free], capsys)
    assert "image_size 16 and" in refused([many, other], capsys)
    assert "holds no run" in refused([tmp_path / "empty"], capsys)
    assert "no such run" in refused([tmp_path / "nowhere"], capsys)
    assert "which runs?" in refused([], capsys)
    assert "--betas 0 must be at least 1" in refused([many, "--betas", 0], capsys)
    for flags in (["--beta_min", 0], ["--beta_min", -1], ["--beta_min", 20], ["--beta_max", "1e400"]):
        assert "must be above 0 and below --beta_max" in refused([many, *flags], capsys)


def test_the_seconds_of_a_run_count_the_images_of_all_its_processes(tmp_path):
    lines = [{"step": 10, "train/images_per_s": 400.0}, {"step": 30, "train/images_per_s": 800.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig()
    config.data.batch_size = 20
    member = Member(tmp_path, config, False, [1.0], 2, processes=4)
    assert member.train_seconds == pytest.approx(10 * 80 / 400 + 20 * 80 / 800)
