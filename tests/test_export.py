"""`movae export`: files that load again, programs that equal the model with any batch, for every family."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import movae_fast
from movae_fast.api import exporting
from movae_fast.api.programs import programs_of
from movae_fast.cli import main
from movae_fast.names import ArgumentError
from movae_fast.training import checkpoint
from movae_fast.training.weights_file import load_weights
from tests.trained_models import FAMILIES, write_model

# torch.onnx has deprecations of its own that are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_no_threads")]
QUICK = {"vae", "vq_vae"}  # by default; the rest takes minutes


@pytest.fixture
def _no_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def _one_registry() -> Iterator[None]:
    """Read torch.onnx's table of operators once, not at each export: that takes 1.3 s of CPU time."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        tables = functools.cache(_registration.ONNXRegistry.from_torchlib)
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(tables))
        yield


def each_family():
    return [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.mark.usefixtures("_one_registry")
@pytest.mark.parametrize("family", each_family())
@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_programs_equal_the_model(family: str, kind: exporting.ExportFormat, tmp_path: Path) -> None:
    """Loaded again here, and run on a batch that the exporter did not try."""
    model = movae_fast.load(write_model(family, tmp_path / "model"), "cpu")
    written = exporting.export_programs(model, tmp_path / "out", kind)
    names = [w.path.stem for w in written]
    codebook = model.network.latents == "codebook"
    assert names == ["encoder", "decoder", *(["quantizer", "lookup"] if codebook else [])]
    assert all(w.difference is not None and w.difference <= 1e-5 for w in written)
    x = torch.rand(7, *model.image_shape)
    beta = {}
    if model.network.rates is not None:
        beta = {"beta": torch.tensor([0.3])}
        model.set_beta(0.3)
    encoder, decoder = (run_of(tmp_path / "out", name, kind) for name in names[:2])
    z = encoder(images=x, **beta)[0]
    torch.testing.assert_close(z, model.encode(x), rtol=1e-5, atol=1e-5)
    if codebook:
        codewords, codes = run_of(tmp_path / "out", "quantizer", kind)(latents=model.encode(x))
        assert torch.equal(codes, model.quantize(model.encode(x)).indices)
        (looked_up,) = run_of(tmp_path / "out", "lookup", kind)(codes=codes)
        torch.testing.assert_close(looked_up, codewords, rtol=0, atol=1e-6)
        z = codewords
    (images,) = decoder(latents=z, **beta)
    torch.testing.assert_close(images, model.reconstruct(x), rtol=1e-5, atol=1e-5)


def run_of(folder: Path, name: str, kind: str):
    """A program as a function of tensors by name."""
    if kind == "torch_export":
        loaded = torch.export.load(folder / f"{name}.pt2").module()
        return lambda **inputs: exporting.as_tuple(loaded(**inputs))
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    return lambda **inputs: tuple(
        torch.from_numpy(v) for v in session.run(None, {k: v.numpy() for k, v in inputs.items()})
    )


def test_a_program_that_differs_is_refused(tmp_path: Path, monkeypatch) -> None:
    model = movae_fast.load(write_model("mlp_vae", tmp_path / "model"), "cpu")
    traced = exporting.traced

    def wrong(program):
        other = copy.deepcopy(program.module)
        next(other.parameters()).data.add_(0.01)
        return traced(dataclasses.replace(program, module=other))

    monkeypatch.setattr(exporting, "traced", wrong)
    with pytest.raises(ArgumentError, match=r"part encoder: its outputs differ by .*nothing was written"):
        exporting.export_programs(model, tmp_path / "out", "torch_export")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_traced_is_named(tmp_path: Path, monkeypatch) -> None:
    model = movae_fast.load(write_model("mlp_vae", tmp_path), "cpu")
    decoder = type(model.network).decode
    monkeypatch.setattr(type(model.network), "decode", lambda self, z: decoder(self, z) * float(z.sum()))
    (program,) = (p for p in programs_of(model) if p.name == "decoder")
    with pytest.raises(ArgumentError, match="part decoder cannot be exported"):
        exporting.traced(program)


def test_safetensors_from_the_command_line(tmp_path: Path, train, capsys) -> None:
    """The folder is a RUN for every command, and a model card stands in it."""
    run = train("--arch vae")
    capsys.readouterr()
    assert main(["export", str(run)]) == 0
    folder = run / "export_safetensors"
    assert capsys.readouterr().out.strip() == str(folder)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    card = (folder / "README.md").read_text()
    assert "library_name: movae-fast" in card
    assert "| reconstruction |" in card
    assert "latent_dim: 4" in card
    assert json.loads((folder / "config.json").read_text())["latent_dim"] == 4
    x = torch.rand(3, 1, 16, 16)
    moved = shutil.move(folder, tmp_path / "elsewhere")  # nothing in it points back
    torch.testing.assert_close(movae_fast.load(moved).encode(x), movae_fast.load(run).encode(x), rtol=0, atol=0)
    assert main(["export", str(run), "--outdir", str(moved)]) == 2
    assert "--outdir" in capsys.readouterr().err
    assert main(["train", "--resume", str(moved)]) == 2
    assert "holds weights only" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "onxn"]) == 2
    assert "did you mean onnx" in capsys.readouterr().err
    assert main(["export"]) == 2
    assert "which model?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "2"}, "is of version 2 of its format, and this movae-fast reads up to 1: install a newer"),
        ({"format": "other"}, "holds no weights of movae-fast"),
        ({"config": "{"}, "its header has no configuration"),
    ],
)
def test_a_file_of_a_newer_version_or_another_program(header, message, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = write_model("mlp_vae", tmp_path) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | header)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(path)
    assert "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated, damaged"):
        movae_fast.load(tmp_path)


def test_a_checkpoint_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": "movae-fast checkpoint 2"}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"of a newer movae-fast \(2, this one reads 1\)"):
        checkpoint.load(path)
    torch.save({"format": "movae-fast checkpoint x"}, path)
    with pytest.raises(checkpoint.CheckpointError, match="is not a checkpoint of movae-fast"):
        checkpoint.load(path)


def test_a_local_folder_of_the_hub(tmp_path: Path) -> None:
    """Saved and loaded by huggingface_hub's mixin, without a network."""
    pytest.importorskip("huggingface_hub")
    model = movae_fast.load(write_model("vae", tmp_path / "model"), "cpu")
    x = torch.rand(2, *model.image_shape)
    saved = model.save_pretrained(tmp_path / "saved")
    again = movae_fast.HubModel.from_pretrained(saved)
    assert torch.equal(again.model.encode(x), model.encode(x))
    again.save_pretrained(tmp_path / "hub")
    assert (tmp_path / "hub" / "README.md").read_text().startswith("---\nlibrary_name: movae-fast")
    third = movae_fast.HubModel.from_pretrained(str(tmp_path / "hub"), device="cpu").model
    assert torch.equal(third.reconstruct(x), model.reconstruct(x))
    with pytest.raises(ArgumentError, match="is not empty and is not overwritten"):
        model.save_pretrained(tmp_path / "saved")


def test_an_upload_takes_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is replaced: it keeps what it was given."""
    hub = pytest.importorskip("huggingface_hub")
    model = movae_fast.load(write_model("vae", tmp_path / "model"), "cpu")
    calls = []

    class Address(str):
        repo_id = "owner/name"

    class Client:
        def __init__(self, token: str | None) -> None:
            calls.append(("client", token))

        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> Address:
            calls.append(("repository", repository, private, exist_ok))
            return Address("https://huggingface.co/owner/name")

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls.append(("upload", repo_id))

    monkeypatch.setattr(hub, "HfApi", Client)
    assert model.push_to_hub("name", private=True, token="t") == "https://huggingface.co/owner/name"
    assert calls == [("client", "t"), ("repository", "name", True, True), ("upload", "owner/name")]
    x = torch.rand(2, *model.image_shape)
    again = movae_fast.load(tmp_path / "uploaded", "cpu")
    assert torch.equal(again.reconstruct(x), model.reconstruct(x))
