"""Nothing that lies beside data or in a checkpoint leads out of its folder: no link, no pipe, no name with a way in it."""

import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import mixed_recipe, text_tokenizer

from stages.data.index import INDEX, META, read_index
from stages.data.sample import Sample
from stages.data.shards import Shards, ShardWriter, open_shards, stream_shards
from stages.data.stream import receive_stream
from stages.data.tar_format import member_bytes
from stages.errors import DataError, MmgenError
from stages.evaluate import run_record
from stages.files import CAPS, copy_tokenizer, inside, read_inside, read_json_inside
from stages.hub import push
from stages.inspect_path import describe
from stages.parts.tokenizers import load_tokenizer
from stages.report.folders import read_folder
from stages.training.checkpoint import fingerprint, open_checkpoint, save_checkpoint, save_weights
from stages.training.released import read_released
from stages.verify import verify

PRIVATE = "what stays at home"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    file = tmp_path / "private" / "diary.txt"
    file.parent.mkdir()
    file.write_text(PRIVATE)
    return file


@pytest.fixture
def words(tmp_path: Path) -> Path:
    text_tokenizer().save(tmp_path / "words")
    (tmp_path / "words" / "README.md").write_text("a card")
    return tmp_path / "words"


@pytest.fixture
def data(tmp_path: Path, words: Path) -> Path:
    """A set whose field `caption.ids` was written by a tokenizer that came along."""
    mark = fingerprint(words)
    options = {"tokenizers": {f"bpe-{mark[:8]}": words}, "field_tokenizers": {"caption.ids": mark}}
    with ShardWriter(tmp_path / "data", **options) as writer:
        for number in range(4):
            writer.write(Sample(f"{number:04d}", {"caption": f"sample {number}", "caption.ids": np.arange(3)}))
    return tmp_path / "data"


def traveller(data: Path) -> Path:
    (folder,) = (data / META / "tokenizers").iterdir()
    return folder


def link(path: Path, private: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(private)


def hard_pipe(path: Path, private: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def listening(path: Path, private: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


STRANGERS = [link, hard_pipe, listening]


def everything(folder: Path) -> Iterator[bytes]:
    yield from (path.read_bytes() for path in folder.rglob("*") if path.is_file())


# --- names and files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a/b", "a/../b", "../b", "a\0b", "\ud800", "x" * 5000])
def test_a_name_with_a_way_in_it_is_refused(tmp_path, name):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError):
        inside(tmp_path, name)


@pytest.mark.parametrize("make", STRANGERS)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, private, make):
    make(tmp_path / "config.json", private)
    for read in (inside, read_inside, read_json_inside):
        with pytest.raises(DataError, match=r"config\.json"):
            read(tmp_path, "config.json")


def test_a_folder_that_a_person_names_may_be_a_link_and_one_inside_it_may_not(tmp_path):
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "sub" / "config.json").write_text('{"a": 1}')
    (tmp_path / "named").symlink_to("real")
    assert read_json_inside(tmp_path / "named", "sub", "config.json") == {"a": 1}
    (tmp_path / "real" / "other").symlink_to("sub")
    with pytest.raises(DataError, match="a link"):
        read_json_inside(tmp_path / "named", "other", "config.json")


def test_what_is_not_there_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    assert inside(tmp_path, "nothing") is None
    assert inside(tmp_path, "file", "below") is None
    assert read_json_inside(tmp_path, "run.json") == {}


@pytest.mark.parametrize("name", CAPS)
def test_a_file_beyond_the_cap_of_its_kind_is_refused_before_it_is_read(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(CAPS[name] + 1)
    with pytest.raises(DataError, match="the cap"):
        read_inside(tmp_path, name)


@pytest.mark.parametrize("text", ["[1]", "null", '{"a": ', "[" * 100_000, "\x00", '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_json_object_is_a_data_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        read_json_inside(tmp_path, "config.json")


def hub_cache(root: Path, files: Path) -> Path:
    """A repository as the Hub's client keeps it: files in blobs, and a snapshot of links to them."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(files.rglob("*")) if path.is_file()):
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        place = snapshot / path.relative_to(files)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", place.parent))
    return snapshot


def test_the_cache_of_the_hub_is_read(tmp_path, data, words):
    snapshot = hub_cache(tmp_path / "cache", data)
    shards = open_shards(str(snapshot))
    assert [sample.key for sample in shards] == [f"{number:04d}" for number in range(4)]
    (folder,) = shards.tokenizers.values()
    copy_tokenizer(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(words)
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert verify(str(snapshot)).ok


@pytest.mark.parametrize("where", ["blobs is a link", "another repository", "a blob is a link", "no blobs"])
def test_a_cache_whose_links_lead_out_of_the_repository_is_refused(tmp_path, private, where):
    shutil.copytree(private.parent, tmp_path / "files")
    snapshot = hub_cache(tmp_path / "cache", tmp_path / "files")
    blobs = snapshot.parent.parent / "blobs"
    file = snapshot / "diary.txt"
    (blob,) = blobs.iterdir()
    if where == "blobs is a link":
        shutil.rmtree(blobs)
        blobs.symlink_to(private.parent)
        link(file, Path("../../blobs/diary.txt"))
    elif where == "another repository":
        blobs.rename(tmp_path / "cache" / "blobs")
        link(file, tmp_path / "cache" / "blobs" / blob.name)
    elif where == "a blob is a link":
        link(blob, private)
    else:
        link(file, private)
    with pytest.raises(DataError, match="a link"):
        inside(snapshot, "diary.txt")


# --- shards -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", STRANGERS)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_tokenizer_that_travels_takes_nothing_from_outside_along(tmp_path, data, private, make, name):
    make(traveller(data) / name, private)
    shards, sent = open_shards(str(data)), io.BytesIO()
    attempts: list[Callable[[], object]] = [
        lambda: copy_tokenizer(next(iter(shards.tokenizers.values())), tmp_path / "copy"),
        lambda: stream_shards(data, sent),
        lambda: save_set(tmp_path / "out", shards),
    ]
    for attempt in attempts:
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            attempt()
    assert PRIVATE.encode() not in sent.getvalue()
    assert not any(PRIVATE.encode() in content for out in ("copy", "out") for content in everything(tmp_path / out))
    findings = verify(str(data)).findings
    assert [finding.kind for finding in findings if finding.path.endswith(name)] == ["link"]


def save_set(out: Path, shards: Shards) -> None:
    with ShardWriter(out, tokenizers=shards.tokenizers) as writer:
        writer.write(Sample("a", {"caption": "a"}))


@pytest.mark.parametrize("level", ["the tokenizer", "tokenizers", ".mmgen"])
def test_a_folder_on_the_way_that_is_a_link_is_refused(tmp_path, data, words, level):
    place = {"the tokenizer": traveller(data), "tokenizers": data / META / "tokenizers", ".mmgen": data / META}[level]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link"):
        _ = open_shards(str(data)).tokenizers
    with pytest.raises(DataError, match="a link"):
        stream_shards(data, io.BytesIO())
    assert not verify(str(data)).ok


@pytest.mark.parametrize("name", ["/home/me/private", "..", "a/../b", "../../private", "a/b", "", "."])
def test_the_index_names_tokenizers_and_not_ways_to_them(data, name):
    index = json.loads((data / META / INDEX).read_text())
    (data / META / INDEX).write_text(json.dumps({**index, "tokenizers": [name]}))
    with pytest.raises(DataError, match="plain name"):
        open_shards(str(data))
    assert not verify(str(data)).ok
    with pytest.raises(DataError, match="plain name"):
        stream_shards(data, io.BytesIO())


@pytest.mark.parametrize("make", STRANGERS)
def test_an_index_or_a_record_that_is_no_file_is_refused(data, private, make):
    make(data / META / "run.json", private)
    with pytest.raises(DataError, match=r"run\.json"):
        run_record(open_shards(str(data)))
    with pytest.raises(DataError, match=r"run\.json"):
        read_folder(data)
    assert [finding.kind for finding in verify(str(data)).findings] == ["link"]
    (data / META / "run.json").unlink()
    make(data / META / INDEX, private)
    with pytest.raises(DataError, match=INDEX):
        read_index(data)
    assert not verify(str(data)).ok


@pytest.mark.parametrize("make", [hard_pipe, listening, lambda path, private: path.mkdir()])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_that_is_no_file_is_refused_and_not_waited_for(data, private, make, indexed):
    if not indexed:
        shutil.rmtree(data / META)
        make(data / "a.tar", private)
    else:
        (data / "data-000000.tar").unlink()
        make(data / "data-000000.tar", private)
    with pytest.raises(DataError, match=r"\.tar"):
        open_shards(str(data))
    assert "unreadable" in [finding.kind for finding in verify(str(data)).findings]
    with pytest.raises(MmgenError):
        describe(str(data))


def test_a_tar_may_be_a_link(tmp_path, data):
    (data / "data-000000.tar").rename(tmp_path / "moved.tar")
    (data / "data-000000.tar").symlink_to(tmp_path / "moved.tar")
    assert len(list(open_shards(str(data)))) == 4
    assert verify(str(data)).ok


def test_what_travels_arrives_as_it_was(tmp_path, data):
    sent = io.BytesIO()
    stream_shards(data, sent)
    received = receive_stream(io.BytesIO(sent.getvalue()), tmp_path / "spool")
    names = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert [(received / name).read_bytes() for name in names] == [(data / name).read_bytes() for name in names]


@pytest.mark.parametrize("end", [2**40, 2**47])
def test_a_stream_cannot_ask_for_more_zeroes_than_a_tar_ends_with(tmp_path, data, end):
    sent = io.BytesIO()
    stream_shards(data, sent)
    header, rest = sent.getvalue()[:512], sent.getvalue()[512:]
    length = int(header[124:135], 8)
    text = json.loads(rest[:length])
    text["shardlist"][0]["bytes"] = end
    forged = member_bytes("__mmgen__", json.dumps(text).encode()) + rest[length + -length % 512 :]
    with pytest.raises(DataError, match="in the index"):
        receive_stream(io.BytesIO(forged), tmp_path / "spool")


# --- checkpoints ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, words: Path) -> Path:
    recipe = mixed_recipe()
    save_checkpoint(tmp_path / "model", recipe, {"backbones.lm.x": torch.zeros(2)}, tokenizers={"tokenizers.bpe": words})
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["/etc", "../../words", "..", "a/b", "../tokenizers/x"])
def test_a_checkpoint_names_tokenizers_and_not_ways_to_them(checkpoint, name):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tokenizers": {"tokenizers.bpe": name}}))
    with pytest.raises(DataError, match=r"config\.json.*tokenizers\.bpe"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [[], "x", {"a": 1}, {"a": None}, {"a": ["x"]}])
def test_a_checkpoint_whose_tokenizers_are_no_table_is_a_data_error(checkpoint, value):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tokenizers": value}))
    with pytest.raises(DataError, match=r"config\.json"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "recipe.toml", "model.safetensors"])
def test_a_link_in_a_checkpoint_is_refused(checkpoint, private, name):
    saved = checkpoint / name
    private.parent.joinpath(name).write_bytes(saved.read_bytes())
    link(saved, private.parent / name)
    with pytest.raises(DataError, match="a link"):
        (open_checkpoint(checkpoint), fingerprint(checkpoint))


def test_a_link_in_the_tokenizer_of_a_checkpoint_is_refused(checkpoint, words):
    folder = open_checkpoint(checkpoint).tokenizers["tokenizers.bpe"]
    assert load_tokenizer(folder).vocab_size
    link(folder / "tokenizer.json", words / "tokenizer.json")
    with pytest.raises(DataError, match="a link"):
        load_tokenizer(folder)
    shutil.rmtree(folder)
    folder.symlink_to(words)
    with pytest.raises(DataError, match="a link"):
        open_checkpoint(checkpoint)


class Counting:
    """A Hub that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def create_repo(self, *_: object, **__: object) -> None:
        self.asked.append("create")

    def upload_folder(self, **_: object) -> None:
        self.asked.append("upload")


@pytest.mark.parametrize("make", STRANGERS)
@pytest.mark.parametrize("name", ["notes.md", "tokenizers/x.json"])
def test_push_sends_nothing_where_a_link_is_among_the_files(checkpoint, private, make, name):
    make(checkpoint / name, private)
    hub = Counting()
    with pytest.raises(DataError, match="nothing was uploaded"):
        push(checkpoint, "hf://org/name", api=hub)  # type: ignore[arg-type]
    assert hub.asked == []


def test_push_does_not_mind_links_in_what_stays_at_home(checkpoint, private):
    (checkpoint / "state").mkdir()
    (checkpoint / "state" / "newest").symlink_to(private)
    hub = Counting()
    push(checkpoint, "hf://org/name", api=hub)  # type: ignore[arg-type]
    assert hub.asked == ["create", "upload"]


# --- released weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 7, None])
def test_pieces_of_released_weights_lie_beside_their_index(tmp_path, name):
    save_weights(tmp_path / "release" / "model-00001.safetensors", {"a": torch.zeros(1)})
    save_weights(tmp_path / "other.safetensors", {"b": torch.zeros(1)})
    index = {"weight_map": {"a": "model-00001.safetensors", "b": name}}
    (tmp_path / "release" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json"):
        read_released(tmp_path / "release", family="backbones")


def test_released_weights_and_their_config_are_no_links(tmp_path):
    save_weights(tmp_path / "elsewhere.safetensors", {"a": torch.zeros(1)})
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(DataError, match="a link"):
        read_released(folder, family="backbones")
    link(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    shutil.copy(tmp_path / "elsewhere.safetensors", folder / "real.safetensors")
    (folder / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(DataError, match="a link"):
        read_released(folder, family="model")
