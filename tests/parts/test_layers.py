"""Layers, connectors and heads, by closed forms and inverses."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from stages.parts.connectors import CONNECTORS
from stages.parts.connectors.linear import Projection
from stages.parts.heads import HEADS, LinearHeadConfig
from stages.parts.layers import GeluMLP, LayerNorm, RMSNorm, SwiGLU, TimestepEmbedding, init_linear, patchify, sincos_2d, unpatchify


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


# patches


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_is_the_inverse_of_patchify(c: int, rows: int, columns: int, p: int) -> None:
    latents = noise(c, rows * p, columns * p)
    tokens = patchify(latents, p)
    assert tokens.shape == (rows * columns, c * p * p)
    assert torch.equal(unpatchify(tokens, (rows, columns), p), latents)
    assert torch.equal(unpatchify(torch.stack([tokens, -tokens]), (rows, columns), p), torch.stack([latents, -latents]))


def test_patches_come_in_raster_order_with_channels_slowest() -> None:
    latents = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens[0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert tokens[1, :2].tolist() == [2, 3]
    assert tokens[3, :2].tolist() == [12, 13]


def test_a_grid_that_does_not_divide_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="a grid of 4 × 5 does not divide into patches of 2"):
        patchify(torch.zeros(1, 4, 5), 2)


# norms, MLPs, initialisation


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = randomised(RMSNorm(7, eps=1e-6))
    x = noise(3, 7) * 5
    expected = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_layer_norm_is_torchs() -> None:
    norm = randomised(LayerNorm(7))
    x = noise(3, 7)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (7,), norm.weight, norm.bias))  # type: ignore[arg-type]


def test_swiglu_gates_its_upper_half() -> None:
    mlp = randomised(SwiGLU(5, 8, bias=True))
    x = noise(3, 5)
    gate, up = (x @ mlp.gate_up.weight.T + mlp.gate_up.bias).split(8, dim=1)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down.weight.T + mlp.down.bias)  # type: ignore[union-attr,operator]


def test_gelu_is_the_tanh_form() -> None:
    mlp = randomised(GeluMLP(5, 8, bias=False))
    x = noise(3, 5)
    up = x @ mlp.up.weight.T  # type: ignore[union-attr,operator]
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    torch.testing.assert_close(mlp(x), gelu @ mlp.down.weight.T, atol=1e-5, rtol=1e-4)  # type: ignore[union-attr,operator]


def test_init_linear_scales_by_fan_in_and_leaves_no_bias() -> None:
    layer = nn.Linear(400, 300)
    init_linear(layer, Generator().manual_seed(0))
    assert float(layer.weight.detach().std()) == pytest.approx(1 / 20, rel=0.02)
    assert not layer.bias.any()
    init_linear(layer, Generator().manual_seed(0), zero=True)
    assert not layer.weight.any()


# the noise level


def test_the_timestep_embedding_turns_t_into_sinusoids_of_1000_t() -> None:
    """As DiT's timestep_embedding(1000 t, 256): cosines, then sines, frequencies 10000^(-i/128)."""
    embedding = TimestepEmbedding(6)
    randomised(embedding)
    t = torch.tensor([0.0, 0.25, 1.0])
    rate = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = 1000 * t.double()[:, None] * rate
    waves = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    expected = F.silu(waves @ embedding.inner.weight.T + embedding.inner.bias) @ embedding.outer.weight.T + embedding.outer.bias
    torch.testing.assert_close(embedding(t), expected, atol=1e-3, rtol=1e-3)
    assert len(embedding(t).detach()[:, 0].unique()) == 3


# connectors, over the dict: a new row is tested by itself


@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if not kind.startswith("embedding")])
def test_every_connector_of_vectors_keeps_the_tokens_and_lets_gradients_through(kind: str) -> None:
    sizes = {name: number for name, number in {"width": 8, "depth": 1, "heads": 2}.items() if name in CONNECTORS[kind].model_fields}
    connector = CONNECTORS[kind](**sizes).build(8, 12)
    connector.init_weights(Generator().manual_seed(0))
    values = noise(6, 8).requires_grad_()
    out = connector(values, [(2, 3)])
    out = out[0] if isinstance(out, tuple) else out  # beside it what the port's head will want
    assert out.shape == (6, 12)
    out.square().sum().backward()
    assert values.grad is not None
    assert (values.grad.abs().sum(dim=1) > 0).all()


def test_the_sincos_table_gives_every_place_its_own_row_and_reads_rows_from_its_first_half() -> None:
    table = sincos_2d((3, 4), 16)
    assert len({tuple(row.tolist()) for row in table}) == 12
    grid = table.reshape(3, 4, 16)
    assert torch.equal(grid[:, :1, :8].expand(-1, 4, -1), grid[..., :8])  # a row's half is the same in every column
    assert torch.equal(grid[:1, :, 8:].expand(3, -1, -1), grid[..., 8:])
    assert table[0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    assert sincos_2d((2, 2), 18).shape == (4, 18)  # widths that do not divide by four are filled with zeros


def test_an_mlp_has_gelu_between_its_matrices_and_none_at_the_ends() -> None:
    connector = CONNECTORS["mlp"](depth=2).build(5, 7)  # type: ignore[call-arg]
    assert isinstance(connector, Projection)
    randomised(connector)
    values = noise(3, 5)
    first, second = connector.layers
    torch.testing.assert_close(connector(values, []), second(F.gelu(first(values))))


def test_an_embedding_looks_rows_up_with_gradients_for_those_rows_only() -> None:
    table = CONNECTORS["embedding"]().build(9, 4)  # type: ignore[call-arg]
    table.init_weights(Generator().manual_seed(0))
    ids = torch.tensor([3, 7, 3])
    out = table(ids)
    assert torch.equal(out, table.weight[ids])
    out.sum().backward()
    assert table.weight.grad.sum(dim=1).tolist() == [0, 0, 0, 8.0, 0, 0, 0, 4.0, 0]


# heads


@pytest.mark.parametrize("kind", ["linear", "mlp"])  # the others have no vocabulary
def test_a_slice_of_a_head_is_the_slice_of_its_output(kind: str) -> None:
    head = HEADS[kind](**({"bias": True} if "bias" in HEADS[kind].model_fields else {})).build(6, 11)
    randomised(head)
    hidden = noise(4, 6)
    assert head(hidden).shape == (4, 11)
    torch.testing.assert_close(head(hidden, 3, 9), head(hidden)[:, 3:9])


def test_a_zero_head_predicts_zero_at_first() -> None:
    head = LinearHeadConfig(zero=True, bias=True).build(6, 11)
    head.init_weights(Generator().manual_seed(0))
    assert not head(noise(4, 6)).any()


def test_a_tied_head_is_the_embedding_and_owns_no_weights() -> None:
    table = CONNECTORS["embedding"]().build(9, 6)  # type: ignore[call-arg]
    table.init_weights(Generator().manual_seed(0))
    head = LinearHeadConfig(tied=True).build(6, 9, tied_to=table)
    head.init_weights(Generator().manual_seed(1))
    assert not list(head.parameters())
    hidden = noise(4, 6)
    torch.testing.assert_close(head(hidden), hidden @ table.weight.T)


def test_a_tied_head_without_an_embedding_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs an embedding"):
        LinearHeadConfig(tied=True).build(6, 9)
