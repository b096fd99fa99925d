"""Names, captions, recipes and paths from outside may hold anything; on stdout and stderr they stay text, of which a terminal obeys nothing."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from test_architecture import SOURCES, name_of, parsed
from typer.testing import CliRunner, Result
from worlds import MIXED, World, make_world, mixed_recipe, sample_of, text_tokenizer

from mmgen_cli.app import app
from stages.data.sample import Sample
from stages.errors import DataError
from stages.escape import visible
from stages.progress import Progress

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent

FORGED = "error: everything is lost"
# clear the screen, set the clipboard and the title, colour by a C1 byte; forge a line; turn the direction; break lines in Unicode; hide
EVIL = f"a\x1b[2J\x1b]52;c;aGk=\x07\x1b]0;t\x1b\\\x9b31m\n{FORGED}\r{FORGED}\u202e\u2066\u2028\u200b\x7fz"
READABLE = "猫在左边 قطة 👩‍👩‍👧 é"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def check(answer: Result, *codes: int) -> str:
    """Nothing a terminal obeys, no forged line, no fault of ours; returns what was said, stdout first."""
    said = ""
    for stream in (answer.stdout_bytes, answer.stderr_bytes):
        text = stream.decode("utf-8")
        assert OBEYED.search(text) is None, text
        assert not any(line.strip().startswith(FORGED) for line in text.split("\n")), text
        said += text
    assert "fault of mmgen" not in said, said
    assert answer.exit_code in codes, said
    return said


def call(*arguments: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    return check(CliRunner().invoke(app, [str(argument) for argument in arguments]), *codes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is hostile."""
    path = tmp_path_factory.mktemp("outside") / EVIL
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    return path


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    samples = [sample_of(number, caption=f"{number} {EVIL}", **{"comment": READABLE}) for number in range(3)]
    return make_world(folder, mixed_recipe(), [Sample(entry.key, entry.fields) for entry in samples])


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """A recipe whose name and whose task's name are hostile."""
    text = MIXED.replace('arxiv = "0000.00000"', f'arxiv = "0000.00000"\ntitle = {json.dumps(EVIL)}\ndiffers = [{json.dumps(EVIL)}]')
    text = text.replace("[tasks.draw]", f"[tasks.{json.dumps(EVIL)}]").replace("draw = 1.0", f"{json.dumps(EVIL)} = 1.0")
    text = text.replace("vocab_size = 300", f"vocab_size = {text_tokenizer().vocab_size}")
    (folder / "mine.toml").write_text(f"name = {json.dumps(EVIL)}\n{text}", encoding="utf-8")
    return folder / "mine.toml"


@pytest.fixture(scope="module")
def model(folder: Path, recipe: Path, world: World) -> Path:
    call("train-unified", world.shards, "--recipe", recipe, "--max-steps", "1", "--out", folder / "model")
    return folder / "model"


def test_a_whole_run_from_a_hostile_folder_with_a_hostile_recipe(folder: Path, recipe: Path, world: World, model: Path) -> None:
    shards = world.shards
    assert READABLE in call("inspect", shards), "other scripts stay as they are"
    assert "a\\u001b[2J" in call("inspect", shards, "--key", "0001")
    call("verify", shards)
    call("inspect", model)
    for plan in (("train-unified", shards, "--recipe", recipe), ("sample", model, shards)):
        call(*plan, "--out", folder / "planned", "--dry-run")
    call("sample", model, shards, "--task", EVIL, "--task", "answer", "--out", folder / "samples", "--limit", "2", "--save-files")
    call("eval", folder / "samples", "--out", folder / "scores", codes=(3,))
    call("report", model, folder / "samples", "--out", folder / "report.html")
    call("recipes", recipe, "--draw", folder / "drawing.svg")
    call("recipes", recipe, "--size", "tiny", codes=(0, 2))
    json.loads((model / "run.json").read_text())
    assert (model / "README.md").read_text().splitlines()[4] == "---", "front matter is what it was"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_json_on_stdout_is_one_value_in_ascii(world: World, model: Path, command: str) -> None:
    for target in [world.shards] if command == "verify" else [world.shards, model]:
        answer = CliRunner().invoke(app, [command, str(target), "--json"])
        check(answer, 0)
        assert answer.stdout_bytes.isascii()
        json.loads(answer.stdout)


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path.parent


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Path:
    members = {"k1.caption.txt": b"one", "k2.caption.txt": b"\xff", f"{EVIL}.caption.txt": b"x", f"k3.{EVIL}": b"x", f"k4.{EVIL}.txt": b"x"}
    return tar_of(folder / os.fsdecode(b"no-utf-8-\xff") / "data-000000.tar", members)


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "DATA"),
        ("inspect", "DATA", "--json"),
        ("inspect", "DATA", "--key", EVIL),
        ("verify", "DATA"),
        ("verify", "DATA", "--json"),
        ("verify", EVIL),
        ("import", "shards", "DATA", "--out", "OUT"),
        ("import", "folder", "DATA", "--out", "OUT"),
        ("import", EVIL, "--out", "OUT"),
        ("import", "scenes", "--out", "DATA"),
        ("tokenize", "DATA", "--tokenizer", EVIL, "--out", "OUT"),
        ("train-unified", "DATA", "--recipe", EVIL, "--out", "OUT"),
        ("train-unified", "DATA", "--recipe", "show-o", "--size", "tiny", "--set", f"{EVIL}=1", "--out", "OUT"),
        ("train-unified", "DATA", "--recipe", "show-o", "--size", EVIL, "--out", "OUT"),
        ("sample", EVIL, "DATA", "--out", "OUT"),
        ("sample", f"hf://{EVIL}", "DATA", "--out", "OUT"),
        ("sample", "MODEL", "DATA", "--task", EVIL * 2, "--out", "OUT"),
        ("sample", "MODEL", "DATA", "--tools", "TOOLS", "--out", "OUT"),
        ("eval", EVIL, "--out", "OUT"),
        ("report", "DATA", "--out", "OUT.html"),
        ("recipes", EVIL),
        (EVIL,),
        ("inspect", f"--{EVIL}"),
    ],
)
def test_a_mistake_and_damaged_data_are_told_without_obeying_their_names(
    command: tuple[str, ...], damaged: Path, model: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "tools.toml").write_text(f'[tools.{json.dumps(EVIL)}]\nmodel = "x"\n', encoding="utf-8")
    places = {"DATA": damaged, "OUT": tmp_path / "out", "OUT.html": tmp_path / "o.html", "MODEL": model, "TOOLS": folder / "tools.toml"}
    call(*(places.get(word, word) for word in command), codes=(0, 2, 3))


def test_bad_samples_are_listed_one_json_object_a_line(damaged: Path, tmp_path: Path) -> None:
    call("import", "shards", damaged, "--out", tmp_path / "out", "--max-bad-fraction", "0.9")
    text = (tmp_path / "out" / "train" / ".mmgen" / "bad_samples.jsonl").read_text()
    assert OBEYED.search(text) is None
    assert any(FORGED in json.loads(line)["path"] for line in text.rstrip("\n").split("\n"))


def test_a_terminal_without_unicode_gets_numbers_instead_of_an_error(world: World) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-m", "mmgen_cli", "inspect", world.shards], capture_output=True, env=plain, cwd=ROOT)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout.isascii()
    assert READABLE.encode("ascii", "backslashreplace") in answer.stdout


def test_lines_of_our_own_stay_lines() -> None:
    error = DataError(f"3 of 4 are bad: {EVIL}", details=[f"first: {EVIL}", "second"], hint=EVIL)
    assert len(error.message.split("\n")) == 3
    assert error.message.split("\n")[1].startswith("  first: a\\u001b")
    assert "\n" not in error.hint
    assert str(error) == error.message


def prints(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "sys.stdout.write", "sys.stderr.write"):
            yield f"{name_of(path)}:{node.lineno}"


def test_nothing_is_printed_but_through_one_module() -> None:
    allowed = {"stages.terminal", "mmgen_cli.door"}  # the door: what a library prints while a tar is streamed goes to stderr
    found = [where for path in SOURCES for where in prints(path)]
    assert {where.split(":")[0] for where in found} <= allowed, found
    assert sum(where.startswith("mmgen_cli.door") for where in found) == 1, found


def front_matter(card: Path) -> dict[str, Any]:
    return yaml.safe_load(card.read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)[0])


SPLITS = [
    "a: b",
    "no",
    "2014",
    "- x",
    "train\nlicense: mit",
    "`x` | <b> ![i](x)",
    "[l](javascript:x)",
    "x\n---\n# y",
    EVIL.replace("/", ""),
]


def test_a_data_card_lists_its_splits_whatever_they_are_called(tmp_path: Path) -> None:
    for split in SPLITS:
        tar_of(tmp_path / "raw" / split / "a.tar", {"k.caption.txt": b"one"})
    call("import", "shards", tmp_path / "raw", "--out", tmp_path / "set")
    card = tmp_path / "set" / "README.md"
    found = front_matter(card)
    assert found.keys() == {"license", "configs"}
    assert found["license"] == "unknown"
    assert sorted(entry["split"] for entry in found["configs"][0]["data_files"]) == sorted(map(visible, SPLITS))
    tokens = MarkdownIt("commonmark").enable("table").parse(card.read_text().split("\n---\n", 1)[1])
    inner = [child.type for token in tokens for child in token.children or []]
    assert {"image", "link_open"}.isdisjoint(inner)
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert sum(token.type == "tr_open" for token in tokens) == len(SPLITS) + 1


def test_a_model_card_says_the_recipe_s_names_as_text(model: Path) -> None:
    text = (model / "README.md").read_text()
    assert front_matter(model / "README.md") == {"library_name": "mmgen", "tags": ["mmgen"]}
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert [child.attrs["href"] for token in tokens for child in token.children or [] if child.type == "link_open"] == [
        "https://arxiv.org/abs/0000.00000"
    ]
    assert OBEYED.search(text) is None


def test_the_bar_of_a_terminal_obeys_no_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("train")
    progress.on_terminal = True
    progress.update(1, 3, EVIL)
    progress.say(f":warning: [bold]{EVIL}")
    progress.close()
    said = capsys.readouterr().err
    assert ":warning: [bold]a\\u001b" in said
    assert not any(found in said for found in ("\x1b]", "\x1b[31m", "\x9b", "\u202e", "\u2028"))
    assert not any(line.strip().startswith(FORGED) for line in said.split("\n"))


def test_numbers_that_are_not_finite_leave_the_json_valid(tmp_path: Path) -> None:
    np.save(array := io.BytesIO(), np.array([1.0, np.nan], np.float32))
    tar_of(tmp_path / "set" / "a.tar", {"k.array.npy": array.getvalue()})
    answer = CliRunner().invoke(app, ["inspect", str(tmp_path / "set"), "--json"])
    found = json.loads(answer.stdout, parse_constant=lambda name: pytest.fail(name))
    assert found["first"]["fields"]["array"]["max"] is None
