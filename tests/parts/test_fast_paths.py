"""Every fast path of the transformer and of decoding against the plain way to compute the same."""

import contextlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from worlds import CAPTIONS, lively, mixed_recipe, planner_of, sample_of, segment_lists, text

from stages.decoding import FEW_ROWS, Prompt, Session, prepare, store_by_column, threads_for
from stages.model import Model
from stages.parts.backbones import KeyValueCache, Transformer
from stages.parts.backbones.transformer import Routing, TransformerConfig, rotate, without_module
from stages.parts.heads.linear import LinearHead
from stages.parts.layers import GeluMLP, LayerNorm
from stages.parts.packed import Packed, pack_linears
from stages.parts.samplers import AutoregressiveConfig, Guide
from stages.recipe import SegmentSpec
from stages.sequence.masks import may_attend
from stages.sequence.pack import Cursor, continue_rows
from stages.sequence.segment import Layout, MaskKind, Role, Segment

WIDTH = 24
KINDS: list[dict[str, object]] = [
    {},
    {"kv_heads": 1, "qk_norm": True, "bias": "all"},
    {"experts": ("a", "b"), "rope": {"kind": "rope", "axes": (2, 2, 4)}},
    {"experts": ("a", "b"), "duplicate": ("mlp",), "norm": {"kind": "layer"}, "mlp": {"kind": "gelu"}},
]


def build(**keys: object) -> Transformer:
    """A small transformer in evaluation mode, every weight random."""
    network = TransformerConfig(**{"width": WIDTH, "depth": 2, "heads": 3, "mlp_ratio": 1.5, **keys}).build()  # type: ignore[arg-type]
    network.init_weights(Generator().manual_seed(0))
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def cache_of(network: Transformer, layout: Layout, capacity: int) -> KeyValueCache:
    return KeyValueCache(network.config, layout.columns(0, 0), capacity, torch.float32)


def ragged(*rows: list[Segment]) -> Layout:
    """One sample a row, padded on the right."""
    return continue_rows(rows, [Cursor() for _ in rows])[0].layout


def column_by_column(network: Transformer, x: Tensor, layout: Layout, start: int, windows: list[int]) -> Tensor:
    """Hidden rows of the columns from `start` on: what is before in one pass, then one column after another, a window at a time."""
    cache = cache_of(network, layout, layout.shape[1])
    if start:
        network(x[:, :start], layout.columns(0, start), cache)
        cache.commit(layout.columns(0, start))
    cache.reserve(layout.columns(start, layout.shape[1]))
    rows, place = [], start
    for count in windows:
        for column in network.arrange_columns(cache, count):
            rows.append(network(x[:, place : place + 1], column, cache))
            cache.advance()
            place += 1
    return torch.cat(rows, dim=1)


# columns one by one


@pytest.mark.parametrize("keys", KINDS)
def test_columns_one_by_one_equal_one_pass(keys: dict[str, object]) -> None:
    network = build(**keys)
    layout = ragged([text(4), text(3, mask=MaskKind.FULL, expert=1), text(6)], [text(5), text(2, expert=1), text(6, expert=1)])
    x = noise(2, 13, WIDTH)
    expected = network(x, layout)[:, 7:]
    torch.testing.assert_close(column_by_column(network, x, layout, 7, [2, 4]), expected, atol=1e-5, rtol=1e-5)


@given(segment_lists(max_segments=3), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=15)
def test_text_after_any_context_equals_one_pass(context: list[Segment], other: int, count: int) -> None:
    """Full, isolated and merged blocks before it, and a neighbour of another length."""
    network = build(experts=("a", "b"))
    before, cursors = continue_rows([context, [text(other)]], [Cursor(), Cursor()])
    after, _ = continue_rows([[text(count)], [text(count)]], cursors)
    layout = before.layout.append(after.layout)
    start = before.layout.shape[1]
    x = noise(2, start + count, WIDTH)
    expected = network(x, layout)[:, start:]
    torch.testing.assert_close(column_by_column(network, x, layout, start, [count]), expected, atol=1e-5, rtol=1e-5)


def test_masks_of_columns_are_left_out_exactly_where_nothing_is_hidden() -> None:
    network = build()
    for rows, hidden in (
        ([[text(5)], [text(5)]], False),
        ([[text(3), text(2, mask=MaskKind.FULL)], [text(5)]], False),  # later tokens see all of a full block
        ([[text(3)], [text(5)]], True),
        ([[text(2, mask=MaskKind.ISOLATED), text(3)], [text(5)]], True),
    ):
        before, cursors = continue_rows(rows, [Cursor(), Cursor()])
        after = continue_rows([[text(2)], [text(2)]], cursors)[0].layout
        cache = cache_of(network, before.layout, 7)
        cache.commit(before.layout)
        visible = may_attend(after, cache.reserve(after))
        assert bool(visible.tril(5).sum() < torch.ones(2, 2, 7).tril(5).sum()) == hidden
        assert [column.mask is not None for column in network.arrange_columns(cache, 2)] == [hidden, hidden]


def test_a_row_that_ends_leaves_padding_that_nobody_sees_later() -> None:
    """Row 1 ends after two of four columns; what is written after them sees those two alone."""
    network = build()
    before, cursors = continue_rows([[text(3)], [text(3)]], [Cursor(), Cursor()])
    four, _ = continue_rows([[text(4)], [text(4)]], cursors)
    x = noise(2, 9, WIDTH)
    cache = cache_of(network, before.layout, 9)
    network(x[:, :3], before.layout, cache)
    cache.commit(before.layout)
    cache.reserve(four.layout)
    for place, column in enumerate(network.arrange_columns(cache, 4)):
        if place == 2:
            cache.end_rows(torch.tensor([False, True]))
        network(x[:, 3 + place : 4 + place], column, cache)
        cache.advance()
    last, _ = continue_rows([[text(2)], [text(2)]], [Cursor(7, 1, 7), Cursor(5, 1, 5)])
    found = network(x[:, 7:], last.layout, cache)
    whole = ragged([text(3), text(4), text(2)])
    torch.testing.assert_close(found[:1], network(x[:1], whole)[:, 7:], atol=1e-5, rtol=1e-5)
    shorter = torch.cat([x[1:, :5], x[1:, 7:]], dim=1)
    torch.testing.assert_close(found[1:], network(shorter, ragged([text(3), text(2), text(2)]))[:, 5:], atol=1e-5, rtol=1e-5)
    assert cache.layout.sample_id.tolist() == [[0] * 7, [1] * 5 + [-1] * 2]


def test_a_shared_arrangement_gives_the_bits_of_one_made_for_each_pass() -> None:
    network = build(experts=("a", "b"))
    layout = ragged([text(3), text(4, mask=MaskKind.FULL, expert=1)], [text(2), text(4, mask=MaskKind.FULL, expert=1)])
    cache = cache_of(network, layout, 7)
    network(noise(2, 3, WIDTH), layout.columns(0, 3), cache)
    cache.commit(layout.columns(0, 3))
    block = layout.columns(3, 7)
    places = network.arrange(block, cache, torch.float32)
    for seed in (1, 2, 3):
        x = noise(2, 4, WIDTH, seed=seed)
        assert torch.equal(network(x, places, cache), network(x, block, cache))


def test_reserving_more_columns_than_the_cache_holds_is_refused() -> None:
    network, layout = build(), ragged([text(5)])
    cache = cache_of(network, layout, 6)
    cache.commit(layout.columns(0, 2))
    with pytest.raises(ValueError, match="holds 6 columns, 7 are needed"):
        cache.reserve(layout)


# pieces


@pytest.mark.parametrize("shape", [(1, 3, 2, 8), (2, 5, 3, 6)])
def test_rotation_is_the_textbook_one(shape: tuple[int, ...]) -> None:
    """x_i cos - x_j sin and x_j cos + x_i sin for each pair (i, j = i + half)."""
    b, length, _, dim = shape
    network = build(width=3 * dim, heads=3)
    positions = torch.randint(0, 99, (b, length, 3), generator=Generator().manual_seed(0))
    x = noise(*shape)
    angle = (positions[..., :1] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2)))[:, :, None]
    left, right = x.chunk(2, dim=-1)
    expected = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], dim=-1)
    torch.testing.assert_close(rotate(x, *network._rotation(positions, torch.float32)), expected, atol=1e-5, rtol=1e-5)


def test_tokens_of_one_expert_are_computed_as_when_another_is_present() -> None:
    network = build(experts=("a", "b", "c"))
    alone = ragged([text(4, expert=1)])
    mixed = ragged([text(4, expert=1)], [text(2, expert=2), text(2, expert=0)])
    assert Routing(alone.expert_id, 3).only == 1
    assert Routing(mixed.expert_id, 3).only is None
    x = noise(2, 4, WIDTH)
    torch.testing.assert_close(network(x[:1], alone), network(x, mixed)[:1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("keys", KINDS)
def test_functions_without_modules_compute_the_same_bits(keys: dict[str, object]) -> None:
    network = build(**keys)
    called = 0

    def count(*_: object) -> None:
        nonlocal called
        called += 1

    for module in network.modules():
        module.register_forward_hook(count)
    for layer in network._layers:
        for role, copies in layer.items():
            for module in copies:
                x = noise(5, 8 if role in ("q_norm", "k_norm") else WIDTH)
                expected, before = module(x), called
                assert torch.equal(without_module(module)(x), expected)
                assert (called > before) == isinstance(module, LayerNorm | GeluMLP)  # those are called as they are


# weights by column


def test_wide_matrices_by_column_hold_the_same_values_and_write_the_same_text() -> None:
    recipe = mixed_recipe()
    model, other = lively(recipe), store_by_column(lively(recipe))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    moved = {name for name, value in other.named_parameters() if value.dim() == 2 and value.stride(0) == 1 < value.shape[1]}
    wide = {name for name, value in model.named_parameters() if value.dim() == 2 and value.shape[0] > value.shape[1]}
    assert moved == wide - {"ports.text.connector.weight"}  # rows of an embedding are read one at a time
    assert any("qkv" in name for name in moved) and any("gate_up" in name for name in moved) and "ports.text.head.weight" in moved
    assert write(model) == write(other)


# packed weights


@pytest.fixture
def _pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.parts.packed.SMALLEST", 0)


@pytest.mark.usefixtures("_pack_small_weights")
@pytest.mark.parametrize("keys", [*KINDS, {"mlp": {"kind": "moe", "experts": 3, "top_k": 2, "shared": 1}, "bias": "all"}])
def test_packed_layers_compute_the_same_in_one_pass_and_column_by_column(keys: dict[str, object]) -> None:
    network, packed = build(**keys), build(**keys)
    pack_linears(packed)
    layout = ragged([text(4), text(3, mask=MaskKind.FULL, expert=1), text(6)], [text(5), text(2, expert=1), text(6, expert=1)])
    for b in (1, 2):  # one row is not packed
        rows = Layout(**{name: value[:b] for name, value in vars(layout).items()})
        x = noise(b, 13, WIDTH)
        with torch.inference_mode():
            expected = network(x, rows)
            torch.testing.assert_close(packed(x, rows), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(column_by_column(packed, x, rows, 7, [6]), expected[:, 7:], atol=1e-5, rtol=1e-5)
    made = [vars(module).get("forward") for module in packed.modules() if isinstance(module, torch.nn.Linear)]
    used = [packing for packing in made if isinstance(packing, Packed) and packing.blocks is not None]
    assert not torch.backends.mkldnn.is_available() or len(used) >= 2 * 4  # qkv, out and an MLP of two, in both layers
    assert all(torch.equal(value, packed.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.usefixtures("_pack_small_weights")
@pytest.mark.parametrize("bias", [False, True])
def test_slices_of_a_packed_head(bias: bool) -> None:
    head = LinearHead(WIDTH, 40, bias=bias, zero=False, tied_to=None)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=Generator().manual_seed(0))
    x = noise(4, WIDTH)
    slices: list[tuple[int, int | None]] = [(0, None), (7, 20), (20, 40)]
    with torch.inference_mode():
        expected = [head(x, *piece) for piece in slices]
        head.pack()
        for _ in range(2):  # packed at first, then looked up
            for piece, logits in zip(slices, expected, strict=True):
                torch.testing.assert_close(head(x, *piece), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_pack_small_weights")
def test_empty_inputs_and_other_dtypes_go_by_the_plain_way() -> None:
    weight, bias = noise(6, WIDTH), noise(6, seed=1)
    assert Packed(weight, bias)(noise(0, WIDTH)).shape == (0, 6)
    x = noise(3, WIDTH).double()
    assert torch.equal(Packed(weight.double(), bias.double())(x), torch.nn.functional.linear(x, weight.double(), bias.double()))


@pytest.mark.usefixtures("_pack_small_weights")
def test_a_prepared_model_writes_the_same_text() -> None:
    assert write(prepare(lively(mixed_recipe()))) == write(lively(mixed_recipe()))


def write(model: Model) -> list[list[int]]:
    """Greedy text after three prompts of different lengths."""
    planner = planner_of(model.recipe)
    spec = SegmentSpec(port="text", text="{comment}<eot>", role=Role.TARGET)
    prompts = [Prompt(CAPTIONS[n], "draw/0", [planner.prompt(sample_of(n), "draw")[0]]) for n in (0, 1, 4)]
    guide = Guide(kind="nested", drops=(frozenset(),), terms=(), interval=(0.0, 1.0), renorm="none")
    with torch.inference_mode():
        session = Session(model, planner, prompts, guide, 40, seed=0)
        return session.write_text(spec, AutoregressiveConfig(temperature=0.0, max_tokens=40), stop=[])[0]


def test_a_text_longer_than_a_window_goes_on_where_the_window_ended() -> None:
    """Forty tokens need two windows; each is the argmax of a session that was given all before it."""
    model = lively(mixed_recipe())
    planner = planner_of(model.recipe)
    context = planner.prompt(sample_of(1), "draw")[0]
    ids = write(model)[1]
    assert len(ids) == 40
    guide = Guide(kind="nested", drops=(frozenset(),), terms=(), interval=(0.0, 1.0), renorm="none")
    for start, stop in pairwise((0, 31, 32, 33, 39)):
        given_ids = torch.tensor(ids[:stop])
        given_text = [Segment(port="text", payload=given_ids, grid=(stop,), expert=planner.expert_of("text"))]
        with torch.inference_mode():
            session = Session(model, planner, [Prompt("a", "b", [[*context, *given_text]])], guide, 1, seed=0)
            assert int(model.predict("text", session.last).argmax()) == ids[stop], (start, stop)


def test_few_rows_are_decoded_by_one_thread_which_is_undone_also_after_an_error() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with contextlib.suppress(KeyError), threads_for(FEW_ROWS):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        with threads_for(FEW_ROWS + 1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
