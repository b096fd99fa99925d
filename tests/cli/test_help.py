"""What a stranger sees first: help pages, the list of flags, completion, and how fast they come."""

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import Result

from mmgen_cli.app import app
from stages.options import RunOptions
from stages.recipe import load_recipe

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
COMMANDS = [
    "import",
    "pretrain-tokenizer",
    "tokenize",
    "align",
    "train-unified",
    "sample",
    "eval",
    "report",
    "recipes",
    "inspect",
    "verify",
]

TRAINING = """--recipe --set --size --val --max-steps --max-minutes --limit --seed --device --dtype
    --on-bad-sample --max-bad-fraction --push --out --overwrite --dry-run --json --quiet"""
FLAGS = {  # adding a flag is a decision: it is made here as well
    "import": "",
    "pretrain-tokenizer": TRAINING + " --init",
    "tokenize": """--tokenizer --check --limit --device --on-bad-sample --max-bad-fraction
        --out --overwrite --dry-run --json --quiet""",
    "align": TRAINING + " --init --tokenizer --parallel --workers",
    "train-unified": TRAINING + " --init --tokenizer --parallel --workers",
    "sample": """--task --prompt --image --num-samples --tools --save-files --set --limit --seed --device
        --on-bad-sample --max-bad-fraction --out --overwrite --dry-run --json --quiet""",
    "eval": "--reference --map --limit --seed --device --out --overwrite --dry-run --json --quiet",
    "report": "--out --json",
    "recipes": "--draw --size --set --json",
    "inspect": "--key --json",
    "verify": "--index --json",
}


def run_mmgen(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmgen_cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def command_named(name: str) -> object:
    group = typer.main.get_command(app)
    return group.get_command(None, name)  # type: ignore[attr-defined]


def test_there_are_eleven_commands_in_the_order_of_the_story(invoke: Invoke) -> None:
    listed = invoke("--help").stdout.split("Commands:")[1].split("Exit codes:")[0]
    assert re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE) == COMMANDS


def test_bare_mmgen_prints_help_and_exits_0(invoke: Invoke) -> None:
    answer = invoke()
    assert answer.exit_code == 0
    assert answer.stdout == invoke("--help").stdout


def test_version_is_that_of_the_distribution(invoke: Invoke) -> None:
    answer = invoke("--version")
    assert answer.exit_code == 0
    assert re.fullmatch(r"mmgen (\d+\.\d+\.\d+\S*|\(not installed\))\n", answer.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_every_command_are_these(name: str) -> None:
    flags = {flag for parameter in command_named(name).params for flag in parameter.opts if flag.startswith("--")}  # type: ignore[attr-defined]
    assert flags - {"--help"} == set(FLAGS[name].split())


def modules_behind(module: str) -> set[Path]:
    """The files of `stages` that a module imports, directly or through others."""
    found: set[Path] = set()
    ahead = [ROOT / (module.replace(".", "/") + ".py")]
    while ahead:
        path = ahead.pop()
        if path not in found and path.is_file():
            found.add(path)
            for name in re.findall(r"^(?:from|import) (stages[\w.]*)", path.read_text(), re.MULTILINE):
                ahead += [ROOT / (name.replace(".", "/") + ".py"), ROOT / name.replace(".", "/") / "__init__.py"]
    return found


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("pretrain-tokenizer", "stages.pretrain_tokenizer"),
        ("tokenize", "stages.tokenize_shards"),
        ("align", "stages.align"),
        ("train-unified", "stages.train_unified"),
        ("sample", "stages.sample"),
        ("eval", "stages.evaluate"),
    ],
)
def test_no_flag_is_without_effect(name: str, module: str) -> None:
    """Every flag that becomes a field of RunOptions is read somewhere behind the stage it is offered for."""
    read = {word for path in modules_behind(module) for word in re.findall(r"\boptions\.(\w+)", path.read_text())}
    offered = {flag.removeprefix("--").replace("-", "_") for flag in FLAGS[name].split()} & {field.name for field in fields(RunOptions)}
    assert offered - read == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_opens_with_one_sentence_and_ends_with_an_example(invoke: Invoke, name: str) -> None:
    answer = invoke(name, "--help")
    assert answer.exit_code == 0
    paragraphs = answer.stdout.split("\n\n")
    assert paragraphs[0].startswith(f"Usage: mmgen {name}")
    sentence = " ".join(paragraphs[1].split())
    assert re.fullmatch(r"[A-Z][^.]*(\.json[^.]*)?\.", sentence), sentence
    assert paragraphs[-1].startswith(f"Example:\n  mmgen {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    for parameter in command_named(name).params:  # type: ignore[attr-defined]
        assert parameter.help, parameter.name


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("import", "report", "recipes", "inspect", "verify")])
def test_the_example_in_the_help_is_a_command_that_parses(invoke: Invoke, stages: dict[str, Any], name: str, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    example = shlex.split(invoke(name, "--help").stdout.split("Example:\n")[1])
    answer = invoke(*example[1:])
    assert (answer.exit_code, answer.stderr) == (0, "")
    assert answer.stdout.strip() == example[example.index("--out") + 1]


def test_the_examples_of_mmgen_help_parse(invoke: Invoke, stages: dict[str, Any], tmp_path: Path) -> None:
    os.chdir(tmp_path)
    lines = invoke("--help").stdout.split("Example:\n")[1].strip().splitlines()
    assert [shlex.split(line)[1] for line in lines] == [
        *COMMANDS[:2],
        "pretrain-tokenizer",
        "tokenize",
        "train-unified",
        "sample",
        "eval",
        "report",
    ]
    for line in lines[1:]:  # `import` is in test_import.py
        answer = invoke(*shlex.split(line)[1:])
        assert (answer.exit_code, answer.stderr) == (0, ""), line


def test_the_examples_name_recipes_phases_and_tasks_that_exist(invoke: Invoke) -> None:
    pages = [invoke(*arguments, "--help").stdout for arguments in [[], *([name] for name in COMMANDS)]]
    lines = {line.strip() for page in pages for line in page.split("Example:\n")[1].splitlines()}
    trained = [shlex.split(line) for line in lines if "--recipe" in line]
    assert {words[1] for words in trained} == {"pretrain-tokenizer", "align", "train-unified"}
    for words in trained:
        recipe = load_recipe(words[words.index("--recipe") + 1], size="tiny")
        assert not recipe.phases or recipe.phases_for(words[1]), words  # a text tokenizer needs no phase
    (sampled,) = {words[words.index("--task") + 1] for words in map(shlex.split, lines) if "--task" in words}
    assert sampled in load_recipe("show-o", size="tiny").tasks


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_instant_and_imports_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from mmgen_cli.app import app; sys.argv[1:] = {arguments}\ntry: app()\nfinally: assert 'torch' not in sys.modules"
    crowding = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # other work on the machine is not ours
    crowding *= 2.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0  # nor are the other tests, which share caches with us
    for last in (False, False, True):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (answer.returncode, answer.stderr) == (0, "")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if seconds < 0.5:
            break
        assert not last or seconds < 0.5 * crowding


def test_help_away_from_a_terminal_is_plain_text() -> None:
    answer = run_mmgen("tokenize", "--help", FORCE_COLOR="")
    assert answer.stdout.isascii()
    assert "\x1b" not in answer.stdout


def test_completion_knows_commands_flags_and_recipes() -> None:
    def complete(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        return run_mmgen(_MMGEN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count).stdout.split()

    assert complete("mmgen tok") == ["tokenize"]
    assert complete("mmgen tokenize --max") == ["--max-bad-fraction"]
    assert complete("mmgen train-unified data --size t") == ["tiny"]
    recipes = {path.stem for path in (ROOT / "stages" / "recipes").rglob("*.toml")}
    assert set(complete("mmgen train-unified data --recipe ")) == recipes
