"""A training step and cached sampling against a plain PyTorch loop of the same size, in one interleaved run.

    python -m benchmarks.step [--size 1M|10M] [--only train|sample] [--rounds 9] [--threads 1] [--peer]

*Training* is 16 rows of 128 tokens: text alone, and text with a picture of 64 latents in each row. mmgen's side is its real loop, `fit`,
once from shards (planning and packing included, as in a run) and once over batches packed before. The plain side is written out below:
a decoder with its own rotary embedding and `scaled_dot_product_attention`, logits for every row, a dense float mask where there are
pictures, gradient clipping, fused AdamW. *Sampling* is greedy text over a key/value cache, for 1 and for 16 prompts; the plain side
preallocates its cache and needs no mask, since all its rows are equally long; mmgen's weights are laid out for sampling (`prepare`).
`--peer` adds `generate` of transformers' Llama, with either kind of cache.

Both sides hold the same weights and must find the same loss and the same tokens, or the run fails. Sides take turns; each ratio is
the median over pairs of neighbours, of wall-clock and of processor time. The latter is the one to read on a busy machine.
"""

import argparse
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.decoding import Prompt, Session, prepare
from stages.model import Model, build_model, set_trainable
from stages.options import RunOptions
from stages.parts.samplers import AutoregressiveConfig
from stages.parts.tokenizers import TextTokenizer
from stages.recipe import Recipe, SegmentSpec, load_recipe
from stages.run import Run
from stages.sequence.plan import Planner
from stages.sequence.segment import Batch, Role, Segment
from stages.train_unified import training_step
from stages.training.loop import Ledger, Trainee, fit
from stages.training.stream import Stream

ROWS, LENGTH, GRID, CHANNELS = 16, 128, (8, 8), 16
CAPTION = {"text": LENGTH - 2, "mixed": LENGTH - 3 - GRID[0] * GRID[1]}  # tokens of text that fill a row beside the special ones
PROMPT_TOKENS = 16

RECIPE = """
size = "small"
[paper]
arxiv = "2408.11039"
[tokenizers.bpe]
kind = "byte-bpe"
vocab_size = {vocabulary}
special = ["<soi>", "<eoi>"]
[autoencoders.image]
kind = "kl-cnn"
downsample = 4
multipliers = [1, 1, 1]
latent_channels = 4
[backbones.lm]
kind = "transformer"
width = {width}
depth = {depth}
heads = {heads}
mlp_ratio = 2.6875
[ports.text]
content = "token-ids"
tokenizer = "bpe"
connector = {{ kind = "embedding" }}
head = {{ kind = "linear" }}
objective = {{ kind = "next-token" }}
[ports.image]
content = "latents"
autoencoder = "image"
patch_size = 2
mask = "full"
timestep = "add"
connector = {{ kind = "linear" }}
head = {{ kind = "linear" }}
objective = {{ kind = "denoise" }}
markers = {{ before = "<soi>", after = "<eoi>", inside = false }}
[tasks.text]
segments = [ {{ port = "text", text = "<bos>" }}, {{ port = "text", text = "{{caption}}<eos>", role = "target" }} ]
[tasks.mixed]
segments = [
  {{ port = "text", text = "<bos>" }},
  {{ port = "text", text = "{{caption}}", role = "target" }},
  {{ port = "image", field = "image", role = "target" }},
]
[[phases]]
name = "text"
stage = "train-unified"
tasks = {{ text = 1.0 }}
steps = 100000
batch_size = {rows}
lr = 1e-3
[[phases]]
name = "mixed"
stage = "train-unified"
tasks = {{ mixed = 1.0 }}
steps = 100000
batch_size = {rows}
lr = 1e-3
[sample.text]
sampler = "autoregressive"
temperature = 0.0
"""
SIZES = {
    "1M": {"vocabulary": 2048, "width": 128, "depth": 4, "heads": 4},
    "10M": {"vocabulary": 4096, "width": 320, "depth": 6, "heads": 5},
}


# the plain side


class Block(nn.Module):
    """One pre-norm layer of Llama's shape, with a cached step."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        b, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (part.view(b, length, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            k, v = keys[:, :, : start + length], values[:, :, : start + length]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        x = x + self.out(attended.transpose(1, 2).reshape(b, length, width))
        gate, up = self.gate_up(self.mlp_norm(x)).split(self.hidden, dim=2)
        return x + self.down(F.silu(gate) * up)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Plain(nn.Module):
    """A decoder of text, and of pictures as latents with a noise level, as one writes it for a single purpose."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.depth, self.heads, self.head_dim = depth, heads, width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, round(width * 2.6875)) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.patch_in, self.patch_out = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS, bias=False)
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        angle = torch.arange(1024)[:, None] * 10000.0 ** (-torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("rate", torch.exp(-torch.arange(128) / 128 * np.log(10000.0)).float(), persistent=False)

    def take(self, model: Model) -> None:
        """The weights of an mmgen model, by name."""
        names = [
            ("backbones.lm.experts.main.layers.", "blocks."),
            ("backbones.lm.experts.main.final_norm.", "norm."),
            ("mlp.", ""),
            ("ports.text.connector.", "embedding."),
            ("ports.text.head.", "head."),
            ("ports.image.connector.layers.0.", "patch_in."),
            ("ports.image.head.", "patch_out."),
            ("ports.image.timestep.inner.", "time_in."),
            ("ports.image.timestep.outer.", "time_out."),
        ]
        weights = {}
        for name, value in model.state_dict().items():
            for ours, plain in names:
                name = name.replace(ours, plain)
            weights[name] = value
        self.load_state_dict(weights)

    def run(self, x: Tensor, mask: Tensor | None = None, caches: list[tuple[Tensor, Tensor]] | None = None, start: int = 0) -> Tensor:
        cos, sin = self.cos[start : start + x.shape[1]], self.sin[start : start + x.shape[1]]
        for place, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, caches[place] if caches else None, start)
        return self.norm(x)

    def text_loss(self, ids: Tensor) -> Tensor:
        logits = self.head(self.run(self.embedding(ids)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def mixed_loss(self, ids: Tensor, latents: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b, text + marker), the picture, then the end marker, which nothing predicts."""
        start, patches = ids.shape[1] - 1, latents.shape[1]
        level = t[:, None, None]
        noisy = (1 - level) * latents + level * noise
        angle = 1000.0 * t[:, None] * self.rate
        time = self.time_out(F.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], dim=1))))
        words = self.embedding(ids)
        x = torch.cat([words[:, :start], self.patch_in(noisy) + time[:, None], words[:, start:]], dim=1)
        place = torch.arange(x.shape[1])
        picture = (place >= start) & (place < start + patches)
        visible = (place[:, None] >= place) | (picture[:, None] & picture)
        mask = torch.zeros(len(ids), 1, *visible.shape).masked_fill(~visible, float("-inf"))
        hidden = self.run(x, mask)
        logits = self.head(hidden)  # for every row, pictures too
        text = F.cross_entropy(logits[:, : start - 2].flatten(0, 1), ids[:, 1 : start - 1].flatten())
        return text, F.mse_loss(self.patch_out(hidden[:, start : start + patches]), noise - latents)

    @torch.inference_mode()
    def write(self, ids: Tensor, count: int) -> Tensor:
        """Greedy continuation (b, count) of prompts (b, l)."""
        shape = (len(ids), self.heads, ids.shape[1] + count, self.head_dim)
        caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(self.depth)]
        written = []
        for start in range(ids.shape[1] - 1, ids.shape[1] - 1 + count):
            last = self.run(self.embedding(ids), None, caches, start + 1 - ids.shape[1])[:, -1]
            ids = self.head(last).argmax(dim=1, keepdim=True)
            written.append(ids)
        return torch.cat(written, dim=1)


def plain_training(network: Plain, texts: Tensor, pictures: Tensor | None) -> Iterator[Tensor]:
    """One step a turn; yields its loss. Texts (n, l) lie tokenized in memory, rows are drawn from them."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in itertools.count():
        chosen = torch.arange(step * ROWS, (step + 1) * ROWS) % len(texts)
        ids = texts[chosen]
        if pictures is None:
            loss = network.text_loss(ids)
        else:
            t, noise = torch.rand(ROWS), torch.randn(ROWS, GRID[0] * GRID[1], CHANNELS)
            text, image = network.mixed_loss(ids, pictures[chosen], t, noise)
            loss = text + image
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        assert np.isfinite(loss.item()) and np.isfinite(norm.item())
        yield loss.detach()


# mmgen's side


@dataclass
class World:
    """A recipe, a tokenizer, and shards whose captions fill a row exactly, alone or with a picture."""

    recipe: Recipe
    tokenizer: TextTokenizer
    folder: Path

    @property
    def planner(self) -> Planner:
        return Planner(self.recipe, {"bpe": self.tokenizer})


def make_world(size: str, folder: Path, count: int = 256) -> World:
    recipe_file = folder / "benchmark.toml"
    recipe_file.write_text(RECIPE.format(rows=ROWS, **SIZES[size]), encoding="utf-8")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(1500)]
    recipe = load_recipe(recipe_file)
    tokenizer = recipe.tokenizers["bpe"].train(" ".join(rng.choices(words, k=60)) for _ in range(300))
    assert tokenizer.vocab_size <= SIZES[size]["vocabulary"]
    noise = np.random.default_rng(0)
    for name, tokens in CAPTION.items():
        with ShardWriter(folder / name, split="train", provenance={}) as writer:
            for number in range(count):
                caption = exact_caption(tokenizer, words, tokens, rng)
                latents = noise.standard_normal((4, 2 * GRID[0], 2 * GRID[1]), dtype=np.float32)
                writer.write(Sample(f"{number:06d}", {"caption": caption, "image.latents": latents}))
    return World(recipe, tokenizer, folder)


def exact_caption(tokenizer: TextTokenizer, words: list[str], tokens: int, rng: random.Random) -> str:
    """Random words that make exactly so many tokens."""
    caption = rng.choice(words)
    while (missing := tokens - len(tokenizer.encode(caption))) > 0:
        word = rng.choice(words)
        caption += f" {word if missing > 8 else word[0]}"
    return caption if not missing else exact_caption(tokenizer, words, tokens, rng)


class Prepared:
    """Batches that were packed before, in turn."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.position = batches, 0

    def next_batch(self) -> Batch:
        self.position += 1
        return self.batches[self.position % len(self.batches)]


def our_training(world: World, kind: str, model: Model, run: Run, *, from_shards: bool) -> Iterator[object]:
    """mmgen's own loop, one step a turn."""
    phase = next(phase for phase in world.recipe.phases if phase.name == kind)
    stream: Stream | Prepared = Stream(open_shards(str(world.folder / kind)), world.planner, phase, seed=0)
    if not from_shards:
        stream = Prepared([stream.next_batch() for _ in range(16)])
    learning = set_trainable(model, phase.trainable, phase.frozen)
    step = training_step(model, phase, torch.device("cpu"), torch.float32)
    return fit(step, Trainee(model, {"main": learning}), stream, phase, run, RunOptions(quiet=True), Ledger())


def our_writing(world: World, model: Model, prompts: Tensor, count: int) -> Tensor:
    """The same continuation by mmgen's session: no stop token, so that every row is written to its end."""
    sampler = AutoregressiveConfig(temperature=0.0, max_tokens=count)
    contexts = [[Segment(port="text", payload=row, grid=(len(row),))] for row in prompts]
    asked = [Prompt(str(place), "text", [context]) for place, context in enumerate(contexts)]
    with torch.inference_mode():
        session = Session(model, world.planner, asked, sampler.guide(set()), count, seed=0)
        ids, _ = session.write_text(SegmentSpec(port="text", text="{caption}", role=Role.TARGET), sampler, stop=[])
    return torch.tensor(ids)


def llama(world: World, model: Model) -> Callable[[Tensor, int, str], Tensor]:
    """transformers' Llama with the same weights; called with prompts, a count of tokens and the kind of cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = world.recipe.backbones["lm"]
    config = LlamaConfig(
        vocab_size=world.recipe.tokenizers["bpe"].vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    network = LlamaForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": model.state_dict()["ports.text.connector.weight"]}
    weights["lm_head.weight"] = model.state_dict()["ports.text.head.weight"]
    for name, value in model.backbones["lm"].experts["main"].state_dict().items():
        if name == "final_norm.weight":
            weights["model.norm.weight"] = value
            continue
        layer = f"model.layers.{name.split('.')[1]}."
        if "norm" in name:
            weights[layer + ("input_layernorm" if "attention" in name else "post_attention_layernorm") + ".weight"] = value
        elif "qkv" in name:
            weights |= {f"{layer}self_attn.{part}_proj.weight": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        elif "gate_up" in name:
            weights |= {f"{layer}mlp.{part}_proj.weight": piece for part, piece in zip(("gate", "up"), value.chunk(2), strict=True)}
        else:
            weights[layer + ("self_attn.o_proj" if "out" in name else "mlp.down_proj") + ".weight"] = value
    network.load_state_dict(weights)

    def write(prompts: Tensor, count: int, cache: str) -> Tensor:
        with torch.inference_mode():
            asked = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": count, "cache_implementation": cache}
            return network.generate(prompts, do_sample=False, **asked)[:, prompts.shape[1] :]

    return write


# measuring


@dataclass
class Turns:
    """Wall-clock and processor seconds of each side, turn by turn."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> Turns:
    """Every side once a round, the order reversed every other round; the first round warms up and is not counted."""
    turns = Turns({name: [] for name in sides}, {name: [] for name in sides})
    for number in range(rounds + 1):
        for name in sides if number % 2 else reversed(sides):
            torch.use_deterministic_algorithms(name.startswith("mmgen"))  # mmgen's promise, not the others'
            wall, processor = time.perf_counter(), time.process_time()
            sides[name]()
            if number:
                turns.wall[name].append(time.perf_counter() - wall)
                turns.processor[name].append(time.process_time() - processor)
    return turns


def show(title: str, turns: Turns, tokens: int) -> None:
    print(f"{title}; load {os.getloadavg()[0]:.1f}")
    for name in turns.wall:
        line = f"  {name:<28}{tokens / statistics.median(turns.wall[name]):>9,.0f} tokens/s"
        if name.startswith("mmgen"):
            for peer in turns.wall:
                if not peer.startswith("mmgen"):
                    wall, processor = (
                        statistics.median(theirs / ours for theirs, ours in zip(table[peer], table[name], strict=True))
                        for table in (turns.wall, turns.processor)
                    )
                    line += f"   {wall:.2f} × {peer} (processor time {processor:.2f})"
        print(line)


def compare_training(world: World, size: str, kind: str, rounds: int) -> None:
    shards = open_shards(str(world.folder / kind))
    phase = next(phase for phase in world.recipe.phases if phase.name == kind)
    planner = world.planner
    listed = [planner.plan(sample, kind, random.Random(0)) for sample in shards]
    texts = torch.stack([torch.cat([s.payload for s in sequence.segments if s.port == "text"]) for sequence in listed])
    pictures = None
    if kind == "mixed":
        pictures = torch.stack([s.payload for sequence in listed for s in sequence.segments if s.port == "image"])
    model, second, network = build_model(world.recipe, 0), build_model(world.recipe, 0), Plain(**SIZES[size])
    network.take(model)
    check_losses(Stream(shards, planner, phase, seed=0).next_batch(), model, network, kind)
    out = Path(tempfile.mkdtemp(dir=world.folder))
    options = RunOptions(quiet=True)
    with (
        Run(out / "a", stage="train-unified", options=options, kind="checkpoint") as run,
        Run(out / "b", stage="train-unified", options=options, kind="checkpoint") as other,
    ):
        planned, packed = (
            our_training(world, kind, model, run, from_shards=True),
            our_training(world, kind, second, other, from_shards=False),
        )
        plain = plain_training(network, texts, pictures)
        sides = {"mmgen, from shards": planned, "mmgen, batches given": packed, "plain loop": plain}
        turns = take_turns({name: steps.__next__ for name, steps in sides.items()}, rounds)
        show(f"training step, {kind}, {count_parameters(network):,} parameters, {ROWS} × {LENGTH} tokens", turns, ROWS * LENGTH)


def check_losses(batch: Batch, model: Model, network: Plain, kind: str) -> None:
    """Both sides compute the same numbers on one batch."""
    found = model.losses(batch, Generator().manual_seed(5))
    assert batch.layout.shape == (ROWS, LENGTH), f"{batch.layout}"
    ids = batch.ports["text"].values.reshape(ROWS, -1)
    if kind == "text":
        expected = {"text": network.text_loss(ids)}
    else:
        shown = model.corrupt(batch, Generator().manual_seed(5)).ports["image"]  # the same noise levels and noise
        assert shown.goal is not None and shown.timestep is not None
        latents = batch.ports["image"].values
        noise, t = shown.goal + latents, shown.timestep.view(ROWS, -1)[:, 0]
        text, image = network.mixed_loss(ids, latents.view(ROWS, -1, CHANNELS), t, noise.view(ROWS, -1, CHANNELS))
        expected = {"text": text, "image": image}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].mean, value, atol=1e-4, rtol=1e-4)


def compare_sampling(world: World, size: str, b: int, tokens: int, rounds: int, *, peer: bool) -> None:
    model, network = prepare(build_model(world.recipe, 0).eval()), Plain(**SIZES[size]).eval()
    network.take(model)
    prompts = torch.randint(3, world.tokenizer.vocab_size, (b, PROMPT_TOKENS), generator=Generator().manual_seed(0))
    sides: dict[str, Callable[[], object]] = {
        "mmgen": lambda: our_writing(world, model, prompts, tokens),
        "plain loop": lambda: network.write(prompts, tokens),
    }
    if peer:
        write = llama(world, model)
        sides["generate, dynamic cache"] = lambda: write(prompts, tokens, "dynamic")
        sides["generate, static cache"] = lambda: write(prompts, tokens, "static")
    reference = network.write(prompts, tokens)
    for name, side in sides.items():
        assert torch.equal(side(), reference), f"{name} writes other tokens"  # type: ignore[arg-type]
    turns = take_turns(sides, rounds)
    show(f"cached sampling, {b} prompt{'s' if b > 1 else ''}, {tokens} tokens each", turns, b * tokens)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="1M")
    parser.add_argument("--only", choices=["train", "sample"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    folder = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
    try:
        world = make_world(arguments.size, folder)
        if arguments.only != "sample":
            for kind in ("text", "mixed"):
                compare_training(world, arguments.size, kind, arguments.rounds)
        if arguments.only != "train":
            for b in (1, 16):
                compare_sampling(world, arguments.size, b, arguments.tokens, arguments.rounds, peer=arguments.peer)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
