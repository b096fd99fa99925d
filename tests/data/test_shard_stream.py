import io
import json
import tarfile

import pytest
import webdataset

from stages.data import locate
from stages.data.index import META
from stages.data.shards import open_shards, stream_shards
from stages.data.stream import receive_stream
from stages.data.tar_format import END_OF_ARCHIVE, member_bytes
from stages.errors import DataError
from stages.verify import verify


def bytes_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def sent(tmp_path, write_set):
    """A folder with a tokenizer in it, and the stream it makes."""
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "model.safetensors").write_bytes(b"weights" * 100)
    (tmp_path / "vq" / "config.json").write_text("{}")
    folder = write_set(tmp_path / "sent", 25, tokenizers={"vq-01234567": tmp_path / "vq"}, provenance={"from": "a test"}, split="val")
    stream = io.BytesIO()
    stream_shards(folder, stream)
    return folder, stream.getvalue()


def test_what_arrives_is_the_folder_that_was_sent(tmp_path, sent):
    folder, stream = sent
    assert bytes_of(receive_stream(io.BytesIO(stream), tmp_path / "spool")) == bytes_of(folder)
    assert bytes_of(receive_stream(io.BytesIO(stream), tmp_path / "spool")) == bytes_of(folder)  # again, over what is there


def test_webdataset_and_tarfile_read_the_stream_and_skip_the_index(tmp_path, sent):
    (tmp_path / "stream.tar").write_bytes(sent[1])
    samples = list(webdataset.WebDataset(str(tmp_path / "stream.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(25)]
    with tarfile.open(tmp_path / "stream.tar") as tar:
        assert tar.getnames()[:3] == ["__mmgen__", "__mmgen_files__", "000000.caption.txt"]
    assert len(open_shards(str(tmp_path / "stream.tar"), on_bad_sample="fail")) == 25


def test_datasets_reads_the_stream(tmp_path, sent, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "stream.tar").write_bytes(sent[1])
    loaded = datasets.load_dataset("webdataset", data_dir=str(tmp_path / "open"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["caption.txt"][:2] == ["this is sample 0", "this is sample 1"]


def test_standard_input_is_spooled_and_an_empty_one_stands_for_what_was_spooled(tmp_path, sent, monkeypatch):
    class Stdin:
        buffer = io.BytesIO(sent[1])

    monkeypatch.setattr(locate.sys, "stdin", Stdin)
    first = open_shards("-", spool=tmp_path / "run" / ".mmgen" / "input")
    again = open_shards("-", spool=tmp_path / "run" / ".mmgen" / "input")  # the stream is at its end now
    assert len(first) == len(again) == 25
    assert first.fingerprint == again.fingerprint == open_shards(str(sent[0])).fingerprint
    assert list(first.tokenizers) == ["vq-01234567"]
    with pytest.raises(DataError, match="standard input is empty"):
        open_shards("-", spool=tmp_path / "another")


@pytest.mark.parametrize("part", [0.001, 0.02, 0.3, 0.9, 0.9999])
def test_a_stream_that_was_cut_is_refused_and_leaves_what_was_there(tmp_path, sent, part):
    spool = receive_stream(io.BytesIO(sent[1]), tmp_path / "spool")
    before = bytes_of(spool)
    with pytest.raises(DataError):
        receive_stream(io.BytesIO(sent[1][: int(len(sent[1]) * part)]), spool)
    assert bytes_of(spool) == before


def test_a_changed_byte_is_noticed(tmp_path, sent):
    changed = sent[1].replace(b"this is sample 12", b"this is sample 99")
    with pytest.raises(DataError, match=r"data-000001\.tar arrived with sha256"):
        receive_stream(io.BytesIO(changed), tmp_path / "spool")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "tokenizers/../../evil", "run.json", "tokenizers/a/.ssh"])
def test_a_stream_cannot_write_outside_its_folder(tmp_path, sent, name):
    index = json.loads((sent[0] / META / "shardindex.json").read_text())
    index["stream"] = {"bodies": [0, 0, 0], "files": [[name, 4]]}
    stream = member_bytes("__mmgen__", json.dumps(index).encode()) + member_bytes("__mmgen_files__", b"evil") + END_OF_ARCHIVE
    with pytest.raises(DataError, match="expected plain names below tokenizers/"):
        receive_stream(io.BytesIO(stream), tmp_path / "spool")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("url", ["../../x.tar", "/x.tar", "x.tar", "../a/b.tar", "../x.txt"])
def test_an_index_cannot_name_tars_elsewhere(tmp_path, sent, url):
    index = json.loads((sent[0] / META / "shardindex.json").read_text())
    index["shardlist"][0]["url"] = url
    with pytest.raises(DataError, match="shard url"):
        receive_stream(io.BytesIO(member_bytes("__mmgen__", json.dumps(index).encode())), tmp_path / "spool")


def test_a_foreign_tar_through_the_pipe(tmp_path):
    tar = b"".join(member_bytes(f"{number}.txt", b"text") for number in range(3)) + END_OF_ARCHIVE
    assert len(open_shards(str(receive_stream(io.BytesIO(tar), tmp_path / "spool")))) == 3
    with pytest.raises(DataError, match="not a tar"):
        receive_stream(io.BytesIO(b"{'json': 'lines'}" * 100), tmp_path / "spool")


def test_an_indexed_foreign_folder_arrives_with_its_own_padding(tmp_path):
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "theirs" / "x-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            writer.write({"__key__": f"s{number}", "txt": f"text {number}"})
    assert verify(str(tmp_path / "theirs"), index=True).ok
    stream = io.BytesIO()
    stream_shards(tmp_path / "theirs", stream)
    stream.seek(0)
    assert bytes_of(receive_stream(stream, tmp_path / "spool")) == bytes_of(tmp_path / "theirs")
