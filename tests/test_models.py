"""Networks against layer lists written down independently: parameter counts, shapes, gradients' reach."""

import itertools

import pytest
import torch

from movae_fast.models import MODELS, build_model, model_options


def conv(a, b, k, bias=True):
    return a * b * k * k + (b if bias else 0)


def linear(a, b):
    return a * b + b


def bn(c):
    return 2 * c


def vae_count(c, size, latent=128, h=(32, 64, 128, 256, 512)):
    side = size // 2 ** len(h)
    flat = h[-1] * side * side
    count = 0
    for a, b in zip((c, *h), h, strict=False):
        count += conv(a, b, 3) + bn(b)
    count += 2 * linear(flat, latent) + linear(latent, flat)
    up = (*reversed(h), h[0])
    for a, b in itertools.pairwise(up):
        count += conv(a, b, 3) + bn(b)
    return count + conv(h[0], c, 3)


def betatc_count(c, size, latent=128, h=(32, 32, 32, 32)):
    side = size // 2 ** len(h)
    flat = h[-1] * side * side
    count = sum(conv(a, b, 4) for a, b in zip((c, *h), h, strict=False))
    count += linear(flat, 256) + 2 * linear(256, latent) + linear(latent, flat)
    up = (*reversed(h), h[0])
    return count + sum(conv(a, b, 3) for a, b in itertools.pairwise(up)) + conv(h[0], c, 3)


def vq_count(c, _size, h=(128, 256), d=64, k=512, residual=2):
    w = h[-1]
    block = conv(w, w, 3, bias=False) + conv(w, w, 1, bias=False)
    count = sum(conv(a, b, 4) for a, b in zip((c, *h), h, strict=False))
    count += conv(w, w, 3) + residual * block + conv(w, d, 1)
    count += k * d
    count += conv(d, w, 3) + residual * block
    up = (*reversed(h), c)
    return count + sum(conv(a, b, 4) for a, b in itertools.pairwise(up))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("arch", "count"), [("vae", vae_count), ("betatc_vae", betatc_count), ("vq_vae", vq_count)]
)
def test_mo_vae_networks_have_the_published_layers(arch, count, size, channels):
    model = build_model(arch, (channels, size, size), "tanh", {})
    assert sum(p.numel() for p in model.parameters()) == count(channels, size)
    x = torch.rand(2, channels, size, size)
    with torch.no_grad():
        out = model(x)
    assert out.preactivation.shape == x.shape
    if arch == "vq_vae":
        assert model.encode(x)[0].shape == (2, 64, size // 4, size // 4)
        assert out.codes.shape == (2, size // 4, size // 4)
        assert out.usage.sum() == 2 * (size // 4) ** 2
    else:
        assert out.mu.shape == out.logvar.shape == out.z.shape == (2, 128)


def test_the_published_counts_in_numbers():
    """Anchors for the layer lists above, worked out by hand: 3x32x32, default widths."""
    assert vae_count(3, 32) == 3_346_275
    assert betatc_count(3, 32) == 204_003
    six = build_model("vq_vae", (3, 32, 32), "tanh", {"num_residual_layers": 6})
    assert sum(p.numel() for p in six.parameters()) == vq_count(3, 32, residual=6)


def test_cnn_vae_is_the_collections_network():
    model = build_model("cnn_vae", (3, 64, 64), "tanh", {})
    w = (64, 128, 256, 512)
    encoder = sum(conv(a, b, 4) for a, b in zip((3, *w), w, strict=False)) + bn(128) + bn(256) + bn(512)
    encoder += conv(512, 512, 4)
    heads = 2 * (linear(512, 256) + bn(256) + linear(256, 128))
    decoder = conv(128, 512, 4) + sum(bn(c) for c in w)
    decoder += sum(conv(a, b, 4) for a, b in zip((512, 256, 128, 64), (256, 128, 64, 3), strict=True))
    assert sum(p.numel() for p in model.parameters()) == encoder + heads + decoder
    # coef_kl 1 of the published loss: KL without the 1/2, over the number of values of an image.
    assert MODELS["cnn_vae"].default_weights((3, 64, 64)) == (1.0, 2 / (3 * 64 * 64))


def test_torch_vae_is_torch_vaes_network():
    model = build_model("torch_vae", (1, 64, 64), "sigmoid", {"latent_dim": 64})
    encoder = conv(1, 32, 3) + bn(32) + conv(32, 64, 3) + bn(64) + conv(64, 128, 3) + bn(128)
    encoder += 2 * linear(128 * 8 * 8, 64)
    decoder = linear(64, 128 * 8 * 8) + conv(128, 64, 3) + bn(64) + conv(64, 32, 3) + bn(32) + conv(32, 1, 3)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


def test_dcgan_vae_follows_the_guidelines():
    model = build_model("dcgan_vae", (3, 64, 64), "tanh", {"latent_dim": 16})
    kinds = [type(m) for m in model.modules()]
    assert torch.nn.Linear not in kinds
    assert torch.nn.MaxPool2d not in kinds
    decoder = [type(m) for m in model.decoder]
    assert torch.nn.ReLU in decoder
    assert torch.nn.LeakyReLU not in decoder
    assert model.activation == "tanh"


SMALL = {
    "vae": {"hidden_dims": [8, 8], "latent_dim": 4},
    "betatc_vae": {"hidden_dims": [8, 8], "latent_dim": 4},
    "vq_vae": {"hidden_dims": [8, 8], "embedding_dim": 4, "num_embeddings": 8},
    "cnn_vae": {"dim": 8, "latent_dim": 4},
    "mmd_vae": {"dim": 8, "latent_dim": 4},
    "torch_vae": {"max_filters": 8, "latent_dim": 4},
    "dcgan_vae": {"max_filters": 8, "latent_dim": 4},
    "provlae": {"latent_dim": 2, "num_ladders": 2, "hidden_dim": 4, "fc_dim": 8},
    "vlae": {"latent_dim": 2, "num_ladders": 1, "hidden_dim": 4, "fc_dim": 8},
    "linear_vae": {"latent_dim": 4},
    "mlp_vae": {"latent_dim": 4, "hidden_dims": [8, 8]},
    "betatc_mlp_vae": {"latent_dim": 4, "hidden_dims": [8, 8]},
    "nvae": {"preset": "tiny", "groups_per_scale": 2, "channels": 4},
}


ONE_SIZE = {arch: int(arch[-2:]) for arch in MODELS if arch[-2:].isdigit()}
CASES = [(arch, shape) for arch in MODELS if arch not in ONE_SIZE for shape in ((1, 32, 32), (3, 16, 16))]
CASES += [(arch, (1 if size == 28 else 3, size, size)) for arch, size in ONE_SIZE.items()]


@pytest.mark.parametrize(("arch", "shape"), CASES)
def test_every_model_reconstructs_samples_and_splits_its_parameters(arch, shape):
    model = build_model(arch, shape, "tanh", SMALL.get(arch, {}))
    x = torch.rand(3, *shape)
    assert model(x).preactivation.shape == x.shape
    model.eval()
    assert model.reconstruct(x).shape == x.shape
    assert model.sample(2, torch.Generator().manual_seed(0)).shape == (2, *shape)
    own = [p for params in model.task_parameters().values() for p in params]
    split = {id(p) for p in own} | {id(p) for p in model.shared_parameters()}
    assert split == {id(p) for p in model.parameters()}
    assert not {id(p) for p in own} & {id(p) for p in model.shared_parameters()}
    assert set(model.task_parameters()) <= set(model.objectives)


def test_a_sized_family_is_one_class_whose_images_choose_the_network():
    for family in ("cnn_vae", "resnet_vae"):
        classes = {MODELS[f"{family}_{size}"] for size in (28, 32, 64)}
        assert len(classes) == 1
        (made,) = classes
        for size, latents in {28: 32, 32: 256, 64: 64}.items():
            with torch.device("meta"):
                shape = (3, size, size)
                named = build_model(f"{family}_{size}", shape, "sigmoid", {})
                assert named.latent_dim == latents
                assert str(made(shape)) == str(named)
        with pytest.raises(ValueError, match=f"48 does not fit {family}: .* sides of 28, 32 and 64"):
            made((3, 48, 48))
        with pytest.raises(
            ValueError, match=f"64 does not fit {family}_32: .*; for 64x64 there is {family}_64"
        ):
            build_model(f"{family}_32", (3, 64, 64), "sigmoid", {})
        with pytest.raises(ValueError, match=f"48 does not fit {family}_32: give --image_size 32$"):
            build_model(f"{family}_32", (3, 48, 48), "sigmoid", {})


def test_straight_through_and_the_two_codebook_losses():
    model = build_model("vq_vae", (1, 16, 16), "tanh", SMALL["vq_vae"])
    x = torch.rand(2, 1, 16, 16)
    (z,) = model.encode(x)
    z = z.detach().requires_grad_()
    out = model.forward_features((z,))
    codewords = model.lookup(out.codes)
    torch.testing.assert_close(out.embedding.mean(), (codewords - z).square().mean())
    (to_z,) = torch.autograd.grad(out.commitment.mean(), z, retain_graph=True)
    torch.testing.assert_close(to_z, 2 * (z - codewords).detach() / z.numel())
    assert torch.autograd.grad(out.embedding.mean(), z, retain_graph=True, allow_unused=True) == (None,)
    through = codewords.detach().requires_grad_()
    (expected,) = torch.autograd.grad(model.decode(through).sum(), through)
    (got,) = torch.autograd.grad(out.preactivation.sum(), z)
    # The same numbers reach the decoder up to the rounding of z + (c - z).
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("vae", 40, "multiple of 32; the nearest are 32 and 64"),
        ("betatc_vae", 24, "multiple of 16; the nearest are 16 and 32"),
        ("vq_vae", 30, "multiple of 4; the nearest are 28 and 32"),
        ("cnn_vae", 48, "4x4 map"),
        ("torch_vae", 20, "multiple of 8; the nearest are 16 and 24"),
        ("dcgan_vae", 40, "power of two from 8 up; the nearest are 32 and 64"),
    ],
)
def test_a_size_that_does_not_fit_names_those_that_do(arch, size, message):
    with pytest.raises(ValueError, match=message):
        build_model(arch, (1, size, size), "tanh", {})


def test_options_are_checked():
    with pytest.raises(
        ValueError, match="--num_embeddings does not apply to vae, whose options are latent_dim"
    ):
        build_model("vae", (1, 32, 32), "tanh", {"num_embeddings": 5})
    with pytest.raises(ValueError, match="--latent_dim 0 must be positive"):
        build_model("vae", (1, 32, 32), "tanh", {"latent_dim": 0})
    with pytest.raises(ValueError, match="--hidden_dims"):
        build_model("vae", (1, 32, 32), "tanh", {"hidden_dims": []})
    with pytest.raises(ValueError, match="max_filters 3"):
        build_model("torch_vae", (1, 32, 32), "sigmoid", {"max_filters": 3})
    assert "hidden_dims" in model_options("vq_vae")
