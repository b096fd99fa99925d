"""The front door: everything that is the same for every command.

Errors are one screen on stderr and an exit code, never a traceback for a user's mistake; stdout carries results only, so a tar can
be streamed through it; a mistyped command or flag is answered with the nearest one there is.
"""

import codecs
import contextlib
import errno
import io
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
from stages.escape import json_text, visible
from stages.options import RunOptions
from stages.terminal import put, tell

OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LIMITS = {errno.EMFILE: "`ulimit -n` says how many, and raises it", errno.ENFILE: "", errno.ENOMEM: "", errno.EAGAIN: ""}  # of this machine
NO_BYTES = {
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.EUCLEAN,
}  # of a disk, or a network's
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
        mend_standard_streams()
        invocation = Invocation(tuple(with_home(sys.argv[1:] if args is None else args)))
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
        return _tell(error, error.exit_code, invocation)
    except Preempted as error:
        return _tell(MmgenError(error.message, hint=error.hint), error.exit_code, invocation)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _tell(MmgenError(str(error) or "interrupted", hint=stop.CONTINUE if stop.asked() else ""), 130, invocation)
    except MemoryError as error:
        return _tell(_out_of_memory(error), 1, invocation)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # so that Python, too, has nowhere left to complain when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OUT_OF_ROOM:
            where = f": {error.filename}" if error.filename else ""
            hint = "make room, or name another --out; what is finished is whole, and the same command goes on from there"
            return _tell(MmgenError(f"{os.strerror(error.errno).lower()}{where}", hint=hint), 1, invocation)
        if isinstance(error, OSError) and isinstance(error.errno, int) and not hasattr(error, "format_message"):
            path = error.filename2 or error.filename  # of a rename, where to
            told = f"{path}: {os.strerror(error.errno).lower()}" if path else os.strerror(error.errno).lower()
            if error.errno in LIMITS:
                return _tell(MmgenError(told, hint=LIMITS[error.errno]), 1, invocation)
            if error.errno in NO_BYTES:
                hint = "the disk, or the way to it, failed; what is finished is whole, and the same command goes on from there"
                return _tell(MmgenError(told, hint=hint), 1, invocation)
            if path:
                hint = "name another path, or change its permissions" if error.errno in NOT_ALLOWED else ""
                return _tell(MmgenError(told, hint=hint), 2, invocation)
        if is_out_of_memory(error):
            return _tell(_out_of_memory(error), 1, invocation)
        if hasattr(error, "format_message"):  # the parser's own: an unknown flag, a missing argument, a value of the wrong type
            return _tell(_usage_mistake(error), 2, invocation)
        return _tell(_our_fault(error), 1, invocation)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch was refused memory. torch raises a bare RuntimeError for that of the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or bool(re.search("can't allocate memory|not enough memory", str(error)))


def _tell(error: MmgenError, exit_code: int, invocation: Invocation) -> int:
    if invocation.wants_json:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it; the exit code still tells
            print_json({"status": STATUS.get(exit_code, "failed"), "exit_code": exit_code, "error": error.message, "hint": error.hint})
            sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        label = typer.style("error:", fg="red", bold=True) if colour else "error:"
        tell(error.message + (f"\nhint: {error.hint}" if error.hint else ""), label=f"{label} ")
    return exit_code


def _out_of_memory(error: BaseException) -> MmgenError:
    """What to say where memory ends, with what was asked for where that is known."""
    told = " ".join(str(error).split())
    hint = "a smaller --size, batch or image needs less; --dry-run prints what a run takes"
    return MmgenError(f"not enough memory{f': {told:.300}' if told else ''}", hint=hint)


def _usage_mistake(error: Any) -> MmgenError:
    """A mistake the parser found, in our words."""
    ctx = getattr(error, "ctx", None)
    see = f"`{ctx.command_path} --help` shows what it takes" if ctx else ""
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and ctx:
        flags = [
            flag for parameter in ctx.command.get_params(ctx) for flag in (*parameter.opts, *parameter.secondary_opts) if flag[0] == "-"
        ]
        close = nearest(str(option), flags)
        hint = close if close.startswith("did you mean") else see
        return MmgenError(f"{ctx.command_path} has no option {option}", hint=hint)
    if hasattr(error.__cause__, "errors"):  # typer asks pydantic, and hands its words on
        from stages.parts.config import told

        error.message = told(error.__cause__.errors()[0])
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    return MmgenError(message[:1].lower() + message[1:], hint=see)


def _our_fault(error: Exception) -> MmgenError:
    """What to say of an exception nobody foresaw; the traceback goes to a file, or to stderr with MMGEN_TRACEBACK=1."""
    text = "".join(traceback.format_exception(error))
    message = f"unexpected {type(error).__name__}: {error}"
    if os.environ.get("MMGEN_TRACEBACK"):
        tell(text)
        return MmgenError(message)
    with tempfile.NamedTemporaryFile(
        "w", prefix="mmgen-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(text)
    return MmgenError(message, hint=f"this is a fault of mmgen; the traceback is in {file.name} (MMGEN_TRACEBACK=1 prints it)")


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write("\n" + epilog.strip("\n") + "\n")


# the process


CLOSED: set[int] = set()  # standard streams that were closed when the process began


def mend_standard_streams() -> None:
    """Where a standard stream is closed (`>&-`), nothing is read or written there, and no file that is opened later takes its number.

    What a stream cannot write in its encoding is escaped; bytes of file names that are no text stay what they are.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            CLOSED.add(number)
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (as long as the process)
    codecs.register_error("mmgen", _written)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mmgen")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = Unfailing(sys.stderr)


class Unfailing:
    """Stands in for sys.stderr: a reader or a terminal that is gone (which is what SIGHUP says) must not end what is being done."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:  # from now on nowhere, also what Python still holds back and would fail to write at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of text streams: bytes that stood for no text as they were, else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    pieces = [bytes([ord(x) - 0xDC00]) if "\udc80" <= x <= "\udcff" else x.encode("ascii", "backslashreplace") for x in letters]
    return b"".join(pieces), error.end


def with_home(words: Sequence[str]) -> list[str]:
    """`~` where no shell replaces it: after `=`, as in --out=~/x and --init lm=~/x, and quoted after --out."""
    replaced = []
    for before, word in zip(("", *words), words, strict=False):
        found = re.fullmatch(r"(-{0,2}[\w.-]+=)?(~(?:/.*)?)", word, re.DOTALL)
        if (
            found
            and (found[1] or before in ("--out", "-o"))
            and not word.startswith(("--prompt=", "--set="))
            and before not in ("--prompt", "--set")
        ):
            word = (found[1] or "") + os.path.expanduser(found[2])
        replaced.append(word)
    return replaced


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
            from stages.documents import read_object
            from stages.records import Status

            return read_object(path, Status)
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
        put(visible(str(out)))


def give_checkpoint(folder: Path, *, push: str | None, as_json: bool) -> None:
    """Like `give`, after uploading the checkpoint if that was asked for."""
    if push is None or not is_first_rank():
        give(folder, as_json=as_json)
        return
    from stages.hub import push as upload

    address = upload(folder, push)
    give(folder, as_json=as_json, pushed=address)
    tell(f"pushed to {address}")


def print_json(value: object) -> None:
    """One JSON value on stdout, in ASCII."""
    put(json_text(value, ascii=True))


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
    if 1 in CLOSED:
        raise UsageError("--out - writes a tar to stdout, and stdout is closed", hint="name a folder with --out")
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
    if spec == "-" and 0 in CLOSED:
        raise UsageError("- reads a tar from stdin, and stdin is closed", hint="pipe one in, or name a folder")
    if spec == "-" and sys.stdin.isatty():
        raise UsageError(
            "- reads a tar from stdin, and stdin is this terminal", hint="pipe one in, as in `mmgen import ... --out - | mmgen ...`"
        )


def check_push(spec: str | None) -> None:
    """A wrong --push is found now, not after hours of training."""
    if spec is not None:
        from stages.hub import parse_address

        parse_address(spec)
