"""A tar damaged at every one of its blocks, in every way downloads and disks damage files: true samples come out, or an error with a place.

With an index every damage is an error, whatever bytes it hit. Without one there is nothing to hold a caption's letters against, so
flips are tried on headers; what moves blocks about is tried on all.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stages.data.index import META
from stages.data.sample import Sample
from stages.data.shards import open_shards
from stages.errors import DataError

BLOCK = 512


def flipped(data: bytes, at: int) -> bytes:
    """One bit of the block, near its start, where a header has its name."""
    return data[: at + 3] + bytes([data[at + 3] ^ 0x10]) + data[at + 4 :]


def zeroed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(BLOCK) + data[at + BLOCK :]


def doubled(data: bytes, at: int) -> bytes:
    return data[: at + BLOCK] + data[at:]


def removed(data: bytes, at: int) -> bytes:
    return data[:at] + data[at + BLOCK :]


def swapped(data: bytes, at: int) -> bytes:
    """With the block that follows."""
    return data[:at] + data[at + BLOCK : at + 2 * BLOCK] + data[at : at + BLOCK] + data[at + 2 * BLOCK :]


def cut(data: bytes, at: int) -> bytes:
    return data[:at]


def moved_to_the_end(data: bytes, at: int) -> bytes:
    """As a download whose parts were joined in the wrong order."""
    return data[:at] + data[at + BLOCK :] + data[at : at + BLOCK]


DAMAGES = [flipped, zeroed, doubled, removed, swapped, cut, moved_to_the_end]


def is_header(data: bytes, at: int) -> bool:
    return data[at + 257 : at + 262] == b"ustar"


def same(one: Sample, other: Sample) -> bool:
    return one.fields.keys() == other.fields.keys() and all(
        np.array_equal(value, other.fields[name]) if isinstance(value, np.ndarray) else value == other.fields[name]
        for name, value in one.fields.items()
    )


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "foreign"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_at_any_block(
    tmp_path: Path,
    write_set: Callable[..., Path],
    make_sample: Callable[[int], Sample],
    damage: Callable[[bytes, int], bytes],
    indexed: bool,
) -> None:
    folder = write_set(tmp_path / "set", 6)
    tar = folder / "data-000000.tar"
    whole = tar.read_bytes()
    if not indexed:
        shutil.rmtree(folder / META)
    tried = survivors = 0
    messages: list[str] = []
    for at in range(0, len(whole), BLOCK):
        broken = damage(whole, at)
        if broken == whole:
            continue  # zeroes that were zero, equal blocks swapped
        if not indexed and damage in (flipped, zeroed) and not is_header(whole, at):
            continue
        tar.write_bytes(broken)
        tried += 1
        try:
            samples = list(open_shards(str(folder), max_bad_fraction=1.0))
        except DataError as error:
            messages.append(error.message)
            continue
        for sample in samples:
            assert same(sample, make_sample(int(sample.key))), (
                f"{damage.__name__} at byte {at}: sample {sample.key} is not what was written"
            )
        survivors += len(samples)
    assert tried >= 20
    assert all(str(folder) in message for message in messages)
    if indexed:
        assert len(messages) == tried
        assert all(re.search(r"bytes?|sha256|sample", message) for message in messages)
    else:
        assert survivors > 0
