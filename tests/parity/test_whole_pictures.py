"""Parts that mix the tokens of a picture, beside public classes with the same random weights, and each picture on its own."""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from stages.parts.backbones import BACKBONES
from stages.parts.config import parse_part
from stages.parts.connectors.convnext import ConvNeXtBlock, ConvNeXtConfig
from stages.parts.connectors.dual_path import DualPath, DualPathConfig
from stages.parts.heads.convnext import ConvNeXtHeadConfig
from stages.parts.heads.deep import DeepHeadConfig, ModulatedBlock
from stages.parts.layers import sincos_2d
from stages.parts.pictures import as_maps, as_tokens

GRIDS = [(2, 3), (3, 2), (2, 3), (1, 4)]
SIZES = [6, 6, 6, 4]


def lively(part: Any, seed: int = 0) -> Any:
    """Every weight random, also those that start at zero or one."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return part.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_modulated_block_is_diffusers_block_with_adaptive_norms() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    ours = lively(ModulatedBlock(12, 3, 48))
    theirs = BasicTransformerBlock(
        12, 3, 4, norm_type="ada_norm_zero", num_embeds_ada_norm=1, attention_bias=True, activation_fn="gelu-approximate",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip

    class Given(nn.Module):
        def forward(self, timestep: Tensor, labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
            return condition

    theirs.norm1.emb = Given()
    q, k, v = ours.qkv.weight.chunk(3)
    q_bias, k_bias, v_bias = ours.qkv.bias.chunk(3)
    attention, mlp = theirs.attn1, theirs.ff.net
    pairs = [(attention.to_q, q, q_bias), (attention.to_k, k, k_bias), (attention.to_v, v, v_bias)]
    pairs += [
        (layer, source.weight, source.bias)
        for layer, source in zip((attention.to_out[0], mlp[0].proj, mlp[2]), (ours.out, ours.up, ours.down), strict=True)
    ]
    for layer, weight, bias in [*pairs, (theirs.norm1.linear, ours.modulation.weight, ours.modulation.bias)]:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x, condition = noise(2, 5, 12), noise(2, 12, seed=2)
    close(ours(x, condition), theirs.eval()(x, timestep=torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.int64)))


@torch.no_grad()
def test_a_convnext_block_is_that_of_transformers() -> None:
    from transformers.models.convnext.modeling_convnext import ConvNextConfig, ConvNextLayer

    ours = lively(ConvNeXtBlock(6, 1))
    theirs = ConvNextLayer(ConvNextConfig(layer_scale_init_value=0.0), 6).eval()
    for source, layer in (
        (ours.spatial, theirs.dwconv),
        (ours.norm, theirs.layernorm),
        (ours.up, theirs.pwconv1),
        (ours.down, theirs.pwconv2),
    ):
        layer.weight.copy_(source.weight)
        layer.bias.copy_(source.bias)
    x = noise(2, 12, 6)
    close(ours(x, (3, 4)), as_tokens(theirs(as_maps(x, (3, 4)))))


@torch.no_grad()
def test_the_semantic_path_is_siglips_tower_over_latents() -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoder

    config = DualPathConfig(width=16, depth=2, heads=4, mlp_ratio=2.0)
    ours = lively(config.build(5, 8))
    theirs = SiglipEncoder(
        SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, attn_implementation="sdpa")
    ).eval()
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
        attention = layer.self_attn
        for part, weight, bias in zip((attention.q_proj, attention.k_proj, attention.v_proj), weights, biases, strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        others = ((attention.out_proj, block.out), (layer.layer_norm1, block.norm1), (layer.layer_norm2, block.norm2))
        for part, source in (*others, (layer.mlp.fc1, block.up), (layer.mlp.fc2, block.down)):
            part.weight.copy_(source.weight)
            part.bias.copy_(source.bias)
    x = noise(2, 6, 16)
    encoded = theirs(inputs_embeds=x + sincos_2d((2, 3), 16), attention_mask=None).last_hidden_state
    close(ours.semantic(x, (2, 3), [0, 1]), nn.functional.layer_norm(encoded, (16,), ours.norm_out.weight, ours.norm_out.bias, 1e-6))


def test_both_paths_reach_the_network() -> None:
    """Without the low path a picture is still read, and without the semantic one; together they are not either."""
    connector: DualPath = lively(DualPathConfig(width=16, depth=1, heads=4).build(5, 8))
    values, grids = noise(6, 5), [(2, 3)]
    whole = connector(values, grids)
    for silenced in (connector.low, connector.patch):
        kept = silenced.weight.detach().clone()
        with torch.no_grad():
            silenced.weight.zero_()
            assert float((connector(values, grids) - whole).abs().max()) > 1e-2
            silenced.weight.copy_(kept)
    assert connector(values, grids).shape == (6, 8)


@torch.no_grad()
def test_pictures_of_several_grids_in_one_batch_are_each_alone() -> None:
    values = noise(sum(SIZES), 8)
    levels = torch.repeat_interleave(torch.tensor([0.1, 0.9, 0.4, 0.7]), torch.tensor(SIZES))
    connectors = [DualPathConfig(width=16, depth=2, heads=4).build(8, 12), ConvNeXtConfig(depth=2).build(8, 12)]
    heads = [DeepHeadConfig(depth=2, heads=2).build(8, 5), ConvNeXtHeadConfig(depth=2, dim=4).build(8, 5)]
    for part, more in [(part, ()) for part in connectors] + [(part, (levels,)) for part in heads]:
        lively(part)
        together = part(values, GRIDS, *more).split(SIZES)
        pieces = zip(values.split(SIZES), GRIDS, *(entry.split(SIZES) for entry in more), strict=True)
        for own, (piece, grid, *rest) in zip(together, pieces, strict=True):
            close(own, part(piece, [grid], *rest))
        changed = values.clone()
        changed[0, 0] += 2.0
        after = part(changed, GRIDS, *more).split(SIZES)
        moved = [float((a - b).abs().max()) > 1e-4 for a, b in zip(after, together, strict=True)]
        assert moved == [True, False, False, False]
        assert float((after[0] - together[0])[-1].abs().max()) > 1e-4, type(part)  # the far end of the picture knows


@torch.no_grad()
def test_the_deep_head_knows_the_noise_level_and_first_predicts_nothing() -> None:
    head = DeepHeadConfig(depth=2, heads=2).build(8, 5)
    head.init_weights(Generator().manual_seed(0))
    hidden = noise(6, 8)
    assert not head(hidden, [(2, 3)], torch.full((6,), 0.5)).any()
    lively(head)
    one, other = (head(hidden, [(2, 3)], torch.full((6,), level)) for level in (0.5, 0.6))
    assert float((one - other).abs().max()) > 1e-3


def test_interleaved_axes_are_those_of_qwen3_vl() -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding

    for axes in ((6, 6, 4), (16, 8, 8), (44, 42, 42)):
        width = sum(axes)
        sections = [size // 2 for size in axes]
        table = {
            "kind": "transformer",
            "width": width,
            "depth": 1,
            "heads": 1,
            "rope": {"kind": "rope", "axes": axes, "rates": "interleaved"},
        }
        network = parse_part(BACKBONES, table, "backbones.lm").build()
        positions = torch.randint(0, 40, (2, 5, 3), generator=Generator().manual_seed(3))
        cos, sin = network._rotation(positions, torch.float32)
        config = Qwen3VLTextConfig(
            hidden_size=width,
            num_attention_heads=1,
            head_dim=width,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
        )
        their_cos, their_sin = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), positions.permute(2, 0, 1))
        torch.testing.assert_close(cos[:, :, 0], their_cos, atol=1e-5, rtol=1e-5)
        signs = torch.cat([-torch.ones(width // 2), torch.ones(width // 2)])  # ours has the sign of the rotation in it
        torch.testing.assert_close(sin[:, :, 0], their_sin * signs, atol=1e-5, rtol=1e-5)
