"""`movae encode RUN FOLDER`: the latents or codes of a folder's images, as the model gives them one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import movae_fast
from movae_fast.cli import main
from tests.trained_models import write_model


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven grey images of the model's size, in two folders."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for k in range(7):
        path = folder / ("a" if k < 3 else "b") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("family", ["mlp_vae", "vq_vae", "nvae"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_folder_is_encoded_as_its_images_are(
    family: str, suffix: str, tmp_path: Path, pictures: Path, own_cache, capsys
) -> None:
    run, out = write_model(family, tmp_path / "model"), tmp_path / f"out{suffix}"
    line = ["encode", str(run), str(pictures), "--out", str(out), "--device", "cpu", "--batch_size", "3"]
    assert main(line) == 0, capsys.readouterr().err
    assert "7 images" in capsys.readouterr().out
    if suffix == ".npz":
        with np.load(out) as file:
            arrays = {name: file[name] for name in file.files}
        names = arrays.pop("files").tolist()
    else:
        with safe_open(out, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["files"])
    assert names == [f"{'a' if k < 3 else 'b'}/{k}.png" for k in range(7)]
    model = movae_fast.load(run, "cpu")
    side = model.image_shape[1]
    singles = []
    for name in names:
        image = torch.from_numpy(np.array(Image.open(pictures / name)))[None, None]
        if side != 16:  # as the package resizes
            from movae_fast.data.transforms import resize

            image = resize(image, side, "bilinear")
        singles.append(image)
    x = torch.cat(singles)
    if family == "mlp_vae":
        expected = dict(zip(("mean", "log_variance"), model.posterior(x), strict=True))
    elif family == "vq_vae":
        expected = {"codes": model.quantize(model.encode(x)).indices}
    else:
        expected = {"latents": model.encode(x)}
    assert set(arrays) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(arrays[name]), values, rtol=1e-4, atol=1e-4)
    assert main(line) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_bad_images_and_folders(tmp_path: Path, pictures: Path, own_cache, capsys) -> None:
    run = str(write_model("mlp_vae", tmp_path / "model"))
    (pictures / "a" / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out.npz"
    assert main(["encode", run, str(pictures), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("movae encode: --folder")
    assert "broken.png" in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert main(["encode", run, str(pictures), "--out", str(out), "--on_bad_image", "skip"]) == 0
    assert "1 images left out" in capsys.readouterr().out
    with np.load(out) as file:
        assert len(file["mean"]) == len(file["files"]) == 7
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty")], "no image lies below it"),
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(pictures), "--out", "x.txt"], "ends in .npz or .safetensors"),
        (["--out", "x.npz"], "give the folder"),
    ):
        assert main(["encode", run, *words]) == 2
        assert message in capsys.readouterr().err
