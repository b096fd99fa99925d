"""What a run deletes is what its own list names, as it wrote it; and no --out takes an input away."""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from worlds import CAPTIONS, make_world, mixed_recipe, sample_of

from stages.align import align
from stages.draw import draw
from stages.errors import DataError, Preempted, UsageError
from stages.evaluate import evaluate
from stages.files import append_line, make_scratch, name_file, replace_folder, write_atomic
from stages.import_data import import_data
from stages.inputs import refuse_overlap
from stages.options import RunOptions
from stages.pretrain_tokenizer import pretrain_tokenizer
from stages.recipe import load_recipe
from stages.report import report
from stages.run import Run
from stages.sample import sample
from stages.tokenize_shards import tokenize_shards
from stages.train_unified import train_unified
from stages.written import Written

QUIET = RunOptions(quiet=True, dtype="fp32", device="cpu")
AGAIN = replace(QUIET, overwrite=True)


def tree(folder: Path) -> dict[str, str]:
    """Everything in a folder: names, links, and the hash of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"-> {os.readlink(path)}" if path.is_symlink() else "folder"
        if path.is_file() and not path.is_symlink():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def put(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def open_run(out: Path, options: RunOptions = QUIET, *, kind: str = "checkpoint", stage: str = "align", **more: object) -> Run:
    return Run(out, stage=stage, options=options, kind=kind, **more)  # type: ignore[arg-type]


# no --out takes an input away


@dataclass
class Laid:
    """A folder `inputs` of everything a stage can read, made once."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / "inputs" / name


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Laid:
    folder = tmp_path_factory.mktemp("laid")
    made = Laid(folder)
    import_data("scenes", None, made["data"], RunOptions(quiet=True, seed=1, limit=8), level=0, count=8)
    pretrain_tokenizer(load_recipe("text-bpe", size="tiny"), str(made["data"]), made["words"], QUIET)
    asked = [{"question": "how many?", "answer": "2", "type": "count"}]
    world = make_world(folder / "world", mixed_recipe(), [sample_of(number, qa=asked) for number in range(len(CAPTIONS))])
    world.shards.rename(made["prompts"])
    train_unified(mixed_recipe(), str(made["prompts"]), made["model"], replace(QUIET, max_steps=1))
    sample(made["model"], str(made["prompts"]), made["samples"], replace(QUIET, limit=2), tasks=["draw"])
    for number in range(3):
        made["pictures"].mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(made["pictures"] / f"{number}.png")
        (made["pictures"] / f"{number}.txt").write_text("a picture")
    put(made["recipes"] / "mine.toml", load_recipe("text-bpe", size="tiny").to_toml())
    return made


Work = Callable[[Laid, Path, RunOptions], object]
TOWERS = ["phases.contrast.steps=1", "phases.contrast.batch_size=2"]
READS: list[tuple[str, str, Work]] = [
    ("import SOURCE", "pictures", lambda m, out, o: import_data("folder", str(m["pictures"]), out, o)),
    ("import shards", "data", lambda m, out, o: import_data("shards", str(m["data"] / "train"), out, o)),
    (
        "pretrain SHARDS",
        "data",
        lambda m, out, o: pretrain_tokenizer(load_recipe("text-bpe", size="tiny"), str(m["data"]), out, o),
    ),
    (
        "pretrain a tar",
        "data/train",
        lambda m, out, o: pretrain_tokenizer(
            load_recipe("text-bpe", size="tiny"), f"{m['data']}/train/data-{{000000..000000}}.tar", out, o
        ),
    ),
    (
        "pretrain --val",
        "data/val",
        lambda m, out, o: pretrain_tokenizer(load_recipe("text-bpe", size="tiny"), str(m["samples"]), out, o, val=str(m["data"] / "val")),
    ),
    (
        "pretrain --recipe",
        "recipes",
        lambda m, out, o: pretrain_tokenizer(
            load_recipe(m["recipes"] / "mine.toml"), str(m["data"]), out, replace(o, overwrite=True, recipe=str(m["recipes"] / "mine.toml"))
        ),
    ),
    ("tokenize SHARDS", "data", lambda m, out, o: tokenize_shards(str(m["data"]), [m["words"]], out, o)),
    ("tokenize one split", "data", lambda m, out, o: tokenize_shards(str(m["data"] / "train"), [m["words"]], out, o)),
    (
        "tokenize several",
        "data/val",
        lambda m, out, o: tokenize_shards(f"{m['data'] / 'train'}::{m['data'] / 'val'}", [m["words"]], out, o),
    ),
    ("tokenize --tokenizer", "words", lambda m, out, o: tokenize_shards(str(m["data"]), [m["words"]], out, o)),
    (
        "align SHARDS",
        "data",
        lambda m, out, o: align(load_recipe("clip", size="tiny", sets=TOWERS), str(m["data"]), out, o, tokenizers=[m["words"]]),
    ),
    (
        "align --tokenizer",
        "words",
        lambda m, out, o: align(load_recipe("clip", size="tiny", sets=TOWERS), str(m["data"]), out, o, tokenizers=[m["words"]]),
    ),
    ("train SHARDS", "prompts", lambda m, out, o: train_unified(mixed_recipe(), str(m["prompts"]), out, o)),
    ("train weighted", "prompts", lambda m, out, o: train_unified(mixed_recipe(), f"2*{m['prompts']}::1*{m['prompts']}", out, o)),
    (
        "train --init",
        "model",
        lambda m, out, o: train_unified(mixed_recipe(), str(m["prompts"]), out, o, init={"backbones.lm": str(m["model"])}),
    ),
    (
        "train --val",
        "data/val",
        lambda m, out, o: train_unified(mixed_recipe(), str(m["prompts"]), out, o, val=str(m["data"] / "val")),
    ),
    ("sample MODEL", "model", lambda m, out, o: sample(m["model"], str(m["prompts"]), out, o)),
    ("sample PROMPTS", "prompts", lambda m, out, o: sample(m["model"], str(m["prompts"]), out, o)),
    (
        "sample --image",
        "pictures",
        lambda m, out, o: sample(m["model"], None, out, o, prompt="two", image=m["pictures"] / "0.png", tasks=["draw"]),
    ),
    ("eval MODEL", "model", lambda m, out, o: evaluate(str(m["model"]), str(m["prompts"]), out, o)),
    ("eval prompts", "prompts", lambda m, out, o: evaluate(str(m["model"]), str(m["prompts"]), out, o)),
    ("eval SAMPLES", "samples", lambda m, out, o: evaluate(str(m["samples"]), None, out, o)),
    ("eval truth", "prompts", lambda m, out, o: evaluate(str(m["samples"]), str(m["prompts"]), out, o)),
    ("eval --reference", "data", lambda m, out, o: evaluate(str(m["samples"]), None, out, o, reference=str(m["data"] / "val"))),
]


@pytest.mark.parametrize(("name", "work"), [(read[1], read[2]) for read in READS], ids=[read[0] for read in READS])
def test_an_out_that_is_or_holds_an_input_is_refused_and_nothing_is_touched(name: str, work: Work, laid: Laid) -> None:
    alias = laid.folder / "alias"
    alias.symlink_to(laid[name])
    outs = [laid[name], laid[name] / ".." / laid[name].name, alias, laid.folder / "inputs"]
    before = tree(laid.folder)
    try:
        for number, out in enumerate(outs):
            for options in (QUIET, AGAIN) if number == 0 else (AGAIN,):
                with pytest.raises(UsageError, match="an input of this run") as caught:
                    work(laid, out, options)
                assert "another folder" in caught.value.hint and "--overwrite" not in caught.value.hint
                assert tree(laid.folder) == before
    finally:
        alias.unlink()


def test_the_files_that_a_folder_of_links_names_are_inputs_too(tmp_path: Path) -> None:
    tar = put(tmp_path / "real" / "data-000000.tar")
    (tmp_path / "chosen" / "deep").mkdir(parents=True)
    (tmp_path / "chosen" / "data-000000.tar").symlink_to(tar)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "on").symlink_to(tmp_path / "chosen")
    for out in (tmp_path / "real", tmp_path / "chosen", tmp_path):
        for spec in (tmp_path / "chosen", tmp_path / "far"):
            with pytest.raises(UsageError, match="an input of this run"):
                refuse_overlap(out, [spec])
    refuse_overlap(tmp_path / "chosen-not", [tmp_path / "chosen"])


@pytest.mark.parametrize("spec", ["a#ports.see", "3*a::b", "b::a", "./a/", "x/../a", "a/{t,u}.tar", "~/a"])
def test_an_input_is_known_however_it_is_written(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a/t.tar", "a/u.tar", "b/t.tar", "x/y"):
        put(tmp_path / name)
    with pytest.raises(UsageError, match="an input"):
        refuse_overlap(Path("a"), [spec])
    refuse_overlap(Path("new"), [spec, "-", "hf://datasets/org/a", "", None, "a\0b", "{", "c" * 5000])


def test_an_out_inside_an_input_is_allowed_where_nothing_of_it_changes(tmp_path: Path) -> None:
    for name in ("model/model.safetensors", "model/state/x", "sets/train/a.tar", "tars/a.tar"):
        put(tmp_path / name)
    for out, spec, adds_tars in (("model/scores", "model", True), ("sets/scores", "sets", False), ("tars/more", "tars", True)):
        refuse_overlap(tmp_path / out, [tmp_path / spec], adds_tars=adds_tars)
    refuse_overlap(tmp_path / "sets" / "tokens", [tmp_path / "sets" / "train"], adds_tars=True)  # a sibling
    for out, spec in (("sets/tokens", "sets"), ("model/state/new", "model"), ("tars/.mmgen/new", "tars"), ("model/tokenizers/t", "model")):
        with pytest.raises(UsageError, match="lies inside an input"):
            refuse_overlap(tmp_path / out, [tmp_path / spec], adds_tars=True)


def test_a_model_can_be_scored_into_its_own_folder_again_and_again(laid: Laid, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(laid["model"], model)
    before = tree(model)
    for options in (QUIET, AGAIN):
        evaluate(str(model), str(laid["prompts"]), model / "scores", replace(options, limit=2))
        assert {name: value for name, value in tree(model).items() if not name.startswith("scores")} == before
    assert json.loads((model / "scores" / "results.json").read_text())["results"]


def test_stdin_is_not_spooled_into_an_input(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = (laid["data"] / "val" / "data-000000.tar").read_bytes()
    for name, work in {
        "words": lambda out: tokenize_shards("-", [laid["words"]], out, AGAIN),
        "model": lambda out: sample(laid["model"], "-", out, AGAIN),
        "data": lambda out: pretrain_tokenizer(load_recipe("text-bpe", size="tiny"), "-", out, AGAIN, val=str(laid["data"] / "val")),
        "words/": lambda out: align(load_recipe("clip", size="tiny"), "-", out, AGAIN, tokenizers=[laid["words"]]),
    }.items():
        before = tree(laid[name])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(tar)))
        with pytest.raises(UsageError, match="an input of this run"):
            work(laid[name])
        assert tree(laid[name]) == before


# what --overwrite deletes

MADE = ["model.safetensors", "recipe.toml", "README.md", "state/step-00000001/state.json", "train/data-000000.tar", "files/a.png"]


def a_run(out: Path, options: RunOptions = QUIET) -> None:
    with open_run(out, options) as run:
        run.log(step=1)
        for name in MADE:
            write_atomic(out / name, f"content of {name}")
        append_line(out / "bad_batches.jsonl", "{}")


FOREIGN = st.sampled_from(
    [
        "notes.txt",
        "files/notes.md",
        "files/b.png",
        "state/my-backup/weights.bin",
        "model_notes.safetensors",
        "model-00001-of-00002.safetensors",
        "train/mine.tar",
        "train/data-000001.tar",
        "data-000000.tar",
        "mine/.mmgen/run.json",
        "mine/data-000000.tar",
        "mine/run.json",
        ".mmgen/mine",
        ".mmgen/input/a.tar",
        "train/.data-000009.tar.4711.tmp",
        "state/step-00000001/mine",
        "state/step-00000002/state.json",
        "state/step-00000003.partial/x",
        "tokenizers/mine/tokenizer.json",
        "samples/a/results.json",
        "bad_samples.jsonl",
        "config.json",
        "train/.mmgen/shardindex.json",
    ]
)


@given(foreign=st.sets(FOREIGN, max_size=5), empty=st.sampled_from(["mine/deep", "state/old", "train/.mmgen"]))
def test_overwrite_leaves_every_file_that_is_not_its_own(foreign: set[str], empty: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        leave_or_refuse(foreign, empty, tmp_path_factory.mktemp("foreign") / "run")


def leave_or_refuse(foreign: set[str], empty: str, out: Path) -> None:
    a_run(out)
    (out / empty).mkdir(parents=True, exist_ok=True)
    for name in foreign:
        put(out / name)
    before = tree(out)
    try:
        with open_run(out, AGAIN, writes=["model.safetensors", "config.json", "state/step-*"]) as run:
            run.begin()
            left = tree(out)
    except UsageError:
        assert tree(out) == before
        assert foreign & {
            "train/mine.tar",
            "train/data-000001.tar",
            "bad_samples.jsonl",
            "config.json",
            "state/step-00000002/state.json",
        } | {name for name in foreign if name.startswith("state/step-00000003")}
        return
    assert {name: left.get(name) for name in foreign} == {name: before[name] for name in foreign}
    assert not left.keys() & set(MADE)
    assert left.get(empty) == "folder"


@pytest.mark.parametrize("name", ["README.md", "recipe.toml", "model.safetensors", "train/data-000000.tar"])
@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_was_edited_since_is_not_lost(name: str, same_size: bool, tmp_path: Path) -> None:
    a_run(tmp_path)
    put(tmp_path / name, "x" * len(f"content of {name}") if same_size else "my own words")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="was changed") as caught, open_run(tmp_path, AGAIN):
        pass
    assert name in caught.value.message and "move it away" in caught.value.hint
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["README.md", "train", "state", ".mmgen", "metrics.jsonl"])
def test_a_link_in_the_way_is_refused_and_not_followed(name: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    a_run(out)
    (out / name).rename(elsewhere)
    (out / name).symlink_to(elsewhere)
    before = tree(tmp_path)
    with pytest.raises(UsageError), open_run(out, AGAIN):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"path": "PATH", "is": "rewritten"}'.replace("PATH", path)
            for path in ("../victim", "/tmp/victim", "a/../../victim", "a\\u0000b", "", ".", "a//b", "a/")
        ),
        '{"path": "..", "is": "scratch"}',
        '{"path": 7, "size": 1}',
        '{"path": "a", "size": -1}',
        '{"path": "a", "size": 1, "sha256": "short"}',
        '{"path": "a", "is": "everything"}',
        "[]",
        "{",
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_forged_list_deletes_nothing(line: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    a_run(out)
    put(tmp_path / "victim")
    with (out / ".mmgen" / "written.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"written\.jsonl"), open_run(out, AGAIN):
        pass
    assert tree(tmp_path) == before


def test_a_line_that_a_kill_cut_is_passed_over(tmp_path: Path) -> None:
    a_run(tmp_path)
    with (tmp_path / ".mmgen" / "written.jsonl").open("a") as file:
        file.write('{"path": "/et')
    with open_run(tmp_path, AGAIN) as run:
        run.begin()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_that_fails_before_it_writes_has_deleted_nothing(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(DataError), open_run(tmp_path, replace(AGAIN, seed=3)) as run:  # noqa: PT012
        run.status(step=0, of=7)
        raise DataError("the recipe does not fit the data")
    assert tree(tmp_path) == before
    with open_run(tmp_path, replace(AGAIN, seed=3)) as run:
        run.log(step=1)
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 3


def test_a_mistake_that_training_finds_late_costs_no_finished_model(laid: Laid, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(laid["model"], out)
    before = tree(out)
    with pytest.raises(UsageError, match="frozen in every phase"):
        train_unified(mixed_recipe('phases.joint.frozen=["backbones"]'), str(laid["prompts"]), out, AGAIN)
    with pytest.raises(UsageError, match="does not exist"):
        train_unified(mixed_recipe(), str(laid["prompts"]), out, AGAIN, val=str(tmp_path / "nowhere"))
    assert tree(out) == before


def test_what_was_half_deleted_when_it_was_killed_is_neither_complete_nor_lost_track_of(tmp_path: Path) -> None:
    a_run(tmp_path)
    for name in ("status.json", "run.json", "model.safetensors"):  # in this order
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="being deleted"), open_run(tmp_path):
        pass
    with open_run(tmp_path, AGAIN) as run:
        run.begin()
    assert {name for name in tree(tmp_path) if "mmgen" not in name} == {"run.json", "status.json"}


def test_a_folder_that_was_half_made_when_it_was_killed_is_the_runs(tmp_path: Path) -> None:
    with pytest.raises(Preempted), open_run(tmp_path):  # noqa: PT012
        make_scratch(tmp_path / "state" / "step-00000001.partial")
        put(tmp_path / "state" / "step-00000001.partial" / "shard.safetensors")
        raise Preempted("x")
    shutil.copytree(tmp_path, tmp_path.with_name("other"))
    for out, options in ((tmp_path, QUIET), (tmp_path.with_name("other"), AGAIN)):
        with open_run(out, options, writes=["state/step-*"]) as run:
            run.begin()
            assert not list((out / "state").glob("*")) if (out / "state").exists() else True


# names that are taken


def test_a_run_replaces_no_file_that_it_did_not_write(tmp_path: Path) -> None:
    mine = [put(tmp_path / "out" / name) for name in ("files/a.png", "results.json", "metrics.jsonl", "state/step-1/x")]
    new = put(tmp_path / "new" / "y").parent
    run = open_run(tmp_path / "out")
    for path in mine:
        path.rename(tmp_path / path.name)
    shutil.rmtree(tmp_path / "out")
    with run:
        for path in mine:
            path.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.name).rename(path)
        for act in (
            lambda: write_atomic(mine[0], "new"),
            lambda: name_file(new / "y", mine[1]),
            lambda: run.log(step=1),
            lambda: replace_folder(new, mine[3].parent),
        ):
            with pytest.raises(UsageError, match="did not write it"):
                act()
    assert [path.read_text() for path in mine] == ["mine"] * 4


def test_a_result_that_was_edited_before_a_resume_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(Preempted), open_run(tmp_path):  # noqa: PT012
        write_atomic(tmp_path / "README.md", "a card")
        raise Preempted("x")
    put(tmp_path / "README.md", "my words")
    with pytest.raises(UsageError, match="changed"), open_run(tmp_path):
        write_atomic(tmp_path / "README.md", "another card")
    assert (tmp_path / "README.md").read_text() == "my words"


def test_saved_pictures_replace_nothing(laid: Laid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(laid["model"], str(laid["prompts"]), out, replace(QUIET, limit=2), tasks=["draw"], save_files=True)
    (picture, *_) = sorted((out / "files").glob("*.png"))
    put(out / "files" / "notes.md")
    put(picture, "my retouched picture")
    with pytest.raises(UsageError, match="was changed"):
        sample(laid["model"], str(laid["prompts"]), out, replace(AGAIN, limit=2), tasks=["draw"], save_files=True)
    assert picture.read_text() == "my retouched picture"
    picture.unlink()
    sample(laid["model"], str(laid["prompts"]), out, replace(AGAIN, limit=2), tasks=["draw"])
    assert [path.name for path in (out / "files").iterdir()] == ["notes.md"]


@pytest.mark.parametrize("name", ["model.safetensors", "results.json", "data-000000.tar", "notes.html", "notes.svg", "link.html"])
def test_reports_and_drawings_replace_only_their_own_kind(name: str, laid: Laid, tmp_path: Path) -> None:
    target = put(tmp_path / name, "<html>precious</html>")
    if name.startswith("link"):
        target.rename(tmp_path / "real")
        target.symlink_to("real")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="did not write it"):
        report([laid["samples"]], target)
    if target.suffix == ".svg":
        with pytest.raises(UsageError, match="did not write it"):
            draw(load_recipe("clip", size="tiny"), target)
    assert tree(tmp_path) == before


def test_a_report_and_a_drawing_can_be_made_again(laid: Laid, tmp_path: Path) -> None:
    for _ in range(2):
        report([laid["samples"]], tmp_path / "new" / "report.html")
        draw(load_recipe("clip", size="tiny"), tmp_path / "new" / "clip.svg")
    with pytest.raises(UsageError, match="did not write it"):
        draw(load_recipe("clip", size="tiny"), (tmp_path / "new" / "report.html").rename(tmp_path / "new" / "a.svg"))


# the list


def test_every_file_of_every_stage_is_on_its_list(laid: Laid, tmp_path: Path) -> None:
    """Whatever writes a file another way than stages/files.py is found here."""
    evaluate(str(laid["model"]), str(laid["prompts"]), tmp_path / "scores", replace(QUIET, limit=2))
    tokenize_shards(str(laid["data"]), [laid["words"]], tmp_path / "tokens", QUIET)
    for out in (laid["data"], laid["words"], laid["model"], laid["samples"], tmp_path / "scores", tmp_path / "tokens"):
        written = Written(out)
        written.read()
        files = {name for name, value in tree(out).items() if value != "folder"} - {".mmgen/written.jsonl"}
        assert files == {name for name, entry in written.entries.items() if entry.kind in ("file", "rewritten")}
        assert len(written.doomed()) == len(files)


def test_rewriting_files_a_thousand_times_keeps_the_list_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    listed = tmp_path / ".mmgen" / "written.jsonl"
    with open_run(tmp_path) as run:
        before = len(listed.read_text().splitlines())
        for number in range(100):
            run.status(step=number)
            run._write_status()
            write_atomic(tmp_path / "README.md", "the same")
        assert len(listed.read_text().splitlines()) <= before + 3
        for number in range(1300):
            write_atomic(tmp_path / "README.md", f"number {number}")
        assert len(listed.read_text().splitlines()) < 1100
    assert len(listed.read_text().splitlines()) < 10
    with open_run(tmp_path, AGAIN) as run:
        run.begin()
    assert not (tmp_path / "README.md").exists()


# what earlier versions wrote


def of_an_earlier_version(out: Path) -> Path:
    """As it was before there was a list: run.json with the hash of the card, and tars with theirs in the index."""
    shutil.rmtree(out / ".mmgen" / "written.jsonl", ignore_errors=True)
    (out / ".mmgen" / "written.jsonl").unlink()
    (run,) = [path for path in (out / "run.json", out / ".mmgen" / "run.json") if path.exists()]
    record = json.loads(run.read_text())
    record["readme"] = hashlib.sha256((out / "README.md").read_bytes()).hexdigest()
    run.write_text(json.dumps(record))
    return out


def test_shards_of_an_earlier_version_are_deleted_by_the_hashes_on_record(laid: Laid, tmp_path: Path) -> None:
    out = of_an_earlier_version(shutil.copytree(laid["data"], tmp_path / "data"))
    options = replace(AGAIN, seed=2, limit=3)
    tar = out / "train" / "data-000000.tar"
    for change in (lambda: put(out / "notes.txt"), lambda: put(tar, "x" * tar.stat().st_size)):
        kept = shutil.copytree(out, tmp_path / "kept")
        change()
        before = tree(out)
        with pytest.raises(UsageError):
            import_data("scenes", None, out, options, level=0, count=3)
        assert tree(out) == before
        shutil.rmtree(out)
        kept.rename(out)
    import_data("scenes", None, out, options, level=0, count=3)
    assert json.loads((out / ".mmgen" / "run.json").read_text())["seed"] == 2


def test_a_checkpoint_of_an_earlier_version_is_not_deleted_on_suspicion(laid: Laid, tmp_path: Path) -> None:
    out = of_an_earlier_version(shutil.copytree(laid["model"], tmp_path / "model"))
    before = tree(out)
    with pytest.raises(UsageError, match="earlier version") as caught:
        train_unified(mixed_recipe("phases.joint.steps=3"), str(laid["prompts"]), out, AGAIN)
    assert "yourself" in caught.value.hint
    assert tree(out) == before


def test_a_run_that_an_earlier_version_began_goes_on(laid: Laid, tmp_path: Path) -> None:
    out = of_an_earlier_version(shutil.copytree(laid["model"], tmp_path / "model"))
    train_unified(mixed_recipe(), str(laid["prompts"]), out, QUIET)
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert json.loads((out / "config.json").read_text())["steps"] == 10
