"""The front door: everything that is the same for every command.

Errors are one screen on stderr and an exit code, never a traceback for a user's mistake; stdout carries results only, so a tar can
be streamed through it; a mistyped command or flag is answered with the nearest one there is.
"""

import contextlib
import errno
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from stages import stop
from stages.errors import MmgenError, Preempted, UsageError, nearest
from stages.options import RunOptions

OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FAILED = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV}
NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
STATUS = {75: "preempted", 130: "stopped"}  # in the words of status.json; every other error is "failed"
BROKEN_PIPE = 141  # as a shell reports SIGPIPE: the reader of our stdout went away


@dataclass(frozen=True)
class Invocation:
    """The command line as it was typed. Commands find it in `ctx.obj`."""

    arguments: tuple[str, ...]

    @property
    def wants_json(self) -> bool:
        """Looked up in the words, not in parsed options: a mistake in the options is told as JSON, too."""
        return "--json" in self.arguments


class PlainCommand(TyperCommand):
    """A command whose usage line names what it needs, and whose epilog (its example) is printed as it is written."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments, needed = [], []
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = (parameter.metavar or parameter.name or "").upper() + ("..." if parameter.nargs == -1 else "")
                arguments.append(name if parameter.required else f"[{name}]")
            elif parameter.required:
                needed.append(f"{max(parameter.opts, key=len)} {getattr(parameter, 'metavar', '')}")
        return [*arguments, *needed, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The parser's own two lists, without the Python types of arguments and the ranges of numbers."""
        lists: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                flag, text = record
                text = re.sub(r"(; | *\[)[\d.]*<?=?x[<>]=[\d.]+(\]?)$", lambda range: "]" if range[1] == "; " else "", text)
                if parameter.param_type_name == "argument":
                    lists["Arguments"].append((parameter.metavar or flag, text.removesuffix("[required]").strip()))
                else:
                    lists["Options"].append((flag, text))
        for title, rows in lists.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_epilog(self.epilog, formatter)


class PlainGroup(TyperGroup):
    """A group of commands that answers a mistyped name with the nearest one."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_epilog(self.epilog, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            raise UsageError(f"{ctx.command_path} {name}: there is no such command", hint=nearest(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


class Door(PlainGroup):
    """The whole command line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["import", *(name for name in super().list_commands(ctx) if name != "import")]  # a story starts with the data

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        invocation = Invocation(tuple(sys.argv[1:] if args is None else args))
        self._main_shell_completion({}, "mmgen")

        def run() -> None:
            with self.make_context("mmgen", list(invocation.arguments), obj=invocation) as ctx:
                self.invoke(ctx)

        try:
            code = exit_code_of(run, invocation)
        except KeyboardInterrupt:  # a second Ctrl-C, while the first was being told
            code = 130
        stop.over()
        sys.exit(code)


def exit_code_of(run: Callable[[], None], invocation: Invocation) -> int:
    """Runs a command and turns whatever it raises into a message and an exit code (the table is in `mmgen --help`)."""
    try:
        run()
        sys.stdout.flush()
        stop.poll()  # what came while nothing was to be interrupted
        return 0
    except typer.Exit as done:
        return done.exit_code
    except MmgenError as error:
        return _tell(error.message, error.hint, error.exit_code, invocation)
    except Preempted as error:
        return _tell(error.message, error.hint, error.exit_code, invocation)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _tell(str(error) or "interrupted", stop.CONTINUE if stop.asked() else "", 130, invocation)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # so that Python, too, has nowhere left to complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OUT_OF_ROOM:
            where = f": {error.filename}" if error.filename else ""
            hint = "make room, or name another --out; what is finished is whole, and the same command goes on from there"
            return _tell(f"{os.strerror(error.errno).lower()}{where}", hint, 1, invocation)
        if isinstance(error, OSError) and error.errno in DISK_FAILED:
            where = f": {error.filename}" if error.filename else ""
            hint = "the disk, or the way to it, failed; what is finished is whole, and the same command goes on from there"
            return _tell(f"{os.strerror(error.errno).lower()}{where}", hint, 1, invocation)
        if isinstance(error, OSError) and error.errno in NOT_ALLOWED and error.filename:
            path = error.filename2 or error.filename  # of a rename, where to
            return _tell(f"{path}: {os.strerror(error.errno).lower()}", "name another path, or change its permissions", 2, invocation)
        if hasattr(error, "format_message"):  # the parser's own: an unknown flag, a missing argument, a value of the wrong type
            return _tell(*_usage_mistake(error), 2, invocation)
        return _tell(*_our_fault(error), 1, invocation)


def _tell(message: str, hint: str, exit_code: int, invocation: Invocation) -> int:
    if invocation.wants_json:
        with contextlib.suppress(BrokenPipeError):
            print_json({"status": STATUS.get(exit_code, "failed"), "exit_code": exit_code, "error": message, "hint": hint})
            sys.stdout.flush()
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    label = typer.style("error:", fg="red", bold=True) if colour else "error:"
    print(f"{label} {message}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr, flush=True)
    return exit_code


def _usage_mistake(error: Any) -> tuple[str, str]:
    """Message and hint for a mistake the parser found."""
    ctx = getattr(error, "ctx", None)
    see = f"`{ctx.command_path} --help` shows what it takes" if ctx else ""
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and ctx:
        flags = [
            flag for parameter in ctx.command.get_params(ctx) for flag in (*parameter.opts, *parameter.secondary_opts) if flag[0] == "-"
        ]
        close = nearest(str(option), flags)
        return f"{ctx.command_path} has no option {option}", close if close.startswith("did you mean") else see
    message = str(error.format_message()).rstrip(".")
    return message[:1].lower() + message[1:], see


def _our_fault(error: Exception) -> tuple[str, str]:
    """Message and hint for an exception nobody foresaw; the traceback goes to a file, or to stderr with MMGEN_TRACEBACK=1."""
    text = "".join(traceback.format_exception(error))
    message = f"unexpected {type(error).__name__}: {error}"
    if os.environ.get("MMGEN_TRACEBACK"):
        print(text, file=sys.stderr)
        return message, ""
    with tempfile.NamedTemporaryFile("w", prefix="mmgen-traceback-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(text)
    return message, f"this is a fault of mmgen; the traceback is in {file.name} (MMGEN_TRACEBACK=1 prints it)"


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write("\n" + epilog.strip("\n") + "\n")


# running a stage


def run_options(ctx: typer.Context) -> RunOptions:
    """The options of a run: what was typed for every flag that is a field of RunOptions, and the command itself."""
    typed = {field.name: ctx.params[field.name] for field in fields(RunOptions) if field.name in ctx.params}
    return RunOptions(command=("mmgen", *ctx.obj.arguments), **typed)


# results


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def read_status(out: Path) -> dict[str, Any]:
    """status.json of a run folder, whichever kind it is; {} where there is none."""
    for path in (out / ".mmgen" / "status.json", out / "status.json"):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def give(out: Path | str, *, as_json: bool, **more: object) -> None:
    """Prints a stage's result on stdout: the path it wrote, or with --json one object with the path and how the run ended.

    Of several ranks the first does.
    """
    if str(out) == "-" or not is_first_rank():
        return
    if as_json:
        status = read_status(Path(out))
        print_json({"out": str(out), "status": status.pop("state", "done"), **status, **more})
    else:
        print(out)


def give_checkpoint(folder: Path, *, push: str | None, as_json: bool) -> None:
    """Like `give`, after uploading the checkpoint if that was asked for."""
    if push is None or not is_first_rank():
        give(folder, as_json=as_json)
        return
    from stages.hub import push as upload

    address = upload(folder, push)
    give(folder, as_json=as_json, pushed=address)
    print(f"pushed to {address}", file=sys.stderr)


def print_json(value: object) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value))


class _BytesOnly(io.TextIOBase):
    """Stands in for sys.stdout while a tar goes there: `.buffer` is the real stream, text goes to stderr."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        self.buffer.flush()


@contextlib.contextmanager
def stdout_for(out: str, *, as_json: bool) -> Iterator[None]:
    """While `--out -` streams a tar, keeps everything else that is printed, by Python or by a library, out of it."""
    if out != "-":
        yield
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--out - is a stream from one process, and there are several ranks", hint="name a folder with --out")
    if as_json:
        raise UsageError("--json and --out - both write to stdout", hint="name a folder with --out, or leave --json away")
    real = sys.stdout
    if real.isatty():
        raise UsageError(
            "--out - would write a tar to this terminal", hint="pipe it on, as in `... --out - | mmgen tokenize - ...`, or name a folder"
        )
    real.flush()
    try:
        descriptor = os.dup(real.fileno())
    except (OSError, ValueError):  # not a real file, as under a test runner: nothing below Python can write to it either
        sys.stdout = _BytesOnly(real.buffer)
        try:
            yield
        finally:
            sys.stdout = real
        return
    with os.fdopen(descriptor, "wb") as stream:
        saved = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = _BytesOnly(stream)
        try:
            yield
            stream.flush()
        finally:
            sys.stdout = real
            os.dup2(saved, 1)
            os.close(saved)


def check_stdin(spec: str | None) -> None:
    """`-` reads a tar from stdin; at a terminal that would wait for ever, and several ranks would each get a piece."""
    if spec == "-" and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("- is a stream for one process, and there are several ranks", hint="name a folder")
    if spec == "-" and sys.stdin.isatty():
        raise UsageError(
            "- reads a tar from stdin, and stdin is this terminal", hint="pipe one in, as in `mmgen import ... --out - | mmgen ...`"
        )


def check_push(spec: str | None) -> None:
    """A wrong --push is found now, not after hours of training."""
    if spec is not None:
        from stages.hub import parse_address

        parse_address(spec)
