"""The losses of ten tiny steps, kept as text: a refactor must not move them. `make golden` writes them anew, and the diff shows it.

One thread, float32. Processors with other vector units round differently; over ten steps that stays far below the tolerance, while
another order of samples, another initial weight or another row in the loss does not.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_learns import UNIFIED, samples_for, shortened
from worlds import make_world

from stages.options import RunOptions
from stages.recipe import load_recipe
from stages.train_unified import train_unified
from stages.training import loop

GOLDEN = Path(__file__).parent / "golden"
STEPS = 10


@pytest.mark.parametrize("name", UNIFIED)
def test_the_first_losses_are_those_on_record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY_SECONDS", 0.0)
    recipe = load_recipe(name, size="tiny")
    recipe = load_recipe(name, size="tiny", sets=shortened(recipe, batch_tokens=256, steps=STEPS))
    world = make_world(tmp_path / "world", recipe, samples_for(recipe))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_unified(recipe, str(world.shards), tmp_path / "run", RunOptions(quiet=True, dtype="fp32"))
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    phases = len(recipe.phases_for("train-unified")) if len(recipe.backbones) > 1 else 1
    assert len(losses) == STEPS * phases
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("MMGEN_GOLDEN") == "write":
        file.write_text("".join(f"{loss:.6f}\n" for loss in losses), encoding="utf-8")
    assert losses == pytest.approx([float(line) for line in file.read_text(encoding="utf-8").split()], rel=1e-4)
