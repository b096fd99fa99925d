"""sample: shards in, shards out. What is written beside what, and that an answer depends on its prompt alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_learns import samples_for, with_edits
from worlds import World, make_world, mixed_recipe, sample_of

from stages.data.sample import Sample
from stages.data.shards import ShardWriter, open_shards
from stages.errors import DataError, UsageError
from stages.options import RunOptions
from stages.parts.tokenizers.byte_bpe import ByteBPEConfig
from stages.recipe import load_recipe
from stages.sample import readable, sample, save_pictures
from stages.train_unified import train_unified

PICTURE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    samples = [sample_of(number, image=PICTURE) for number in range(5)]
    samples[3].fields["qa"] = []  # a picture nobody asks about
    return make_world(tmp_path_factory.mktemp("world"), mixed_recipe(), samples)


@pytest.fixture(scope="module")
def model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model after one step, which writes nonsense: enough to see where it goes."""
    out = tmp_path_factory.mktemp("model") / "run"
    return train_unified(mixed_recipe(), str(world.shards), out, RunOptions(quiet=True, dtype="fp32", max_steps=1))


def write(model: Path, world: World | None, out: Path, *, seed: int = 0, limit: int | None = None, **keys: Any) -> list[Sample]:
    prompts = str(world.shards) if world is not None else None
    return list(open_shards(str(sample(model, prompts, out, RunOptions(quiet=True, seed=seed, limit=limit), **keys))))


def written(entry: Sample) -> dict[str, Any]:
    return {name: value for name, value in entry.fields.items() if name.startswith("sample.")}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        np.array_equal(value, second[name]) if isinstance(value, np.ndarray) else value == second[name] for name, value in first.items()
    )


def test_answers_stand_beside_their_prompt_under_its_key(model: Path, world: World, tmp_path: Path) -> None:
    found = write(model, world, tmp_path / "out")
    assert [entry.key for entry in found] == [entry.key for entry in world.samples]
    for entry, prompt in zip(found, world.samples, strict=True):
        assert entry.fields["caption"] == prompt.fields["caption"]
        np.testing.assert_array_equal(entry.fields["image"], PICTURE)
        assert set(written(entry)) == {"sample.image", "sample.qa"}
        assert entry.fields["sample.image"].shape == (8, 12, 3)
        assert entry.fields["meta"] == {"prompt_key": prompt.key, "seed": 0, "tasks": ["draw", "paint", "answer"], "number": 0}


def test_every_question_gets_an_answer_and_keeps_its_truth(model: Path, world: World, tmp_path: Path) -> None:
    for entry, prompt in zip(write(model, world, tmp_path / "out", tasks=["answer"]), world.samples, strict=True):
        asked = prompt.fields["qa"]
        assert [(record["question"], record["truth"]) for record in entry.fields["sample.qa"]] == [
            (r["question"], r["answer"]) for r in asked
        ]
        assert all(isinstance(record["answer"], str) for record in entry.fields["sample.qa"])


def test_several_answers_to_one_prompt_have_keys_of_their_own_and_differ(model: Path, world: World, tmp_path: Path) -> None:
    found = write(model, world, tmp_path / "out", tasks=["draw"], num_samples=3, limit=2)
    assert [entry.key for entry in found] == [f"{key}-s{number}" for key in ("0000", "0001") for number in (1, 2, 3)]
    assert [entry.fields["meta"]["prompt_key"] for entry in found] == ["0000"] * 3 + ["0001"] * 3
    assert len({entry.fields["sample.image"].tobytes() for entry in found}) > 3


def test_an_answer_does_not_depend_on_what_else_is_asked(model: Path, world: World, tmp_path: Path) -> None:
    """One prompt alone, one task alone, the first of several: the same answer."""
    everything = [written(entry) for entry in write(model, world, tmp_path / "all", num_samples=1)]
    first = written(write(model, world, tmp_path / "limited", limit=1)[0])
    assert same(first, everything[0])
    answers = written(write(model, world, tmp_path / "answers", tasks=["answer"])[2])
    assert answers["sample.qa"] == everything[2]["sample.qa"]
    several = written(write(model, world, tmp_path / "several", num_samples=2)[0])
    assert same(several, everything[0])


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(model: Path, world: World, tmp_path: Path) -> None:
    def tars(name: str, seed: int) -> bytes:
        write(model, world, tmp_path / name, seed=seed, tasks=["draw"])
        return b"".join(path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar")))

    assert tars("a", 1) == tars("b", 1)
    assert tars("a2", 1) != tars("c", 2)


def test_the_untrained_control_is_another_network(model: Path, world: World, tmp_path: Path) -> None:
    trained = write(model, world, tmp_path / "trained", tasks=["draw"])
    control = write(model, world, tmp_path / "control", tasks=["draw"], untrained=True, seed=9)
    assert any(not same(written(a), written(b)) for a, b in zip(trained, control, strict=True))


def test_one_prompt_from_the_command_line_is_a_sample_too(model: Path, tmp_path: Path) -> None:
    (drawn,) = write(model, None, tmp_path / "drawn", prompt="two green triangles", tasks=["draw"])
    assert drawn.fields["caption"] == "two green triangles"
    assert drawn.fields["sample.image"].shape == (8, 12, 3)
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    (told,) = write(model, None, tmp_path / "told", prompt="how many?", image=tmp_path / "picture.png", tasks=["answer"])
    assert [record["question"] for record in told.fields["sample.qa"]] == ["how many?"]


def test_a_picture_from_the_command_line_is_seen_as_a_viewer_shows_it(model: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(PICTURE)))  # the tag turns it back
    stored.save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.full((8, 12), 0x8080, np.uint16)).save(tmp_path / "grey16.png")
    Image.new("RGBA", (12, 8)).save(tmp_path / "transparent.gif", save_all=True, append_images=[Image.new("RGBA", (12, 8), "red")])
    expected = {"turned.png": PICTURE, "grey16.png": np.full((8, 12, 3), 128), "transparent.gif": np.full((8, 12, 3), 255)}
    for name, shown in expected.items():
        (found,) = write(model, None, tmp_path / f"out-{name}", prompt="how many?", image=tmp_path / name, tasks=["answer"])
        np.testing.assert_array_equal(found.fields["image"], shown)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png: not a PNG, JPEG, WebP or GIF picture"):
        write(model, None, tmp_path / "out", prompt="how many?", image=tmp_path / "text.png")
    with pytest.raises(DataError, match=r"absent\.png: No such file"):
        write(model, None, tmp_path / "out", prompt="how many?", image=tmp_path / "absent.png")


def test_pictures_are_saved_as_files_when_asked_for(model: Path, world: World, tmp_path: Path) -> None:
    found = write(model, world, tmp_path / "out", tasks=["draw"], save_files=True, limit=2)
    for entry in found:
        with Image.open(tmp_path / "out" / "files" / f"{entry.key}.image.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), entry.fields["sample.image"])


def test_how_to_sample_may_change_and_nothing_else(model: Path, world: World, tmp_path: Path) -> None:
    few = write(model, world, tmp_path / "few", tasks=["draw"], sets=["sample.codes.num_steps=1"])
    many = write(model, world, tmp_path / "many", tasks=["draw"], sets=["sample.codes.num_steps=6"])
    assert any(not same(written(a), written(b)) for a, b in zip(few, many, strict=True))
    with pytest.raises(UsageError, match=r"--set backbones\.lm\.width=8: only sample\.\* can change after training"):
        write(model, world, tmp_path / "wide", sets=["backbones.lm.width=8"])


def test_prompts_that_fit_no_task_say_what_each_task_needs(model: Path, tmp_path: Path) -> None:
    bare = make_world(tmp_path / "bare", mixed_recipe(), [Sample("a", {"title": "x"})])
    with pytest.raises(DataError, match=r"fit no task of 'test' \(.*'draw' needs caption.*they have title"):
        write(model, bare, tmp_path / "out")
    with pytest.raises(DataError, match="the task 'draw' needs the field caption"):
        write(model, bare, tmp_path / "out2", tasks=["draw"])
    with pytest.raises(UsageError, match="--task drew: recipe 'test' has no such task") as caught:
        write(model, bare, tmp_path / "out3", tasks=["drew"])
    assert caught.value.hint == "did you mean 'draw'?"


def test_the_run_records_model_and_prompts(model: Path, world: World, tmp_path: Path) -> None:
    write(model, world, tmp_path / "out", tasks=["draw"], limit=1)
    record = json.loads((tmp_path / "out" / ".mmgen" / "run.json").read_text())
    assert record["stage"] == "sample"
    assert [entry["path"] for entry in record["inputs"]] == [str(model), str(world.shards)]
    assert all(len(entry["fingerprint"]) == 64 for entry in record["inputs"])


def test_a_story_whose_first_picture_is_missing_is_told_from_the_beginning(tmp_path: Path) -> None:
    """BAGEL draws the source from the caption, reads it again in both forms, and edits it; with the source given it only edits."""
    recipe = load_recipe("bagel", size="tiny", sets=["sample.draw.num_steps=2", "phases.continue.steps=0", "phases.tune.steps=0"])
    samples = with_edits(recipe, samples_for(recipe))[:2]
    world = make_world(tmp_path / "world", recipe, samples)
    options = RunOptions(quiet=True, dtype="fp32", max_steps=1)
    model = train_unified(recipe, str(world.shards), tmp_path / "run", options)
    with ShardWriter(tmp_path / "words", split="train") as writer:
        for entry in samples:
            writer.write(Sample(entry.key, {name: entry.fields[name] for name in ("caption", "instruction")}))
    told = list(open_shards(str(sample(model, str(tmp_path / "words"), tmp_path / "told", options, tasks=["story"]))))
    assert [set(written(entry)) for entry in told] == [{"sample.source", "sample.result"}] * 2
    assert not np.array_equal(told[0].fields["sample.source"], told[1].fields["sample.source"])
    edited = write(model, world, tmp_path / "edited", tasks=["story"])
    assert [set(written(entry)) for entry in edited] == [{"sample.result"}] * 2
    with pytest.raises(DataError, match="needs the field source"):
        sample(model, str(tmp_path / "words"), tmp_path / "none", options, tasks=["edit"])


def test_a_nul_that_a_model_writes_is_no_text_and_is_shown_as_what_it_is() -> None:
    tokenizer = ByteBPEConfig(vocab_size=300).train(["a scene"])
    nul = tokenizer.encode("\0")
    assert tokenizer.decode(nul) == "\0"  # like any byte it has a token
    assert readable(tokenizer, [*tokenizer.encode("a "), *nul, *tokenizer.encode("scene ")]) == "a \ufffdscene"


def test_saved_files_lie_side_by_side_whatever_the_keys_are(tmp_path: Path) -> None:
    keys = ["plain", "a/b/000", "a-b/000", "猫", 'x:*?"<>|', "CON", "k" * 1000, "-rf", " spaces "]
    for key in keys:
        fields = {"sample.image": PICTURE, "sample.caption": f"of {key}\ud800", "sample.image.latents": np.zeros((2, 3, 4), np.float32)}
        save_pictures(Sample(key, fields), tmp_path / "files")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 * len(keys)
    assert all(path.parent == tmp_path / "files" for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "files" / "plain.image.png").is_file()
    assert (tmp_path / "files" / "猫.caption.txt").read_text() == "of 猫\\ud800\n"
    assert {path.suffix for path in (tmp_path / "files").iterdir()} == {".png", ".txt"}
