"""A training step on text with pictures against transfusion-pytorch, at equal width and depth and at equal parameters.

    pip install --target PEER transfusion-pytorch       # a throw-away folder; it is no dependency of mmgen
    PYTHONPATH=PEER:. python -m benchmarks.mixed [--size 1M|10M] [--rounds 9] [--threads 1]

16 samples a step, each of 62 tokens of text and a picture of 64 latents of 16 channels. mmgen's side is its real loop, `fit`, from shards,
with planning and packing. The peer is given tensors that lie in memory, its own choice of processing, the same optimizer (fused AdamW) and
the same clipping. Its gates, normalised queries and keys, skips and layer-wise modulation stay as they are, as do the tokens it adds for
where a picture begins, what shape it has and where it ends: at equal width and depth it has more parameters, so mmgen also runs at the
width, in whole heads, that has nearly as many. Its extra losses are off, and neither side drops a condition.

Sides take turns; ratios are medians over pairs of neighbours. On a busy machine read the processor time.
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.step import CHANNELS, GRID, ROWS, SIZES, count_parameters, make_world, our_training, take_turns
from stages.data.shards import open_shards
from stages.model import build_model
from stages.options import RunOptions
from stages.run import Run


def peer_of(size: dict[str, int]) -> nn.Module:
    from transfusion_pytorch import Transfusion

    transformer = {"dim": size["width"], "depth": size["depth"], "heads": size["heads"], "dim_head": size["width"] // size["heads"]}
    network: nn.Module = Transfusion(
        num_text_tokens=size["vocabulary"],
        dim_latent=CHANNELS,
        modality_default_shape=GRID,
        transformer=transformer,
        prob_uncond=0.0,
        velocity_consistency_loss_weight=0.0,
    )
    return network


def peer_training(network: nn.Module, texts: list[Tensor], pictures: list[Tensor]) -> Iterator[float]:
    """One step a turn; yields its loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in itertools.count():
        chosen = [place % len(texts) for place in range(step * ROWS, (step + 1) * ROWS)]
        loss = network([[texts[place], (0, pictures[place])] for place in chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        assert torch.isfinite(norm)
        yield loss.item()


def widened(size: dict[str, int], parameters: int) -> dict[str, int]:
    """The size of the width, heads as wide, whose model comes closest to so many parameters."""
    head = size["width"] // size["heads"]

    def count(heads: int) -> int:
        d = head * heads
        return 2 * size["vocabulary"] * d + size["depth"] * (4 * d * d + 3 * d * round(d * 2.6875))

    heads = min(range(size["heads"], 4 * size["heads"]), key=lambda n: abs(count(n) - parameters))
    return {**size, "width": head * heads, "heads": heads}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="1M")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
    try:
        peer = peer_of(SIZES[arguments.size])
        SIZES["wide"] = widened(SIZES[arguments.size], count_parameters(peer))
        sides, counts = {}, {}
        with contextlib.ExitStack() as opened:
            for name, size in (("mmgen, equal width and depth", arguments.size), ("mmgen, equal parameters", "wide")):
                place = folder / size
                place.mkdir()
                world = make_world(size, place, count=64)
                model = build_model(world.recipe, 0)
                run = opened.enter_context(Run(place / "run", stage="train-unified", options=RunOptions(quiet=True), kind="checkpoint"))
                sides[name] = our_training(world, "mixed", model, run, from_shards=True).__next__
                counts[name] = count_parameters(model)
            listed = [world.planner.plan(sample, "mixed", random.Random(0)) for sample in open_shards(str(place / "mixed"))]
            texts = [torch.cat([s.payload for s in sequence.segments if s.port == "text"][:2]) for sequence in listed]
            pictures = [next(s.payload for s in sequence.segments if s.port == "image").reshape(*GRID, CHANNELS) for sequence in listed]
            texts = [text[text < SIZES[arguments.size]["vocabulary"]] for text in texts]
            sides["transfusion-pytorch"] = peer_training(peer, texts, pictures).__next__
            counts["transfusion-pytorch"] = count_parameters(peer)
            turns = take_turns(sides, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"mixed step, {ROWS} samples of {len(texts[0])} tokens of text and {GRID[0]} × {GRID[1]} latents; load {os.getloadavg()[0]:.1f}")
    for name in sides:
        line = (
            f"  {name:<30}{counts[name]:>12,} parameters {ROWS / statistics.median(turns.processor[name]):>8.1f} samples a processor second"
        )
        if name.startswith("mmgen"):
            ratios = [
                statistics.median(theirs / ours for theirs, ours in zip(table["transfusion-pytorch"], table[name], strict=True))
                for table in (turns.wall, turns.processor)
            ]
            line += f"   {ratios[0]:.2f} × transfusion-pytorch (processor time {ratios[1]:.2f})"
        print(line)


if __name__ == "__main__":
    main()
