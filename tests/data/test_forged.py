"""Indexes and tars that lie about themselves: the answer is the data, or an error of the data; never memory, a hang or a fault of ours."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stages.data import shards as shards_module
from stages.data.index import INDEX, META
from stages.data.sample import MAX_ARRAY_BYTES, MAX_BYTES, Encoded, Sample
from stages.data.shards import ShardWriter, open_shards, stream_shards
from stages.data.tar_format import END_OF_ARCHIVE, Archive, member_bytes, member_header, walk
from stages.errors import DataError, MmgenError, UsageError
from stages.inspect_path import describe
from stages.verify import verify

MIB = 1024 * 1024
PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged") / "set"
    with ShardWriter(folder, samples_per_shard=2, codebook_sizes={"image.codes": 512}) as writer:
        for number in range(3):
            fields = {"caption": f"sample {number}", "image.codes": np.full((2, 3), number, np.int32)}
            writer.write(Sample(f"{number:03d}", fields))
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / META / INDEX).read_text())


def write_index(folder: Path, index: object) -> None:
    (folder / META / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))


@contextlib.contextmanager
def forged(folder: Path, index: object) -> Iterator[Path]:
    """The set with another index, as old as the true one."""
    path = folder / META / INDEX
    before, status = path.read_bytes(), path.stat()
    write_index(folder, index)
    try:
        yield folder
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def use(folder: Path) -> list[str]:
    """All that is done with shards; what they were refused for, one message each."""
    refused = []
    for action in (lambda: list(open_shards(str(folder))), lambda: describe(str(folder)), lambda: stream_shards(folder, io.BytesIO())):
        try:
            action()
        except (DataError, UsageError) as error:
            refused.append(error.message)
    return refused


# --- indexes ----------------------------------------------------------------------------------------------------------------------

HUGE = "a number of 5,000 digits"  # as a text, because Python refuses to print such a number
names = st.sampled_from(["../data-000000.tar", "data-000000.tar", "../../x.tar", "/etc/passwd.tar", "../a/../b.tar", "../\0.tar", "", ".."])
numbers = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**62, 2**63, 10**9, 10**30, HUGE, -1, 1.5, 1e300]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), names), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
PLACES: list[tuple[Any, ...]] = [
    *[("shardlist", 0, key) for key in ("url", "nsamples", "bytes", "sha256", "first_key", "last_key")],
    *[("fields", "image.codes", key) for key in ("suffix", "dtype", "shape", "tokenizer", "codebook_size")],
    *[(key,) for key in ("wids_version", "name", "split", "shardlist", "fields", "tokenizers", "provenance", "unknown")],
    ("fields", "image.codes"),
    ("fields", "never"),
    ("provenance", "x"),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), st.one_of(anything, st.lists(st.one_of(numbers, names), max_size=3)))
@example(("shardlist", 0, "nsamples"), HUGE)
@example(("provenance", "x"), HUGE)
@example(("provenance", "x"), "\ud800")
@example(("unknown",), HUGE)
@example(("tokenizers",), ["a/../b"])
@example(("tokenizers",), ["/etc"])
@example(("fields", "image.codes", "shape"), [10**30])
@example(("fields", "image.codes", "dtype"), "nonsense")
def test_a_forged_index_is_refused_or_does_no_harm_and_verify_says_so(written, place, value):
    index = index_of(written)
    *way, last = place
    inner = index
    for step in way:
        inner = inner[step]
    true = inner[last] if isinstance(inner, list) or last in inner else None
    inner[last] = value
    with forged(written, json.dumps(index).replace(f'"{HUGE}"', "9" * 5000)):
        refused = use(written)
        findings = verify(str(written)).findings
    assert not refused or findings, refused
    told = place[0] in ("shardlist", "fields", "tokenizers") and last not in ("tokenizer", "unknown")
    if told and value != true and not (last == "codebook_size" and isinstance(value, int | None)) and last != "sha256":
        assert findings, f"{place} = {value!r} is not what the tars hold"


@pytest.mark.parametrize("value", [10**9, 2**62, 10**30, -1, 0, 1, 3])
@pytest.mark.parametrize("key", ["nsamples", "bytes"])
def test_verify_finds_numbers_that_the_tars_do_not_hold(written, key, value):
    index = index_of(written)
    index["shardlist"][0][key] = value
    with forged(written, index):
        assert not verify(str(written)).ok
        assert use(written) or value == 0  # where the index says that there is none, none is looked for


@pytest.mark.parametrize(
    "change",
    [
        {"shardlist": {"first_key": "other"}},
        {"shardlist": {"last_key": "000"}},
        {"fields": {"suffix": "txt"}},
        {"fields": {"dtype": "int64"}},
        {"fields": {"dtype": None}},
        {"fields": {"shape": [3, 2]}},
        {"fields": {"shape": None}},
        {"fields": {"codebook_size": 2**40}},
        {"fields": {"codebook_size": 2}},
        {"tokenizers": ["vq-01234567"]},
    ],
    ids=str,
)
def test_verify_finds_an_index_that_says_what_is_not_so(written, change):
    index = index_of(written)
    index["shardlist"][0] |= change.get("shardlist", {})
    index["fields"]["image.codes"] |= change.get("fields", {})
    index["tokenizers"] = change.get("tokenizers", [])
    with forged(written, index):
        assert not verify(str(written)).ok
    assert verify(str(written)).ok


@pytest.mark.parametrize("change", ["absent", "more"])
def test_verify_finds_fields_that_only_the_index_or_only_the_tars_have(written, change):
    index = index_of(written)
    if change == "more":
        index["fields"]["depth"] = index["fields"]["caption"]
    else:
        del index["fields"]["caption"]
    with forged(written, index):
        assert not verify(str(written)).ok


def test_verify_finds_another_tokenizer_under_the_name_of_the_one_that_wrote_the_codes(tmp_path):
    from worlds import text_tokenizer

    text_tokenizer().save(tmp_path / "words")
    text_tokenizer(("<other>",)).save(tmp_path / "others")
    mark, other = text_tokenizer().fingerprint, text_tokenizer(("<other>",)).fingerprint
    assert mark != other
    for name, source in (("good", "words"), ("bad", "others")):
        with ShardWriter(
            tmp_path / name, tokenizers={f"bpe-{mark[:8]}": tmp_path / source}, field_tokenizers={"caption.ids": mark}
        ) as writer:
            writer.write(Sample("a", {"caption.ids": np.arange(2)}))
    assert verify(str(tmp_path / "good")).ok
    assert [finding.kind for finding in verify(str(tmp_path / "bad")).findings] == ["tokenizer"]


def test_a_new_index_lists_no_tokenizer_that_is_not_there(tmp_path, written):
    shutil.copytree(written, tmp_path / "set")
    write_index(tmp_path / "set", {**index_of(written), "tokenizers": ["vq-01234567"]})
    assert verify(str(tmp_path / "set"), index=True).ok
    assert index_of(tmp_path / "set")["tokenizers"] == []


# --- tars -------------------------------------------------------------------------------------------------------------------------


def with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


def member_with(size: bytes, kind: bytes = b"0", name: bytes = b"a.txt", data: bytes = b"") -> bytes:
    header = member_header(name.decode(), 0)
    header = header[:124] + size.ljust(12, b"\0")[:12] + header[136:156] + kind + header[157:]
    return with_checksum(header) + data + bytes(-len(data) % 512)


def pax(records: bytes) -> bytes:
    return member_with(b"%011o" % len(records), b"x", b"x", records)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d %s=%s\n" % (length, key, value)) != length:
        length = len(b"%d %s=%s\n" % (length, key, value))
    return b"%d %s=%s\n" % (length, key, value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=12),
        st.integers(0, 2**95).map(lambda number: b"\x80" + number.to_bytes(12, "big")[1:]),
        st.sampled_from([b"-7", b"+7", b"0o7", b"1_0", b" 7", b"7 ", b"8", b"\xff" * 12, b"77777777777", b"00000000001\0"]),
    ),
    st.one_of(st.none(), st.binary(max_size=30), st.integers(-5, 2**70).map(lambda number: b"%d" % number), st.just(b"9" * 5000)),
    st.sampled_from([b"0", b"\0", b"7", b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"V"]),
)
@example(b"0", b"1" * 5000, b"0")
@example(b"0", b"", b"0")
@example(b"\xff" * 12, None, b"L")
def test_whatever_a_header_says_of_its_size_the_walk_ends(tmp_path, size, in_pax, kind):
    data = member_bytes("0.txt", b"before") + (pax(record(b"size", in_pax)) if in_pax is not None else b"") + member_with(size, kind)
    data += member_bytes("1.txt", b"after") + END_OF_ARCHIVE
    tar = tmp_path / "a.tar"
    tar.write_bytes(data)
    walked = walk(data)
    assert all(0 <= member.start <= member.start + member.size <= len(data) for member in walked.members)
    assert walk(Archive(tar)) == walked
    with contextlib.suppress(MmgenError):
        list(open_shards(str(tar), max_bad_fraction=1.0))
    verify(str(tar))


@pytest.mark.parametrize("size", [b"-7", b"+7", b"0o7", b"1_0"])
def test_a_size_that_python_would_take_for_a_number_is_none(size):
    """What other readers do not take for that number hides members from them, or shows others."""
    assert walk(member_with(size) + END_OF_ARCHIVE).damage is not None


def test_a_name_of_a_megabyte_is_no_name():
    long = b"x" * (MIB - 100) + b".txt"
    for header in (pax(record(b"path", long)), member_with(b"%011o" % len(long), b"L", b"x", long)):
        (rejected,) = walk(header + member_bytes("a.txt", b"x") + END_OF_ARCHIVE).rejected
        assert len(rejected[0]) <= 100
        assert "name of" in rejected[2]


def test_pax_headers_that_nobody_reads_are_not_kept():
    """Else a tar of nothing but them would be read into memory whole."""
    from stages.data.tar_format import _parse_pax

    assert _parse_pax(record(b"comment", b"x" * 1000) + record(b"path", b"a") + record(b"GNU.sparse.map", b"0,1")) == {
        "path": b"a",
        "GNU.sparse": b"",
    }


def sparse_tar(path: Path, name: str, size: int) -> Path:
    """A tar with a member of `size` zeroes that takes some kB on the disk."""
    with path.open("wb") as file:
        for number in range(200):
            file.write(member_bytes(f"{number:03d}.{name}", b"{}"))
        file.write(member_header(f"big.{name}", size))
        file.seek(size + -size % 512, os.SEEK_CUR)
        file.write(END_OF_ARCHIVE)
    return path


PROGRAM = """
import resource, sys
from stages.data.shards import open_shards
from stages.data.sample import decode_value
from stages.inspect_path import describe
from stages.verify import verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tar = sys.argv[1]
shards = open_shards(tar, on_bad_sample="quarantine", max_bad_fraction=1.0)
try:
    list(shards)
    describe(tar)
except Exception as error:
    print(type(error).__name__, error)
import pathlib
shards.write_bad_samples(pathlib.Path(sys.argv[2]))
print([finding.message for finding in verify(tar).findings if "cap" in finding.message])
print("MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_member_beyond_the_cap_of_its_kind_costs_no_memory(tmp_path):
    tar = sparse_tar(tmp_path / "a.tar", "txt", 256 * MIB)
    if tar.stat().st_blocks * 512 > 32 * MIB:
        pytest.skip("this file system keeps no sparse files")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tar), str(tmp_path / "meta")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr
    assert "the cap is 4,000,000" in done.stdout
    assert int(done.stdout.rpartition("MB ")[2]) < 64


@pytest.mark.parametrize("form", sorted(MAX_BYTES))
def test_every_kind_of_member_has_a_cap_that_its_header_is_held_against(tmp_path, form):
    tar = sparse_tar(tmp_path / "a.tar", form, MAX_BYTES[form] + 1)
    opened = open_shards(str(tar), max_bad_fraction=1.0)
    assert [bad.key for bad in opened.bad] == ["big"]
    assert "the cap" in opened.bad[0].reason
    assert len(opened) == 200


def test_what_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_BYTES, "npy", 20_000)
    monkeypatch.setitem(MAX_BYTES, "jpg", 100)
    with pytest.raises(DataError, match="the cap"), ShardWriter(tmp_path / "a") as writer:
        writer.write(Sample("a", {"x": np.zeros(20_000, np.uint8)}))
    with pytest.raises(DataError, match="the cap"), ShardWriter(tmp_path / "b") as writer:
        writer.write(Sample("a", {"image": Encoded("jpg", bytes(101))}))
    assert MAX_ARRAY_BYTES > 64 * MIB


# --- files that change ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_that_is_cut_while_it_is_open_is_an_error_and_not_a_bus_error(tmp_path, indexed):
    with ShardWriter(tmp_path) as writer:
        for number in range(50):
            writer.write(Sample(f"{number:03d}", {"x": np.zeros(5000, np.float32)}))
    if not indexed:
        shutil.rmtree(tmp_path / META)
    opened = open_shards(str(tmp_path))
    assert opened[0].key == "000"
    os.truncate(tmp_path / "data-000000.tar", 4096)
    with pytest.raises(DataError, match="was cut while it was read"):
        _ = opened[40]
    with pytest.raises(DataError, match="was cut while it was read"):
        opened.read_encoded(41)


def test_a_tar_that_is_cut_while_verify_reads_it_is_a_finding(tmp_path, monkeypatch):
    with ShardWriter(tmp_path) as writer:
        for number in range(50):
            writer.write(Sample(f"{number:03d}", {"x": np.zeros(5000, np.float32)}))
    import stages.verify as verify_module

    true = verify_module._read_tar

    def cut_after(archive: Archive) -> Any:
        found = true(archive)
        os.truncate(archive.path, 4096)
        return found

    monkeypatch.setattr(verify_module, "_read_tar", cut_after)
    assert "cut while" in " ".join(finding.message for finding in verify(str(tmp_path)).findings)


@pytest.mark.parametrize("window", [1, 64 * 1024])
def test_samples_are_the_same_whatever_is_read_at_once(written, monkeypatch, window):
    monkeypatch.setattr(shards_module, "_AT_ONCE", window)
    shards = open_shards(str(written))
    for i in (2, 0, 1, 0, 1, 2):
        assert shards[i].fields["caption"] == f"sample {i}"
        assert (shards.read(i, ["image.codes"]).fields["image.codes"] == i).all()


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), max_size=20))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_archive_gives_the_bytes_of_its_file_in_any_order(tmp_path, pieces):
    data = bytes(range(256)) * 20
    (tmp_path / "x").write_bytes(data)
    archive = Archive(tmp_path / "x")
    for start, size in pieces:
        assert archive[start : start + size] == data[start : start + size]
        if start + size <= len(data):
            assert archive.read(start, size) == data[start : start + size]


# --- many -------------------------------------------------------------------------------------------------------------------------


def many_tars(folder: Path, count: int) -> Path:
    """A set of `count` tars of one sample each, without the cost of syncing each to the disk."""
    import hashlib

    entries = []
    for number in range(count):
        data = member_bytes(f"{number:06d}.caption.txt", b"x") + END_OF_ARCHIVE
        (folder / f"d-{number:06d}.tar").write_bytes(data)
        key = f"{number:06d}"
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"url": f"../d-{key}.tar", "nsamples": 1, "bytes": len(data), "sha256": digest, "first_key": key, "last_key": key})
    (folder / META).mkdir()
    fields = {"caption": {"suffix": "txt", "dtype": "str", "shape": None}}
    write_index(folder, {"shardlist": entries, "fields": fields})
    return folder


def test_the_first_pass_over_many_tars_takes_time_in_proportion(tmp_path):
    def seconds(count: int) -> float:
        folder = tmp_path / str(count)
        folder.mkdir()
        shards = open_shards(str(many_tars(folder, count)))
        start = time.process_time()
        assert sum(1 for _ in shards) == count
        return time.process_time() - start

    few, many = seconds(500), seconds(4000)
    assert many < 3 * 8 * few, f"{few:.3f} s for 500 tars, {many:.3f} s for 4000"


def test_the_tables_of_a_large_tar_take_some_hundred_bytes_a_sample(tmp_path):
    tar = tmp_path / "a.tar"
    with tar.open("wb") as file:
        for number in range(4000):
            file.write(member_bytes(f"{number:06d}.caption.txt", b"x") + member_bytes(f"{number:06d}.label.txt", b"7"))
        file.write(END_OF_ARCHIVE)
    import tracemalloc

    tracemalloc.start()
    try:
        opened = open_shards(str(tar))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(opened) == 4000
    assert held / 4000 < 400
    assert peak / 4000 < 1600
