"""Samples with known contents, no two shapes alike, and the means to write them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stages.data.sample import Sample
from stages.data.shards import ShardWriter


@pytest.fixture
def make_sample() -> Callable[[int], Sample]:
    """Sample number n, whose every field spells n."""

    def make(number: int) -> Sample:
        return Sample(
            f"{number:06d}",
            {
                "image": np.full((5, 7, 3), number % 256, np.uint8),
                "caption": f"this is sample {number}",
                "meta": {"number": number},
                "image.codes": np.full((2, 3), number, np.int64),
            },
        )

    return make


@pytest.fixture
def write_set(make_sample: Callable[[int], Sample]) -> Callable[..., Path]:
    """Write samples 0 .. count-1 to a folder."""

    def write(folder: Path, count: int = 25, **options: object) -> Path:
        with ShardWriter(folder, **{"samples_per_shard": 10, **options}) as writer:  # type: ignore[arg-type]
            for number in range(count):
                writer.write(make_sample(number))
        return folder

    return write
