"""`movae prior` and `movae sample` with it: fitting, resuming, two processes, and what is refused."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import movae_fast
from movae_fast.cli import main, serve
from movae_fast.cli.flags.prior import parse
from movae_fast.cli.flags.serve import ServeConfig
from movae_fast.names import ArgumentError
from movae_fast.pages.gather import Options, gather
from movae_fast.pages.live import Viewer
from movae_fast.pictures import to_pixels
from movae_fast.priors import base, catalog, fit
from movae_fast.priors.config import PriorConfig, check_prior
from movae_fast.priors.latents import open_latents
from movae_fast.training import checkpoint
from movae_fast.training.config_files import recipe_names
from movae_fast.training.log_lines import read_lines
from tests.test_distributed import finish, start_command

CPU = torch.device("cpu")
COMMON = "--device cpu --dataset digits --image_size 16 --hidden_dims 8 8 --batch_size 100 --limit_train 300"
KINDS = {
    "vq": "--arch vq_vae --embedding_dim 8 --num_embeddings 16 --num_residual_layers 1 --steps 60",
    "vae": "--arch vae --latent_dim 4 --steps 9",
}
SMALL = (
    "--width 64 --depth 1 --batch_size 16 --warmup_steps 2 --log_every 2 --eval_every 3 --checkpoint_every 4"
)
STEPPED = f"{SMALL} --steps 8"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of trained runs, which tests copy."""
    root, made = tmp_path_factory.mktemp("trained"), {}
    for name, flags in KINDS.items():
        words = f"train {COMMON} {flags} --limit_test 64 --seed 3 --exp_dir {root / name}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
            assert main(words.split()) == 0
        for split in ("train", "test"):
            assert main(["encode", str(root / name), "--split", split, "--device", "cpu"]) == 0
        made[name] = root / name
    return made


@pytest.fixture
def runs(trained, tmp_path):
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in trained.items()}


def prior(run, flags, status=0):
    assert main(["prior", str(run), "--device", "cpu", *flags.split()]) == status


def sample(run, flags="", status=0):
    assert main(["sample", str(run), "--device", "cpu", "--n_samples", "4", *flags.split()]) == status


def weights_of(run, name):
    return checkpoint.load(run / "priors" / name / "prior.pt")["model"]


def scores_of(run, name):
    return checkpoint.load(run / "priors" / name / "prior.pt")["scores"]


@pytest.mark.parametrize("kind", ["transformer", "maskgit", "pixelcnn"])
def test_a_prior_over_codes_is_fitted_and_sampled(runs, capsys, kind):
    run = runs["vq"]
    sample(run)
    assert "codes are drawn without a prior" in capsys.readouterr().err
    prior(run, f"--kind {kind} {STEPPED} --labels --precision bf16")
    assert "which was there" in capsys.readouterr().out
    scores = scores_of(run, kind)
    if kind != "maskgit":
        assert 0 < scores["bits_per_code"] < 4.5
        assert scores["code_bits_per_dim"] == pytest.approx(scores["bits_per_code"] * 16 / 256)
    assert scores["bits_per_code_by_usage"] < 4.1
    sample(run, "--label 10", status=2)
    assert "--label 10: the labels are 0 to 9" in capsys.readouterr().err
    sample(run)
    said = capsys.readouterr()
    assert f"drawn from the prior {run / 'priors' / kind / 'prior.pt'}" in said.err
    assert said.out.split() == [str(run / "figures" / "sample-2.png")]
    sample(run, "--label 3 --guidance 2 --temperature 0.9 --decoding top_k --top_k 5")
    if kind == "maskgit":
        sample(run, "--order confidence --order_noise 2")
    sample(run, "--prior none")
    assert "without a prior" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gmm", "flow", "flow_matching"])
def test_a_prior_over_latents_is_fitted_and_sampled(runs, capsys, kind):
    run = runs["vae"]
    prior(run, "--kind gmm --components 3" if kind == "gmm" else f"--kind {kind} {STEPPED}")
    scores = scores_of(run, kind)
    gain = scores["elbo"] - scores["elbo_standard_normal"]
    assert scores["elbo_gain"] == pytest.approx(gain)
    sample(run, "--temperature 0.5")
    assert f"drawn from the prior {run / 'priors' / kind}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("vq", "pixelcnn"), ("vae", "gmm")])
def test_every_way_to_sample_draws_from_one_source(runs, tmp_path, capsys, name, kind):
    """`movae sample`, `movae generate`, Python, a report and the page."""
    run = runs[name]
    own = "codes are drawn without a prior" if name == "vq" else "drawn from N(0, I), the model's own prior"
    expected = {"own": own, "fitted": f"drawn from the prior {run / 'priors' / kind / 'prior.pt'}"}
    drawn = {}
    for case, said in expected.items():
        if case == "fitted":
            prior(run, "--kind gmm --components 3" if kind == "gmm" else f"--kind {kind} {STEPPED}")
        model = movae_fast.load(run, "cpu")
        assert model.sampled_from().startswith(said)
        drawn[case] = model.sample(3, seed=4)
        capsys.readouterr()
        words = f"generate --model {run} --outdir {tmp_path / case} --nsamples 3 --seed 4 --device cpu"
        assert main(words.split()) == 0
        assert said in capsys.readouterr().err
        files = sorted((tmp_path / case).glob("img_*.png"))
        for image, path in zip(drawn[case], files, strict=True):
            inside = np.asarray(Image.open(path).convert("L"))[2:-2, 2:-2]  # without the margin
            assert np.array_equal(inside, to_pixels(image[None], 1)[0, ..., 0])
        sample(run, "--seed 4")
        assert said in capsys.readouterr().err
        source = serve.source_of(ServeConfig(str(run)), model.config, model.network)
        assert source.sentence == model.sampled_from()
        shown = Viewer(source, model.config.data.normalize, None).sample(4)
        assert np.array_equal(shown, to_pixels(model.sample(1, seed=4), 20)[0])
        assert model.sampled_from("none").startswith(own)
    page = gather(run, "run", CPU, Options(images=3, seed=4, limit=20))
    assert any(f"drawn from the fitted prior ({kind})" in chart.note for chart in page.pictures)
    assert not torch.equal(drawn["own"], drawn["fitted"])
    assert torch.equal(drawn["own"], model.sample(3, seed=4, prior="none"))
    with pytest.raises(ArgumentError, match=r"prior other: .* has no such prior"):
        model.sample(3, prior="other")


def test_an_interrupted_prior_goes_on_bit_for_bit(runs, monkeypatch, capsys):
    run = runs["vq"]
    flags = f"--kind transformer {STEPPED} --dropout 0.1"
    prior(run, f"{flags} --name whole")
    real = fit.log

    def interrupting(work, step):
        line = real(work, step)
        if work.at == 6 and not monkeypatch.undone:
            monkeypatch.undone = True
            signal.raise_signal(signal.SIGTERM)
        return line

    monkeypatch.undone = False
    monkeypatch.setattr(fit, "log", interrupting)
    prior(run, f"{flags} --name parts", status=143)
    assert "go on with the same command and --resume" in capsys.readouterr().out
    prior(run, f"{flags} --name parts --lr 1", status=2)
    assert "--resume" in capsys.readouterr().err
    prior(run, f"{flags} --name parts --lr 1 --resume", status=2)
    said = capsys.readouterr().err
    assert "--resume: " in said
    assert "has lr 0.0003, and keeps it" in said
    prior(run, f"{flags} --name parts --resume")
    whole, parts = (weights_of(run, name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [(run / "priors" / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) > 4


def test_two_ranks_fit_what_one_process_does(runs, tmp_path):
    """Half the batch each, by gloo: the same weights to rounding."""
    run = runs["vq"]
    flags = f"--kind transformer {SMALL} --steps 6 --dropout 0 --device cpu --ema_decay 0"
    words = ["prior", str(run), *flags.split()]
    for name, others in (("two", ["--batch_size", "8"]), ("one", [])):
        folder = tmp_path / name
        finish(folder, start_command(folder, [*words, "--name", name, *others], ranks=len(others) or 1))
    one, two = (torch.cat([v.flatten() for v in weights_of(run, name).values()]) for name in ("one", "two"))
    begun = fit_start(run)
    assert (one - two).norm() < 1e-4 * (one - begun).norm()
    assert len(read_lines(run / "priors" / "two" / "metrics.jsonl")) == len(
        read_lines(run / "priors" / "one" / "metrics.jsonl")
    )


def fit_start(run):
    """The weights that both began with."""
    torch.manual_seed(0)
    content = checkpoint.load(run / "priors" / "one" / "prior.pt")
    grids = tuple(base.Grid(*grid) for grid in content["of"]["grids"])
    made = base.build_prior(PriorConfig(**content["prior"]), tuple(content["shape"]), grids, content["classes"])
    return torch.cat([v.flatten() for v in made.state_dict().values()])


REFUSED = {
    "--kind gmm": "--kind gmm is over a vector of latents; vq_vae has codes: valid: transformer",
    "--kind transformer --components 3": "--components does not apply to transformer; it is an option of gmm",
    "--kind transformer --width 100": "--width 100 must be a multiple of 64",
    "--kind transformer --label_dropout 0.5": "--label_dropout leaves out labels: it needs labels",
    "--kind transformer --name a/b": "--name a/b must be a folder's name",
    "--kind transformer --resume": "--resume: there is no ",
    "--kind transfromer": "--kind transfromer",
    "--kind vamp": "--kind vamp is trained with its model, not afterwards: movae train --prior vamp",
    "": "which kind of prior?",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(trained, capsys, flags):
    before = sorted(trained["vq"].rglob("*"))
    prior(trained["vq"], flags, status=2)
    said = capsys.readouterr().err.strip()
    assert REFUSED[flags] in said
    assert "\n" not in said
    assert sorted(trained["vq"].rglob("*")) == before


def test_a_prior_over_codes_is_refused_for_latents(trained, capsys):
    prior(trained["vae"], "--kind transformer", status=2)
    assert (
        "is over codes; vae has a vector of latents: valid: gmm, flow, flow_matching" in capsys.readouterr().err
    )


def test_samples_refuse_what_the_prior_has_not(runs, capsys):
    run = runs["vq"]
    for flags, said in {
        "--label 3": "--label 3 is for a fitted prior",
        "--prior mine": "has no such prior; it has none",
        "--guidance 2": "--guidance 2 is for a fitted prior",
        "--order confidence": "--order confidence is for a fitted prior of kind maskgit",
        "--mode reconstruct --order confidence": "--order confidence is for --mode sample",
    }.items():
        sample(run, flags, status=2)
        assert said in capsys.readouterr().err
    prior(run, f"--kind transformer {STEPPED}")
    capsys.readouterr()
    for flags, said in {
        "--label 3": "transformer was fitted without labels",
        "--guidance 2": "guidance 2 goes from no label towards one: transformer was fitted without labels",
        "--prior transfomer": "did you mean transformer",
        "--prior transformer --mode reconstruct": "is for --mode sample",
        "--order confidence": "--order confidence: transformer is no maskgit",
        "--order_noise 3": "--order_noise 3 is for order confidence",
    }.items():
        sample(run, flags, status=2)
        assert said in capsys.readouterr().err


def test_a_prior_of_other_weights_or_another_grid_is_refused(runs, capsys):
    run = runs["vq"]
    prior(run, f"--kind transformer {STEPPED}")
    path = run / "priors" / "transformer" / "prior.pt"
    content = checkpoint.load(path)
    content["of"]["weights"] = "0123456789abcdef" * 4
    checkpoint.save(path, content)
    capsys.readouterr()
    sample(run, status=2)
    said = capsys.readouterr().err
    assert "is of weights 0123456789ab, the model has " in said
    assert "draw without it (prior none)" in said
    content["of"]["grids"] = [[8, 8, 16]]
    checkpoint.save(path, content)
    sample(run, status=2)
    assert "is over codes 8x8 of 16, the model has 4x4 of 16" in capsys.readouterr().err


def test_every_kind_is_built_with_its_defaults():
    """The catalog's places and options are those of the classes."""
    for kind, info in catalog.KINDS.items():
        config = PriorConfig(kind)
        check_prior(config)
        grids = (base.Grid(4, 4, 8),) if info.latents == "codebook" else ()
        made = base.build_prior(config, (16,) if grids else (2, 3), grids, 10)
        assert made.exact == info.exact
        assert hasattr(made, "loss") == info.stepped


@pytest.mark.parametrize("name", [n for n in recipe_names() if re.match(r"priors/(?!fashion_mnist)", n)])
def test_a_recipe_of_priors_is_valid(name):
    _, config = parse(["run", "--config", name])
    assert config.kind in name


def test_held_out_rows_are_not_fitted_to(trained):
    (path,) = (trained["vq"] / "encoded").glob("train-*.latents")
    rows = fit.divide(open_latents(path), 0.1)
    assert len(rows.held_out) == 30
    assert sorted(torch.cat([rows.fitted, rows.held_out]).tolist()) == list(range(300))
    batches = [fit.batch_rows(rows.fitted, step, 30, 0, 1, seed=0) for step in range(18)]
    for epoch in (batches[:9], batches[9:]):
        assert sorted(torch.cat(epoch).tolist()) == sorted(rows.fitted.tolist())
    halves = [fit.batch_rows(rows.fitted, 4, 15, rank, 2, seed=0) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), batches[4])
