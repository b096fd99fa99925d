"""JSON and TOML of others: what they hold, or one sentence that names the file. And what is read where a file is only a pointer to one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import mixed_recipe, text_tokenizer

from stages.data.sample import Sample
from stages.data.scenes import Scene
from stages.data.shards import ShardWriter
from stages.documents import MAX_DEPTH, Document, Int, parse_json, parse_toml, read_object, sound
from stages.errors import DataError, MmgenError, RecipeError, UsageError
from stages.evaluate import evaluate
from stages.inspect_path import describe
from stages.metrics.psnr import is_reconstruction
from stages.metrics.score import prompt_key
from stages.model import build_model
from stages.options import RunOptions
from stages.parts.tokenizers import ReleasedTokenizerConfig, load_tokenizer
from stages.recipe import load_recipe
from stages.report import report
from stages.run import Run
from stages.tools.toolbox import open_tools
from stages.training.checkpoint import load_model, open_checkpoint, save_checkpoint
from stages.training.released import read_released

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
QUIET = RunOptions(quiet=True)


class Known(Document):
    count: Int = 0
    names: dict[str, str] | None = None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"), ("{", "expected JSON"), ("[]", r"expected an object .*, found \[\]"), ("null", "found None"), ("3", "found 3"),
        ('{"count": "3"}', "count: .*found '3'"), ('{"count": 1e400}', "count"), ('{"count": 99999999999999999999999}', "count"),
        ('{"count": ' + "9" * 5000 + "}", "expected JSON"), ('{"names": {"a": 3}}', r"names\.a: .*found 3"), ('{"count": true}', "count"),
        ('{"a":' * 50_000, "nested too deeply"), ("[" * 100_000, "nested too deeply"), ('{"a":' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        ('{"x": "\\ud800"}', "half a surrogate pair"), ('{"\\udfff": 1}', "half a surrogate pair"), ("\xff\xfe".encode("latin1"), "no UTF-8"),
        (POINTER, "Git LFS"),
    ],
)  # fmt: skip
def test_what_is_no_such_object_is_one_sentence_with_the_file(tmp_path: Path, text: str | bytes, told: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told) as caught:
        read_object(file, Known)
    assert caught.value.message.startswith(f"{file}: ") and len(caught.value.message) < 500


def test_what_is_not_known_passes(tmp_path: Path) -> None:
    """Files of other programs and of later versions; a byte-order mark; the last of repeated keys; numbers that nobody reads."""
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"count": 1, "count": 2, "model_max_length": 1000000000000000019884624838656, "x": [NaN]}'
    )
    found = read_object(tmp_path / "a.json", Known)
    assert found["count"] == 2 and found["model_max_length"] > 2**64
    assert sound({"count": "3", "names": {"a": "b"}, "other": 1}, Known) == {"names": {"a": "b"}, "other": 1}
    assert sound([1], Known) == {}
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert parse_json(json.dumps(deep), "x") == deep


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**9)
    for name in ("folder.json", "loop.json", "large.json", "absent.json"):
        with pytest.raises(DataError, match=name):
            read_object(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000, "a = " + "{a=" * 5000, "a = " + "[" * 300 + "]" * 300, ".".join(["a"] * 900) + " = 1", ".".join(["a"] * 200_000) + " = 1",
        "a = " + "9" * 5000, "a = 0x" + "f" * 6000, "a = 99999999999999999999", "a = 1\na = 2", "x" * 2_000_000, "a = 2020-99-99", "\ufeff\ufeff",
    ],
)  # fmt: skip
def test_toml_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="here"):
        parse_toml(text, "here", error=UsageError)
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=str(file)):
        load_recipe(file)
    with pytest.raises(UsageError, match=str(file)):
        open_tools(file)


@pytest.mark.parametrize(
    "change",
    [
        "name = 3", "name = 2020-01-01", "family = []", "size = 3", "sizes = 3", "sizes = []", "sizes = { tiny = 3, small = 3, paper = 3 }",
        "ports = 3", "tasks = []", "phases = 3", "phases = [3]", "phases = [[]]", "backbones = 3", "backbones = { lm = 3 }", "init_from = 3",
        "autoencoders = []", "paper = 3", "sample = { x = 3 }", "ports = { '' = {} }", "backbones = { keys = { kind = 'transformer' } }",
        "tokenizers = { bpe = { kind = [3] } }", "encoders = { 'a.b' = { kind = 'x' } }",
    ],
)  # fmt: skip
def test_a_recipe_with_other_types_is_a_mistake_of_the_recipe(tmp_path: Path, change: str) -> None:
    key = change.split(" ")[0]
    lines = mixed_recipe().to_toml()
    tables = parse_toml(lines, "x")
    tables.pop(key, None)
    import tomli_w

    (tmp_path / "recipe.toml").write_text(f"{change}\n{tomli_w.dumps(tables)}", encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", '{"tokenizers": 3}', '{"tokenizers": {"a": 3}}', '{"grids": {"a": "x"}}', '{"picture_size": [3]}', "[" * 99999]
)
def test_a_config_that_is_none_is_bad_data(tmp_path: Path, text: str) -> None:
    recipe = mixed_recipe()
    save_checkpoint(tmp_path, recipe, build_model(recipe, 0).state_dict())
    (tmp_path / "config.json").write_text(text)
    for act in (lambda: open_checkpoint(tmp_path), lambda: load_model(tmp_path), lambda: describe(str(tmp_path))):
        with pytest.raises(DataError, match=r"config\.json: "):
            act()


@pytest.mark.parametrize("text", ["[]", "{", '{"identity": 3}', '{"identity": {"stage": 3}}', '{"launches": 3}', "[" * 99999])
def test_a_record_that_is_none_says_whose_folder_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UsageError, match=r"run\.json: "), Run(tmp_path, stage="x", options=QUIET, kind="checkpoint"):
        pass
    if text.startswith("{") and len(text) > 1:  # a page shows what can be shown
        report([tmp_path], tmp_path / "r.html")
    else:
        with pytest.raises(MmgenError, match=r"run\.json: "):
            report([tmp_path], tmp_path / "r.html")
    assert (tmp_path / "run.json").read_text() == text


def test_a_record_that_descends_from_itself_is_told_once(tmp_path: Path) -> None:
    entry = {"path": str(tmp_path), "fingerprint": "x", "provenance": {"command": 3, "inputs": "x", "machine": [], "versions": {"a": 3}}}
    record = {"stage": "x", "command": ["mmgen"], "started": "9999", "finished": "0", "inputs": [entry, {**entry, "provenance": None}]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    report([tmp_path], tmp_path / "r.html")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", load_model),
        ("model.safetensors", read_released),
        ("x.safetensors.index.json", read_released),
        ("weights.ckpt", lambda folder: read_released(folder / "weights.ckpt")),
        ("config.json", open_checkpoint),
        ("recipe.toml", open_checkpoint),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer.json", lambda folder: ReleasedTokenizerConfig().adopt(folder)),
        ("tokenizer_config.json", load_tokenizer),
        ("w.gguf", lambda folder: read_released(folder / "w.gguf", family="backbones")),
    ],
)
def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    recipe = mixed_recipe()
    save_checkpoint(tmp_path, recipe, build_model(recipe, 0).state_dict())
    if "tokenizer" in name:
        text_tokenizer().save(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(MmgenError, match="Git LFS") as caught:
        read(tmp_path)
    assert name in caught.value.message and "git lfs pull" in caught.value.hint


# --- fields of samples ------------------------------------------------------------------------------------------------------------

THING = {"size": "large", "texture": "plain", "colour": "red", "shape": "circle", "place": "top left"}


@pytest.mark.parametrize(
    "graph",
    [
        [], 3, {}, {"level": 99, "objects": []}, {"level": "1", "objects": []}, {"level": True, "objects": []}, {"level": 1, "objects": 3},
        {"level": 1, "objects": [3]}, {"level": 1, "objects": [{}]}, {"level": 1, "objects": [THING, THING]}, {"level": 1, "objects": [{**THING, "colour": []}]},
        {"level": 1, "objects": [{**THING, "place": "on the moon"}]},
    ],
)  # fmt: skip
def test_a_scene_that_is_none_is_bad_data(graph: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a scene"):
        Scene.from_json(graph)
    picture = np.zeros((32, 32, 3), np.uint8)
    with ShardWriter(tmp_path / "samples") as writer:
        writer.write(Sample("a", {"image": picture, "sample.image": picture, "caption": "x", "sample.caption": "y", "scene": graph}))
    with pytest.raises(DataError, match=r"samples.*a: not a scene"):
        evaluate(str(tmp_path / "samples"), None, tmp_path / "scores", QUIET)
    report([tmp_path / "samples"], tmp_path / "r.html")


@pytest.mark.parametrize("meta", [[], 3, "x", {"tasks": 3}, {"tasks": [3], "prompt_key": []}, {"resize": [], "split": {}}])
def test_a_meta_of_others_says_nothing(meta: Any, tmp_path: Path) -> None:
    assert not is_reconstruction({"sample.image": 1, "image": 1, "meta": meta}) and prompt_key({"meta": meta, "__key__": "k"}) == "k"
    with ShardWriter(tmp_path / "samples") as writer:
        for key in ("a", "b"):
            writer.write(Sample(key, {"sample.qa": [{"question": "q", "answer": "x", "truth": "x", "type": "t"}], "meta": meta}))
    evaluate(str(tmp_path / "samples"), None, tmp_path / "scores", QUIET)
    report([tmp_path / "samples", tmp_path / "scores"], tmp_path / "r.html")


@pytest.mark.parametrize(
    "fields",
    [
        {"sample.qa": 3}, {"sample.qa": [3]}, {"sample.qa": [{"question": "q"}]}, {"sample.qa": [{"question": "q", "answer": 3, "truth": "x", "type": "t"}]},
        {"sample.likelihood": [{"task": "t", "nats": 1.0, "bytes": 0}]}, {"sample.likelihood": [{"task": [], "nats": 1.0, "bytes": 3}]},
        {"sample.plan": [], "plan": "x"}, {"sample.steps": [{"call": "x"}]}, {"sample.plan": "x", "plan": "", "sample.tools": [3]},
        {"sample.image": np.zeros(3, np.float32), "image": np.zeros((2, 2, 3), np.uint8)}, {"sample.caption": ["x"], "image": np.zeros((2, 2, 3), np.uint8)},
        {"sample.image": {"a": 1}, "image": np.zeros((2, 2, 3), np.uint8), "meta": {"tasks": ["reconstruct"]}},
    ],
)  # fmt: skip
def test_outputs_that_are_not_what_their_name_says_are_bad_data(fields: dict[str, Any], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "samples") as writer:
        writer.write(Sample("a", fields))
    with pytest.raises(DataError, match=r"samples.*a: "):
        evaluate(str(tmp_path / "samples"), None, tmp_path / "scores", QUIET)
    report([tmp_path / "samples"], tmp_path / "r.html")  # a page leaves them out


def test_weights_in_memory_are_those_of_the_file(tmp_path: Path) -> None:
    """The reader of released files gives what torch.save wrote, and says of a text that it is none."""
    torch.save({"state_dict": {"a": torch.arange(3)}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("<html>log in</html>")
    (tmp_path / "c.safetensors").write_text("<html>log in</html>")
    for name in ("b.pt", "c.safetensors"):
        with pytest.raises(DataError, match="cannot be read as"):
            read_released(tmp_path / name)
