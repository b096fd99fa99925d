"""What the README says about the code and the command line is true."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from mmgen_cli.app import app
from stages.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
INLINE = [part.strip() for code in re.findall(r"`(mmgen [^`]+)`", README) if " -" in code for part in code.split("|")]
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if line.startswith("mmgen ")] + INLINE


def test_the_five_files_to_read_first_have_about_as_many_lines_as_it_says() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \|", README, flags=re.MULTILINE)
    assert len(rows) == 5
    for path, lines in rows:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == pytest.approx(int(lines), rel=0.1), path


def test_every_file_and_picture_it_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_it_shows_exists_with_these_options(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, name
        command = found
    with command.make_context(command.name, words) as context:
        if context.params.get("recipe"):
            load_recipe(context.params["recipe"])


def test_the_make_targets_it_shows_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
