"""CLIP's towers beside those of transformers: random weights copied by the loader that reads released checkpoints."""

import pytest
import torch
from torch import Generator

from stages.parts.encoders import ClipTextConfig, ClipVitConfig
from stages.parts.encoders.clip import PIXEL_MEAN, PIXEL_STD

transformers = pytest.importorskip("transformers")

LENGTHS = torch.tensor([4, 9])
EOS = 49


def randomise(module, seed=0):
    """Every weight random, also those that a fresh module has at zero or one."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def their_vision(activation="quick_gelu", projected=False):
    config = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=60,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        hidden_act=activation,
        projection_dim=10,
    )
    return randomise((transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel)(config))


def their_text(projected=False):
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=11,
        eos_token_id=EOS,
        projection_dim=10,
    )
    return randomise((transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config))


def our_vision(theirs, **keys):
    ours = ClipVitConfig(width=24, depth=3, heads=4, patch_size=4, mlp_ratio=2.5, **keys).build(12)
    ours.load_state_dict(ours.import_weights(theirs.state_dict()))
    return ours


def our_text(theirs, **keys):
    ours = ClipTextConfig(width=16, depth=3, heads=2, max_length=11, **keys).build(vocab_size=50)
    ours.load_state_dict(ours.import_weights(theirs.state_dict()))
    return ours


def pictures(height=12, width=12):
    """The same pictures for us, in [-1, 1], and for them, normalised."""
    images = torch.rand(2, 3, height, width, generator=Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return images, ((images + 1) / 2 - mean) / std


def texts():
    """Ids padded with the end token after a first end token, as the public tokenizer does."""
    ids = torch.randint(0, 48, (2, 9), generator=Generator().manual_seed(2))
    ids[0, 3:] = EOS
    ids[1, 8] = EOS
    return ids


@pytest.mark.parametrize(("activation", "theirs_is"), [("quick-gelu", "quick_gelu"), ("gelu", "gelu")])
@torch.no_grad()
def test_the_vision_tower_is_that_of_transformers_at_every_layer(activation, theirs_is):
    theirs = their_vision(theirs_is)
    images, normalised = pictures()
    expected = theirs(normalised, output_hidden_states=True)
    for layer in (-4, -3, -2, -1):
        found = our_vision(theirs, layer=layer, activation=activation)(images)
        torch.testing.assert_close(found.tokens, expected.hidden_states[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tokens, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pictures_of_another_size_are_read_as_transformers_reads_them():
    theirs = their_vision()
    images, normalised = pictures(16, 8)
    expected = theirs(normalised, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(our_vision(theirs, cls="drop")(images).tokens, expected[:, 1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tower_for_other_pictures_starts_from_resized_positions():
    theirs = their_vision()
    ours = ClipVitConfig(width=24, depth=3, heads=4, patch_size=4, mlp_ratio=2.5).build((16, 8))
    ours.load_state_dict(ours.import_weights(theirs.state_dict()))
    images, normalised = pictures(16, 8)
    expected = theirs(normalised, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(images).tokens, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_text_tower_is_that_of_transformers():
    theirs, ids = their_text(), texts()
    expected = theirs(ids, output_hidden_states=True)
    found = our_text(theirs)(ids, LENGTHS)
    torch.testing.assert_close(found.tokens, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)
    for layer in (-3, -2):
        torch.testing.assert_close(our_text(theirs, layer=layer)(ids, LENGTHS).tokens, expected.hidden_states[layer], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_checkpoint_of_both_towers_fills_each_and_gives_the_embeddings_that_are_compared():
    vision, text = their_vision(projected=True), their_text(projected=True)
    both = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision.config.to_dict(), text_config=text.config.to_dict(), projection_dim=10)
    )
    randomise(both, seed=3)
    (images, normalised), ids = pictures(), texts()
    expected = both(input_ids=ids, pixel_values=normalised)
    image = our_vision(both, projection=10)(images).pooled
    caption = our_text(both, projection=10)(ids, LENGTHS).pooled
    torch.testing.assert_close(image / image.norm(dim=-1, keepdim=True), expected.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(caption / caption.norm(dim=-1, keepdim=True), expected.text_embeds, rtol=1e-4, atol=1e-5)
    assert our_vision(both)(images).pooled.shape == (2, 24)  # without a projection of our own theirs is left out


def test_the_published_towers_have_their_published_sizes():
    with torch.device("meta"):
        vision = ClipVitConfig(width=1024, depth=24, heads=16, patch_size=14).build(336)
        text = ClipTextConfig(width=768, depth=12, heads=12).build(vocab_size=49408)
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    assert sum(parameter.numel() for parameter in vision.parameters()) == pytest.approx(303.5e6, rel=1e-3)
    assert sum(parameter.numel() for parameter in text.parameters()) == sum(parameter.numel() for parameter in theirs.parameters())


def test_an_old_checkpoint_with_a_buffer_of_positions_loads_and_a_deeper_one_does_not():
    theirs = their_text()
    ours = ClipTextConfig(width=16, depth=3, heads=2, max_length=11).build(vocab_size=50)
    state = {f"text_model.{name}" if not name.startswith("text_model.") else name: tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(ours.import_weights({**state, "text_model.embeddings.position_ids": torch.arange(11)[None]}))
    with pytest.raises(ValueError, match=r"no place for: .*encoder\.layers\.2\."):
        ClipTextConfig(width=16, depth=2, heads=2, max_length=11).build(vocab_size=50).import_weights(state)
