"""Learned routing beside that of transformers, on copied random weights: Mixtral from ids to logits, losses, gradients and greedy text, and
HunYuan-MoE's layer, which has a shared expert."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_llama import DEPTH, HIDDEN, IDS, LM, SHARED, VOCAB, WIDTH, Weights, batch_of, from_llama, randomised
from torch import Generator
from worlds import planner_of, recipe_from

from stages.decoding import Prompt, Session
from stages.model import Model, build_model
from stages.parts.backbones import MoE, MoEConfig, balance
from stages.parts.samplers import AutoregressiveConfig
from stages.recipe import SegmentSpec
from stages.sequence.segment import Role, Segment

transformers = pytest.importorskip("transformers")
EXPERTS, TOP_K = 5, 2


def experts_from(state: Weights, there: str, here: str) -> Weights:
    gate_up, down = state.pop(f"{there}experts.gate_up_proj"), state.pop(f"{there}experts.down_proj")
    return {f"{here}experts.{e}.gate_up.weight": gate_up[e] for e in range(EXPERTS)} | {
        f"{here}experts.{e}.down.weight": down[e] for e in range(EXPERTS)
    }


def from_mixtral(state: Weights) -> Weights:
    ours: Weights = {}
    for n in range(DEPTH):
        here, there = f"backbones.lm.experts.main.layers.{n}.mlp.", f"model.layers.{n}.mlp."
        ours |= experts_from(state, there, here) | {f"{here}router.weight": state.pop(f"{there}gate.weight")}
        for part in ("gate", "up", "down"):  # what from_llama expects of a dense network
            state[f"{there}{part}_proj.weight"] = torch.empty(0)
    dense = from_llama(state)
    return ours | {name: value for name, value in dense.items() if value.numel()}


@pytest.fixture(scope="module", name="pair")
def _pair() -> tuple[Any, Model]:
    config = transformers.MixtralConfig(
        **SHARED,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
    )
    theirs = randomised(transformers.MixtralForCausalLM(config))
    moe = f'mlp = {{ kind = "moe", experts = {EXPERTS}, top_k = {TOP_K}, balance_weight = 0.02 }}'
    ours = build_model(recipe_from(LM % f'heads = 6\nkv_heads = 2\nnorm = {{ kind = "rms", eps = 1e-5 }}\n{moe}'), 0).eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(from_mixtral(state), strict=True)
    assert not state, f"weights of theirs that have no place here: {sorted(state)}"
    return theirs, ours


def test_hidden_rows_and_logits_agree(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(IDS, output_hidden_states=True)
        hidden = ours.hidden(batch_of(IDS))
        torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.predict("text", hidden.flatten(0, 1)), expected.logits.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_both_losses_and_their_gradients_agree(pair: tuple[Any, Model]) -> None:
    """Theirs pools the tokens of all layers before it multiplies; ours is the loss of each layer (Switch Transformer), on average."""
    theirs, ours = pair
    output = theirs(IDS, output_router_logits=True)
    pooled = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    layers = [pooled((logits,), EXPERTS, TOP_K) for logits in output.router_logits]
    assert len({round(float(layer.detach()), 4) for layer in layers}) == DEPTH  # the layers differ, and so would another average
    expected_balance = torch.stack(layers).mean()
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    losses = ours.losses(batch_of(IDS), Generator())
    assert losses.keys() == {"text", "lm.balance"}
    torch.testing.assert_close(losses["text"].mean, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["lm.balance"].mean, expected_balance, atol=1e-5, rtol=1e-5)
    (expected + 0.5 * expected_balance).backward()
    (losses["text"].mean + 0.5 * losses["lm.balance"].mean).backward()
    translated = from_mixtral({key: parameter.grad.clone() for key, parameter in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, translated[key], atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_greedy_text_agrees(pair: tuple[Any, Model]) -> None:
    """Our cache against their full forward pass, token by token, for two prompts of different lengths in one batch."""
    theirs, ours = pair
    sampler = AutoregressiveConfig(temperature=0.0, max_tokens=12)
    prompts = [IDS[0, :7], IDS[1, :4]]
    with torch.no_grad():
        rows = [Prompt(str(n), "", [[Segment(port="text", payload=ids, grid=(len(ids),))]]) for n, ids in enumerate(prompts)]
        session = Session(ours, planner_of(ours.recipe), rows, sampler.guide(set()), 12, 0)
        written, _ = session.write_text(SegmentSpec(port="text", field="caption", role=Role.TARGET), sampler, stop=[])
        for ids, own in zip(prompts, written, strict=True):
            context = ids
            for _ in range(12):
                context = torch.cat([context, theirs(context[None]).logits[0, -1].argmax()[None]])
            assert context[len(ids) :].tolist() == own


def test_a_layer_with_a_shared_expert_agrees() -> None:
    config = transformers.HunYuanMoEV1Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_experts=EXPERTS, moe_topk=[TOP_K], num_hidden_layers=1
    )
    config.num_local_experts = EXPERTS
    theirs = randomised(transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Moe(config, layer_idx=0))
    ours = MoE(MoEConfig(experts=EXPERTS, top_k=TOP_K, shared=1), WIDTH, HIDDEN, bias=False)
    state = dict(theirs.state_dict())
    gate, up = (state.pop(f"shared_mlp.{part}_proj.weight") for part in ("gate", "up"))
    copied = {"shared.gate_up.weight": torch.cat([gate, up]), "shared.down.weight": state.pop("shared_mlp.down_proj.weight")}
    ours.load_state_dict({**copied, "router.weight": state.pop("gate.wg.weight"), **experts_from(state, "", "")}, strict=True)
    assert not state
    x = torch.randn(3, 8, WIDTH, generator=Generator().manual_seed(2))
    with torch.no_grad():
        out, load = ours(x.flatten(0, 1), torch.ones(24, dtype=torch.bool))
        torch.testing.assert_close(out, theirs(x).flatten(0, 1), atol=2e-5, rtol=1e-4)
        total, count = balance([load], everywhere=False)
        assert count == pytest.approx(24) and 1.5 < float(total) / count < EXPERTS
