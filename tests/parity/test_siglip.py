"""SigLIP's vision tower beside those of transformers: random weights copied by the loader that reads released checkpoints."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from stages.parts.encoders import SiglipVitConfig
from stages.parts.encoders.siglip import SiglipVit

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12, "patch_size": 4}
PICTURES = torch.rand(2, 3, 12, 12, generator=Generator().manual_seed(1)) * 2 - 1


def randomise(module: nn.Module) -> Any:
    """Every weight random, also those that a fresh module has at zero or one."""
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def theirs_of(name: str, **keys: object) -> Any:
    if name == "janus":
        return randomise(transformers.JanusVisionModel(transformers.JanusVisionConfig(**SIZES, mlp_ratio=2.5, hidden_act="gelu")))
    return randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, intermediate_size=60, **keys)))


def ours_of(theirs: nn.Module, image_size: int = 12, **keys: Any) -> SiglipVit:
    ours = SiglipVitConfig(width=24, depth=3, heads=4, patch_size=4, mlp_ratio=2.5, **keys).build(image_size)
    ours.load_state_dict(ours.import_weights(theirs.state_dict()))  # strict on both sides
    return ours.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_and_the_pooled_vector_agree_with_siglip() -> None:
    theirs = theirs_of("siglip")
    expected = theirs(PICTURES)
    features = ours_of(theirs, pool="attention")(PICTURES)
    close(features.tokens, expected.last_hidden_state)
    close(features.pooled, expected.pooler_output)


@torch.no_grad()
def test_tokens_agree_with_the_tower_of_janus() -> None:
    theirs = theirs_of("janus")
    close(ours_of(theirs, activation="gelu")(PICTURES).tokens, theirs(PICTURES).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2, -2])
def test_a_layer_before_the_last_is_as_it_leaves_its_block(layer: int) -> None:
    theirs = theirs_of("siglip")
    states = theirs(PICTURES, output_hidden_states=True).hidden_states
    close(ours_of(theirs, layer=layer)(PICTURES).tokens, states[layer])


@torch.no_grad()
def test_positions_are_resized_for_pictures_of_another_size() -> None:
    theirs = theirs_of("siglip")
    wide = torch.rand(1, 3, 8, 20, generator=Generator().manual_seed(2)) * 2 - 1
    expected = theirs(wide, interpolate_pos_encoding=True).last_hidden_state
    close(ours_of(theirs)(wide).tokens, expected)
    square = torch.nn.functional.interpolate(PICTURES, size=(20, 20))
    close(ours_of(theirs, 20)(square).tokens, theirs(square, interpolate_pos_encoding=True).last_hidden_state)


def test_a_tower_is_found_inside_a_larger_checkpoint_and_nothing_may_be_missing() -> None:
    theirs = theirs_of("siglip")
    state = {f"model.vision_model.{name}": value for name, value in theirs.state_dict().items()}
    ours = ours_of(theirs)
    assert all(
        torch.equal(value, ours.state_dict()[name])
        for name, value in ours.import_weights({**state, "lm_head.weight": torch.zeros(1)}).items()
    )
    del state["model.vision_model.embeddings.patch_embedding.bias"]
    with pytest.raises(ValueError, match=r"lacks weights: embeddings\.patch_embedding\.bias"):
        ours.import_weights(state)
