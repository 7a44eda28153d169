"""`movae report`: its answers, and one page that is whole and asks the network for nothing."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from movae_fast.cli import main
from movae_fast.evaluation.sampling import traverse_around
from movae_fast.evaluation.trained import beta_kept
from movae_fast.models import build_model
from movae_fast.pages import answers, charts
from movae_fast.pages.answers import BetaPoint
from movae_fast.pages.report import with_flags


class Page(HTMLParser):
    """Keep what a browser would load, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                (self.links if tag == "a" else self.loaded).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path) -> Page:
    """Assert that a page is small, whole, and needs no network; return it."""
    html = path.read_text(encoding="utf-8")
    assert len(html) < 5_000_000
    page = Page(html)
    assert "script" not in page.tags
    assert "default-src 'none'" in html
    assert all(source.startswith("data:") for source in page.loaded)
    assert all(link.startswith("#") for link in page.links)
    assert "url(" not in html
    assert "@import" not in html
    for source in page.loaded:
        kind, _, content = source.partition(";base64,")
        if kind == "data:image/png":
            Image.open(io.BytesIO(base64.b64decode(content))).verify()
        elif kind == "data:image/svg+xml":
            drawing = ElementTree.fromstring(base64.b64decode(content))
            for element in drawing.iter():
                for name, value in element.attrib.items():
                    assert not name.endswith("href") or value.startswith("#")
    return page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_multirate_run_and_a_plain_one_on_one_page(train, tmp_path, capsys):
    mlp = ("--arch mlp_vae", "--hidden_dims 8", "--latent_dim 2")
    first = train(*mlp, "--multirate")
    second = train(*mlp, "--beta 3", "--recons_reduction sum", "--agg upgrad")
    out = tmp_path / "page.html"
    words = ["report", str(first), str(second), "--out", str(out), "--betas", "3", "--images", "4"]
    assert main([*words, "--device", "cpu"]) == 0
    page = check_page(out)
    for text in (
        "Which objective conflicts?",
        "Which beta to take?",
        "How many latents are used?",
        "The runs beside each other",
        "Images over beta",
        "Originals and reconstructions",
        "It was trained for one: 3",
        "64 evenly spaced test images",
        # Of a 16 x 16 grey image under a Gaussian of variance 1/2: the log's distortion has no constant.
        f"with the likelihood's constant, {16 * 16 * 0.5 * math.log(math.pi):.4g} nats, which the curves",
        torch.__version__,
    ):
        assert text in page.text, text
    assert page.text.count("training's own evaluation after step 3") >= 6
    assert main([*words, "--device", "cpu"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    shown = json.loads((first / "machine.jsonl").read_text())
    assert shown["step"] == 0
    assert shown["device"] in page.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_codebook_and_its_use(train):
    flags = ("--arch vq_vae", "--latent_dim null", "--embedding_dim 4", "--num_embeddings 8")
    folder = train(*flags)
    assert main(["report", str(folder), "--images", "4", "--device", "cpu"]) == 0
    page = check_page(folder / "report.html")
    assert "Is the codebook used?" in page.text
    assert "The codebook" in page.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_the_data_are_gone_the_page_has_the_log_and_says_so(train, monkeypatch, capsys):
    folder = train("--latent_dim 2", "--agg upgrad")

    def gone(*args, **kwargs):
        raise ValueError("data/digits: no such file")

    monkeypatch.setattr("movae_fast.pages.gather.make_loader", gone)
    assert main(["report", str(folder), "--device", "cpu"]) == 0
    assert "data/digits: no such file" in capsys.readouterr().err
    page = check_page(folder / "report.html")
    assert "data/digits: no such file" in page.text
    assert "Which objective conflicts?" in page.text
    assert "Originals and reconstructions" not in page.text


def test_a_name_is_text_and_flags_do_not_break(tmp_path):
    assert with_flags("<b> --agg upgrad, then") == "&lt;b&gt; <code>--agg upgrad</code>, then"
    assert with_flags("--beta 0.005 with") == "<code>--beta 0.005</code> with"
    assert with_flags("--multirate has") == "<code>--multirate</code> has"


def lines_of(update: list[float], step: list[float]) -> list[dict[str, float]]:
    """Return a log whose update and step have these cosines with kl, and 0.5 with the reconstruction."""
    made = []
    for k, (u, s) in enumerate(zip(update, step, strict=True)):
        line = {"step": k, "train/cos_kl": u, "train/cos_reconstruction": 0.5}
        line |= {"train/step_cosine_kl": s, "train/step_cosine_reconstruction": 0.5}
        line |= {"train/conflict": float(u < -1e-3), "train/conflict_steps": 1, "train/min_cosine": u}
        line |= {"train/step_conflict": float(s < -1e-3), "train/step_conflict_steps": 1}
        made.append(line | {"train/step_min_cosine": s})
    return made


NAMES = ("reconstruction", "kl")


def test_the_answer_names_the_objective_that_conflicts():
    said = answers.conflict_answer(lines_of([-0.5, 0.2, -0.1, 0.3], [0.1] * 4), NAMES, "sum")
    assert said.short == "kl: in 50% of the updates"
    assert said.tone == "attention"
    assert "--agg upgrad" in said.why
    said = answers.conflict_answer(lines_of([0.1] * 4, [-0.5, 0.2, 0.2, 0.2]), NAMES, "upgrad")
    assert said.short == "None in the updates; kl in 25% of the applied steps"
    assert "--conflict_free step" in said.why
    said = answers.conflict_answer(lines_of([0.1] * 4, [0.1] * 4), NAMES, "upgrad")
    assert said.tone == "good"
    assert "No update of 4" in said.why
    assert answers.conflict_answer([{"step": 1, "train/kl": 2.0}], NAMES, "sum") is None


@pytest.mark.parametrize(
    ("used", "tone", "short"), [(80, "good", "Yes"), (30, "neutral", "In part"), (3, "attention", "Hardly")]
)
def test_the_answer_says_whether_the_codebook_is_used(used, tone, short):
    said = answers.codebook_answer(used, 100, 2.5, 1000)
    assert (said.tone, said.short.split(":")[0]) == (tone, short)
    assert f"{used} of 100 codes ({used}%)" in said.why


def test_the_answer_says_which_beta_to_take():
    """Of a curve D = 100 / (1 + R), R = 1 / beta, whose D + R is least at R = 9."""
    points = [BetaPoint(b, 1 / b, 100 / (1 + 1 / b), 4) for b in (1 / 99, 1 / 9, 1 / 3, 1.0, 10.0)]
    said = answers.beta_answer(points)
    assert said.short == "0.111, to generate"
    assert "sharpest reconstructions take 0.0101" in said.why
    assert said.tone == "good"
    half = (points[0].distortion + points[-1].distortion) / 2
    kept = answers.thrifty(points)
    assert kept.beta == pytest.approx(1 / 3)
    assert kept.distortion <= half < points[-1].distortion
    assert answers.beta_answer(points[:1]) is None
    assert "end of the range" in answers.beta_answer(points[1:]).why


def test_the_answer_compares_with_the_mean_image():
    said = answers.quality_answer({"test/mse": 0.02, "test/mse_mean_image": 0.08})
    assert said.short == "Their error is 75% below the mean image's"
    assert said.tone == "good"
    assert answers.quality_answer({"test/mse": 0.09, "test/mse_mean_image": 0.08}).tone == "attention"
    assert answers.quality_answer({"test/mse": 0.09}) is None


def test_a_chart_leaves_out_what_is_not_there_and_keeps_colours():
    lines = [{"step": k, "b": 1.0 + k, "c": 0.0} for k in range(4)]
    assert charts.lines_chart(lines, "t", "n", {"a": "a", "c": "c"}) is None
    made = charts.lines_chart(lines, "t", "n", {"a": "a", "b": "b", "c": "c"})
    drawing = base64.b64decode(made.source.partition(",")[2]).decode()
    assert charts.colour(1) in drawing  # b's, the second
    assert charts.colour(0) not in drawing
    assert charts.objective_chart(lines, "kl", "") is None


def test_a_traversal_around_an_image_changes_one_latent():
    torch.manual_seed(0)
    options = {"latent_dim": 3, "hidden_dims": [8]}
    model = build_model("mlp_vae", (1, 8, 8), "sigmoid", options).eval()
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        values, z = traverse_around(model, x, [2, 0], 5, 2.0)
        mean = model.encode(x)[0][0]
    assert values == [-2.0, -1.0, 0.0, 1.0, 2.0]
    for strip, dim in enumerate((2, 0)):
        assert z[strip, :, dim].tolist() == values
        others = [k for k in range(3) if k != dim]
        assert torch.equal(z[strip][:, others], mean[others].expand(5, 2))


def test_a_beta_is_kept():
    from movae_fast.models import make_multirate

    options = {"latent_dim": 3, "hidden_dims": [8]}
    model = make_multirate(build_model("mlp_vae", (1, 8, 8), "sigmoid", options), 0.1, 10.0)
    model.set_beta(0.5)
    with beta_kept(model):
        model.set_beta(torch.tensor([1.0, 2.0]))
    assert math.exp(float(model.rates.evaluated)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which run?"),
        (["nope"], "nope"),
        (["x", "--betas", "1"], "must be at least 2"),
        (["x", "--images", "0"], "must be at least 1"),
    ],
)
def test_bad_requests_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
