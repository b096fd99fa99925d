"""A tar damaged at every one of its blocks, in every way downloads and disks damage files: true samples come out, or an error with a place.

With an index every damage is an error, whatever bytes it hit. Without one there is nothing to hold a caption's letters against, so
flips are tried on headers; what moves blocks about is tried on all.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.data.index import META
from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
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


def two_removed(data: bytes, at: int) -> bytes:
    """Two blocks gone: the end of a member and the header of the next, so that what follows moves into its place."""
    return data[:at] + data[at + 2 * BLOCK :]


def three_doubled(data: bytes, at: int) -> bytes:
    return data[: at + 3 * BLOCK] + data[at:]


def begun_anew(data: bytes, at: int) -> bytes:
    """As a download that was cut and whose second attempt was appended."""
    return data[:at] + data


def a_byte_too_many(data: bytes, at: int) -> bytes:
    return data[:at] + b"x" + data[at:]


DAMAGES = [two_removed, three_doubled, begun_anew, a_byte_too_many, flipped, zeroed, doubled, removed, swapped, cut, moved_to_the_end]


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
    make_sample: Callable[[int], Sample],
    damage: Callable[[bytes, int], bytes],
    indexed: bool,
) -> None:
    def make_long(number: int) -> Sample:
        """Its last member is a text of several blocks: what is pushed out of place there leaves no member missing."""
        sample = make_sample(number)
        return replace(sample, fields={**sample.fields, "text": f"sample {number} " * (60 + 9 * number)})

    folder = tmp_path / "set"
    with ShardWriter(folder) as writer:
        for number in range(6):
            writer.write(make_long(number))
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
        if not indexed and damage is flipped and not is_header(whole, at):
            continue
        tar.write_bytes(broken)
        tried += 1
        try:
            samples = list(open_shards(str(folder), max_bad_fraction=1.0))
        except DataError as error:
            messages.append(error.message)
            continue
        for sample in samples:
            assert same(sample, make_long(int(sample.key))), f"{damage.__name__} at byte {at}: sample {sample.key} is not what was written"
        survivors += len(samples)
    assert tried >= 20
    assert all(str(folder) in message for message in messages)
    if indexed:
        assert len(messages) == tried
        assert all(re.search(r"bytes?|sha256|sample", message) for message in messages)
    else:
        assert survivors > 0
