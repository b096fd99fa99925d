"""Disks that are full: one clear message, nothing half-written, and with more room the same command comes to the same bytes."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from worlds import make_world, mixed_recipe, sample_of

ROOT = Path(__file__).parent.parent.parent


def mmgen(*arguments: str, room: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command where no file may grow beyond `room` bytes, as on a disk that fills up while it is written."""

    def limit() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mmgen_cli", *arguments], env=environment, preexec_fn=limit, capture_output=True, text=True, timeout=120
    )


def import_scenes(out: Path, world: Path) -> tuple[list[str], int]:
    return ["import", "scenes", "--level", "0", "--count", "30", "--out", str(out)], 20_000


def train(out: Path, world: Path) -> tuple[list[str], int]:
    (out.parent / "tests").mkdir(exist_ok=True)
    recipe = out.parent / "tests" / "test.toml"
    recipe.write_text(mixed_recipe("phases.joint.steps=2").to_toml())
    return ["train-unified", str(world), "--recipe", str(recipe), "--out", str(out)], 100_000


@pytest.mark.parametrize("stage", [import_scenes, train])
def test_a_full_disk_is_said_and_survived(tmp_path: Path, stage: Callable[[Path, Path], tuple[list[str], int]]) -> None:
    world = make_world(tmp_path / "world", mixed_recipe(), [sample_of(number) for number in range(4)]).shards
    out = tmp_path / "full" / "out"
    out.parent.mkdir()
    arguments, room = stage(out, world)
    failed = mmgen(*arguments, room=room)
    assert failed.returncode == 1
    assert "error: file too large" in failed.stderr
    assert "the same command goes on" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(out.rglob("*.tar"))
    assert not (out / "model.safetensors").exists()
    assert mmgen(*arguments).returncode == 0
    straight = tmp_path / "straight" / "out"
    straight.parent.mkdir()
    assert mmgen(*stage(straight, world)[0]).returncode == 0
    for path in [*straight.rglob("*.tar"), *straight.glob("*.safetensors")]:
        assert (out / path.relative_to(straight)).read_bytes() == path.read_bytes()
