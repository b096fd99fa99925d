"""The table of systems: aligned for people, unchanged for programs."""

import json

import pytest

from mmgen_cli.tables import print_recipes, short_count

ROWS = [
    {
        "name": "show-o",
        "family": "unified",
        "paper": "2408.12528",
        "parameters": {"tiny": 214_336, "small": 3_100_000, "paper": 1_449_000_000, "published": 1_450_000_000},
        "rungs": {"described": True, "sized": True, "learns": False, "agrees": None},
    },
    {
        "name": "vq",
        "family": "tokenizers",
        "paper": "2012.09841",
        "parameters": {"tiny": 950, "small": 1_000, "paper": 72_000_000, "published": None},
        "rungs": {"described": True, "sized": None, "learns": True, "agrees": False},
    },
]


def test_columns_are_aligned_and_rungs_are_words(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(ROWS, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "paper", "tiny", "small", "as", "published", "described", "sized", "learns", "agrees"]
    assert lines[1].split() == ["show-o", "unified", "2408.12528", "214.3k", "3.1M", "1.45B", "of", "1.45B", "yes", "yes", "no", "-"]
    assert lines[2].split() == ["vq", "tokenizers", "2012.09841", "950", "1.0k", "72.0M", "yes", "-", "yes", "no"]
    assert len({line.index(word) for line, word in zip(lines[:3], ("paper", "2408", "2012"), strict=True)}) == 1


def test_programs_get_the_rows_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_recipes(ROWS, as_json=True)
    assert json.loads(capsys.readouterr().out) == ROWS


@pytest.mark.parametrize(
    ("count", "shown"), [(None, "-"), (0, "0"), (999, "999"), (1_000, "1.0k"), (1_234_567, "1.2M"), (7_240_000_000, "7.24B")]
)
def test_counts_are_short(count: int | None, shown: str) -> None:
    assert short_count(count) == shown
