"""`movae serve`: what its page computes, who is answered, and one line where it cannot."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from movae_fast.cli import main, serve
from movae_fast.cli.flags.serve import ServeConfig, parse
from movae_fast.evaluation.sample_source import SampleSource
from movae_fast.pages.live import Viewer
from movae_fast.pictures import to_pixels
from movae_fast.training.build import load_model, make_loader

CPU = torch.device("cpu")


def viewer_of(folder: Path) -> Viewer:
    config, model = load_model(folder, CPU)
    return Viewer(SampleSource(model), config.data.normalize, make_loader(config, CPU, "test"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_viewer_decodes_what_the_sliders_say(train):
    viewer = viewer_of(train("--multirate", "--arch mlp_vae", "--hidden_dims 8"))
    z = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    model = viewer.model
    for log10_beta in (-2.0, 1.0):
        shown = viewer.from_latents(z, log10_beta)
        model.set_beta(10**log10_beta)
        with torch.no_grad():
            expected = to_pixels(model.to_image(model.decode(z)), 20)[0]
        assert np.array_equal(shown, expected)
        assert shown.shape == (320, 320, 3)
    assert not np.array_equal(viewer.from_latents(z, -2.0), viewer.from_latents(z, 1.0))
    original, mean = viewer.latents_of(3, 0.0)
    with torch.no_grad():
        assert torch.equal(mean, model.encode(viewer.test_image(3))[0])
    assert np.array_equal(original, to_pixels(viewer.test_image(3), 20)[0])
    with pytest.raises(ValueError, match="there are 64, numbered from 0"):
        viewer.test_image(64)


def test_the_viewer_edits_a_map_of_codes(train):
    flags = ("--arch vq_vae", "--latent_dim null", "--embedding_dim 4", "--num_embeddings 8")
    viewer = viewer_of(train(*flags))
    _, codes = viewer.codes_of(0)
    with torch.no_grad():
        reconstruction = viewer.model.reconstruct(viewer.test_image(0))
    shown = viewer.from_codes(codes).astype(int)
    assert np.abs(shown - to_pixels(reconstruction.clamp(0, 1), 20)[0]).max() <= 1
    codes[0][0] = (codes[0][0] + 1) % 8
    assert np.abs(viewer.from_codes(codes).astype(int) - shown).max() > 0
    for wrong in ([[0]], [[8] * 4] * 4, [["x"] * 4] * 4, [[None] * 4] * 4):
        with pytest.raises(ValueError, match="from 0 to 7"):
            viewer.from_codes(wrong)
    viewer.model.code_usage.fill_(1)
    assert viewer.random_codes(1) == viewer.random_codes(1) != viewer.random_codes(2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_one_line(train, capsys, host):
    folder = train()
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(folder), "--host", host, "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "Address already in use; give another --port" in error
    assert error.count("\n") == 1


def test_bad_requests(capsys, monkeypatch, train):
    assert main(["serve"]) == 2
    assert "which model?" in capsys.readouterr().err
    assert main(["serve", "x", "--port", "70000"]) == 2
    assert "at most 65,535" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["serve", str(train())]) == 2
    assert "pip install 'movae-fast[web]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--host 192\.0\.2\.1"):
        serve.check_free("192.0.2.1", free_port())


def test_this_machine_alone_unless_told_otherwise():
    assert parse(["x"]).host == "127.0.0.1"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["mlp_vae", "vq_vae"])
def test_the_page_answers_by_http(train, arch):
    """By gradio's own client, and by plain requests: one with another host's name is refused."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    own = ("--embedding_dim 4", "--num_embeddings 8", "--latent_dim null")
    folder = train(f"--arch {arch}", *(own if arch == "vq_vae" else ("--multirate",)))
    config = ServeConfig(str(folder), port=free_port(), device="cpu")
    blocks = serve.build(config)
    serve.launch(blocks, config, wait=False)
    try:
        url = f"http://127.0.0.1:{config.port}"
        with urllib.request.urlopen(url) as answer:
            page = answer.read().decode()
        assert arch in page
        assert "fonts.googleapis" not in page
        asked = urllib.request.Request(url, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(asked)
        client = Client(url, verbose=False)
        if arch == "vq_vae":
            original, image, codes = client.predict(0, api_name="/encode")
            assert np.array(codes["data"]).shape == (4, 4)
            assert Path(original).stat().st_size > 0
            image = client.predict(codes, api_name="/codes")
        else:
            image = client.predict(0.5, 1.0, -1.0, 0.0, 2.0, api_name="/latents")
        assert Path(image).stat().st_size > 0
    finally:
        blocks.close()
