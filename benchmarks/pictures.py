"""Masked decoding of 256 codes and guided denoising of 256 tokens, behind a prompt whose keys and values are cached.

    python -m benchmarks.pictures [--size 1M|10M] [--rounds 7] [--threads 1]

*Masked*: a picture of 16 × 16 codes in 12 rounds, in 24, and beside it 12 bare passes of the network over the same tokens, which is what
12 rounds must cost at least. *Denoising*: 10 guided Euler steps on 16 × 16 latents; beside it the same number of passes over prompt and
picture together, as without a cache. The prompt has 128 tokens. Sides take turns; on a busy machine read the processor time.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.step import RECIPE, ROWS, SIZES, Turns, take_turns
from stages.decoding import Prompt, Session, prepare
from stages.model import Model, build_model
from stages.parts.samplers import EulerConfig, MaskedConfig, SamplerConfig
from stages.recipe import SegmentSpec, load_recipe
from stages.sequence.pack import Cursor, continue_rows
from stages.sequence.plan import Planner
from stages.sequence.segment import Batch, Role, Segment

GRID, PROMPT, ROUNDS, DENOISING = (16, 16), 128, 12, 10

CODES = """
[autoencoders.codes]
kind = "cnn"
downsample = 4
multipliers = [1, 1, 1]
latent_channels = 8
quantizer = { kind = "vq", codebook_size = 1024, codebook_dim = 8 }
[ports.codes]
content = "codes"
autoencoder = "codes"
mask = "full"
connector = { kind = "embedding" }
head = { kind = "linear" }
objective = { kind = "masked-token", mask_ratio = "cosine" }
[tasks.codes]
segments = [ { port = "text", text = "{caption}" }, { port = "codes", field = "image", role = "target" } ]
"""


def open_session(model: Model, planner: Planner, sampler: SamplerConfig, prompt: Tensor) -> Session:
    guide = sampler.guide({"text"})
    context = [Segment(port="text", payload=prompt, grid=(len(prompt),))]
    passes = [context, [Segment(port="text", payload=prompt[:1], grid=(1,))]][: len(guide.drops)]
    return Session(model, planner, [Prompt("a", "", passes)], guide, 2 * (GRID[0] * GRID[1] + 8), seed=0)


def bare(model: Model, name: str, b: int, prefix: int, passes: int) -> Callable[[], None]:
    """So many passes of embedding, network and head over b rows of prompt and picture, nothing cached."""
    length = GRID[0] * GRID[1]
    port = model.recipe.ports[name]
    payload = torch.zeros(length, dtype=torch.int64) if port.is_ids else torch.zeros(length, model.content_dim(port))
    given = [Segment(port="text", payload=torch.ones(prefix, dtype=torch.int64), grid=(prefix,))] if prefix else []
    segments = [*given, Segment(port=name, payload=payload, grid=GRID, mask=port.mask)]
    batch: Batch = continue_rows([segments] * b, [Cursor() for _ in range(b)])[0]

    def run() -> None:
        for _ in range(passes):
            hidden = model.hidden(batch)
            model.predict(name, hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.ports[name].rows))

    return run


def show(turns: Turns, against: dict[str, str]) -> None:
    for name, peer in against.items():
        wall, processor = (
            statistics.median(theirs / ours for theirs, ours in zip(table[peer], table[name], strict=True))
            for table in (turns.wall, turns.processor)
        )
        seconds = statistics.median(turns.processor[name])
        print(f"  {name:<28}{seconds:>8.3f} processor seconds   {wall:.2f} × {peer} (processor time {processor:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="1M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    folder = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
    try:
        (folder / "recipe.toml").write_text(RECIPE.format(rows=ROWS, **SIZES[arguments.size]) + CODES, encoding="utf-8")
        recipe = load_recipe(folder / "recipe.toml")
    finally:
        shutil.rmtree(folder)
    tokenizer = recipe.tokenizers["bpe"].train(["a picture of a red square"] * 4)
    model, planner = prepare(build_model(recipe, 0).eval()), Planner(recipe, {"bpe": tokenizer})
    prompt = torch.randint(3, 200, (PROMPT,), generator=Generator().manual_seed(0))

    def write(sampler: SamplerConfig, port: str) -> Callable[[], object]:
        session = open_session(model, planner, sampler, prompt)
        spec = SegmentSpec(port=port, field="image", role=Role.TARGET)
        cache, cursors, last = session.cache.length, session.cursors, session.last

        def run() -> Tensor:
            session.cache.length, session.cursors, session.last = cache, cursors, last
            return session.write_picture(spec, sampler, GRID, [True], commit=False)

        return run

    with torch.inference_mode():
        masked = {
            f"mmgen, {ROUNDS} rounds": write(MaskedConfig(num_steps=ROUNDS), "codes"),
            f"mmgen, {2 * ROUNDS} rounds": write(MaskedConfig(num_steps=2 * ROUNDS), "codes"),
            f"{ROUNDS} bare passes": bare(model, "codes", 1, 0, ROUNDS),
        }
        denoising = {
            f"mmgen, {DENOISING} guided steps": write(EulerConfig(num_steps=DENOISING, guidance_scale=3.0), "image"),
            f"{DENOISING} passes, no cache": bare(model, "image", 2, PROMPT, DENOISING),
        }
        print(f"{arguments.size}, {GRID[0]} × {GRID[1]} tokens behind {PROMPT}; load {os.getloadavg()[0]:.1f}")
        turns = take_turns(masked, arguments.rounds)
        first, second, plain = masked
        show(turns, {first: plain, second: first})
        turns = take_turns(denoising, arguments.rounds)
        first, plain = denoising
        show(turns, {first: plain})
        print(f"  {'a guided step':<28}{statistics.median(turns.processor[first]) / DENOISING:>8.4f} processor seconds")


if __name__ == "__main__":
    main()
