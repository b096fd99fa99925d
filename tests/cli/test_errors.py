"""Errors are one screen and an exit code; stdout carries results and nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from stages.errors import DataError, GuardError, Preempted, RecipeError

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
TOKENIZE = ("tokenize", "data", "--tokenizer", "runs/vq", "--out", "codes")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_mistyped_command_names_the_nearest(invoke: Invoke) -> None:
    answer = invoke("tokenise")
    assert answer.exit_code == 2
    assert answer.stderr == "error: mmgen tokenise: there is no such command\nhint: did you mean 'tokenize'?\n"
    assert answer.stdout == ""


def test_a_mistyped_flag_names_the_nearest(invoke: Invoke) -> None:
    answer = invoke(*TOKENIZE, "--on-bad", "skip")
    assert answer.exit_code == 2
    assert answer.stderr == "error: mmgen tokenize has no option --on-bad\nhint: did you mean '--on-bad-sample'?\n"


def test_a_flag_like_no_other_points_to_the_help(invoke: Invoke) -> None:
    answer = invoke(*TOKENIZE, "--zzz")
    assert answer.stderr == "error: mmgen tokenize has no option --zzz\nhint: `mmgen tokenize --help` shows what it takes\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tokenize",), "missing argument 'SHARDS'"),
        (("tokenize", "data", "--tokenizer", "x"), "missing option '--out'"),
        ((*TOKENIZE, "--limit", "0"), "invalid value for '--limit'"),
        ((*TOKENIZE, "--limit", "1000000000000"), "expected at most 1000000000 (found"),
        ((*TOKENIZE, "--max-bad-fraction", "nan"), "expected at most 1"),
        ((*TOKENIZE, "--check", "-1"), "expected at least 0 (found '-1')"),
        (("align", "d", "--recipe", "r", "--out", "y", "--workers", "100000"), "expected at most 1024"),
        (("sample", "m", "d", "--out", "y", "--seed", str(2**70)), f"expected at most {2**63 - 1}"),
        (("sample", "m", "d", "--out", "y", "--seed", "-1"), "expected at least 0"),
        (("sample", "m", "d", "--out", "y", "--num-samples", "1000000"), "expected at most 10000"),
        (("train-unified", "d", "--recipe", "r", "--out", "y", "--max-minutes", "nan"), "expected at most 10000000"),
        (("train-unified", "d", "--recipe", "r", "--out", "y", "--max-minutes", "inf"), "expected at most 10000000"),
        (("train-unified", "d", "--recipe", "r", "--out", "y", "--max-steps", "10000000000"), "expected at most 1000000000 (found"),
        (("import", "scenes", "--seed", str(2**70), "--out", "y"), f"expected at most {2**63 - 1}"),
        ((*TOKENIZE, "--on-bad-sample", "keep"), "invalid value for '--on-bad-sample'"),
        ((*TOKENIZE, "surplus"), "got unexpected extra argument"),
        (("sample", "runs/x", "--out", "y"), "sample needs prompts"),
        (("sample", "runs/x", "data", "--prompt", "a cat", "--out", "y"), "sample needs prompts"),
        (("eval", "-", "--out", "y"), "cannot take them from stdin"),
        (("eval", "samples", "--map", "image", "--out", "y"), "--map image: expected NAME=VALUE"),
        (("recipes", "--draw", "x.svg"), "need the NAME of a recipe"),
        (("train-unified", "d", "--recipe", "r", "--out", "y", "--push", "me/model"), "me/model: expected hf://ORG/NAME"),
        (("train-unified", "d", "--recipe", "r", "--out", "y", "--init", "a=1", "--init", "a=2"), "'a' was already given as 1"),
        (("tokenize", "d", "--tokenizer", "x", "--out", "-", "--json"), "--json and --out - both write to stdout"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_is_wrong(
    invoke: Invoke, stages: dict[str, Any], arguments: tuple[str, ...], message: str
) -> None:
    answer = invoke(*arguments)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert message in answer.stderr
    assert "\nhint: " in answer.stderr or "already given" in message
    assert len(answer.stderr.splitlines()) <= 6
    assert all(recorder.calls == 0 for recorder in stages.values())


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (RecipeError("vq.toml:3: depht: there is no such key", hint="did you mean 'depth'?"), 2),
        (DataError("data-000003.tar: cut at byte 512"), 3),
        (GuardError("the loss is nan"), 4),
        (Preempted("stopped by SIGTERM"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_stage_raises_becomes_one_screen_and_its_exit_code(
    invoke: Invoke, stages: dict[str, Any], error: BaseException, exit_code: int
) -> None:
    stages["tokenize_shards"].error = error
    answer = invoke(*TOKENIZE)
    assert answer.exit_code == exit_code
    assert "Traceback" not in answer.stderr
    hint = f"\nhint: {error.hint}" if getattr(error, "hint", "") else ""
    assert answer.stderr == f"error: {str(error) or 'interrupted'}{hint}\n"


def test_our_own_fault_keeps_its_traceback_in_a_file(
    invoke: Invoke, stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages["tokenize_shards"].error = KeyError("width")
    answer = invoke(*TOKENIZE)
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: unexpected KeyError: 'width'\nhint: this is a fault of mmgen; the traceback is in ")
    saved = next(tmp_path.glob("mmgen-traceback-*.txt"))
    assert str(saved) in answer.stderr
    assert "KeyError: 'width'" in saved.read_text()


@pytest.mark.parametrize(
    ("error", "path"),
    [
        (PermissionError(13, "Permission denied", "/root/out"), "/root/out: permission denied"),
        (IsADirectoryError(21, "Is a directory", ".x.tmp", None, "pictures"), "pictures: is a directory"),
        (OSError(30, "Read-only file system", "disk/x"), "disk/x: read-only file system"),
    ],
)
def test_a_path_that_cannot_be_used_is_the_users_to_change(invoke: Invoke, stages: dict[str, Any], error: OSError, path: str) -> None:
    stages["tokenize_shards"].error = error
    answer = invoke(*TOKENIZE)
    assert (answer.exit_code, answer.stderr) == (2, f"error: {path}\nhint: name another path, or change its permissions\n")


def test_mmgen_traceback_prints_it(invoke: Invoke, stages: dict[str, Any]) -> None:
    stages["tokenize_shards"].error = KeyError("width")
    answer = invoke(*TOKENIZE, env={"MMGEN_TRACEBACK": "1"})
    assert answer.stderr.startswith("Traceback (most recent call last)")
    assert answer.exit_code == 1


@pytest.mark.parametrize("arguments", [(*TOKENIZE, "--json"), ("tokenize", "--json"), ("tokenize", "--jsno", "--json")])
def test_with_json_an_error_is_an_object_too(invoke: Invoke, stages: dict[str, Any], arguments: tuple[str, ...]) -> None:
    stages["tokenize_shards"].error = DataError("cut", hint="fetch it again")
    answer = invoke(*arguments)
    told = json.loads(answer.stdout)
    assert set(told) == {"status", "exit_code", "error", "hint"}
    assert (told["status"], told["exit_code"]) == ("failed", answer.exit_code)
    assert answer.stderr.startswith(f"error: {told['error']}")


def test_colour_only_on_a_terminal_and_never_against_the_users_wish() -> None:
    import pty

    def on_terminal(**environment: str) -> str:
        ours, theirs = pty.openpty()
        variables = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | environment
        process = subprocess.Popen([sys.executable, "-m", "mmgen_cli", "tokenise"], cwd=ROOT, stderr=theirs, stdout=theirs, env=variables)
        process.wait(timeout=20)
        os.close(theirs)
        with os.fdopen(ours, "rb", buffering=0) as screen:
            return screen.read(4096).decode()

    assert "\x1b[" in on_terminal()
    assert "\x1b" not in on_terminal(NO_COLOR="1")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from mmgen_cli.app import app; sys.argv[1:] = ['--help']; sys.stdin.read(); app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 141


def test_sigterm_before_a_run_has_begun_is_preemption_as_well() -> None:
    code = (
        "import os, signal, time\n"
        "from mmgen_cli import __main__, app as module\n"
        "module.check_stdin = lambda spec: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5))\n"
        "import sys; sys.argv = ['mmgen', 'tokenize', 'd', '--tokenizer', 't', '--out', 'o']\n"
        "__main__.main()\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert answer.returncode == 75
    assert answer.stderr.startswith("error: stopped by SIGTERM\n")
