"""`tokenize` against the forward pass of its own encoder on the same pictures, in one process.

    python -m benchmarks.tokenize [--threads 1] [--rounds 5] [--samples 2048] [--case vqgan/small/64 ...]

A case is RECIPE/SIZE/PIXELS. The pictures are JPEG in shards with a caption each. "tokenize" is the whole stage, from opening the shards to
the index of the new ones; "encoder" is `encode_codes` (or `encode`) alone on the same batches, decoded beforehand. Rounds are interleaved; the
ratio is the median over rounds. Weights are fresh ones: speed does not depend on them. The last column is the encoder's share of what the
main thread computes: what the ratio tends to when the reading thread finds a core to itself, also told by a machine that is busy. It means
something with one thread of torch only.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stages.data.sample import Encoded, Sample
from stages.data.shards import ShardWriter, open_shards
from stages.options import RunOptions
from stages.recipe import load_recipe
from stages.tokenize_shards import Loaded, encode, load_tokenizer_folder, plan_outputs, read_groups, tokenize_shards
from stages.training.checkpoint import save_checkpoint

CASES = ["vqgan/tiny/32", "vqgan/small/32", "vqgan/small/64", "kl-autoencoder/small/64", "vqgan/small/128"]


def write_pictures(folder: Path, count: int, pixels: int) -> None:
    """JPEG of smooth colour noise and a caption."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((pixels, pixels), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            fields = {"image": Encoded("jpg", buffer.getvalue()), "caption": f"colour noise, number {number}"}
            writer.write(Sample(f"{number:08d}", fields))


def write_tokenizer(folder: Path, recipe_name: str, size: str) -> Loaded:
    """A checkpoint of an untrained tokenizer."""
    recipe = load_recipe(recipe_name, size=size)
    ((name, config),) = recipe.autoencoders.items()
    torch.manual_seed(0)
    weights = {f"autoencoders.{name}.{key}": value for key, value in config.build().state_dict().items()}
    save_checkpoint(folder, recipe, weights)
    return load_tokenizer_folder(folder, "cpu")


def compare(case: str, root: Path, samples: int, rounds: int) -> None:
    """Print pictures per second of both sides, and the ratio."""
    recipe, size, pixels = case.split("/")
    write_pictures(root / "data", samples, int(pixels))
    tokenizer = write_tokenizer(root / "tokenizer", recipe, size)
    shards = open_shards(str(root / "data"))
    plan = plan_outputs([tokenizer], shards)
    batches = [shown for group in read_groups(shards, plan, range(samples)) for shown in group.shown.values()]
    times: dict[str, list[float]] = {"encoder": [], "tokenize": []}
    work: dict[str, list[float]] = {"encoder": [], "tokenize": []}
    for number in range(rounds + 1):  # the first one warms up
        out = root / f"out-{number}"
        sides: dict[str, Callable[[], object]] = {
            "encoder": lambda: [encode(tokenizer, shown) for shown in batches],
            "tokenize": lambda out=out: tokenize_shards(str(root / "data"), [root / "tokenizer"], out, RunOptions(quiet=True)),
        }
        for name, side in sides.items():
            begun, worked = time.perf_counter(), time.thread_time()
            side()
            if number:
                times[name].append(time.perf_counter() - begun)
                work[name].append(time.thread_time() - worked)
    share = statistics.median(alone / whole for alone, whole in zip(work["encoder"], work["tokenize"], strict=True))
    ratio = statistics.median(alone / whole for alone, whole in zip(times["encoder"], times["tokenize"], strict=True))
    speeds = {name: samples / statistics.median(values) for name, values in times.items()}
    print(
        f"{case:<28}encoder {speeds['encoder']:>8,.0f} /s   tokenize {speeds['tokenize']:>8,.0f} /s   {ratio:.0%}   share {share:.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--case", nargs="+", default=CASES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for case in arguments.case:
        root = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
        try:
            compare(case, root, arguments.samples, arguments.rounds)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
