"""`movae encode`: one file per split, weights and transform, which says whether it is whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from movae_fast.cli import main
from movae_fast.models import build_model
from movae_fast.priors import latents
from movae_fast.priors.codes import Grid, codes_of, grids_of, images_of, usage_bits
from movae_fast.training.build import load_model, make_loader

CPU = torch.device("cpu")
COMMON = (
    "--dataset digits --image_size 16 --hidden_dims 8 8 --epochs 1 --batch_size 100 --limit_train 300 "
    "--device cpu"
)
KINDS = {
    "vq": "--arch vq_vae --embedding_dim 8 --num_embeddings 16 --num_residual_layers 1",
    "vae": "--arch vae --latent_dim 4",
    "flipped": "--arch vae --latent_dim 4 --flip",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name, each trained at its first use."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            words = (
                f"train {COMMON} {KINDS[name]} --limit_test 64 --seed 3 --device cpu --exp_dir {root / name}"
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("movae_fast.cli.train.draw_run", lambda run, tag: None)
                assert main(words.split()) == 0
            made[name] = root / name
        return made[name]

    return get


def encode(run, split="train", status=0):
    assert main(["encode", str(run), "--split", split, "--device", "cpu"]) == status


def opened(run, split="train"):
    (path,) = (run / "encoded").glob(f"{split}-*.latents")
    return latents.open_latents(path)


def images(run, split):
    trained, model = load_model(run, CPU)
    parts = list(make_loader(trained, CPU, split, in_order=True).epoch())
    return model, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_a_file_holds_the_codes_of_the_split_in_order(runs, capsys):
    run = runs("vq")
    encode(run)
    said = capsys.readouterr().out
    assert "300 rows" in said
    assert "4x4 of 16, uint16" in said
    assert "which was there" not in said
    file, (model, x, y) = opened(run), images(run, "train")
    assert torch.equal(file.tensor(), model.quantize(model.encode(x)[0])[1].flatten(1))
    assert torch.equal(file.label_tensor(), y)
    assert file.grids == grids_of(model)
    assert isinstance(file.values, np.memmap)
    # The images of the codes are the reconstructions.
    torch.testing.assert_close(images_of(model, file.tensor()[:20]), model.reconstruct(x[:20]))
    before = file.path.stat().st_mtime_ns
    encode(run)
    assert "which was there" in capsys.readouterr().out
    assert file.path.stat().st_mtime_ns == before


def test_posteriors_are_means_and_log_variances(runs):
    run = runs("vae")
    encode(run, "test")
    file, (model, x, _) = opened(run, "test"), images(run, "test")
    torch.testing.assert_close(file.tensor(), torch.stack(model.encode(x), 1).detach())
    assert file.grids == ()
    rows = torch.tensor([3, 1])
    assert torch.equal(file.tensor(rows), file.tensor()[rows])


def test_mirrored_images_follow_where_training_mirrors(runs):
    run = runs("flipped")
    encode(run)
    file, (model, x, y) = opened(run), images(run, "train")
    assert (len(file.values), file.images) == (600, 300)
    torch.testing.assert_close(file.tensor()[300:], torch.stack(model.encode(x.flip(-1)), 1).detach())
    assert torch.equal(file.label_tensor(), torch.cat([y, y]))


def test_other_weights_and_another_transform_are_another_file(runs):
    trained, model = load_model(runs("vq"), CPU)
    known = latents.identity(trained, model, "train")
    with torch.no_grad():
        model.codebook[0, 0] += 1
    assert latents.key_of(latents.identity(trained, model, "train")) != latents.key_of(known)
    trained.data.bits = 5
    changed = latents.identity(trained, model, "train")
    assert changed["transform"] != known["transform"]
    encode(runs("vq"))
    with pytest.raises(ValueError, match=rf"weights {known['weights'][:12]}, here {changed['weights'][:12]}"):
        latents.open_latents(opened(runs("vq")).path, changed)


@pytest.mark.parametrize("at", [20, 5000, -1])
def test_damage_is_said_and_nothing_is_overwritten(runs, tmp_path, at):
    """A byte of the header, of the codes, and of the labels."""
    encode(runs("vq"))
    data = bytearray(opened(runs("vq")).path.read_bytes())
    data[at] ^= 1
    path = tmp_path / "train.latents"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not a whole encoded file .*delete it and encode again"):
        latents.open_latents(path)
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match="not a whole encoded file"):
        latents.open_latents(path)


def test_a_hierarchy_is_refused():
    model = build_model("nvae", (1, 32, 32), "none", {"preset": "tiny"}, None)
    with pytest.raises(ValueError, match="nvae has a hierarchy of latents; encode takes codes or one vector"):
        latents.check_encodable(model, "nvae")


def test_bits_by_usage_are_the_entropy_of_the_usage():
    codes = np.arange(4000).astype(np.uint16).reshape(-1, 4) % 4
    assert usage_bits(codes, [Grid(2, 2, 4)], codes) == pytest.approx(2.0, abs=1e-3)
    # Each map has its own: the first place is always 3, which costs nothing.
    maps, skewed = [Grid(1, 1, 4), Grid(1, 3, 4)], codes.copy()
    skewed[:, 0] = 3
    other = np.bincount(skewed[:, 1:].reshape(-1)) / 3000
    expected = -3 / 4 * float(other @ np.log2(np.maximum(other, 1e-9)))
    assert usage_bits(skewed, maps, skewed) == pytest.approx(expected, abs=5e-3)


def test_codes_of_two_batches_are_those_of_one(runs):
    model, x, _ = images(runs("vq"), "test")
    assert torch.equal(torch.cat([codes_of(model, part) for part in x.split(7)]), codes_of(model, x))
