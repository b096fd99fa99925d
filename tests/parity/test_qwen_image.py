"""The denoiser of two streams beside QwenImageTransformer2DModel of diffusers, with one set of random weights.

Positions are ours on both sides: where words stand beside a picture differs from the released model, as the recipe says.
"""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from stages.model import Model, build_model
from stages.recipe import load_recipe
from stages.sequence.pack import pack
from stages.sequence.segment import MaskKind, PositionKind, Role, Segment, Sequence

diffusers = pytest.importorskip("diffusers")

WIDTH, HEADS, DEPTH, AXES = 48, 3, 2, (4, 6, 6)
WORDS, GRID, LATENTS, HIDDEN = 5, (2, 3), 16, 40
SETS = [
    f"backbones.mllm.width={HIDDEN}",
    f"backbones.denoiser.width={WIDTH}",
    f"backbones.denoiser.depth={DEPTH}",
    f"backbones.denoiser.heads={HEADS}",
    f"backbones.denoiser.rope.axes={list(AXES)}",
    f"autoencoders.image.latent_channels={LATENTS}",
    'ports.draw.grid_embedding="none"',
]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.15, generator=generator)
    return module


def halves(rows: Tensor) -> Tensor:
    """Channels that theirs turns as neighbours, as ours turns them: half a head apart."""
    heads = rows.reshape(-1, WIDTH // HEADS // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def copied(theirs: Any, ours: Model) -> None:
    """Every weight of theirs into ours; what ours has and theirs lacks, scales of norms, is one."""
    own: dict[str, Tensor] = {}
    their = {name: value for name, value in theirs.state_dict().items()}

    def take(target: str, name: str, change: Any = lambda value: value) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in their:
                own[f"{target}.{kind}"] = change(their.pop(f"{name}.{kind}"))

    net = "backbones.denoiser"
    take(f"{net}.timestep.embedding.inner", "time_text_embed.timestep_embedder.linear_1")
    take(f"{net}.timestep.embedding.outer", "time_text_embed.timestep_embedder.linear_2")
    take("ports.plan.connector.norm", "txt_norm")
    take("ports.plan.connector.layers.0", "txt_in")
    take("ports.draw.connector.layers.0", "img_in")
    take("ports.draw.head", "proj_out")
    for kind in ("weight", "bias"):  # theirs has the scale first
        scale, shift = their.pop(f"norm_out.linear.{kind}").chunk(2)
        own[f"{net}.experts.pictures.final_modulation.linear.{kind}"] = torch.cat([shift, scale])
    streams = {"words": ("txt", "add_{}_proj", "norm_added_{}", "to_add_out"), "pictures": ("img", "to_{}", "norm_{}", "to_out.0")}
    for n in range(DEPTH):
        for expert, (stream, projection, norm, out) in streams.items():
            block, layer = f"transformer_blocks.{n}", f"{net}.experts.{expert}.layers.{n}"
            take(f"{layer}.modulation.linear", f"{block}.{stream}_mod.1")
            take(f"{layer}.mlp.up", f"{block}.{stream}_mlp.net.0.proj")
            take(f"{layer}.mlp.down", f"{block}.{stream}_mlp.net.2")
            take(f"{layer}.out", f"{block}.attn.{out}")
            for kind in ("weight", "bias"):
                parts = [their.pop(f"{block}.attn.{projection.format(letter)}.{kind}") for letter in "qkv"]
                own[f"{layer}.qkv.{kind}"] = torch.cat([halves(parts[0]), halves(parts[1]), parts[2]])
            for letter in "qk":
                take(f"{layer}.{letter}_norm", f"{block}.attn.{norm.format(letter)}", halves)
    assert not their
    missing = set(ours.state_dict()) - set(own)
    used = {name for name in missing if name.startswith(("backbones.denoiser", "ports.plan", "ports.draw"))}
    assert all("norm" in name or name.startswith(f"{net}.experts.words.final_modulation") for name in used)
    ours.load_state_dict(own, strict=False)


def test_the_denoiser_predicts_what_the_published_class_predicts() -> None:
    theirs = randomised(
        diffusers.QwenImageTransformer2DModel(
            patch_size=1,
            in_channels=LATENTS,
            out_channels=LATENTS,
            num_layers=DEPTH,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=HIDDEN,
            axes_dims_rope=AXES,
        )
    ).eval()
    recipe = load_recipe("qwen-image", size="tiny", sets=SETS)
    ours = build_model(recipe, seed=0).eval()
    copied(theirs, ours)

    generator = Generator().manual_seed(1)
    hidden, noisy, t = torch.randn(WORDS, HIDDEN, generator=generator), torch.randn(6, LATENTS, generator=generator), 0.37
    words = Segment(port="text", payload=torch.arange(WORDS), grid=(WORDS,), network="mllm")
    plan = Segment(
        port="plan",
        payload=torch.zeros(WORDS, 0),
        grid=(WORDS,),
        mask=MaskKind.FULL,
        network="denoiser",
        of=("text",),
    )
    draw = Segment(
        port="draw",
        payload=noisy,
        grid=GRID,
        role=Role.TARGET,
        mask=MaskKind.FULL,
        positions=PositionKind.GRID,
        expert=1,
        merge=True,
        network="denoiser",
    )
    batch = pack([Sequence(key="a", task="draw", segments=(words, plan, draw))], row_length=WORDS + 6)
    batch.ports["draw"].timestep = torch.full((6,), t)
    with torch.no_grad():
        rows = ours.hidden(batch, network="denoiser", others={"mllm": hidden})
        found = ours.predict("draw", rows[0].index_select(0, batch.ports["draw"].rows))

    places = batch.layouts["denoiser"].positions[0].double()
    rates = [10000.0 ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size) for size in AXES]
    angles = torch.cat([places[:, axis : axis + 1] * rate for axis, rate in enumerate(rates)], dim=1)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    theirs.pos_embed.forward = lambda *args, **kwargs: (turns[WORDS : WORDS + 6], turns[:WORDS])
    with torch.no_grad():
        expected = theirs(
            hidden_states=noisy[None],
            encoder_hidden_states=hidden[None],
            timestep=torch.tensor([t]),
            img_shapes=[[(1, *GRID)]],
        ).sample[0]
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
