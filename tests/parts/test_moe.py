"""Learned routing: what it computes, what it costs, and that nothing but the router decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from stages.errors import RecipeError
from stages.parts.backbones import BACKBONES, KeyValueCache, Load, MoE, MoEConfig, Transformer, TransformerConfig, balance
from stages.parts.config import parse_part
from stages.parts.layers import SwiGLU
from stages.sequence.pack import lay_out, pack
from stages.sequence.segment import Segment, Sequence

DIM, HIDDEN = 7, 10


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def randomised(module: torch.nn.Module, scale: float = 0.5) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(scale * noise(*parameter.shape, seed=number + 100))


def build(bias: bool = False, **keys: int) -> MoE:
    moe = MoE(MoEConfig(**keys), DIM, HIDDEN, bias)  # type: ignore[arg-type]
    randomised(moe)
    return moe


def run(moe: MoE, x: Tensor, real: Tensor | None = None) -> Tensor:
    return moe(x, torch.ones(len(x), dtype=torch.bool) if real is None else real)[0]


def masked_reference(moe: MoE, x: Tensor, real: Tensor) -> Tensor:
    """Every expert on every row, weighted with zero where it was not chosen: equation by equation, and E / k times as much work."""
    probabilities = torch.softmax(x @ moe.router.weight.T, dim=1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(moe.config.top_k, dim=1).indices, 1.0)
    kept = probabilities * chosen
    weights = kept / kept.sum(dim=1, keepdim=True) if moe.config.top_k > 1 else kept
    out = sum(weights[:, e : e + 1] * expert(x) for e, expert in enumerate(moe.experts)) * real[:, None]
    return out + moe.shared(x) if moe.shared is not None else out


# what comes out


def test_one_expert_is_the_dense_network_exactly() -> None:
    moe, x = build(experts=1, top_k=1), noise(9, DIM)
    assert torch.equal(run(moe, x), moe.experts[0](x))


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_equal_experts_are_the_dense_network(top_k: int) -> None:
    moe, x = build(experts=5, top_k=top_k), noise(9, DIM)
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    torch.testing.assert_close(run(moe, x), moe.experts[0](x), atol=1e-6, rtol=1e-6)


def test_all_experts_together_are_their_weighted_sum() -> None:
    moe, x = build(experts=4, top_k=4), noise(9, DIM)
    expected = sum(moe.route(x)[:, e : e + 1] * expert(x) for e, expert in enumerate(moe.experts))
    torch.testing.assert_close(run(moe, x), expected, atol=1e-6, rtol=1e-5)


def test_the_shared_expert_is_added_for_every_row() -> None:
    moe, x = build(experts=4, top_k=2, shared=3), noise(9, DIM)
    assert moe.shared is not None and moe.shared.down.in_features == 3 * HIDDEN
    without = build(experts=4, top_k=2)
    without.load_state_dict({name: value for name, value in moe.state_dict().items() if not name.startswith("shared.")})
    torch.testing.assert_close(run(moe, x), run(without, x) + moe.shared(x), atol=1e-6, rtol=1e-6)


@given(
    experts=st.integers(1, 6),
    data=st.data(),
    rows=st.integers(0, 12),
    shared=st.integers(0, 1),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_grouped_equals_masked_forward_and_backward(
    experts: int, data: st.DataObject, rows: int, shared: int, bias: bool, seed: int
) -> None:
    moe = build(bias, experts=experts, top_k=data.draw(st.integers(1, experts)), shared=shared)
    real = noise(rows, seed=seed + 1) > -0.5
    probe = noise(rows, DIM, seed=seed + 2)
    gradients = []
    for compute in (run, masked_reference):
        x = noise(rows, DIM, seed=seed).requires_grad_()
        out = compute(moe, x, real)
        inputs = [x, *moe.parameters()]
        found = torch.autograd.grad((out * probe).sum(), inputs, allow_unused=True)
        gradients.append([out, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))])
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_the_others() -> None:
    moe, x = build(experts=4, top_k=2), noise(9, DIM)
    order = torch.randperm(9, generator=Generator().manual_seed(0))
    torch.testing.assert_close(run(moe, x[order]), run(moe, x)[order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(moe, x[3:4]), run(moe, x)[3:4], atol=1e-6, rtol=1e-6)


# who is asked


def test_no_token_is_dropped_and_each_expert_computes_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = build(experts=4, top_k=2), noise(30, DIM)
    seen: list[int] = []
    forward = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, rows: seen.append(len(rows)) or forward(self, rows))
    _, load = moe(x, torch.ones(30, dtype=torch.bool))
    assert seen == load.counts.tolist()
    assert sum(seen) == 2 * 30
    chosen = moe.route(x).topk(2, dim=1).indices
    assert seen == [int((chosen == e).sum()) for e in range(4)]


def test_padding_is_neither_routed_nor_counted() -> None:
    moe, x = build(experts=4, top_k=2), noise(9, DIM)
    real = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    out, load = moe(x, real)
    own, alone = moe(x[real], torch.ones(6, dtype=torch.bool))
    assert torch.equal(out[real], own)
    assert not out[~real].any()
    assert torch.equal(load.counts, alone.counts) and torch.equal(load.probabilities, alone.probabilities)
    assert load.probabilities.sum().item() == pytest.approx(6)


def test_the_router_is_float32_in_a_half_precision_pass() -> None:
    moe, x = build(experts=4, top_k=2), noise(9, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.route(x), moe.route(x).float())
        out, load = moe(x, torch.ones(9, dtype=torch.bool))
    assert moe.route(x.bfloat16()).dtype == load.probabilities.dtype == torch.float32
    torch.testing.assert_close(out, run(moe, x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_from_what_the_experts_do(top_k: int) -> None:
    moe, x = build(experts=4, top_k=top_k), noise(9, DIM)
    (run(moe, x) * noise(9, DIM, seed=1)).sum().backward()
    assert moe.router.weight.grad is not None and float(moe.router.weight.grad.abs().max()) > 1e-3


def test_backward_is_the_same_every_time_and_reaches_experts_nobody_chose() -> None:
    moe, x = build(experts=6, top_k=1), noise(40, DIM)
    with torch.no_grad():
        moe.router.weight[3] = 0.0
        moe.router.weight[3] -= 100 * x[:2].mean(dim=0)
    gradients = []
    for _ in range(3):
        moe.zero_grad()
        out, load = moe(x, torch.arange(40) < 2)
        (out.square().sum() + load.probabilities.square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in moe.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))
    assert len(gradients[0]) == len(list(moe.parameters()))
    assert not moe.experts[3].down.weight.grad.any()


# the balance loss


def load_of(probabilities: Tensor, top_k: int) -> Load:
    chosen = probabilities.topk(top_k, dim=1).indices.flatten()
    return Load(torch.bincount(chosen, minlength=probabilities.shape[1]).float(), probabilities.sum(dim=0))


def value(*loads: Load) -> float:
    total, count = balance(loads, everywhere=False)
    return float(total) / count


def test_the_balance_loss_is_one_when_all_are_used_alike_and_the_number_of_experts_when_one_has_everything() -> None:
    alike, one = torch.eye(5).repeat(3, 1), torch.eye(5)[2].repeat(9, 1)
    assert value(load_of(alike, 1)) == pytest.approx(1.0, abs=1e-6)
    assert value(load_of(one, 1)) == pytest.approx(5.0, abs=1e-6)
    uniform = Load(torch.full((5,), 6.0), torch.full((5,), 3.0))  # two experts for each of 15 tokens
    assert value(uniform) == pytest.approx(2.0, abs=1e-6)


def test_layers_count_by_their_tokens_and_an_empty_one_not_at_all() -> None:
    one, alike = load_of(torch.eye(5)[2].repeat(9, 1), 1), load_of(torch.eye(5).repeat(3, 1), 1)
    nothing = Load(torch.zeros(5), torch.zeros(5))
    assert value(one, alike, nothing) == pytest.approx((9 * 5 + 15 * 1) / 24, abs=1e-6)


def test_its_gradient_takes_from_the_experts_with_most_tokens() -> None:
    logits = noise(60, 4).add(torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    total, count = balance([load_of(logits.softmax(dim=1), 1)], everywhere=False)
    (gradient,) = torch.autograd.grad(total / count, logits)
    assert gradient[:, 0].min() > 0 > gradient[:, 1:].sum(dim=1).max()


# in the transformer


def network(**keys: object) -> Transformer:
    table = {"width": 24, "depth": 2, "heads": 3, "mlp_ratio": 1.5, "mlp": {"kind": "moe", "experts": 4, "top_k": 2}, **keys}
    built = TransformerConfig.model_validate(table).build()
    built.init_weights(Generator().manual_seed(0))
    with torch.no_grad():
        for number, parameter in enumerate(built.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=number))
    return built.eval()


def segments(length: int, expert: int = 0) -> tuple[Segment, ...]:
    halves = (length - length // 2, length // 2)
    return tuple(Segment(port="x", payload=torch.zeros(n), grid=(n,), expert=e) for n, e in zip(halves, (0, expert), strict=True) if n)


def test_one_learned_expert_is_the_dense_transformer_exactly() -> None:
    sparse, layout = network(mlp={"kind": "moe", "experts": 1, "top_k": 1}), lay_out(segments(7))
    dense = TransformerConfig(width=24, depth=2, heads=3, mlp_ratio=1.5).build().eval()
    state = {name.replace("mlp.experts.0.", "mlp."): value for name, value in sparse.state_dict().items() if "router" not in name}
    dense.load_state_dict(state)
    x = noise(1, 7, 24)
    assert torch.equal(sparse(x, layout), dense(x, layout))


@pytest.mark.parametrize("experts", [("main",), ("a", "b")])
def test_learned_routing_within_hard_routing_and_within_ragged_rows(experts: tuple[str, ...]) -> None:
    """Each sample alone gives the rows it has in a batch with padding, and the loads are those of the tokens only."""
    net, lengths = network(experts=experts), (7, 4)
    made = [segments(length, expert=len(experts) - 1) for length in lengths]
    batch = pack([Sequence(key=str(n), task="t", segments=own) for n, own in enumerate(made)], row_length=9)
    assert batch.layout.shape == (2, 9)
    x, loads = noise(2, 9, 24), list[Load]()
    together = net(x, batch.layout, loads=loads)
    assert len(loads) == 2 * len(experts)
    assert sum(int(load.counts.sum()) for load in loads[: len(experts)]) == 2 * sum(lengths)
    for n, own in enumerate(made):
        row = int((batch.layout.sample_id == n).any(dim=1).nonzero()[0, 0])
        alone = net(x[row : row + 1, : lengths[n]], lay_out(own))
        torch.testing.assert_close(together[row, : lengths[n]], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", [("main",), ("a", "b")])
def test_cached_columns_equal_one_pass(experts: tuple[str, ...]) -> None:
    """A prefix, then column by column as a decoder runs them."""
    net = network(experts=experts, kv_heads=1)
    layout = lay_out(segments(9, expert=len(experts) - 1))
    x = noise(1, 9, 24)
    with torch.no_grad():
        whole = net(x, layout)
        cache = KeyValueCache(net.config, layout.columns(0, 0), 9, torch.float32)
        parts = [net(x[:, :3], layout.columns(0, 3), cache)]
        cache.commit(layout.columns(0, 3))
        cache.reserve(layout.columns(3, 9))
        for place, column in enumerate(net.arrange_columns(cache, 6)):
            parts.append(net(x[:, 3 + place : 4 + place], column, cache))
            cache.advance()
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


def test_parameters_are_those_of_the_dense_network_the_router_and_the_other_experts() -> None:
    def count(**keys: object) -> int:
        return sum(parameter.numel() for parameter in network(**keys).parameters())

    mlp = 3 * 24 * 36
    dense = count(mlp={"kind": "swiglu"})
    assert count() == dense + 2 * (3 * mlp + 4 * 24)
    assert count(mlp={"kind": "moe", "experts": 4, "top_k": 2, "shared": 2}) == dense + 2 * (5 * mlp + 4 * 24)


def test_the_router_starts_nearly_even() -> None:
    config = TransformerConfig.model_validate({"width": 64, "depth": 1, "heads": 4, "mlp": {"kind": "moe", "experts": 4, "top_k": 2}})
    net = config.build()
    net.init_weights(Generator().manual_seed(0))
    moe = net.experts["main"].layers[0]["mlp"]  # type: ignore[index,union-attr]
    probabilities = moe.route(noise(200, 64))
    assert probabilities.min().item() > 0.15 and probabilities.max().item() < 0.40
    assert float(moe.experts[3].down.weight.std()) == pytest.approx(1 / (256 * 2) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        ({"kind": "moe", "experts": 4}, r"backbones\.lm\.mlp\.top_k: is missing"),
        ({"kind": "moe", "experts": 2, "top_k": 3}, r"backbones\.lm\.mlp: .*top_k is 3, but there are 2 experts"),
        ({"kind": "moe", "experts": 2, "top_k": 1, "share": 1}, r"backbones\.lm\.mlp\.share: 'moe' has no such key"),
        ({"kind": "mo", "experts": 2}, r"backbones\.lm\.mlp\.kind: there is no 'mo'"),
    ],
)
def test_mistakes_are_named(mlp: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_part(BACKBONES, {"kind": "transformer", "width": 8, "depth": 1, "heads": 2, "mlp": mlp}, "backbones.lm")
