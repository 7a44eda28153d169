"""LPIPS against torchmetrics' network with the same random backbone, and its gradient."""

import pytest
import torch

from movae_fast.cli.flags.train import parse
from movae_fast.names import ArgumentError
from movae_fast.objectives.perceptual import heads_path, load_lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like torchvision's, with random weights of its shapes."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}, path)
    return path


def test_it_is_torchmetrics_distance_and_has_a_gradient_at_equal_images(weights):
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, use_dropout=True)
    heads = torch.load(heads_path(), map_location="cpu", weights_only=True)
    theirs.load_state_dict(heads, strict=False)
    backbone = torch.load(weights, weights_only=True)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    for part in slices:
        for name, module in part.named_children():
            if isinstance(module, torch.nn.Conv2d):
                module.load_state_dict({k: backbone[f"features.{name}.{k}"] for k in ("weight", "bias")})
    theirs.eval()
    ours = load_lpips(weights, CPU)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = theirs(2 * x - 1, 2 * y - 1).flatten()
        assert float(truth.min()) > 0
        torch.testing.assert_close(ours(x, y), truth, rtol=1e-4, atol=1e-8)
    grey = torch.rand(1, 1, 16, 16).requires_grad_()
    distance = ours(grey, grey.detach())
    assert float(distance.detach()) == 0
    (gradient,) = torch.autograd.grad(distance.sum(), grey)
    assert bool(gradient.isfinite().all())


def test_wrong_files_are_refused(weights, tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name, message in (("other.pth", "is not torchvision's VGG16"), ("none.pth", "no such file")):
        with pytest.raises(ArgumentError, match=message):
            load_lpips(tmp_path / name, CPU)
    digits = "--dataset digits --image_size 16 --arch mlp_vae --extra_objectives lpips"
    with pytest.raises(ValueError, match="need each other"):
        parse(digits.split())
    with pytest.raises(ValueError, match="no such file"):
        parse([*digits.split(), "--lpips_weights", "nowhere.pth"])
    config = parse([*digits.split(), "--lpips_weights", str(weights)]).config
    assert config.objective_names[-1] == "lpips"
