"""Writing and reading shards against webdataset: 64 px JPEG and a caption, one process, no workers, one thread.

    python -m benchmarks.shards [--samples 2000] [--rounds 5]

Both sides write the same encoded bytes, and read them back decoded to a uint8 (64, 64, 3) array and a string. Rounds are interleaved;
the ratio is the median over rounds. mmgen additionally checksums, syncs to the disk and checks what it reads; webdataset does not.
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

import numpy as np
import torch
import webdataset
from PIL import Image

from stages.data.sample import Encoded, Sample
from stages.data.shards import ShardWriter, open_shards


def make_samples(count: int) -> list[tuple[str, bytes, str]]:
    """(key, JPEG, caption): smooth colour noise, about 2 kB a picture."""
    generator = np.random.default_rng(0)
    samples = []
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        samples.append((f"{number:08d}", buffer.getvalue(), f"a picture of colour noise, number {number} of {count}"))
    return samples


def write_mmgen(samples: list[tuple[str, bytes, str]], out: Path) -> None:
    with ShardWriter(out) as writer:
        for key, jpeg, caption in samples:
            writer.write(Sample(key, {"image": Encoded("jpg", jpeg), "caption": caption}))


def write_webdataset(samples: list[tuple[str, bytes, str]], out: Path) -> None:
    out.mkdir()
    with webdataset.ShardWriter(str(out / "data-%06d.tar"), maxcount=1000, verbose=0) as writer:
        for key, jpeg, caption in samples:
            writer.write({"__key__": key, "image.jpg": jpeg, "caption.txt": caption})


def read_mmgen(folder: Path) -> int:
    return sum(sample.fields["image"].shape[0] + len(sample.fields["caption"]) for sample in open_shards(str(folder)))


def read_webdataset(folder: Path) -> int:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    return sum(sample["image.jpg"].shape[0] + len(sample["caption.txt"]) for sample in dataset)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = make_samples(arguments.samples)
    root = Path(tempfile.mkdtemp(prefix="mmgen-benchmark-"))
    try:
        times: dict[str, list[float]] = {"write mmgen": [], "write webdataset": [], "read mmgen": [], "read webdataset": []}
        for round_number in range(arguments.rounds + 1):  # the first one warms up: imports, page cache
            ours, theirs = root / f"mmgen-{round_number}", root / f"webdataset-{round_number}"
            measured = {
                "write mmgen": seconds(partial(write_mmgen, samples, ours)),
                "write webdataset": seconds(partial(write_webdataset, samples, theirs)),
                "read mmgen": seconds(partial(read_mmgen, ours)),
                "read webdataset": seconds(partial(read_webdataset, ours)),
            }
            assert read_mmgen(ours) == read_webdataset(ours)
            if round_number:
                for name, value in measured.items():
                    times[name].append(value)
        for name, values in times.items():
            print(f"{name:<18}{arguments.samples / statistics.median(values):>10,.0f} samples/s")
        for action in ("write", "read"):
            pairs = zip(times[f"{action} webdataset"], times[f"{action} mmgen"], strict=True)
            print(f"{action}: mmgen is {statistics.median(theirs / ours for theirs, ours in pairs):.1f} times as fast as webdataset")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
