"""A training pass through experts against a dense network with as many active parameters.

    python -m benchmarks.experts [--width 256] [--depth 4] [--rounds 9] [--threads 1]

16 rows of 128 tokens, half of them pictures; forward and backward through the backbone alone. *Hard-routed*: two experts, text and
pictures, each with copies of everything. *Learned*: one of four networks as wide as the dense one, and two of eight half as wide. Every
token meets as many weights as in the dense network, so what is more than its time is the price of routing. *Every expert on every token*
is the dense network run once for each of two experts, which is what masking instead of grouping would cost.
Sides take turns; on a busy machine read the processor time.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from torch import Generator

from benchmarks.step import count_parameters, take_turns
from stages.parts.backbones import Load, balance
from stages.parts.backbones.moe import MoEConfig
from stages.parts.backbones.transformer import Transformer, TransformerConfig
from stages.sequence.pack import Cursor, continue_rows
from stages.sequence.segment import MaskKind, Segment

ROWS, TEXT, PICTURE = 16, 64, 64


def passes(network: Transformer, expert: int, times: int = 1) -> Callable[[], None]:
    """Forward and backward over the batch, its pictures through `expert`."""
    words = Segment(port="text", payload=torch.zeros(TEXT, dtype=torch.int64), grid=(TEXT,))
    picture = Segment(port="image", payload=torch.zeros(PICTURE, 4), grid=(8, 8), mask=MaskKind.FULL, expert=expert)
    layout = continue_rows([[words, picture]] * ROWS, [Cursor() for _ in range(ROWS)])[0].layout
    x = torch.randn(ROWS, TEXT + PICTURE, network.config.width, generator=Generator().manual_seed(0))

    def run() -> None:
        for _ in range(times):
            loads: list[Load] = []
            loss = network(x, layout, None, loads).square().mean()
            if loads:
                loss = loss + 0.01 * balance(loads)[0]
            network.zero_grad(set_to_none=True)
            loss.backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    sizes = TransformerConfig(width=arguments.width, depth=arguments.depth, heads=arguments.width // 64, mlp_ratio=3.0)
    configs = {
        "dense": sizes,
        "mmgen, two hard-routed": sizes.model_copy(update={"experts": ("text", "picture")}),
        "mmgen, one of four learned": sizes.model_copy(update={"mlp": MoEConfig(experts=4, top_k=1)}),
        "mmgen, two of eight learned": sizes.model_copy(update={"mlp": MoEConfig(experts=8, top_k=2), "mlp_ratio": 1.5}),
    }
    networks = {name: config.build() for name, config in configs.items()}
    for network in networks.values():
        network.init_weights(Generator().manual_seed(0))
    sides = {name: passes(network, int("hard" in name)) for name, network in networks.items()}
    sides["every expert on every token"] = passes(networks["dense"], 0, times=2)
    turns = take_turns(sides, arguments.rounds)
    print(f"forward and backward, width {arguments.width}, depth {arguments.depth}; load {os.getloadavg()[0]:.1f}")
    for name in sides:
        wall, processor = (
            statistics.median(ours / dense for ours, dense in zip(table[name], table["dense"], strict=True))
            for table in (turns.wall, turns.processor)
        )
        count = count_parameters(networks.get(name, networks["dense"]))
        print(f"  {name:<30}{count:>12,} parameters   {wall:.2f} × the time of dense (processor time {processor:.2f})")


if __name__ == "__main__":
    main()
