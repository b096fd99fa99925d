"""Our transformer beside those of transformers: random weights copied by an explicit map with no key left over on either side.

Llama (RMS norm, SwiGLU, grouped keys and values), Qwen3 (norms of queries and keys, a head width of its own, biases nowhere) and
GPT-NeoX (LayerNorm, GELU, biases everywhere, sequential residual).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from worlds import planner_of, recipe_from, text_tokenizer

from stages.decoding import Prompt, Session
from stages.model import Model, build_model
from stages.parts.samplers import AutoregressiveConfig
from stages.recipe import SegmentSpec
from stages.sequence.pack import lay_out, pack
from stages.sequence.segment import Role, Segment, Sequence

transformers = pytest.importorskip("transformers")

WIDTH, DEPTH, HIDDEN, THETA = 24, 3, 40, 500.0
VOCAB = text_tokenizer().vocab_size

LM = f"""
size = "tiny"
[paper]
arxiv = "0"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = {VOCAB}
special = ["<t2i>", "<mmu>", "<soi>", "<eoi>", "<sot>", "<eot>"]
[backbones.lm]
kind = "transformer"
width = {WIDTH}
depth = {DEPTH}
mlp_ratio = {HIDDEN / WIDTH!r}
rope = {{ kind = "rope", theta = {THETA} }}
%s
[ports.text]
content = "token-ids"
tokenizer = "bpe"
connector = {{ kind = "embedding" }}
head = {{ kind = "linear" }}
objective = {{ kind = "next-token" }}
[tasks.text]
segments = [{{ port = "text", field = "caption", role = "target" }}]
[[phases]]
name = "only"
stage = "train-unified"
tasks = {{ text = 1.0 }}
steps = 1
batch_size = 1
"""

Weights = dict[str, Tensor]


def randomised(model: Any) -> Any:
    """Every weight random, also norms and biases."""
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama() -> Any:
    config = transformers.LlamaConfig(**SHARED, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5)
    return transformers.LlamaForCausalLM(config)


def qwen3() -> Any:
    config = transformers.Qwen3Config(**SHARED, num_attention_heads=4, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-6)
    return transformers.Qwen3ForCausalLM(config)


def neox() -> Any:
    shared = {**SHARED, "rope_parameters": {**SHARED["rope_parameters"], "partial_rotary_factor": 1.0}}  # type: ignore[dict-item]
    config = transformers.GPTNeoXConfig(
        **shared, num_attention_heads=3, use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-5
    )
    return transformers.GPTNeoXForCausalLM(config)


def from_llama(state: Weights) -> Weights:
    """Also Qwen3, whose two extra norms have the names they have here."""
    ours = {
        "ports.text.connector.weight": state.pop("model.embed_tokens.weight"),
        "ports.text.head.weight": state.pop("lm_head.weight"),
        "backbones.lm.experts.main.final_norm.weight": state.pop("model.norm.weight"),
    }
    for n in range(DEPTH):
        here, there = f"backbones.lm.experts.main.layers.{n}.", f"model.layers.{n}."
        ours[here + "qkv.weight"] = torch.cat([state.pop(f"{there}self_attn.{part}_proj.weight") for part in "qkv"])
        ours[here + "out.weight"] = state.pop(there + "self_attn.o_proj.weight")
        ours[here + "mlp.gate_up.weight"] = torch.cat([state.pop(f"{there}mlp.{part}_proj.weight") for part in ("gate", "up")])
        ours[here + "mlp.down.weight"] = state.pop(there + "mlp.down_proj.weight")
        ours[here + "attention_norm.weight"] = state.pop(there + "input_layernorm.weight")
        ours[here + "mlp_norm.weight"] = state.pop(there + "post_attention_layernorm.weight")
        for part in "qk":
            if f"{there}self_attn.{part}_norm.weight" in state:
                ours[f"{here}{part}_norm.weight"] = state.pop(f"{there}self_attn.{part}_norm.weight")
    return ours


def from_neox(state: Weights) -> Weights:
    """GPT-NeoX keeps q, k and v of each head side by side; here all q come first."""

    def apart(tensor: Tensor) -> Tensor:
        by_head = tensor.reshape(3, 3, WIDTH // 3, *tensor.shape[1:])  # (heads, qkv, head_dim, …)
        return by_head.transpose(0, 1).reshape(tensor.shape)

    ours = {
        "ports.text.connector.weight": state.pop("gpt_neox.embed_in.weight"),
        "ports.text.head.weight": state.pop("lm_head.weight"),
    }
    for kind in ("weight", "bias"):
        ours[f"backbones.lm.experts.main.final_norm.{kind}"] = state.pop(f"gpt_neox.final_layer_norm.{kind}")
        for n in range(DEPTH):
            here, there = f"backbones.lm.experts.main.layers.{n}.", f"gpt_neox.layers.{n}."
            ours[f"{here}qkv.{kind}"] = apart(state.pop(f"{there}attention.query_key_value.{kind}"))
            ours[f"{here}out.{kind}"] = state.pop(f"{there}attention.dense.{kind}")
            ours[f"{here}mlp.up.{kind}"] = state.pop(f"{there}mlp.dense_h_to_4h.{kind}")
            ours[f"{here}mlp.down.{kind}"] = state.pop(f"{there}mlp.dense_4h_to_h.{kind}")
            ours[f"{here}attention_norm.{kind}"] = state.pop(f"{there}input_layernorm.{kind}")
            ours[f"{here}mlp_norm.{kind}"] = state.pop(f"{there}post_attention_layernorm.{kind}")
    return ours


CASES: dict[str, tuple[Callable[[], Any], Callable[[Weights], Weights], str]] = {
    "llama": (llama, from_llama, 'heads = 6\nkv_heads = 2\nnorm = { kind = "rms", eps = 1e-5 }'),
    "qwen3": (qwen3, from_llama, 'heads = 4\nkv_heads = 2\nhead_dim = 10\nqk_norm = true\nnorm = { kind = "rms", eps = 1e-6 }'),
    "gpt-neox": (neox, from_neox, 'heads = 3\nbias = "all"\nmlp = { kind = "gelu" }\nnorm = { kind = "layer", eps = 1e-5 }'),
}


def pair(name: str) -> tuple[Any, Model]:
    make, translate, keys = CASES[name]
    theirs = randomised(make())
    ours = build_model(recipe_from(LM % keys), 0).eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    ours.load_state_dict(translate(state), strict=True)  # strict: nothing of ours is left out
    assert not state, f"weights of theirs that have no place here: {sorted(state)}"
    return theirs, ours


IDS = torch.randint(0, VOCAB, (2, 11), generator=Generator().manual_seed(5))


def batch_of(ids: Tensor) -> Any:
    segments = [(Segment(port="text", payload=row, grid=(len(row),), role=Role.TARGET),) for row in ids]
    return pack([Sequence(key=str(n), task="text", segments=segment) for n, segment in enumerate(segments)], row_length=ids.shape[1])


@pytest.mark.parametrize("name", CASES)
def test_hidden_rows_and_logits_agree(name: str) -> None:
    theirs, ours = pair(name)
    with torch.no_grad():
        expected = theirs(IDS, output_hidden_states=True)
        hidden = ours.hidden(batch_of(IDS))
        torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours.predict("text", hidden.flatten(0, 1)), expected.logits.flatten(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_layer_agrees(name: str) -> None:
    """Not only the end: the residual stream after each block, both through the final norm."""
    theirs, ours = pair(name)
    with torch.no_grad():
        states = theirs(IDS, output_hidden_states=True).hidden_states
        for depth in range(1, DEPTH):
            shallow = ours.backbone.config.model_copy(update={"depth": depth}).build().eval()
            weights = {key: value for key, value in ours.backbone.state_dict().items() if key in shallow.state_dict()}
            shallow.load_state_dict(weights)
            expected = ours.backbone.experts["main"].final_norm(states[depth])  # type: ignore[operator,union-attr]
            torch.testing.assert_close(shallow(states[0], batch_of(IDS).layout), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradients_agree(name: str) -> None:
    theirs, ours = pair(name)
    logits = theirs(IDS).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    loss = ours.losses(batch_of(IDS), Generator())["text"]
    assert loss.count == IDS.numel() - len(IDS)
    torch.testing.assert_close(loss.mean, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.mean.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in theirs.named_parameters()}
    translated = CASES[name][1](gradients)
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, translated[key], atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_twenty_greedy_tokens_agree(name: str) -> None:
    """Our cache against their full forward pass, token by token, for two prompts of different lengths in one batch."""
    theirs, ours = pair(name)
    sampler = AutoregressiveConfig(temperature=0.0, max_tokens=20)
    spec = SegmentSpec(port="text", field="caption", role=Role.TARGET)
    prompts = [IDS[0, :7], IDS[1, :4]]
    with torch.no_grad():
        contexts = [[[Segment(port="text", payload=ids, grid=(len(ids),))]] for ids in prompts]
        session = Session(
            ours, planner_of(ours.recipe), [Prompt(str(n), "", context) for n, context in enumerate(contexts)], sampler.guide(set()), 20, 0
        )
        written, _ = session.write_text(spec, sampler, stop=[])
        for ids, ours_wrote in zip(prompts, written, strict=True):
            context = ids
            for _ in range(20):
                context = torch.cat([context, theirs(context[None]).logits[0, -1].argmax()[None]])
            assert context[len(ids) :].tolist() == ours_wrote


def test_a_layout_of_text_is_the_one_these_models_assume() -> None:
    layout = lay_out([Segment(port="text", payload=IDS[0], grid=(11,))])
    assert layout.positions[0, :, 0].tolist() == list(range(11))
