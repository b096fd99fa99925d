import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.data import shards as shards_module
from stages.data.index import INDEX, META
from stages.data.sample import Encoded, Sample
from stages.data.shards import BadSampleError, ShardWriter, open_shards
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.errors import DataError, UsageError

keys = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="./\\"), min_size=1, max_size=20).filter(
    lambda key: key.isprintable() and not key.startswith("__")
)


def assert_equal_samples(one: Sample, other: Sample) -> None:
    assert one.key == other.key
    assert one.fields.keys() == other.fields.keys()
    for name, value in one.fields.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other.fields[name])
        else:
            assert value == other.fields[name]


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], *, end: bytes = END_OF_ARCHIVE) -> Path:
    pairs = members.items() if isinstance(members, dict) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(member_bytes(name, data) for name, data in pairs) + end)
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- round trips ------------------------------------------------------------------------------------------------------------------


def test_samples_come_back_in_order_and_at_random(tmp_path, write_set, make_sample):
    shards = open_shards(str(write_set(tmp_path / "set", 25)))
    assert len(shards) == 25
    for number, sample in enumerate(shards):
        assert_equal_samples(sample, make_sample(number))
    for number in (24, 0, 10, 9, 19, -1):
        assert_equal_samples(shards[number], make_sample(number % 25))
    with pytest.raises(IndexError):
        shards[25]
    assert shards.read(7, ["caption"]).fields == {"caption": "this is sample 7"}
    assert shards.find("000013") == 13
    assert shards.key(13) == "000013"


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        keys, st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(0, 3)), min_size=1, max_size=12
    ),
    st.integers(1, 5),
    st.sampled_from(["plain", "with space", "ordner-é", "日本"]),
)
def test_any_keys_texts_and_folders_come_back(rows, per_shard, folder_name):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / folder_name
        with ShardWriter(folder, samples_per_shard=per_shard) as writer:
            for key, (text, size) in rows.items():
                writer.write(Sample(key, {"caption": text, "x.latents": np.arange(size, dtype=np.float32)}))
        back = open_shards(str(folder))
        assert [sample.key for sample in back] == list(rows)
        for sample in back:
            text, size = rows[sample.key]
            assert sample.fields["caption"] == text
            np.testing.assert_array_equal(sample.fields["x.latents"], np.arange(size, dtype=np.float32))


def test_the_index_says_what_is_in_the_tars(tmp_path, write_set):
    folder = write_set(
        tmp_path,
        25,
        split="val",
        provenance={"from": "a test"},
        field_tokenizers={"image.codes": "f" * 64},
        codebook_sizes={"image.codes": 32},
    )
    index = json.loads((folder / META / INDEX).read_text())
    assert [entry["nsamples"] for entry in index["shardlist"]] == [10, 10, 5]
    assert index["shardlist"][1] | {"sha256": "", "bytes": 0} == {
        "url": "../data-000001.tar",
        "nsamples": 10,
        "bytes": 0,
        "sha256": "",
        "first_key": "000010",
        "last_key": "000019",
    }
    assert index["wids_version"] == 1
    assert index["split"] == "val"
    shards = open_shards(str(folder))
    assert shards.index == index
    assert shards.provenance == {"from": "a test"}
    assert shards.splits() == ["val"]
    assert shards.fields == {
        "caption": {"suffix": "txt", "dtype": "str", "shape": None, "tokenizer": None},
        "image": {"suffix": "png", "dtype": "uint8", "shape": [5, 7, 3], "tokenizer": None},
        "image.codes": {"suffix": "npy", "dtype": "int64", "shape": [2, 3], "tokenizer": "f" * 64, "codebook_size": 32},
        "meta": {"suffix": "json", "dtype": "json", "shape": None, "tokenizer": None},
    }


def test_an_axis_that_varies_is_null_in_the_field_table(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for number in range(3):
            writer.write(Sample(f"k{number}", {"caption.ids": np.arange(number + 2), "image": np.zeros((4, 6 + number, 3), np.uint8)}))
    fields = open_shards(str(tmp_path)).fields
    assert fields["caption.ids"]["shape"] == [None]
    assert fields["image"]["shape"] == [4, None, 3]


def test_encoded_fields_travel_unchanged(tmp_path, write_set):
    first = open_shards(str(write_set(tmp_path / "one", 12)))
    with ShardWriter(tmp_path / "two", samples_per_shard=10) as writer:
        for number in range(len(first)):
            writer.write(first.read_encoded(number))
    assert open_shards(str(tmp_path / "two")).fingerprint == first.fingerprint


def test_a_copy_in_another_process_opens_its_own_maps(tmp_path, write_set, make_sample):
    shards = open_shards(str(write_set(tmp_path, 12)))
    assert_equal_samples(shards[11], make_sample(11))
    assert_equal_samples(pickle.loads(pickle.dumps(shards))[11], make_sample(11))


def test_more_tars_than_maps_that_may_be_open(tmp_path, write_set, make_sample, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_ARCHIVES", 2)
    shards = open_shards(str(write_set(tmp_path, 20, samples_per_shard=3)))
    for number in (0, 5, 10, 15, 0, 19):
        assert_equal_samples(shards[number], make_sample(number))


# --- what others write and read ---------------------------------------------------------------------------------------------------


def test_tarfile_and_webdataset_and_wids_read_what_is_written(tmp_path, write_set, make_sample):
    folder = write_set(tmp_path / "a set", 12)
    with tarfile.open(folder / "data-000000.tar") as tar:
        assert tar.getnames()[:4] == ["000000.caption.txt", "000000.image.codes.npy", "000000.image.png", "000000.meta.json"]
        assert {(info.mode, info.mtime, info.uid, info.uname) for info in tar} == {(0o444, 0, 0, "")}
    found = list(webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False).decode("rgb8"))
    indexed = wids.ShardListDataset(str(folder / META / INDEX))
    assert len(found) == len(indexed) == 12
    for number, (streamed, random) in enumerate(zip(found, (indexed[number] for number in range(12)), strict=True)):
        expected = make_sample(number)
        assert streamed["__key__"] == random["__key__"] == expected.key
        assert streamed["caption.txt"] == expected.fields["caption"]
        assert streamed["meta.json"] == expected.fields["meta"]
        np.testing.assert_array_equal(streamed["image.png"], expected.fields["image"])
        np.testing.assert_array_equal(streamed["image.codes.npy"], expected.fields["image.codes"])
        np.testing.assert_array_equal(np.asarray(random[".image.png"]), expected.fields["image"])
        assert random[".caption.txt"] == expected.fields["caption"]


def test_datasets_loads_what_is_written(tmp_path, write_set, make_sample, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    folder = write_set(tmp_path / "set", 12)
    loaded = datasets.load_dataset("webdataset", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 12
    row = loaded[11]
    assert row["__key__"] == "000011"
    assert row["caption.txt"] == "this is sample 11"
    assert row["meta.json"] == {"number": 11}
    assert row["image.codes.npy"] == [[11, 11, 11], [11, 11, 11]]
    np.testing.assert_array_equal(np.asarray(row["image.png"]), make_sample(11).fields["image"])


def test_webdatasets_own_tars_are_read(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "their-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            pixels = np.full((6, 4, 3), 20 * number, np.uint8)
            writer.write(
                {"__key__": f"s{number}", "png": pixels, "txt": f"text {number}", "json": {"n": number}, "x.npy": np.arange(number)}
            )
    shards = open_shards(str(tmp_path))
    assert len(shards) == 10
    assert shards.fields.keys() == {"image", "caption", "meta", "x"}
    for number, sample in enumerate(shards):
        assert sample.key == f"s{number}"
        assert (sample.fields["image"] == 20 * number).all()
        assert sample.fields["image"].shape == (6, 4, 3)
        assert sample.fields["caption"] == f"text {number}"
        assert sample.fields["meta"] == {"n": number}
        np.testing.assert_array_equal(sample.fields["x"], np.arange(number))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_folders_with_directories_and_long_names_are_read(tmp_path, form):
    source = tmp_path / "files" / ("long" * 20) / "deep"
    source.mkdir(parents=True)
    for number in range(3):
        (source / f"{number}.txt").write_text(f"text {number}")
        (source / f"{number}.JPG").write_bytes(jpeg(40 * number))
        (source / f"._{number}.txt").write_text("left by a file manager")
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        tar.add(tmp_path / "files", arcname=".")  # in sorted order, folders included
    shards = open_shards(str(tmp_path / "x.tar"), on_bad_sample="fail")
    assert [sample.key for sample in shards] == [f"{'long' * 20}/deep/{number}" for number in range(3)]
    for number, sample in enumerate(shards):
        assert sample.fields["caption"] == f"text {number}"
        assert (sample.fields["image"] == 40 * number).all()


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5), (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


# --- nothing mixed, nothing lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_at_any_block_gives_true_samples_or_an_error(tmp_path, write_set, make_sample, indexed):
    folder = write_set(tmp_path / "set", 6)
    tar = folder / "data-000000.tar"
    whole = tar.read_bytes()
    if not indexed:
        shutil.rmtree(folder / META)
    outcomes: set[str] = set()
    for length in range(0, len(whole), 512):
        tar.write_bytes(whole[:length])
        try:
            samples = list(open_shards(str(folder), max_bad_fraction=1.0))
        except DataError:
            outcomes.add("error")
            continue
        outcomes.add("samples")
        for sample in samples:
            assert_equal_samples(sample, make_sample(int(sample.key)))
        with pytest.raises(DataError):
            open_shards(str(folder), on_bad_sample="fail")
    assert outcomes == ({"error"} if indexed else {"error", "samples"})


def test_members_that_are_not_side_by_side_are_not_joined(tmp_path):
    write_tar(
        tmp_path / "x.tar", [("a.txt", b"A"), ("b.jpg", jpeg(1)), ("b.txt", b"B"), ("a.jpg", jpeg(2)), ("c.jpg", jpeg(3)), ("c.txt", b"C")]
    )
    shards = open_shards(str(tmp_path), max_bad_fraction=1.0)
    assert [(sample.key, sample.fields["caption"]) for sample in shards] == [("b", "B"), ("c", "C")]
    assert [(bad.key, bad.offset) for bad in shards.bad] == [("a", 0), ("a", 1024 + 1536 + 1024)]
    assert "side by side" in shards.bad[1].reason


def test_a_sample_that_lacks_a_field_is_left_out(tmp_path):
    members = [
        (f"{n:03d}.{suffix}", data)
        for n in range(200)
        for suffix, data in (("jpg", jpeg(n)), ("txt", b"text"))
        if (n, suffix) != (7, "txt")
    ]
    write_tar(tmp_path / "x.tar", members)
    shards = open_shards(str(tmp_path))
    assert len(shards) == 199
    assert "007" not in [sample.key for sample in shards]
    assert shards.bad[0].reason == "has image; the other samples have caption, image"
    with pytest.raises(BadSampleError, match="007"):
        open_shards(str(tmp_path), on_bad_sample="fail")
    with pytest.raises(DataError, match="1 of 200 samples are bad"):
        open_shards(str(tmp_path), max_bad_fraction=0.001)


def test_a_field_twice_in_a_sample_is_left_out(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [("a.txt", b"1"), ("a.txt", b"2"), ("b.txt", b"3"), ("c.jpg", jpeg(0)), ("c.image.png", jpeg(1)), ("d.txt", b"4")],
    )
    shards = open_shards(str(tmp_path), max_bad_fraction=1.0)
    assert [sample.key for sample in shards] == ["b", "d"]
    assert "second member for field 'caption'" in shards.bad[0].reason


def test_a_picture_that_cannot_be_decoded_is_skipped_counted_and_kept(tmp_path):
    broken = jpeg(7)[:-40]
    write_tar(
        tmp_path / "in" / "x.tar",
        [(f"{n:03d}.{s}", d) for n in range(150) for s, d in (("jpg", broken if n == 7 else jpeg(n)), ("txt", b"t"))],
    )
    shards = open_shards(str(tmp_path / "in"), on_bad_sample="quarantine")
    for _ in range(2):  # a second pass finds the same one, and counts it once
        assert [sample.key for sample in shards] == [f"{n:03d}" for n in range(150) if n != 7]
    assert shards.write_bad_samples(tmp_path / "out") == "kept 149, skipped 1 (bad_samples.jsonl)"
    (line,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["key"] == "007"
    assert record["member"] == "007.jpg"
    assert "cannot be decoded" in record["reason"]
    tar_bytes = (tmp_path / "in" / "x.tar").read_bytes()
    assert tar_bytes[record["offset"] : record["offset"] + len(broken)] == broken
    with tarfile.open(tmp_path / "out" / "quarantine.tar") as tar:
        assert tar.getnames() == ["007.jpg", "007.txt"]
    with pytest.raises(BadSampleError, match=r"x\.tar: 007\.jpg at byte"):
        shards.read(7)
    with pytest.raises(BadSampleError):
        list(open_shards(str(tmp_path / "in"), on_bad_sample="fail"))


def test_a_tar_that_is_not_the_indexed_one_is_named(tmp_path, write_set, make_sample):
    folder = write_set(tmp_path, 25)
    tar = folder / "data-000001.tar"
    whole = tar.read_bytes()

    tar.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match=r"data-000001\.tar: not the tar its index describes: it has"):
        open_shards(str(folder))

    changed = whole.replace(b"this is sample 12", b"this is sample 99")
    assert len(changed) == len(whole)
    tar.write_bytes(changed)  # the same size, but younger than the index
    shards = open_shards(str(folder))
    assert_equal_samples(shards[0], make_sample(0))
    with pytest.raises(DataError, match=r"data-000001\.tar: .*sha256"):
        shards[12]

    tar.write_bytes(whole)  # younger than the index, as in a copied folder, but equal
    assert_equal_samples(open_shards(str(folder))[12], make_sample(12))

    shutil.copy(folder / "data-000000.tar", tar)
    os.utime(tar, (0, 0))
    entry = json.loads((folder / META / INDEX).read_text())
    entry["shardlist"][1]["bytes"] = tar.stat().st_size
    (folder / META / INDEX).write_text(json.dumps(entry))
    with pytest.raises(DataError, match=r"holds 10 good samples, 000000 to 000009; the index says 10 samples, 000010 to 000019"):
        open_shards(str(folder))[12]

    tar.unlink()
    with pytest.raises(DataError, match=r"data-000001\.tar: missing"):
        open_shards(str(folder))


def test_a_tar_the_index_does_not_list_is_an_error(tmp_path, write_set):
    folder = write_set(tmp_path, 12)
    write_tar(folder / "extra.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"extra\.tar: not in the folder's index"):
        open_shards(str(folder))


# --- hostile tars -----------------------------------------------------------------------------------------------------------------


def test_names_that_climb_out_and_links_are_bad_samples(tmp_path):
    link = tarfile.TarInfo("d.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    climbing = (
        b"".join(member_bytes(name, b"text") for name in ("a.txt", "../b.txt", "/c.txt")) + link.tobuf() + member_bytes("e.txt", b"text")
    )
    (tmp_path / "x.tar").write_bytes(climbing + END_OF_ARCHIVE)
    shards = open_shards(str(tmp_path), max_bad_fraction=1.0)
    assert [sample.key for sample in shards] == ["a", "e"]
    assert [bad.member for bad in shards.bad] == ["../b.txt", "/c.txt", "d.txt"]
    assert "symbolic link" in shards.bad[2].reason


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    kinds = ["pyd", "pickle", "pkl", "pth", "pt"]
    write_tar(tmp_path / "a" / "x.tar", {"0.txt": b"text", **{f"0.x.{kind}": pickle.dumps(Bomb()) for kind in kinds}})
    shards = open_shards(str(tmp_path / "a"))
    assert shards[0].fields == {"caption": "text"}
    assert shards.unread == dict.fromkeys(kinds, 1)
    write_tar(tmp_path / "b" / "x.tar", {f"{n}.pyd": pickle.dumps(Bomb()) for n in range(3)})
    with pytest.raises(DataError, match="has no field mmgen reads"):
        open_shards(str(tmp_path / "b"))
    assert not (tmp_path / "exploded").exists()


# --- the writer -------------------------------------------------------------------------------------------------------------------


def test_the_same_samples_give_the_same_bytes(tmp_path, write_set):
    one, two = write_set(tmp_path / "one", 25, provenance={"b": 1, "a": 2}), write_set(tmp_path / "two", 25, provenance={"b": 1, "a": 2})
    assert bytes_of(one) == bytes_of(two)
    assert open_shards(str(one)).fingerprint == open_shards(str(two)).fingerprint
    assert open_shards(str(write_set(tmp_path / "three", 24))).fingerprint != open_shards(str(one)).fingerprint


def test_an_exception_leaves_only_whole_tars_under_final_names(tmp_path, make_sample):
    def write_and_fail(after: int) -> None:
        with ShardWriter(tmp_path, samples_per_shard=10) as writer:
            for number in range(after):
                writer.write(make_sample(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail(27)
    assert sorted(path.name for path in tmp_path.glob("*")) == [".mmgen", "data-000000.tar", "data-000001.tar"]
    assert not list(tmp_path.rglob("*.part"))
    for tar in tmp_path.glob("*.tar"):
        assert len(open_shards(str(tar))) == 10
    with pytest.raises(DataError, match="has not finished"):
        open_shards(str(tmp_path))


def test_a_second_run_goes_on_or_starts_afresh_with_equal_bytes(tmp_path, make_sample, write_set):
    expected = bytes_of(write_set(tmp_path / "at once", 25))
    for resume in (True, False):
        folder = tmp_path / f"resume {resume}"
        with contextlib.suppress(KeyboardInterrupt), ShardWriter(folder, samples_per_shard=10) as writer:
            for number in range(23):
                writer.write(make_sample(number))
            raise KeyboardInterrupt
        if resume:
            (folder / "data-000001.tar").write_bytes(b"damaged since")
        with ShardWriter(folder, samples_per_shard=10, resume=resume) as writer:
            assert writer.num_written == (10 if resume else 0)
            for number in range(writer.num_written, 25):
                writer.write(make_sample(number))
        assert bytes_of(folder) == expected


def test_a_killed_writer_leaves_only_whole_tars(tmp_path):
    script = f"""
import os, numpy as np
from pathlib import Path
from stages.data.sample import Sample
from stages.data.shards import ShardWriter
with ShardWriter(Path({str(tmp_path)!r}), samples_per_shard=3) as writer:
    for number in range(100):
        if number == 8:
            writer._flush()
            os.kill(os.getpid(), 9)
        writer.write(Sample(f"{{number}}", {{"x": np.arange(5)}}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["data-000000.tar", "data-000001.tar"]
    for tar in tmp_path.glob("*.tar"):
        assert len(open_shards(str(tar), on_bad_sample="fail")) == 3
    with ShardWriter(tmp_path, samples_per_shard=3, resume=True) as writer:
        assert writer.num_written == 6
        writer.write(Sample("6", {"x": np.arange(5)}))
    assert [sample.key for sample in open_shards(str(tmp_path))] == [str(number) for number in range(7)]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", {"caption": "x"}), "no dots"),
        (Sample("first", {"caption": "x"}), "written before"),
        (Sample("k", {"caption": "x", "meta": {}}), "has caption.txt, meta.json; the samples before it have caption.txt"),
        (Sample("k", {}), "without fields"),
        (Sample("k", {"Caption": "x"}), "lower-case"),
        (Sample("k", {"caption": np.array([1.0, np.nan])}), "1 of 2 numbers are not finite"),
        (Sample("k", {"caption": Encoded("png", b"no picture")}), "not a PNG"),
    ],
)
def test_a_sample_that_cannot_be_told_apart_or_stored_is_refused_whole(tmp_path, sample, message):
    with ShardWriter(tmp_path) as writer:
        writer.write(Sample("first", {"caption": "x"}))
        with pytest.raises(DataError, match=message):
            writer.write(sample)
        writer.write(Sample("second", {"caption": "y"}))
    assert [sample.key for sample in open_shards(str(tmp_path))] == ["first", "second"]
    assert open_shards(str(tmp_path)).fields["caption"]["dtype"] == "str"


def test_finished_and_foreign_sets_are_not_overwritten(tmp_path, write_set):
    folder = write_set(tmp_path / "ours", 12)
    with pytest.raises(UsageError, match="finished set of 2 tars"):
        write_set(folder, 3)
    (folder / "README.md").write_text("kept")
    write_set(folder, 3, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [".mmgen", "README.md", "data-000000.tar"]
    foreign = write_tar(tmp_path / "theirs" / "data-000000.tar", {"a.txt": b"x"})
    with pytest.raises(UsageError, match=r"data-000000\.tar, which mmgen did not write"):
        write_set(foreign.parent, 3, overwrite=True)
    assert foreign.exists()


def test_an_empty_set_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no sample to write"), ShardWriter(tmp_path):
        pass


def test_tokenizers_travel_with_the_shards(tmp_path, write_set):
    checkpoint = tmp_path / "vq"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "optimizer").write_text("stays at home")
    (checkpoint / "model.safetensors").write_text("weights")
    first = open_shards(str(write_set(tmp_path / "one", 3, tokenizers={"vq-01234567": checkpoint})))
    assert first.tokenizers == {"vq-01234567": tmp_path / "one" / META / "tokenizers" / "vq-01234567"}
    second = open_shards(str(write_set(tmp_path / "two", 3, tokenizers=first.tokenizers)))
    assert bytes_of(second.tokenizers["vq-01234567"]) == {"model.safetensors": b"weights"}
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


# --- joined sets ------------------------------------------------------------------------------------------------------------------


def test_joined_shards_are_read_one_after_the_other_with_their_common_fields(tmp_path, write_set):
    one = write_set(tmp_path / "one", 12, provenance={"set": 1})
    with ShardWriter(tmp_path / "two", provenance={"set": 2}) as writer:
        writer.write(Sample("x", {"caption": "other", "image": np.zeros((4, 7, 3), np.uint8)}))
    joined = open_shards(f"{one}::{tmp_path / 'two'}")
    assert len(joined) == 13
    assert joined.fields.keys() == {"caption", "image"}
    assert joined.fields["image"]["shape"] == [None, 7, 3]
    assert joined[12].fields["caption"] == "other"
    assert joined.provenance == {"joined": [{"set": 1}, {"set": 2}]}
    assert len(joined.index["shardlist"]) == 3
    with pytest.raises(DataError, match="there is no field 'meta'"):
        joined.read(0, ["meta"])


def test_codes_of_two_tokenizers_are_not_joined(tmp_path, write_set):
    one = write_set(tmp_path / "one", 3, field_tokenizers={"image.codes": "aaaa"})
    two = write_set(tmp_path / "two", 3, field_tokenizers={"image.codes": "bbbb"})
    with pytest.raises(DataError, match=r"'image.codes': written by tokenizer aaaa in one place and by bbbb"):
        open_shards(f"{one}::{two}")


settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.mark.parametrize("how", ["gone", "made anew", "cut", "empty"])
def test_tars_that_change_while_they_are_read_are_bad_data(tmp_path, write_set, how):
    shards = open_shards(str(write_set(tmp_path / "set", 25)))
    assert shards[0].key == "000000"
    last = tmp_path / "set" / "data-000002.tar"
    if how == "gone":
        shutil.rmtree(tmp_path / "set")
    elif how == "made anew":
        shutil.rmtree(tmp_path / "set")
        write_set(tmp_path / "set", 25, split="other")
    else:
        last.write_bytes(last.read_bytes()[: 700 if how == "cut" else 0])
    assert shards[1].key == "000001"  # what is open stays whole
    with pytest.raises(DataError, match=r"data-00000\d\.tar: (gone|overwritten)"):
        shards.read_or_skip(24)
