"""tokenize: every field passes through untouched, new ones decode to what they came from, and the bytes are the same every time."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import DataError, Preempted, UsageError
from stages.import_data import import_data
from stages.inspect_path import describe
from stages.options import RunOptions
from stages.parts.autoencoders import DiscreteAutoencoder
from stages.parts.quantizers.quantizer import Quantized
from stages.parts.quantizers.vq import VQ
from stages.parts.tokenizers import load_tokenizer
from stages.parts.views.square import to_tensor
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import load_recipe
from stages.run import Run
from stages.tokenize_shards import Loaded, load_tokenizer_folder, plan_outputs, read_groups, tokenize_shards
from stages.training.checkpoint import fingerprint, load_any_tokenizer, load_autoencoder

QUIET = RunOptions(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def picture(seed: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder: Path, count: int, split: str, *, sizes: tuple[tuple[int, int], ...] = ((16, 24),), **more: Any) -> Path:
    with ShardWriter(folder, split=split, samples_per_shard=30, provenance={"licence": "cc0-1.0"}) as writer:
        for n in range(count):
            height, width = sizes[n % len(sizes)]
            fields = {
                "image": picture(n, height, width),
                "source": picture(n + 1000),
                "caption": f"picture {n} <eos> of {split}, naïve",
                "qa": [{"question": "which?", "answer": str(n), "type": "number"}],
                "meta": {"number": n},
            }
            writer.write(Sample(f"{split}-{n:04d}", {**fields, **more}))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "train", 100, "train")
    write(folder / "val", 7, "val")
    return folder


@pytest.fixture(scope="session")
def checkpoints(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    steps = ["phases.train.steps=2", "phases.train.batch_size=4"]
    return {
        name: pretrain_tokenizer(load_recipe(recipe, size="tiny", sets=sets), str(shards), folder / name, QUIET)
        for name, recipe, sets in [("bpe", "text-bpe", []), ("vq", "vqgan", steps), ("vae", "kl-autoencoder", steps)]
    }


@pytest.fixture(scope="session")
def tokens(shards: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenize_shards(str(shards), list(checkpoints.values()), tmp_path_factory.mktemp("out") / "tokens", QUIET, check=3)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_every_split_is_mirrored_and_no_field_is_lost(shards: Path, tokens: Path) -> None:
    assert sorted(path.name for path in tokens.iterdir() if path.is_dir() and path.name[0] != ".") == ["train", "val"]
    for split, count in (("train", 100), ("val", 7)):
        before, after = open_shards(str(shards / split)), open_shards(str(tokens / split))
        assert len(after) == count
        assert after.splits() == [split]
        for i in (0, count - 1):
            one, other = before.read_encoded(i), after.read_encoded(i)
            assert one.key == other.key
            for field, value in one.fields.items():
                assert other.fields[field] == value, field
            assert set(other.fields) - set(one.fields) == {
                *(f"{field}.{kind}" for field in ("image", "source") for kind in ("codes", "latents")), "caption.ids",
            }  # fmt: skip


def test_what_is_written_is_what_the_tokenizers_give(tokens: Path, checkpoints: dict[str, Path]) -> None:
    data, text = open_shards(str(tokens / "train")), load_tokenizer(checkpoints["bpe"])
    vq, vae = load_autoencoder(checkpoints["vq"]), load_autoencoder(checkpoints["vae"])
    for i in (0, 63, 64, 99):  # around the edges of the groups they were encoded in
        fields = data.read(i).fields
        assert text.decode(fields["caption.ids"].tolist(), special=True) == fields["caption"]
        assert text.special_id("<eos>") not in fields["caption.ids"]
        with torch.no_grad():
            for name in ("image", "source"):
                images = to_tensor(fields[name]).unsqueeze(0)
                assert fields[f"{name}.codes"].shape == (2, 3)
                assert np.array_equal(fields[f"{name}.codes"], vq.encode_codes(images)[0].numpy())
                assert fields[f"{name}.latents"].dtype == np.float16
                assert fields[f"{name}.latents"].shape == (8, 2, 3)
                torch.testing.assert_close(torch.from_numpy(fields[f"{name}.latents"]).float(), vae.encode(images)[0], atol=3e-3, rtol=2e-3)


def test_the_index_says_who_wrote_what_and_the_tokenizers_come_along(tokens: Path, checkpoints: dict[str, Path]) -> None:
    data = open_shards(str(tokens / "val"))
    prints = {name: fingerprint(folder) for name, folder in checkpoints.items()}
    assert {name: entry["tokenizer"] for name, entry in data.fields.items() if entry["tokenizer"]} == {
        "caption.ids": prints["bpe"], "image.codes": prints["vq"], "source.codes": prints["vq"],
        "image.latents": prints["vae"], "source.latents": prints["vae"],
    }  # fmt: skip
    assert data.fields["image.codes"]["codebook_size"] == 64
    assert set(data.tokenizers) == {f"{name}-{value[:8]}" for name, value in prints.items()}
    for name, folder in data.tokenizers.items():
        assert fingerprint(folder)[:8] == name.rsplit("-", 1)[1]
        load_any_tokenizer(folder)
        assert not (folder / "state").exists()
    assert data.provenance["input"]["provenance"] == {"licence": "cc0-1.0"}


def test_the_check_reports_what_the_shards_decode_to(tokens: Path, checkpoints: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (tokens / ".mmgen" / "metrics.jsonl").read_text().splitlines()]
    assert {(line["split"], line["field"]) for line in lines} == {
        (split, field) for split in ("train", "val")
        for field in ("caption.ids", "image.codes", "source.codes", "image.latents", "source.latents")
    }  # fmt: skip
    assert all(line["checked"] == 3 for line in lines)
    assert all(line["exact"] == 3 if line["field"] == "caption.ids" else 5 < line["psnr"] < 40 for line in lines)


def test_the_same_input_gives_the_same_bytes(shards: Path, checkpoints: dict[str, Path], tokens: Path, tmp_path: Path) -> None:
    again = tokenize_shards(str(shards), list(checkpoints.values()), tmp_path / "again", QUIET)
    assert tars(again) == tars(tokens)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    shards: Path, checkpoints: dict[str, Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = tmp_path / "out", list(checkpoints.values())
    written = Run.status

    def status(run: Run, **about: Any) -> None:
        written(run, **about)
        if len(list(out.rglob("*.tar"))) == 2:  # the third is begun
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "status", status)
    with pytest.raises(Preempted):
        tokenize_shards(str(shards), told, out, QUIET)
    monkeypatch.setattr(Run, "status", written)
    assert len(list(out.rglob("*.tar"))) == 2
    assert json.loads((out / ".mmgen" / "status.json").read_text())["state"] == "preempted"
    tokenize_shards(str(shards), told, out, QUIET)
    assert tars(out) == tars(tokens)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    tokenize_shards(str(shards), told, out, QUIET)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_tokenizers_can_be_added_one_after_the_other(shards: Path, checkpoints: dict[str, Path], tokens: Path, tmp_path: Path) -> None:
    first = tokenize_shards(str(shards / "val"), [checkpoints["vq"], checkpoints["bpe"]], tmp_path / "first", QUIET)
    second = tokenize_shards(str(first), [checkpoints["vae"]], tmp_path / "second", QUIET)
    assert list(tars(second).values()) == list(tars(tokens / "val").values())
    data = open_shards(str(second))
    assert data.fields == open_shards(str(tokens / "val")).fields
    assert set(data.tokenizers) == set(open_shards(str(tokens / "val")).tokenizers)


def test_pictures_of_several_sizes_have_grids_of_their_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "mixed", 5, "train", sizes=((16, 24), (24, 8)))
    data = open_shards(str(tokenize_shards(str(folder), [checkpoints["vq"]], tmp_path / "out", QUIET)))
    assert [data[i].fields["image.codes"].shape for i in range(5)] == [(2, 3), (3, 1), (2, 3), (3, 1), (2, 3)]


def test_inspect_tells_what_a_picture_costs(checkpoints: dict[str, Path], tokens: Path) -> None:
    vq, vae = (describe(str(checkpoints[name])) for name in ("vq", "vae"))
    height, width = vq.data["tokenizer"]["picture_size"]
    codes = height * width // 64
    assert vq.data["tokenizer"]["grid"] == [height // 8, width // 8]
    assert vq.data["tokenizer"]["codes"] == codes
    assert vq.data["tokenizer"]["bits_per_pixel"] == round(codes * 6 / (height * width), 6) == 0.09375  # 64 codes are 6 bits each
    assert vae.data["tokenizer"]["floats_per_pixel"] == 8 / 64
    assert "bits_per_pixel   0.09375" in vq.text and "floats_per_pixel 0.125" in vae.text
    assert "int32    2 x 3  of 64 codes  by tokenizer" in describe(str(tokens / "val")).text


class Row(VQ):
    """A quantizer whose codes have no rows and columns."""

    def quantize(self, latents: Tensor, generator: Generator | None = None) -> Quantized:
        found = super().quantize(latents, generator)
        return Quantized(found.quantized, found.codes.flatten(1), found.losses)

    def lookup(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        return super().lookup(codes.unflatten(1, grid or (round(codes.shape[1] ** 0.5),) * 2))


def test_codes_in_a_row_are_written_and_checked_at_every_size(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "mixed", 5, "train", sizes=((16, 24), (24, 8)))

    def run(out: Path) -> tuple[list[np.ndarray], list[Any]]:
        data = open_shards(str(tokenize_shards(str(folder), [checkpoints["vq"]], out, QUIET, check=5)))
        lines = [json.loads(line) for line in (out / ".mmgen" / "metrics.jsonl").read_text().splitlines()]
        return [data[i].fields["image.codes"] for i in range(5)], [line["psnr"] for line in lines]

    grids, scores = run(tmp_path / "grids")

    def load_with_rows(folder: Path, device: str) -> Loaded:
        loaded = load_tokenizer_folder(folder, device)
        assert isinstance(loaded.part, DiscreteAutoencoder)
        loaded.part.quantizer.__class__ = Row
        return loaded

    monkeypatch.setattr("stages.tokenize_shards.load_tokenizer_folder", load_with_rows)
    rows, row_scores = run(tmp_path / "rows")
    assert [row.shape for row in rows] == [(6,), (3,), (6,), (3,), (6,)]
    assert all(np.array_equal(row, grid.ravel()) for row, grid in zip(rows, grids, strict=True))
    assert row_scores == scores and len(scores) == 2  # image and source
    assert open_shards(str(tmp_path / "rows")).fields["image.codes"]["shape"] == [None]


def test_pictures_of_every_kind_are_tokenized_as_a_viewer_shows_them(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # stored 24 wide and 16 high, shown 16 wide and 24 high
    colours = Image.fromarray(picture(0))
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.jpg": (colours.convert("L"), {}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "turned.jpg": (colours, {"exif": turned}),
        "grey16.png": (Image.fromarray(np.full((16, 24), 0x8080, np.uint16)), {}),
        "alpha.png": (Image.new("RGBA", (24, 16), (0, 0, 0, 0)), {}),
        "bit.png": (colours.convert("1"), {}),
        "palette.png": (colours.quantize(16), {"transparency": 3}),
        "moving.webp": (colours, {"save_all": True, "append_images": [Image.new("RGB", (24, 16))], "lossless": True}),
        "moving.gif": (colours.quantize(16), {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
    }
    (tmp_path / "files").mkdir()
    for name, (image, options) in kinds.items():
        image.save(tmp_path / "files" / name, **options)
    told = RunOptions(quiet=True, on_bad_sample="fail")
    data = import_data("folder", str(tmp_path / "files"), tmp_path / "data", told, val_fraction=0.0)
    out = open_shards(str(tokenize_shards(str(data), [checkpoints["vq"]], tmp_path / "out", told) / "train"))
    shapes = {sample.fields["meta"]["file"]: sample.fields["image.codes"].shape for sample in out}
    assert shapes == {name: (3, 2) if name == "turned.jpg" else (2, 3) for name in kinds}
    shown = {sample.fields["meta"]["file"]: sample.fields["image"] for sample in out}
    assert (shown["alpha.png"] == 255).all() and (shown["grey16.png"] == 128).all()
    assert np.array_equal(shown["moving.webp"], picture(0))


def test_large_pictures_come_in_smaller_groups(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", 7, "train")
    monkeypatch.setattr("stages.tokenize_shards.PIXELS", 16 * 24 * 3)
    data = open_shards(str(folder))
    plan = plan_outputs([load_tokenizer_folder(checkpoints["vq"], "cpu")], data)
    groups = list(read_groups(data, plan, range(7)))
    assert [(len(group.samples), group.stop) for group in groups] == [(3, 3), (3, 6), (1, 7)]


def test_a_bad_picture_is_named_from_the_thread_that_reads(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data") as writer:
        for n in range(70):
            writer.write(Sample(f"{n:03d}", {"image": picture(n)}))
    (path,) = (tmp_path / "data").glob("*.tar")
    whole = bytearray(path.read_bytes())
    at = whole.index(b"IDAT", whole.index(b"066.image.png"))
    whole[at + 20 : at + 40] = bytes(20)
    path.write_bytes(bytes(whole))
    (tmp_path / "data" / ".mmgen" / "shardindex.json").unlink()  # as foreign shards: the index would refuse the change
    told = RunOptions(quiet=True, on_bad_sample="fail")
    with pytest.raises(DataError, match=r"066\.image\.png at byte .*png picture of 24 x 16 pixels cannot be decoded"):
        tokenize_shards(str(tmp_path / "data"), [checkpoints["vq"]], tmp_path / "out", told)
    kept = RunOptions(quiet=True, on_bad_sample="skip", max_bad_fraction=0.1)
    out = open_shards(str(tokenize_shards(str(tmp_path / "data"), [checkpoints["vq"]], tmp_path / "kept", kept)))
    assert len(out) == 69 and "066" not in [sample.key for sample in out]


def test_a_picture_that_does_not_divide_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "odd", 5, "train", sizes=((16, 24), (20, 20)))
    with pytest.raises(DataError, match=r"train-0001: field 'image': .*20 x 20") as caught:
        tokenize_shards(str(folder), [checkpoints["vq"]], tmp_path / "out", QUIET)
    assert "--size" in caught.value.hint
    assert not list((tmp_path / "out").glob("*.tar"))


def test_tokenizers_that_cannot_run_are_refused_before_anything_is_written(
    shards: Path, checkpoints: dict[str, Path], tokens: Path, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "text") as writer:
        writer.write(Sample("a", {"story": "once"}))
    cases: list[tuple[Path, list[Path], str]] = [
        (tmp_path / "text", [checkpoints["vq"]], "is an image tokenizer"),
        (tmp_path / "text", [checkpoints["bpe"]], "plain texts called caption"),
        (shards, [checkpoints["vq"], checkpoints["vq"]], "two tokenizers would write 'image.codes'"),
        (tokens, [checkpoints["vq"]], "has the field 'image.codes' already"),
        (shards, [tmp_path], "not a checkpoint"),
        (shards, [], "no tokenizer"),
    ]
    for source, told, said in cases:
        with pytest.raises(UsageError, match=said):
            tokenize_shards(str(source), told, tmp_path / "out", QUIET)
        assert not (tmp_path / "out").exists()


def test_limit_bounds_each_split(shards: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tokenize_shards(str(shards), [checkpoints["bpe"]], tmp_path / "out", RunOptions(quiet=True, limit=9))
    assert [len(open_shards(str(out / split))) for split in ("train", "val")] == [9, 7]


def test_a_stream_is_the_folder_that_would_have_been_written(
    shards: Path, checkpoints: dict[str, Path], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdout:
        buffer = io.BytesIO()

    monkeypatch.setattr("stages.tokenize_shards.sys.stdout", Stdout)
    tokenize_shards(str(shards / "val"), list(checkpoints.values()), Path("-"), QUIET)

    class Stdin:
        buffer = io.BytesIO(Stdout.buffer.getvalue())

    monkeypatch.setattr("sys.stdin", Stdin)
    data = open_shards("-", spool=tmp_path / "spool")
    assert [path.read_bytes() for path in data.paths] == list(tars(tokens / "val").values())
    assert set(data.tokenizers) == set(open_shards(str(tokens / "val")).tokenizers)
    with pytest.raises(UsageError, match="a stream holds one"):
        tokenize_shards(str(shards), list(checkpoints.values()), Path("-"), QUIET)


@pytest.mark.slow
def test_datasets_finds_both_splits(tokens: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from datasets import load_dataset

    loaded = load_dataset(str(tokens), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 100, "val": 7}
    assert np.array(loaded["val"][0]["image.codes.npy"]).shape == (2, 3)
