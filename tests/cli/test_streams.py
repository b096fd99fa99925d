"""Closed and full standard streams, other modules of our names, warnings, and what the machine refuses: one message, the right exit code."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from mmgen_cli.door import with_home

Invoke = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
TOKENIZE = ("tokenize", "data", "--tokenizer", "runs/vq", "--out", "codes")
MMGEN = f"exec '{sys.executable}' -m mmgen_cli"


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["sh", "-c", command], cwd=cwd, env=variables, capture_output=True, text=True, errors="replace", timeout=60)


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        ("recipes --help >&-", 0),
        ("--version 2>&-", 0),
        ("--version <&- >&- 2>&-", 0),
        ("nonsense 2>&-", 2),
        ("nonsense --json >&- 2>&-", 2),
        ("nonsense 2>/dev/full", 2),
        ("nonsense --json >/dev/full", 2),
        ("recipes --help >/dev/full", 1),
        ("recipes --help >/dev/full 2>&-", 1),
        ("inspect - <&-", 2),
        ("tokenize - --tokenizer x --out y <&-", 2),
        ("import scenes --count 1 --out - >&-", 2),
    ],
)
def test_closed_and_full_standard_streams_are_no_fault(tmp_path: Path, command: str, exit_code: int) -> None:
    answer = shell(f"{MMGEN} {command}", tmp_path, TMPDIR=str(tmp_path))
    assert answer.returncode == exit_code, answer.stderr
    assert "Traceback" not in answer.stderr and "fault" not in answer.stderr and "Exception ignored" not in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_work_is_whole_when_nobody_reads_what_is_said(tmp_path: Path) -> None:
    """A file that is opened later must not get the number of a closed stream: what is printed would go into it."""
    for number, streams in enumerate(("<&- >&- 2>&-", "2>/dev/full")):
        answer = shell(f"{MMGEN.removeprefix('exec ')} import scenes --count 3 --out d{number} {streams}", tmp_path)
        assert answer.returncode == 0, (streams, answer.stderr)
        assert shell(f"{MMGEN} verify d{number}", tmp_path).returncode == 0


def test_a_name_that_no_terminal_can_show_does_not_end_a_command(tmp_path: Path) -> None:
    answer = shell(f"{MMGEN} inspect ü$(printf '\\377')x", tmp_path, PYTHONIOENCODING="ascii")
    assert answer.returncode == 2
    assert "does not exist" in answer.stderr


def test_modules_of_the_user_do_not_stand_in_for_ours(tmp_path: Path) -> None:
    for name in ("stages", "typer", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "mmgen_cli").mkdir()
    answer = shell(f"{MMGEN} inspect no-such-folder", tmp_path)
    assert answer.returncode == 2 and "does not exist" in answer.stderr
    assert shell(f"{MMGEN} --version", ROOT).returncode == 0


def test_warnings_that_are_errors_do_not_end_a_run(tmp_path: Path) -> None:
    code = "import sys, warnings; from mmgen_cli import __main__, app; sys.argv = ['mmgen', 'inspect', '-']\n"
    code += "app.check_stdin = lambda spec: warnings.warn('a remark')\n__main__.main()"
    answer = shell(f"'{sys.executable}' -W error -c \"{code}\" </dev/null", tmp_path, PYTHONWARNINGS="error")
    assert answer.returncode == 3 and "a remark" in answer.stderr and "standard input is empty" in answer.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--out=~/x",), ("--out=/home/me/x",)),
        (("--out", "~/x"), ("--out", "/home/me/x")),
        (("-o", "~"), ("-o", "/home/me")),
        (("--init", "backbones.lm=~/x"), ("--init", "backbones.lm=/home/me/x")),
        (("--tokenizer=~/x",), ("--tokenizer=/home/me/x",)),
        (("--prompt", "~/x"), ("--prompt", "~/x")),
        (("--prompt=~/x",), ("--prompt=~/x",)),
        (("--set", "name=~"), ("--set", "name=~")),
        (("a~b", "~x=~y", "x~/y"), ("a~b", "~x=~y", "x~/y")),
    ],
)
def test_the_home_folder_where_no_shell_replaces_it(
    words: tuple[str, ...], meant: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert tuple(with_home(words)) == meant


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (MemoryError("Unable to allocate 2 TiB for an array"), 1),
        (MemoryError(), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1),
        (OSError(errno.EMFILE, "Too many open files", "a.tar"), 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
        (OSError(errno.ESTALE, "Stale file handle", "net/a.tar"), 1),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "loop"), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), 2),
        (FileExistsError(errno.EEXIST, "File exists", "there"), 2),
        (OSError(errno.ENOTEMPTY, "Directory not empty", "full"), 2),
    ],
)
def test_what_the_machine_refuses_is_said_with_the_path(
    invoke: Invoke, stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    stages["tokenize_shards"].error = error
    answer = invoke(*TOKENIZE)
    assert answer.exit_code == exit_code
    assert "fault of mmgen" not in answer.stderr and answer.stderr.startswith("error: ")
    if isinstance(error, OSError) and error.filename:
        assert answer.stderr.startswith(f"error: {error.filename}: ")
    if isinstance(error, MemoryError | RuntimeError):
        assert answer.stderr.startswith("error: not enough memory") and str(error)[:20] in answer.stderr


def test_a_loop_of_links_and_a_path_too_long_are_mistakes_of_the_command(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for path in ("loop", "loop/x", "a" * 5000, "x/" * 3000, "nul\0x", "~nobody-of-this-name/x"):
        for command in (("inspect", path), ("verify", path), ("report", path, "--out", "r.html"), ("import", "folder", path, "--out", "o")):
            answer = invoke(*command)
            assert answer.exit_code in (2, 3), (command, answer.output)
            assert "fault" not in answer.stderr
