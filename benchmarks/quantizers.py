"""Quantizers against vector-quantize-pytorch, forward and backward in training, in one interleaved run.

    python -m benchmarks.quantizers [--latents 4096] [--codes 8192] [--widths 8 32 256] [--rounds 9] [--threads 1]

*Nearest code* is `vq` and `VectorQuantize`, both with an EMA codebook and the commitment loss, without revival; the third side is what
cannot be saved, the matrix product of all latents with all codes into a buffer that is there already. *Entropy* is `lfq` and `LFQ` with as
many codes. Both sides hold the same codebook and must find the same codes and the same losses, or the run fails.
Sides take turns; each ratio is the median over pairs of neighbours, of wall-clock and of processor time. The latter is the one to read
on a busy machine.
"""

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from vector_quantize_pytorch import LFQ, VectorQuantize

from benchmarks.step import Turns, take_turns
from stages.parts.quantizers import LFQConfig, VQConfig

OURS = "mmgen"  # take_turns demands deterministic algorithms of the sides called so


def show(title: str, turns: Turns) -> None:
    print(title)
    for name, seconds in turns.wall.items():
        line = f"  {name:<28}{1e3 * statistics.median(seconds):>9,.1f} ms"
        if name != OURS:
            wall, processor = (
                statistics.median(theirs / ours for theirs, ours in zip(table[name], table[OURS], strict=True))
                for table in (turns.wall, turns.processor)
            )
            line += f"   mmgen is {wall:.2f} × it (processor time {processor:.2f})"
        print(line)


def picture(n: int, width: int) -> Tensor:
    """(1, d, h, w) with n latents."""
    side = 2 ** (int(math.log2(n)) // 2)
    return torch.randn(1, width, side, n // side, generator=torch.Generator().manual_seed(0))


def compare_nearest_code(n: int, size: int, width: int, rounds: int) -> None:
    ours = VQConfig(codebook_size=size, codebook_dim=width, decay=0.8, revive=0, project=False).build(width)
    theirs = VectorQuantize(
        dim=width,
        codebook_size=size,
        decay=0.8,
        commitment_weight=0.25,
        threshold_ema_dead_code=0,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    codebook = torch.randn(size, width, generator=torch.Generator().manual_seed(1))
    ours.codebook.copy_(codebook)
    theirs._codebook.embed.copy_(codebook[None])
    latents = picture(n, width).requires_grad_()
    table, distances = codebook.t(), torch.empty(n, size)
    rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, width)

    def step() -> Tensor:
        result = ours.quantize(latents)
        (result.quantized.sum() + result.losses["commitment"]).backward()
        return result.codes

    def their_step() -> Tensor:
        quantized, codes, loss = theirs(latents)
        (quantized.sum() + loss.sum()).backward()
        return codes

    agreement = float((ours.eval().quantize(latents).codes == theirs.eval()(latents)[1]).float().mean())
    assert agreement > 0.9999, f"the same code for {agreement:.2%} of the latents only"  # theirs takes a root of each distance
    ours.train()
    theirs.train()
    sides: dict[str, Callable[[], object]] = {
        OURS: step,
        "vector-quantize-pytorch": their_step,
        "the matrix product alone": lambda: torch.mm(rows, table, out=distances),
    }
    show(f"nearest code, {n:,} latents of width {width}, {size:,} codes", take_turns(sides, rounds))


def compare_entropy(n: int, size: int, rounds: int) -> None:
    bits = int(math.log2(size))
    ours = LFQConfig(bits=bits, temperature=0.5, project=False).build(bits)
    theirs = LFQ(dim=bits, codebook_size=2**bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25)
    latents = picture(n, bits).requires_grad_()

    def step() -> Tensor:
        result = ours.quantize(latents)
        loss = result.losses["entropy"] + result.losses["commitment"]
        (result.quantized.sum() + loss).backward()
        return loss

    def their_step() -> Tensor:
        quantized, _, loss = theirs(latents, inv_temperature=2.0)
        (quantized.sum() + loss).backward()
        return loss

    torch.testing.assert_close(step(), their_step(), atol=1e-3, rtol=1e-3)
    sides: dict[str, Callable[[], object]] = {OURS: step, "vector-quantize-pytorch": their_step}
    show(f"lookup-free with its entropy, {n:,} latents, {bits} bits", take_turns(sides, rounds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    print(f"{arguments.threads} threads, {arguments.rounds} rounds, torch {torch.__version__}")
    for width in arguments.widths:
        compare_nearest_code(arguments.latents, arguments.codes, width, arguments.rounds)
    compare_entropy(arguments.latents, arguments.codes, arguments.rounds)


if __name__ == "__main__":
    main()
