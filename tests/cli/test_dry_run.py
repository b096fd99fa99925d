"""`--dry-run` prints what would happen and leaves everything as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from stages.data.sample import Sample
from stages.data.shards import ShardWriter
from stages.options import RunOptions
from stages.run import Run

Invoke = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two splits, five and three samples."""
    for split, count in (("train", 5), ("val", 3)):
        with ShardWriter(tmp_path / "data" / split, split=split, provenance={"stage": "import"}) as writer:
            for number in range(count):
                writer.write(Sample(f"{split}-{number}", {"caption": f"number {number}", "meta": {"number": number}}))
    return tmp_path / "data"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_plan_counts_the_samples_of_every_input(invoke: Invoke, data: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    answer = invoke("eval", data / "train", "--reference", data, "--map", "caption=meta", "--out", tmp_path / "o", "--dry-run", "--json")
    assert answer.exit_code == 0
    assert json.loads(answer.stdout) == {
        "stage": "eval",
        "target": {"all": {"samples": 5, "fields": "caption, meta"}},
        "reference": {"train": {"samples": 5, "fields": "caption, meta"}, "val": {"samples": 3, "fields": "caption, meta"}},
        "map": {"caption": "meta"},
        "out": str(tmp_path / "o"),
        "folder": "new",
    }
    assert everything(tmp_path) == before


def test_the_plan_reads_well(invoke: Invoke, data: Path) -> None:
    answer = invoke("eval", data / "val", "--out", "-o", "--dry-run")
    assert answer.stdout.startswith("stage: eval\ntarget:\n  all:\n    samples: 3\n    fields: caption, meta\n")


def test_a_plan_for_missing_data_is_an_error(invoke: Invoke, tmp_path: Path) -> None:
    answer = invoke("eval", tmp_path / "nowhere", "--out", tmp_path / "o", "--dry-run")
    assert answer.exit_code == 2
    assert "nowhere does not exist" in answer.stderr


def test_the_plan_says_what_is_in_out_already(invoke: Invoke, data: Path, tmp_path: Path, stages: dict[str, Any]) -> None:
    def folder_line(out: Path | str) -> str:
        return invoke("eval", data / "val", "--out", out, "--dry-run").stdout.splitlines()[-1]

    with Run(tmp_path / "run", stage="eval", options=RunOptions(quiet=True), kind="checkpoint") as run:
        run.status(step=4, of=9)
        run.finish("stopped")
    assert folder_line(tmp_path / "run").startswith("folder: holds a run of eval, stopped at step 4")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    assert folder_line(tmp_path / "mine") == "folder: holds something that is not a run of mmgen: the command would refuse"
