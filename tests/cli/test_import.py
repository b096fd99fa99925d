"""`mmgen import NAME`: an importer's keyword arguments are its flags, without a line in the command line about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import Result

import stages.data.importers
from stages.options import RunOptions

Invoke = Callable[..., Result]


def birds(
    source: str,
    *,
    seed: int = 0,
    colour: Literal["red", "blue"] = "red",
    wing_span: float = 0.5,
    extinct: bool = False,
    resize: bool = True,
) -> None:
    """Import birds.

    Every sample has an `image` and a `caption`.

    source: the folder of raw birds
    colour: which birds
    wing_span: the least span in metres; smaller birds
        are left out
    extinct: dodos as well
    resize: to the size of a sparrow

    Example:
      mmgen import birds raw --colour blue --out data
    """


def dots(*, count: int = 100, level: int = 1) -> None:
    """Draw dots."""


@pytest.fixture(autouse=True)
def _importers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.data.importers, "IMPORTERS", {"birds": birds, "dots": dots}, raising=False)


def test_import_help_lists_the_importers(invoke: Invoke) -> None:
    listed = invoke("import", "--help").stdout.split("Commands:")[1]
    assert "birds  Import birds." in listed
    assert "dots   Draw dots." in listed


def test_an_importers_help_shows_its_flags_and_the_shared_ones(invoke: Invoke) -> None:
    page = " ".join(invoke("import", "birds", "--help").stdout.split())
    assert page.startswith(
        "Usage: mmgen import birds SOURCE --out DIR [OPTIONS] Import birds. Every sample has an `image` and a `caption`. Arguments:"
    )
    assert "--colour <red|blue> which birds [default: red]" in page
    assert "--wing-span NUMBER the least span in metres; smaller birds are left out [default: 0.5]" in page
    assert "--extinct dodos as well" in page
    assert "--resize / --no-resize to the size of a sparrow [default: resize]" in page
    assert page.count("--seed") == 1
    assert page.endswith("Example: mmgen import birds raw --colour blue --out data")


def test_flags_reach_the_importer_as_keywords(invoke: Invoke, stages: dict[str, Any], tmp_path: Path) -> None:
    typed = ["import", "birds", "raw", "--wing-span", "0.7", "--extinct", "--no-resize", "--seed", "3", "--out", str(tmp_path / "o")]
    answer = invoke(*typed)
    assert (answer.exit_code, answer.stdout) == (0, f"{tmp_path / 'o'}\n")
    options = RunOptions(seed=3, command=("mmgen", *typed))
    assert stages["import_data"].arguments == ("birds", "raw", tmp_path / "o", options)
    assert stages["import_data"].keywords == {"colour": "red", "wing_span": 0.7, "extinct": True, "resize": False}


def test_built_in_data_takes_no_source(invoke: Invoke, stages: dict[str, Any], tmp_path: Path) -> None:
    assert invoke("import", "dots", "--count", "7", "--out", tmp_path / "o").exit_code == 0
    assert stages["import_data"].arguments[:2] == ("dots", None)
    assert invoke("import", "dots", "raw", "--out", tmp_path / "o").exit_code == 2


@pytest.mark.parametrize(
    ("typed", "message", "hint"),
    [
        ("import brids raw --out o", "mmgen import brids: there is no such command", "did you mean 'birds'?"),
        ("import birds raw --colur red --out o", "mmgen import birds has no option --colur", "did you mean '--colour'?"),
        ("import birds raw --colour green --out o", "invalid value for '--colour'", "`mmgen import birds --help` shows what it takes"),
        ("import birds --out o", "missing argument 'SOURCE'", "`mmgen import birds --help` shows what it takes"),
    ],
)
def test_mistakes_name_the_nearest(invoke: Invoke, stages: dict[str, Any], typed: str, message: str, hint: str) -> None:
    answer = invoke(*typed.split())
    assert answer.exit_code == 2
    assert answer.stderr.startswith(f"error: {message}")
    assert answer.stderr.endswith(f"hint: {hint}\n")


def test_dry_run_writes_nothing(invoke: Invoke, stages: dict[str, Any], tmp_path: Path) -> None:
    answer = invoke("import", "birds", "raw", "--dry-run", "--out", tmp_path / "o")
    assert answer.exit_code == 0
    assert stages["import_data"].calls == 0
    assert not (tmp_path / "o").exists()
    assert "importer: birds\nsource: raw\narguments:\n  colour: red\n  wing_span: 0.5\n" in answer.stdout
    assert answer.stdout.endswith("folder: new\n")
