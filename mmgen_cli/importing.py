"""`mmgen import NAME`: one subcommand per importer, its flags read from the importer's own signature.

An importer is a function; its keyword-only arguments become flags, its docstring the help. Adding an importer, or an argument to
one, does not touch the command line.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import typer.main

from mmgen_cli import options
from mmgen_cli.door import PlainCommand, PlainGroup, give, run_options, stdout_for
from mmgen_cli.plan import import_plan, print_plan

SHARED: dict[str, tuple[Any, Any]] = {  # what every importer takes (--seed if it draws anything): option and default
    "out": (options.OutOrPipe, inspect.Parameter.empty),
    "seed": (options.Seed, 0),
    "limit": (options.Limit, None),
    "on_bad_sample": (options.OnBadSample, "skip"),
    "max_bad_fraction": (options.MaxBadFraction, 0.01),
    "overwrite": (options.Overwrite, False),
    "dry_run": (options.DryRun, False),
    "json": (options.Json, False),
    "quiet": (options.Quiet, False),
}
METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", list[str]: "TEXT", list[str] | None: "TEXT", str | None: "TEXT"}


class ImportGroup(PlainGroup):
    """The importers, looked up when somebody asks: importing them costs what their libraries cost."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_importers())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        importer = _importers().get(cmd_name)
        return importer_command(cmd_name, importer) if importer else None


def _importers() -> Mapping[str, Callable[..., Any]]:
    from stages.data.importers import IMPORTERS

    return IMPORTERS


def importer_command(name: str, importer: Callable[..., Any]) -> Any:
    """The parser's command for one importer."""
    own = importer_flags(importer)
    takes_source = "source" in inspect.signature(importer).parameters

    def command(ctx: typer.Context, **values: Any) -> None:
        keywords = {key: values[key] for key in own}
        source, out, as_json = values.get("source"), values["out"], values["json"]
        if values["dry_run"]:
            print_plan(import_plan(name, source, out, keywords, run_options(ctx)), as_json=as_json)
            return
        from stages.import_data import import_data

        with stdout_for(out, as_json=as_json):
            written = import_data(name, source, Path(out), run_options(ctx), **keywords)
        give(written, as_json=as_json)

    parameters = [_parameter("ctx", typer.Context)]
    if takes_source:
        needed = inspect.signature(importer).parameters["source"].default is inspect.Parameter.empty
        help_text = "Where the raw data is: a folder, a file, a URL."
        kind = Annotated[str if needed else str | None, typer.Argument(metavar="SOURCE", help=help_text)]  # type: ignore[valid-type]
        parameters.append(_parameter("source", kind, inspect.Parameter.empty if needed else None))
    shared = {key: option for key, option in SHARED.items() if key != "seed" or key in inspect.signature(importer).parameters}
    parameters += [_parameter(key, annotation, default) for key, (annotation, default) in {**own, **shared}.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    example = f"Example:\n  mmgen import {name}{' SOURCE' if takes_source else ''} --out data"
    app.command(name, cls=PlainCommand, help=_summary(importer), epilog=_example(importer) or example)(command)
    return typer.main.get_command(app)


def importer_flags(importer: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """An importer's own flags: keyword → (option, default). Those every importer has are left out."""
    hints, flags = get_type_hints(importer), {}
    described = _described_arguments(importer)
    for key, parameter in inspect.signature(importer).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key not in SHARED:
            word = key.replace("_", "-")
            flag = f"--{word}/--no-{word}" if parameter.default is True else f"--{word}"
            option = typer.Option(flag, help=described.get(key, ""), metavar=METAVARS.get(hints[key]))
            flags[key] = (Annotated[hints[key], option], parameter.default)
    return flags


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _paragraphs(importer: Callable[..., Any]) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(importer) or "")


def _is_argument_list(paragraph: str, importer: Callable[..., Any]) -> bool:
    return _argument_of(paragraph.splitlines()[0], importer) is not None if paragraph.strip() else False


def _argument_of(line: str, importer: Callable[..., Any]) -> tuple[str, str] | None:
    """`name: what it does` → (name, what it does), where `name` is an argument of the importer."""
    match = re.fullmatch(r"\s*`?(\w+)`?(?::\s+|\s{2,})(.+)", line)
    if match and match[1] in inspect.signature(importer).parameters:
        return match[1], match[2].strip()
    return None


def _described_arguments(importer: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says about each argument: lines `name: text`, continued by the lines after them."""
    described: dict[str, str] = {}
    for paragraph in _paragraphs(importer):
        name = ""
        for line in paragraph.splitlines():
            found = _argument_of(line, importer)
            if found:
                name, described[found[0]] = found
            elif name:
                described[name] += " " + line.strip()
    return described


def _summary(importer: Callable[..., Any]) -> str:
    """The docstring without its list of arguments and its example."""
    kept = [text for text in _paragraphs(importer) if not _is_argument_list(text, importer) and not text.lower().startswith("example")]
    return "\n\n".join(kept)


def _example(importer: Callable[..., Any]) -> str:
    return next((text for text in _paragraphs(importer) if text.lower().startswith("example")), "")
