"""Writing and reading shards against webdataset, in one process, with no workers and one thread.

    python -m benchmarks.shards [--samples 2000] [--rounds 5]

Two kinds of shards: 64 px JPEG with a caption, and codes (8, 8) with token ids (24,). Both sides write the same values and read them back
decoded. "first pass" opens the shards and reads them once; "next passes" reads again what is open, as every epoch but the first does
(webdataset walks the tars anew). Rounds are interleaved; a ratio is the median over rounds. mmgen additionally checksums, syncs to the
disk and checks what it reads; webdataset does not.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from stages.data.sample import Encoded, Sample
from stages.data.shards import Shards, ShardWriter, open_shards

Samples = list[tuple[str, dict[str, Any]]]


def pictures(count: int) -> Samples:
    """A JPEG of smooth colour noise, about 2 kB, and a caption."""
    generator = np.random.default_rng(0)
    samples: Samples = []
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        caption = f"a picture of colour noise, number {number} of {count}"
        samples.append((f"{number:08d}", {"image": buffer.getvalue(), "caption": caption}))
    return samples


def codes(count: int) -> Samples:
    """The codes of a picture and the token ids of a caption."""
    generator = np.random.default_rng(0)
    shapes = {"image.codes": (8, 8), "caption.ids": (24,)}
    return [
        (f"{number:08d}", {name: generator.integers(0, 512, shape, dtype=np.int32) for name, shape in shapes.items()})
        for number in range(count)
    ]


SUFFIXES = {"image": "image.jpg", "caption": "caption.txt", "image.codes": "image.codes.npy", "caption.ids": "caption.ids.npy"}


def write_mmgen(samples: Samples, out: Path) -> None:
    with ShardWriter(out) as writer:
        for key, fields in samples:
            writer.write(Sample(key, {name: Encoded("jpg", value) if name == "image" else value for name, value in fields.items()}))


def write_webdataset(samples: Samples, out: Path) -> None:
    out.mkdir()
    with webdataset.ShardWriter(str(out / "data-%06d.tar"), maxcount=1000, verbose=0) as writer:
        for key, fields in samples:
            writer.write({"__key__": key} | {SUFFIXES[name]: value for name, value in fields.items()})


def read_mmgen(shards: Shards) -> int:
    return sum(len(value) for sample in shards for value in sample.fields.values())


def read_webdataset(folder: Path) -> int:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    return sum(len(value) for sample in dataset for name, value in sample.items() if not name.startswith("__"))


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(samples: Samples, root: Path, rounds: int) -> None:
    """Print samples per second of both sides, and the ratios."""
    times: dict[str, list[float]] = {}
    for round_number in range(rounds + 1):  # the first one warms up: imports, page cache
        ours, theirs = root / f"mmgen-{round_number}", root / f"webdataset-{round_number}"
        measured = {"mmgen, write": seconds(partial(write_mmgen, samples, ours))}
        measured["webdataset, write"] = seconds(partial(write_webdataset, samples, theirs))
        measured["webdataset, read"] = seconds(partial(read_webdataset, ours))
        start = time.perf_counter()
        shards = open_shards(str(ours))
        read_mmgen(shards)
        measured["mmgen, read, first pass"] = time.perf_counter() - start
        measured["mmgen, read, next passes"] = seconds(partial(read_mmgen, shards))
        assert read_mmgen(shards) == read_webdataset(ours)
        if round_number:
            for name, value in measured.items():
                times.setdefault(name, []).append(value)
    for name, values in times.items():
        line = f"  {name:<28}{len(samples) / statistics.median(values):>10,.0f} samples/s"
        if name.startswith("mmgen"):
            peer = times[f"webdataset, {name.split(', ')[1]}"]
            line += f"   {statistics.median(b / a for a, b in zip(values, peer, strict=True)):.1f} times webdataset"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for title, make in {"64 px JPEG and a caption": pictures, "codes and token ids": codes}.items():
        root = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
        print(title)
        try:
            compare(make(arguments.samples), root, arguments.rounds)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
