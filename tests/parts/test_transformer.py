"""The transformer: routing, causality, caching, initialisation. Parity with published classes is in tests/parity/test_llama.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Generator, Tensor
from worlds import segment_lists, text

from stages.errors import RecipeError
from stages.parts.backbones import BACKBONES, KeyValueCache, Transformer
from stages.parts.backbones.transformer import TransformerConfig, rotate
from stages.parts.config import parse_part
from stages.sequence.masks import may_attend
from stages.sequence.pack import Cursor, continue_rows, lay_out, pack
from stages.sequence.segment import Layout, MaskKind, PositionKind, Segment, Sequence

CAUSAL, FULL, ISOLATED = MaskKind.CAUSAL, MaskKind.FULL, MaskKind.ISOLATED


def build(seed: int = 0, **keys: object) -> Transformer:
    """A small transformer in evaluation mode, every weight random."""
    config = TransformerConfig(**{"width": 24, "depth": 2, "heads": 3, "mlp_ratio": 1.5, **keys})  # type: ignore[arg-type]
    network = config.build()
    network.init_weights(Generator().manual_seed(seed))
    generator = Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def mixed_layout() -> Layout:
    """Text, an isolated picture, a full picture by another expert, text."""
    shared = PositionKind.SHARED
    return lay_out(
        [
            text(3),
            text(2, mask=ISOLATED, positions=shared, expert=1),
            text(4, mask=FULL, positions=shared, expert=1),
            text(2, expert=0),
        ]
    )


# who influences whom


def influence(network: Transformer, layout: Layout, seed: int = 0) -> Tensor:
    """Bool (l, l): True where the output row i changes with the input row j, by automatic differentiation."""
    length = layout.shape[1]
    x = noise(1, length, network.config.width, seed=seed).requires_grad_()
    out = network(x, layout)
    probe = noise(network.config.width, seed=9)
    rows = [torch.autograd.grad((out[0, i] * probe).sum(), x, retain_graph=True)[0][0].abs().amax(dim=1) for i in range(length)]
    return torch.stack(rows) > 0


@given(segment_lists(max_segments=4))
@settings(max_examples=15)
def test_a_row_is_influenced_by_exactly_the_rows_it_may_reach(segments: list[Segment]) -> None:
    layout = lay_out(segments)
    mask = may_attend(layout, layout)[0]
    reach = torch.linalg.matrix_power(mask.float(), 4) > 0
    network = build(experts=("a", "b"), qk_norm=True, depth=2)
    assert torch.equal(influence(network, layout), reach)


def test_changing_a_later_token_changes_no_earlier_bit() -> None:
    network, layout = build(), lay_out([text(7)])
    x = noise(1, 7, 24)
    changed = x.clone()
    changed[0, 4] += 1.0
    before, after = network(x, layout), network(changed, layout)
    assert torch.equal(before[0, :4], after[0, :4])
    assert (before[0, 4:] != after[0, 4:]).any(dim=1).all()


def test_changing_one_patch_changes_the_whole_picture_and_what_follows() -> None:
    network, layout = build(), lay_out([text(2), text(4, mask=FULL), text(2)])
    x = noise(1, 8, 24)
    changed = x.clone()
    changed[0, 4] += 1.0
    moved = (network(x, layout) != network(changed, layout))[0].any(dim=1)
    assert moved.tolist() == [False, False, True, True, True, True, True, True]


def test_changing_a_noised_copy_changes_nothing_outside_it() -> None:
    network, layout = build(experts=("a", "b")), mixed_layout()
    x = noise(1, 11, 24)
    changed = x.clone()
    changed[0, 3] += 1.0
    moved = (network(x, layout) - network(changed, layout))[0].abs().amax(dim=1) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 2 + [False] * 6


def test_patches_of_one_tick_have_no_order_and_patches_of_many_do() -> None:
    """Permuting the patches of a full block permutes its rows, if and only if they share one position."""
    network = build()
    order = torch.tensor([2, 0, 3, 1])
    errors = {}
    for positions in (PositionKind.SHARED, PositionKind.SEQUENTIAL):
        layout = lay_out([text(2), text(4, mask=FULL, positions=positions)])
        x = noise(1, 6, 24)
        permuted = torch.cat([x[:, :2], x[:, 2:][:, order]], dim=1)
        out, out_permuted = network(x, layout), network(permuted, layout)
        errors[positions] = float((out[:, 2:][:, order] - out_permuted[:, 2:]).detach().abs().max())
    assert errors[PositionKind.SHARED] < 1e-5
    assert errors[PositionKind.SEQUENTIAL] > 1e-2


@pytest.mark.parametrize("axes", [None, (2, 2, 4)])
def test_only_differences_of_positions_matter(axes: tuple[int, int, int] | None) -> None:
    network = build(rope={"kind": "rope", "axes": axes})
    segments = [text(2), text(6, mask=FULL, positions=PositionKind.GRID), text(2)]
    here, _ = continue_rows([segments], [Cursor()])
    there, _ = continue_rows([segments], [Cursor(clock=31)])
    x = noise(1, 10, 24)
    torch.testing.assert_close(network(x, here.layout), network(x, there.layout), atol=1e-4, rtol=1e-4)


def test_three_equal_axes_are_not_the_one_axis_but_turn_with_the_same_rates() -> None:
    """With t = h = w the axes only say which coordinate is read, so three axes equal one."""
    layout = lay_out([text(6)])
    one, three = build(), build(rope={"kind": "rope", "axes": (2, 2, 4)})
    x = noise(1, 6, 24)
    torch.testing.assert_close(one(x, layout), three(x, layout), atol=1e-6, rtol=1e-6)


def test_each_axis_turns_its_own_channels() -> None:
    """Moving along one axis rotates the channels given to that axis, and no others."""
    network = build(heads=3, rope={"kind": "rope", "axes": (2, 2, 4)})  # head_dim 8: pairs 0 | 1 | 2, 3
    for axis, pairs in enumerate([{0}, {1}, {2, 3}]):
        position = torch.zeros(1, 1, 3, dtype=torch.int64)
        position[0, 0, axis] = 2
        cos, sin = network._rotation(position, torch.float32)
        x = torch.ones(1, 1, 1, 8)
        turned = (rotate(x, cos, sin) != x).flatten().nonzero().flatten().tolist()
        assert {place % 4 for place in turned} == pairs


TWO_AXES = {"kind": "rope", "axes": (0, 4, 4), "rates": "of-its-own"}


def test_two_axes_with_rates_of_their_own_are_llamagens_table() -> None:
    """Its definition: of the pairs of a head the first half turns with the row, the second with the column, each at base^(-2i / half)."""
    grid = (3, 4)
    x = noise(12, 1, 8, seed=4)
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"))
    rates = 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    angle = torch.cat([row[:, None] * rates, column[:, None] * rates], dim=1)  # (12, 4), one for each pair
    pairs = torch.stack([x[..., :4], x[..., 4:]], dim=-1)  # our channel i turns with i + 4
    expected = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones(12, 1, 4), angle[:, None]))
    layout = lay_out([Segment(port="codes", payload=torch.zeros(12, dtype=torch.int64), grid=grid, positions=PositionKind.GRID)])
    cos, sin = build(rope=TWO_AXES)._rotation(layout.positions, torch.float32)
    torch.testing.assert_close(rotate(x, cos[0], sin[0]), torch.cat([expected[..., 0], expected[..., 1]], dim=-1))


def test_with_rates_of_their_own_moving_a_picture_by_rows_or_columns_changes_nothing_within_it() -> None:
    network = build(rope=TWO_AXES)
    layout = lay_out([Segment(port="codes", payload=torch.zeros(6, dtype=torch.int64), grid=(2, 3), positions=PositionKind.GRID)])
    moved = lay_out([Segment(port="codes", payload=torch.zeros(6, dtype=torch.int64), grid=(2, 3), positions=PositionKind.GRID)])
    moved.positions += torch.tensor([0, 5, 11])
    x = noise(1, 6, 24)
    torch.testing.assert_close(network(x, layout), network(x, moved), atol=1e-4, rtol=1e-4)
    tall = lay_out([Segment(port="codes", payload=torch.zeros(6, dtype=torch.int64), grid=(3, 2), positions=PositionKind.GRID)])
    assert float((network(x, layout) - network(x, tall)).abs().max()) > 1e-2


def test_a_picture_of_one_row_is_a_line_of_text() -> None:
    """All channels given to columns: one row of codes turns as a one-axis network turns as many tokens."""
    picture = lay_out([Segment(port="codes", payload=torch.zeros(6, dtype=torch.int64), grid=(1, 6), positions=PositionKind.GRID)])
    x = noise(1, 6, 24)
    columns = build(rope={"kind": "rope", "axes": (0, 0, 8), "rates": "of-its-own"})
    torch.testing.assert_close(columns(x, picture), build()(x, lay_out([text(6)])), atol=1e-6, rtol=1e-6)


def test_rotation_keeps_lengths_and_turns_products_into_functions_of_the_difference() -> None:
    network = build()
    q, k = noise(1, 1, 1, 8, seed=1), noise(1, 1, 1, 8, seed=2)

    def product(p: int, r: int) -> float:
        at = [network._rotation(torch.full((1, 1, 3), place), torch.float32) for place in (p, r)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
    cos, sin = network._rotation(torch.full((1, 1, 3), 5), torch.float32)
    assert float(rotate(q, cos, sin).norm()) == pytest.approx(float(q.norm()), rel=1e-6)


# padding


def test_padding_rows_stay_finite_and_take_no_part() -> None:
    network = build(experts=("a", "b"))
    segments = (text(3), text(4, mask=FULL, expert=1))
    alone = pack([Sequence(key="a", task="t", segments=segments)])
    padded = pack([Sequence(key="a", task="t", segments=segments)], row_length=12)
    x = noise(1, 12, 24)
    short, long = network(x[:, :7], alone.layout), network(x, padded.layout)
    assert torch.isfinite(long).all()
    torch.testing.assert_close(long[:, :7], short, atol=1e-5, rtol=1e-5)


def test_the_causal_fast_path_equals_the_explicit_mask() -> None:
    network = build(kv_heads=1)
    fast = lay_out([text(7)])
    explicit = pack([Sequence(key="a", task="t", segments=(text(7),))], row_length=8).layout
    x = noise(1, 8, 24)
    torch.testing.assert_close(network(x[:, :7], fast), network(x, explicit)[:, :7], atol=1e-5, rtol=1e-5)


# experts


def dense_twin(network: Transformer, expert: str) -> Transformer:
    """A dense transformer with the weights one expert's tokens meet."""
    dense = network.config.model_copy(update={"experts": ("main",), "duplicate": ("norm", "qkv", "out", "mlp")}).build().eval()
    weights = {
        name.replace(f"experts.{expert}.", "experts.main."): value
        for name, value in network.state_dict().items()
        if f"experts.{expert}." in name
    }
    weights |= {
        name.replace("shared.", "experts.main."): value for name, value in network.state_dict().items() if name.startswith("shared.")
    }
    dense.load_state_dict(weights)
    return dense


@pytest.mark.parametrize("duplicate", [("norm", "qkv", "out", "mlp"), ("mlp",), ("qkv", "mlp"), ("norm", "out")])
def test_equal_experts_equal_the_dense_network(duplicate: tuple[str, ...]) -> None:
    network = build(experts=("a", "b", "c"), duplicate=duplicate, qk_norm=True, kv_heads=1)
    network.copy_expert("b")
    layout = lay_out([text(3, expert=2), text(4, mask=FULL, expert=0), text(2, expert=1)])
    x = noise(1, 9, 24)
    torch.testing.assert_close(network(x, layout), dense_twin(network, "b")(x, layout), atol=1e-5, rtol=1e-5)


def test_different_experts_do_not_equal_the_dense_network() -> None:
    network = build(experts=("a", "b"))
    x = noise(1, 11, 24)
    assert float((network(x, mixed_layout()) - dense_twin(network, "a")(x, mixed_layout())).detach().abs().max()) > 0.1


def test_tokens_of_one_expert_leave_no_gradient_in_the_other() -> None:
    network = build(experts=("a", "b"), duplicate=("norm", "qkv", "out", "mlp"))
    network(
        noise(2, 5, 24), pack([Sequence(key=k, task="t", segments=(text(5, expert=1),)) for k in "xy"], row_length=5).layout
    ).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is None or not gradient.any() for name, gradient in gradients.items() if ".a." in name)
    assert all(gradient is not None and gradient.any() for name, gradient in gradients.items() if ".b." in name and "mlp" in name)


def test_an_expert_acts_on_other_tokens_through_attention_only() -> None:
    """Changing expert b moves a's rows where they see b's tokens, and nowhere else."""
    network = build(experts=("a", "b"))
    layout = lay_out([text(3, expert=0), text(4, mask=FULL, expert=1), text(2, expert=0)])
    x = noise(1, 9, 24)
    before = network(x, layout)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "experts.b." in name:
                parameter.mul_(1.5)
    moved = (network(x, layout) != before)[0].any(dim=1)
    assert moved.tolist() == [False] * 3 + [True] * 6


def test_the_order_of_samples_in_a_batch_does_not_matter_to_routing() -> None:
    network = build(experts=("a", "b"))
    first, second = (
        Sequence(key=k, task="t", segments=(text(2, expert=e), text(3, mask=FULL, expert=1 - e))) for k, e in (("x", 0), ("y", 1))
    )
    x = noise(2, 5, 24)
    together = network(x, pack([first, second], row_length=5).layout)
    swapped = network(x.flip(0), pack([second, first], row_length=5).layout)
    torch.testing.assert_close(together, swapped.flip(0), atol=1e-6, rtol=1e-6)


def test_experts_multiply_the_parameters_they_duplicate_and_no_others() -> None:
    def count(**keys: object) -> int:
        return sum(parameter.numel() for parameter in build(**keys).parameters())

    width, hidden, depth = 24, 36, 2
    mlp = depth * (width * 2 * hidden + hidden * width)
    qkv = depth * width * 3 * width
    assert count(experts=("a", "b"), duplicate=("mlp",)) - count() == mlp
    assert count(experts=("a", "b", "c"), duplicate=("mlp", "qkv")) - count() == 2 * (mlp + qkv)
    assert count(experts=("a", "b")) == 2 * count()


def test_experts_start_as_copies_only_when_asked_to() -> None:
    for init, equal in (("copy", True), ("random", False)):
        network = TransformerConfig(width=24, depth=2, heads=3, experts=("a", "b"), expert_init=init).build()  # type: ignore[arg-type]
        network.init_weights(Generator().manual_seed(0))
        first, second = (network.experts[name].layers[1]["mlp"].gate_up.weight for name in "ab")  # type: ignore[index,union-attr]
        assert torch.equal(first, second) == equal


# sizes and start


def test_the_parameter_count_is_the_textbook_sum() -> None:
    width, depth, heads, kv_heads, hidden = 24, 3, 6, 2, 36
    network = build(depth=depth, heads=heads, kv_heads=kv_heads, mlp={"kind": "gelu"}, bias="all", norm={"kind": "layer"}, qk_norm=True)
    head = width // heads
    attention = width * (width + 2 * kv_heads * head) + (width + 2 * kv_heads * head) + width * width + width
    mlp = width * hidden + hidden + hidden * width + width
    layer_norm = 2 * width
    expected = depth * (attention + mlp + 2 * layer_norm + 2 * 2 * head) + layer_norm
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_initial_weights_have_the_promised_scale_and_depend_on_the_seed_alone() -> None:
    def fresh(seed: int) -> Transformer:
        network = TransformerConfig(width=96, depth=4, heads=4, bias="all").build()
        network.init_weights(Generator().manual_seed(seed))
        return network

    state = fresh(1).state_dict()
    assert all(torch.equal(state[name], value) for name, value in fresh(1).state_dict().items())
    assert not torch.equal(state["experts.main.layers.0.qkv.weight"], fresh(2).state_dict()["experts.main.layers.0.qkv.weight"])
    assert float(state["experts.main.layers.2.qkv.weight"].std()) == pytest.approx(1 / math.sqrt(96), rel=0.03)
    assert float(state["experts.main.layers.2.out.weight"].std()) == pytest.approx(1 / math.sqrt(96 * 8), rel=0.03)
    assert float(state["experts.main.layers.2.mlp.down.weight"].std()) == pytest.approx(1 / math.sqrt(384 * 8), rel=0.03)
    assert torch.equal(state["experts.main.final_norm.weight"], torch.ones(96))
    assert not state["experts.main.layers.2.qkv.bias"].any()


def test_dropout_acts_in_training_and_never_in_evaluation() -> None:
    network, layout, x = build(dropout=0.5), lay_out([text(5)]), noise(1, 5, 24)
    assert torch.equal(network(x, layout), network(x, layout))
    network.train()
    assert not torch.equal(network(x, layout), network(x, layout))


def test_a_misspelt_key_names_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match="'transformer' has no such key") as caught:
        parse_part(BACKBONES, {"kind": "transformer", "width": 8, "depth": 1, "heads": 2, "kv_head": 1}, "backbones.lm")
    assert "kv_heads" in caught.value.hint


# the cache


@pytest.mark.parametrize(
    "keys", [{}, {"kv_heads": 1, "qk_norm": True}, {"experts": ("a", "b"), "rope": {"kind": "rope", "axes": (2, 2, 4)}}]
)
def test_a_block_at_a_time_over_the_cache_equals_one_pass(keys: dict[str, object]) -> None:
    network, layout = build(**keys), mixed_layout()
    x = noise(1, 11, 24)
    whole = network(x, layout)
    cache = KeyValueCache(network.config, layout.columns(0, 0), 11, torch.float32)
    pieces = []
    for start, stop in [(0, 1), (1, 3), (3, 5), (5, 9), (9, 10), (10, 11)]:
        columns = layout.columns(start, stop)
        pieces.append(network(x[:, start:stop], columns, cache))
        cache.commit(columns)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_a_pass_that_is_not_committed_leaves_no_trace() -> None:
    network, layout = build(), lay_out([text(3), text(4, mask=FULL)])
    x, other = noise(1, 7, 24), noise(1, 4, 24, seed=5)
    cache = KeyValueCache(network.config, layout.columns(0, 0), 7, torch.float32)
    network(x[:, :3], layout.columns(0, 3), cache)
    cache.commit(layout.columns(0, 3))
    network(other, layout.columns(3, 7), cache)  # a round of denoising
    again = network(x[:, 3:], layout.columns(3, 7), cache)
    torch.testing.assert_close(again, network(x, layout)[:, 3:], atol=1e-5, rtol=1e-5)
    assert cache.length == 3


def test_a_cache_that_is_full_says_how_many_columns_are_needed() -> None:
    network, layout = build(), lay_out([text(5)])
    cache = KeyValueCache(network.config, layout.columns(0, 0), 4, torch.float32)
    with pytest.raises(ValueError, match="holds 4 columns, 5 are needed"):
        network(noise(1, 5, 24), layout, cache)
