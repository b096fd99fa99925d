"""CLIP's towers: shapes, which layer is read, padding, picture sizes, and loading of public layouts."""

import pytest
import torch
from torch import Generator

from stages.errors import RecipeError
from stages.parts.config import parse_part
from stages.parts.encoders import ENCODERS, ClipTextConfig, ClipVitConfig
from stages.parts.encoders.clip import resize_positions

VIT = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4}
TEXT = {"width": 12, "depth": 3, "heads": 2, "max_length": 9}


def vit(image_size=(8, 12), **keys):
    encoder = ClipVitConfig(**{**VIT, **keys}).build(image_size)
    encoder.init_weights(Generator().manual_seed(0))
    return encoder


def text(**keys):
    encoder = ClipTextConfig(**{**TEXT, **keys}).build(vocab_size=30)
    encoder.init_weights(Generator().manual_seed(0))
    return encoder


def images(height=8, width=12, seed=1):
    return torch.rand(2, 3, height, width, generator=Generator().manual_seed(seed)) * 2 - 1


def test_shapes_of_pictures_that_are_not_square():
    for cls, length in {"keep": 7, "drop": 6}.items():
        encoder = vit(cls=cls)
        features = encoder(images())
        assert features.tokens.shape == (2, length, 12)
        assert features.pooled.shape == (2, 12)
        assert encoder.grid(8, 12) == (2, 3)
        assert encoder.config.num_tokens(8, 12) == length
        assert encoder.out_dim == encoder.pooled_dim == 12


def test_tokens_without_the_class_row_are_the_same_tokens():
    torch.testing.assert_close(vit(cls="drop")(images()).tokens, vit()(images()).tokens[:, 1:])


def test_a_layer_counts_the_blocks_passed_and_leaves_the_pooled_output_alone():
    last = vit()
    shallow = ClipVitConfig(**{**VIT, "depth": 2}).build((8, 12))
    shallow.load_state_dict({name: tensor for name, tensor in last.state_dict().items() if not name.startswith("blocks.2.")})
    second = vit(layer=-2)(images())
    torch.testing.assert_close(second.tokens, shallow(images()).tokens)
    torch.testing.assert_close(second.tokens, vit(layer=2)(images()).tokens)
    torch.testing.assert_close(second.pooled, last(images()).pooled)
    torch.testing.assert_close(vit(layer=3)(images()).tokens, last(images()).tokens)


def test_layer_zero_is_what_enters_the_blocks():
    encoder = vit(layer=0)
    before = encoder(images()).tokens
    for parameter in encoder.blocks.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(encoder(images()).tokens, before)


def test_the_projection_acts_on_the_pooled_output_only():
    plain, projected = vit(), vit(projection=5)
    assert projected.pooled_dim == 5
    torch.testing.assert_close(projected(images()).tokens, plain(images()).tokens)
    torch.testing.assert_close(projected(images()).pooled, plain(images()).pooled @ projected.projection.weight.T)


def test_without_positions_shuffled_patches_give_shuffled_tokens():
    encoder = vit(cls="drop")
    torch.nn.init.zeros_(encoder.positions)
    picture = images()
    swapped = torch.cat([picture[..., 8:], picture[..., :8]], dim=-1)  # columns of patches 0 1 2 become 2 0 1
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    torch.testing.assert_close(encoder(swapped).tokens, encoder(picture).tokens[:, order])


def test_pictures_of_another_size_are_read_with_resized_positions():
    encoder = vit()
    features = encoder(images(16, 8))
    assert features.tokens.shape == (2, 9, 12)
    table = encoder.positions
    assert resize_positions(table, (2, 3), (2, 3)) is table
    resized = resize_positions(table, (2, 3), (4, 2))
    assert torch.equal(resized[0], table[0])
    constant = torch.ones(7, 12)
    torch.testing.assert_close(resize_positions(constant, (2, 3), (5, 4)), torch.ones(21, 12))


def test_a_picture_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(ValueError, match="8 × 10 pixels"):
        vit()(images(8, 10))


def test_padding_after_a_text_changes_nothing():
    encoder = text()
    ids = torch.randint(0, 30, (2, 7), generator=Generator().manual_seed(2))
    lengths = torch.tensor([4, 7])
    both = encoder(ids, lengths)
    alone = encoder(ids[:1, :4], lengths[:1])
    torch.testing.assert_close(both.pooled[:1], alone.pooled)
    torch.testing.assert_close(both.tokens[:1, :4], alone.tokens)
    other = ids.clone()
    other[0, 4:] = 29
    torch.testing.assert_close(encoder(other, lengths).pooled, both.pooled)


def test_a_text_is_causal_and_its_pooled_row_is_the_last_one():
    encoder = text()
    ids = torch.randint(0, 29, (1, 6), generator=Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 3] = 29
    before, after = encoder(ids, torch.tensor([6])), encoder(changed, torch.tensor([6]))
    torch.testing.assert_close(before.tokens[:, :3], after.tokens[:, :3])
    assert ((before.tokens - after.tokens)[0, 3:].abs().amax(-1) > 1e-4).all()
    torch.testing.assert_close(before.pooled, before.tokens[:, -1])


def test_only_the_last_layer_of_a_text_is_normed():
    encoder = text()
    torch.nn.init.constant_(encoder.norm_out.weight, 3.0)
    ids, lengths = torch.arange(5).unsqueeze(0), torch.tensor([5])
    normed = encoder(ids, lengths).tokens
    torch.testing.assert_close(normed.std(-1, correction=0), torch.full((1, 5), 3.0), rtol=1e-2, atol=0)
    raw = text(layer=-2)
    raw.load_state_dict(encoder.state_dict())
    assert raw(ids, lengths).tokens.std(-1).max() < 2
    torch.testing.assert_close(raw(ids, lengths).pooled, encoder(ids, lengths).pooled)


def test_a_text_longer_than_the_tower_is_refused():
    with pytest.raises(ValueError, match="10 tokens is longer than max_length 9"):
        text()(torch.zeros(1, 10, dtype=torch.int64), torch.tensor([10]))


@pytest.mark.parametrize("encoder", [vit(), text()])
def test_the_start_is_a_function_of_the_generator_and_every_weight_has_one(encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    encoder.init_weights(Generator().manual_seed(0))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_config_that_cannot_be_built_is_explained():
    with pytest.raises(RecipeError, match=r"encoders\.clip.*heads must divide the width 12, found 5"):
        parse_part(ENCODERS, {"kind": "clip-vit", **VIT, "heads": 5}, "encoders.clip")
    with pytest.raises(RecipeError, match=r"layer -5 of a tower of depth 3 is not in \[-4, 3\]"):
        parse_part(ENCODERS, {"kind": "clip-text", **TEXT, "layer": -5}, "encoders.clip")


def test_a_checkpoint_with_a_missing_or_a_foreign_weight_is_refused():
    encoder = text()
    with pytest.raises(ValueError, match=r"lacks weights: .*embeddings\.token_embedding\.weight"):
        encoder.import_weights({"encoder.layers.0.mlp.fc1.weight": torch.zeros(48, 12)})
    with pytest.raises(ValueError, match=r"'visual_projection\.weight', which `projection = 5`"):
        vit(projection=5).import_weights({})
